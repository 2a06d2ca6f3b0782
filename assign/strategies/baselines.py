"""Baseline plans that need no search."""

from collections.abc import Collection

from assign.errors import FormatError
from assign.formats.parsing import parse_format
from assign.formats.rows import loaded_format
from assign.plan.keys import grad_key
from assign.plan.ops import GROUP_STARTS, INPUT
from assign.plan.plan import Entry
from assign.plan.recipes import Recipe, initial, store
from assign.plan.table import Role, TensorInfo, TensorTable
from assign.strategies.goal import Goal, PeakBytes, over_budget


def uniform(
    table: TensorTable,
    *,
    recipe: Recipe,
    peak_bytes: PeakBytes,
    low_ratio: float | None = None,
    budget_bytes: int | None = None,
    seed: int = 0,
) -> dict[str, Entry]:
    """Return everything high if that meets the goals, else everything low: the paper's π_unif.

    A low ratio of 0 gives all high; any other gives all low.

    Raises:
        BudgetError: a goal is invalid, or the budget is below the peak of both.
    """
    goal = Goal(low_ratio=low_ratio, budget=budget_bytes).required()
    peaks = []
    for low in (frozenset[int](), frozenset(group.id for group in table.groups)):
        entries = initial(table, recipe, low)
        if not goal.enough_low(table.elements if low else 0, table.elements):
            continue
        if budget_bytes is None:
            return entries
        peaks.append(peak_bytes(entries))
        if goal.within_budget(peaks[-1]):
            return entries
    raise over_budget(goal, min(peaks), "with every tensor low")


def uniform_in(table: TensorTable, format_name: str, *, low: bool = False) -> dict[str, Entry]:
    """Return every tensor in the format ``format_name``, for any recipe; ``low`` is whether they count as low.

    Raises:
        FormatError: there is no such format.
    """
    name = parse_format(format_name).name
    return {row.key: Entry(name, low) for row in table.paper_tensors}


def as_loaded(table: TensorTable, recipe: Recipe) -> dict[str, Entry]:
    """Return every tensor in its dtype in the model as loaded: nothing changes, and the recipe is not used."""
    return {row.key: Entry(loaded_format(row.dtype).name, False) for row in table.paper_tensors}


def operator_based(table: TensorTable, recipe: Recipe, *, gradients_follow: bool = False) -> dict[str, Entry]:
    """Return the paper's π_op, after HFP8: tensors that a matrix product reads or makes are low.

    Low are the operands of products, weights included, and the gradients of their outputs. Everything else is high, and
    also the gradients of weights, the input with the tensors made from it, and the last group with its inputs.

    Args:
        table: of the model.
        recipe: gives each tensor its high and its low format.
        gradients_follow: π_op′: the gradient of an activation is low if the activation is. This is our interpretation:
            the authors' released code does not contain this baseline.
    Source: arXiv 2301.13464, and the authors' code.
    """
    activations = [row for row in table.paper_tensors if row.role is Role.ACTIVATION]
    products = [row for row in activations if row.op in GROUP_STARTS]
    low = {key for row in products for key in row.inputs} - _kept_high(activations)
    gradients = low if gradients_follow else {row.key for row in products} - _kept_high(activations)
    weights = {row.key for row in table.paper_tensors if row.role is Role.WEIGHT}
    low = low | {grad_key(key) for key in gradients - weights}
    high_entries, low_entries = initial(table, recipe), initial(table, recipe, {row.group for row in activations})
    return {key: low_entries[key] if key in low else entry for key, entry in high_entries.items()}


def standalone(table: TensorTable, recipe: Recipe) -> dict[str, Entry]:
    """Return everything in one 16-bit format: the tensors of the step and what is stored, running statistics too.

    There is no master besides the weight that is computed with, and no loss scale.

    Raises:
        FormatError: the recipe's formats are not one 16-bit format of torch.
    Source: arXiv 2305.10947.
    """
    names = {name for pair in recipe.by_role.values() for name in pair}
    if names not in ({"bf16"}, {"fp16"}):
        raise FormatError(
            f"the strategy standalone stores all in one 16-bit format; the recipe {recipe.name!r} has "
            f"{', '.join(sorted(names))}. Choose the recipe bf16 or fp16."
        )
    (name,) = names
    entries = uniform_in(table, name)
    has_states = any(row.role is Role.OPTIM_STATE for row in table.tensors)
    return entries | store(table, master=name, gradients=name, states=name if has_states else None, buffers=name)


def _kept_high(activations: Collection[TensorInfo]) -> set[str]:
    """Return the forward tensors that π_op keeps high, with their gradients, regardless of what reads them."""
    inputs = {row.key for row in activations if row.op == INPUT}
    last = max((row.group for row in activations), default=0)
    kept = set(inputs)
    for row in activations:
        if row.group == last or inputs.intersection(row.inputs):
            kept |= {row.key, *row.inputs}
    return kept
