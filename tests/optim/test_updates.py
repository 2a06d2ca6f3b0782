"""Updates of 16-bit weights: what is lost, what is kept, and that a compiler changes nothing about it."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from assign.errors import FormatError
from assign.numerics.dispatch import use_compiled
from assign.optim.updates import SGD, AdamW, kahan_add
from assign.plan.persistent_state import COMPENSATION

# Inductor's own imports warn, once in a process
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")

LANES = 10_000
BOTH = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
ROUNDINGS = ["nearest", "stochastic", "kahan"]
OPTIMIZERS = {
    "sgd": lambda parameters, **k: SGD(parameters, lr=0.03, **k),
    "momentum": lambda parameters, **k: SGD(parameters, lr=0.03, momentum=0.9, dampening=0.1, weight_decay=0.01, **k),
    "nesterov": lambda parameters, **k: SGD(parameters, lr=0.03, momentum=0.9, weight_decay=0.01, nesterov=True, **k),
    "adamw": lambda parameters, **k: AdamW(parameters, lr=0.01, eps=1e-4, weight_decay=0.1, **k),
}


def step_of(optimizer, compiled):
    if not compiled:
        return optimizer.step
    torch.compiler.reset()
    return torch.compile(optimizer.step, fullgraph=True)


def weight(values, dtype=torch.bfloat16):
    return nn.Parameter(values.to(dtype))


def run(make, rounding, *, dtype=torch.bfloat16, steps=6, compiled=False, elements=300):
    torch.manual_seed(1)
    w = weight(torch.randn(elements), dtype)
    optimizer = make([w], rounding=rounding)
    step = step_of(optimizer, compiled)
    for number in range(steps):
        w.grad = torch.randn(elements, generator=torch.Generator().manual_seed(number)).to(dtype)
        step()
    return w, optimizer


def equal(ours, theirs):
    (w, optimizer), (other, other_optimizer) = ours, theirs
    states, others = optimizer.state[w], other_optimizer.state[other]
    return (
        torch.equal(w, other)
        and states.keys() == others.keys()
        and all(torch.equal(states[name], others[name]) for name in states)
    )


# ---- arXiv 2010.06192's effect, in its smallest form


@BOTH
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_thousand_updates_of_a_thousandth(rounding, compiled):
    """Half of the last bit of 1 is 2^-8 below 2: nearest stays, Kahan arrives; by chance, the mean arrives.

    A weight in [1, 2) has steps of 2^-7; an update of 1e-3 goes up with p = .128: after 1000, a deviation of
    2^-7 √(1000 p (1 − p)) = .0825. The mean of n lanes has the error .0825/√n, their deviation .0825/√(2n).
    """
    w = weight(torch.ones(LANES))
    w.grad = torch.full_like(w, -1)
    step = step_of(SGD([w], lr=1e-3, rounding=rounding), compiled)
    for _ in range(1000):
        step()
    if rounding == "stochastic":
        p = 1e-3 * 2**7
        deviation = 2**-7 * math.sqrt(1000 * p * (1 - p))
        assert abs(w.double().mean() - 2) < 5 * deviation / math.sqrt(LANES)
        assert abs(w.double().std() - deviation) < 5 * deviation / math.sqrt(2 * LANES) + 2e-3  # beyond 2: wider steps
    else:
        assert w.unique().tolist() == [{"nearest": 1.0, "kahan": 2.0}[rounding]]


@BOTH
def test_a_quarter_of_a_step_goes_up_once_in_four(compiled):
    w = weight(torch.ones(LANES))
    w.grad = torch.full_like(w, -1)
    step_of(SGD([w], lr=2**-9, rounding="stochastic"), compiled)()
    assert w.unique().tolist() == [1, 1 + 2**-7]
    error = math.sqrt(0.25 * 0.75 / LANES)
    assert abs((w > 1).double().mean() - 0.25) < 5 * error
    assert abs(w.double().mean() - (1 + 2**-9)) < 5 * error * 2**-7


@pytest.mark.parametrize("share", [2**-9, 2**-8])
def test_where_nearest_begins_to_lose(share):
    """Below 2^-9 of the weight every update vanishes, above 2^-8 none does."""
    w = weight(torch.linspace(1, 2, 129)[:-1])
    before = w.detach().clone()
    w.grad = -w.detach().clone()
    SGD([w], lr=share * (0.999 if share == 2**-9 else 1.001)).step()
    assert (w == before).all() if share == 2**-9 else (w > before).all()


# ---- the arithmetic


@pytest.mark.parametrize(("kind", "rounding"), [(k, r) for k in ("nesterov", "adamw") for r in ROUNDINGS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_compiled_is_eager_bit_for_bit(kind, rounding, dtype):
    make = OPTIMIZERS[kind]
    assert equal(run(make, rounding, dtype=dtype, compiled=True), run(make, rounding, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.75},
        {"momentum": 0.75, "dampening": 0.25, "weight_decay": 2**-6},
        {"momentum": 0.75, "weight_decay": 2**-6, "nesterov": True},
    ],
    ids=["plain", "momentum", "dampening", "nesterov"],
)
def test_nearest_is_torchs_sgd(options, dtype):
    """Bit for bit where products are exact: torch rounds alpha to 16 bits, and multiplies and adds in one operation."""
    lanes = {"dtype": dtype, "steps": 20, "elements": 512}  # whole vectors: torch treats the others in another way
    ours = run(lambda p, rounding: SGD(p, lr=2**-5, rounding=rounding, **options), "nearest", **lanes)
    theirs = run(lambda p, rounding: torch.optim.SGD(p, lr=2**-5, foreach=False, **options), "", **lanes)
    assert equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_nearest_is_torchs_adamw(dtype):
    """Its scalars are float64, its products fused: a float32 bit, which seldom is what a rounding turns on."""
    options = {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.5}
    ours, _ = run(lambda p, rounding: AdamW(p, rounding=rounding, **options), "nearest", dtype=dtype, elements=4000)
    theirs, _ = run(lambda p, rounding: torch.optim.AdamW(p, foreach=False, **options), "", dtype=dtype, elements=4000)
    assert (ours != theirs).double().mean() < 0.01
    step = torch.finfo(dtype).eps
    assert ((ours.double() - theirs.double()).abs() <= 6 * step * theirs.double().abs() + 1e-6).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
def test_float32_weights_take_the_plain_rule(kind, rounding):
    plain = {
        "nesterov": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, weight_decay=0.01, nesterov=True),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4, weight_decay=0.1),
    }[kind]
    values = torch.randn(300)
    w, narrow, theirs = weight(values, torch.float32), weight(values), weight(values, torch.float32)
    optimizer, reference = OPTIMIZERS[kind]([w, narrow], rounding=rounding), plain([theirs])
    for _ in range(6):
        w.grad = theirs.grad = torch.randn(300)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(w, theirs, rtol=1e-5, atol=1e-6)
    assert {state.dtype for state in optimizer.state[w].values()} == {torch.float32}
    assert COMPENSATION not in optimizer.state[w]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_kept_follows_float32(kind):
    """Small steps on large weights: nearest falls behind, the other two do not."""
    make, gap = OPTIMIZERS[kind], {}
    for rounding in ROUNDINGS:
        w, exact = weight(torch.full((2000,), 4.0)), weight(torch.full((2000,), 4.0), torch.float32)
        optimizer, reference = make([w], rounding=rounding), make([exact], rounding="nearest")
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 2e-4 if kind in ("momentum", "nesterov") else 2e-3
        for _ in range(200):
            w.grad = torch.rand(2000).bfloat16()
            exact.grad = w.grad.float()
            optimizer.step()
            reference.step()
        gap[rounding] = abs(w.double().mean() - exact.double().mean()).item()
    moved = 4 - exact.double().mean().item()
    assert gap["nearest"] > 0.3 * moved
    assert max(gap["stochastic"], gap["kahan"]) < 0.03 * moved


bf16 = st.floats(width=16, min_value=-1000, max_value=1000).map(lambda x: torch.tensor(x).bfloat16().float())


@given(w=bf16, y=bf16)
def test_kahan_keeps_all_that_is_lost(w, y):
    """With |w| >= |y|, sum and rest together are w + y exactly (Dekker, 1971)."""
    if w.abs() < y.abs():
        w, y = y, w
    total, rest = kahan_add(w, y, torch.zeros(()), torch.bfloat16)
    assert total == (w + y).bfloat16().float()
    assert total.double() - rest.double() == w.double() + y.double()


# ---- an optimizer like any other


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
def test_a_resumed_run_goes_on_bit_for_bit(kind, rounding):
    make = OPTIMIZERS[kind]

    def some_steps(w, optimizer, numbers):
        for number in numbers:
            w.grad = torch.randn(300, generator=torch.Generator().manual_seed(number)).to(w.dtype)
            optimizer.step()

    w = weight(torch.randn(300))
    optimizer = make([w], rounding=rounding)
    some_steps(w, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"w": w.detach(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, file)
    some_steps(w, optimizer, range(4, 9))
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = nn.Parameter(saved["w"])
    resumed = make([again], rounding=rounding)
    resumed.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    some_steps(again, resumed, range(4, 9))
    assert equal((w, optimizer), (again, resumed))


def test_the_generator_says_which_way():
    runs = [run(OPTIMIZERS["sgd"], "stochastic") for _ in range(2)]
    assert equal(*runs)
    torch.manual_seed(7)
    w = weight(torch.ones(1000))
    optimizer, seen = SGD([w], lr=2**-9, rounding="stochastic"), []
    for _ in range(2):
        w.data.fill_(1)
        w.grad = torch.full_like(w, -1)
        optimizer.step()
        seen.append(w.detach().clone())
    assert not torch.equal(*seen)


def test_large_weights_round_the_same_way_compiled_inside_or_not():
    results = []
    for choice in (True, False):
        with use_compiled(choice):
            results.append(run(OPTIMIZERS["sgd"], "stochastic", steps=1, elements=2**15))
    assert equal(*results)


def test_groups_closure_and_a_rate_that_is_a_tensor():
    first, second = weight(torch.ones(64)), weight(torch.ones(64))
    rate = torch.tensor(1e-3)
    optimizer = SGD([{"params": [first], "rounding": "kahan"}, {"params": [second]}], lr=rate, rounding="nearest")
    step = step_of(optimizer, compiled=True)
    for value, expected in ((1e-3, 1.0), (0.25, 1.25)):
        rate.fill_(value)
        for w in (first, second):
            w.grad = torch.full_like(w, -1)
        step()
        assert second.unique().tolist() == [expected]
    assert optimizer.state[first][COMPENSATION].unique().item() != 0
    assert not optimizer.state[second]

    def closure():
        optimizer.zero_grad()
        loss = first.float().square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0


def test_states_of_torchs_own_optimizer_are_taken_over():
    theirs, optimizer = run(lambda p, rounding: torch.optim.AdamW(p, lr=0.01), "", dtype=torch.float32)
    w = weight(theirs.detach())
    ours = AdamW([w], rounding="kahan")
    ours.load_state_dict(optimizer.state_dict())
    assert ours.param_groups[0]["rounding"] == "kahan"
    assert ours.param_groups[0]["lr"] == 0.01
    assert torch.equal(ours.state[w]["exp_avg"], optimizer.state[theirs]["exp_avg"].bfloat16())
    assert ours.state[w]["step"] == 6
    w.grad = torch.ones_like(w)
    ours.step()
    assert COMPENSATION in ours.state[w]


def test_a_copy_keeps_its_rounding():
    twin = copy.deepcopy(run(OPTIMIZERS["adamw"], "kahan")[1])
    _, optimizer = run(lambda p, rounding: torch.optim.AdamW(p), "", dtype=torch.float32)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.param_groups[0]["rounding"] == "kahan"
    with pytest.raises(ValueError, match="parameter group"):
        twin.load_state_dict({**optimizer.state_dict(), "param_groups": [{"params": [0]}, {"params": [1]}]})


def sparse():
    layer = nn.Embedding(4, 2, sparse=True).bfloat16()
    layer(torch.tensor([1])).sum().backward()
    SGD(layer.parameters()).step()


def from_kahan_to_nearest():
    w = weight(torch.ones(3))
    SGD([w]).load_state_dict(SGD([w], rounding="kahan").state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: SGD([weight(torch.ones(3))], rounding="khan"),
            "'khan' is not a way to round a weight update, did you mean 'kahan'?\n"
            "  Allowed: nearest, stochastic, kahan.\n  Choose one of these.",
        ),
        (
            lambda: SGD([{"params": [weight(torch.ones(3))], "rounding": "up"}]),
            "'up' is not a way to round a weight update.\n"
            "  Allowed: nearest, stochastic, kahan.\n  Choose one of these.",
        ),
        (
            lambda: AdamW([weight(torch.ones(3, 2), torch.float8_e4m3fn)]),
            "AdamW: a parameter of shape [3, 2] is float8_e4m3fn.\n"
            "  Allowed: bfloat16, float16; float32, which is updated by the plain rule.\n"
            "  Leave such parameters out of the optimizer, or convert them.",
        ),
        (
            lambda: SGD([weight(torch.ones(3), torch.float32)], rounding="kahan"),
            "SGD: rounding='kahan', but no parameter is stored in 16 bits.\n"
            "  Allowed: bfloat16, float16; float32, which is updated by the plain rule.\n"
            "  Convert the model first, model.to(torch.bfloat16), or use torch.optim.",
        ),
        (
            sparse,
            "SGD: the gradient of a parameter of shape [4, 2] is sparse.\n"
            "  Allowed: dense gradients.\n  Make the layer with sparse=False.",
        ),
        (
            from_kahan_to_nearest,
            "SGD: the saved state was made with rounding='kahan', this optimizer has rounding='nearest'.\n"
            "  Allowed: the same, or the state of a torch.optim optimizer.\n"
            "  Make the optimizer with that rounding, or start with new states.",
        ),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(FormatError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "call",
    [
        lambda w: SGD(w, lr=-1.0),
        lambda w: SGD(w, nesterov=True),
        lambda w: AdamW(w, betas=(0.9, 1.0)),
        lambda w: AdamW(w, eps=-1e-8),
    ],
)
def test_numbers_that_torch_refuses_are_refused(call):
    with pytest.raises(ValueError, match=r"must|needs"):
        call([weight(torch.ones(3))])
