"""Certify predictions that cannot change when a model computes in another precision.

For a sample, Γ is the distance between the two largest class probabilities of the model. δ is the largest distance,
over all classes, between its probabilities and those of the other precision. No probability changes by more than δ. If
Γ > 2δ, the most probable class therefore stays the same, and the sample is certified. The lemma says nothing about the
other samples; most of them agree too.

Source: arXiv 2305.10947, section 3; arXiv 2301.12809.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from assign.errors import TaskError
from assign.executor.apply import apply
from assign.plan.plan import Assignment
from assign.tasks.batch import Batch
from assign.tasks.task import Task, check_device

QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """How far a model's predictions change in another precision.

    Γ is the distance between the two largest class probabilities of the model, δ the largest distance between any of
    its probabilities and the other precision's. With Γ > 2δ the prediction cannot change.

    Attributes:
        samples: number of predictions: one per example, or one per position of each example.
        certified: number of samples with Γ > 2δ.
        disagreements: number of samples that the two predict differently.
        violations: number of disagreements that are certified; it must be 0.
        non_finite: number of samples with a non-finite probability in either; never certified, always a disagreement.
        margins: Γ of each sample: float64 [samples].
        deviations: δ of each sample: float64 [samples].
    """

    samples: int
    certified: int
    disagreements: int
    violations: int
    non_finite: int
    margins: Tensor = field(repr=False)
    deviations: Tensor = field(repr=False)

    @property
    def certified_share(self) -> float:
        """Share of the samples that are certified."""
        return self.certified / self.samples

    def to_json(self) -> dict[str, Any]:
        """Return plain data: counts, and quantiles of margins and deviations over the finite samples."""
        counts = {name: getattr(self, name) for name in ("samples", "certified", "certified_share", "disagreements")}
        more = {"violations": self.violations, "non_finite": self.non_finite}
        return {**counts, **more, "margin": quantiles(self.margins), "deviation": quantiles(self.deviations)}


def certify(
    model: Callable[..., Any],
    other: Callable[..., Any],
    batches: Iterable[Batch],
    *,
    class_axis: int = -1,
    probabilities: bool = False,
) -> Certificate:
    """Compare the predictions of ``model``, in fp32, with those of ``other``, the same model in another precision.

    Modules are called without gradients and in eval mode; their mode is restored afterwards.

    Args:
        model: the model in fp32, or any callable that takes the batches and predicts classes.
        other: ``assign.apply(model, plan)``, ``lambda x: half(x.half())``, or any callable that takes the same batches.
        batches: inputs of both: each is a tensor, a tuple of arguments, or a mapping of arguments by name.
        class_axis: of the result, which is a tensor of logits or has ``logits``. Every position along the other axes is
            a sample.
        probabilities: whether they return probabilities instead of logits.
    Returns:
        The certificate: for each sample, whether its prediction can change.
    Raises:
        TaskError: there is no batch, or a result is not a prediction of classes.
    Examples:
        ```python
        planned = assign.apply(model, plan, backend="eager")
        print(assign.analysis.certify(model, planned, [batch[0]]).certified_share)
        ```
    """
    parts = []
    for batch in batches:
        with torch.no_grad():
            both = [_probabilities(_call(each, batch), class_axis, probabilities) for each in (model, other)]
        if both[0].shape != both[1].shape:
            raise TaskError(
                f"certify: samples × classes are {[*both[0].shape]} for the model, {[*both[1].shape]} for the other.\n"
                "  Allowed: the same shape.\n  Give the same model in another precision."
            )
        parts.append(_compare(*both))
    if not any(len(margins) for margins, _, _ in parts):
        raise TaskError(
            "certify: there is no batch.\n  Allowed: at least one.\n  Give the evaluation data as a list of batches."
        )
    margins, deviations, same = (torch.cat(each) for each in zip(*parts, strict=True))
    certified = margins > 2 * deviations  # False if either is NaN
    return Certificate(
        samples=len(margins),
        certified=int(certified.sum()),
        disagreements=int((~same).sum()),
        violations=int((certified & ~same).sum()),
        non_finite=int(deviations.isnan().sum()),
        margins=margins,
        deviations=deviations,
    )


def certify_task(
    task: Task, model: nn.Module, plan: Assignment, *, backend: str = "eager", device: str = "cpu"
) -> Certificate:
    """Return the certificate of a trained model of ``task`` under ``plan``, on the task's evaluation data.

    The data are the inputs with which the task's ``evaluate`` calls the model. The classes are the last axis of its
    result.

    Raises:
        TaskError: the task has no ``evaluate``, or it does not call the model.
        PlanError, TraceError: as for ``assign.apply``.
    """
    if task.evaluate is None:
        raise TaskError(
            "certify: the task has no evaluate(model), which provides the data to certify.\n"
            "  Allowed: a task with one.\n  Give the Task evaluate=, a function that calls the model on the test data."
        )
    model = model.to(check_device(device))
    calls: list[_Call] = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(_Call(args, kwargs)), with_kwargs=True)
    try:
        with torch.no_grad(), _evaluating(model):
            task.evaluate(model)
    finally:
        hook.remove()
    planned = apply(copy.deepcopy(model), plan, backend=backend)  # a plan may change the dtype of its model's weights
    return certify(model, planned, calls)


@dataclass(frozen=True, slots=True)
class _Call:
    """Arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def quantiles(values: Tensor) -> dict[str, float]:
    """Return some quantiles of the finite values, by name: ``{"0.5": …}``; empty if there are none."""
    finite = values[values.isfinite()].sort().values
    places = {q: round(q * (len(finite) - 1)) for q in QUANTILES}
    return {f"{q:g}": float(finite[place]) for q, place in places.items()} if len(finite) else {}


def _call(model: Callable[..., Any], batch: Batch) -> Any:
    with _evaluating(model):
        if isinstance(batch, _Call):
            return model(*batch.args, **batch.kwargs)
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextmanager
def _evaluating(model: Callable[..., Any]) -> Iterator[None]:
    """Put a module in eval mode in the context; afterwards restore the mode of each of its modules."""
    was = {part: part.training for part in model.modules()} if isinstance(model, nn.Module) else {}
    for part in was:
        part.training = False
    try:
        yield
    finally:
        for part, training in was.items():
            part.training = training


def _probabilities(found: Any, class_axis: int, probabilities: bool) -> Tensor:
    """Return the probabilities in a result: float64 [samples, classes]."""
    found = found["logits"] if isinstance(found, Mapping) and "logits" in found else getattr(found, "logits", found)
    fits = isinstance(found, Tensor) and found.is_floating_point() and -found.ndim <= class_axis < found.ndim
    if not fits or found.ndim < 2 or found.shape[class_axis] < 2:
        what = (
            f"{found.dtype} of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        )
        raise TaskError(
            f"certify: the model returns {what}, and axis {class_axis} must be the classes.\n"
            "  Allowed: a floating-point tensor, samples by at least two classes, or an object with such .logits.\n"
            "  Give a model that classifies, and class_axis= if the classes are in another axis."
        )
    wide = found.double().movedim(class_axis, -1).flatten(0, -2)
    found_probabilities: Tensor = wide if probabilities else wide.softmax(-1)
    return found_probabilities


def _compare(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Γ, δ and whether both predict the same, per sample; NaN and False where either is not finite."""
    finite = (ours.isfinite() & theirs.isfinite()).all(-1)
    first, second = ours.topk(2).values.unbind(-1)
    bad = torch.full_like(first, torch.nan)
    margin = torch.where(finite, first - second, bad)
    deviation = torch.where(finite, (ours - theirs).abs().amax(-1), bad)
    same = (ours.argmax(-1) == theirs.argmax(-1)) & finite
    return margin.cpu(), deviation.cpu(), same.cpu()
