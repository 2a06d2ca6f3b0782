"""What must hold on a device before its times mean anything; each check returns what it did, or raises."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assign import _torch
from assign.executor.apply import planned_step
from assign.formats.parsing import parse_format
from assign.formats.rows import FORMATS, SAVED_FORMATS, Format
from assign.numerics.blocks import decode_blocks, encode_blocks
from assign.numerics.dispatch import use_compiled
from assign.numerics.promotion import Promotion
from assign.numerics.rounding import (
    amax_scale,
    decode,
    encode,
    inline_cast,
    quantize,
)
from assign.numerics.torch_dtypes import ROUNDED, torch_dtype
from assign.plan.space import SearchSpace
from assign.planner import search, search_table
from assign.tasks.models import ResNet
from assign.tracing.tracer import trace

PAPER = ("fp(4,3,4)", "fp(5,2,0)", "fp(6,9,0)")
ODD = ("fp(2,1,0)", "fp(8,7,0)", "fp(7,3,-63)", "fp(8,22,0)")
POSITS = ("posit(8,0)", "posit(8,2)", "posit(8,2):underflow", "posit(12,1)", "posit(16,3)")
"""Few bits, float32's own lowest exponent, its highest, and nearly all of its mantissa."""

NAMES = (*(name for name, row in FORMATS.items() if not row.delayed), *PAPER, *ODD, *POSITS)
_STEPS = 3
_SCALE = 0.125
_SEED = 1234567890123456789
_BY_CHANCE = ("bf16:sr", "e4m3:sr", "e5m2:pow2:sr", "fp(4,3,4):sr", "fp(8,7,0):sr")
_BOUNDS = (1e-42, 1e-3, 447.0, 1e38)
"""Largest magnitudes, from subnormal to enormous, of tensors whose scale is taken."""


class DifferentError(Exception):
    """Two ways to compute the same thing differ; says where."""


def inputs(fmt: Format) -> Tensor:
    """Float32: every bfloat16, random bits, float32's subnormals, the format's ends and ties, special values."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=generator, dtype=torch.int64).to(torch.int32)
    subnormal = torch.randint(0, 2**23, (2**12,), generator=generator, dtype=torch.int32)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    ends = [fmt.max_value, fmt.overflow_threshold, fmt.min_normal, fmt.min_subnormal, fmt.underflow_threshold]
    steps = torch.arange(1, 2**12, dtype=torch.float64) * (fmt.min_subnormal / 2)
    ends_and_ties = torch.cat([torch.tensor(ends, dtype=torch.float64), steps]).float()
    near = [torch.nextafter(ends_and_ties, torch.tensor(limit)) for limit in (0.0, math.inf)]
    special = torch.tensor([0.0, math.inf, math.nan, 1.0])
    points = torch.cat([special, ends_and_ties, *near, subnormal.view(torch.float32)])
    return torch.cat([points, -points, every, bits.view(torch.float32)])


def check_rounding(device: torch.device, compiled: bool) -> str:
    """Every format, from every dtype, saturating and not: rounded, coded and decoded as on the CPU."""
    done = 0
    for fmt in map(parse_format, NAMES):
        for dtype in ROUNDED:
            x = inputs(fmt).to(dtype)
            x = x if fmt.has_nan else x[~x.isnan()]  # the code of a NaN has its sign, which a cast need not keep
            x_there = x.to(device)  # copied, not converted: the bits are the CPU's
            for saturate in (True, False):
                with use_compiled(False):
                    expected = _round_trip(x, fmt, saturate)
                with use_compiled(compiled):
                    actual = _round_trip(x_there, fmt, saturate)
                for what, ours in actual.items():
                    compare(ours, expected[what], x, f"{what} {fmt.name} of {dtype}, saturate={saturate}")
                    done += 1
    return f"{done} results of {len(NAMES)} formats are the CPU's bit for bit"


def _round_trip(x: Tensor, fmt: Format, saturate: bool) -> dict[str, Tensor]:
    found = {}
    scale = None
    if fmt.scaled:
        found = {f"scale of up to {bound}": amax_scale(_held(x, bound), fmt) for bound in _BOUNDS}
        scale = torch.tensor(_SCALE, device=x.device)
        for bound in _BOUNDS:
            both = torch.ops.assign.scale_quantize(_held(x, bound), fmt.name, saturate, x.dtype)
            found |= {
                f"{what} of up to {bound} in one": one for what, one in zip(("value", "scale"), both, strict=True)
            }
    found["quantize"] = rounded = quantize(x, fmt, scale=scale, saturate=saturate)
    found["encode"] = codes = encode(rounded, fmt, scale=scale)
    found["decode"] = decode(codes, fmt, scale=scale)
    return found


def _held(x: Tensor, bound: float) -> Tensor:
    """``x``, with 0 for what is NaN or beyond ``bound``: a few large values decide the scale of all."""
    return torch.where(x.abs() <= bound, x, 0.0).to(x.dtype)


def check_chance(device: torch.device, compiled: bool) -> str:
    """Stochastic rounding draws on the device what it draws on the CPU from the same seed."""
    done, seed = 0, torch.tensor(_SEED)
    for fmt in map(parse_format, _BY_CHANCE):
        for dtype in ROUNDED:
            x = inputs(fmt).to(dtype)
            x_there, seed_there = x.to(device), seed.to(device)
            scale = torch.tensor(_SCALE) if fmt.scaled else None
            with use_compiled(False):
                expected = quantize(x, fmt, scale=scale, seed=seed)
            with use_compiled(compiled):
                actual = quantize(x_there, fmt, scale=None if scale is None else scale.to(device), seed=seed_there)
            compare(actual, expected, x, f"quantize {fmt.name} of {dtype}")
            done += 1
    return f"{done} results of chance are the CPU's bit for bit"


def check_blocks(device: torch.device, compiled: bool) -> str:
    """Copies in blocks, of tensors that fill them and do not, in order of memory or not: codes and what comes back."""
    done, seed = 0, torch.tensor(_SEED)
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(512, 64, generator=generator) * torch.linspace(-140, 120, 512).exp2().unsqueeze(1)
    ragged = torch.cat([spread.reshape(-1), torch.tensor([math.inf, 1.0, math.nan, -0.0] * 9)])
    image = torch.randn(2, 24, 20, 20, generator=generator).to(memory_format=torch.channels_last)
    for name in (f"{name}{chance}" for name in SAVED_FORMATS for chance in ("", ":sr")):
        for dtype in ROUNDED:
            for x in (ragged.to(dtype), image.to(dtype)):
                x_there = x.to(device)
                with use_compiled(False):
                    expected = encode_blocks(x, name, seed=seed)
                    wanted = decode_blocks(expected, name, x)
                with use_compiled(compiled):
                    codes = encode_blocks(x_there, name, seed=seed.to(device))
                    actual = decode_blocks(codes, name, x_there)
                compare(codes, expected, x, f"codes of {name} of {dtype}")
                compare(actual, wanted, x, f"{name} of {dtype}")
                done += 1
    return f"{done} tensors in blocks are the CPU's bit for bit"


def check_inlined(device: torch.device) -> str:
    """Casts to torch's own dtypes as a compiler fuses them into a graph, as compiled plans have them."""
    count = 0
    for fmt in (row for row in FORMATS.values() if row.native not in (None, "float32")):
        x, run = inputs(fmt), _inlined(fmt)
        x_there = x.to(device)
        torch.compiler.reset()
        actual, expected = torch.compile(_torch.trace_inline(run, [x_there]))(x_there), run(x)
        for what, ours in actual.items():
            compare(ours, expected[what], x, f"inlined {what} {fmt.name}")
            count += 1
    return f"{count} inlined results are the CPU's bit for bit"


def _inlined(fmt: Format) -> Callable[[Tensor], dict[str, Tensor]]:
    def run(x: Tensor) -> dict[str, Tensor]:
        return {
            f"cast to {dtype}, saturate={saturate}": inline_cast(x, fmt, saturate, dtype)
            for saturate in (True, False)
            for dtype in (torch.float32, torch_dtype(str(fmt.native)))
        }

    return run


def compare(actual: Tensor, expected: Tensor, x: Tensor, what: str) -> None:
    """Equal bit for bit, the signs of zeros too; one NaN is as good as another.

    Raises:
        DifferentError: names the first input whose results differ.
    """
    actual = actual.cpu()
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise DifferentError(f"{what}: {actual.dtype} {list(actual.shape)}, not {expected.dtype}")
    nan = torch.zeros_like(actual, dtype=torch.bool)
    if actual.is_floating_point():
        nan = actual.isnan() & expected.isnan()
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.dtype.itemsize]
        values = actual, expected
        actual, expected = actual.view(bits), expected.view(bits)
    else:
        values = actual, expected
    wrong = ((actual != expected) & ~nan).reshape(-1)
    if wrong.any():
        first = int(wrong.nonzero()[0, 0])
        where = f" at {float(x.reshape(-1)[first]).hex()}" if wrong.numel() == x.numel() else ""
        got, want = (value.reshape(-1)[first].item() for value in values)
        raise DifferentError(f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first{where}: {got}, not {want}")


def check_products(device: torch.device) -> str:
    """Products of what bf16 and 8 bits hold are those of float64, but for the rounding of sums and results."""
    torch.manual_seed(0)
    a, b = torch.randn(512, 256), torch.randn(256, 128)
    emulated = [quantize(x, name) for x, name in ((a, "fp(4,3,4)"), (b, "fp(5,2,0)"))]
    product = torch.ops.assign.product(*(x.to(device) for x in emulated), "fp(4,3,4)", "fp(5,2,0)")
    _near(product, emulated[0].double() @ emulated[1].double(), 1e-5, "bf16 product")
    if not _torch.multiplies_fp8(device):
        return "bf16 products are right; the device has none of 8 bits"
    for names in (("e4m3:pow2", "e4m3:pow2"), ("e5m2:pow2", "e4m3:amax"), ("e4m3:amax", "e5m2:amax")):
        parts, values = [], []
        for x, name in zip((a.to(device), b.to(device)), names, strict=True):
            scale = amax_scale(x, name)
            codes = encode(quantize(x, name, scale=scale, dtype=torch.float32), name, scale=scale)
            parts += [codes, scale, name]
            values.append(decode(codes, name, scale=scale, dtype=torch.float32).cpu().double())
        product = torch.ops.assign.scaled_product(*parts, None, torch.bfloat16)
        _near(product, values[0] @ values[1], 5e-3, f"product of {' and '.join(names)}")
    return "bf16 products and those of 8 bits are right"


def _near(actual: Tensor, expected: Tensor, limit: float, what: str) -> None:
    error = float((actual.cpu().double() - expected).norm() / expected.norm())
    if not error <= limit:
        raise DifferentError(f"{what}: the relative error is {error:.2g}, not below {limit:g}")


# ---- whole steps


def check_identity(device: torch.device) -> str:
    """The all-fp32 plan trains a small ResNet exactly as eager PyTorch does."""
    with _deterministic():
        plain, batch = _small_resnet(device)
        planned, _ = _small_resnet(device)
        plan = search_table(trace(planned, batch, _class_loss), strategy="uniform", space=SearchSpace(formats="fp32"))
        step = planned_step(planned, _class_loss, plan, backend="eager")
        losses = [_train(model, loss, batch) for model, loss in ((plain, None), (planned, step))]
    if losses[0] != losses[1]:
        raise DifferentError(f"losses {losses[1]}, not {losses[0]}")
    for (name, ours), theirs in zip(planned.state_dict().items(), plain.state_dict().values(), strict=True):
        compare(ours, theirs.cpu(), theirs, f"{name} after {_STEPS} steps")
    return f"{_STEPS} steps of AdamW, losses {losses[0]}: parameters and buffers are eager's bit for bit"


def check_plans(device: torch.device, backend: str) -> str:
    """Plans of both recipes, all low, train: the loss is finite, and falls as fp32's does."""
    said = []
    model, batch = _small_resnet(device)
    fp32 = _train(model, None, batch, steps=20)
    for recipe in ("native", "hfp8"):
        model, batch = _small_resnet(device)
        plan = search_table(trace(model, batch, _class_loss), space=recipe, low_ratio=1.0)
        losses = _train(model, planned_step(model, _class_loss, plan, backend=backend), batch, steps=20)
        if not all(map(math.isfinite, losses)) or losses[-1] > (losses[0] + fp32[-1]) / 2:
            raise DifferentError(f"{recipe}: the loss goes {losses[0]:.4f} → {losses[-1]:.4f}, fp32's {fp32[-1]:.4f}")
        said.append(f"{recipe} {losses[0]:.4f} → {losses[-1]:.4f}")
    return f"{', '.join(said)}; fp32 {fp32[0]:.4f} → {fp32[-1]:.4f}"


def check_promotion(device: torch.device, backend: str) -> str:
    """One percent of a tensor overflows: it is promoted, and the next step computes in the high format."""
    model = _Line().to(device)
    values = torch.tensor([100.0, -100.0]).repeat(5000).to(device)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum()

    plan = search(model, values, loss, low_ratio=1.0, space="hfp8")
    promotion = Promotion(plan)
    step = planned_step(model, loss, plan, backend=backend, promotion=promotion)
    step(values).backward()
    found = {past.key: past for past in promotion.step()}
    past = found.get("/input")
    if past is None or (past.overflow_ratio, past.to_format) != (1.0, "fp(6,9,0)"):
        raise DifferentError(f"promoted {sorted(found)}, /input was expected")
    gradients = []
    for _ in range(2):
        model.weight.grad = None
        step(values).backward()
        gradients.append(model.weight.grad)
        promotion.step()
    if promotion.plan.entries["/input"].format != "fp(6,9,0)":
        raise DifferentError("the plan did not follow the promotion")
    if not all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients):
        raise DifferentError("gradients after the promotion are not finite")
    return f"{len(found)} tensors promoted, the steps after it are finite"


class _Line(nn.Module):
    """A product that overflows fp(4,3,4) where its input does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10000))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.weight)


def _small_resnet(device: torch.device) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = ResNet(channels_in=3, widths=(16, 32), blocks=1, classes=10)
    batch = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
    return model.to(device), (batch[0].to(device), batch[1].to(device))


def _class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _train(
    model: nn.Module, step: Callable[[object], Tensor] | None, batch: tuple[Tensor, Tensor], *, steps: int = _STEPS
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = step(batch) if step else _class_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark


CHECKS: Mapping[str, Callable[[torch.device], str]] = MappingProxyType(
    {
        "rounding, op by op": lambda device: check_rounding(device, False),
        "rounding by chance, op by op": lambda device: check_chance(device, False),
        "copies in blocks, op by op": lambda device: check_blocks(device, False),
        "products of narrow matrices": check_products,
        "identity of the all-fp32 plan": check_identity,
        "promotion, eager": lambda device: check_promotion(device, "eager"),
        "plans train, eager": lambda device: check_plans(device, "eager"),
        "rounding, compiled": lambda device: check_rounding(device, True),
        "rounding by chance, compiled": lambda device: check_chance(device, True),
        "copies in blocks, compiled": lambda device: check_blocks(device, True),
        "rounding, inlined": check_inlined,
        "promotion, inductor": lambda device: check_promotion(device, "inductor"),
        "plans train, inductor": lambda device: check_plans(device, "inductor"),
    }
)
"""By name; cheap ones first."""
