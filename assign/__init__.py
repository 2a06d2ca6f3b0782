"""Choose a number format for every tensor of a training step, write the choice to a plan, and train with it.

The package has three layers. The first reads a model with PyTorch and writes a TensorTable. The second is pure Python:
it predicts memory and searches a plan. The third runs a model under a plan, again with PyTorch.

====================  ==========================================================================================
``tracing``           Capture a training step as a **TensorTable**. ``tracer``: the entry point. ``capture``: the
                      step as one graph by Dynamo, or as several ``pieces`` by ``recording``, with ``deferred``
                      tensors, other ``torch_functions``, lines of ``user_code``, the ``pending`` piece, and ``sizes``.
                      ``kept_state``: leave the model unchanged. ``functionalize``: remove in-place operators.
                      ``step``: the table, with the model, batch and loss.
                      ``operators``: name every tensor, for tracer and executor. ``probes``, ``joint``: the backward
                      pass. ``workspace``: scratch memory of kernels. ``finiteness``, ``needs``, ``constants``: which
                      tensors must keep their precision. ``optimizer_states``: states of an optimizer.
                      ``allocations``, ``measuring``: count and measure bytes. ``loaded``: dtypes of the loaded
                      model. ``layout``: order of nodes. ``heap``: return freed memory to the system.
``plan``              Data and predictions, without torch. ``keys``: names of tensors. ``tensors``: TensorTable.
                      ``entry``, ``assignment``: the **plan** and its file. ``formats``, ``recipes``: number formats,
                      and which of them a search chooses from. ``space``: what a search may choose. ``measured``: what
                      was measured for it. ``ops``, ``dtypes``: facts about operators and dtypes. ``precision``,
                      ``compute_dtype``: the dtype in which results stay, and operators compute. ``groups``: tensors
                      that share a decision. ``memory``, ``timeline``, ``moments``: bytes over the step. ``stored``,
                      ``libraries``: what is kept between steps, and by which optimizer library. ``noise``, ``times``:
                      tables of measurements. ``quality``: which plans are better. ``display``: output in notebooks.
``strategies``        Searches: (table, recipe, goal) → entries of a plan, registered in ``METHODS``. ``planning``:
                      trace, measure, search and provenance in one call. ``fronts``: a plan for every budget.
``noise``             Measure how rounding a tensor changes the gradient. ``stepping``: a step whose tensors can be
                      changed. ``sampling``: one tensor, one batch. ``gates``: relu. ``measuring``: all, to a file.
``numerics``          Arithmetic of formats as torch operators (``registry``). ``rounding``: quantize, encode, decode.
                      ``kernels``, ``launch``, ``words``: how they run. ``blocks``: formats with a scale per block.
                      ``products``: matrix products. ``promotion``: tensors that overflow get the high format.
                      ``delayed``: scales from earlier steps. ``runtime``: both, as an input of a graph.
                      ``dtypes``: torch's, by name.
``executor``          Run a model under a plan. ``apply``: the entry points. ``pipeline``: runs the graph ``passes``,
                      with a ``context``. ``backends``: eager and compiled. ``fit``: does the plan fit? ``parameters``:
                      store them as the plan says. ``methods``: of a planned model. ``unused``, ``sparse``: gradients.
                      ``rehearsal``: peak of a compiled step. ``timing``: seconds of each choice.
``optim``             ``optimizers``: states as the plan says, in the form (``states``) of three libraries.
                      ``updates``: SGD and AdamW for 16-bit weights. ``widening``: round the updates of any library.
                      ``gradients``: stored in 8 bits. ``masters``: with extra bits. ``beside``: what is kept of a
                      parameter. ``monitor``: updates lost by rounding.
``several``           Training in several processes: DDP and FSDP2.
``tasks``             Built-in tasks, and tasks from a user's file.
``training``          ``loop``: train a task, as its ``options`` say. ``history``: its steps and epochs.
                      ``checkpoints``, ``weights``: files.
                      ``audit``: values that 16 bits would lose. ``certificate``: predictions that a plan cannot change.
                      ``comparing``, ``comparison``: several plans on one task. ``tuning``, ``trials``, ``database``:
                      search by training, with Optuna.
``integrations``      Plans in the trainers of transformers and Lightning.
``report``            Tables, pictures, and a page for a browser.
``cli``               The commands of the shell. ``groups``: options of a command from the fields of dataclasses.
``errors``            AssignError. ``options``: groups of options, declared once for Python and the shell.
                      ``files``: written atomically. ``json_file``: read strictly. ``passwords``: masked.
                      ``_torch``: the only module with private names of torch.
====================  ==========================================================================================
"""

import importlib
import importlib.util
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assign.errors import AssignError
    from assign.executor.apply import apply, autocast, planned_step
    from assign.executor.rehearsal import Rehearsal, rehearse
    from assign.executor.timing import measure_times
    from assign.fronts import Front, search_front
    from assign.noise.measuring import measure_noise
    from assign.noise.options import NoiseOptions
    from assign.numerics.delayed import DelayedScales
    from assign.numerics.promotion import Promotion, PromotionOptions
    from assign.numerics.rounding import quantize
    from assign.optim.masters import widened_weights
    from assign.optim.monitor import LostUpdates
    from assign.optim.optimizers import optimizer, widened_state_dict
    from assign.plan.assignment import Assignment, Plan
    from assign.plan.formats import FORMATS, Format, parse_format
    from assign.plan.measured import Measured
    from assign.plan.memory import Estimate, estimate
    from assign.plan.noise import NoiseTable
    from assign.plan.recipes import RECIPES
    from assign.plan.space import SearchSpace
    from assign.plan.tensors import TensorTable
    from assign.plan.times import TimeTable
    from assign.planning import search
    from assign.report.page import write_report
    from assign.report.plotting import plot
    from assign.several import data_parallel
    from assign.strategies import STRATEGIES
    from assign.tasks import Task
    from assign.tracing.step import Step
    from assign.tracing.tracer import trace
    from assign.training.audit import audit_constants, audit_range
    from assign.training.certificate import certify
    from assign.training.comparing import compare
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
        "Rehearsal": "assign.executor.rehearsal",
        "rehearse": "assign.executor.rehearsal",
        "measure_times": "assign.executor.timing",
        "Front": "assign.fronts",
        "search_front": "assign.fronts",
        "measure_noise": "assign.noise.measuring",
        "DelayedScales": "assign.numerics.delayed",
        "Promotion": "assign.numerics.promotion",
        "quantize": "assign.numerics.rounding",
        "widened_weights": "assign.optim.masters",
        "LostUpdates": "assign.optim.monitor",
        "optimizer": "assign.optim.optimizers",
        "widened_state_dict": "assign.optim.optimizers",
        "Assignment": "assign.plan.assignment",
        "Plan": "assign.plan.assignment",
        "FORMATS": "assign.plan.formats",
        "Format": "assign.plan.formats",
        "parse_format": "assign.plan.formats",
        "Estimate": "assign.plan.memory",
        "estimate": "assign.plan.memory",
        "NoiseTable": "assign.plan.noise",
        "RECIPES": "assign.plan.recipes",
        "TensorTable": "assign.plan.tensors",
        "TimeTable": "assign.plan.times",
        "search": "assign.planning",
        "plot": "assign.report.plotting",
        "write_report": "assign.report.page",
        "data_parallel": "assign.several",
        "STRATEGIES": "assign.strategies",
        "Task": "assign.tasks",
        "trace": "assign.tracing.tracer",
        "audit_constants": "assign.training.audit",
        "audit_range": "assign.training.audit",
        "certify": "assign.training.certificate",
        "compare": "assign.training.comparing",
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
