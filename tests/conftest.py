"""What every test has: the same seed at its start; if it asks, the graphs that the eager backend runs and a browser."""

import gc
import shutil

import pytest
import torch

from assign import _torch

gc.set_threshold(20_000)  # of Python's 700: a collection looks at all of torch, and took a quarter of the tests' time


@pytest.fixture(scope="module", autouse=True)
def _older_objects():
    """What was made before a file, all of torch above all, is not looked at whenever its tests collect garbage."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="module")
def browser():
    """Chromium, one for each file of tests."""
    place = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if place is None:
        pytest.skip("there is no Chromium on this machine (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield chromium
        chromium.close()
