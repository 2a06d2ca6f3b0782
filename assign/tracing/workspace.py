"""Measure the scratch memory that torch's CPU kernels allocate.

A convolution copies, reorders and pads its operands, and attention packs them, in ways that depend on machine, sizes
and layouts. Each distinct operator of this kind is therefore run once, on zeros, and measured; a large one on a part of
its batch. The exception is a convolution in fp16 on a machine without such a kernel, because it takes long: it unfolds
its whole batch, or one image at a time, and its bytes are computed. The scratch memory of other operators was
determined for torch 2.13: the backward pass of batch normalisation copies the gradient; a 16-bit ``mean`` sums a
float32 copy; products in bf16 work on packed blocks (each thread has its own; one is counted), products in fp16 do not.
Operators that are not listed allocate next to nothing. CUDA workspaces are not modelled.
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
_GEMM_ROWS, _GEMM_COLUMNS, _GEMM_STEP, _GEMM_INNER = 256, 64, 16, 288  # block sizes of a 16-bit product
_GEMM_DEPTH = 512  # depth of a block of its right operand, twice that in long sums
_WORK = 10**10  # maximum multiplications of an operator that is run as a whole: less than a second


@dataclass(frozen=True)
class _Run:
    """How to run one operator alone, by positions of its arguments.

    Attributes:
        computed: tensors that are cast to the dtype in which the operator computes.
        batched: tensors whose first dimension is the batch.
        summed: tensors that are float32 even if the operator computes in a narrower dtype.
    """

    computed: tuple[int, ...]
    batched: tuple[int, ...]
    summed: tuple[int, ...] = ()

    def dtype_of(self, number: int, dtype: torch.dtype) -> torch.dtype | None:
        """Return the dtype of an argument of an operator that computes in ``dtype``; None: its own dtype."""
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
    """Return the temporary bytes that the kernel of a traced node needs, by dtype as in ``SCRATCH_DTYPES``.

    Raises:
        TraceError: another profiler is running, so that allocations of a kernel cannot be measured.
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
    """Return the temporary bytes of an operator's call if it computes in ``dtype``; None: the dtype that it reads.

    Raises:
        TraceError: as for :func:`kernel_scratch`.
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
    """Return the scratch bytes of a bf16 product: a block of the right operand, one of float32 sums, and a packed one.

    The packed block is for a transposed left operand. A product with a vector has no scratch memory.
    """
    rows, inner = min(left.shape[-2], _GEMM_ROWS), left.shape[-1]
    columns = min(-(-right.shape[-1] // _GEMM_STEP) * _GEMM_STEP, _GEMM_COLUMNS)
    if 1 in (left.shape[-2], right.shape[-1]):
        return 0
    packed, long = 0, inner > 2 * _GEMM_DEPTH
    if left.stride(-1) != 1:  # packed whole, or in part with float32 sums of whole rows
        packed = min(2 * rows * inner, 2 * rows * _GEMM_INNER + 4 * rows * right.shape[-1])
        long = inner > _GEMM_DEPTH
    deep = 2 * _GEMM_DEPTH if long else min(inner, _GEMM_DEPTH)
    return 2 * columns * deep + 4 * columns * rows + packed


def _of_run(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Return scratch bytes from one run, or extrapolated in the batch size from two runs on parts of a large batch."""
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
    """Return the peak bytes that a call allocates, without its results."""
    if _torch.is_profiled():
        raise TraceError(
            "trace: a profiler is running. assign needs torch's profiler to measure what an operator allocates, and "
            "only one can run at a time.\n  Stop it before the step is traced."
        )
    results: list[Any] = []
    with _torch.without_modes(), _paused_collector():
        made, options = _torch.pytree.tree_map_only(_Zeros, _Zeros.make, (args, dict(kwargs)))
        peak = measure_allocations(lambda: results.append(operator(*made, **options)))
    return peak - count_bytes(value for value in _torch.pytree.tree_leaves(results) if isinstance(value, Tensor))


@contextlib.contextmanager
def _paused_collector() -> Iterator[None]:
    """Within the context, no garbage in cycles is freed.

    Collecting it before each kernel would take longer than all kernels together.
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
    """Return the arguments of a call for fewer images."""
    known = [each.part(fewer) if number in how.batched else each for number, each in enumerate(args)]
    options = {
        name: value.part(fewer) if isinstance(value, _Zeros) and value.shape[0] == images else value
        for name, value in kwargs.items()
    }
    return tuple(known), tuple(options.items())


def _work(operator: Any, known: Sequence[Any]) -> int:
    """Return the approximate number of multiplications."""
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
    """Return the number of output positions of a convolution for one image."""
    source, weight = _operands(known, backward)
    dimensions = len(weight.shape) - 2
    options = known[4:7] if backward else known[3:6]
    stride, padding, dilation = (each * dimensions if len(each) == 1 else each for each in options)  # [1] holds for all
    sizes = zip(source.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return math.prod((int(size) + 2 * p - d * (kernel - 1) - 1) // int(s) + 1 for size, kernel, s, p, d in sizes)


def _unfolded(known: Sequence[Any], *, backward: bool) -> int:
    """Return the bytes of the unfolded input (im2col) of a convolution without oneDNN kernel, one group at a time."""
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
    """Return the dtype of the mask for an attention kernel that computes in ``dtype``: float32 or ``dtype``."""
    return mask.dtype if mask.dtype == torch.float32 else dtype


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
