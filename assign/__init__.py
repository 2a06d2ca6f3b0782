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
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assign.analysis.audit import audit_constants, audit_range
    from assign.analysis.certificate import certify
    from assign.distributed import data_parallel
    from assign.errors import AssignError
    from assign.executor.apply import apply, autocast, planned_step
    from assign.executor.compiled_memory import Rehearsal, rehearse
    from assign.executor.latency import measure_times
    from assign.formats.parsing import parse_format
    from assign.formats.rows import FORMATS, Format
    from assign.memory.estimate import Estimate, estimate
    from assign.noise.measure import measure_noise
    from assign.noise.options import NoiseOptions
    from assign.numerics.delayed import DelayedScales
    from assign.numerics.promotion import Promotion, PromotionOptions
    from assign.numerics.rounding import quantize
    from assign.optim.masters import widened_weights
    from assign.optim.monitor import LostUpdates
    from assign.optim.optimizers import optimizer, widened_state_dict
    from assign.pareto import Front, search_front
    from assign.plan.latency_table import TimeTable
    from assign.plan.measured import Measured
    from assign.plan.noise_table import NoiseTable
    from assign.plan.plan import Assignment, Plan
    from assign.plan.recipes import RECIPES
    from assign.plan.space import SearchSpace
    from assign.plan.table import TensorTable
    from assign.planner import search
    from assign.report.page import write_report
    from assign.report.plotting import plot
    from assign.strategies import STRATEGIES
    from assign.tasks import Task
    from assign.tracing.step import Step
    from assign.tracing.tracer import trace
    from assign.training.compare import compare
    from assign.training.loop import train
    from assign.training.options import TrainOptions
    from assign.training.tuning import StudyOptions, tune

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "RECIPES",
    "STRATEGIES",
    "AssignError",
    "Assignment",
    "DelayedScales",
    "Estimate",
    "Format",
    "Front",
    "LostUpdates",
    "Measured",
    "NoiseOptions",
    "NoiseTable",
    "Plan",
    "Promotion",
    "PromotionOptions",
    "Rehearsal",
    "SearchSpace",
    "Step",
    "StudyOptions",
    "Task",
    "TensorTable",
    "TimeTable",
    "TrainOptions",
    "apply",
    "audit_constants",
    "audit_range",
    "autocast",
    "certify",
    "compare",
    "data_parallel",
    "estimate",
    "measure_noise",
    "measure_times",
    "optimizer",
    "parse_format",
    "planned_step",
    "plot",
    "quantize",
    "rehearse",
    "search",
    "search_front",
    "trace",
    "train",
    "tune",
    "widened_state_dict",
    "widened_weights",
    "write_report",
]

_PLACES = MappingProxyType(
    {
        "AssignError": "assign.errors",
        "apply": "assign.executor.apply",
        "autocast": "assign.executor.apply",
        "planned_step": "assign.executor.apply",
        "Rehearsal": "assign.executor.compiled_memory",
        "rehearse": "assign.executor.compiled_memory",
        "measure_times": "assign.executor.latency",
        "Front": "assign.pareto",
        "search_front": "assign.pareto",
        "measure_noise": "assign.noise.measure",
        "DelayedScales": "assign.numerics.delayed",
        "Promotion": "assign.numerics.promotion",
        "quantize": "assign.numerics.rounding",
        "widened_weights": "assign.optim.masters",
        "LostUpdates": "assign.optim.monitor",
        "optimizer": "assign.optim.optimizers",
        "widened_state_dict": "assign.optim.optimizers",
        "Assignment": "assign.plan.plan",
        "Plan": "assign.plan.plan",
        "FORMATS": "assign.formats.rows",
        "Format": "assign.formats.rows",
        "parse_format": "assign.formats.rows",
        "Estimate": "assign.memory.estimate",
        "estimate": "assign.memory.estimate",
        "NoiseTable": "assign.plan.noise_table",
        "RECIPES": "assign.plan.recipes",
        "TensorTable": "assign.plan.table",
        "TimeTable": "assign.plan.latency_table",
        "search": "assign.planner",
        "plot": "assign.report.plotting",
        "write_report": "assign.report.page",
        "data_parallel": "assign.distributed",
        "STRATEGIES": "assign.strategies",
        "Task": "assign.tasks",
        "trace": "assign.tracing.tracer",
        "audit_constants": "assign.analysis.audit",
        "audit_range": "assign.analysis.audit",
        "certify": "assign.analysis.certificate",
        "compare": "assign.training.compare",
        "train": "assign.training.loop",
        "tune": "assign.training.tuning",
        "NoiseOptions": "assign.noise.options",
        "PromotionOptions": "assign.numerics.promotion",
        "Measured": "assign.plan.measured",
        "SearchSpace": "assign.plan.space",
        "Step": "assign.tracing.step",
        "TrainOptions": "assign.training.options",
        "StudyOptions": "assign.training.tuning",
    }
)
"""Name → the module that defines it, imported when the name is first used: torch alone takes seconds."""


def __getattr__(name: str) -> Any:
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
