"""Run a batch in micro-batches: one after another, forward and backward, with the gradients summed.

The whole work is done when the step is called. The loss that it returns has the value of the whole batch's loss; its
``backward`` gives the summed gradients to the parameters. If the loss is multiplied before ``backward``, e.g. by a loss
scale, the gradients are multiplied afterwards. The next step computes with that factor from the beginning, so that a
loss scale protects small gradients from underflow in the backward pass.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from assign import _torch, distributed
from assign.errors import PlanError
from assign.numerics.torch_dtypes import SIXTEEN_BITS
from assign.optim.gradients import set_gradient
from assign.optim.summing import add_gradient
from assign.plan.split import IGNORED, MicroBatch, labels_of, split, weights_of, with_labels
from assign.plan.step_options import Reduction, StepOptions
from assign.tracing.capture import Capture, Loss

_BATCH_STATISTICS = {"batch_norm": 5}
"""Operators that compute statistics over the batch in training → position of their argument ``training``."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class MicroBatchedStep:
    """``step(batch)`` → loss, in micro-batches.

    Args:
        model: its parameters get the gradients.
        step: ``step(model, batch)`` → loss of a part; its backward pass adds to ``.grad``.
        options: of the plan.
    """

    def __init__(self, model: nn.Module, step: Callable[..., Tensor], options: StepOptions) -> None:
        self._model, self._step, self._options = model, step, options
        self._factor = 1.0

    def __call__(self, batch: Any) -> Tensor:
        """Return the loss of the whole batch; call ``backward`` on it.

        Raises:
            PlanError: the batch cannot be split, or the loss of a part is no scalar.
        """
        parts = split(batch, self._options)
        if not torch.is_grad_enabled():
            return torch.stack([part.weight * self._loss(part) for part in parts]).sum()
        parameters = [each for each in self._model.parameters() if each.requires_grad]
        with _without_gradients(parameters):
            losses = [self._run(part) for part in parts]
            gradients = [each.grad for each in parameters]
        total = torch.stack(losses).sum()
        anchor = torch.zeros((), device=total.device, dtype=total.dtype, requires_grad=True)
        given = _Given(parameters, gradients, self._factor, self.expect)
        return _torch.apply_function(_Whole, anchor, total, given)

    def _run(self, part: MicroBatch) -> Tensor:
        loss = self._loss(part)
        factor = torch.tensor(part.weight * self._factor, dtype=loss.dtype, device=loss.device)
        torch.autograd.backward(loss, factor.expand(loss.shape))
        return part.weight * loss.detach().reshape(())

    def _loss(self, part: MicroBatch) -> Tensor:
        loss = self._step(self._model, part.batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise PlanError(
                f"micro-batches: the loss of a part is {what}.\n  Allowed: a tensor with one element.\n"
                "  Reduce the loss in loss(model, batch), or set micro_batches to 1."
            )
        return loss

    def expect(self, factor: float) -> None:
        """Compute the next gradients as if the loss will be multiplied by ``factor``, for example by a loss scale.

        Default: the factor of the last step, and 1 for the first.
        """
        self._factor = factor


class _Given:
    """Gradients of one call of a step, which its loss gives to the parameters in ``backward``."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        factor: float,
        on_factor: Callable[[float], None],
    ) -> None:
        self._parameters, self._factor, self._on_factor = parameters, factor, on_factor
        self._gradients: list[Tensor | None] | None = list(gradients)

    @torch.no_grad()
    def give(self, factor: float) -> None:
        """Multiply the gradients by the factor that they do not have yet, and give them to the parameters."""
        if self._gradients is None:
            raise PlanError(
                "micro-batches: backward was called twice on the loss of one step.\n  Allowed: once.\n"
                "  Call step(batch) again."
            )
        for position, parameter in enumerate(self._parameters):
            gradient, self._gradients[position] = self._gradients[position], None
            if gradient is None:
                continue
            if factor != self._factor:
                gradient.mul_(factor / self._factor)
            if parameter.grad is None:
                set_gradient(parameter, gradient)
            else:
                add_gradient(parameter, gradient, parameter.grad.dtype)
        self._gradients = None
        if factor:
            self._on_factor(factor)


class _Whole(torch.autograd.Function):
    """The loss of a batch, whose gradients are computed already."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, total: Tensor, given: _Given) -> Tensor:
        ctx.given = given
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.given.give(float(grads[0]))
        return None, None, None


@contextlib.contextmanager
def _without_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within the context, the parameters begin without gradients; afterwards they have those from before."""
    before = [(each, each.grad) for each in parameters]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = None
            if gradient is not None:
                set_gradient(parameter, gradient)


def parameters_to_sum(capture: Capture, needed: Sequence[frozenset[int]], sparse: Sequence[int]) -> frozenset[int]:
    """Return the positions of the parameters whose gradients the captured graph can sum itself.

    The others are summed by autograd after the backward pass: parameters with sparse gradients, those that only some
    results depend on, those that a checkpointed block reads, those of a step in several graphs, and all of them if
    several processes train the model, because ``DistributedDataParallel`` and FSDP2 reduce what autograd sums.

    Args:
        capture: of a training step.
        needed: for each input, the positions of the results that depend on it.
        sparse: positions of the inputs with sparse gradients.
    """
    if not capture.training or capture.is_part or distributed.is_several():
        return frozenset()
    inputs = capture.graph.graph.find_nodes(op="placeholder")
    results = frozenset[int]().union(
        *(needed[place] for place, node in enumerate(inputs) if node in capture.parameters)
    )
    own = {place: node for place, node in enumerate(inputs) if node in capture.parameters and place not in sparse}
    outside = (place for place, node in own.items() if not any(u.target is _torch.CHECKPOINT_OP for u in node.users))
    return frozenset(place for place in outside if needed[place] == results)


def check_statistics(capture: Capture, options: StepOptions) -> None:
    """Check that no operator of a training step computes statistics over a part of the batch without permission.

    Raises:
        PlanError: BatchNorm is in training mode, and the plan does not allow it.
    """
    if options.micro_batches == 1 or options.part_statistics or not capture.training:
        return
    for node in capture.graph.graph.nodes:
        place = _BATCH_STATISTICS.get(getattr(node.target, "__name__", ""))
        if place is not None and (node.args[place] if len(node.args) > place else node.kwargs.get("training")):
            raise statistics_error(options)


def statistics_error(options: StepOptions) -> PlanError:
    """Return the error for BatchNorm under a plan with micro-batches."""
    return PlanError(
        f"micro-batches: the model has BatchNorm in training mode, whose statistics are those of the whole batch, and "
        f"the plan runs the batch in {options.micro_batches} parts.\n"
        "  Allowed: GroupNorm or LayerNorm; BatchNorm in evaluation mode; or statistics of each part, if you ask for "
        "them.\n  Set part_statistics=True in StepOptions, or give --part-statistics."
    )


def find_reduction(model: nn.Module, loss: Loss, batch: Any, options: StepOptions) -> Reduction:
    """Find how the loss of a batch follows from the losses of its parts.

    The loss of the whole batch and those of its parts are computed without a plan, in evaluation mode, so that random
    operators do not differ. If labels are in the batch, this is repeated with some of them left out (-100): only then
    do a mean over rows and a mean over labels differ. The model and the random generators are left as they were.

    Args:
        model: the model as loaded, on the device of the batch.
        loss: ``loss(model, batch)`` → scalar tensor.
        batch: the whole batch.
        options: number of micro-batches, and whether statistics of parts are allowed.
    Returns:
        The first of ``mean``, ``labels``, ``shifted-labels`` and ``sum`` that fits.
    Raises:
        PlanError: none fits; or BatchNorm is in training mode, and the options do not allow it.
    """
    normalizing = (each for each in model.modules() if isinstance(each, _BATCH_NORMS))
    if not options.part_statistics and any(each.training for each in normalizing):
        raise statistics_error(options)
    with _evaluating(model):
        whole, found = _compared(model, loss, batch, options)
        fitting = [each for each in Reduction if _is_close(found.get(each), whole, model)]
        if not fitting:
            named = ", ".join(f"{value:.6g} as {each}" for each, value in found.items())
            raise PlanError(
                f"micro-batches: the loss of a batch, {whole:.6g}, does not follow from the losses of its "
                f"{options.micro_batches} parts: {named}.\n"
                "  Allowed: a mean or a sum over rows, or a mean over labels that are not -100.\n"
                "  Compute such a loss, or set micro_batches to 1. A loss that compares the rows of a batch with each "
                "other cannot be split."
            )
        masked = _with_labels_left_out(batch, options) if len(fitting) > 1 else None
        if masked is not None:
            with contextlib.suppress(Exception):  # a loss that does not know ignored labels may raise anything
                whole, found = _compared(model, loss, masked, options)
                fitting = [each for each in fitting if _is_close(found.get(each), whole, model)] or fitting
    return fitting[0]


def _compared(model: nn.Module, loss: Loss, batch: Any, options: StepOptions) -> tuple[float, dict[Reduction, float]]:
    """Return the loss of a batch, and what each reduction makes of the losses of its parts."""
    whole = float(loss(model, batch))
    parts = [part.batch for part in split(batch, replace(options, reduction=Reduction.MEAN))]
    losses = [float(loss(model, part)) for part in parts]
    weights = {each: weights_of(parts, each) for each in Reduction if _applies(each, batch)}
    return whole, {
        each: math.fsum(weight * value for weight, value in zip(found, losses, strict=True) if weight)
        for each, found in weights.items()
    }


def _applies(reduction: Reduction, batch: Any) -> bool:
    return reduction in (Reduction.MEAN, Reduction.SUM) or labels_of(batch) is not None


def _is_close(found: float | None, whole: float, model: nn.Module) -> bool:
    """Whether two losses differ by rounding alone: a sum of some thousand terms in the dtype of the parameters."""
    narrow = any(each.dtype in SIXTEEN_BITS for each in model.parameters())
    return found is not None and math.isclose(found, whole, rel_tol=1e-2 if narrow else 1e-4, abs_tol=1e-6)


def _with_labels_left_out(batch: Any, options: StepOptions) -> Any:
    """Return a copy of the batch in which the parts have different numbers of labels; None without labels."""
    labels = labels_of(batch)
    if labels is None or labels.is_floating_point():
        return None
    changed = labels.clone()
    rows = max(1, len(changed) // options.micro_batches // 2)  # half of the first part
    if changed.dim() > 1:
        changed[:rows, : max(1, changed.size(1) // 2)] = IGNORED
    else:
        changed[:rows] = IGNORED
    return with_labels(batch, changed)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context, the model is in evaluation mode, gradients are off, and random numbers are not used up."""
    training = [each for each in model.modules() if each.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for each in training:
            each.training = True
