"""Split a batch along its first dimension into the micro-batches of a plan.

Works on any nesting of tuples, lists, mappings and dataclasses that contains tensors. A tensor is split if its first
dimension is that of the batch; everything else is given to every part. The module does not import torch: a tensor is
what has ``shape`` and ``narrow``.
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assign.errors import PlanError
from assign.plan.step_options import Reduction, StepOptions

IGNORED = -100
"""Label that a loss of torch and of transformers leaves out by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One part of a batch.

    Attributes:
        batch: of the same structure as the whole batch.
        weight: factor of its loss; the loss of the whole batch is the sum of weight × loss over all parts.
    """

    batch: Any
    weight: float


def split(batch: Any, options: StepOptions) -> list[MicroBatch]:
    """Return the micro-batches of a batch.

    Sizes differ by at most one row. A batch with fewer rows than micro-batches has one part for each row. If parts are
    weighted by labels, a part without labels is left out, because its own mean would be NaN.

    Args:
        batch: contains at least one tensor with a first dimension.
        options: number of micro-batches and reduction of the loss.
    Returns:
        The parts in order.
    Raises:
        PlanError: the batch contains no rows, contains an object that cannot be split, or the reduction needs labels
            and there are none.
    """
    rows = count_rows(batch)
    count = min(options.micro_batches, rows)
    ends = [rows * number // count for number in range(count + 1)]
    places = [(start, end - start) for start, end in itertools.pairwise(ends)]
    parts = [_rows_of(batch, rows, *place) if count > 1 else batch for place in places]
    weighted = zip(parts, weights_of(parts, options.reduction), strict=True)
    return [MicroBatch(batch=part, weight=weight) for part, weight in weighted if weight]


def weights_of(parts: Sequence[Any], reduction: Reduction) -> list[float]:
    """Return the factor of the loss of each part; 0 for a part without labels that count.

    Raises:
        PlanError: the reduction needs labels, and there are none.
    """
    if reduction is Reduction.SUM:
        return [1.0] * len(parts)
    sizes = [_size(part, reduction) for part in parts]
    whole = sum(sizes)
    return [size / whole if whole else 1 / len(parts) for size in sizes]


def count_rows(batch: Any) -> int:
    """Return the length of the first dimension of the first tensor that has one.

    Raises:
        PlanError: there is no such tensor, or it has no rows.
    """
    rows = next((int(each.shape[0]) for each in _tensors(batch) if len(each.shape)), 0)
    if not rows:
        raise PlanError(
            f"micro-batches: the batch, a {type(batch).__name__}, contains no tensor with rows to split.\n"
            "  Allowed: a tensor, or tuples, lists, mappings and dataclasses that contain tensors, the first dimension "
            "being that of the batch.\n  Give such a batch, or set micro_batches=1."
        )
    return rows


def _size(part: Any, reduction: Reduction) -> int:
    if reduction is Reduction.MEAN:
        return count_rows(part)
    labels = labels_of(part)
    if labels is None:
        raise PlanError(
            f"micro-batches: the plan weights the loss of a part by its labels, and a batch, a {type(part).__name__}, "
            "contains no labels.\n  Allowed: an entry 'labels', or a tensor of whole numbers, the last one of the "
            "batch.\n  Give the batch that the plan was made with, or search again."
        )
    if reduction is Reduction.SHIFTED_LABELS and len(labels.shape) > 1:
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())


def labels_of(batch: Any) -> Any:
    """Return the labels in a batch: its entry ``labels``, else its last tensor of whole numbers; None without one."""
    if isinstance(batch, Mapping) and is_tensor(batch.get("labels")):
        return batch["labels"]
    whole = [each for each in _tensors(batch) if _is_whole(each)]
    return whole[-1] if whole else None


def with_labels(batch: Any, labels: Any) -> Any:
    """Return a copy of a batch that has labels (:func:`labels_of`) with other ones; all else is shared."""
    if isinstance(batch, Mapping) and is_tensor(batch.get("labels")):
        return _copied(batch, {**batch, "labels": labels})
    remaining = itertools.count(1 - sum(map(_is_whole, _tensors(batch))))  # 0 at the last tensor of whole numbers
    return _map(lambda each: labels if _is_whole(each) and not next(remaining) else each, batch)


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor of torch, or behaves like one."""
    return hasattr(value, "shape") and hasattr(value, "narrow")


def _is_whole(tensor: Any) -> bool:
    return len(tensor.shape) > 0 and "int" in str(tensor.dtype)


def _tensors(batch: Any) -> list[Any]:
    """Return the tensors of a batch, in the order in which :func:`_map` changes them."""
    found: list[Any] = []
    _map(found.append, batch)
    return found


def _rows_of(batch: Any, rows: int, start: int, length: int) -> Any:
    """Return ``length`` rows from ``start`` on of every tensor that has ``rows`` rows; all else is shared."""
    return _map(lambda x: x.narrow(0, start, length) if len(x.shape) and x.shape[0] == rows else x, batch)


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Return the same structure with every tensor changed."""
    if is_tensor(value):
        return change(value)
    if isinstance(value, Mapping):
        return _copied(value, {name: _map(change, each) for name, each in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(change, each) for each in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(change, each) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: _map(change, getattr(value, name)) for name in names})
    return value


def _copied(value: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    """Return a copy of a mapping of any class with other values; a plain dict if the class forbids writing."""
    if type(value) is dict:
        return changed
    found: Any = copy.copy(value)
    try:
        for name, each in changed.items():
            found[name] = each
    except TypeError:
        return changed
    return found
