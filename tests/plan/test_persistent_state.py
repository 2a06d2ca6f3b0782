"""What is stored between steps, on tables small enough to add up by hand: keys, formats, bytes, libraries."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assign.errors import FormatError, PlanError
from assign.formats.parsing import parse_format
from assign.formats.rows import FORMATS, STATE_FORMATS
from assign.plan.keys import Part
from assign.plan.optimizer_backends import Library, Stored, choose_library, optimizer_scratch, stored_in
from assign.plan.persistent_state import (
    NATIVE,
    bytes_of,
    check_rounding,
    has_narrow_masters,
    parse_stored,
    resident,
)
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import store
from assign.plan.table import Role, Schedule, TensorInfo, TensorTable


def table(elements=8192, optimizer="AdamW", states=("exp_avg", "exp_avg_sq")):
    """Two weights with all that AdamW keeps of them; the second has a hundred elements."""

    def row(key, role, size):
        return TensorInfo(key=key, role=role, shape=(size,), elements=size, dtype="float32", op="parameter")

    rows = []
    for key, size in (("w", elements), ("b", 100)):
        rows += [row(key, Role.WEIGHT, size), row(f"{key}.grad", Role.WEIGHT_GRAD, size)]
        rows += [row(f"{key}.optim.{state}", Role.OPTIM_STATE, size) for state in states]
    total = 4 * (elements + 100)
    schedule = Schedule(
        parameter_bytes=total,
        gradient_bytes=total,
        optimizer=optimizer,
        optimizer_bytes=len(states) * total,
        optimizer_scratch_bytes=12 * elements,
    )
    return TensorTable(tensors=tuple(rows), schedule=schedule)


def plan(entries):
    paper = {key: Entry("fp32", False) for key in ("w", "w.grad", "b", "b.grad")}
    return Assignment(entries=paper | entries, recipe="native", fingerprint="")


def test_a_module_called_master_is_no_master():
    bf16, fp32 = Entry("bf16", False), Entry("fp32", False)
    assert not has_narrow_masters({"heads.master": bf16, "heads.master.grad": bf16})
    assert not has_narrow_masters({"a": bf16, "a.master": fp32, "a.grad.stored": bf16})
    assert has_narrow_masters({"a": bf16, "a.master": bf16})


@pytest.mark.parametrize(
    ("key", "name", "says"),
    [
        ("w.master", "e4m3", "is not allowed for a master: training adds its updates to it"),
        ("w.master", "fp(6,9,0)", "Allowed: fp32, bf16, fp16"),
        ("w.master", "dynamic8", "is not allowed for a master"),
        ("w.grad.stored", "e5m2", "is not allowed for a stored gradient"),
        ("w.optim.exp_avg", "e4m3", "Allowed: fp32, bf16, fp16, dynamic8, dynamic4, e4m3:block256"),
        ("w.optim.exp_avg", "dynamic9", "'dynamic9' is not a number format"),
        ("w", "dynamic8", "is allowed only for optimizer states"),
    ],
)
def test_formats_have_their_places(key, name, says):
    with pytest.raises(PlanError, match=f"^'{re.escape(key)}' is assigned the format ") as caught:
        plan({key: Entry(name, False)})
    assert says in str(caught.value)


def test_plans_with_stored_entries_come_back_from_json_and_cover_the_model():
    entries = {
        "w.master": Entry(" BF16", False),
        "w.grad.stored": Entry("bf16", False),
        "w.optim.exp_avg": Entry("Dynamic8", False),
    }
    first = plan(entries)
    assert [first.entries[key].format for key in entries] == ["bf16", "bf16", "dynamic8"]
    assert Assignment.from_json(first.to_json()) == first
    first.check_covers(["w", "w.grad", "b", "b.grad"], where="here")
    stray = Assignment(entries={"v.optim.exp_avg": Entry("bf16", False)}, recipe="native", fingerprint="")
    with pytest.raises(PlanError, match=r"'v\.optim\.exp_avg'"):
        stray.check_covers([], where="here")


def test_short_gradients_need_short_masters():
    with pytest.raises(PlanError, match="need a loss scale"):
        plan({"w.grad.stored": Entry("fp16", False)})
    plan({"w.grad.stored": Entry("fp16", False), "w.master": Entry("fp16", False)})


def test_bytes_add_up():
    shape = table()
    assert resident(shape, {}).parameters == resident(shape, {}).gradients == 4 * 8292
    assert resident(shape, {}).states == 8 * 8292
    eight = resident(shape, store(shape, states="dynamic8"))
    assert eight.states == 2 * (8192 + 4 * 8192 // 256) + 8 * 100  # a small one stays as it is
    assert resident(shape, store(shape, states="dynamic4")).states == 2 * (8192 // 2 + 4 * 8192 // 128) + 8 * 100
    assert resident(shape, store(shape, states="e4m3:block256")).states == eight.states
    narrow = resident(shape, store(shape, master="bf16"))
    assert (narrow.parameters, narrow.gradients, narrow.states) == (2 * 8292, 2 * 8292, 4 * 8292)  # all follow
    gradients = resident(shape, store(shape, gradients="bf16"))
    assert (gradients.parameters, gradients.gradients, gradients.states) == (4 * 8292, 2 * 8292, 8 * 8292)


@given(st.integers(1, 10**9))
def test_fewer_bits_never_take_more_bytes(blocks):
    elements = 4096 * blocks
    formats = [FORMATS["fp32"], FORMATS["bf16"], *(STATE_FORMATS[name] for name in ("dynamic8", "dynamic4"))]
    sizes = [bytes_of(fmt, elements) for fmt in formats]
    assert sizes == sorted(sizes, reverse=True)
    for fmt in STATE_FORMATS.values():
        assert bytes_of(fmt, elements) == elements * fmt.bits_per_element / 8


def test_states_that_are_not_there_or_too_small_are_refused():
    with pytest.raises(PlanError, match="the optimizer has no states"):
        store(table(states=()), states="bf16")
    with pytest.raises(
        PlanError, match=r"no state can be stored in it: it takes at least 4096 elements.*the largest has 4095"
    ):
        store(table(elements=4095), states="dynamic8")
    with pytest.raises(FormatError, match="is not allowed for a master"):
        store(table(), master="e4m3")
    assert store(table(elements=4096 + 128), states="dynamic4")  # a whole number of blocks of 128, not of 256
    with pytest.raises(PlanError, match="no state can be stored in it"):
        store(table(elements=4096 + 128), states="dynamic8")


def stored(master="fp32", gradient="fp32", elements=8192, **states):
    return Stored(
        key="w",
        elements=elements,
        master=parse_format(master),
        gradient=parse_format(gradient),
        states={name: parse_stored(fmt, Part.STATE) for name, fmt in states.items()},
    )


@pytest.mark.parametrize(
    ("optimizer", "parameter", "library"),
    [
        ("RMSprop", stored("bf16", "bf16", square_avg="bf16"), "torch"),
        ("AdamW", stored(exp_avg="fp32", exp_avg_sq="fp32"), "torch"),
        ("SGD", stored("bf16", "fp32", momentum_buffer="fp16"), "torch"),
        ("AdamW", stored(gradient="bf16", exp_avg="fp32", exp_avg_sq="fp32"), "torchao"),
        ("Adam", stored(exp_avg="dynamic8", exp_avg_sq="bf16"), "torchao"),
        ("SGD", stored("fp16", momentum_buffer="dynamic8"), "bitsandbytes"),
    ],
)
def test_the_first_library_that_can(optimizer, parameter, library):
    assert choose_library(optimizer, [parameter]) == library


def test_what_no_library_can_keep_says_what_each_could():
    with pytest.raises(PlanError) as caught:
        choose_library("SGD", [stored(momentum_buffer="fp32"), stored(momentum_buffer="dynamic4")])
    assert str(caught.value) == (
        "no library has an optimizer SGD for the formats that the plan stores:\n"
        "  torch keeps SGD's states as fp32, bf16, fp16; requested: 'w' (master fp32, gradient fp32, "
        "momentum_buffer dynamic4)\n"
        "  torchao has Adam and AdamW only; requested: 'w' (master fp32, gradient fp32, momentum_buffer fp32)\n"
        "  bitsandbytes keeps all states of a parameter as fp32, or all as dynamic8; requested: 'w' (master fp32, "
        "gradient fp32, momentum_buffer dynamic4)\n"
        "  Store fp32 (leave such entries out of the plan), or use torch.optim.AdamW or torch.optim.SGD."
    )
    with pytest.raises(PlanError, match=r"'w\.optim\.exp_avg' is assigned dynamic8, but has 100 elements: it takes"):
        choose_library("AdamW", [stored(elements=100, exp_avg="dynamic8", exp_avg_sq="fp32")])
    with pytest.raises(PlanError, match="bitsandbytes keeps all"):
        choose_library("Adam", [stored(exp_avg="dynamic8", exp_avg_sq="bf16")], [Library.BITSANDBYTES])


def test_the_steps_scratch_follows_the_library():
    shape = table()

    def scratch(optimizer="AdamW", **formats):
        schedule = table(optimizer=optimizer).schedule
        return optimizer_scratch(schedule, stored_in(shape, store(shape, **formats)))

    assert scratch() == 12 * 8192
    assert scratch(master="bf16") == 6 * 8192
    assert scratch(gradients="bf16") == 0
    assert scratch(states="dynamic8") == pytest.approx(8.03125 * 8192, rel=0.01)
    with pytest.raises(PlanError, match="no library has an optimizer RMSprop"):
        scratch("RMSprop", states="bf16")
    assert [name for name in NATIVE if name in FORMATS] == [*NATIVE]


def test_kahans_sum_keeps_two_bytes_for_each_element_in_16_bits():
    shape = table()
    narrow = plan(store(shape, master="bf16")).replace({"b.master": Entry("fp32", False)}).entries
    plain, kept = resident(shape, narrow), resident(shape, narrow, "kahan")
    assert kept.states - plain.states == 2 * 8192  # the other master is fp32 and needs none
    assert kept.optimizer_states["w.optim.compensation"] == 2 * 8192
    assert resident(shape, narrow, "stochastic") == plain
    scratch = [optimizer_scratch(shape.schedule, stored_in(shape, narrow), how) for how in ("stochastic", "kahan")]
    assert scratch == [34 * 8192, 38 * 8192]


def test_what_rounds_no_updates_says_so():
    shape = table(optimizer="RMSprop")
    narrow = plan(store(shape, master="bf16")).entries
    with pytest.raises(PlanError, match=r"with Kahan's sum.\n  Allowed: SGD, Adam, AdamW"):
        optimizer_scratch(shape.schedule, stored_in(shape, narrow), "kahan")
    with pytest.raises(PlanError, match="search: update_rounding='kahan' is for 16-bit masters"):
        check_rounding("kahan", plan({}).entries, where="search")
    with pytest.raises(PlanError, match="train: update_rounding 'khan' is not known, did you mean 'kahan'"):
        check_rounding("khan", narrow, where="train")
