"""Training under a plan with Lightning's ``Trainer``."""

import contextlib
from typing import Any

import lightning.pytorch as pl

from assign.errors import PlanError
from assign.executor.apply import autocast
from assign.numerics.promotion import THRESHOLD, Promotion
from assign.plan.plan import Assignment


class PlanCallback(pl.Callback):
    """Train under a plan: ``Trainer(callbacks=[PlanCallback(plan, module="model")])``.

    From the start to the end of ``fit``, one module of the ``LightningModule`` computes under the plan, in validation
    too. Code of ``training_step`` outside that module, usually the loss, runs as without a plan. Tensors that overflow
    too often are promoted; ``assign/promoted``, ``assign/overflow_max`` and ``assign/overflow_mean`` are logged.

    Attributes:
        promotion: the promotions, and the plan with them.

    Args:
        plan: for that module, from ``assign.search``.
        module: its path in the ``LightningModule``.
        backend: as in :func:`assign.apply`.
        promote_every: steps between two measurements of overflow, as ``every`` in :class:`assign.Promotion`.
        promote_threshold: as ``threshold`` there.
    Raises:
        PlanError: as for :func:`assign.autocast`; there is no such module; or the plan has micro-batches, and the
            trainer accumulates over another number of batches.
    """

    def __init__(
        self,
        plan: Assignment,
        *,
        module: str = "model",
        backend: str = "inductor",
        promote_every: int | None = None,
        promote_threshold: float = THRESHOLD,
    ) -> None:
        self.promotion = Promotion(plan, every=promote_every, threshold=promote_threshold)
        self._plan, self._module, self._backend = plan, module, backend
        self._planned = contextlib.ExitStack()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the module under the plan."""
        self._plan.step.check_accumulation(
            trainer.accumulate_grad_batches, where="PlanCallback", setting="accumulate_grad_batches"
        )
        known = dict(pl_module.named_modules())
        if not self._module or self._module not in known:
            named = ", ".join(repr(name) for name, _ in pl_module.named_children()) or "none"
            raise PlanError(
                f"PlanCallback: the LightningModule has no module {self._module!r} to compute under the plan; its own "
                f"are: {named}.\n  Give the one that the plan was searched for: PlanCallback(plan, module=…)."
            )
        context = autocast(known[self._module], self._plan, backend=self._backend, promotion=self.promotion)
        self._planned.enter_context(context)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Promote tensors that overflowed, and log."""
        self.promotion.step()
        pl_module.log_dict(self.promotion.scalars())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the module out of the plan."""
        self._planned.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the module out of the plan after an error."""
        self._planned.close()
