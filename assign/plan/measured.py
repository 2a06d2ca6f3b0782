"""Measurements of a model for a search."""

from collections.abc import Collection
from dataclasses import dataclass

from assign.plan.latency_table import TimeTable
from assign.plan.noise_table import NoiseTable
from assign.plan.step_options import Reduction
from assign.plan.table import TensorTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measurements that a search uses.

    Attributes:
        noise: result of :func:`assign.measure_noise`. The strategy ``milp`` requires it; with any strategy, the plan
            records its predicted noise.
        times: result of :func:`assign.measure_times`, which a limit on the step time requires.
        non_finite: keys of activations that are not finite; they are saved in their own format.
        reduction: how the loss of a batch follows from those of its micro-batches. Default: as the search space says.
    """

    noise: NoiseTable | None = None
    times: TimeTable | None = None
    non_finite: Collection[str] = frozenset()
    reduction: Reduction | None = None

    def check(self, table: TensorTable) -> None:
        """Check that the measurements belong to the table's model.

        Raises:
            PlanError: they belong to another model.
        """
        if self.noise is not None:
            self.noise.check(table)
        if self.times is not None:
            self.times.check(table)
