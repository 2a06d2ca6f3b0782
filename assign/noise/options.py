"""Options of a noise measurement."""

from dataclasses import dataclass, field

from assign.errors import PlanError
from assign.options import option
from assign.plan.noise_table import Method

WARM_UP = 40
"""Training steps after which noise ranks plans well; at random weights it does so less (``bench_search.py``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseOptions:
    """How noise is measured.

    Attributes:
        method: ``first-order``: all tensors at once, from derivatives; only tensors for which torch has no derivative
            are measured one by one. ``measured``: one step for each choice.
        rtol: Relative standard error, in the median over all choices, at which the measurement ends.
        max_batches: Largest number of batches.
        warm_up: Steps of training, on a copy of the model, before the measurement. Noise at random weights ranks plans
            less well than noise after about 40 steps. Default: 40 if an optimizer is known, 0 for trained weights.
        seed: Seed of random numbers in a step; batch number n has seed + n.
    Raises:
        PlanError: a value is out of its range, or there is no such method.
    """

    method: Method | str = field(default=Method.FIRST_ORDER, metadata=option(type=Method))
    rtol: float = field(default=0.1, metadata=option("--rtol", "--until", former=("until",)))
    max_batches: int = field(default=8, metadata=option("--max-batches", "--batches", former=("most",)))
    warm_up: int | None = field(default=None, metadata=option(minimum=0))
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in [*Method]:
            raise PlanError(f"noise: there is no method {self.method!r}; choose from {', '.join(Method)}.")
        object.__setattr__(self, "method", Method(self.method))
        if self.max_batches < 1 or not self.rtol >= 0:
            raise PlanError(
                f"noise: max_batches={self.max_batches} and rtol={self.rtol} were given.\n"
                "  Allowed: 1 batch or more, and an error of 0 or more.\n"
                "  Give max_batches=8 and rtol=0.1, for example."
            )
        if self.warm_up is not None and self.warm_up < 0:
            raise PlanError(
                f"noise: warm_up is {self.warm_up}.\n  Allowed: 0 or more steps.\n  Give 0 for a trained model."
            )

    def steps(self, *, trained: bool) -> int:
        """Return the number of warm-up steps.

        Args:
            trained: whether the weights are trained already, or there is no optimizer to train them.
        """
        if self.warm_up is not None:
            return self.warm_up
        return 0 if trained else WARM_UP
