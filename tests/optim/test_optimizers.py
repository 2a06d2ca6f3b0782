"""Optimizers whose states follow a plan: their bytes, their arithmetic beside torch's, their checkpoints, refusals."""

import copy

import pytest
import torch
from helpers import everything, traced
from torch import nn

import assign
from assign import _torch
from assign.errors import PlanError
from assign.executor.apply import apply
from assign.numerics.rounding import stream_of
from assign.optim import optimizers, updates, widening
from assign.optim.updates import kahan_add
from assign.plan.keys import state_key
from assign.plan.persistent_state import resident
from assign.plan.plan import Entry
from assign.plan.recipes import store


class Wide(nn.Module):
    """One weight large enough for blocks, one bias that is not."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 128)

    def forward(self, x):
        return self.fc(x)


def square(model, batch):
    return (model(batch) - 1).square().mean()


ADAMW = (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1})
SGD = (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.01})
BATCH = torch.linspace(-1, 1, 32 * 64).view(32, 64)


@pytest.fixture(autouse=True)
def _uncompiled():
    with torch.compiler.set_stance("force_eager"):  # torchao would compile its step for seconds
        yield


def made(kind, *, library=None, update_rounding="nearest", entries=(), **formats):
    """A model and an optimizer under a plan that stores ``formats`` and ``entries``; and the table, and the plan."""
    torch.manual_seed(0)
    model = Wide()
    cls, options = kind
    with torch.compiler.set_stance("default"):
        table = traced(model, BATCH, square, optimizer=lambda parameters: cls(parameters, **options))
    plan = everything(table, "fp32").replace(store(table, **formats) | dict(entries))
    apply(model, plan, backend="eager")
    how = {"library": library, "update_rounding": update_rounding}
    return model, assign.optimizer(cls, model, plan, **how, **options), table, plan


def train(model, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        square(lambda x: nn.functional.linear(x, *(p.float() for p in model.parameters())), BATCH).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def state_bytes(optimizer):
    """Of every distinct storage, without counts of steps and the tables of codes, which all states share."""
    tensors = [v for s in optimizer.state.values() for n, v in s.items() if isinstance(v, torch.Tensor) and n != "step"]
    inner = {t.untyped_storage().data_ptr(): t for tensor in tensors for t in _torch.inner_tensors(tensor)}
    return sum(t.untyped_storage().nbytes() for t in inner.values() if t.shape not in ((256,), (16,)))


KEPT = {  # bytes per element of the weight, all its states and scales
    "torchao dynamic8": (ADAMW, {"states": "dynamic8"}, None, 2 + 2 * 4 / 256),
    "torchao dynamic4": (ADAMW, {"states": "dynamic4"}, None, 1 + 2 * 4 / 128),
    "torchao fp8": (ADAMW, {"states": "e4m3:block256"}, None, 2 + 2 * 4 / 256),
    "torchao bf16": (ADAMW, {"states": "bf16"}, None, 4),
    "torchao bf16 gradients": (ADAMW, {"gradients": "bf16"}, None, 8),
    "torchao dynamic8 on bf16": (ADAMW, {"states": "dynamic8", "master": "bf16"}, None, 2 + 2 * 4 / 256),
    "bitsandbytes AdamW": (ADAMW, {"states": "dynamic8"}, "bitsandbytes", 2 + 2 * 4 / 256),
    "bitsandbytes SGD": (SGD, {"states": "dynamic8"}, None, 1 + 4 / 256),
    "torch SGD bf16": (SGD, {"states": "bf16"}, None, 2),
    "torch SGD bf16 gradients": (SGD, {"gradients": "bf16"}, None, 4),
    "torch AdamW bf16": (ADAMW, {"master": "bf16"}, None, 4),
    "torch AdamW": (ADAMW, {}, None, 8),
}


@pytest.mark.parametrize("name", KEPT)
def test_states_have_the_bytes_that_are_predicted(name):
    kind, formats, library, per_element = KEPT[name]
    model, optimizer, table, plan = made(kind, library=library, **formats)
    train(model, optimizer, steps=2)
    small = 128 * (2 if "master" in formats else 4) * len(optimizer.assign_stored[model.fc.bias].states)
    if name == "torch SGD bf16":
        small //= 2  # no block, so that the bias is bf16 too
    if name == "torchao bf16":
        small //= 2
    assert state_bytes(optimizer) == per_element * 64 * 128 + small
    assert resident(table, plan.entries).states == state_bytes(optimizer)


@pytest.mark.parametrize("name", KEPT)
def test_it_trains_like_torch_in_float32(name):
    kind, formats, library, _ = KEPT[name]
    model, optimizer, _, _ = made(kind, library=library, **formats)
    plain = Wide()
    with torch.no_grad():
        for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    cls, options = kind
    before = [p.detach().clone() for p in plain.parameters()]
    wanted, found = train(plain, cls(plain.parameters(), **options)), train(model, optimizer)
    for start, mine, theirs in zip(before, found, wanted, strict=True):
        if formats:
            assert (mine.float() - theirs).norm() < 0.25 * (theirs - start).norm()
        else:
            assert torch.equal(mine, theirs)


def test_states_of_one_parameter_may_differ():
    entries = {"fc.weight.optim.exp_avg": Entry("dynamic8", False), "fc.weight.optim.exp_avg_sq": Entry("bf16", False)}
    model, optimizer, table, plan = made(ADAMW, entries=entries)
    train(model, optimizer, steps=2)
    states = optimizer.state[model.fc.weight]
    assert (type(states["exp_avg"]).__name__, states["exp_avg_sq"].dtype) == ("OptimState8bit", torch.bfloat16)
    assert {s.dtype for s in optimizer.state[model.fc.bias].values()} == {torch.float32}
    assert resident(table, plan.entries).states == state_bytes(optimizer)


@pytest.mark.parametrize(("format_name", "decays"), [("bf16", False), ("dynamic8", True), ("e4m3:block256", True)])
def test_a_second_moment_in_bf16_does_not_decay(format_name, decays):
    model, optimizer, _, _ = made(ADAMW, states=format_name)
    moments = []
    for gradient in (1.0, *[0.0] * 50):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        moments.append(assign.optim.widened_state_dict(optimizer)["state"][0]["exp_avg_sq"].mean().item())
    assert moments[-1] == pytest.approx(moments[0] * (0.999**50 if decays else 1), rel=1e-3)


def test_groups_and_options_stay():
    model, _, _, plan = made(ADAMW, states="dynamic8")
    groups = [{"params": [model.fc.weight], "lr": 0.5}, {"params": [model.fc.bias], "weight_decay": 0.0}]
    optimizer = assign.optimizer(torch.optim.AdamW, model, plan, params=groups, lr=0.25, betas=(0.5, 0.75))
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.75)}
    torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


# ---- updates of 16-bit masters


@pytest.mark.parametrize("kind", [SGD, ADAMW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_updates_are_rounded_as_asked(kind, rounding):
    cls, options = kind
    model, optimizer, _, _ = made(kind, master="bf16", update_rounding=rounding)
    twin = copy.deepcopy(model)
    own = getattr(updates, cls.__name__)(twin.parameters(), rounding=rounding, **options)
    nearest, plain, _, _ = made(kind, master="bf16")
    trained = []
    for each, chosen in ((model, optimizer), (twin, own), (nearest, plain)):
        torch.manual_seed(1)
        trained.append(train(each, chosen))
    assert all(map(torch.equal, trained[0], trained[1]))
    assert not all(map(torch.equal, trained[0], trained[2]))


def test_what_kahan_keeps_is_in_the_checkpoint():
    model, optimizer, _, _ = made(SGD, master="bf16", update_rounding="kahan")
    train(model, optimizer, steps=3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    straight = train(model, optimizer, steps=3)
    other, fresh, _, _ = made(SGD, master="bf16", update_rounding="kahan")
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    assert all(map(torch.equal, train(other, fresh, steps=3), straight))


NARROW = {
    "torchao dynamic8": (ADAMW, {"states": "dynamic8"}),
    "torchao dynamic4": (ADAMW, {"states": "dynamic4"}),
    "torchao fp8": (ADAMW, {"states": "e4m3:block256"}),
    "torchao bf16, Adam": ((torch.optim.Adam, {"lr": 1e-3}), {"states": "bf16"}),
    "bitsandbytes dynamic8": (ADAMW, {"states": "dynamic8", "library": "bitsandbytes"}),
    "bitsandbytes SGD": (SGD, {"states": "dynamic8"}),
}
"""States in other formats than their bf16 masters."""


def with_states_of_the_bias(name, kind, formats):
    """In one format whatever the masters: it is too small for blocks, and keeps the format of its master."""
    states = ("momentum_buffer",) if kind is SGD else ("exp_avg", "exp_avg_sq")
    entry = Entry("fp32" if name.startswith("bitsandbytes") else "bf16", low=False)
    return {**formats, "entries": {state_key("fc.bias", state): entry for state in states}}


def step_by_hand(kind, formats, rounding, steps):
    """The same library's optimizer on float32 masters, which are rounded here after each step."""
    model, optimizer, _, _ = made(kind, **formats)
    seeds = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    rest = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for _ in range(steps):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.zero_grad()
        square(lambda x: nn.functional.linear(x, *model.parameters()), BATCH).backward()
        for parameter in model.parameters():
            parameter.grad.copy_(parameter.grad.bfloat16())
        optimizer.step()
        seed = torch.randint(-(2**63), 2**63 - 1, (), generator=seeds)
        for name, parameter in model.named_parameters():
            wide, start = parameter.data.clone(), before[name]
            if rounding == "stochastic":
                args = ("bf16:sr", False, torch.float32, seed, stream_of(name))
                parameter.data.copy_(torch.ops.assign.quantize(wide, None, *args))
            else:
                after, rest[name] = kahan_add(start, wide - start, rest[name], torch.bfloat16)
                parameter.data.copy_(after)
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("name", NARROW)
def test_updates_are_rounded_beside_states_in_other_formats(name, rounding, monkeypatch):
    """Bit for bit what the library computes on float32 masters that are rounded after each step."""
    kind, formats = NARROW[name]
    formats = with_states_of_the_bias(name, kind, formats)
    seeds = torch.Generator().manual_seed(5)
    monkeypatch.setattr(widening, "draw_seed", lambda _: torch.randint(-(2**63), 2**63 - 1, (), generator=seeds))
    model, optimizer, _, _ = made(kind, master="bf16", update_rounding=rounding, **formats)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    trained = train(model, optimizer, steps=4)
    by_hand = step_by_hand(kind, formats, rounding, steps=4)
    assert all(map(torch.equal, [each.float() for each in trained], by_hand))
    nearest, plain, _, _ = made(kind, master="bf16", **formats)
    assert not all(map(torch.equal, trained, train(nearest, plain, steps=4)))


def test_stochastic_updates_arrive_in_the_mean_where_nearest_ones_are_lost():
    """An update of a sixteenth of half a unit in the last place of 1: nearest stays, by chance the mean moves."""
    kind, formats = (torch.optim.AdamW, {"lr": 2**-12, "weight_decay": 0.0, "eps": 0.0}), {"states": "dynamic8"}
    moved = {}
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(1)
        model, optimizer, _, _ = made(kind, master="bf16", update_rounding=rounding, **formats)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved[rounding] = 1 - float(model.fc.weight.detach().float().mean())
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(2**-12, rel=0.1)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_rounded_updates_go_on_from_a_checkpoint_bit_for_bit(rounding, tmp_path):
    formats = {"master": "bf16", "states": "dynamic8", "update_rounding": rounding}
    model, optimizer, _, _ = made(ADAMW, **formats)
    train(model, optimizer, steps=3)
    torch.save((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()), tmp_path / "saved.pt")
    straight = train(model, optimizer, steps=3)
    saved = torch.load(tmp_path / "saved.pt", weights_only=False)
    other, fresh, _, _ = made(ADAMW, **formats)
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    assert all(map(torch.equal, train(other, fresh, steps=3), straight))
    _, nearest, _, _ = made(ADAMW, **{**formats, "update_rounding": "nearest"})
    if rounding == "kahan":
        with pytest.raises(PlanError, match="has Kahan's compensation of 'fc"):
            nearest.load_state_dict(saved[1])
    nearest.load_state_dict(saved[1], lossy=True)


def test_an_error_in_the_middle_of_a_step_leaves_the_master_as_it_was(monkeypatch):
    model, optimizer, _, _ = made(ADAMW, master="bf16", states="dynamic8", update_rounding="stochastic")
    train(model, optimizer, steps=1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    monkeypatch.setattr(widening, "_round_back", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(model, optimizer, steps=1)
    assert all(map(torch.equal, before, model.parameters()))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# ---- checkpoints


@pytest.mark.parametrize("name", KEPT)
def test_goes_on_from_its_own_checkpoint_bit_for_bit(name, tmp_path):
    kind, formats, library, _ = KEPT[name]
    model, optimizer, _, _ = made(kind, library=library, **formats)
    train(model, optimizer, steps=3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "file")
    straight = train(model, optimizer, steps=3)
    other, fresh, _, _ = made(kind, library=library, **formats)
    saved = torch.load(tmp_path / "file", weights_only=True)
    other.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    assert [s.dtype for s in other.state_dict().values()] == [s.dtype for s in model.state_dict().values()]
    assert state_bytes(fresh) == state_bytes(optimizer)
    assert all(map(torch.equal, train(other, fresh, steps=3), straight))


@pytest.mark.parametrize("name", KEPT)
def test_widens_into_torchs_own_optimizer_and_back(name):
    kind, formats, library, _ = KEPT[name]
    model, optimizer, _, _ = made(kind, library=library, **formats)
    train(model, optimizer, steps=3)
    wide = assign.optim.widened_state_dict(optimizer)
    plain = Wide()
    cls, options = kind
    theirs = cls(plain.parameters(), **options)
    theirs.load_state_dict(copy.deepcopy(wide))
    assert {v.dtype for s in theirs.state.values() for v in s.values()} == {torch.float32}
    train(plain, theirs, steps=1)
    _, float32, _, _ = made((cls, options | {"lr": 7.0, "weight_decay": 0.5}))
    float32.load_state_dict(optimizer.state_dict())  # of another library, in other formats: nothing is lost
    for option, value in options.items():
        assert theirs.param_groups[0][option] == float32.param_groups[0][option] == pytest.approx(value)
    again = float32.state_dict()["state"]
    for number, state in wide["state"].items():
        for key, value in state.items():
            assert torch.equal(again[number][key], value), (number, key)


def test_the_plan_says_how_updates_are_rounded():
    model, _, _, plan = made(ADAMW, master="bf16")
    kahan = plan.with_update_rounding("kahan")
    own = assign.optimizer(ADAMW[0], model, kahan, **ADAMW[1])
    assert isinstance(own, assign.optim.AdamW)
    assert own.param_groups[0]["rounding"] == "kahan"
    assert not isinstance(assign.optimizer(ADAMW[0], model, kahan, update_rounding="nearest", **ADAMW[1]), type(own))


def test_a_state_of_another_shape_is_refused():
    model, plain, _, _ = made(ADAMW)
    train(model, plain, steps=1)
    saved = plain.state_dict()
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"][:1]
    for library in ("torch", "torchao", "bitsandbytes"):
        _, narrow, _, _ = made(ADAMW, states="fp32" if library == "torch" else "dynamic8", library=library)
        with pytest.raises(PlanError, match=r"exp_avg' is loaded with the shape \("):
            narrow.load_state_dict(saved, lossy=True)


def test_what_would_be_rounded_is_refused_unless_asked_for():
    model, plain, _, _ = made(ADAMW)
    train(model, plain, steps=3)
    saved = plain.state_dict()
    for library in ("torchao", "bitsandbytes"):
        _, narrow, _, _ = made(ADAMW, states="dynamic8", library=library)
        before = copy.deepcopy(assign.optim.widened_state_dict(narrow)["state"])
        with pytest.raises(PlanError, match=r"'fc\.weight\.optim\.exp_avg' would be rounded in \d+ of its 8192"):
            narrow.load_state_dict(saved)
        for number, state in assign.optim.widened_state_dict(narrow)["state"].items():
            assert all(torch.equal(value, before[number][key]) for key, value in state.items())
        narrow.load_state_dict(saved, lossy=True)
        for number, state in assign.optim.widened_state_dict(narrow)["state"].items():
            for key, value in state.items():
                wanted = saved["state"][number][key]
                assert (value - wanted).norm() <= 0.05 * wanted.norm()
                assert number == 0 or torch.equal(value, wanted)


def test_a_checkpoint_without_the_plans_states_is_refused():
    _, narrow, _, _ = made(ADAMW, states="dynamic8")
    model, sgd, _, _ = made(SGD)
    train(model, sgd, steps=1)
    with pytest.raises(PlanError, match=r"stores 'fc\.weight\.optim\.exp_avg' as dynamic8, but .* has momentum_buffer"):
        narrow.load_state_dict(sgd.state_dict())
    _, float32, _, _ = made(ADAMW)
    with pytest.raises(PlanError, match=r"stores 'fc\.weight\.optim\.exp_avg' as fp32, but .* has momentum_buffer"):
        float32.load_state_dict(sgd.state_dict())
    _, unused, _, _ = made(ADAMW)
    with pytest.raises(PlanError, match="has no states for it"):
        narrow.load_state_dict(unused.state_dict())
    with pytest.raises(PlanError, match=r"groups of \[1\] parameters are loaded, this optimizer has \[2\]"):
        narrow.load_state_dict(torch.optim.AdamW([model.fc.weight]).state_dict())


def test_a_narrow_model_refuses_values_that_it_would_round():
    model, _, _, plan = made(ADAMW, master="bf16")
    exact = {name: value.float() for name, value in model.state_dict().items()}
    exact["fc.bias"][0] = torch.nan
    model.load_state_dict(exact)
    fresh = Wide()
    with pytest.raises(PlanError, match=r"'fc\.weight' is stored in bfloat16 here, in which \d+ of the 8192 values"):
        model.load_state_dict(fresh.state_dict())
    apply(fresh, plan, backend="eager")
    model.load_state_dict(fresh.state_dict())
    Wide().load_state_dict(model.state_dict())


# ---- refusals


@pytest.mark.parametrize(
    ("kind", "formats", "says"),
    [
        ((torch.optim.RMSprop, {"lr": 0.1}), {"states": "bf16"}, "no library has an optimizer RMSprop"),
        (SGD, {"states": "dynamic4"}, "keeps SGD's states as fp32, bf16, fp16"),
        ((torch.optim.SGD, SGD[1] | {"nesterov": True}), {"states": "dynamic8"}, "whose SGD has no nesterov"),
        ((torch.optim.AdamW, {"maximize": True}), {"states": "dynamic8"}, "whose AdamW has no maximize"),
        (
            ADAMW,
            {"entries": {"fc.bias.optim.exp_avg": Entry("dynamic8", False)}},
            "has 128 elements: it takes at least",
        ),
        (
            ADAMW,
            {"entries": {"fc.bias.optim.exp": Entry("bf16", False)}},
            "keeps exp_avg, exp_avg_sq (nearest: 'exp_avg'",
        ),
        (ADAMW, {"states": "dynamic8", "library": "numpy"}, "there is no library 'numpy'; choose from torch, torchao"),
        (ADAMW, {"states": "dynamic4", "library": "bitsandbytes"}, "or all as dynamic8"),
        (
            (torch.optim.RMSprop, {"lr": 0.1}),
            {"master": "bf16", "update_rounding": "kahan"},
            "with Kahan's sum.\n  Allowed: SGD, Adam, AdamW",
        ),
    ],
)
def test_what_cannot_be_kept_says_why(kind, formats, says):
    with pytest.raises(PlanError) as caught:
        made(kind, **formats)
    assert says in str(caught.value)


def test_a_missing_library_says_what_to_install(monkeypatch):
    there = optimizers.importlib.util.find_spec
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None if name == "torchao" else there(name))
    _, optimizer, _, _ = made(ADAMW, states="dynamic8")  # bitsandbytes can
    assert "bitsandbytes" in type(optimizer).__module__
    with pytest.raises(
        PlanError, match=r"need torchao, which is not installed. Run: pip install 'precision-assign\[opt"
    ):
        made(ADAMW, states="dynamic4")


def test_parameters_must_have_the_plans_dtypes_and_states_their_parameters():
    model, _, _, plan = made(ADAMW, gradients="bf16")
    with pytest.raises(PlanError, match=r"gradient torch.float32. Call assign.apply\(model, plan\) first"):
        assign.optimizer(torch.optim.AdamW, Wide(), plan)
    model, _, _, plan = made(ADAMW, states="bf16")
    with pytest.raises(PlanError, match=r"stores states of 'fc\.weight', which the optimizer was not given"):
        assign.optimizer(torch.optim.AdamW, model, plan, params=[model.fc.bias])


def test_autocast_refuses_what_would_outlast_it():
    model, _, _, plan = made(ADAMW, gradients="bf16")
    with pytest.raises(PlanError, match=r"Use assign\.apply"), assign.autocast(model, plan):
        pass
