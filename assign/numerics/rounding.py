"""Round to a format, compute scales, encode and decode: definitions and registered operators.

The results are the same on every device and torch release, whatever their own casts do:

* NaN stays NaN and −0 stays −0; a value below half of the smallest subnormal becomes a zero of its sign;
* a value beyond the format, inf included, becomes ±``max_value`` with ``saturate`` (forward tensors), otherwise ±inf
  (backward tensors, so that the loss scaler sees it); ``fp32`` changes nothing;
* posits have neither −0 nor inf: −0 becomes 0, finite values saturate in any case, and without ``saturate`` inf becomes
  NaN, so that the loss scaler sees it. No finite value becomes NaN, and none but 0 becomes 0, or, in the variant
  ``:underflow``, those below :attr:`assign.formats.posits.Posit.underflow_threshold` too;
* ``x ≈ q · scale``, with ``q`` on the format's grid;
* a stochastic format rounds a value between two neighbours to either of them, so that its mean is the value: exactly,
  or to 2^-31 of the smallest subnormal below ``min_normal``. A value on the grid stays as it is. Overflow is rounded as
  if the format continued: a value between ``max_value`` and the next value is rounded up with some probability, and
  then overflows as above.

Stochastic rounding is a function of a *seed*, which is drawn from torch's generator at the beginning of the graph, of a
stream number for the tensor, and of the element's place in the tensor's shape. Only one small operator draws random
numbers, so a compiler cannot change their order, and rounding itself is pure: a value is rounded to the same result if
it is computed again in the backward pass, in other pieces, in another layout or by another compiler.
``torch.manual_seed`` makes a run repeatable.

Each kernel is written once, in plain torch, over a few numbers taken from the format (:mod:`assign.numerics.kernels`,
:mod:`assign.numerics.posits`), and run by :mod:`assign.numerics.dispatch`.
"""

import zlib
from typing import Any

import torch
from torch import Tensor

from assign.errors import FormatError
from assign.formats.parsing import parse_format
from assign.formats.posits import Posit
from assign.formats.rows import FORMATS, Format
from assign.formats.tables import Table
from assign.numerics import kernels, posits, tables
from assign.numerics.delayed import History
from assign.numerics.dispatch import (
    amax_bits,
    count_at_least,
    find_scale,
    run,
    run_measured,
    run_scaled,
    use_compiled,
)
from assign.numerics.kernels import WIDTH, Work, scaling
from assign.numerics.registry import register
from assign.numerics.runtime_formats import Runtime, current_format
from assign.numerics.torch_dtypes import ROUNDED, SIXTEEN_BITS, dtype_name, torch_dtype

STOCHASTIC = {dtype: parse_format(f"{name}:sr") for dtype, name in SIXTEEN_BITS.items()}
"""16-bit dtype → format that rounds to it stochastically. A dict, because compiled optimizers look up in it."""


def key_of(seed: Tensor, stream: int) -> Tensor:
    """Return the two words from which random bits are made: int64 [2]."""
    seed = seed.reshape(())
    return torch.stack((seed & 0xFFFFFFFF, (seed >> 32) + stream))


def stream_of(key: str) -> int:
    """Return the stream number of the tensor ``key``: it selects its random bits under a seed shared with others."""
    return zlib.crc32(key.encode())


def _quantizing(fmt: Format, saturate: bool) -> Work:
    """Return the kernel that rounds to a format, and its numbers."""
    if isinstance(fmt.layout, Posit):
        return posits.quantizing(fmt.layout, saturate)
    return tables.quantizing(fmt.layout, saturate) if fmt.layout else kernels.quantizing(fmt, saturate)


def _coding(fmt: Format) -> tuple[Work, Work]:
    """Return encoder and decoder of a format."""
    if isinstance(fmt.layout, Posit):
        return posits.coding(fmt.layout)
    return tables.coding(fmt.layout) if fmt.layout else kernels.coding(fmt)


def _run(
    fmt: Format, work: Work, x: Tensor, scale: Tensor | None, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Run a kernel of a format. That of a table is run operator by operator: it would be compiled for each format."""
    if not isinstance(fmt.layout, Table):
        return run(work, x, scale, dtype, out=out)
    with use_compiled(False):
        return run(work, x, scale, dtype, out=out)


def _cast(x: Tensor, fmt: Format, saturate: bool, dtype: torch.dtype) -> Tensor:
    """Convert to the format with torch's own cast, which rounds these three dtypes correctly, and then to ``dtype``."""
    result = torch.empty_like(x, dtype=torch_dtype(fmt.code_dtype)).copy_(x)
    if saturate and fmt.mantissa_bits < WIDTH:
        result.clamp_(-fmt.max_value, fmt.max_value)
    return result if result.dtype == dtype else torch.empty_like(result, dtype=dtype).copy_(result)


def inline_cast(x: Tensor, fmt: Format, saturate: bool, dtype: torch.dtype) -> Tensor:
    """Return ``assign::quantize`` to a torch dtype as plain operators with constants, which a compiler can fuse.

    To a 16-bit ``dtype`` it is a cast. As under autocast, Inductor then passes the unrounded value to operators that it
    fuses. In float32 it is arithmetic on bits, because Inductor would remove a cast to 16 bits and back.
    """
    if fmt.native == "float32":
        return x.to(dtype)
    if fmt.native is not None and torch_dtype(fmt.native) == dtype:
        return (x.to(torch.float32).clamp(-fmt.max_value, fmt.max_value) if saturate else x).to(dtype)
    work = _quantizing(fmt, saturate)
    return work.kernel(x, None, (*work.ints, *work.floats)).to(dtype)


# ---- registered operators: strides are those of ``empty_like``; ``runtime`` holds what changes between steps


def _quantize(
    x: Tensor,
    scale: Tensor | None,
    format: str,
    saturate: bool,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    stream: int = 0,
    *,
    runtime: Runtime | None = None,
    key: str = "",
) -> Tensor:
    return _round(x, scale, _watched_format(x, format, runtime, key), saturate, dtype, (seed, stream))


def _quantize_in_place(
    x: Tensor,
    scale: Tensor | None,
    format: str,
    saturate: bool,
    seed: Tensor | None = None,
    stream: int = 0,
    *,
    runtime: Runtime | None = None,
    key: str = "",
) -> None:
    _round(x, scale, _watched_format(x, format, runtime, key), saturate, x.dtype, (seed, stream), out=x)


def _watched_format(x: Tensor, name: str, runtime: Runtime | None, key: str) -> Format:
    """Return the current format, after counting overflow if promotion measures this tensor."""
    fmt = current_format(name, runtime, key)
    slot = runtime.slots.get(key) if runtime is not None else None
    if slot and slot.measuring:
        slot.record(count_at_least(x, fmt.overflow_threshold), x.numel())
    return fmt


def _round(
    x: Tensor,
    scale: Tensor | None,
    fmt: Format,
    saturate: bool,
    dtype: torch.dtype,
    randomness: tuple[Tensor | None, int],
    out: Tensor | None = None,
) -> Tensor:
    if fmt.stochastic:
        seed, stream = randomness
        if seed is None:
            raise FormatError(f"{fmt.name!r} needs a seed, and none was given.\n  Take it from draw_seed().")
        return run(_quantizing(fmt, saturate), x, scale, dtype, key_of(seed, stream), out=out)
    if scale is None and fmt.native == fmt.code_dtype:
        cast = _cast(x, fmt, saturate, dtype)
        return cast if out is None else out.copy_(cast)
    return _run(fmt, _quantizing(fmt, saturate), x, scale, dtype, out)


def _scale(x: Tensor, format: str, *, runtime: Runtime | None = None, key: str = "") -> Tensor:
    history = _history(runtime, key)
    if history is None:
        return find_scale(scaling(parse_format(format)), x)
    history.record(amax_bits(x))
    return _known_scale(history, x)


def _history(runtime: Runtime | None, key: str) -> History | None:
    return runtime.histories.get(key) if runtime is not None else None


def _known_scale(history: History, x: Tensor) -> Tensor:
    """Return a new copy of the scale for this step."""
    return find_scale(scaling(history.format), x) if history.scale is None else history.scale.clone()


def _scale_quantize(
    x: Tensor, format: str, saturate: bool, dtype: torch.dtype, *, runtime: Runtime | None = None, key: str = ""
) -> tuple[Tensor, Tensor]:
    """Compute the scale and quantize with it in one pass; return result and scale. Not for stochastic formats."""
    return _scale_and_round(x, parse_format(format), saturate, dtype, _history(runtime, key), None)


def _scale_quantize_in_place(
    x: Tensor, format: str, saturate: bool, *, runtime: Runtime | None = None, key: str = ""
) -> Tensor:
    return _scale_and_round(x, parse_format(format), saturate, x.dtype, _history(runtime, key), x)[1]


def _scale_and_round(
    x: Tensor, fmt: Format, saturate: bool, dtype: torch.dtype, history: History | None, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    if history is None:
        return run_scaled(_quantizing(fmt, saturate), scaling(fmt), x, dtype, out=out)
    scale = _known_scale(history, x)
    result, largest = run_measured(_quantizing(history.format, saturate), x, scale, dtype, out=out)
    history.record(largest)
    return result, scale


def _encode(x: Tensor, scale: Tensor | None, format: str, *, runtime: Runtime | None = None, key: str = "") -> Tensor:
    fmt = current_format(format, runtime, key)
    dtype = torch_dtype(fmt.code_dtype)
    if dtype.is_floating_point:
        return torch.empty_like(x, dtype=dtype).copy_(x)
    return _run(fmt, _coding(fmt)[0], x, scale, dtype)


def _decode(
    codes: Tensor,
    scale: Tensor | None,
    format: str,
    dtype: torch.dtype,
    *,
    runtime: Runtime | None = None,
    key: str = "",
) -> Tensor:
    if codes.is_floating_point():
        return torch.empty_like(codes, dtype=dtype).copy_(codes)
    fmt = current_format(format, runtime, key)
    return _run(fmt, _coding(fmt)[1], codes, scale, dtype)


def _seed(device: torch.device) -> Tensor:
    return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device=device)


def _scalar(x: Tensor, **_rest: Any) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _like(x: Tensor, dtype: torch.dtype, **_rest: Any) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _codes_like(x: Tensor, format: str, **_rest: Any) -> Tensor:
    return torch.empty_like(x, dtype=torch_dtype(parse_format(format).code_dtype))


register("quantize", _quantize, _like)
register("quantize_", _quantize_in_place, lambda **_: None, mutates="x")
register("scale", _scale, _scalar)
register("scale_quantize", _scale_quantize, lambda x, **rest: (_like(x, **rest), _scalar(x)))
register("scale_quantize_", _scale_quantize_in_place, _scalar, mutates="x")
register("encode", _encode, _codes_like)
register("decode", _decode, lambda codes, dtype, **_: _like(codes, dtype))
register("seed", _seed, lambda device: torch.empty((), dtype=torch.int64, device=device), draws=True)


# ---- public functions, which check their arguments


def quantize(
    x: Tensor,
    fmt: Format | str,
    *,
    scale: Tensor | None = None,
    saturate: bool = True,
    dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Round ``x / scale`` to a value of ``fmt``, with the rounding mode of ``fmt``, and multiply by ``scale``.

    Args:
        x: any shape; float32, bfloat16 or float16.
        fmt: a format or its name.
        scale: float32, one element, as returned by ``amax_scale``. If it is no power of two, ``x / scale`` and the
            product with ``scale`` are rounded too. None: 1, or for a scaled format ``amax_scale(x, fmt)``.
        saturate: whether values beyond ±``fmt.max_value``, inf included, become that limit; otherwise they become ±inf.
            NaN stays NaN. Finite values beyond a posit saturate in any case; otherwise inf becomes NaN there.
        dtype: dtype of the result; it must hold every value of ``fmt``. None: that of ``x`` if it does, else the
            carrier.
        seed: int64, one element, not negative: the seed of a stochastic format. None: ``draw_seed``, which follows
            ``torch.manual_seed``. Formats that round to nearest ignore it.
    Returns:
        A new tensor, of the shape of ``x`` and, if ``x`` is dense, of its strides.
    Raises:
        FormatError: an unknown format, or a dtype, scale or seed that does not fit.
    Examples:
        >>> quantize(torch.tensor([1.0625, 100.0, -0.0]), "fp(4,3,4)")
        tensor([ 1.1250, 30.0000, -0.0000])
        >>> quantize(torch.full((8,), 1.0625), "fp(4,3,4):sr", seed=torch.tensor(1)).unique()
        tensor([1.0000, 1.1250])
    """
    fmt = _checked(x, fmt, scale)
    _check_seed(fmt, seed, x.device)
    if fmt.scaled and scale is None:
        scale = amax_scale(x, fmt)
    if fmt.stochastic and seed is None:
        seed = draw_seed(x.device)
    if dtype is None:
        dtype = x.dtype if ROUNDED[x.dtype].contains(fmt) else torch_dtype(fmt.carrier)
    _check_holds(dtype, fmt)
    result: Tensor = torch.ops.assign.quantize(x, scale, fmt.name, saturate, dtype, seed)
    return result


def round_in_place(x: Tensor, fmt: Format) -> None:
    """Round a float32 tensor to a format without scale that rounds to nearest; values beyond it saturate."""
    torch.ops.assign.quantize_(x.detach(), None, fmt.name, True)


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """Return a seed for stochastic rounding from torch's generator of ``device``: int64 without axes, on ``device``."""
    seed: Tensor = torch.ops.assign.seed(torch.device(device))
    return seed


def amax_scale(x: Tensor, fmt: Format | str) -> Tensor:
    """Return the scale with which ``x`` fills the format.

    With ``amax`` scaling it is the largest magnitude divided by ``fmt.max_value``. With ``pow2`` scaling it is the
    smallest power of two that brings the largest magnitude within ``fmt.max_value``, so that scaling rounds nothing.
    The scale is clamped to ``fmt.scale_exponents``: only magnitudes in the last binade of bfloat16 can then overflow.
    Elements that are not finite are ignored: they saturate, or stay NaN. If no element is both finite and nonzero, the
    scale is 1. For a format with delayed scaling, the scale is that of a first step, which has no earlier steps.

    Args:
        x: any shape; float32, bfloat16 or float16.
        fmt: a format with a scale, or its name.
    Returns:
        float32, no axes, on the device of ``x``; ``x ≈ q · scale``.
    Raises:
        FormatError: an unknown format, or one without scale.
    Source: arXiv 2209.05433, section 3 (there the reciprocal).
    """
    fmt = _checked(x, fmt, None)
    if not fmt.scaled:
        scaled = ", ".join(name for name, row in FORMATS.items() if row.scaled)
        raise FormatError(f"{fmt.name!r} has no scale.\n  Formats with one: {scaled}.\n  Choose one of these.")
    scale: Tensor = torch.ops.assign.scale(x, fmt.name)
    return scale


def encode(x: Tensor, fmt: Format | str, *, scale: Tensor | None = None) -> Tensor:
    """Return the codes of values that ``quantize`` returned for the same ``fmt`` and ``scale``.

    A code is sign | exponent | mantissa, or a posit. Encoding is lossless for every value of the format. Inf and NaN in
    a format that has no such code become ±``max_value``, as in any cast that saturates; values off the grid become the
    nearest code.

    Args:
        x: any shape; float32, bfloat16 or float16.
        fmt: a format or its name.
        scale: as given to ``quantize``; a scaled format needs it.
    Returns:
        Shape and strides as in the result of ``quantize``; dtype ``fmt.code_dtype``.
    Raises:
        FormatError: an unknown format, a dtype or scale that does not fit, a scale that is missing.
    Source: OCP OFP8 1.0 (e4m3, e5m2); arXiv 2301.13464 (fp(e,m,b)); Posit Standard 2022.
    """
    fmt = _checked(x, fmt, scale)
    _check_scaled(fmt, scale)
    codes: Tensor = torch.ops.assign.encode(x, scale, fmt.name)
    return codes


def decode(
    codes: Tensor, fmt: Format | str, *, scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the values of the codes that ``encode`` returned.

    Args:
        codes: any shape; dtype ``fmt.code_dtype``.
        fmt: the format of the codes, or its name.
        scale: as given to ``encode``.
        dtype: dtype of the result; it must hold every value of ``fmt``. None: the format's carrier.
    Raises:
        FormatError: an unknown format, a dtype or scale that does not fit, a scale that is missing.
    """
    fmt = parse_format(fmt) if isinstance(fmt, str) else fmt
    if codes.dtype != torch_dtype(fmt.code_dtype):
        raise FormatError(
            f"Codes of {fmt.name!r} are {fmt.code_dtype}, these are {dtype_name(codes.dtype)}.\n"
            "  Pass what encode() returned for the same format."
        )
    _check_scale(fmt, scale, codes.device)
    _check_scaled(fmt, scale)
    dtype = dtype or torch_dtype(fmt.carrier)
    _check_holds(dtype, fmt)
    result: Tensor = torch.ops.assign.decode(codes, scale, fmt.name, dtype)
    return result


def _checked(x: Tensor, fmt: Format | str, scale: Tensor | None) -> Format:
    fmt = parse_format(fmt) if isinstance(fmt, str) else fmt
    if x.dtype not in ROUNDED:
        raise FormatError(
            f"A {dtype_name(x.dtype)} tensor cannot be rounded to {fmt.name!r}.\n"
            f"  Allowed: {', '.join(map(dtype_name, ROUNDED))}.\n  Convert it first."
        )
    _check_scale(fmt, scale, x.device)
    return fmt


def _check_scale(fmt: Format, scale: Tensor | None, device: torch.device) -> None:
    if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32 or scale.device != device):
        raise FormatError(
            f"The scale for {fmt.name!r} is {dtype_name(scale.dtype)} of shape {list(scale.shape)} on {scale.device}.\n"
            f"  Allowed: float32, one element, on {device}, where the tensor is.\n  Take it from amax_scale()."
        )


def _check_seed(fmt: Format, seed: Tensor | None, device: torch.device) -> None:
    if seed is not None and (seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device):
        raise FormatError(
            f"The seed for {fmt.name!r} is {dtype_name(seed.dtype)} of shape {list(seed.shape)} on {seed.device}.\n"
            f"  Allowed: int64, one element, on {device}, where the tensor is.\n  Take it from draw_seed()."
        )


def _check_scaled(fmt: Format, scale: Tensor | None) -> None:
    if fmt.scaled and scale is None:
        raise FormatError(f"{fmt.name!r} needs a scale, and none was given.\n  Pass the one given to quantize().")


def _check_holds(dtype: torch.dtype, fmt: Format) -> None:
    holding = [dtype_name(each) for each, row in ROUNDED.items() if row.contains(fmt)]
    if dtype_name(dtype) not in holding:
        raise FormatError(
            f"{dtype_name(dtype)} does not hold every value of {fmt.name!r}.\n"
            f"  Allowed: {', '.join(holding)}.\n  Pass one of these as dtype, or None."
        )
