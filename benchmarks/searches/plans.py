"""Plans that no search of ours makes: drawn ones, and those of GACT's rule. Pure: numbers in, entries out."""

import itertools
import random
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from assign.plan.keys import is_saved_key
from assign.plan.plan import Entry
from assign.plan.recipes import NATIVE, candidates_of
from assign.plan.table import Role, TensorTable

RUNGS = ("bf16", "e4m3:pow2/e5m2:pow2", "fp(4,1,3)/fp(5,1,10)", "fp(4,0,3)/fp(5,0,10)")
"""Formats of values and of gradients, down to two and to one significant bit, as 4 and 2 bits with a scale have."""

SAVED = ("int8:block64", "int4:block64", "int2:block64")
"""Formats of copies that wait."""

COARSE = replace(
    NATIVE,
    name="coarse",
    description="bf16, or one significant bit in a byte",
    by_role={
        **NATIVE.by_role,
        Role.ACTIVATION: ("bf16", "fp(4,0,3)"),
        Role.ACTIVATION_GRAD: ("bf16", "fp(5,0,10)"),
        Role.WEIGHT: ("bf16", "fp(4,0,3)"),
    },
)
"""A loss that shows which tensors were low. Copies that wait take a byte, as in ``native``; what is computed with has
the width of bf16."""

NAMES = ("fp32", *dict.fromkeys(part for rung in RUNGS for part in rung.split("/")), *SAVED)
"""Every format that a plan in here may have."""


def draw(table: TensorTable, free: Collection[str], seed: int) -> dict[str, Entry]:
    """A plan drawn at random: how many tensors are rounded, how many copies are, and how often to which format.

    Coarser formats come more often: the others hardly move a loss.

    Args:
        table: of the model.
        free: keys that may be rounded; the others stay in fp32, or have no copy of their own format.
        seed: of everything that is drawn.
    """
    rng = random.Random(seed)
    rungs = candidates_of(table, NATIVE, RUNGS)
    shares, odds = {}, {}
    for waits, names in ((False, RUNGS), (True, SAVED)):
        shares[waits] = rng.random()
        odds[waits] = [rng.gammavariate(0.5, 2.0**place) for place in range(len(names))]
    entries = {}
    for row in table.tensors:
        waits = is_saved_key(row.key)
        if not waits and row.key not in rungs:
            continue
        names = SAVED if waits else [fmt.name for fmt in rungs[row.key]]
        if row.key in free and rng.random() < shares[waits]:
            entries[row.key] = Entry(rng.choices(names, odds[waits])[0], not waits)
        elif not waits:
            entries[row.key] = Entry("fp32", False)
    return entries


def gact(
    sensitivity: Mapping[str, float],
    bits: Sequence[int],
    size: Mapping[str, int],
    fits: Callable[[Mapping[str, int]], bool],
) -> dict[str, int]:
    """Bits of every copy that waits, after GACT: the least Σ C·2^(−2b) that fits; the fewest bits if nothing does.

    All begin with the most bits; the one that loses least for each bit saved goes down a step, until it fits.

    Args:
        sensitivity: C of each key.
        bits: the numbers of bits that there are, the most first.
        size: elements of each key.
        fits: whether these bits fit the budget; fewer bits never take more bytes.
    Source: arXiv 2206.11357, what it minimises; written anew.
    """
    moves = sorted(
        (sensitivity[key] * (4.0**-fewer - 4.0**-more) / (size[key] * (more - fewer)), -more, key, fewer)
        for key in sensitivity
        for more, fewer in itertools.pairwise(bits)
    )

    def after(count: int) -> dict[str, int]:
        return dict.fromkeys(sensitivity, bits[0]) | {key: fewer for _, _, key, fewer in moves[:count]}

    low, high = 0, len(moves)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(after(middle)) else (middle + 1, high)
    return after(low)


def to_code(table: TensorTable, entries: Mapping[str, Entry]) -> str:
    """A plan as a text of one letter per row of the table: which of ``NAMES``; ``-`` where there is no entry."""
    letters = dict(zip(NAMES, string.ascii_letters, strict=False))
    return "".join(letters[entries[row.key].format] if row.key in entries else "-" for row in table.tensors)


def of_code(table: TensorTable, code: str) -> dict[str, Entry]:
    """Inverse of :func:`to_code`; what counted as low is lost, and nothing counts as low."""
    names = dict(zip(string.ascii_letters, NAMES, strict=False))
    return {
        row.key: Entry(names[letter], False) for row, letter in zip(table.tensors, code, strict=True) if letter != "-"
    }
