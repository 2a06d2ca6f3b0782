"""The memory model on schedules small enough to add up by hand, and against the profiler on real steps."""

import gc

import pytest
import torch
from helpers import adamw, all_high, all_low, everything, measured_peak, sgd, traced
from models import (
    GPT,
    MLP,
    Checkpointed,
    Gated,
    OwnFunction,
    ResNet,
    Upsampling,
    class_loss,
    images,
    tokens,
    vectors,
)

from assign import _torch
from assign.errors import BudgetError, PlanError
from assign.executor.apply import planned_step
from assign.memory.estimate import aggregate_bytes, estimate, low_ratio, low_ratio_bits, peak_bytes
from assign.memory.replay import Replay
from assign.numerics.promotion import Promotion
from assign.optim.optimizers import follow
from assign.plan.keys import saved_key
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import get_recipe
from assign.plan.space import SearchSpace
from assign.plan.table import Buffer, Event, Role, Schedule, TensorInfo, TensorTable
from assign.planner import search, search_table
from assign.strategies.goal import parse_budget


def chain():
    """x → relu → linear-like, each of 100 elements; relu's output waits for the backward pass."""

    def row(key, op, inputs=()):
        forward = TensorInfo(
            key=key, role=Role.ACTIVATION, shape=(100,), elements=100, dtype="float32", op=op, inputs=inputs
        )
        gradient = TensorInfo(
            key=f"{key}.grad", role=Role.ACTIVATION_GRAD, shape=(100,), elements=100, dtype="float32", op=op
        )
        return forward, gradient

    def buffer(holds=""):
        return Buffer(elements=100, dtype="float32", holds=holds)

    buffers = (
        buffer(),
        buffer("/relu"),
        buffer(),
        buffer("/mul"),
        buffer("/mul.grad"),
        buffer("/relu.grad"),
        buffer("/mul.grad"),
    )
    events = (
        Event(op="/relu", backward=False, writes=(0,)),
        Event(op="mark:/relu", backward=False, reads=(0,), writes=(1,)),
        Event(op="/mul", backward=False, reads=(1,), writes=(2,)),
        Event(op="mark:/mul", backward=False, reads=(2,), writes=(3,)),
        Event(op="", backward=True, writes=(6,)),
        Event(op="mark:/mul", backward=True, reads=(6,), writes=(4,)),
        Event(op="/mul", backward=True, reads=(4, 1), writes=(5,)),
    )
    schedule = Schedule(buffers=buffers, events=events, parameter_bytes=1000)
    return TensorTable(tensors=(*row("/relu", "relu"), *row("/mul", "mul", ("/relu",))), schedule=schedule)


def entries(forward, backward):
    return {
        key: Entry(backward if key.endswith(".grad") else forward, False)
        for key in ("/relu", "/relu.grad", "/mul", "/mul.grad")
    }


def test_fp32_adds_up():
    replay = Replay(chain(), {})
    assert replay.peak_bytes == 1000 + 400 + 400 + 400  # in mul's backward: relu, the gradient read, the gradient made
    assert replay.saved_bytes == 400
    assert replay.peak_at == "/mul (backward)"


def test_native_sixteen_bit_halves_everything_but_what_is_resident():
    replay = Replay(chain(), entries("bf16", "bf16"))
    assert replay.peak_bytes == 1000 + 200 + 200 + 200
    assert replay.saved_bytes == 200


def test_packed_codes_wait_and_are_decoded_for_their_reader():
    for forward, backward, carrier in (("e4m3", "e5m2", 200), ("fp(4,3,4)", "fp(5,2,0)", 400)):
        replay = Replay(chain(), entries(forward, backward))
        assert replay.saved_bytes == 100
        assert any(s.role == Role.SAVED and s.bytes == 100 for s in replay.segments)
        decoded = [s for s in replay.segments if s.key == "/relu" and s.start == 4 * 6]
        assert [s.bytes for s in decoded] == [carrier]  # bf16; a format that torch does not have lives in fp32


def test_saved_entry_overrides_the_activation():
    table = chain()
    plain = Replay(table, entries("bf16", "bf16"))
    narrow = Replay(table, entries("bf16", "bf16") | {saved_key("/relu"): Entry("e4m3", True)})
    assert narrow.saved_bytes == plain.saved_bytes // 2


def test_saved_blocks_are_counted_whole_with_what_they_share():
    table = chain()  # relu's 100 elements
    for name, size in (("int4:block64", 2 * (32 + 4)), ("mxfp8:sr", 4 * (32 + 1)), ("e4m3:block64", 2 * (64 + 2))):
        for chosen in (entries("bf16", "bf16"), entries("fp32", "fp32"), entries("e4m3:pow2", "e5m2:pow2")):
            assert Replay(table, chosen | {saved_key("/relu"): Entry(name, False)}).saved_bytes == size
    alone = Replay(table, {saved_key("/relu"): Entry("int4:block64", False)})
    assert alone.saved_bytes == 72
    assert [s.bytes for s in alone.segments if s.role == Role.SAVED] == [72]


def test_what_takes_no_fewer_bytes_in_blocks_waits_as_it_is():
    buffers = tuple(Buffer(elements=9, dtype="float32", holds=b.holds) for b in chain().schedule.buffers)
    schedule = Schedule(buffers=buffers, events=chain().schedule.events)
    table = TensorTable(tensors=chain().tensors, schedule=schedule)
    assert Replay(table, {saved_key("/relu"): Entry("int4:block64", False)}).saved_bytes == 36
    assert Replay(table, {saved_key("/relu"): Entry("int8:block64", False)}).saved_bytes == 36


def test_fewer_bits_never_raise_what_waits():
    table, sizes = chain(), []
    for name in ("fp32", "fp(6,9,0)", "bf16", "fp(4,3,4)"):
        sizes.append(Replay(table, entries(name, name)).saved_bytes)
    for name in ("int4:block64", "int2:block64"):
        chosen = entries("bf16", "bf16") | {saved_key("/relu"): Entry(name, False)}
        sizes.append(Replay(table, chosen).saved_bytes)
    assert sizes == sorted(sizes, reverse=True)


def test_aggregate_and_ratio_count_the_papers_tensors():
    table = chain()
    chosen = entries("fp(4,3,4)", "fp(6,9,0)")
    assert aggregate_bytes(table, chosen) == 200 * 1 + 200 * 2
    assert low_ratio(table, chosen) == 0.0
    chosen["/relu"] = Entry("fp(4,3,4)", True)
    assert low_ratio(table, chosen) == 0.25
    # 200 elements of 8 bits and 200 of 16 against 400 of 16; half of the elements have half of the bits.
    assert low_ratio_bits(table, chosen, get_recipe("hfp8")) == 0.5
    assert low_ratio_bits(table, entries("fp(6,9,0)", "fp(6,9,0)"), get_recipe("hfp8")) == 0
    assert low_ratio_bits(table, entries("fp32", "fp32"), get_recipe("hfp8")) == -2
    assert low_ratio_bits(TensorTable(tensors=()), {}, get_recipe("hfp8")) == 0


def test_estimate_has_both_ratios():
    table = traced(MLP(), vectors())
    costs = estimate(table, all_low(table, "hfp8"))
    assert costs.low_ratio == 1
    gradients = sum(p.numel() for p in MLP().parameters())  # stay at 16 bits
    loss = sum(row.elements for row in table.paper_tensors if row.need)  # and it at 32
    assert costs.low_ratio_bits == pytest.approx((table.elements - loss - gradients) / (table.elements + loss))
    assert costs.to_json()["low_ratio_bits"] == costs.low_ratio_bits


def test_slices_wait_in_their_own_format_or_in_their_source():
    table = traced(Gated(), vectors())  # halves of 16 × 4 elements, both read by the product's backward pass

    def waiting(plan):
        keys = ("fc/linear", "/slice", "/slice#2")
        return {s.key: s.bytes for s in Replay(table, plan.entries).segments if s.role == Role.SAVED and s.key in keys}

    assert waiting(everything(table, "bf16")) == {"fc/linear": 16 * 8 * 2}  # views of the whole
    assert waiting(all_low(table)) == {"/slice": 16 * 4 + 4, "/slice#2": 16 * 4 + 4}  # each with its scale


def test_the_optimizers_step_may_be_the_peak():
    table = chain()
    schedule = Schedule(
        buffers=table.schedule.buffers, events=table.schedule.events, gradient_bytes=5000, optimizer_scratch_bytes=77
    )
    replay = Replay(TensorTable(tensors=table.tensors, schedule=schedule), {})
    assert replay.peak_bytes == 5077
    assert replay.peak_at == "optimizer"


def test_estimate_refuses_a_plan_of_another_model():
    plan = everything(traced(MLP(), vectors()), "bf16")
    with pytest.raises(PlanError, match="does not fit this model"):
        estimate(traced(GPT(), tokens()), plan)


def test_budgets():
    assert parse_budget("50%", 1000) == 500
    assert parse_budget("1.5 KiB", 0) == 1536
    assert parse_budget("2GB", 0) == 2 * 10**9
    assert parse_budget(123, 0) == 123
    for wrong in ("half", "50 percent", "-3MiB", ""):
        with pytest.raises(BudgetError, match="is not a budget"):
            parse_budget(wrong, 0)


def test_search_meets_a_budget_and_says_the_floor():
    model, batch = ResNet(), images()
    table = traced(model, batch)
    plan = search(model, batch, class_loss, budget="50%", optimizer=sgd)
    assert peak_bytes(table, plan.entries) <= 0.5 * peak_bytes(table, {})
    assert plan.provenance.estimate["peak_bytes"] == peak_bytes(table, plan.entries)
    with pytest.raises(BudgetError, match=r"still needs (\d+) bytes") as caught:
        search(model, batch, class_loss, budget="1%", optimizer=sgd)
    floor = int(str(caught.value).split("still needs ")[1].split()[0])
    assert peak_bytes(table, search(model, batch, class_loss, budget=floor, optimizer=sgd).entries) <= floor


def test_one_format_everywhere_leaves_nothing_to_search():
    table = traced(MLP(), vectors())
    plan = search_table(table, strategy="uniform", space=SearchSpace(formats="bf16"))
    assert {entry.format for entry in plan.entries.values()} == {"bf16"}
    with pytest.raises(BudgetError, match="nothing left to search"):
        search_table(table, budget="50%", strategy="uniform", space=SearchSpace(formats="bf16"))


BIG = {  # large enough that operators on whole tensors dominate, small enough for seconds
    "resnet": (lambda: ResNet(width=32, blocks=3), lambda: images(batch=32, size=32)),
    "gpt": (lambda: GPT(width=128, layers=2, length=64), lambda: tokens(batch=16, length=64)),
    "mlp": (lambda: MLP(width=2048), lambda: vectors(batch=1024)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BIG)
@pytest.mark.parametrize(
    "plan_name",
    ["fp32", "bf16", "native high", "native low", "hfp8 low", "fp32, saved int2", "bf16, saved int4", "posit8"],
)
def test_predicted_peak_is_within_five_per_cent_of_measured(name, plan_name):
    make, data = BIG[name]
    model, batch = make(), data()
    table = traced(model, batch)
    plan = {
        "fp32": lambda: everything(table, "fp32"),
        "bf16": lambda: everything(table, "bf16"),
        "native high": lambda: all_high(table),
        "native low": lambda: all_low(table),
        "hfp8 low": lambda: all_low(table, "hfp8"),
        "posit8": lambda: everything(table, "posit(8,2)"),
        "fp32, saved int2": lambda: search_table(
            table, strategy="uniform", space=SearchSpace(formats="fp32", saved="int2:block64:sr")
        ),
        "bf16, saved int4": lambda: search_table(
            table, strategy="uniform", space=SearchSpace(formats="bf16", saved="int4:block64")
        ),
    }[plan_name]()
    optimizer, promotion = sgd(model.parameters()), Promotion(plan)
    step = planned_step(model, class_loss, plan, backend="eager", promotion=promotion)
    measured = measured_peak(model, batch, step, optimizer)
    assert peak_bytes(table, plan.entries) == pytest.approx(measured, rel=0.05)


TAKEN_APART = {  # where operators are not computed as they were captured
    "checkpointed": (lambda: Checkpointed(width=128, layers=3, length=64), lambda: tokens(batch=16, length=64)),
    "own function": (lambda: OwnFunction(width=512, layers=4), lambda: vectors(batch=1024)),
    "upsampling": (lambda: Upsampling(width=32), lambda: images(batch=16, size=32)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKEN_APART)
@pytest.mark.parametrize("format_name", ["fp32", "bf16"])
def test_predicted_peak_of_what_is_recomputed_or_decomposed(name, format_name):
    make, data = TAKEN_APART[name]
    model, batch = make(), data()
    table = traced(model, batch)
    plan = everything(table, format_name)
    step = planned_step(model, class_loss, plan, backend="eager")
    measured = measured_peak(model, batch, step, sgd(model.parameters()))
    assert peak_bytes(table, plan.entries) == pytest.approx(measured, rel=0.05)


HEAVY = {  # steps with more parameters, gradients and states than activations
    "wide mlp": (lambda: MLP(width=2**16), lambda: vectors(batch=8)),
    "gpt": (lambda: GPT(width=256, layers=2, length=64), lambda: tokens(batch=8, length=64)),
}
STORED = {
    "8-bit states, torchao": (adamw, "bf16", {"optimizer_states": "dynamic8"}),
    "4-bit states": (adamw, "bf16", {"optimizer_states": "dynamic4"}),
    "bf16 gradients": (sgd, "bf16", {"gradients": "bf16"}),
    "bf16 gradients and states": (sgd, "bf16", {"gradients": "bf16", "optimizer_states": "bf16"}),
    "8-bit states, bitsandbytes": (sgd, "bf16", {"optimizer_states": "dynamic8"}),
    "bf16 masters, 8-bit states": (adamw, "bf16", {"master": "bf16", "optimizer_states": "dynamic8"}),
    "standalone": (adamw, None, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("model_name", HEAVY)
@pytest.mark.parametrize("name", STORED)
def test_predicted_peak_counts_what_is_stored(model_name, name):
    factory, format_name, stored = STORED[name]
    make, data = HEAVY[model_name]
    model, batch = make(), data()
    table = traced(model, batch, optimizer=factory)
    if format_name is None:
        plan = search_table(table, strategy="standalone", space="bf16")
    else:
        plan = search_table(table, strategy="uniform", space=SearchSpace(formats=format_name, **stored))
    step = planned_step(model, class_loss, plan, backend="eager")
    optimizer = follow(factory(model.parameters()), model, plan)
    measured = measured_peak(model, batch, step, optimizer)
    assert peak_bytes(table, plan.entries) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("factory", [sgd, adamw])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_predicted_peak_counts_how_updates_are_rounded(factory, rounding):
    model, batch = MLP(width=2**15), vectors(batch=8)
    table = traced(model, batch, optimizer=factory)
    plan = search_table(table, strategy="standalone", space="bf16")
    step = planned_step(model, class_loss, plan, backend="eager")
    optimizer = follow(factory(model.parameters()), model, plan, update_rounding=rounding)
    measured = measured_peak(model, batch, step, optimizer)
    assert estimate(table, plan.with_update_rounding(rounding)).peak_bytes == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "states"), [(sgd, "dynamic8"), (adamw, "dynamic8"), (adamw, "dynamic4"), (adamw, "e4m3:block256")]
)
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_predicted_peak_counts_rounded_updates_beside_states_in_other_formats(factory, states, rounding):
    """The largest master and its gradient are in float32 while the optimizer steps on them."""
    torch.manual_seed(0)
    model, batch = MLP(width=2**15), vectors(batch=8)
    table = traced(model, batch, optimizer=factory)
    space = SearchSpace(formats="bf16", master="bf16", optimizer_states=states, update_rounding=rounding)
    plan = search_table(table, strategy="uniform", space=space)
    step = planned_step(model, class_loss, plan, backend="eager")
    measured = measured_peak(model, batch, step, follow(factory(model.parameters()), model, plan))
    assert estimate(table, plan).peak_bytes == pytest.approx(measured, rel=0.05)


def test_a_budget_counts_what_kahans_sum_keeps():
    table = traced(MLP(width=2048), vectors(), optimizer=adamw)
    plain, kahan = (
        search_table(table, low_ratio=0, space=SearchSpace(master="bf16", update_rounding=rounding))
        for rounding in ("nearest", "kahan")
    )
    plain, kahan = (plan.provenance.estimate["peak_bytes"] for plan in (plain, kahan))
    elements = sum(p.numel() for p in MLP(width=2048).parameters())
    assert kahan >= plain + 2 * elements
    with pytest.raises(BudgetError):
        search_table(table, space=SearchSpace(master="bf16", update_rounding="kahan"), budget=2 * elements)
    with pytest.raises(PlanError, match="search: update_rounding='kahan' is for 16-bit masters"):
        search_table(table, low_ratio=0, space=SearchSpace(update_rounding="kahan"))


def test_a_budget_is_met_by_storing_less_before_anything_else_is_narrowed():
    table = traced(MLP(width=2048), vectors(), optimizer=adamw)
    plain = search_table(table, low_ratio=0)
    budget = peak_bytes(table, plain.entries) - 200_000
    narrow = search_table(table, budget=budget, space=SearchSpace(optimizer_states="dynamic8"))
    assert peak_bytes(table, narrow.entries) <= budget
    assert low_ratio(table, narrow.entries) == 0
    with pytest.raises(BudgetError, match="or store less between steps"):
        search_table(table, budget=budget)


def test_what_is_stored_shows_by_role_and_by_key():
    table = traced(MLP(width=2048), vectors(), optimizer=adamw)
    wide = estimate(table, search_table(table, low_ratio=0))
    costs = estimate(
        table, search_table(table, low_ratio=0, space=SearchSpace(optimizer_states="dynamic8", master="bf16"))
    )
    n, small = 2048 * 16 + 4 * 2048, 2048 + 4
    assert wide.by_role["optimizer states"] == 8 * (n + small)
    assert costs.by_role["optimizer states"] == 2 * (n + n // 64) + 4 * small
    assert costs.by_role["parameters"] == wide.by_role["parameters"] // 2 == 2 * (n + small)
    assert sum(size for _, _, size in costs.alive) == costs.peak_bytes
    alive = {key: (role, size) for key, role, size in costs.alive}
    assert alive["first.weight.optim.exp_avg"] == ("optimizer states", 2048 * 16 + 2048 * 16 // 64)
    assert alive["first.weight.master"] == ("parameters", 2 * 2048 * 16)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_all_low_saves_a_quarter_of_the_bytes(backend):
    model, batch = ResNet(width=32, blocks=2), images(batch=32, size=32)
    table = traced(model, batch)
    low = _measured_saved(model, batch, all_low(table), backend)
    # what plain training saves; compiled, it saves less, since it computes some relus again
    assert low <= 0.27 * _measured_saved(model, batch, everything(table, "fp32"), "eager")
    assert Replay(table, all_low(table).entries).saved_bytes == pytest.approx(
        low, rel=0.02 if backend == "eager" else 0.1
    )


def _measured_saved(model, batch, plan, backend):
    """Bytes that the loss keeps alive: what dropping it frees."""
    step = planned_step(model, class_loss, plan, backend=backend)
    step(batch).backward()
    kept = []

    def forward_only():
        kept.append(step(batch))

    gc.collect()  # what earlier tests left would be counted where it is freed
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_only()
    return sum(_torch.memory_changes(profiler))


def test_a_parameter_that_the_loss_does_not_use_has_neither_a_gradient_nor_states():
    torch.manual_seed(0)
    model = MLP()
    model.pooler = torch.nn.Linear(64, 256)
    batch = vectors()
    table = traced(model, batch, optimizer=adamw)
    plan = everything(table, "fp32")
    used = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("pooler"))
    assert table.schedule.gradient_bytes == used
    assert table.schedule.optimizer_bytes == 2 * used
    step, optimizer = planned_step(model, class_loss, plan, backend="eager"), adamw(model.parameters())
    assert peak_bytes(table, plan.entries) == pytest.approx(measured_peak(model, batch, step, optimizer), rel=0.02)


def test_predicted_peak_of_a_training_that_promotes():
    """Where a tensor may be promoted, it lives in a dtype that holds its high format too: here float32, not bf16."""
    torch.manual_seed(0)
    model, batch = MLP(512), vectors(512)
    table = traced(model, batch, optimizer=sgd)
    entries = {row.key: Entry("e4m3", True) for row in table.paper_tensors}
    plan = Assignment(entries=entries, recipe="hfp8", fingerprint=table.fingerprint)
    promotion = Promotion(plan, every=1)
    step = planned_step(model, class_loss, plan, backend="eager", promotion=promotion)
    peak = measured_peak(model, batch, step, sgd(model.parameters()))
    assert estimate(table, plan, promotion=True).peak_bytes == pytest.approx(peak, rel=0.03)
    assert estimate(table, plan).peak_bytes < 0.9 * peak
