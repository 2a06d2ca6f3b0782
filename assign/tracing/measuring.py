"""Measure the peak memory of a piece of code: with the profiler on a CPU, the allocator on CUDA."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from assign import _torch


def measure_peak(step: Callable[[], object], resident: Iterable[Tensor]) -> int:
    """Return the peak memory of ``step``, including the bytes of ``resident``.

    Memory that ``resident`` does not name and ``step`` does not allocate is not counted: free the last step's gradients
    before. On CPU the profiler's memory events are added up; on CUDA the allocator's statistics are used.

    Args:
        step: Called once, without arguments.
        resident: Tensors that are alive throughout the step, all on one device.
    Returns:
        Bytes.
    """
    tensors = list(resident)
    held = count_bytes(tensors)
    gc.collect()  # garbage in cycles, if freed within the step, would reduce the measured peak
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return held + torch.cuda.max_memory_allocated() - before
    return held + measure_allocations(step)


def measure_allocations(step: Callable[[], object]) -> int:
    """Return the peak of the bytes that ``step`` allocates itself on the CPU.

    Garbage in cycles that is freed within the step lowers the result. Collect it before, or pause the collector.

    Args:
        step: Called once, without arguments.
    Returns:
        Bytes.
    """
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet_stderr():
        profiler.start()
    try:
        step()
    finally:
        with _quiet_stderr():
            profiler.stop()
    now = peak = 0  # freeing memory that was allocated before the profiler started makes no event
    for change in _torch.memory_changes(profiler):
        now += change
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Suppress what C++ prints: Kineto reports on stderr that the profiler starts and stops."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages of ``tensors``, including inner tensors of wrapper subclasses."""
    storages = [inner.untyped_storage() for tensor in tensors for inner in _torch.inner_tensors(tensor)]
    return sum({(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages}.values())
