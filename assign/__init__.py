"""The cheapest number format for every tensor of a training step, chosen, written down, and trained with.

The house is an hourglass. Above its first waist torch is read, below its second torch is written; what stands between
them is pure Python and never imports torch.

====================  ==========================================================================================
``capture``           model and loss as one graph (Dynamo); what a user is told about a graph break
``functionalize``     no in-place operators: every value has one node
``operators``         the walk that names every tensor; tracer and executor both take it
``tracer``            model + batch → **TensorTable**; ``joint`` and ``workspace`` help it read the backward pass
``tensors``           TensorTable, the first waist: rows by key, groups, the schedule of the step
``formats``           number formats as rows of data; ``recipes``: candidates per role; ``groups``: shared decisions
``lowering``          in which dtype an operator computes: one rule for all; ``lowered``: that of a whole table
``memory``            (table, assignment) → aggregate, peak, timeline
``strategies``        searches: (table, recipe, goal) → entries
``assignment``        **Assignment**, the second waist: ``plan.json``
``stored``            what stays between steps: masters, stored gradients, optimizer states; who can keep them
``rounding``          quantize, encode, decode as registered torch operators; ``kernels``: their arithmetic;
                      ``launch``: how it is run, compiled or not; ``words``: narrow elements, several to an integer
``products``          of narrow matrices, computed in a narrow dtype; ``registry``: a function made an operator
``blocks``            what waits for the backward pass in a few bits, with a scale per block; ``finiteness``: which
                      tensors must not
``promotion``         formats that change while training: low tensors that overflow go back to high;
                      ``delayed``: scales that the steps before gave
``executor``          mark → pack → compile → apply: a plan made to run
``optimizers``        optimizers whose states follow a plan, from three libraries; ``states``: each one's form of them
``updates``           SGD and AdamW for weights stored in 16 bits: to nearest, stochastically, with Kahan's sum
``several``           several processes: DDP and FSDP2 around a planned model
``monitor``           updates that rounding lost, while training
``audit``             what 16 bits would lose, said before; ``certificate``: predictions that a plan cannot change
``planning``          trace, strategy, provenance in one call
``tasks``             what is trained: built-in, from a user's file
``training``          the loop: seeds, loss scaling, promotion; ``measuring``: its peak; ``checkpoints``: their file;
                      ``weights``: those of another training, to go on from
``comparing``         several plans trained on one task, run by run; ``comparison``: what they came to, and its file
``report``            tables and pictures for people; ``cli``: the shell
``errors``            AssignError, what a user can mend; ``files``: written whole; ``_torch``: all private torch names
====================  ==========================================================================================
"""

from assign.assignment import Assignment
from assign.audit import audit_constants, audit_range
from assign.certificate import certify
from assign.delayed import DelayedScales
from assign.errors import AssignError
from assign.executor.apply import apply, autocast, planned_step
from assign.formats import FORMATS, Format, parse_format
from assign.memory import Estimate, estimate
from assign.monitor import LostUpdates
from assign.optimizers import optimizer, widened_state_dict
from assign.planning import search
from assign.promotion import Promotion
from assign.recipes import RECIPES
from assign.rounding import quantize
from assign.several import data_parallel
from assign.strategies import STRATEGIES
from assign.tasks import Task
from assign.tensors import TensorTable
from assign.tracer import trace

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
    "LostUpdates",
    "Promotion",
    "Task",
    "TensorTable",
    "apply",
    "audit_constants",
    "audit_range",
    "autocast",
    "certify",
    "data_parallel",
    "estimate",
    "optimizer",
    "parse_format",
    "planned_step",
    "quantize",
    "search",
    "trace",
    "widened_state_dict",
]
