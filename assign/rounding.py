"""Rounding to a format, the scale, packing to codes: what they mean, and the registered operators that do it.

Meaning, the same on every device and torch release, whatever their own casts do:

* NaN stays NaN and −0 stays −0; less than half of the smallest subnormal becomes a zero of its sign;
* beyond the format, inf included: ``saturate`` gives ±``max_value`` (forward tensors), otherwise ±inf (backward
  tensors, so that the loss scaler sees it); ``fp32`` changes nothing;
* ``x ≈ q · scale``, with ``q`` on the format's grid;
* to a stochastic format a value between two neighbours goes to either, so that its mean stays: exactly, and to 2^-31
  of the smallest subnormal below ``min_normal``. A value on the grid stays where it is. Overflow is as if the format
  went on: between ``max_value`` and the next value a share goes up, and what does overflows as above.

Stochastic rounding is a function of a *seed*, drawn from torch's generator where the graph begins, of a number for the
tensor, and of the element's place in the tensor's shape. So what draws is one small operator, in whose order a compiler
has no say, and rounding itself stays pure: computed again in the backward pass, in other pieces, in another layout or
by another compiler, a value goes the same way, and ``torch.manual_seed`` repeats a run.

Each kernel is written once, in plain torch, over a few numbers taken from the format. It runs compiled, with those
numbers as run-time tensors, so that one compilation serves every ``fp(e,m,b)``; or op by op on small pieces; or, as
``inline_*``, traced into a graph with the numbers as constants.
"""

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType

import torch
from torch import Tensor, library

from assign.errors import FormatError
from assign.formats import FORMATS, Format, Scaling, parse_format
from assign.kernels import BIAS, INF, MAGNITUDE, WIDTH, Scale, Work, bits_of, coding, quantizing
from assign.promotion import find_slot, format_named

_FLOATS = {torch.float32: FORMATS["fp32"], torch.bfloat16: FORMATS["bf16"], torch.float16: FORMATS["fp16"]}

_WORTH_COMPILING = 2**14  # elements; below that nobody waits for a compiler
_PIECE = 2**16  # elements at a time without one: temporaries stay in the processor's cache
_DEVICE_PIECE = 2**22  # the same where every launch costs


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that ``formats`` calls ``name``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


# ---- running a kernel: compiled, or op by op

_choice: ContextVar[bool | None] = ContextVar("assign_use_compiled", default=None)


@contextmanager
def use_compiled(choice: bool | None) -> Iterator[None]:
    """Choose inside this context: True compiles at every size and raises if that fails; False runs op by op.

    None, the default, compiles for large tensors and falls back, with one logged warning, where no compiler works.
    The results are the same bit for bit.
    """
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


@functools.cache
def _compiler_failed(device_type: str) -> threading.Event:
    return threading.Event()


@functools.cache
def _compiled(kernel: Callable[..., Tensor], source: torch.dtype, target: torch.dtype) -> Callable[..., None]:
    def store(
        x: Tensor, scale: Tensor, inverse: Tensor, ints: Tensor, floats: Tensor, out: Tensor, *key: Tensor
    ) -> None:
        out.copy_(kernel(x, Scale(scale, inverse), (*ints.unbind(), *floats.unbind()), *key))

    # Dynamo limits how many variants one code object may have: give each pair of dtypes its own
    code = store.__code__.replace(co_name=f"store{kernel.__name__}_{source}_{target}".replace("torch.", ""))
    own = FunctionType(code, store.__globals__, closure=store.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True)


@functools.lru_cache(maxsize=1024)
def _tensors(ints: tuple[int, ...], floats: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return (
            torch.tensor(ints, dtype=torch.int32, device=device),
            torch.tensor(floats, dtype=torch.float32, device=device),
        )


@functools.lru_cache(maxsize=64)
def _one(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones((), dtype=torch.float32, device=device)


def _scale_of(work: Work, scale: Tensor | None, device: torch.device) -> Scale | None:
    if scale is None:
        if work.unit == 1.0:
            return None
        scale = _one(device)
    scale = scale.reshape(()) * work.unit
    return Scale(scale, scale.reciprocal())


def _flat(x: Tensor) -> Tensor:
    """A dense tensor as one axis, in the order of its memory; no view, whose base would make Dynamo compile again."""
    flat = torch.empty(0, dtype=x.dtype, device=x.device)
    return flat.set_(x.untyped_storage(), x.storage_offset(), (x.numel(),), (1,))


@torch.no_grad()
def _run(work: Work, x: Tensor, scale: Tensor | None, dtype: torch.dtype, key: Tensor | None = None) -> Tensor:
    result = torch.empty_like(x, dtype=dtype)
    if not x.numel():
        return result
    if key is not None and not x.is_contiguous():  # random bits go by the place in the shape, not in memory
        return result.copy_(_run(work, x.contiguous(), scale, dtype, key))
    keys = () if key is None else (key,)
    dense = x if x.stride() == result.stride() else torch.empty_like(x).copy_(x)
    source, target = _flat(dense), _flat(result)
    scales = _scale_of(work, scale, x.device)
    numbers = _tensors(work.ints, work.floats, x.device)
    fused = scales or [_one(x.device)] * 2
    if _ran_compiled(x, lambda: _compiled(work.kernel, x.dtype, dtype)(source, *fused, *numbers, target, *keys)):
        return result
    for part, out in zip(_pieces(source), _pieces(target), strict=True):
        place = () if key is None else (key, part.storage_offset() - source.storage_offset())
        out.copy_(work.kernel(part, scales, (*work.ints, *work.floats), *place))
    return result


def _ran_compiled(x: Tensor, run: Callable[[], None]) -> bool:
    """Whether compiled code was wanted for ``x`` and ``run`` went through."""
    choice, failed = _choice.get(), _compiler_failed(x.device.type)
    if not (choice or (choice is None and x.numel() >= _WORTH_COMPILING and not failed.is_set())):
        return False
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if choice:
            raise
        failed.set()
        logging.getLogger("assign").warning(
            "torch.compile does not work here for %s (%s: %s); rounding runs op by op, more slowly.",
            x.device.type,
            type(error).__name__,
            str(error).strip().partition("\n")[0],
        )
        return False
    return True


def _pieces(flat: Tensor) -> tuple[Tensor, ...]:
    return torch.split(flat, _PIECE if flat.device.type == "cpu" else _DEVICE_PIECE)


@functools.cache
def _compiled_count(source: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], None]:
    def store(x: Tensor, threshold: Tensor, out: Tensor) -> None:
        out.copy_((x.abs() >= threshold).sum())

    code = store.__code__.replace(co_name=f"count_{source}".replace("torch.", ""))  # as above
    return torch.compile(FunctionType(code, store.__globals__), dynamic=True, fullgraph=True)


@torch.no_grad()
def _count_overflow(x: Tensor, fmt: Format) -> Tensor:
    """How many elements overflow: int64 without axes."""
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    if not x.numel():
        return count
    flat = _flat(x if x.stride() == torch.empty_like(x, device="meta").stride() else x.clone())
    _, threshold = _tensors((), (fmt.overflow_threshold,), x.device)
    if not _ran_compiled(x, lambda: _compiled_count(x.dtype)(flat, threshold[0], count)):
        for part in _pieces(flat):
            count += (part.abs() >= fmt.overflow_threshold).sum()
    return count


def _key(seed: Tensor, stream: int) -> Tensor:
    """The two words that random bits are made from: int64 [2]."""
    seed = seed.reshape(())
    return torch.stack((seed & 0xFFFFFFFF, (seed >> 32) + stream))


def _cast(x: Tensor, fmt: Format, saturate: bool, dtype: torch.dtype) -> Tensor:
    """To a torch dtype by torch's own cast, which rounds these three right, and then to ``dtype``."""
    result = torch.empty_like(x, dtype=torch_dtype(fmt.code_dtype)).copy_(x)
    if saturate and fmt.mantissa_bits < WIDTH:
        result.clamp_(-fmt.max_value, fmt.max_value)
    return result if result.dtype == dtype else torch.empty_like(result, dtype=dtype).copy_(result)


# ---- for tracing into a graph


def inline_quantize(x: Tensor, scale: Tensor | None, fmt: Format, saturate: bool, dtype: torch.dtype) -> Tensor:
    """``assign::quantize`` as plain torch operators with constants, for a compiler to fuse with its neighbours.

    Not for stochastic formats: their arithmetic is long, and as operators they share one compiled kernel.
    ``scale`` is a power of two from ``amax_scale`` or ``inline_scale``. No step is a cast to bf16 and back, which
    Inductor takes the liberty to leave out.
    """
    if fmt.native == "float32":
        return x.to(dtype)
    return _inline(quantizing(fmt, saturate), x, scale).to(dtype)


def inline_scale(x: Tensor, fmt: Format) -> Tensor:
    """``assign::scale`` as plain torch operators. ``x`` must have elements."""
    low, high = torch.aminmax(x)
    amax = torch.maximum(-low, high).to(torch.float32).view(torch.int32) & MAGNITUDE
    limit = bits_of(fmt.max_value)
    lowest, highest = fmt.scale_exponents
    # the exponent of amax less that of max_value, and one more if the mantissa of amax is the larger
    carry = (1 << WIDTH) - 1 - (limit & ((1 << WIDTH) - 1))
    exponent = (((amax + carry) >> WIDTH) - (limit >> WIDTH)).clamp(lowest, highest)
    scale = torch.where(amax == 0, bits_of(1.0), (exponent + BIAS) << WIDTH)
    return torch.where(amax > INF, amax, scale).view(torch.float32)


def inline_encode(x: Tensor, scale: Tensor | None, fmt: Format) -> Tensor:
    """``assign::encode`` as plain torch operators."""
    dtype = torch_dtype(fmt.code_dtype)
    return x.to(dtype) if dtype.is_floating_point else _inline(coding(fmt)[0], x, scale).to(dtype)


def inline_decode(codes: Tensor, scale: Tensor | None, fmt: Format, dtype: torch.dtype) -> Tensor:
    """``assign::decode`` as plain torch operators."""
    if torch_dtype(fmt.code_dtype).is_floating_point:
        return codes.to(dtype)
    return _inline(coding(fmt)[1], codes, scale).to(dtype)


def _inline(work: Work, x: Tensor, scale: Tensor | None) -> Tensor:
    scales = None
    if scale is not None or work.unit != 1.0:
        scale = x.new_ones((), dtype=torch.float32) if scale is None else scale.reshape(())
        scale = scale * work.unit
        # of a power of two, exactly: its exponent with the other sign
        scales = Scale(scale, ((2 * BIAS << WIDTH) - scale.view(torch.int32)).view(torch.float32))
    return work.kernel(x, scales, (*work.ints, *work.floats))


# ---- registered operators: functional, strides as ``empty_like`` gives them; a format's name may be a slot's


@library.custom_op("assign::quantize", mutates_args=())
def _quantize_op(
    x: Tensor,
    scale: Tensor | None,
    format: str,
    saturate: bool,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    slot = find_slot(format)
    fmt = slot.format if slot else parse_format(format)
    if slot and slot.measuring:
        slot.record(_count_overflow(x, fmt), x.numel())
    if fmt.stochastic:
        if seed is None:
            raise FormatError(f"{fmt.name!r} needs a seed, and none was given.\n  Take it from draw_seed().")
        return _run(quantizing(fmt, saturate), x, scale, dtype, _key(seed, stream))
    if scale is None and fmt.native == fmt.code_dtype:
        return _cast(x, fmt, saturate, dtype)
    return _run(quantizing(fmt, saturate), x, scale, dtype)


@_quantize_op.register_fake
def _(
    x: Tensor,
    scale: Tensor | None,
    format: str,
    saturate: bool,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@library.custom_op("assign::seed", mutates_args=(), tags=torch.Tag.nondeterministic_seeded)
def _seed_op(device: torch.device) -> Tensor:
    return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device=device)


@_seed_op.register_fake
def _(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


@library.custom_op("assign::scale", mutates_args=())
def _scale_op(x: Tensor, format: str) -> Tensor:
    if not x.numel():
        return x.new_ones((), dtype=torch.float32)
    return inline_scale(x, format_named(format))


@_scale_op.register_fake
def _(x: Tensor, format: str) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


@library.custom_op("assign::encode", mutates_args=())
def _encode_op(x: Tensor, scale: Tensor | None, format: str) -> Tensor:
    fmt = format_named(format)
    dtype = torch_dtype(fmt.code_dtype)
    if dtype.is_floating_point:
        return torch.empty_like(x, dtype=dtype).copy_(x)
    return _run(coding(fmt)[0], x, scale, dtype)


@_encode_op.register_fake
def _(x: Tensor, scale: Tensor | None, format: str) -> Tensor:
    return torch.empty_like(x, dtype=torch_dtype(format_named(format).code_dtype))


@library.custom_op("assign::decode", mutates_args=())
def _decode_op(codes: Tensor, scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    if codes.is_floating_point():
        return torch.empty_like(codes, dtype=dtype).copy_(codes)
    return _run(coding(format_named(format))[1], codes, scale, dtype)


@_decode_op.register_fake
def _(codes: Tensor, scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


# ---- the same for people, with their arguments checked


def quantize(
    x: Tensor,
    fmt: Format | str,
    *,
    scale: Tensor | None = None,
    saturate: bool = True,
    dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Round ``x / scale`` to a value of ``fmt``, as the format says, and multiply by ``scale``.

    >>> quantize(torch.tensor([1.0625, 100.0, -0.0]), "fp(4,3,4)")
    tensor([ 1.1250, 30.0000, -0.0000])
    >>> quantize(torch.full((8,), 1.0625), "fp(4,3,4):sr", seed=torch.tensor(1)).unique()
    tensor([1.0000, 1.1250])

    Args:
        x: any shape; float32, bfloat16 or float16.
        scale: float32, one element; a power of two, as ``amax_scale`` gives it (with any other, ``x / scale`` and the
            product with ``scale`` are rounded too). None: 1, or for a scaled format ``amax_scale(x, fmt)``.
        saturate: what beyond ±``fmt.max_value`` becomes, inf included: that limit, or else ±inf. NaN stays NaN.
        dtype: of the result; it must hold every value of ``fmt``. None: that of ``x`` if it does, else the carrier.
        seed: int64, one element, not negative: which way a stochastic format rounds. None: ``draw_seed``, so that
            ``torch.manual_seed`` says it. Formats that round to nearest take no notice of it.
    Returns:
        A fresh tensor, of the shape of ``x`` and, where ``x`` is dense, of its strides.
    Raises:
        FormatError: an unknown format, or a dtype, scale or seed that does not fit.
    """
    fmt = _checked(x, fmt, scale)
    _check_seed(fmt, seed, x.device)
    if fmt.scaling is Scaling.POW2 and scale is None:
        scale = amax_scale(x, fmt)
    if fmt.stochastic and seed is None:
        seed = draw_seed(x.device)
    if dtype is None:
        dtype = x.dtype if _FLOATS[x.dtype].contains(fmt) else torch_dtype(fmt.carrier)
    _check_holds(dtype, fmt)
    result: Tensor = _quantize_op(x, scale, fmt.name, saturate, dtype, seed)
    return result


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """A seed for stochastic rounding, from torch's generator of ``device``: int64 without axes, there."""
    seed: Tensor = _seed_op(torch.device(device))
    return seed


def amax_scale(x: Tensor, fmt: Format | str) -> Tensor:
    """The smallest power of two with which the largest magnitude in ``x`` lands within ``fmt.max_value``.

    It is held within ``fmt.scale_exponents``, so that every scaled value is exact in the carrier; only magnitudes
    in the last binade of bfloat16 can then overflow. All zero or no elements: 1. Any NaN: NaN.

    Args:
        x: any shape; float32, bfloat16 or float16.
    Returns:
        float32, no axes, on the device of ``x``; ``x ≈ q · scale``.
    Raises:
        FormatError: an unknown format, or one without scale.
    Source: arXiv 2209.05433, section 3 (there the reciprocal).
    """
    fmt = _checked(x, fmt, None)
    if fmt.scaling is Scaling.NONE:
        scaled = ", ".join(name for name, row in FORMATS.items() if row.scaling is not Scaling.NONE)
        raise FormatError(f"{fmt.name!r} has no scale.\n  Formats with one: {scaled}.\n  Choose one of these.")
    scale: Tensor = _scale_op(x, fmt.name)
    return scale


def encode(x: Tensor, fmt: Format | str, *, scale: Tensor | None = None) -> Tensor:
    """The codes, sign | exponent | mantissa, of values that ``quantize`` returned for the same ``fmt`` and ``scale``.

    Lossless for every value of the format. Inf and NaN in a format that has no such code become ±``max_value``,
    as in any cast that saturates; values off the grid lose bits without rounding.

    Args:
        x: any shape; float32, bfloat16 or float16.
        scale: as given to ``quantize``; a scaled format needs it.
    Returns:
        Shape and strides as ``quantize`` has them; dtype ``fmt.code_dtype``.
    Raises:
        FormatError: an unknown format, a dtype or scale that does not fit, a scale that is missing.
    Source: OCP OFP8 1.0 (e4m3, e5m2); arXiv 2301.13464 (fp(e,m,b)).
    """
    fmt = _checked(x, fmt, scale)
    _check_scaled(fmt, scale)
    codes: Tensor = _encode_op(x, scale, fmt.name)
    return codes


def decode(
    codes: Tensor, fmt: Format | str, *, scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The values behind ``encode``'s codes.

    Args:
        codes: any shape; dtype ``fmt.code_dtype``.
        scale: as given to ``encode``.
        dtype: of the result; it must hold every value of ``fmt``. None: the format's carrier.
    Raises:
        FormatError: an unknown format, a dtype or scale that does not fit, a scale that is missing.
    """
    fmt = parse_format(fmt) if isinstance(fmt, str) else fmt
    if codes.dtype != torch_dtype(fmt.code_dtype):
        raise FormatError(
            f"Codes of {fmt.name!r} are {fmt.code_dtype}, these are {_name(codes.dtype)}.\n"
            "  Pass what encode() returned for the same format."
        )
    _check_scale(fmt, scale, codes.device)
    _check_scaled(fmt, scale)
    dtype = dtype or torch_dtype(fmt.carrier)
    _check_holds(dtype, fmt)
    result: Tensor = _decode_op(codes, scale, fmt.name, dtype)
    return result


def _checked(x: Tensor, fmt: Format | str, scale: Tensor | None) -> Format:
    fmt = parse_format(fmt) if isinstance(fmt, str) else fmt
    if x.dtype not in _FLOATS:
        raise FormatError(
            f"A {_name(x.dtype)} tensor cannot be rounded to {fmt.name!r}.\n"
            f"  Allowed: {', '.join(map(_name, _FLOATS))}.\n  Convert it first."
        )
    _check_scale(fmt, scale, x.device)
    return fmt


def _check_scale(fmt: Format, scale: Tensor | None, device: torch.device) -> None:
    if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32 or scale.device != device):
        raise FormatError(
            f"The scale for {fmt.name!r} is {_name(scale.dtype)} of shape {list(scale.shape)} on {scale.device}.\n"
            f"  Allowed: float32, one element, on {device}, where the tensor is.\n  Take it from amax_scale()."
        )


def _check_seed(fmt: Format, seed: Tensor | None, device: torch.device) -> None:
    if seed is not None and (seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device):
        raise FormatError(
            f"The seed for {fmt.name!r} is {_name(seed.dtype)} of shape {list(seed.shape)} on {seed.device}.\n"
            f"  Allowed: int64, one element, on {device}, where the tensor is.\n  Take it from draw_seed()."
        )


def _check_scaled(fmt: Format, scale: Tensor | None) -> None:
    if fmt.scaling is Scaling.POW2 and scale is None:
        raise FormatError(f"{fmt.name!r} needs a scale, and none was given.\n  Pass the one given to quantize().")


def _check_holds(dtype: torch.dtype, fmt: Format) -> None:
    holding = [_name(each) for each, row in _FLOATS.items() if row.contains(fmt)]
    if _name(dtype) not in holding:
        raise FormatError(
            f"{_name(dtype)} does not hold every value of {fmt.name!r}.\n"
            f"  Allowed: {', '.join(holding)}.\n  Pass one of these as dtype, or None."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
