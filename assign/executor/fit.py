"""Whether a plan fits a captured step, and what holds where the step differs from the one that was planned.

A training loop may run other parts of a model than the plan's step did: another head, a second call, a method, a
parameter that was frozen. Such differences are told from a plan of another model by the paths of modules.
"""

import warnings
from collections.abc import Iterable
from enum import StrEnum

from assign import _torch
from assign.plan.assignment import Assignment, Entry
from assign.plan.recipes import get_recipe
from assign.plan.tensors import Role, base_key, grad_key, is_input_key
from assign.tracing.capture import Capture
from assign.tracing.operators import Walk


class Scope(StrEnum):
    """What is captured: a whole step with its loss, one call of the model, or one call of another of its methods."""

    STEP = "step"
    CALL = "call"
    METHOD = "method"


def fit(plan: Assignment, walked: Walk, capture: Capture, scope: Scope) -> dict[str, Entry]:
    """Check that a plan fits a captured training step.

    Parameters that were frozen when the plan was made get the recipe's high format for their gradients. Tensors of a
    module that the plan does not know, or of a method that it does not know, are not narrowed. Both are said in a
    warning. Entries of modules that this step does not run, and of a second call that is not in this graph, wait for
    another step. A step whose code looks at values may take another branch than the planned step did, or call an
    operator more often or less often: what is new is not narrowed. What is computed of the batch alone may have other
    tensors, or none: the batch may come in another dtype.

    Returns:
        Entries for the gradients of parameters that were frozen when the plan was made.
    Raises:
        PlanError: a tensor has no entry, or an entry no tensor, for another reason: names the nearest keys.
    """
    frozen = {name for node, name in capture.parameters.items() if not _torch.fake_value(node).requires_grad}
    keys = [site.key for site in walked.sites]
    keys += [grad_key(key) for key in keys if key not in frozen]
    of_batch = {site.key for site in walked.sites if site.node not in walked.parametric and site.op != "parameter"}
    keys = [key for key in keys if base_key(key) not in of_batch or key in plan.entries]
    missing = [key for key in keys if key not in plan.entries]
    planned, run = set(map(_path, plan.entries)), set(map(_path, keys))
    unfrozen = [key for key in missing if "/" not in key and key != base_key(key) and base_key(key) in plan.entries]
    recorded = capture.piece is not None
    unknown = [
        key
        for key in missing
        if scope is Scope.METHOD
        or (_path(key) not in planned and key not in unfrozen)
        or (capture.is_part and "/" in key)
        or (recorded and base_key(key).partition("#")[0] in plan.entries)
    ]
    if capture.is_part:
        waiting = list(plan.entries)
    else:
        waiting = [key for key in plan.entries if _waits(key, frozen, run, scope) or (recorded and "#" in key)]
    expected = [key for key in keys if key not in unknown and key not in unfrozen]
    plan.check_covers([*expected, *waiting], where="the plan", buffers=capture.buffers.values())
    high = get_recipe(plan.recipe).by_role[Role.WEIGHT_GRAD][0]
    if unknown:
        _say(unknown, "are of a part of the model that the plan does not know: they are not narrowed")
    if unfrozen:
        _say(unfrozen, f"were not trained when the plan was made: their gradients are {high}")
    return {key: Entry(high, False) for key in unfrozen}


def _waits(key: str, frozen: Iterable[str], run: Iterable[str], scope: Scope) -> bool:
    """Whether an entry may be without a tensor in this step."""
    if "/" not in key:  # names of parameters have been compared before
        return base_key(key) in frozen or scope is not Scope.STEP or _path(key) not in run
    path = _path(key)
    outside = scope is not Scope.STEP and (path in ("", "loss") or "#" in key)
    return outside or path not in run or is_input_key(base_key(key))


def _path(key: str) -> str:
    """The module that a tensor belongs to; ``''`` for the root."""
    return key.partition("/")[0] if "/" in key else base_key(key).rpartition(".")[0]


def _say(keys: list[str], what: str) -> None:
    first = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    warnings.warn(f"assign: {len(keys)} tensors of this step {what}: {first}.", stacklevel=2)
