"""Check whether a plan fits a captured step, and handle the differences from the planned step.

A training loop may run other parts of a model than the planned step: another head, a second call, a method, a parameter
that was frozen. The paths of modules distinguish such differences from a plan of another model.
"""

import warnings
from collections.abc import Iterable
from enum import StrEnum

from assign import _torch
from assign.plan.keys import LOSS, Key, base_key, grad_key, is_grad_key
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import get_recipe
from assign.plan.table import Role
from assign.tracing.capture import Capture
from assign.tracing.tensor_sites import Walk


class Scope(StrEnum):
    """The captured code: a whole step with its loss, one call of the model, or one call of another of its methods."""

    STEP = "step"
    CALL = "call"
    METHOD = "method"


def fit(plan: Assignment, walked: Walk, capture: Capture, scope: Scope) -> dict[str, Entry]:
    """Check that a plan fits a captured training step.

    Parameters that were frozen when the plan was made get the recipe's high format for their gradients. Tensors of a
    module, or of a method, that the plan does not know are not narrowed. A warning reports both. Entries of modules
    that this step does not run, and of a second call that is not in this graph, are kept for another step. A step whose
    code looks at values may take another branch than the planned step, or call an operator more or less often: new
    tensors are not narrowed. Tensors computed from the batch alone may differ, because the batch may come in another
    dtype.

    Returns:
        Entries for the gradients of parameters that were frozen when the plan was made.
    Raises:
        PlanError: for another reason, a tensor has no entry or an entry has no tensor; names the nearest keys.
    """
    frozen = {name for node, name in capture.parameters.items() if not _torch.fake_value(node).requires_grad}
    keys = [site.key for site in walked.sites]
    keys += [grad_key(key) for key in keys if key not in frozen]
    of_batch = {site.key for site in walked.sites if site.node not in walked.parametric and site.op != "parameter"}
    keys = [key for key in keys if base_key(key) not in of_batch or key in plan.entries]
    missing = [key for key in keys if key not in plan.entries]
    planned, run = ({Key.of_step(key).module for key in each} for each in (plan.entries, keys))
    gradients = [(key, Key.of_step(key)) for key in missing if is_grad_key(key)]
    unfrozen = [key for key, parts in gradients if not parts.is_activation and parts.name in plan.entries]
    recorded = capture.piece is not None
    unknown = [
        key
        for key in missing
        if scope is Scope.METHOD
        or (Key.of_step(key).module not in planned and key not in unfrozen)
        or (capture.is_part and Key.of_step(key).is_activation)
        or (recorded and Key.of_step(key).first in plan.entries)
    ]
    if capture.is_part:
        optional = list(plan.entries)
    else:
        repeated = [key for key in plan.entries if recorded and Key.of_step(key).is_repeated]
        optional = [*(key for key in plan.entries if _may_be_absent(key, frozen, run, scope)), *repeated]
    expected = [key for key in keys if key not in unknown and key not in unfrozen]
    plan.check_covers([*expected, *optional], where="the plan", buffers=capture.buffers.values())
    high = get_recipe(plan.recipe).by_role[Role.WEIGHT_GRAD][0]
    if unknown:
        _warn(unknown, "are in a part of the model that the plan does not contain: they are not narrowed")
    if unfrozen:
        _warn(unfrozen, f"were not trained when the plan was made: their gradients are {high}")
    return {key: Entry(high, False) for key in unfrozen}


def _may_be_absent(key: str, frozen: Iterable[str], run: Iterable[str], scope: Scope) -> bool:
    """Whether an entry may be without a tensor in this step."""
    parts = Key.of_step(key)
    if not parts.is_activation:  # names of parameters were compared before
        return parts.name in frozen or scope is not Scope.STEP or parts.module not in run
    outside = scope is not Scope.STEP and (parts.module in ("", LOSS) or parts.is_repeated)
    return outside or parts.module not in run or parts.is_input


def _warn(keys: list[str], what: str) -> None:
    first = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    warnings.warn(f"assign: {len(keys)} tensors of this step {what}: {first}.", stacklevel=2)
