"""Recipes: the high and the low format that a search chooses from for each tensor, by role and operator.

There is no such choice for tensors that are stored between steps, nor for activations that are saved in a format of
their own: :func:`store` and :func:`save` give all of them the same format.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from assign.errors import FormatError, PlanError, suggest
from assign.formats.parsing import parse_format, parse_saved
from assign.formats.rows import BlockFormat, Format, loaded_format
from assign.plan.keys import Part, buffer_key, grad_key, master_key, saved_key, stored_grad_key
from assign.plan.ops import EXPONENTIATED, LOSS_OPS
from assign.plan.persistent_state import is_narrow, is_stored, master_format, packed_bytes, parse_stored, with_loaded
from assign.plan.plan import Assignment, Entry
from assign.plan.table import Need, Role, TensorInfo, TensorTable

Pair = tuple[str, str]
"""Names of the high and the low format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The high and the low format that one tensor may have."""

    hi: Format
    lo: Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """High and low formats by role and operator.

    Attributes:
        by_role: high and low format of each of the paper's four roles.
        overrides: operator name → role → high and low format, instead of ``by_role``. An activation and its gradient
            both use the operator that makes the activation.
        loss_scaling: whether training needs a loss scale, because the low backward format has no scale of its own.
        promote_every: steps between two checks for overflow of low forward tensors; 0: no tensor is promoted.
    """

    name: str
    description: str
    by_role: Mapping[Role, Pair]
    overrides: Mapping[str, Mapping[Role, Pair]] = field(default_factory=dict)
    loss_scaling: bool
    promote_every: int

    def candidates(self, info: TensorInfo) -> Candidates:
        """Return the formats that ``info`` may have; both are the same if the low format is too short for its values.

        Neither has more bits than the format in which the tensor was loaded.

        Raises:
            FormatError: the tensor's role is none of the paper's four.
        """
        pair = self._pair(info.role, info.op)
        if pair is None:
            raise FormatError(
                f"recipe {self.name!r} has no formats for {info.key!r}: its role is {info.role}, "
                f"and a recipe is for {', '.join(self.by_role)}. Other tensors follow one of these."
            )
        hi, lo = pair
        if info.need is Need.HIGH:
            lo = hi
        elif info.need is Need.FLOAT32 and info.op not in self.overrides:
            hi = lo = "fp32"
        loaded = loaded_format(info.dtype)
        return Candidates(hi=_at_most(parse_format(hi), loaded), lo=_at_most(parse_format(lo), loaded))

    def promotion(self, role: Role, op: str, entry: Entry) -> Format | None:
        """Return the format that a low forward tensor gets when it overflows too often; None if it cannot overflow.

        A format with a scale of its own does not overflow. Gradients are not promoted: the loss scale protects them.
        Source: arXiv 2301.13464, section 4.
        """
        pair = self._pair(role, op)
        if not entry.low or role not in (Role.ACTIVATION, Role.WEIGHT) or pair is None:
            return None
        high, own = parse_format(pair[0]), parse_format(entry.format)
        return high if not own.scaled and own.max_value < high.max_value else None

    def _pair(self, role: Role, op: str) -> Pair | None:
        return self.overrides.get(op, {}).get(role) or self.by_role.get(role)


def _at_most(fmt: Format, loaded: Format) -> Format:
    """Return ``fmt``, or the format in which the tensor was loaded if that has no more bits."""
    return loaded if fmt.bits >= loaded.bits else fmt


def _value_and_gradient(pair: Pair) -> Mapping[Role, Pair]:
    return {Role.ACTIVATION: pair, Role.ACTIVATION_GRAD: pair}


_HI = "fp(6,9,0)"

HFP8 = Recipe(
    name="hfp8",
    description="16 or 8 bits: FP(4,3,4) forward and FP(5,2,0) backward; the recipe of the paper, after HFP8",
    # Source: arXiv 2301.13464, after HFP8 (Sun et al. 2019); a weight's gradient has 16 bits in both.
    by_role={
        Role.ACTIVATION: (_HI, "fp(4,3,4)"),
        Role.ACTIVATION_GRAD: (_HI, "fp(5,2,0)"),
        Role.WEIGHT: (_HI, "fp(4,3,4)"),
        Role.WEIGHT_GRAD: (_HI, _HI),
    },
    loss_scaling=True,
    promote_every=1,
)

NATIVE = Recipe(
    name="native",
    description="bf16, or the 8-bit dtypes of torch, scaled by a power of two per tensor: e4m3 forward, e5m2 backward",
    # Source: e4m3 forward and e5m2 backward after arXiv 2209.05433; the loss stays in 32 bits, as under autocast.
    by_role={
        Role.ACTIVATION: ("bf16", "e4m3:pow2"),
        Role.ACTIVATION_GRAD: ("bf16", "e5m2:pow2"),
        Role.WEIGHT: ("bf16", "e4m3:pow2"),
        Role.WEIGHT_GRAD: ("bf16", "bf16"),
    },
    overrides={
        **dict.fromkeys(("log_softmax", "float"), _value_and_gradient(("fp32", "bf16"))),
        **{op: _value_and_gradient(("fp32", "fp32")) for op in sorted(LOSS_OPS)},
    },
    loss_scaling=False,
    promote_every=0,  # each low tensor has a scale and does not overflow
)


def _delayed(pair: Pair) -> Pair:
    """Return the pair with delayed scaling of the low format: its scale comes from the previous steps."""
    high, low = pair
    return (high, f"{low}:delayed") if parse_format(low).scaled else pair


NATIVE_DELAYED = replace(
    NATIVE,
    name="native-delayed",
    description="native, with scales from the amax of earlier steps, which saves one pass over memory",
    by_role={role: _delayed(pair) for role, pair in NATIVE.by_role.items()},
)


def _one_format(name: str) -> Recipe:
    """Return a recipe with one format for all tensors, except those that autocast keeps in float32."""
    roles = (Role.ACTIVATION, Role.ACTIVATION_GRAD, Role.WEIGHT, Role.WEIGHT_GRAD)
    return Recipe(
        name=name,
        description=f"{name}, and float32 where autocast uses it; with the strategy standalone, {name} everywhere",
        by_role=dict.fromkeys(roles, (name, name)),
        loss_scaling=False,  # training still scales the loss if gradients are fp16 and masters are not
        promote_every=0,
    )


_POSIT16, _POSIT8 = "posit(16,2):quire", "posit(8,2):quire"

POSIT = Recipe(
    name="posit",
    description="posit(16,2) or posit(8,2), products summed in a quire, the loss in 16 bits; emulated: PositNN's",
    # Source: arXiv 2105.00053: forward, backward and gradients in 8 bits, optimizer and loss in 16, with a quire.
    by_role=dict.fromkeys((Role.ACTIVATION, Role.ACTIVATION_GRAD, Role.WEIGHT, Role.WEIGHT_GRAD), (_POSIT16, _POSIT8)),
    overrides={op: _value_and_gradient((_POSIT16, _POSIT16)) for op in ("log_softmax", *sorted(LOSS_OPS))},
    loss_scaling=False,
    promote_every=0,
)

BF16, FP16 = _one_format("bf16"), _one_format("fp16")

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {recipe.name: recipe for recipe in (HFP8, NATIVE, NATIVE_DELAYED, POSIT, BF16, FP16)}
)
"""Every recipe by name: ``hfp8``, ``native``, ``native-delayed``, ``posit``, ``bf16``, ``fp16``. To add
one, add a row."""


def get_recipe(name: str) -> Recipe:
    """Return the recipe called ``name``.

    Raises:
        FormatError: there is no such recipe.
    """
    if name not in RECIPES:
        close = suggest(name, RECIPES)
        raise FormatError(
            f"there is no recipe {name!r}; choose from {', '.join(sorted(RECIPES))}"
            + (f". Did you mean {close}?" if close else ".")
        )
    return RECIPES[name]


def initial(table: TensorTable, recipe: Recipe, low: Collection[int] = frozenset()) -> dict[str, Entry]:
    """Return one entry for each of the paper's tensors: low for those of the groups in ``low``, high for the others.

    A tensor of a low group is marked low even if both its formats are the same, as those of a weight's gradient are.
    The low ratio counts decisions, so it is exactly 1 when all groups are low.
    """
    entries = {}
    for row in table.paper_tensors:
        candidates = recipe.candidates(row)
        is_low = row.group in low
        entries[row.key] = Entry((candidates.lo if is_low else candidates.hi).name, is_low)
    return entries


def promotable(table: TensorTable, plan: Assignment) -> dict[str, Format]:
    """Return {forward tensor that training may promote: the format that it then gets}."""
    recipe = get_recipe(plan.recipe)
    forward = [row for row in table.tensors if row.role in (Role.WEIGHT, Role.ACTIVATION) and row.key in plan.entries]
    found = {row.key: recipe.promotion(row.role, row.op, plan.entries[row.key]) for row in forward}
    return {key: fmt for key, fmt in found.items() if fmt is not None}


def candidates_of(table: TensorTable, recipe: Recipe, formats: Sequence[str] = ()) -> dict[str, tuple[Format, ...]]:
    """Return the formats that each of the paper's tensors may have: those of ``formats``, or the recipe's two.

    Args:
        table: of the model.
        recipe: used if ``formats`` is empty.
        formats: names to use instead of the recipe's, the high one first. ``e4m3/e5m2`` means e4m3 for values and e5m2
            for gradients. A tensor whose values need more than a low format gets the first one in every place.
    Raises:
        FormatError: there is no such format.
    """
    pairs = [tuple(map(parse_format, name.split("/", 1))) for name in formats]
    found = {}
    for row in table.paper_tensors:
        gradient = row.role in (Role.ACTIVATION_GRAD, Role.WEIGHT_GRAD)
        own = recipe.candidates(row) if not pairs else None
        given = tuple(pair[-1 if gradient else 0] for pair in pairs)
        found[row.key] = (own.hi, own.lo) if own else given[:1] * len(given) if row.need else given
    return found


def store(
    table: TensorTable,
    *,
    master: str | None = None,
    gradients: str | None = None,
    states: str | None = None,
    buffers: str | None = None,
) -> dict[str, Entry]:
    """Return entries for all masters, stored gradients, optimizer states and buffers; None leaves a role out.

    A state that is too small for a block format keeps the dtype of its master, as in the libraries. SGD's are then
    fp32: only bitsandbytes stores SGD states in blocks, and it has no 16-bit states. A frozen weight gets no entry for
    a master with extra bits, because no optimizer would store them. A weight that was loaded in 16 bits gets no entry
    that repeats the format which its master or gradient has anyway.

    Raises:
        FormatError: there is no such format, or it is not allowed for this role.
        PlanError: a format for states is given, but the optimizer has no states, or none that is large enough.
    """
    entries: dict[str, Entry] = {}
    stored = [row for row in table.tensors if is_stored(row)]
    if master is not None:
        fmt = parse_stored(master, Part.MASTER)
        is_split = isinstance(fmt, Format) and fmt.extra_bits
        weights = [row.key for row in stored if row.role is Role.WEIGHT]
        trained = [key for key in weights if grad_key(key) in table.by_key or not is_split]
        entries |= {master_key(key): Entry(fmt.name, False) for key in trained if not _is_loaded_in(table, key, fmt)}
    if gradients is not None:
        name = parse_stored(gradients, Part.STORED_GRADIENT).name
        weights = [row.parts.name for row in stored if row.role is Role.WEIGHT_GRAD]
        stay = [key for key in weights if master is None and _is_loaded_in(table, key, parse_format(name))]
        entries |= {stored_grad_key(key): Entry(name, False) for key in weights if key not in stay}
    if states is not None:
        fmt = parse_stored(states, Part.STATE)
        rows = [row for row in stored if row.role is Role.OPTIM_STATE]
        if not rows:
            raise PlanError(
                f"optimizer_states is {fmt.name}, but the optimizer has no states (or no optimizer was given). "
                "Leave them out, or use one with states: torch.optim.AdamW, or SGD with momentum."
            )
        fits = [row for row in rows if not isinstance(fmt, BlockFormat) or fmt.fits(row.elements)]
        if isinstance(fmt, BlockFormat) and not fits:
            largest = max(row.elements for row in rows)
            raise PlanError(
                f"optimizer_states is {fmt.name}, but no state can be stored in it: {fmt.rule}, and the largest has "
                f"{largest} elements. Choose bf16."
            )
        entries |= {row.key: Entry(fmt.name, False) for row in fits}
        if isinstance(fmt, BlockFormat) and table.schedule.optimizer == "SGD":  # only bitsandbytes has these states
            small = [row for row in rows if row not in fits]
            narrow = [
                row for row in small if is_narrow(master_format(with_loaded(entries, table.loaded), row.parts.name))
            ]
            entries |= {row.key: Entry("fp32", False) for row in narrow}
    if buffers is not None:
        name = parse_stored(buffers, Part.BUFFER).name
        entries |= {buffer_key(each): Entry(name, False) for each in table.buffers}
    return entries


def _is_loaded_in(table: TensorTable, key: str, fmt: Format | BlockFormat) -> bool:
    return fmt.name != "fp32" and table.loaded[key] == fmt.name


def save(
    table: TensorTable, entries: Mapping[str, Entry], saved: str, *, keep: Collection[str] = frozenset()
) -> dict[str, Entry]:
    """Return entries for saved activations, wherever ``saved`` takes fewer bytes than ``entries`` do.

    Outputs of ``EXPONENTIATED`` operators, and activations whose exact values the backward pass needs, get none.

    Args:
        table: of the model.
        entries: of the paper's tensors; a saved copy without an entry has its tensor's format. Only copies of these
            tensors are considered.
        saved: name of the format.
        keep: activations whose copies stay as they are, e.g. because they hold infinities.
    Raises:
        FormatError: there is no such format.
    """
    fmt = parse_saved(saved)
    rows = ((table.by_key.get(saved_key(key)), key) for key in entries)
    saved_rows = ((row, key) for row, key in rows if row is not None and row.role is Role.SAVED)
    return {
        row.key: Entry(fmt.name, False)
        for row, key in saved_rows
        if key not in keep
        and row.op not in EXPONENTIATED
        and not row.need
        and packed_bytes(fmt, math.prod(row.shape))
        < packed_bytes(parse_format(entries[key].format), math.prod(row.shape))
    }
