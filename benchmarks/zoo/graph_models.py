"""Graph neural networks of torch_geometric on a small random graph."""

import importlib
from typing import Any

import torch
from torch import nn

NODES, EDGES, WIDTH, CLASSES = 24, 80, 8, 3
_MODELS = ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN")
_CONVOLUTIONS = ("ChebConv", "TransformerConv", "SGConv", "ARMAConv", "GatedGraphConv", "TAGConv", "GENConv")
_SETTINGS: dict[str, dict[str, Any]] = {
    "PNA": {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.tensor([1, 4, 8, 4])},
    "ChebConv": {"K": 2},
}


def names() -> list[tuple[str, str]]:
    """Complete models, and convolutions in a net of two of them."""
    return [*(("models", each) for each in _MODELS), *(("conv", each) for each in _CONVOLUTIONS)]


class _Net(nn.Module):
    def __init__(self, kind: Any, settings: dict[str, Any]) -> None:
        super().__init__()
        first = (WIDTH, 2) if kind.__name__ == "GatedGraphConv" else (WIDTH, WIDTH)
        self.first = kind(*first, **settings)
        self.second = kind(*first, **settings)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        x = self.first(x, edge_index).relu()
        found: torch.Tensor = self.head(self.second(x, edge_index).relu())
        return found


def build(part: str, name: str) -> tuple[nn.Module, Any]:
    """The model; nodes, edges and a class for each node."""
    torch.manual_seed(0)
    library = importlib.import_module("torch_geometric.nn")
    settings = _SETTINGS.get(name, {})
    if part == "models":
        model = getattr(library, name)(WIDTH, 16, num_layers=2, out_channels=CLASSES, **settings)
    else:
        model = _Net(getattr(library, name), settings)
    edges = torch.randint(0, NODES, (2, EDGES))
    batch = {"x": torch.randn(NODES, WIDTH), "edge_index": edges, "classes": torch.randint(0, CLASSES, (NODES,))}
    return model.train(), batch


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Cross entropy of all nodes."""
    return nn.functional.cross_entropy(model(batch["x"], batch["edge_index"]), batch["classes"])
