"""Measure the scratch memory that torch's CPU kernels allocate.

A convolution copies, reorders and pads its operands and attention packs them, each in a way that depends on machine,
sizes and layouts. So each that differs from the others is run once, on zeros, and asked; a large one on a part of its
batch. Only in fp16, where most machines have no such kernel, a convolution is not run, because it takes long: it
unfolds its whole batch, or one image at a time. What others allocate was read off torch 2.13: the backward pass of
batch normalisation copies the gradient; a 16-bit ``mean`` sums a float32 copy; products in bf16 work on packed blocks
(each thread its own; one is counted), in fp16 there are none. What is not listed allocates next to nothing. CUDA
workspaces are not modelled.
"""

import contextlib
import functools
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from assign import _torch
from assign.errors import TraceError
from assign.numerics.torch_dtypes import torch_dtype
from assign.plan.table import SCRATCH_DTYPES
from assign.tracing.measuring import count_bytes, measure_allocations

aten = torch.ops.aten
_GEMM_ROWS, _GEMM_COLUMNS, _GEMM_STEP, _GEMM_INNER = 256, 64, 16, 288  # of blocks of a 16-bit product
_GEMM_DEPTH = 512  # of a block of its right operand, twice that in long sums
_WORK = 10**10  # multiplications of an operator that is run as a whole: a part of a second


@dataclass(frozen=True)
class _Run:
    """How to run one operator alone, by positions of its arguments.

    Attributes:
        computed: tensors that are cast to the dtype in which the operator computes.
        batched: tensors whose first dimension is the batch.
        summed: tensors that are in float32 where the operator computes in less.
    """

    computed: tuple[int, ...]
    batched: tuple[int, ...]
    summed: tuple[int, ...] = ()

    def dtype_of(self, number: int, dtype: torch.dtype) -> torch.dtype | None:
        """The dtype of an argument of an operator that computes in ``dtype``; None: as it is."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return dtype if number in self.computed else wide if number in self.summed else None


_RUN = {
    aten.convolution: _Run((0, 1, 2), (0,)),
    aten.convolution_backward: _Run((0, 1, 2), (0, 1)),
    aten._scaled_dot_product_flash_attention_for_cpu: _Run((0, 1, 2), (0, 1, 2)),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _Run((0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5), summed=(5,)),
}


@dataclass(frozen=True)
class _Zeros:
    """Shape, strides and dtype of a tensor argument: hashable, so that runs can be cached."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).zero_()

    def part(self, images: int) -> "_Zeros":
        return _Zeros((images, *self.shape[1:]), self.stride, self.dtype)


def kernel_scratch(node: fx.Node) -> tuple[int, ...]:
    """Bytes that the kernel of a traced node needs for a moment, by dtype as ``SCRATCH_DTYPES``.

    Raises:
        TraceError: somebody profiles, so that what a kernel allocates cannot be seen.
    """
    args, kwargs = _torch.pytree.tree_map_only(fx.Node, _torch.joint_value, (node.args, node.kwargs))
    tensors = [value for value in args if isinstance(value, Tensor)]
    in_float64 = bool(tensors) and tensors[0].dtype == torch.float64
    dtypes = [torch_dtype(name) for name in SCRATCH_DTYPES if in_float64 or name != "float64"]
    found = tuple(scratch_of(node.target, args, kwargs, _torch.joint_value(node), dtype) for dtype in dtypes)
    return found if any(found) else ()


def scratch_of(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, dtype: torch.dtype | None = None
) -> int:
    """Bytes of an operator's call if it computes in ``dtype``; None means the dtype of what it reads.

    Raises:
        TraceError: as :func:`kernel_scratch`.
    """
    tensors = [value for value in args if isinstance(value, Tensor)]
    if not hasattr(operator, "overloadpacket") or not tensors or tensors[0].device.type != "cpu":
        return 0
    kind = operator.overloadpacket
    dtype = dtype or tensors[0].dtype
    if not dtype.is_floating_point:
        return 0
    if kind in _RUN:
        return _of_run(operator, args, kwargs, dtype)
    if kind is aten.native_batch_norm_backward:
        return dtype.itemsize * tensors[0].numel()
    if kind in (aten.mm, aten.addmm, aten.bmm) and dtype == torch.bfloat16:
        return _product(*tensors[-2:])
    if operator is aten.mean.dim and dtype.itemsize == 2:
        return 4 * tensors[0].numel()
    return 0


def _product(left: Tensor, right: Tensor) -> int:
    """Of a 16-bit product: a block of the right operand, one of float32 sums, and one of a transposed left operand.

    A product with a vector has none.
    """
    rows, inner = min(left.shape[-2], _GEMM_ROWS), left.shape[-1]
    columns = min(-(-right.shape[-1] // _GEMM_STEP) * _GEMM_STEP, _GEMM_COLUMNS)
    if 1 in (left.shape[-2], right.shape[-1]):
        return 0
    packed, long = 0, inner > 2 * _GEMM_DEPTH
    if left.stride(-1) != 1:  # whole, or a part of it beside float32 sums of whole rows
        packed = min(2 * rows * inner, 2 * rows * _GEMM_INNER + 4 * rows * right.shape[-1])
        long = inner > _GEMM_DEPTH
    deep = 2 * _GEMM_DEPTH if long else min(inner, _GEMM_DEPTH)
    return 2 * columns * deep + 4 * columns * rows + packed


def _of_run(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Scratch bytes from one run, or extrapolated in the batch size from two runs on parts of a large batch."""
    how = _RUN[operator.overloadpacket]
    known = [
        _zeros(value, how.dtype_of(number, dtype)) if isinstance(value, Tensor) else _hashable(value)
        for number, value in enumerate(args)
    ]
    if dtype == torch.float16 and "convolution" in operator.name() and not _torch.has_fp16_convolution():
        return _unfolded(known, backward=operator.overloadpacket is aten.convolution_backward)
    options = {
        name: _zeros(value, _mask_dtype(value, dtype)) if isinstance(value, Tensor) else _hashable(value)
        for name, value in kwargs.items()
    }
    images = known[how.batched[0]].shape[0]
    affordable = max(1, int(images * _WORK / max(1, _work(operator, known))))
    if affordable >= images:
        return _run(operator, tuple(known), tuple(options.items()), torch.get_num_threads())
    parts = [max(2, affordable), max(1, affordable // 2)]
    more, less = (_run(operator, *_part(how, known, options, images, each), torch.get_num_threads()) for each in parts)
    return more + (more - less) * (images - parts[0]) // (parts[0] - parts[1])


@functools.cache
def _run(operator: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], _threads: int) -> int:
    """Bytes that a call allocates at its worst moment beside its results."""
    if _torch.is_profiled():
        raise TraceError(
            "trace: a profiler is running. assign needs torch's profiler to measure what an operator allocates, and "
            "only one can run at a time.\n  End it before the step is traced."
        )
    results: list[Any] = []
    with _torch.without_modes(), _paused_collector():
        made, options = _torch.pytree.tree_map_only(_Zeros, _Zeros.make, (args, dict(kwargs)))
        peak = measure_allocations(lambda: results.append(operator(*made, **options)))
    return peak - count_bytes(value for value in _torch.pytree.tree_leaves(results) if isinstance(value, Tensor))


@contextlib.contextmanager
def _paused_collector() -> Iterator[None]:
    """Within the context, no garbage in cycles is freed.

    To collect it before each kernel would take longer than all kernels together.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _part(
    how: _Run, args: Sequence[Any], kwargs: Mapping[str, Any], images: int, fewer: int
) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    """The arguments of a call for fewer images."""
    known = [each.part(fewer) if number in how.batched else each for number, each in enumerate(args)]
    options = {
        name: value.part(fewer) if isinstance(value, _Zeros) and value.shape[0] == images else value
        for name, value in kwargs.items()
    }
    return tuple(known), tuple(options.items())


def _work(operator: Any, known: Sequence[Any]) -> int:
    """Approximate number of multiplications."""
    backward = "backward" in operator.name()
    if "convolution" not in operator.name():
        return 4 * int(math.prod(known[0].shape)) * int(known[2 if backward else 1].shape[2])
    source, weight = _operands(known, backward)
    if known[7 if backward else 6]:  # transposed
        return math.prod(source.shape) * math.prod(weight.shape[1:])
    return source.shape[0] * _positions(known, backward=backward) * math.prod(weight.shape)


def _operands(known: Sequence[Any], backward: bool) -> "tuple[_Zeros, _Zeros]":
    source, weight = known[1:3] if backward else known[:2]
    return source, weight


def _positions(known: Sequence[Any], *, backward: bool) -> int:
    """Number of output positions of a convolution for one image."""
    source, weight = _operands(known, backward)
    dimensions = len(weight.shape) - 2
    options = known[4:7] if backward else known[3:6]
    stride, padding, dilation = (each * dimensions if len(each) == 1 else each for each in options)  # [1] holds for all
    sizes = zip(source.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return math.prod((int(size) + 2 * p - d * (kernel - 1) - 1) // int(s) + 1 for size, kernel, s, p, d in sizes)


def _unfolded(known: Sequence[Any], *, backward: bool) -> int:
    """Bytes of the unfolded input (im2col) of a convolution without an oneDNN kernel, one group at a time."""
    source, weight = _operands(known, backward)
    stride, padding, dilation, transposed = known[4:8] if backward else known[3:7]
    groups: int = known[9 if backward else 8]
    images, filters = source.shape[0], math.prod(weight.shape[1:])
    if groups > 1 and weight.shape[1] == 1:
        return 2 * math.prod(source.shape)
    if transposed:
        at_a_time = 1 if backward or len(weight.shape) > 4 else images
        return 2 * at_a_time * math.prod(source.shape[2:]) * filters
    if filters == weight.shape[1] and set(stride) == {1} and not any(padding):
        return 0
    places = (1 if max(dilation) > 1 else images) * _positions(known, backward=backward)
    if groups == 1:
        return 2 * places * filters
    return 2 * (places * filters + (math.prod(source.shape) + backward * places * weight.shape[0]) // groups)


def _zeros(tensor: Tensor, dtype: torch.dtype | None) -> _Zeros:
    return _Zeros(tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())), dtype or tensor.dtype)


def _mask_dtype(mask: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an attention kernel that computes in ``dtype`` takes a mask: its own, or float32."""
    return mask.dtype if mask.dtype == torch.float32 else dtype


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
