"""Stochastic rounding: onto neighbours, unbiased, and the same way again wherever and in whatever pieces it runs."""

import copy
import math

import numpy as np
import oracle
import pytest
import torch
from helpers import everything, sgd, steps, traced
from models import MLP, MODELS, ResNet, class_loss, images, vectors
from torch import library, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from assign import _torch
from assign.errors import FormatError
from assign.executor.apply import apply, planned_step
from assign.formats.parsing import parse_format
from assign.numerics.dispatch import use_compiled
from assign.numerics.kernels import random_bits
from assign.numerics.promotion import Promotion
from assign.numerics.rounding import amax_scale, decode, draw_seed, encode, key_of, quantize
from assign.plan.plan import Assignment, Entry

# Inductor's own imports warn, once in a process
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")

LISTED = [
    "bf16",
    "fp16",
    "e4m3",
    "e5m2",
    "fp(4,3,4)",
    "fp(6,9,0)",
    "fp(2,1,0)",
    "fp(3,0,-2)",
    "fp(8,2,0)",
    "fp(7,3,-63)",
]
WIDE = ["fp(8,22,0)", "fp(7,22,63)", "fp(7,22,-63)", "fp(2,1,-125)"]
QUANTIZE = torch.ops.assign.quantize.default


def seed(number):
    return torch.tensor(number)


def random_float32(elements):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31, (elements,), generator=generator).to(torch.int32).view(torch.float32)


def same_bits(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("saturate", [True, False], ids=["saturate", "overflow"])
def test_values_on_the_grid_never_move(name, saturate):
    grid = torch.from_numpy(oracle.magnitudes(name)).float()
    x = torch.cat([grid, -grid])
    for number in range(5):
        assert same_bits(quantize(x, f"{name}:sr", saturate=saturate, seed=seed(number)), x)
        top = parse_format(name).max_value if saturate else math.inf
        beyond = torch.tensor([math.inf, -math.inf, math.nan, -0.0, max(oracle.beyond(name), 0.0)])
        result = quantize(beyond, f"{name}:sr", saturate=saturate, seed=seed(number))
        assert result[:2].tolist() == [top, -top]
        assert result[2].isnan()
        assert math.copysign(1, result[3]) == -1
        assert result[3:].tolist() == [0, top]


@pytest.mark.parametrize("name", LISTED)
def test_every_value_goes_to_a_neighbour(name):
    x = random_float32(2**17)
    x = torch.cat([x[x.isfinite()], torch.randn(2**15), torch.randn(2**15) * parse_format(name).min_normal])
    result = quantize(x, f"{name}:sr", saturate=False, seed=seed(1)).double().numpy()
    grid = np.append(oracle.magnitudes(name), np.inf)
    magnitude = np.abs(x.double().numpy())
    below = np.searchsorted(grid, magnitude, side="right") - 1
    above = np.searchsorted(grid, magnitude, side="left")
    below[magnitude >= oracle.beyond(name)] += 1
    assert ((np.abs(result) == grid[below]) | (np.abs(result) == grid[above])).all()
    assert (np.signbit(result) == np.signbit(x.numpy())).all()
    went_down = (np.abs(result) < magnitude).sum()
    assert 0 < went_down < len(x)


@pytest.mark.parametrize("name", WIDE)
def test_formats_too_wide_to_list(name):
    """Both neighbours and the values on the grid, from rounding to nearest: |error| < one step."""
    fmt = parse_format(name)
    x = torch.cat([random_float32(2**14), torch.randn(2**12), torch.randn(2**12) * fmt.min_normal])
    x = x[x.abs() < fmt.max_value]
    nearest, result = (quantize(x, each, seed=seed(2)).double() for each in (name, f"{name}:sr"))
    exponent = torch.frexp(x.double()).exponent - 1
    step = 2.0 ** (exponent.clamp(min=fmt.min_exponent).double() - fmt.mantissa_bits)
    assert ((result - x.double()).abs() < step).all()
    assert same_bits(quantize(result.float(), name), result.float())
    exact = nearest == x.double()
    assert torch.equal(result[exact], x.double()[exact])


# ---- unbiased

CASES = [
    (name, value)
    for name in ("bf16", "fp16", "e4m3", "fp(4,3,4)", "fp(6,9,0)", "fp(7,3,-63)")
    for value in (
        1.37 * parse_format(name).min_normal,
        -2.71828 * parse_format(name).min_normal,
        0.03 * parse_format(name).min_subnormal,
        -0.71 * parse_format(name).min_subnormal,
        2.6 * parse_format(name).min_subnormal,
    )
] + [("e4m3", 1.01), ("e5m2", -100.0), ("bf16", 1 + 2**-13), ("fp(8,2,0)", 3e-39), ("fp(2,1,0)", 0.9)]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_the_mean_is_the_value(name, value):
    """Of n roundings, each a step or none above the lower neighbour: standard error step · √(p(1−p)/n)."""
    count = 2**17
    x = torch.full((count,), value)
    result = quantize(x, f"{name}:sr", seed=seed(3), dtype=torch.float32).double()
    low, high = result.min(), result.max()
    assert low < x[0].double() < high
    share = (x[0].double() - low) / (high - low)
    error = (high - low) * (share * (1 - share) / count).sqrt()
    assert (result.mean() - x[0].double()).abs() < 5 * error
    assert len(result.unique()) == 2


@pytest.mark.parametrize("exponent", [-120, 0, 100])
def test_the_mean_under_a_scale(exponent):
    x = torch.full((2**17,), 0.5183 * 2.0**exponent)
    x[0] = 300 * 2.0**exponent
    scale = amax_scale(x, "e4m3:pow2:sr")
    assert scale == amax_scale(x, "e4m3:pow2") == 2.0**exponent
    result = quantize(x, "e4m3:pow2:sr", seed=seed(4))[1:].double() / 2.0**exponent
    assert result.unique().tolist() == [0.5, 0.5625]
    share = (0.5183 - 0.5) / 0.0625
    assert abs((result.mean() - 0.5183) / 0.0625) < 5 * math.sqrt(share * (1 - share) / len(result))


def test_between_the_largest_value_and_the_next_a_share_overflows():
    x = torch.full((2**17,), 456.0)  # a quarter of the way from 448 to 480
    result = quantize(x, "e4m3:sr", saturate=False, seed=seed(5))
    assert set(result.unique().tolist()) == {448.0, math.inf}
    assert abs(result.isinf().double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(x))
    assert quantize(x, "e4m3:sr", seed=seed(5)).unique().tolist() == [448.0]


def test_bits_of_neighbours_streams_and_seeds_are_unrelated():
    """Correlations of fair bits have the standard error 1/√n; 5 of them, over 31 · 7 correlations."""
    count = 2**16

    def signs(number, stream=0, first=0):
        bits = random_bits(count, key_of(seed(number), stream), first)
        return ((bits[:, None] >> torch.arange(31)) & 1).float() * 2 - 1

    one = signs(12345)
    for shift in (1, 2, 256):
        assert torch.equal(signs(12345, first=shift)[:-shift], one[shift:])
    others = [signs(12346), signs(12345 + 2**32), signs(12345, stream=1), signs(12345, first=2**32)]
    others += [signs(12345, first=shift) for shift in (1, 2, 256)]
    assert one.mean(0).abs().max() < 5 / math.sqrt(count)
    for other in others:
        assert (one * other).mean(0).abs().max() < 5 / math.sqrt(count)


# ---- the same again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bf16", "e4m3", "fp(4,3,4)", "fp(6,9,0)", "e5m2:pow2", "fp(7,3,-63)"])
def test_compiled_and_op_by_op_agree(name, dtype):
    x = torch.cat([random_float32(2**16), torch.randn(2**16)])  # two pieces op by op
    x = x[x.abs() < 1e30] if ":" in name else x
    results = []
    for compiled in (True, False):
        with use_compiled(compiled):
            results.append(quantize(x.to(dtype), f"{name}:sr", seed=seed(6), saturate=False, dtype=torch.float32))
    nan = results[1].isnan()
    assert torch.equal(results[0].isnan(), nan)
    assert same_bits(results[0][~nan], results[1][~nan])


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "op-by-op"])
def test_the_layout_does_not_matter(compiled):
    x = torch.randn(4, 6, 8, 90)
    last = x.contiguous(memory_format=torch.channels_last)
    with use_compiled(compiled):
        expected = quantize(x, "e4m3:sr", seed=seed(7))
        result = quantize(last, "e4m3:sr", seed=seed(7))
    assert torch.equal(result, expected)
    assert result.stride() == last.stride()
    assert quantize(x[:0], "e4m3:sr").shape == (0, 6, 8, 90)


def test_torchs_generator_says_the_seed():
    x = torch.randn(1000)
    results = []
    for number in (0, 0, 1):
        torch.manual_seed(number)
        results.append(quantize(x, "e4m3:sr"))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(quantize(x, "e4m3:sr"), quantize(x, "e4m3:sr"))
    before = torch.get_rng_state()
    quantize(x, "e4m3")
    quantize(x, "e4m3:sr", seed=seed(1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["bf16", "e4m3", "e4m3:pow2", "fp(4,3,4)", "fp(6,9,0)"])
def test_codes_are_those_of_the_format(name):
    x = torch.randn(1000)
    scale = amax_scale(x, name) if ":" in name else None
    values = quantize(x, f"{name}:sr", scale=scale)
    codes = encode(values, f"{name}:sr", scale=scale)
    assert torch.equal(codes, encode(values, name, scale=scale))
    assert torch.equal(decode(codes, f"{name}:sr", scale=scale, dtype=torch.float32), values)


def test_operators_keep_torchs_rules():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    library.opcheck(QUANTIZE, (x, None, "e4m3:sr", True, torch.bfloat16, seed(1), 7))
    with FakeTensorMode():
        fake = draw_seed()
    assert (fake.shape, fake.dtype) == ((), torch.int64)
    assert torch.Tag.nondeterministic_seeded in torch.ops.assign.seed.default.tags
    assert draw_seed() >= 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quantize(torch.zeros(3), "e4m3:sr", seed=torch.zeros(())),
            "The seed for 'e4m3:sr' is float32 of shape [] on cpu.\n"
            "  Allowed: int64, one element, on cpu, where the tensor is.\n  Take it from draw_seed().",
        ),
        (
            lambda: QUANTIZE(torch.zeros(3), None, "e4m3:sr", True, torch.float32),
            "'e4m3:sr' needs a seed, and none was given.\n  Take it from draw_seed().",
        ),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(FormatError) as caught:
        call()
    assert str(caught.value) == message


# ---- in a plan


def one_step(model, batch, plan, number, backend="eager"):
    twin = copy.deepcopy(model)
    step = planned_step(twin, class_loss, plan, backend=backend)
    torch.manual_seed(number)
    loss = step(batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in twin.parameters() if p.grad is not None)]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format_name", ["bf16:sr", "e4m3:pow2:sr"])
def test_the_seed_decides_a_step(name, format_name):
    make, data = MODELS[name]
    model, batch = make(), data()
    plan = everything(traced(model, batch), format_name)
    first = one_step(model, batch, plan, 0)
    assert equal(one_step(model, batch, plan, 0), first)
    assert not equal(one_step(model, batch, plan, 1), first)


def test_trains():
    model, batch = MLP(), vectors()
    plan = everything(traced(model, batch), "e4m3:pow2:sr")
    losses, _ = steps(model, planned_step(model, class_loss, plan, backend="eager"), batch, count=12, optimizer=sgd)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("forward", "backward"), [("bf16:sr", "bf16"), ("bf16", "bf16:sr"), ("bf16:sr", "bf16:sr")])
def test_operators_leave_bits_to_round(graphs, forward, backward):
    """In bf16 a product would be on the grid already: what is rounded to bf16:sr comes in float32, values and grads."""
    model, batch = ResNet(), images(batch=4)
    table = traced(model, batch)
    keys = [info.key for info in table.paper_tensors]
    names = {key: Entry(backward if key.endswith(".grad") else forward, False) for key in keys}
    planned_step(model, class_loss, everything(table, "bf16").replace(names), backend="eager")(batch).backward()
    for graph, name, ending in zip(graphs, (forward, backward), ("", ".grad"), strict=True):
        rounded = [n for n in graph.graph.nodes if n.target is QUANTIZE and n.args[2] == "bf16:sr"]
        made = [n for n in rounded if _torch.is_backward(n) == bool(ending)]
        if name == "bf16:sr":
            wanted = {key.removesuffix(ending) for key in keys if key.endswith(".grad") == bool(ending)} - {"/input"}
            assert {_torch.label_of(n).removeprefix("mark:") for n in made} | {"/input"} == wanted | {"/input"}
        assert {n.args[0].meta["val"].dtype for n in rounded} <= {torch.float32}
        assert all(isinstance(n.args[5], torch.fx.Node) for n in rounded)
        assert len({n.args[6] for n in made}) == len(made)
    assert len([n for n in graphs[0].graph.nodes if n.target is torch.ops.assign.seed.default]) == 1


def test_weights_in_bf16_are_multiplied_in_bf16(graphs):
    model, batch = MLP(), vectors()
    table = traced(model, batch)
    plan = everything(table, "bf16").replace(
        {key: Entry("bf16:sr", False) for key in ("first.weight", "second.weight")}
    )
    planned_step(model, class_loss, plan, backend="eager")(batch).backward()
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    found = [n for graph in graphs for n in graph.graph.nodes if n.target in products]
    assert {n.meta["val"].dtype for n in found} == {torch.bfloat16}


def test_plans_that_round_to_nearest_draw_nothing(graphs):
    model, batch = MLP(), vectors()
    step = planned_step(model, class_loss, everything(traced(model, batch), "e4m3:pow2"), backend="eager")
    before = torch.get_rng_state()
    step(batch).backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(n.target is torch.ops.assign.seed.default for graph in graphs for n in graph.graph.nodes)


class Product(nn.Module):
    """``x @ w`` in a checkpointed block or outside; with ``x = 1`` the output is ``w`` as rounded."""

    def __init__(self, checkpointed):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.checkpointed = checkpointed

    def block(self, x):
        return x @ self.weight

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)


def mean(model, batch):
    return model(batch).mean()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["fp(4,3,4):sr", "e4m3:pow2:sr", "bf16:sr"])
def test_the_backward_pass_reads_the_weight_of_the_forward_pass(name, checkpointed):
    model, x = Product(checkpointed), torch.eye(16)
    plan = everything(traced(model, x, loss=mean), "fp32").replace({"weight": Entry(name, True)})
    planned = apply(model, plan, backend="eager")
    x.requires_grad_()
    seen = []
    for _ in range(3):
        x.grad = None
        out = planned(x)
        out.backward(torch.eye(16))
        assert torch.equal(x.grad.T, out)
        seen.append(out.detach())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], quantize(model.weight, name.removesuffix(":sr")))


class Squares(nn.Module):
    """The square of a rounded product in a checkpointed block, which the backward pass computes again."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(100))

    def block(self, x):
        return (x * self.weight).square()

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def test_a_checkpointed_block_rounds_the_same_way_twice():
    model, x = Squares(), torch.rand(100) + 1
    table = traced(model, x, loss=mean)
    (key,) = (info.key for info in table.paper_tensors if info.op == "mul" and not info.key.endswith(".grad"))
    planned = apply(model, everything(table, "fp32").replace({key: Entry("fp(4,3,4):sr", True)}), backend="eager")
    x.requires_grad_()
    out = planned(x)
    out.sum().backward()
    assert out.sqrt().detach().mul(8).frac().eq(0).all()
    assert torch.equal(x.grad, 2 * out.detach().sqrt())


def test_promotion_leaves_stochastic_rounding_behind():
    model, batch = MLP(), vectors()
    table = traced(model, batch)
    keys = {info.key for info in table.paper_tensors}
    plan = Assignment(
        entries={key: Entry("fp(4,3,4):sr", True) for key in keys}, recipe="hfp8", fingerprint=table.fingerprint
    )
    promotion = Promotion(plan, every=1, threshold=0.5)
    step = planned_step(model, class_loss, plan, backend="eager", promotion=promotion)
    step(batch).backward()
    assert promotion.step() == ()
    with torch.no_grad():
        model.second.weight.fill_(1000.0)
    step(batch).backward()
    assert "second.weight" in {each.key for each in promotion.step()}
    assert promotion.plan.entries["second.weight"].format == "fp(6,9,0)"
    step(batch).backward()


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 300))

    def forward(self, x):
        return x * self.weight


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16:sr", "e4m3:pow2:sr", "fp(4,3,4):sr"])
def test_inductor_rounds_as_eager_does(name):
    """One product an element, no sums to reorder: values and gradients are equal bit for bit."""
    model, x = Gain(), torch.randn(3, 300)
    plan = everything(traced(model, x, loss=mean), name)
    results = []
    for backend in ("eager", "inductor"):
        twin = copy.deepcopy(model)
        planned = apply(twin, plan, backend=backend)
        for _ in range(2):
            torch.manual_seed(5)
            twin.zero_grad()
            out = planned(x)
            out.backward(torch.linspace(-1, 1, 900).view(3, 300))
        results.append((out.detach(), twin.weight.grad))
    assert equal(*results)
    assert not torch.equal(results[0][0], quantize(quantize(x, name) * quantize(model.weight, name), name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "in place"])
def test_the_seed_decides_a_compiled_step(name):
    make, data = MODELS[name]
    model, batch = make(), data()
    plan = everything(traced(model, batch), "e4m3:pow2:sr")
    first = one_step(model, batch, plan, 0, "inductor")
    assert equal(one_step(model, batch, plan, 0, "inductor"), first)
    assert not equal(one_step(model, batch, plan, 1, "inductor"), first)
