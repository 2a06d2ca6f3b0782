"""How a batch is split into micro-batches, and how their losses are weighted."""

import collections
import dataclasses
from collections import UserDict, namedtuple

import pytest
import torch

from assign.errors import PlanError
from assign.plan.split import split
from assign.plan.step_options import Reduction, StepOptions

Pair = namedtuple("Pair", ["inputs", "labels"])


@dataclasses.dataclass
class Record:
    inputs: torch.Tensor
    name: str


def four(reduction=Reduction.MEAN):
    return StepOptions(micro_batches=4, reduction=reduction)


def rows(count=8):
    return torch.arange(count * 3).reshape(count, 3)


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        (rows(), lambda b: b),
        ((rows(), torch.arange(8)), lambda b: b[0]),
        ([rows(), 5], lambda b: b[0]),
        (Pair(rows(), torch.arange(8)), lambda b: b.inputs),
        ({"x": rows(), "more": {"mask": torch.ones(8)}}, lambda b: b["x"]),
        (UserDict(x=rows()), lambda b: b["x"]),
        (collections.OrderedDict(x=rows()), lambda b: b["x"]),
        (Record(rows(), "a"), lambda b: b.inputs),
    ],
    ids=lambda x: type(x).__name__,
)
def test_every_structure_is_split_and_kept(batch, inputs):
    parts = split(batch, four())
    assert [type(part.batch) for part in parts] == [type(batch)] * 4
    assert [inputs(part.batch).shape[0] for part in parts] == [2] * 4
    assert torch.equal(torch.cat([inputs(part.batch) for part in parts]), inputs(batch))
    assert [part.weight for part in parts] == [0.25] * 4
    assert inputs(batch).shape[0] == 8  # the batch itself is as it was


def test_what_has_no_rows_is_given_to_every_part():
    weights, scale = torch.ones(5), torch.tensor(2.0)
    for part in split((rows(), weights, scale, "text"), four()):
        assert part.batch[1] is weights
        assert part.batch[2] is scale
        assert part.batch[3] == "text"


def test_one_part_is_the_batch_itself():
    batch = (rows(), torch.arange(8))
    (part,) = split(batch, StepOptions())
    assert part.batch is batch
    assert part.weight == 1


@pytest.mark.parametrize(("count", "sizes"), [(10, [2, 3, 2, 3]), (5, [1, 1, 1, 2]), (3, [1, 1, 1])])
def test_sizes_differ_by_one_row_and_weigh_by_their_rows(count, sizes):
    parts = split(rows(count), four())
    assert [len(part.batch) for part in parts] == sizes
    assert [part.weight for part in parts] == [size / count for size in sizes]
    assert len(parts[-1].batch) == max(sizes)  # that one is traced


def test_parts_are_weighted_by_labels_that_count():
    labels = torch.ones(8, 4, dtype=torch.long)
    labels[:2] = -100  # the first part has none
    labels[2, 1:] = -100
    batch = {"input_ids": torch.zeros(8, 4, dtype=torch.long), "labels": labels}
    assert [part.weight for part in split(batch, four(Reduction.LABELS))] == [5 / 21, 8 / 21, 8 / 21]
    assert [part.weight for part in split(batch, four(Reduction.SHIFTED_LABELS))] == [3 / 15, 6 / 15, 6 / 15]
    assert [part.weight for part in split(batch, four(Reduction.SUM))] == [1] * 4
    everything = {**batch, "labels": torch.full((8, 4), -100)}
    assert [part.weight for part in split(everything, four(Reduction.LABELS))] == [0.25] * 4


@pytest.mark.parametrize("batch", ["text", (), {"x": torch.tensor(1.0)}, torch.zeros(0, 3), object()])
def test_a_batch_without_rows_is_refused(batch):
    with pytest.raises(PlanError, match=r"no tensor with rows to split.\n  Allowed: .*\n*.*micro_batches=1"):
        split(batch, four())


def test_a_batch_without_labels_is_refused_if_they_weigh():
    with pytest.raises(PlanError, match="contains no labels"):
        split(torch.zeros(8, 3), four(Reduction.LABELS))


@pytest.mark.parametrize("number", [0, -1, 2.0, True, "4", 2**21])
def test_an_impossible_number_of_parts_is_refused(number):
    with pytest.raises(PlanError, match=r"micro_batches=.* is not possible.\n  Allowed: a whole number from 1"):
        StepOptions(micro_batches=number)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(PlanError, match="reduction='means' does not exist, did you mean 'mean'"):
        StepOptions(micro_batches=2, reduction="means")
