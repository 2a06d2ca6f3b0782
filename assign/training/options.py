"""Options of a training."""

from dataclasses import dataclass, field
from pathlib import Path

from assign.errors import TaskError
from assign.executor.backends import Backend
from assign.numerics.promotion import PromotionOptions
from assign.options import option
from assign.plan.persistent_state import UpdateRounding
from assign.tasks.task import check_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Options of every training, whether of a task or of a trial of a study.

    Attributes:
        backend: How a plan runs. ``eager``: no compiler, exact memory. ``inductor``: compiled, fast.
        seed: Seed of the weights, the order of the data, random numbers in the steps, and the choices of a study.
        device: Where the model and the data are: ``cpu``, ``cuda``, ``cuda:1``, and so on.
        epochs: Epochs to train. Default: the task's own number.
    """

    backend: Backend | str = field(default=Backend.EAGER, metadata=option(type=Backend))
    seed: int = 0
    device: str = "cpu"
    epochs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions(RunOptions):
    """How a task is trained.

    Attributes:
        max_steps: Number of steps after which training stops.
        checkpoint: File that is written after every epoch.
        checkpoint_every: Steps after which the checkpoint is also written.
        resume: Continue from the checkpoint.
        weights: Checkpoint or ``state_dict`` of a float32 training to start from. Weights and optimizer states are
            rounded to the formats of the plan; options of the optimizer are those of the task.
        update_rounding: How updates of 16-bit masters are rounded. Default: as in the plan.
        promotion: When tensors that overflow get the high format.
    Raises:
        TaskError: the seed is out of range, or there is no checkpoint to resume from.
    """

    max_steps: int | None = field(default=None, metadata=option(hidden=True))
    checkpoint: Path | None = None
    checkpoint_every: int | None = field(default=None, metadata=option(hidden=True))
    resume: bool = False
    weights: Path | None = field(default=None, metadata=option("--from"))
    update_rounding: UpdateRounding | str | None = field(default=None, metadata=option(type=UpdateRounding))
    promotion: PromotionOptions = field(default_factory=PromotionOptions)

    def __post_init__(self) -> None:
        check_seed(self.seed, where="train")
        if self.resume and self.checkpoint is None:
            raise TaskError("train: resume=True needs checkpoint=, the file to resume from.")
