"""Run a kernel: compiled, with the numbers of the format as run-time tensors, or operator by operator.

One compilation per kernel and pair of dtypes serves every format. On a CPU, several narrow elements are processed in
one word (see :mod:`assign.numerics.words`). Without a working compiler, runs are slower and the results are bitwise the
same.
"""

import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from assign import _torch
from assign.numerics.kernels import Scale, Scaler, Work, inverse_power, largest, power_of_two
from assign.numerics.words import join, lanes, split, word_dtype

_WORTH_COMPILING = 2**14  # elements; smaller tensors only use code that is compiled already
_MAX_ELEMENTS = 2**31 - 1  # elements: compiled code may count them in 32 bits
_PIECE = 2**16  # elements at a time without a compiler: temporaries stay in the processor's cache
_DEVICE_PIECE = 2**22  # the same on a GPU, where every launch has a cost

_choice: ContextVar[bool | None] = ContextVar("assign_use_compiled", default=None)


@contextmanager
def use_compiled(choice: bool | None) -> Iterator[None]:
    """Choose how kernels run inside this context.

    True compiles at every size and raises if that fails. False runs operator by operator. None, the default, compiles
    for large tensors and, where no compiler works, logs one warning and runs operator by operator. The results are
    bitwise the same.
    """
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


@torch.no_grad()
def run(
    work: Work,
    x: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
    key: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Apply ``work`` to every element of ``x``.

    Args:
        work: the kernel and its numbers.
        x: any shape and layout.
        scale: float32, one element. None: 1.
        dtype: dtype of the result.
        key: int64 [2], from which the random bits of a stochastic kernel are made.
        out: tensor for the result, possibly ``x`` itself; None: a new tensor.
    Returns:
        A tensor of ``dtype``, in the layout of ``x`` if ``x`` is dense.
    """
    result = torch.empty_like(x, dtype=dtype) if out is None else out
    if not x.numel():
        return result
    count = _lanes(x, dtype) if key is None else 1
    in_order = key is None or x.is_contiguous()  # random bits depend on the place in the shape, not in memory
    if not in_order or not _is_dense(x) or x.stride() != result.stride() or result.storage_offset() % count:
        return result.copy_(run(work, x.contiguous(), scale, dtype, key))
    keys = () if key is None else (key,)
    scales = _scale_of(work, scale, x.device)
    numbers = _tensors(work.ints, work.floats, x.device)
    fused = scales or [_one(x.device)] * 2
    done = x.numel() - x.numel() % count
    kernel = _compiled(work.kernel, _Words(x.dtype, dtype, count, x.device, _is_exact(scale, dtype, count)))

    def compiled() -> None:
        words = (_words(tensor, done, count) for tensor in (x, result))
        kernel(*words, *fused, *numbers, *keys)

    if not (done and _ran_compiled(x, kernel, compiled)):
        done = 0
    if done < x.numel():
        for part, place in zip(_pieces(_flat(x)[done:]), _pieces(_flat(result)[done:]), strict=True):
            random = () if key is None else (key, part.storage_offset() - x.storage_offset())
            place.copy_(work.kernel(part, scales, (*work.ints, *work.floats), *random))
    return result


@torch.no_grad()
def run_scaled(
    work: Work, scaler: Scaler, x: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Apply ``work`` with the scale from :func:`find_scale`, in one compiled call if possible.

    Returns:
        The result and the scale.
    """
    count = _lanes(x, dtype)
    result = torch.empty_like(x, dtype=dtype) if out is None else out
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    if scaler.kernel is power_of_two and _is_in_words(x, result, count):  # its inverse needs no division
        numbers = _tensors(work.ints, (*work.floats, work.unit), x.device)
        bounds, _ = _tensors(scaler.ints, (), x.device)
        kernel = _compiled_scaled(work.kernel, _Words(x.dtype, dtype, count, x.device, exact=True))

        def compiled() -> None:
            words = (_words(tensor, x.numel(), count) for tensor in (x, result))
            kernel(*words, *numbers, bounds, scale)

        if _ran_compiled(x, kernel, compiled):
            return result, scale
    scale = find_scale(scaler, x)
    return run(work, x, scale, dtype, out=result), scale


@torch.no_grad()
def run_measured(
    work: Work, x: Tensor, scale: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Apply ``work`` with a known scale and measure the amax for the next scale, in one compiled pass if possible.

    Returns:
        The result, and the bits of the largest magnitude in ``x``, int32 without axes, as :func:`amax_bits` returns.
    """
    count = _lanes(x, dtype)
    result = torch.empty_like(x, dtype=dtype) if out is None else out
    one_kernel = not _torch.writes_triton(x.device)  # Triton's second kernel may read an overwritten x
    if _is_in_words(x, result, count) and (one_kernel or out is None):
        measured = torch.empty((), dtype=torch.int32, device=x.device)
        known = _scale_of(work, scale, x.device) or (scale, scale)
        numbers = _tensors(work.ints, work.floats, x.device)
        kernel = _compiled_measured(
            work.kernel, _Words(x.dtype, dtype, count, x.device, _is_exact(scale, dtype, count))
        )

        def compiled() -> None:
            words = (_words(tensor, x.numel(), count) for tensor in (x, result))
            kernel(*words, *known, *numbers, measured)

        if _ran_compiled(x, kernel, compiled):
            return result, measured
    measured = amax_bits(x)
    return run(work, x, scale, dtype, out=result), measured


@torch.no_grad()
def find_scale(scaler: Scaler, x: Tensor) -> Tensor:
    """Return the scale for ``x``, float32 without axes: 1 if no element is both finite and nonzero."""
    if not x.numel():
        return torch.ones((), dtype=torch.float32, device=x.device)
    count = _lanes(x)
    numbers = _tensors(scaler.ints, scaler.floats, x.device)
    if x.numel() % count == 0 and _is_dense(x):
        scale = torch.empty((), dtype=torch.float32, device=x.device)
        kernel = _compiled_scale(scaler.kernel, x.dtype, count, x.device)
        if _ran_compiled(x, kernel, lambda: kernel(_words(x, x.numel(), count), *numbers, scale)):
            return scale
    return scaler.kernel(amax_bits(x), (*scaler.ints, *scaler.floats))


def amax_bits(x: Tensor) -> Tensor:
    """Return the bits of the largest finite magnitude in ``x``, int32 without axes: 0 if there is none."""
    if not x.numel():
        return torch.zeros((), dtype=torch.int32, device=x.device)
    return _largest_of(_pieces(_flat(x if _is_dense(x) else x.clone())))


@torch.no_grad()
def count_at_least(x: Tensor, threshold: float) -> Tensor:
    """Return how many magnitudes in ``x`` are at least ``threshold``: int64 without axes."""
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    if not x.numel():
        return count
    flat = _flat(x if _is_dense(x) else x.clone())
    _, limit = _tensors((), (threshold,), x.device)
    kernel = _compiled_count(x.dtype, x.device)
    if not _ran_compiled(x, kernel, lambda: kernel(flat, limit, count)):
        for part in _pieces(flat):
            count += (part.abs() >= threshold).sum()
    return count


@torch.no_grad()
def run_rows(kernel: Callable[..., None], tensors: Sequence[Tensor], *rest: Tensor) -> None:
    """Run ``kernel(*tensors, *rest)``, which writes to some of ``tensors``, compiled once for any number of rows.

    Args:
        kernel: one function for each set of dtypes, row lengths and shapes of ``rest``; it stays in memory.
        tensors: the length of the first axis is the same for all; it must be small enough for temporaries of this size.
        rest: tensors of fixed shapes, which have no rows.
    """
    first = tensors[0]
    compiled = _compiled_rows(kernel, len(tensors), first.device)
    if not _ran_compiled(first, compiled, lambda: compiled(*tensors, *rest)):
        kernel(*tensors, *rest)


# ---- compiled functions: they write into an argument and accept any length of the varying arguments


_LENGTH = 4096  # length of the example tensors


class _Lazy:
    """A function compiled at its first call, for the dtypes, the device and the number of constants in that call."""

    def __init__(self, function: Callable[..., None], varying: int) -> None:
        self._function, self._varying = function, varying
        self._compiled: Callable[..., None] | None = None

    @property
    def ready(self) -> bool:
        return self._compiled is not None

    def __call__(self, *args: Tensor) -> None:
        if self._compiled is None:
            lengths = [each.new_zeros((_LENGTH, *each.shape[1:])) for each in args[: self._varying]]
            examples = [*lengths, *args[self._varying :]]
            self._compiled = _torch.compile_kernel(self._function, examples, self._varying)
        self._compiled(*args)


class _Words(NamedTuple):
    """Input and output dtypes of a kernel.

    Attributes:
        lanes: elements in a word.
        exact: whether ``target`` holds every result exactly; otherwise results are rounded.
    """

    source: torch.dtype
    target: torch.dtype
    lanes: int
    device: torch.device
    exact: bool


@functools.cache
def _compiled(kernel: Callable[..., Tensor], words: _Words) -> _Lazy:
    def store(
        x: Tensor, out: Tensor, scale: Tensor, inverse: Tensor, ints: Tensor, floats: Tensor, *key: Tensor
    ) -> None:
        numbers = (*ints.unbind(), *floats.unbind())
        done = [kernel(part, Scale(scale, inverse), numbers, *key) for part in split(x, words.source, words.lanes)]
        out.copy_(join(done, words.target, exact=words.exact))

    return _Lazy(store, 2)


@functools.cache
def _compiled_scaled(kernel: Callable[..., Tensor], words: _Words) -> _Lazy:
    def store(x: Tensor, out: Tensor, ints: Tensor, floats: Tensor, limits: Tensor, scale_out: Tensor) -> None:
        parts = split(x, words.source, words.lanes)
        scale = power_of_two(_largest_of(parts), limits.unbind())
        *rest, unit = floats.unbind()
        own = Scale(scale * unit, inverse_power(scale * unit))
        done = [kernel(part, own, (*ints.unbind(), *rest)) for part in parts]
        out.copy_(join(done, words.target))
        scale_out.copy_(scale)

    return _Lazy(store, 2)


@functools.cache
def _compiled_measured(kernel: Callable[..., Tensor], words: _Words) -> _Lazy:
    def store(
        x: Tensor, out: Tensor, scale: Tensor, inverse: Tensor, ints: Tensor, floats: Tensor, measured: Tensor
    ) -> None:
        parts = split(x, words.source, words.lanes)
        done = [kernel(part, Scale(scale, inverse), (*ints.unbind(), *floats.unbind())) for part in parts]
        out.copy_(join(done, words.target, exact=words.exact))
        measured.copy_(_largest_of(parts))

    return _Lazy(store, 2)


@functools.cache
def _compiled_scale(kernel: Callable[..., Tensor], source: torch.dtype, count: int, device: torch.device) -> _Lazy:
    def store(x: Tensor, ints: Tensor, floats: Tensor, out: Tensor) -> None:
        out.copy_(kernel(_largest_of(split(x, source, count)), (*ints.unbind(), *floats.unbind())))

    return _Lazy(store, 1)


@functools.cache
def _compiled_rows(kernel: Callable[..., None], varying: int, _device: torch.device) -> _Lazy:
    return _Lazy(kernel, varying)


@functools.cache
def _compiled_count(source: torch.dtype, device: torch.device) -> _Lazy:
    def store(x: Tensor, threshold: Tensor, out: Tensor) -> None:
        out.copy_((x.abs() >= threshold).sum())

    return _Lazy(store, 1)


def _largest_of(parts: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.maximum, map(largest, parts))


@functools.cache
def _compiler_failed(device_type: str) -> threading.Event:
    return threading.Event()


def _ran_compiled(x: Tensor, kernel: _Lazy, run: Callable[[], None]) -> bool:
    """Whether compiled code was wanted for ``x`` and ``run``, which calls ``kernel``, succeeded."""
    choice, failed = _choice.get(), _compiler_failed(x.device.type)
    worth_it = kernel.ready or (x.numel() >= _WORTH_COMPILING and not failed.is_set())
    if not (choice or (choice is None and worth_it)) or x.numel() > _MAX_ELEMENTS:
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


# ---- numbers and memory


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


def _is_exact(scale: Tensor | None, dtype: torch.dtype, count: int) -> bool:
    """Whether ``dtype`` holds the product of a format's value and ``scale`` exactly, as it does for powers of two.

    Without words it does not matter, because torch's own conversion rounds; then the value of the scale is not read.
    """
    if scale is None or count == 1 or dtype != torch.bfloat16:
        return True
    return abs(math.frexp(float(scale))[0]) == 0.5


def _is_in_words(x: Tensor, result: Tensor, count: int) -> bool:
    """Whether both tensors have their elements in the same order, in whole words."""
    whole = x.numel() > 0 and x.numel() % count == 0 and result.storage_offset() % count == 0
    return whole and _is_dense(x) and x.stride() == result.stride()


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.stride() == torch.empty_like(x, device="meta").stride()


def _flat(x: Tensor) -> Tensor:
    """Return a dense tensor with one axis, in memory order. Not a view, whose base would make Dynamo recompile."""
    return _words(x, x.numel(), 1)


def _words(x: Tensor, number: int, count: int) -> Tensor:
    """Return the first ``number`` elements of a dense tensor in memory order, ``count`` to a word.

    If the tensor begins within a word, the result is a copy, which must only be read.
    """
    size = x.dtype.itemsize * count
    place = x.storage_offset() * x.dtype.itemsize
    if place % size:  # words begin at multiples of their size
        x, place = torch.empty_like(x).copy_(x), 0
    flat = torch.empty(0, dtype=word_dtype(x.dtype, count), device=x.device)
    return flat.set_(x.untyped_storage(), place // size, (number // count,), (1,))


def _lanes(x: Tensor, *others: torch.dtype) -> int:
    return 1 if _torch.writes_triton(x.device) else lanes(x.dtype, *others)


def _pieces(flat: Tensor) -> tuple[Tensor, ...]:
    return torch.split(flat, _DEVICE_PIECE if _torch.writes_triton(flat.device) else _PIECE)
