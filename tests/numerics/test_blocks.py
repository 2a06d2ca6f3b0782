"""Block formats: what comes back, against slow oracles; and copies that wait in them, in steps that really run."""

import copy
import doctest
import gc
import itertools
import math
import operator
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import all_low, everything, packed_channels_last, sgd, steps, traced
from models import GPT, MLP, InPlace, ResNet, class_loss, images, tokens, vectors
from torch import library, nn

from assign import _torch
from assign.errors import FormatError
from assign.executor import pipeline
from assign.executor.apply import apply, planned_step
from assign.formats.parsing import parse_saved
from assign.formats.rows import SAVED_FORMATS
from assign.memory.replay import Replay
from assign.numerics import blocks
from assign.numerics.blocks import block_format, decode_blocks, encode_blocks, memory_order
from assign.numerics.dispatch import use_compiled
from assign.plan.plan import Entry
from assign.plan.space import SearchSpace
from assign.plan.table import Role
from assign.planner import search
from assign.tracing.joint import is_view
from assign.tracing.nonfinite import non_finite

INTEGERS = {"int8:block64": 255, "int4:block64": 15, "int2:block64": 3}
FLOATS = ("e4m3:block64", "mxfp8", "mxfp4")
CHANCE = [f"{name}:sr" for name in SAVED_FORMATS]
ENCODE, DECODE = torch.ops.assign.encode_blocks.default, torch.ops.assign.decode_blocks.default
SEED = torch.tensor(1234567890123456789)


def back(x, name, seed=SEED):
    return decode_blocks(encode_blocks(x, name, seed=seed), name, x)


def spread(count, exponents=(-20, 20)):
    """Values of many magnitudes, in blocks of one magnitude each: float32 [count, 64]."""
    scale = torch.linspace(*exponents, count).exp2().unsqueeze(1)
    return torch.randn(count, 64) * scale


def toward(x, up):
    """A float64 tensor, rounded to bf16 upwards or downwards."""
    near = x.bfloat16().double()
    wrong = near < x if up else near > x
    towards = torch.tensor(math.inf if up else -math.inf, dtype=torch.bfloat16)
    return torch.where(wrong, torch.nextafter(x.bfloat16(), towards).double(), near)


# ---- what comes back


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("e4m3:block64", 8.25),
        ("int8:block64", 8.5),
        ("int4:block64", 4.5),
        ("int2:block64", 2.5),
        ("mxfp8", 8.25),
        ("mxfp4", 4.25),
    ],
)
def test_bytes(name, bits):
    fmt = block_format(name)
    assert fmt.bits_per_element == bits
    for elements in (0, 64, 640):
        assert fmt.bytes_of(elements) == elements * bits / 8
        assert encode_blocks(torch.ones(elements), name).shape == (elements * bits / 8,)
    for elements in (1, fmt.block - 1, fmt.block):
        assert fmt.bytes_of(elements) == fmt.block_bytes == encode_blocks(torch.ones(elements), name).numel()
    assert fmt.bytes_of(65) > fmt.bytes_of(64)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("offset", [0.0, 1.0, -300.0])
def test_integers_are_at_most_half_a_step_away(name, offset):
    x = spread(101) + offset
    wide = x.double()
    low = toward(wide.amin(1, keepdim=True), up=False)
    step = toward((wide.amax(1, keepdim=True) - low) / INTEGERS[name], up=True)
    error = (back(x, name).double() - wide).abs()
    assert (error <= step / 2 + 2**-22 * wide.abs()).all()  # and the rounding of float32 sums
    extreme = (wide == wide.amin(1, keepdim=True)) | (wide == wide.amax(1, keepdim=True))
    slack = 2**-7 * (wide.abs().amax(1, keepdim=True) + (wide.amax(1, keepdim=True) - low))
    assert (error <= slack)[extreme].all()  # the 16-bit rounding of minimum and scale
    assert (error > step / 4).any()  # or the bound above says nothing


@pytest.mark.parametrize("name", SAVED_FORMATS)
def test_constants_and_zeros(name):
    assert torch.equal(back(torch.zeros(100), name), torch.zeros(100))
    x = torch.tensor([3.14159, -2.71828, 1e-30, 65504.0]).repeat_interleave(64)
    worst = {"mxfp8": 1 / 8, "mxfp4": 1 / 4, "e4m3:block64": 2**-7}.get(name, 2**-8 / 3 * (1 + 2**-6))
    assert ((back(x, name) - x).abs() <= worst * x.abs()).all()
    some = torch.where(torch.arange(256) % 3 == 0, 0.0, torch.rand(256))
    some = some if name in INTEGERS else some - (some > 0) * 0.5
    assert (back(some, name)[some == 0] == 0).all()


def elements(exponent_bits, mantissa_bits, bias, largest):
    """Every value that an element has and is not negative, in the order of the codes."""
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            values.append((1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias))
    return [value for value in values if value <= largest]


GRIDS = {"mxfp8": (elements(4, 3, 7, 448), 8), "mxfp4": (elements(2, 1, 1, 6), 2)}


def slow_mx(block, grid, largest_exponent):
    """OCP MX 1.0, section 6.3, one element at a time: nearest, ties to the even code, saturating."""
    peak = max(abs(value) for value in block)
    power = max(math.frexp(peak)[1] - 1 - largest_exponent, -127) if peak else -127
    result = []
    for value in block:
        scaled = math.ldexp(abs(value), -power)
        code = min(range(len(grid)), key=lambda i: (abs(grid[i] - scaled), i % 2))
        result.append(math.copysign(math.ldexp(grid[code], power), value))
    return result


def blocks_with(values, largest):
    """Blocks of 31 of the values and ``largest``, which makes the scale of each the same: float32 [n, 32]."""
    padded = F.pad(torch.tensor(values), (0, -len(values) % 31)).view(-1, 31)
    return torch.cat((padded, torch.full((len(padded), 1), largest)), 1)


@pytest.mark.parametrize("name", GRIDS)
def test_mx_formats_are_those_of_the_slow_oracle(name):
    grid, _ = GRIDS[name]
    ties = blocks_with([(a + b) / 2 for a, b in itertools.pairwise(grid)], grid[-1])
    x = torch.cat((spread(40, (-149, 120)).view(-1, 32), ties, ties * -(2.0**40), ties.nextafter(torch.tensor(1e9))))
    expected = [slow_mx(block, *GRIDS[name]) for block in x.tolist()]
    assert torch.equal(back(x, name), torch.tensor(expected))
    exact = blocks_with([*grid, *(-value for value in grid)], grid[-1]) * 2.0**-9
    assert torch.equal(back(exact, name), exact)


@pytest.mark.parametrize("name", GRIDS)
def test_mx_formats_are_torchaos(name):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    dtype = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}[name]
    x = spread(200, (-60, 60)).view(-1)
    theirs = mx.MXTensor.to_mx(x, dtype, block_size=32).dequantize(torch.float32)
    assert torch.equal(back(x, name), theirs)


def test_e4m3_blocks_use_the_whole_range():
    grid = torch.tensor(elements(4, 3, 7, 448), dtype=torch.float64)
    x = spread(60, (-100, 100))
    wide = x.double()
    scale = toward(wide.abs().amax(1, keepdim=True) / 448, up=True)
    best = ((wide / scale).abs().unsqueeze(2) - grid).abs().amin(2) * scale
    error = (back(x, "e4m3:block64").double() - wide).abs()
    assert (error <= best * (1 + 2**-12) + 2**-22 * wide.abs()).all()  # a hair's breadth from a tie either is right


@pytest.mark.parametrize("name", [*SAVED_FORMATS, *CHANCE])
def test_a_block_with_a_value_that_is_not_finite_is_nan(name):
    block = block_format(name).block
    for value in (math.nan, -math.nan, math.inf, -math.inf):
        x = torch.randn(5, block)
        x[1, 7], x[4, block - 1] = value, value
        assert torch.equal(back(x, name).isnan().all(1), torch.tensor([False, True, False, False, True]))
        assert torch.equal(back(x, name).isnan().any(1), torch.tensor([False, True, False, False, True]))
    large = torch.full((2, block), 1.5e38)
    large[1, ::2] = -1.5e38
    assert back(large, name).isfinite().all()
    if name.startswith("int"):
        assert back(2 * large, name).isnan().all(1).tolist() == [False, True]  # the range of the second is no float32


@pytest.mark.parametrize("name", [*SAVED_FORMATS, *CHANCE])
def test_sixteen_bits_do_not_overflow(name):
    x = torch.full((64,), 65504.0, dtype=torch.float16)
    x[:32] = -60000.0 if name in INTEGERS else 50000.0
    assert back(x, name).isfinite().all()
    assert back(x, name).abs().max() > 45000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*SAVED_FORMATS, "int4:block64:sr", "mxfp4:sr"])
def test_any_shape_in_the_order_of_its_memory(name, dtype):
    images = torch.randn(3, 5, 7, 6).to(memory_format=torch.channels_last)
    shapes = [
        torch.randn(()), torch.randn(1), torch.randn(0), torch.randn(0, 4), torch.randn(63), torch.randn(65),
        torch.randn(9, 41).t(), torch.randn(9, 41)[:, 3:], torch.randn(7, 1).expand(7, 50), images, images[:, :, ::2],
        torch.randn(4, 3, 2, 5, 6).permute(3, 1, 4, 0, 2),
    ]  # fmt: skip
    for x in (each.to(dtype) for each in shapes):
        y = back(x, name)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        dense = torch.empty_like(x).stride()
        assert x.stride() != dense or y.stride() == dense
        flat = x.permute(memory_order(x)).reshape(-1)
        assert torch.equal(y.permute(memory_order(x)).reshape(-1), back(flat, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SAVED_FORMATS, *CHANCE])
def test_sixteen_bits_come_back_as_their_float32_values_do(name):
    """More elements than are widened at a time."""
    x = torch.randn(2**16 + 100).bfloat16()
    assert torch.equal(encode_blocks(x, name, seed=SEED), encode_blocks(x.float(), name, seed=SEED))
    assert torch.equal(back(x, name), back(x.float(), name).bfloat16())


NASTY = torch.cat(
    (
        spread(40, (-149, 100)).view(-1),
        torch.tensor([math.nan]), torch.randn(100), torch.tensor([-math.inf]), torch.randn(200), torch.zeros(130),
        torch.tensor([math.inf, -math.nan, 3.4e38, -3.4e38, 1e-45, -1e-40]), torch.full((70,), -3.14159),
    )
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SAVED_FORMATS, *CHANCE])
def test_compiled_is_op_by_op_bit_for_bit(name):
    for x in (NASTY, NASTY.bfloat16()):
        with use_compiled(True):
            codes = encode_blocks(x, name, seed=SEED)
            values = decode_blocks(codes, name, x)
        with use_compiled(False):
            assert torch.equal(encode_blocks(x, name, seed=SEED), codes)
            bits = torch.int32 if x.dtype == torch.float32 else torch.int16
            assert torch.equal(decode_blocks(codes, name, x).view(bits), values.view(bits))


@pytest.mark.parametrize("name", [*SAVED_FORMATS, *CHANCE])
def test_pieces_and_places_in_memory_change_nothing(name, monkeypatch):
    x = torch.randn(1001)
    codes = encode_blocks(x, name, seed=SEED)
    values = decode_blocks(codes, name, x)
    for start in (1, 2):
        moved = torch.cat((x[:start], x))[start:]
        assert moved.storage_offset() == start
        assert torch.equal(encode_blocks(moved, name, seed=SEED), codes)
    monkeypatch.setattr(blocks, "_PIECE", 256)
    assert torch.equal(encode_blocks(x, name, seed=SEED), codes)
    assert torch.equal(decode_blocks(codes, name, x), values)


# ---- by chance


@pytest.mark.parametrize("name", CHANCE)
def test_the_mean_is_the_value(name):
    count, x = 4096, torch.randn(64) * 3
    found = back(x.expand(count, 64).contiguous(), name).double()
    step = found.amax(0) - found.amin(0)
    assert (found.sub(x.double()).abs() <= step + 1e-6 * x.abs()).all()  # one of the two neighbours, no third
    assert all(len(found[:, i].unique()) <= 2 for i in range(64))
    # a mean of values one step apart has a standard deviation of at most half a step over the root of their number
    assert (found.mean(0).sub(x.double()).abs() <= 5 * step / 2 / count**0.5 + 1e-6 * x.abs()).all()
    nearest = back(x, name.removesuffix(":sr"))
    assert (nearest.sub(x).abs() > 5 * step / 2 / count**0.5).any()  # which to nearest is not


@pytest.mark.parametrize("name", CHANCE)
def test_chance_is_the_seeds(name):
    x = torch.randn(1000)
    order = memory_order(x)
    first = torch.ops.assign.encode_blocks(x, name, order, SEED, 1)
    assert torch.equal(first, torch.ops.assign.encode_blocks(x, name, order, SEED, 1))
    assert not torch.equal(first, torch.ops.assign.encode_blocks(x, name, order, SEED, 2))
    assert not torch.equal(first, torch.ops.assign.encode_blocks(x, name, order, SEED + 1, 1))
    assert not torch.equal(*back(torch.randn(2**12).repeat(2), name).chunk(2))
    torch.manual_seed(3)
    drawn = encode_blocks(x, name)
    assert not torch.equal(drawn, encode_blocks(x, name))
    torch.manual_seed(3)
    assert torch.equal(drawn, encode_blocks(x, name))
    with pytest.raises(FormatError, match="needs a seed"):
        torch.ops.assign.encode_blocks(x, name, order)


# ---- the operators


@pytest.mark.parametrize("name", ["int4:block64", "mxfp8:sr"])
def test_the_operators_say_what_comes_out(name):
    x = torch.randn(3, 8, 5, 5).to(memory_format=torch.channels_last)
    order = memory_order(x)
    checks = ("test_schema", "test_faketensor")
    library.opcheck(ENCODE, (x, name, order, SEED, 7), test_utils=checks)
    codes = ENCODE(x, name, order, SEED, 7)
    library.opcheck(DECODE, (codes, name, list(x.shape), order, torch.bfloat16), test_utils=checks)
    odd = torch.cat((codes[:1], codes))[1:]  # 16-bit numbers at odd bytes
    assert torch.equal(DECODE(odd, name, x.shape, order, x.dtype), DECODE(codes, name, x.shape, order, x.dtype))


def test_what_does_not_fit_is_refused():
    with pytest.raises(FormatError, match=r"'e4m3' has no blocks\.\n  Allowed: e4m3:block64, int8:block64"):
        encode_blocks(torch.ones(3), "e4m3")
    match = r"'int3:block64' is not a number format(.|\n)*For saved activations also: e4m3:block64, int8:block64"
    with pytest.raises(FormatError, match=match):
        encode_blocks(torch.ones(3), "int3:block64")
    with pytest.raises(FormatError, match=r"'mxfp4' cannot encode torch\.float64\.\n  Allowed: torch\.float32"):
        encode_blocks(torch.ones(3).double(), "mxfp4")
    with pytest.raises(FormatError, match=r"torch\.uint8 of shape \[36\], the size of 3 elements in 'int4:block64'"):
        decode_blocks(torch.zeros(35, dtype=torch.uint8), "int4:block64", torch.ones(3))
    assert parse_saved(" MXFP4 : SR") == block_format("mxfp4:sr")
    assert parse_saved("e4m3:sr").stochastic


# ---- steps that really run


class Masked(nn.Module):
    """Causal attention written out, with a mask of −inf and what is computed from it."""

    def __init__(self, width=32, length=16):
        super().__init__()
        self.tokens = nn.Embedding(20, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 20)
        self.register_buffer("mask", torch.full((length, length), -math.inf).triu(1))

    def forward(self, ids):
        x = self.tokens(ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + self.mask).softmax(-1) @ v
        return self.head(x + self.mlp(self.norm(x)))


class Turned(nn.Module):
    """A product of a copy in another layout, which waits as the tensor that it is a copy of."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(32, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).transpose(1, 2).contiguous()).mean(1)


STEPS = {
    "resnet": (ResNet, images),
    "gpt": (lambda: GPT(width=64), tokens),
    "mlp": (lambda: MLP(256), vectors),
    "checkpointed": (InPlace, lambda: vectors(64, 8)),
    "masked": (Masked, lambda: tokens(4, 16)),
    "turned": (Turned, lambda: (torch.randn(8, 32, 16), torch.randint(0, 4, (8,)))),
}


def saved_as(table, plan, name):
    rows = [row.key for row in table.tensors if row.role is Role.SAVED]
    return plan.replace({key: Entry(name, False) for key in rows})


def measure_saved(model, batch, plan):
    """Loss of a step, and the bytes that wait for its backward pass."""
    step = planned_step(model, class_loss, plan, backend="eager")
    step(batch).backward()
    gc.collect()  # what earlier tests left would be counted where it is freed
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = step(batch)
    return loss, sum(_torch.memory_changes(profiler)) - 4  # the loss itself


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4:block64", "mxfp8", "e4m3:block64"])
@pytest.mark.parametrize("model_name", STEPS)
@pytest.mark.parametrize("base", ["fp32", "bf16", "low"])
def test_the_forward_pass_stays_and_the_bytes_are_those_predicted(name, model_name, base):
    make, data = STEPS[model_name]
    model, batch = make(), data()
    table = traced(model, batch)
    plain = all_low(table) if base == "low" else everything(table, base)
    losses, differences = [], []
    for plan in (plain, saved_as(table, plain, name)):
        torch.manual_seed(7)  # dropout
        loss, measured = measure_saved(copy.deepcopy(model), batch, plan)
        losses.append(loss)
        differences.append(measured - Replay(table, plan.entries).saved_bytes)
    assert torch.equal(*losses)
    assert differences[0] == differences[1]
    if model_name in ("resnet", "mlp", "turned"):
        assert differences == [0, 0]


def readers(node):
    """Who reads a node's memory, through views too, and the node itself."""
    found = {node}
    for user in node.users:
        if user.op == "call_function" and user.target is not ENCODE:
            found |= readers(user) if is_view(user) else {user}
    return found


def test_only_codes_cross_into_the_backward_pass(graphs):
    model, batch = ResNet(), images()
    table = traced(model, batch)
    plan = saved_as(table, everything(table, "bf16"), "int4:block64")
    planned_step(model, class_loss, plan, backend="eager")(batch).backward()
    forward, backward = graphs
    outputs = _torch.output_of(forward).all_input_nodes
    codes = [node for node in outputs if node.target is ENCODE]
    assert len(codes) == sum(row.role is Role.SAVED for row in table.tensors)
    assert all(node.meta["val"].dtype == torch.uint8 and node.meta["val"].dim() == 1 for node in codes)
    largest = max(node.meta["val"].numel() for node in codes)
    others = [node for node in outputs if node not in codes and node.op == "call_function"]
    assert all(node.meta["val"].numel() < largest / 8 for node in others)  # statistics of the norms, the loss
    order = {node: i for i, node in enumerate(forward.graph.nodes)}
    for node in codes:  # right behind the last reader: between them only that one's parts, and other copies' codes
        last = max(order[reader] for reader in readers(node.args[0]))
        assert last < order[node]
        between = [*forward.graph.nodes][last + 1 : order[node]]
        assert all(other.target in (node.target, operator.getitem) for other in between)
    place = {node: i for i, node in enumerate(backward.graph.nodes)}
    decoded = backward.graph.find_nodes(op="call_function", target=DECODE)
    assert len([*decoded]) == len(codes)
    assert max(min(place[user] for user in node.users) - place[node] for node in decoded) <= 3


def test_a_seed_is_drawn_only_where_a_plan_asks_for_one(graphs):
    model, batch = MLP(), vectors()
    table = traced(model, batch)
    for suffix, count in (("", 0), (":sr", 1)):
        graphs.clear()
        plan = saved_as(table, everything(table, "bf16"), "int8:block64" + suffix)
        planned_step(model, class_loss, plan, backend="eager")(batch).backward()
        seeds = [node for graph in graphs for node in graph.graph.nodes if node.target is torch.ops.assign.seed.default]
        assert len(seeds) == count
        codes = [node for graph in graphs for node in graph.graph.nodes if node.target is ENCODE]
        streams = [node.args[4] for node in codes if suffix]
        assert len(set(streams)) == len(streams)


def test_gradients_by_chance_have_the_right_mean():
    model, batch = MLP(), vectors(64)
    table = traced(model, batch)
    fp32 = everything(table, "fp32")

    def gradient(plan):
        model.zero_grad()
        step = planned_step(model, class_loss, plan, backend="eager")

        def run(seed):
            torch.manual_seed(seed)
            model.zero_grad()
            step(batch).backward()
            return model.second.weight.grad.double()  # linear in the copy of tanh's output

        return run

    exact = gradient(fp32)(0)
    by_chance = gradient(fp32.replace({"/tanh.saved": Entry("int2:block64:sr", False)}))
    assert torch.equal(by_chance(1), by_chance(1))
    found = torch.stack([by_chance(seed) for seed in range(400)])
    error, deviation = found.mean(0) - exact, found.std(0)
    assert (error.abs() <= 5 * deviation / 400**0.5).all()
    nearest = gradient(fp32.replace({"/tanh.saved": Entry("int2:block64", False)}))(0)
    assert ((nearest - exact).abs() > 5 * deviation / 400**0.5).any()


def test_an_element_format_may_be_rounded_to_by_chance_too():
    model, batch = MLP(), vectors(64)
    plan = everything(traced(model, batch), "fp32").replace({"/tanh.saved": Entry("e4m3:pow2:sr", False)})
    step = planned_step(model, class_loss, plan, backend="eager")
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        step(batch).backward()
        found.append(model.second.weight.grad.clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("make", [ResNet, lambda: ResNet().to(memory_format=torch.channels_last)])
def test_batches_of_any_size(make):
    model = make()
    table = traced(model, images())
    plan = saved_as(table, everything(table, "fp32"), "int8:block64")
    twin = apply(copy.deepcopy(model), plan, backend="eager")
    for size in (8, 3, 5, 1):
        batch = images(size)
        fresh = apply(copy.deepcopy(model), plan, backend="eager")
        for each in (twin, fresh):
            each.zero_grad()
            class_loss(each, batch).backward()
        for one, other in zip(twin.parameters(), fresh.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)


def test_further_batch_sizes_share_a_graph(graphs):
    model = MLP(256)
    plan = everything(traced(model, vectors(64)), "bf16")
    counts = []
    for each in (plan, saved_as(traced(model, vectors(64)), plan, "int4:block64:sr")):
        graphs.clear()
        planned = apply(copy.deepcopy(model), each, backend="eager")
        for size in (64, 65, 70, 129, 66):
            class_loss(planned, vectors(size)).backward()
        counts.append(len(graphs))
    assert counts[0] == counts[1] == 4  # forward and backward, of the first size and of any


def copied_to_encode(profiler):
    """Images that lay otherwise in memory than their blocks run."""
    copies = [event for event in profiler.events() if event.name == "aten::clone" and event.cpu_parent]
    return [event for event in copies if "encode_blocks" in str(event.cpu_parent.cpu_parent or event.cpu_parent)]


@pytest.mark.slow
def test_both_backends_give_the_same_gradients(monkeypatch):
    """Once the eager one's blocks run as the images lie that Inductor makes, which it copies for that."""
    monkeypatch.setattr(pipeline, "JOINT", (packed_channels_last, *pipeline.JOINT[1:]))
    batch = images(4)
    model = ResNet(blocks=1)
    table = traced(model, batch)
    plan = saved_as(table, everything(table, "fp32"), "int8:block64")
    grads, copies = [], []
    for backend in ("eager", "inductor"):
        if backend == "inductor":
            monkeypatch.undo()
        twin = copy.deepcopy(model)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            planned_step(twin, class_loss, plan, backend=backend)(batch).backward()
        copies.append(len(copied_to_encode(profiler)))
        grads.append([parameter.grad for parameter in twin.parameters()])
    assert copies[0] > copies[1] == 0
    plain = copy.deepcopy(model)
    class_loss(plain, batch).backward()
    for eager, compiled, exact in zip(*grads, (parameter.grad for parameter in plain.parameters()), strict=True):
        apart, lossy = (eager - compiled).norm(), (eager - exact).norm()
        assert apart <= 1e-4 * eager.norm() + 0.1 * lossy  # values a rounding apart may have codes a step apart
    assert any(
        not torch.equal(parameter.grad, grad) for parameter, grad in zip(plain.parameters(), grads[1], strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("make", "data"), [(ResNet, images), (Masked, lambda: tokens(8, 16))])
def test_training_with_four_bits_falls_as_without(make, data):
    model, batch = make(), data()
    losses = {}
    for saved in (None, "int4:block64"):
        twin = copy.deepcopy(model)
        plan = search(twin, batch, class_loss, low_ratio=0, optimizer=sgd, space=SearchSpace(saved=saved))
        losses[saved], _ = steps(twin, planned_step(twin, class_loss, plan, backend="eager"), batch, count=20)
    plain, narrow = losses.values()
    assert all(map(math.isfinite, narrow))
    assert narrow[0] == plain[0]
    assert narrow[1:] != plain[1:]
    assert min(narrow[-3:]) < 0.8 * narrow[0]
    assert min(plain[-3:]) < 0.8 * plain[0]


# ---- what is never narrowed


def test_infinities_masks_and_log_sum_exp_are_left_out():
    model, batch = Masked(), tokens(4, 16)
    assert non_finite(model, batch, class_loss) == {"/add"}
    plan = search(model, batch, class_loss, low_ratio=0, space=SearchSpace(saved="mxfp4"))
    narrowed = {key for key in plan.entries if key.endswith(".saved")}
    assert "/add.saved" not in narrowed
    assert "/softmax.saved" in narrowed
    assert "loss/log_softmax.saved" not in narrowed  # its exponential is the gradient

    model, batch = GPT(dropout=0.2), tokens()
    table = traced(model, batch)
    rows = {row.key: row for row in table.tensors if row.role is Role.SAVED}
    assert {row.dtype for row in rows.values()} == {"float32"}  # dropout's masks are bool, pools' indices int64
    attention = [key for key in rows if "scaled_dot_product_attention" in key]
    assert len(attention) == 1  # its result; log-sum-exp beside it has no key
    assert math.prod(rows[attention[0]].shape) == batch[0].numel() * 32


@pytest.mark.parametrize("make", [ResNet, InPlace])
def test_looking_for_infinities_changes_nothing(make):
    """Neither the statistics of norms, nor a running average, nor what dropout draws next."""
    model, batch = make(), images() if make is ResNet else vectors(width=8)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert non_finite(model, batch, class_loss) == frozenset()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_not_finite_after_all_is_nan_and_never_a_number():
    """A plan written by hand, in bf16: a mark that changes nothing must not make infinities finite either."""

    class Infinite(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            y = self.a(x)
            return self.b(F.softplus(torch.where(x > 2.5, -math.inf, y)))

    model, batch = Infinite(), vectors()
    batch[0][0, 0] = 3
    table = traced(model, batch)
    assert "/where" in non_finite(model, batch, class_loss)
    plan, losses, finite = everything(table, "bf16"), [], []
    for each in (plan, plan.replace({"/where.saved": Entry("int8:block64", False)})):
        model.zero_grad()
        losses.append(planned_step(model, class_loss, each, backend="eager")(batch))
        losses[-1].backward()
        finite.append(model.a.weight.grad.isfinite().all())
    assert torch.equal(*losses)
    assert losses[0].isfinite()
    assert finite == [True, False]


def test_names_are_regular():
    for name, fmt in SAVED_FORMATS.items():
        assert name == fmt.name
        assert fmt.block * fmt.bits % 128 == 0  # what is shared begins at a multiple of 16 bytes
        assert re.fullmatch(r"[a-z0-9:]+", name)


def test_the_example_in_the_docstring():
    assert doctest.testmod(blocks) == (0, 2)
