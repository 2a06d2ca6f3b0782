"""Choose a number format for every tensor of a training step, write the choice to a plan, and train with it.

The package has three layers. The first reads a model with PyTorch and writes a TensorTable. The second is pure Python:
it predicts memory and searches a plan. The third runs a model under a plan, again with PyTorch. The docstring of each
package below names its modules.

==================  ============================================================================================
``tracing``         Capture a training step as a **TensorTable**.
``formats``         Number formats: rows of data. No torch.
``plan``            Names of tensors, tables, **plans** and their files, rules for dtypes. No torch.
``memory``          Predict the bytes of a step under a plan. No torch.
``strategies``      Searches: (table, recipe, goal) → entries of a plan. No torch.
``planner``         Trace, measure, search and provenance in one call. ``pareto``: a plan for every budget.
``noise``           Measure how rounding a tensor changes the gradient.
``numerics``        Arithmetic of formats, as operators of torch.
``executor``        Run a model under a plan.
``optim``           Optimizers whose states follow a plan.
``distributed``     Training in several processes: DDP and FSDP2.
``tasks``           Built-in tasks, and tasks from a user's file.
``training``        Train tasks, compare plans, search by training.
``analysis``        Analyses of a trained model: audits of 16-bit formats, certified predictions.
``integrations``    Plans in the trainers of transformers and Lightning.
``report``          Tables, pictures, and a page for a browser.
``cli``             The commands of the shell.
``errors``          AssignError. ``options``: groups of options, declared once for Python and the shell.
                    ``atomic_write``, ``json_file``: files. ``passwords``: mask them. ``notebook``: output in notebooks.
                    ``_torch``: the only module with private names of torch.
==================  ============================================================================================
"""

import importlib
import importlib.util
import warnings
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assign.errors import AssignError
    from assign.executor.apply import apply, autocast, planned_step
    from assign.executor.compiled_memory import rehearse
    from assign.executor.latency import measure_times
    from assign.formats.own import register_format
    from assign.memory.estimate import Estimate, estimate
    from assign.noise.measure import measure_noise
    from assign.noise.options import NoiseOptions
    from assign.numerics.promotion import Promotion, PromotionOptions
    from assign.optim.optimizers import optimizer
    from assign.pareto import Front, search_front
    from assign.plan.noise_table import NoiseTable
    from assign.plan.plan import Assignment, Plan
    from assign.plan.recipes import RECIPES
    from assign.plan.space import SearchSpace
    from assign.plan.step_options import StepOptions
    from assign.plan.table import TensorTable
    from assign.planner import search
    from assign.report.page import write_report
    from assign.report.plotting import plot
    from assign.tasks import Task
    from assign.tracing.step import Step
    from assign.tracing.tracer import trace
    from assign.training.compare import compare
    from assign.training.loop import train
    from assign.training.options import TrainOptions
    from assign.training.tuning import StudyOptions, tune

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "AssignError",
    "Assignment",
    "Estimate",
    "Front",
    "NoiseOptions",
    "NoiseTable",
    "Plan",
    "Promotion",
    "PromotionOptions",
    "SearchSpace",
    "Step",
    "StepOptions",
    "StudyOptions",
    "Task",
    "TensorTable",
    "TrainOptions",
    "apply",
    "autocast",
    "compare",
    "estimate",
    "measure_noise",
    "measure_times",
    "optimizer",
    "planned_step",
    "plot",
    "register_format",
    "rehearse",
    "search",
    "search_front",
    "trace",
    "train",
    "tune",
    "write_report",
]

_PLACES = MappingProxyType(
    {
        "AssignError": "assign.errors",
        "apply": "assign.executor.apply",
        "autocast": "assign.executor.apply",
        "planned_step": "assign.executor.apply",
        "rehearse": "assign.executor.compiled_memory",
        "register_format": "assign.formats.own",
        "measure_times": "assign.executor.latency",
        "Front": "assign.pareto",
        "search_front": "assign.pareto",
        "measure_noise": "assign.noise.measure",
        "Promotion": "assign.numerics.promotion",
        "optimizer": "assign.optim.optimizers",
        "Assignment": "assign.plan.plan",
        "Plan": "assign.plan.plan",
        "Estimate": "assign.memory.estimate",
        "estimate": "assign.memory.estimate",
        "NoiseTable": "assign.plan.noise_table",
        "RECIPES": "assign.plan.recipes",
        "TensorTable": "assign.plan.table",
        "search": "assign.planner",
        "plot": "assign.report.plotting",
        "write_report": "assign.report.page",
        "Task": "assign.tasks",
        "trace": "assign.tracing.tracer",
        "compare": "assign.training.compare",
        "train": "assign.training.loop",
        "tune": "assign.training.tuning",
        "NoiseOptions": "assign.noise.options",
        "PromotionOptions": "assign.numerics.promotion",
        "SearchSpace": "assign.plan.space",
        "StepOptions": "assign.plan.step_options",
        "Step": "assign.tracing.step",
        "TrainOptions": "assign.training.options",
        "StudyOptions": "assign.training.tuning",
    }
)
"""Name → the module that defines it, imported when the name is first used: torch alone takes seconds."""

_MOVED = MappingProxyType(
    {
        "audit_constants": "assign.analysis",
        "audit_range": "assign.analysis",
        "certify": "assign.analysis",
        "data_parallel": "assign.distributed",
        "Rehearsal": "assign.executor.compiled_memory",
        "FORMATS": "assign.formats",
        "Format": "assign.formats",
        "parse_format": "assign.formats",
        "DelayedScales": "assign.numerics",
        "quantize": "assign.numerics",
        "LostUpdates": "assign.optim",
        "widened_state_dict": "assign.optim",
        "widened_weights": "assign.optim",
        "TimeTable": "assign.plan.latency_table",
        "Measured": "assign.plan.measured",
        "STRATEGIES": "assign.strategies",
    }
)
"""Names that this package had in version 0.1 → the module that has them now."""


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        warnings.warn(
            f"assign.{name} will be removed in the next version. Write {_MOVED[name]}.{name}.",
            FutureWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(_MOVED[name]), name)
    if name in _PLACES:
        found = getattr(importlib.import_module(_PLACES[name]), name)
    elif not name.startswith("__") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        found = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
