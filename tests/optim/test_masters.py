"""Masters of 24 bits: their split, the step that they make, their bytes, their checkpoints, refusals."""

import copy
import math

import pytest
import torch
from helpers import adamw, everything, measured_peak, sgd, traced, trained
from hypothesis import example, given
from hypothesis import strategies as st
from models import MLP, class_loss, vectors
from torch import nn

import assign
from assign import distributed
from assign.errors import PlanError, TaskError
from assign.executor.apply import planned_step
from assign.memory.estimate import estimate
from assign.optim.gradients import widened
from assign.optim.masters import join, split, widened_weights
from assign.optim.optimizers import follow
from assign.plan.persistent_state import EXTRA_BITS, gradient_format, resident
from assign.plan.plan import Entry
from assign.plan.recipes import store
from assign.plan.space import SearchSpace
from assign.planner import search_table
from assign.tasks import Task
from assign.training.loop import train
from assign.training.options import TrainOptions
from assign.training.weights import load_weights

BATCH = vectors(batch=8)
LARGEST = 2.0**128 - 2.0**112  # of 24 bits


def made(optimizer=sgd, width=32, master="bf16+8", **formats):
    """A model, its step, the table, and the plan, everything else in fp32."""
    torch.manual_seed(0)
    model = MLP(width=width)
    table = traced(model, BATCH, optimizer=optimizer)
    plan = everything(table, "fp32").replace(store(table, master=master, **formats))
    return model, planned_step(model, class_loss, plan, backend="eager"), table, plan


def parts(values):
    """The bf16 part, the extra bits, and both joined."""
    wide = torch.as_tensor(values, dtype=torch.float32)
    narrow, extra = torch.empty_like(wide, dtype=torch.bfloat16), torch.empty_like(wide, dtype=torch.uint8)
    split(wide.clone(), narrow, extra)
    return narrow, extra, join(narrow, extra)


def read(model, plan):
    """Gradients as the optimizer reads them."""
    found = []
    for name, parameter in model.named_parameters():
        fmt = gradient_format(plan.entries, name)
        if fmt.scaled:
            with widened(parameter, fmt):
                found.append(parameter.grad.float())
        else:
            found.append(parameter.grad.float())
    return found


# ---- the split


def oracle(value):
    """Slow: a finite value rounded to 24 bits, ties to even, and its bf16 part, ties away from zero; exact numbers."""
    exponent = max(math.frexp(value)[1] - 1, -126) if value else -126
    whole = round(math.ldexp(value, 15 - exponent))
    part = math.copysign(math.floor(abs(whole) / 256 + 0.5), value)
    return math.ldexp(whole, exponent - 15), math.ldexp(part, exponent - 7)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@example([1 + 2**-16, 1 + 3 * 2**-16])  # ties
def test_any_value_is_rounded_to_24_bits_and_its_parameter_to_nearest(values):
    values = [value for value in values if abs(value) < LARGEST] or [0.0]
    narrow, _, wide = parts(values)
    wanted, near = zip(*map(oracle, values), strict=True)
    assert torch.equal(wide, torch.tensor(wanted))
    assert torch.equal(narrow.float(), torch.tensor(near).to(torch.bfloat16).float())
    assert torch.equal(torch.signbit(wide), torch.signbit(torch.tensor(values)))
    for value, found in zip(values, wide.tolist(), strict=True):
        unit = math.ldexp(1.0, max(math.frexp(value)[1] - 1, -126) - 15)
        assert abs(found - value) <= unit / 2


def test_every_pair_of_parts_is_one_value():
    narrow = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    for code in (0, 1, 127, 128, 200, 255):
        extra = torch.full_like(narrow, code, dtype=torch.uint8)
        wide = join(narrow, extra)
        keep = wide.isfinite() & ((wide != 0) | (code == 0)) & (narrow.float() != 0)
        again = parts(wide)
        assert keep.sum() > 65000
        assert torch.equal(again[0][keep].view(torch.int16), narrow[keep].view(torch.int16))
        assert torch.equal(again[1][keep], extra[keep])


def test_the_edges():
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, LARGEST, 2.0**128 - 2.0**111, -(2.0**128 - 2.0**104)]
    narrow, _, wide = parts(values)
    assert wide.tolist()[:4] == values[:4]
    assert torch.signbit(wide[:2]).tolist() == [False, True]
    assert wide[4].isnan()
    assert narrow[4].isnan()
    assert wide[5:].tolist() == [0.0, LARGEST, math.inf, -math.inf]
    assert narrow[6].isinf()  # beyond bf16, and its master finite
    hidden = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)  # NaN by their last bits
    assert parts(hidden)[2].isnan().all()
    assert parts(1 + 2.0**-8)[0] == 1 + 2.0**-7  # a tie goes away from zero, to the even one or not
    assert parts(1 + 3 * 2.0**-8)[0] == 1 + 2.0**-6
    assert parts(1 + 2.0**-8 - 2.0**-16)[0] == 1 + 2.0**-7  # a tie in 24 bits
    assert parts(1 + 2.0**-8 - 2.0**-15)[0] == 1


# ---- the step


STEPS = {
    "SGD": (sgd, {}),
    "AdamW": (adamw, {}),
    "SGD, gradients in fp32": (sgd, {"gradients": "fp32"}),
    "AdamW, gradients in 8 bits": (adamw, {"gradients": "e5m2:pow2"}),
    "SGD, states in bf16": (sgd, {"states": "bf16"}),
    "torchao": (adamw, {"states": "dynamic8"}),
    "bitsandbytes": (sgd, {"states": "dynamic8"}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_that_of_the_library_on_the_joined_master(name):
    factory, formats = STEPS[name]
    model, step, _, plan = made(factory, width=512 if "dynamic8" in formats.values() else 32, **formats)
    optimizer = follow(factory(model.parameters()), model, plan)
    twin = copy.deepcopy(model).float()
    wide = plan.replace({key: Entry("fp32", False) for key in plan.entries if key.endswith((".master", ".stored"))})
    assign.apply(twin, wide, backend="eager")
    plain = follow(factory(twin.parameters()), twin, wide)
    for _ in range(3):
        twin.load_state_dict(widened_weights(model, optimizer))  # rounded to 24 bits, and nothing else
        optimizer.zero_grad()
        step(BATCH).backward()
        for parameter, gradient in zip(twin.parameters(), read(model, plan), strict=True):
            parameter.grad = gradient
        with torch.compiler.set_stance("force_eager"):  # torchao would compile its step for seconds
            optimizer.step()
            plain.step()
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            narrow, extra, _ = parts(other.detach())
            assert torch.equal(parameter, narrow)
            assert torch.equal(optimizer.state[parameter][EXTRA_BITS], extra)
            assert parameter.dtype is torch.bfloat16
    mine, theirs = (assign.optim.widened_state_dict(each)["state"] for each in (optimizer, plain))
    assert all(mine[n].keys() == theirs[n].keys() for n in theirs)
    assert all(torch.equal(mine[n][k], v) for n in theirs for k, v in theirs[n].items() if isinstance(v, torch.Tensor))


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.w


@pytest.mark.parametrize(
    ("master", "ends_at"), [("bf16+8", 1 + 100 * 2.0**-12), ("bf16", 1.0), ("fp32", 1 + 100 * 2.0**-12)]
)
def test_updates_that_bf16_loses_are_kept(master, ends_at):
    def loss(model, batch):
        return -model(batch).sum()

    model, batch = One(), torch.ones(8)
    plain = {"lr": 2.0**-12, "momentum": 0.0}
    table = traced(model, batch, loss, optimizer=lambda ps: torch.optim.SGD(ps, **plain))
    plan = everything(table, "fp32").replace(store(table, master=master))
    step = planned_step(model, loss, plan, backend="eager")
    optimizer = assign.optimizer(torch.optim.SGD, model, plan, **plain)
    with assign.optim.LostUpdates(model, optimizer) as lost:
        for _ in range(100):
            optimizer.zero_grad()
            step(batch).backward()
            optimizer.step()
    assert widened_weights(model, optimizer)["w"].tolist() == [ends_at] * 8
    assert lost.share == (1 if master == "bf16" else 0)


# ---- bytes


@pytest.mark.parametrize("gradients", [None, "fp32", "e5m2:pow2"])
@pytest.mark.parametrize("factory", [sgd, adamw])
def test_bytes_are_those_measured(factory, gradients):
    table = traced(MLP(width=2**14), BATCH, optimizer=factory)
    space = SearchSpace(formats="bf16", master="bf16+8", gradients=gradients)
    plan = search_table(table, strategy="uniform", space=space)
    model = MLP(width=2**14)
    elements = sum(p.numel() for p in model.parameters())
    found = resident(table, plan.entries)
    moments = 1 if factory is sgd else 2
    assert (found.parameters, found.states) == (2 * elements, (1 + 4 * moments) * elements)
    assert found.gradients == {None: 2, "fp32": 4}.get(gradients, 1) * elements + (
        16 if gradients == "e5m2:pow2" else 0
    )
    step = planned_step(model, class_loss, plan, backend="eager")
    measured = measured_peak(model, BATCH, step, follow(factory(model.parameters()), model, plan))
    assert estimate(table, plan).peak_bytes == pytest.approx(measured, rel=1e-4)


# ---- checkpoints


@pytest.mark.parametrize("factory", [sgd, adamw])
def test_resumes_bit_for_bit(factory, tmp_path):
    model, step, _, plan = made(factory)
    optimizer = follow(factory(model.parameters()), model, plan)
    trained(step, BATCH, optimizer, 3)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    straight = trained(step, BATCH, optimizer, 3), widened_weights(model, optimizer)
    other, again, _, _ = made(factory)
    fresh = follow(factory(other.parameters()), other, plan)
    weights, states = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(weights)
    fresh.load_state_dict(states)
    assert all(map(torch.equal, trained(again, BATCH, fresh, 3), straight[0]))
    found = widened_weights(other, fresh)
    assert all(torch.equal(found[name], value) for name, value in straight[1].items())


def test_weights_alone_are_not_gone_on_from_in_silence():
    model, step, _, plan = made()
    optimizer = follow(sgd(model.parameters()), model, plan)
    trained(step, BATCH, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model.load_state_dict(saved[0])
    with pytest.raises(
        PlanError, match=r"was loaded in bfloat16, without the 8 extra bits.*\n  Allowed: the state_dict"
    ):
        trained(step, BATCH, optimizer, 1)
    with pytest.raises(PlanError, match=r"^widened_weights: 'first\.weight': a parameter of shape"):
        widened_weights(model, optimizer)
    assert all(parameter.dtype is torch.bfloat16 for parameter in model.parameters())
    optimizer.load_state_dict(saved[1])
    trained(step, BATCH, optimizer, 1)
    kept = widened_weights(model, optimizer)
    with pytest.raises(PlanError, match="values loaded would be rounded"):
        model.load_state_dict(kept)
    assert all(torch.equal(value, kept[name]) for name, value in widened_weights(model, optimizer).items())
    model.load_state_dict({name: value.float() for name, value in saved[0].items()})  # float32 says them all
    wide = widened_weights(model, optimizer)
    assert all(torch.equal(wide[name], value.float()) for name, value in saved[0].items())


def test_from_float32_to_24_bits_and_back():
    model, step, _, plan = made(adamw)
    torch.manual_seed(0)
    before = MLP().state_dict()
    optimizer = follow(adamw(model.parameters()), model, plan)
    wide = widened_weights(model, optimizer)
    for name, value in before.items():
        assert torch.equal(wide[name], parts(value)[2])
        assert not torch.equal(wide[name], value.to(torch.bfloat16).float())
    trained(step, BATCH, optimizer, 3)
    plain = MLP()
    plain.load_state_dict(widened_weights(model, optimizer))
    wider = torch.optim.AdamW(plain.parameters())
    wider.load_state_dict(assign.optim.widened_state_dict(optimizer))
    assert wider.state[plain.first.weight].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assign.apply(plain, plan, backend="eager")  # and to 24 bits again: nothing is lost
    again = follow(adamw(plain.parameters()), plain, plan)
    again.load_state_dict(wider.state_dict())
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for name, value in optimizer.state[mine].items():
            assert torch.equal(value, again.state[theirs][name])


def test_states_with_extra_bits_are_not_left_out_in_silence():
    model, step, _, plan = made()
    optimizer = follow(sgd(model.parameters()), model, plan)
    trained(step, BATCH, optimizer, 1)
    other, _, _, narrow = made(master="bf16", states="fp32")
    bf16 = follow(sgd(other.parameters()), other, narrow)
    with pytest.raises(
        PlanError, match=r"has extra bits of the master of 'first\.weight', which the plan stores as bf16"
    ):
        bf16.load_state_dict(optimizer.state_dict())
    bf16.load_state_dict(optimizer.state_dict(), lossy=True)
    assert all(EXTRA_BITS not in state for state in bf16.state.values())


def task():
    torch.manual_seed(0)
    return Task(
        model=MLP,
        loss=class_loss,
        train=[BATCH] * 4,
        optimizer=adamw,
        evaluate=lambda model: {"loss": float(class_loss(model, BATCH))},
        epochs=2,
        name="mlp",
    )


def test_a_training_resumes_and_the_next_goes_on_from_its_masters(tmp_path):
    plan, file = made(adamw)[3], tmp_path / "run.pt"
    whole = train(task(), plan)
    train(task(), plan, options=TrainOptions(checkpoint=file, max_steps=3))
    resumed = train(task(), plan, options=TrainOptions(checkpoint=file, resume=True))
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))
    assert resumed.losses == whole.losses
    assert resumed.fp32_metrics != resumed.metrics  # those of the masters
    plain = MLP()
    load_weights(file, plain, adamw(plain.parameters()))
    rounded = [parts(parameter.detach()) for parameter in plain.parameters()]
    assert all(
        torch.equal(narrow, mine) for (narrow, _, _), mine in zip(rounded, resumed.model.parameters(), strict=True)
    )
    assert all(
        torch.equal(wide, p) and not torch.equal(wide, narrow.float())
        for (narrow, _, wide), p in zip(rounded, plain.parameters(), strict=True)
    )
    train(task(), plan, options=TrainOptions(weights=file, max_steps=2))
    train(task(), options=TrainOptions(weights=file, max_steps=2))
    with pytest.raises(TaskError, match="and no optimizer was given"):
        load_weights(file, plain)


# ---- refusals


def test_another_rounding_is_refused():
    _, _, table, plan = made(adamw)
    says = r"update_rounding='kahan' was requested, but 'first\.weight\.master' is bf16\+8.*\n  Allowed: nearest"
    with pytest.raises(PlanError, match="^estimate: " + says):
        estimate(table, plan.with_update_rounding("kahan", where="estimate"))
    model = made(adamw)[0]
    with pytest.raises(PlanError, match="^optimizer: " + says):
        assign.optimizer(torch.optim.AdamW, model, plan, update_rounding="kahan")


def test_autocast_and_several_processes_are_refused(monkeypatch):
    model, step, _, plan = made()
    with pytest.raises(PlanError, match=r"stores 'first.weight.master' as bf16\+8"), assign.autocast(model, plan):
        pass
    monkeypatch.setattr(distributed, "is_several", lambda: True)
    with pytest.raises(PlanError, match="its extra bits are in the optimizer of one process"):
        step(BATCH)
    with pytest.raises(PlanError, match="its extra bits are in the optimizer of one process"):
        assign.apply(model, plan, backend="eager")


def test_only_a_master_that_is_trained_has_them():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    table = traced(model, BATCH)
    plan = everything(table, "fp32").replace(store(table, master="bf16+8"))
    planned_step(model, class_loss, plan, backend="eager")(BATCH).backward()
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 2 + [torch.bfloat16] * 2
    frozen = plan.replace({"0.weight.master": Entry("bf16+8", False)})
    with pytest.raises(
        PlanError, match=r"stores the master of '0\.weight' with extra bits.*\n  Allowed: fp32, bf16 or fp16"
    ):
        assign.apply(nn.Sequential(*copy.deepcopy(list(model))), frozen)
    for key in ("0.weight", "1.weight.grad.stored", "1.weight.optim.momentum_buffer"):
        with pytest.raises(PlanError, match=r"'bf16\+8'.*is allowed only for masters"):
            plan.replace({key: Entry("bf16+8", False)})


def test_a_model_that_is_bf16_already_begins_with_zeros_and_a_second_optimizer_does_not():
    model = MLP().to(torch.bfloat16)
    plan = made()[3]
    step = planned_step(model, class_loss, plan, backend="eager")
    first = follow(sgd(model.parameters()), model, plan)
    assert all(state[EXTRA_BITS].count_nonzero() == 0 for state in first.state.values())
    trained(step, BATCH, first, 2)
    wide = widened_weights(model, first)
    second = follow(sgd(model.parameters()), model, plan)
    assert all(torch.equal(value, wide[name]) for name, value in widened_weights(model, second).items())
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    with pytest.raises(PlanError, match="without the 8 extra bits"):
        trained(step, BATCH, second, 1)
