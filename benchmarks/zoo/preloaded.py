"""What the processes of the zoo have in common, imported once: each model's process is forked behind it."""

import importlib

from benchmarks.zoo import torchvision_standin

torchvision_standin.install()  # before transformers looks whether timm can run
for _name in ("transformers.modeling_utils", "peft", "benchmarks.zoo.try_model"):
    importlib.import_module(_name)
