"""A plan under Lightning's ``Trainer``."""

import contextlib
from typing import Any

import lightning.pytorch as pl

from assign.errors import PlanError
from assign.executor.apply import autocast
from assign.numerics.promotion import THRESHOLD, Promotion
from assign.plan.plan import Assignment


class PlanCallback(pl.Callback):
    """Trains under a plan: ``Trainer(callbacks=[PlanCallback(plan, module="model")])``.

    From the beginning of ``fit`` to its end one module within the ``LightningModule`` computes under the plan, in
    validation too. What ``training_step`` computes outside of it, its loss as a rule, runs as usual. Tensors that
    overflow too often are promoted; logged are ``assign/promoted``, ``assign/overflow_max``, ``assign/overflow_mean``.

    Attributes:
        promotion: what was promoted, and the plan as it became.

    Args:
        plan: of ``assign.search`` for that module.
        module: its path within the ``LightningModule``.
        backend: as in :func:`assign.apply`.
        promote_every: steps between two measurements of overflow, as ``every`` in :class:`assign.Promotion`.
        promote_threshold: as ``threshold`` there.
    Raises:
        PlanError: as :func:`assign.autocast`; or there is no such module.
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
        """From here on the module computes under the plan."""
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
        """Promote what overflowed, and log."""
        self.promotion.step()
        pl_module.log_dict(self.promotion.scalars())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The module is its plain self again."""
        self._planned.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """So it is after an error."""
        self._planned.close()
