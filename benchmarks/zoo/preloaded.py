"""The libraries that every model needs, imported once in the fork server: its child processes need not import them."""

import importlib

from benchmarks.zoo import torchvision_standin

torchvision_standin.install()  # before transformers looks whether timm can run
for _name in ("transformers.modeling_utils", "peft", "benchmarks.zoo.try_model"):
    importlib.import_module(_name)
