"""Tiny models of libraries, each with a batch and a loss; which of them the benchmark runs is in ``names.txt``.

python benchmarks/zoo/build.py     # writes names.txt again, for the versions of the libraries that are installed
"""

import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

LIBRARIES = {
    "transformers": "transformers_models",
    "timm": "timm_models",
    "diffusers": "diffusers_models",
    "peft": "peft_models",
    "torch_geometric": "graph_models",
}
"""Each with the module here that builds its models: ``names``, ``build``, and ``loss`` where there is another one."""

NAMES = Path(__file__).parent / "names.txt"


class Name(NamedTuple):
    """One model: its package, its modelling file there, and its class or its name."""

    package: str
    file: str
    name: str


def names(libraries: list[str]) -> list[Name]:
    """The committed list, of these libraries."""
    rows = [Name(*line.split()) for line in NAMES.read_text().splitlines() if line and not line.startswith("#")]
    return [row for row in rows if row.package in libraries]


def build(row: Name) -> tuple[Any, Any, Any]:
    """A tiny model, a batch, and the loss as a function of the two."""
    module = importlib.import_module(f"benchmarks.zoo.{LIBRARIES[row.package]}")
    own = getattr(module, "loss", None) or importlib.import_module("benchmarks.zoo.losses").loss
    return *module.build(row.file, row.name), own


def regenerate() -> None:
    """Write the list for the libraries that are installed."""
    lines = []
    for library, module in LIBRARIES.items():
        version = importlib.import_module("importlib.metadata").version(library)
        lines.append(f"# {library} {version}")
        found = importlib.import_module(f"benchmarks.zoo.{module}").names()
        lines += [" ".join((library, *each)) for each in found]
    NAMES.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    regenerate()
