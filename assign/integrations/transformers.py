"""Search and apply plans for ``transformers.Trainer``.

The loss depends on what the trainer passes to the model (labels, number of items in a batch), so a plan is searched
through the trainer itself.
"""

import contextlib
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from assign import planner
from assign.executor.apply import autocast
from assign.numerics.promotion import THRESHOLD, Promotion
from assign.plan.plan import Assignment
from assign.plan.space import SearchSpace
from assign.tracing.tracer import trace


class Writer(Protocol):
    """Destination of scalars, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Add one point to a curve."""


def search(trainer: Trainer, **search_options: Any) -> Assignment:
    """Return a plan for one step of the trainer: its model, its first batch, its loss.

    If the trainer has ``gradient_accumulation_steps``, its batches are the micro-batches of the plan: their gradients
    are summed inside the backward pass. The trainer itself splits, and weights the losses.

    Args:
        trainer: with a training dataset; it need not have trained.
        search_options: options of :func:`assign.search`, e.g. ``budget="60%"``.
    Raises:
        AssignError: as for :func:`assign.search`; or the search space has another number of micro-batches.
    """
    if trainer.optimizer_cls_and_kwargs is None:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
    else:
        kind, options = trainer.optimizer_cls_and_kwargs
    batch = next(iter(trainer.get_train_dataloader()))
    items = _items(trainer, batch)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = trainer.compute_loss(model, batch, num_items_in_batch=items)
        assert isinstance(found, Tensor)  # a tuple only if outputs are requested
        return found

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = kind(parameters, **options)
        return made

    assert trainer.model is not None
    parts = trainer.args.gradient_accumulation_steps
    if parts == 1:
        return planner.search(trainer.model, batch, loss, optimizer=optimizer, **search_options)
    space = SearchSpace.of(search_options.pop("space", "native"))
    space.step.check_accumulation(parts, where="search", setting="gradient_accumulation_steps")
    space = replace(space, step=replace(space.step, part_statistics=True))
    step = trace(trainer.model, batch, loss, optimizer).as_part_of(parts)
    return planner.search(step, space=space, **search_options)


def _items(trainer: Trainer, batch: Any) -> Any:
    _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    return items


class PlanCallback(TrainerCallback):
    """Train under a plan: ``Trainer(…, callbacks=[PlanCallback(plan)])``.

    From the start to the end of training the trainer's model computes under the plan, in evaluation too; afterwards it
    is the plain model again. Tensors that overflow too often are promoted.

    Attributes:
        promotion: the promotions, and the plan with them.

    Args:
        plan: for the trainer's step, from :func:`search`. A plan that stores masters, gradients or buffers in fewer
            bits is refused: give the trainer ``assign.apply(model, plan)`` and the optimizer of ``assign.optimizer``
            instead.
        writer: gets ``assign/promoted``, ``assign/overflow_max``, ``assign/overflow_mean`` whenever the trainer logs.
        backend: as in :func:`assign.apply`.
        promote_every: steps between two measurements of overflow, as ``every`` in :class:`assign.Promotion`.
        promote_threshold: as ``threshold`` there.
    """

    def __init__(
        self,
        plan: Assignment,
        *,
        writer: Writer | None = None,
        backend: str = "inductor",
        promote_every: int | None = None,
        promote_threshold: float = THRESHOLD,
    ) -> None:
        self.promotion = Promotion(plan, every=promote_every, threshold=promote_threshold)
        self._plan, self._backend, self._writer = plan, backend, writer
        self._planned = contextlib.ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Put the model under the plan.

        Raises:
            PlanError: the plan has micro-batches, and the trainer accumulates over another number of batches.
        """
        self._plan.step.check_accumulation(
            args.gradient_accumulation_steps, where="PlanCallback", setting="gradient_accumulation_steps"
        )
        self._planned.enter_context(
            autocast(given["model"], self._plan, backend=self._backend, promotion=self.promotion)
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Promote tensors that overflowed, after each optimizer step."""
        self.promotion.step()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the scalars."""
        if self._writer is not None:
            for name, value in self.promotion.scalars().items():
                self._writer.add_scalar(name, value, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the model out of the plan."""
        self._planned.close()
