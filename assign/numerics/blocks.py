"""Block formats: operators that pack saved activations into a few bits per element.

The elements of a tensor, in an order of its axes that the caller gives (memory order, for speed), are split into
blocks. The encoded tensor is one flat uint8 tensor: the codes of all blocks, then the shared values of all blocks. The
last block is filled up with copies of the last element. The codes of a block are those of its elements at even places,
then of those at odd places. With fewer than 8 bits, byte ``j`` of its ``w`` bytes holds the codes at the places ``j``,
``j + w``, ``j + 2w``, … of this order, lowest bits first.

* Integers: ``x ≈ minimum + code · scale``. The minimum is rounded down to bf16, and then the scale is rounded up:
  nothing is clipped, and the noise is at most half a step of this widened range (with stochastic rounding: less than
  one step).
* ``e4m3:block64``: ``x ≈ element · scale``, with the scale rounded up to bf16, so that nothing is clipped.
* ``mxfp8``, ``mxfp4``: the scale is the largest power of two in the block divided by the largest power of two of an
  element, and elements beyond the largest value saturate (OCP MX 1.0, section 6.3). With stochastic rounding it is the
  smallest power of two with which no element saturates.
* No scale is below 2^-126 (mx: 2^-127). Zeros are exact, except in a block of integers with values below zero.
* A block with a value that is not finite, or of integers whose range float32 does not hold, is decoded to all NaN. A
  value that 16 bits do not hold is decoded to the largest number of the dtype; beyond 2^127, float32 may be decoded to
  infinity.
* With ``:sr`` the mean of the decoded value is the value itself, to 2^-22 of it. As in :mod:`assign.numerics.rounding`,
  stochastic rounding is a function of a seed, of a stream number for the tensor, and of the element's place, here in
  the given order. A graph without a seed draws one at its beginning, which changes the random numbers that it draws
  later, for example for dropout.

Kernels are plain torch in float32, run piece by piece. They read and write two elements of bfloat16 or float32 in one
word, the even one and the odd one, each in a lane: see :mod:`assign.numerics.words`. float16 is converted to float32
first.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from assign import _torch
from assign.errors import FormatError
from assign.formats.parsing import parse_saved
from assign.formats.rows import SAVED_FORMATS, BlockFormat, Format, Shared
from assign.numerics.dispatch import run_rows
from assign.numerics.kernels import BIAS, INF, MAGNITUDE, WIDTH, bits_of, coding, random_bits_at, scaling
from assign.numerics.registry import register
from assign.numerics.rounding import draw_seed, key_of
from assign.numerics.torch_dtypes import ROUNDED
from assign.numerics.words import join, split, word_dtype

_SMALLEST_SCALE = 2.0**-126  # its inverse is a float32
_PIECE, _DEVICE_PIECE = 2**20, 2**22  # elements at a time: few calls, and small temporaries if no compiler works

Kernel = Callable[..., None]
Lanes = Sequence[Tensor]
"""Elements of blocks at even places and at odd places: float32 [n, block / 2] each."""


# ---- x divided by the shared scale (0 if that is not finite), and the shared values as integers [n] to be stored


def _round_up(x: Tensor) -> Tensor:
    """Round positive ``x`` up to bf16."""
    return ((x.view(torch.int32) + 0xFFFF) & -(1 << 16)).view(torch.float32)


def _round_down(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    return (torch.where(bits < 0, bits + 0xFFFF, bits) & -(1 << 16)).view(torch.float32)


def _round_nearest(x: Tensor) -> Tensor:
    """Round to bf16, ties to even, for values that are not beyond its largest value."""
    bits = x.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -(1 << 16)
    return torch.where(x != x, bits_of(torch.nan), rounded).view(torch.float32)  # a NaN's bits may all be set


def _as_bf16(x: Tensor, finite: Tensor) -> Tensor:
    """Return the bits of bf16 values that are stored in float32; NaN where not finite."""
    return torch.where(finite, x.view(torch.int32), bits_of(torch.nan)) >> 16


def _from_bf16(stored: Tensor) -> Tensor:
    return (stored.to(torch.int32) << 16).view(torch.float32)


def _inverse(scale: Tensor) -> Tensor:
    """Return ``1 / scale``, rounded to nearest, of bf16 values that are stored in float32.

    Triton divides float32 approximately but float64 exactly. The result is never near a tie, because no inverse of 8
    bits has a long run of equal bits.
    """
    return scale.double().reciprocal().float() if _torch.writes_triton(scale.device) else scale.reciprocal()


def _steps(lanes: Iterable[Tensor], inverse: Tensor, finite: Tensor) -> Lanes:
    return [torch.where(finite.unsqueeze(1), x * inverse.unsqueeze(1), 0.0) for x in lanes]


def _share_range(lanes: Lanes, levels: int) -> tuple[Lanes, Lanes]:
    low, high = functools.reduce(torch.minimum, lanes).amin(1), functools.reduce(torch.maximum, lanes).amax(1)
    known = high - low < torch.inf
    # compiled code may give another sign of zero, if there are zeros of both signs, and other bits of a NaN
    low, high = _round_down(torch.where(known & (low != 0), low, 0.0)), torch.where(known, high, torch.inf)
    scale = _round_up(((high - low) * (1 / levels)).clamp(min=_SMALLEST_SCALE))
    finite = scale < torch.inf
    steps = _steps((x - low.unsqueeze(1) for x in lanes), _inverse(scale), finite)
    return steps, (_as_bf16(scale, finite), _as_bf16(low, finite))


def _largest(lanes: Lanes) -> Tensor:
    """Return the bits of the largest magnitude of each block."""
    return functools.reduce(torch.maximum, (x.abs() for x in lanes)).amax(1).view(torch.int32) & MAGNITUDE


def _share_scale(lanes: Lanes, element: Format) -> tuple[Lanes, Lanes]:
    magnitude = _largest(lanes)
    scale = _round_up((magnitude.view(torch.float32) * (1 / element.max_value)).clamp(min=_SMALLEST_SCALE))
    return _steps(lanes, _inverse(scale), magnitude < INF), (_as_bf16(scale, magnitude < INF),)


_NAN_POWER, _LARGEST_POWER = 255, 254


def _share_power(lanes: Lanes, element: Format, carry: int) -> tuple[Lanes, Lanes]:
    magnitude = _largest(lanes)
    code = (((magnitude + carry) >> WIDTH) - element.max_exponent).clamp(0, _LARGEST_POWER)
    inverse = ((_LARGEST_POWER - code) << WIDTH).view(torch.float32)
    return _steps(lanes, inverse, magnitude < INF), (torch.where(magnitude < INF, code, _NAN_POWER),)


def _from_power(stored: Tensor) -> Tensor:
    code = stored.to(torch.int32)
    bits = torch.where(code == 0, bits_of(2.0**-127), code << WIDTH)
    return torch.where(code == _NAN_POWER, bits_of(torch.nan), bits).view(torch.float32)


# ---- codes of steps, as int32; ``random``: 31 random bits each; None rounds to nearest


def _whole(steps: Tensor, random: Tensor | None) -> Tensor:
    if random is None:
        return steps.round().to(torch.int32)
    floor = steps.floor()
    return floor.to(torch.int32) + torch.where(random < ((steps - floor) * 2.0**31).to(torch.int32), 1, 0)


def _integers(steps: Tensor, levels: int, random: Tensor | None) -> Tensor:
    return _whole(steps, random).clamp(0, levels)


def _elements(steps: Tensor, element: Format, random: Tensor | None) -> Tensor:
    """Return the codes of steps as sign | exponent | mantissa; steps beyond the largest value saturate.

    The codes of an exponent follow those of the exponent below it, so a carry of the mantissa is correct.
    """
    shift = WIDTH - element.mantissa_bits
    bits = steps.view(torch.int32)
    magnitude = bits & MAGNITUDE
    last = (1 << shift) - 1
    added = (last >> 1) + ((magnitude >> shift) & 1) if random is None else random & last
    normal = ((magnitude + added) >> shift) - ((element.min_exponent + BIAS - 1) << element.mantissa_bits)
    subnormal = _whole(steps.abs().clamp(max=element.min_normal) * (1 / element.min_subnormal), random)
    code = torch.where(magnitude < bits_of(element.min_normal), subnormal, normal)
    largest = (bits_of(element.max_value) >> shift) - ((element.min_exponent + BIAS - 1) << element.mantissa_bits)
    return code.clamp(max=largest) + ((bits >> 31) & (1 << (element.bits - 1)))


# ---- kernels: rows are blocks


@functools.cache
def _encoder(fmt: BlockFormat, dtype: torch.dtype) -> Kernel:
    """Return ``encode(words [n, block / 2], codes [n, 1 or 2, bytes], shared int32 [n] each, key)``.

    It writes all arguments except the words. The key is for stochastic rounding, int64 [3]: two words as in
    :mod:`assign.numerics.rounding`, and the place of the first element.
    """
    levels, count = (1 << fmt.bits) - 1, 8 // fmt.bits
    element = fmt.element
    carry = scaling(element).ints[0] if element and fmt.stochastic else 0

    def share(lanes: Lanes) -> tuple[Lanes, Lanes]:
        if element is None:
            return _share_range(lanes, levels)
        return _share_scale(lanes, element) if fmt.shared is Shared.BF16 else _share_power(lanes, element, carry)

    def draw(key: Tensor, rows: int) -> Sequence[Tensor | None]:
        if not fmt.stochastic:
            return [None] * max(count, 2)
        numbers = torch.arange(rows * fmt.block, dtype=torch.int64, device=key.device) + key[2]
        return [random_bits_at(part, key) for part in _cut(numbers.view(rows, -1, 2).unbind(2), count)]

    def encode(words: Tensor, codes: Tensor, *rest: Tensor) -> None:
        lanes, shared = share(split(words, dtype, 2))
        steps = _cut(lanes, count)
        random = draw(rest[-1], words.shape[0])
        found = [
            _integers(part, levels, by) if element is None else _elements(part, element, by)
            for part, by in zip(steps, random, strict=True)
        ]
        for row, first in zip(codes.unbind(1), range(0, len(found), count), strict=True):
            part = (each << (fmt.bits * i) for i, each in enumerate(found[first : first + count]))
            row.copy_(functools.reduce(torch.bitwise_or, part))
        for place, value in zip(rest, shared, strict=False):
            place.copy_(value)

    return encode


def _cut(lanes: Lanes, count: int) -> Lanes:
    """Split lanes into parts, so that the codes of ``count`` parts share bytes; with 8-bit codes, lanes stay whole."""
    return [part for lane in lanes for part in lane.reshape(lane.shape[0], max(count // 2, 1), -1).unbind(1)]


@functools.cache
def _decoder(fmt: BlockFormat, dtype: torch.dtype) -> Kernel:
    """Return ``decode(words [n, block / 2], codes [n, 1 or 2, bytes], shared float32 [n] each)``; writes the words."""
    mask = (1 << fmt.bits) - 1
    limit = torch.finfo(dtype).max

    def values(codes: list[Tensor], scale: Tensor, *low: Tensor) -> Tensor:
        found = torch.stack(codes, 1).view(scale.shape[0], -1)
        if fmt.element is None:
            x = found.to(torch.float32) * scale.unsqueeze(1) + low[0].unsqueeze(1)
        else:
            work = coding(fmt.element)[1]
            x = work.kernel(found, None, (*work.ints, *work.floats)) * scale.unsqueeze(1)
        return x if dtype == torch.float32 else _round_nearest(x.clamp(-limit, limit))

    def decode(words: Tensor, codes: Tensor, *shared: Tensor) -> None:
        wide = codes.to(torch.int32).unbind(1)
        parts = [(row >> shift) & mask for row in wide for shift in range(0, 8, fmt.bits)]
        lanes = [parts[: len(parts) // 2], parts[len(parts) // 2 :]]
        words.copy_(join([values(lane, *shared) for lane in lanes], dtype))

    return decode


# ---- running the kernels


_STORED = {Shared.BF16: (1, torch.int16), Shared.MINIMUM: (2, torch.int16), Shared.E8M0: (1, torch.uint8)}


def _parts(codes: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Return integer views of codes: [blocks, 1, bytes], 8-bit ones [blocks, 2, bytes / 2]; shared [1 or 2, blocks]."""
    blocks, width = codes.numel() // fmt.block_bytes, fmt.block * fmt.bits // 8
    rows = 2 if fmt.bits == 8 else 1
    count, dtype = _STORED[fmt.shared]
    packed = codes[: blocks * width].view(blocks, rows, width // rows)
    return packed, codes[blocks * width :].view(dtype).view(count, blocks)


def _run(
    make: Callable[..., Kernel], fmt: BlockFormat, flat: Tensor, parts: Sequence[Tensor], key: Tensor | None
) -> None:
    """Run a kernel on all blocks of ``flat``, which a decoder writes, and on the parts that belong to them."""
    whole = flat.numel() // fmt.block * fmt.block
    _run_blocks(make, fmt, flat[:whole], parts, key, first=0)
    left = flat[whole:]
    if left.numel():
        last = torch.cat((left, left[-1:].expand(fmt.block - left.numel())))
        _run_blocks(make, fmt, last, [part[whole // fmt.block :] for part in parts], key, first=whole)
        if make is _decoder:
            left.copy_(last[: left.numel()])


def _run_blocks(
    make: Callable[..., Kernel], fmt: BlockFormat, flat: Tensor, parts: Sequence[Tensor], key: Tensor | None, first: int
) -> None:
    """Run a kernel on whole blocks; the first block begins at element number ``first`` of the tensor."""
    size = (_DEVICE_PIECE if _torch.writes_triton(flat.device) else _PIECE) // fmt.block * fmt.block
    dtype = torch.float32 if flat.dtype == torch.float16 else flat.dtype
    kernel = make(fmt, dtype)
    for start in range(0, flat.numel(), size):
        piece = flat[start : start + size]
        wide = piece.to(dtype)
        if wide.storage_offset() % 2:  # words begin at even elements
            wide = wide.clone()
        words = wide.view(word_dtype(dtype, 2)).view(-1, fmt.block // 2)
        row = start // fmt.block
        own = [part[row : row + len(words)] for part in parts]
        keys = () if key is None else (torch.cat((key, key.new_tensor([first + start]))),)
        run_rows(kernel, (words, *own), *keys)
        if make is _decoder and wide.dtype != piece.dtype:
            limit = torch.finfo(piece.dtype).max
            piece.copy_(wide.clamp_(-limit, limit))


@torch.no_grad()
def _encode_blocks(x: Tensor, format: str, order: list[int], seed: Tensor | None = None, stream: int = 0) -> Tensor:
    fmt = block_format(format)
    key = None
    if fmt.stochastic:
        if seed is None:
            raise FormatError(f"{fmt.name!r} needs a seed, and none was given.\n  Take it from draw_seed().")
        key = key_of(seed, stream)
    codes = torch.empty(fmt.bytes_of(x.numel()), dtype=torch.uint8, device=x.device)
    packed, stored = _parts(codes, fmt)
    shared = torch.empty_like(stored, dtype=torch.int32)
    _run(_encoder, fmt, x.permute(order).reshape(-1).contiguous(), (packed, *shared), key)
    stored.copy_(shared)
    return codes


@torch.no_grad()
def _decode_blocks(codes: Tensor, format: str, size: list[int], order: list[int], dtype: torch.dtype) -> Tensor:
    fmt = block_format(format)
    x = torch.empty_permuted(size, order, dtype=dtype, device=codes.device)
    whole = codes.contiguous() if codes.storage_offset() % 2 == 0 else codes.clone()  # bf16 values begin at even bytes
    packed, stored = _parts(whole, fmt)
    shared = _from_power(stored) if fmt.shared is Shared.E8M0 else _from_bf16(stored)
    _run(_decoder, fmt, x.permute(order).view(-1), (packed, *shared), None)
    return x


def _codes_of(x: Tensor, format: str, **_rest: Any) -> Tensor:
    return x.new_empty((block_format(format).bytes_of(x.numel()),), dtype=torch.uint8)


def _values_of(codes: Tensor, size: list[int], order: list[int], dtype: torch.dtype, **_rest: Any) -> Tensor:
    return torch.empty_permuted(size, order, dtype=dtype, device=codes.device)


register("encode_blocks", _encode_blocks, _codes_of)
register("decode_blocks", _decode_blocks, _values_of)


# ---- public functions, which check their arguments


def block_format(name: str) -> BlockFormat:
    """Return the row of ``SAVED_FORMATS`` called ``name``, with or without ``:sr``.

    Raises:
        FormatError: there is none.
    """
    fmt = parse_saved(name)
    if isinstance(fmt, BlockFormat):
        return fmt
    raise FormatError(
        f"{name!r} has no blocks.\n  Allowed: {', '.join(SAVED_FORMATS)}, each also with ':sr' at the end.\n"
        "  Choose one of these."
    )


def memory_order(x: Tensor) -> list[int]:
    """Return the axes of ``x`` from the longest stride to the shortest."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda axis: -strides[axis])


def encode_blocks(x: Tensor, format: str, *, seed: Tensor | None = None) -> Tensor:
    """Return the codes of ``x`` in blocks along its memory, and the values that the blocks share.

    >>> codes = encode_blocks(torch.arange(64.0), "int4:block64")
    >>> codes.shape, decode_blocks(codes, "int4:block64", torch.empty(64)).view(8, 8)[0].tolist()
    (torch.Size([36]), [0.0, 0.0, 0.0, 4.21875, 4.21875, 4.21875, 4.21875, 8.4375])

    Args:
        x: any shape; float32, bfloat16 or float16.
        format: name in ``SAVED_FORMATS``.
        seed: as for :func:`assign.numerics.rounding.quantize`.
    Returns:
        uint8 [``bytes_of(x.numel())``].
    Raises:
        FormatError: an unknown format, or a dtype that does not fit.
    Source: arXiv 2104.14129 (integers), OCP MX 1.0 (mxfp8, mxfp4).
    """
    fmt = block_format(format)
    _check_dtype(x.dtype, fmt)
    if fmt.stochastic and seed is None:
        seed = draw_seed(x.device)
    codes: Tensor = torch.ops.assign.encode_blocks(x, fmt.name, memory_order(x), seed)
    return codes


def decode_blocks(codes: Tensor, format: str, like: Tensor) -> Tensor:
    """Return the values of codes from :func:`encode_blocks`.

    Args:
        codes: uint8, from :func:`encode_blocks`.
        format: the format of the codes.
        like: a tensor with the shape, dtype and memory order of the result.
    Returns:
        A new tensor.
    Raises:
        FormatError: an unknown format, a dtype that does not fit, or codes of another format or shape.
    """
    fmt = block_format(format)
    _check_dtype(like.dtype, fmt)
    if codes.dtype != torch.uint8 or codes.shape != (fmt.bytes_of(like.numel()),):
        raise FormatError(
            f"The codes are {codes.dtype} of shape {list(codes.shape)}.\n  Allowed: torch.uint8 of shape "
            f"[{fmt.bytes_of(like.numel())}], the size of {like.numel()} elements in {fmt.name!r}.\n"
            "  Pass what encode_blocks() returned for the same format and shape."
        )
    x: Tensor = torch.ops.assign.decode_blocks(codes, fmt.name, like.shape, memory_order(like), like.dtype)
    return x


def _check_dtype(dtype: torch.dtype, fmt: BlockFormat) -> None:
    if dtype not in ROUNDED:
        allowed = ", ".join(map(str, ROUNDED))
        raise FormatError(f"{fmt.name!r} cannot encode {dtype}.\n  Allowed: {allowed}.\n  Convert the tensor first.")
