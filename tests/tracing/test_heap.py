"""Freed memory is returned to the operating system in the first two steps of a new size, and never otherwise."""

import pytest
import torch

from assign.tracing import heap


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []
    monkeypatch.setattr(heap, "trim", lambda: calls.append(None))
    return calls


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([8, 8, 8], [0, 0, 0]),  # one size needs no trimming
        ([8, 4, 4, 4], [0, 1, 1, 0]),
        ([8, 4, 8, 8, 8], [0, 1, 1, 1, 0]),
    ],
)
def test_new_sizes_are_trimmed_twice(trims: list[None], rows: list[int], expected: list[int]) -> None:
    of_step = heap.Heap()
    found = []
    for count in rows:
        before = len(trims)
        of_step.next_step({"x": torch.zeros(count, 3), "scale": 2.0})
        found.append(len(trims) - before)
    assert found == expected


def test_tensors_on_other_devices_do_not_count(trims: list[None]) -> None:
    of_step = heap.Heap()
    for count in (8, 4):
        of_step.next_step(torch.zeros(count, device="meta"))
    assert not trims
