"""The cheapest number format for every tensor of a training step, chosen, written down, and trained with.

The house is an hourglass. Above its first waist torch is read, below its second torch is written; what stands between
them is pure Python and never imports torch.

====================  ==========================================================================================
``tracing``           model + batch → **TensorTable**. ``capture``: model and loss as one graph (Dynamo), or as several
                      ``pieces`` (``recording``), which hands out ``deferred`` tensors, treats some ``torch_functions``
                      in ways of their own, knows the line of the ``user_code`` and keeps the ``pending`` piece,
                      compiled for all ``sizes``; the model left as it was (``kept_state``); ``layout`` of a graph;
                      ``functionalize``: no in-place operators, so every value has one node; ``operators``: the walk
                      that names every tensor, for tracer and executor alike; ``probes`` at them; ``joint``,
                      ``workspace``, ``finiteness``: the backward pass, what kernels need, which tensors must not
                      be narrowed; ``needs``, ``constants``: what a tensor's values need; ``optimizer_states``, read
                      off a step; ``allocations``: bytes counted without data; ``measuring``: bytes that code
                      really holds; ``loaded``: the dtypes in which a model was loaded; ``tracer``: all of it
``plan``              pure Python. ``tensors``: TensorTable, the first waist: rows by key, groups, the schedule of the
                      step; ``formats`` as rows of data; ``recipes``: candidates per role; ``precision``:
                      operators in float32; ``groups``: shared decisions; ``lowering``, ``lowered``: in which dtype an
                      operator computes; ``memory``:
                      (table, assignment) → peak and timeline; ``stored``: what stays between steps; ``libraries``:
                      who can keep it; ``timeline``: bytes moment by moment, and by decision; ``moments``: by role, and
                      what they are; ``noise``, ``times``: tables of what was measured; ``display``: what a notebook
                      shows of any of these; ``entry``, ``assignment``: **Assignment**, the second waist,
                      ``plan.json``
``strategies``        searches: (table, recipe, goal) → entries; ``milp``: that of least noise;
                      ``planning``: trace, strategy, provenance in one call; ``fronts``: a plan for every budget
``noise``             ``stepping``: a step in which every tensor can be touched; ``sampling``: what rounding one
                      perturbs, measured or from derivatives; ``gates``: of relu, which has none;
                      ``measuring``: over batches, into a file
``numerics``          ``rounding``: quantize, encode, decode as registered torch operators; ``kernels``: their
                      arithmetic; ``launch``: how it is run, compiled or not; ``words``: narrow elements, several to
                      an integer; ``blocks``: a few bits and a scale per block; ``products`` of narrow matrices;
                      ``promotion``: low tensors that overflow go back to high; ``delayed``: scales that the steps
                      before gave; ``registry``: a function made an operator
``executor``          mark → pack → compile → apply: a plan made to run; ``fit``: whether it is the step's; ``methods``
                      of a planned model; ``unused``: parameters that a step does not train; ``rehearsal``: a compiled
                      step's bytes, before;
                      ``timing``: seconds, choice by choice
``optim``             ``optimizers`` whose states follow a plan, from three libraries; ``states``: each one's form of
                      them; ``updates``: SGD and AdamW for weights of 16 bits; ``gradients`` that wait in 8;
                      ``masters`` of 24 bits, 8 of them beside a bf16 weight; ``monitor``: updates that rounding lost
``several``           several processes: DDP and FSDP2 around a planned model
``tasks``             what is trained: built-in, from a user's file
``training``          ``loop``: seeds, loss scaling, promotion; ``history``: what its steps and epochs came to;
                      ``checkpoints``: their file; ``weights``: those of another training;
                      ``audit``: what 16 bits would lose, said before; ``certificate``: predictions that a plan
                      cannot change; ``comparing``: several plans on one task, run by run; ``comparison``: what they
                      came to, and its file; ``tuning``: search by training, an Optuna study; ``trials``: what it
                      proposes, trained; ``database``: where a study is kept
``integrations``      plans in the trainers of other libraries: ``transformers``, ``lightning``
``report``            tables and pictures for people, and in ``report/page`` a page for a browser; ``plotting``: its
                      charts in a notebook
``cli``               the shell: a file for each kind of command, all of them in ``commands``; ``options`` and
                      ``shell``: what they share; ``streams``: standard output as it is; ``stopping``: after Ctrl-C
``errors``            AssignError, what a user can mend; ``files``: written whole; ``json_file``: read strictly;
                      ``passwords``: masked; ``_torch``: all private torch names
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
    from assign.numerics.delayed import DelayedScales
    from assign.numerics.promotion import Promotion
    from assign.numerics.rounding import quantize
    from assign.optim.masters import widened_weights
    from assign.optim.monitor import LostUpdates
    from assign.optim.optimizers import optimizer, widened_state_dict
    from assign.plan.assignment import Assignment, Plan
    from assign.plan.formats import FORMATS, Format, parse_format
    from assign.plan.memory import Estimate, estimate
    from assign.plan.noise import NoiseTable
    from assign.plan.recipes import RECIPES
    from assign.plan.tensors import TensorTable
    from assign.plan.times import TimeTable
    from assign.planning import search
    from assign.report.page import write_report
    from assign.report.plotting import plot
    from assign.several import data_parallel
    from assign.strategies import STRATEGIES
    from assign.tasks import Task
    from assign.tracing.tracer import trace
    from assign.training.audit import audit_constants, audit_range
    from assign.training.certificate import certify
    from assign.training.comparing import compare
    from assign.training.loop import train
    from assign.training.tuning import tune

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
    "NoiseTable",
    "Plan",
    "Promotion",
    "Rehearsal",
    "Task",
    "TensorTable",
    "TimeTable",
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
