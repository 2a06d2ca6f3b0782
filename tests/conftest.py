"""What every test has: the same seed at its start, and the graphs that the eager backend runs if it asks."""

import pytest
import torch

from assign import _torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def graphs(monkeypatch):
    """The forward and backward graphs that run, in order of compilation."""
    seen = []
    run_boxed = _torch.run_boxed

    def spy(graph, inputs):
        seen.append(graph)
        return run_boxed(graph, inputs)

    monkeypatch.setattr(_torch.eager_backend, "__defaults__", (spy,))
    return seen
