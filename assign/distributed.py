"""Train one planned model in several processes, with DDP or FSDP2.

A planned model is one graph, so some work is done only at its ends. Gradients exist, and are reduced, when the whole
backward pass is over. Parameters that ``fully_shard`` sharded, in whatever parts, are gathered before the forward pass
and stay gathered until then. Between two steps, parameters, gradients and optimizer states are sharded as usual.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from assign import _torch
from assign.errors import PlanError
from assign.plan.keys import Key, Part, master_key, stored_grad_key
from assign.plan.persistent_state import (
    first_split,
    gradient_format,
    has_scaled_gradients,
    master_format,
    stored_dtype,
)
from assign.plan.plan import Assignment

_WRAPPED = "DistributedDataParallel(assign.apply(model, plan))"


def is_several() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of processes that train together: those of the group, or those that ``torchrun`` started."""
    return dist.get_world_size() if is_several() else int(os.environ.get("WORLD_SIZE", "1"))


def data_parallel(planned: nn.Module, **options: Any) -> DistributedDataParallel:
    """Wrap a planned model in ``DistributedDataParallel`` if gradients and masters are stored in different dtypes.

    The buckets of DDP have the parameters' dtypes and reject such gradients. DDP therefore reduces each gradient
    separately, in the gradient's own dtype, without buckets. ``no_sync`` and buffers work as usual. For other plans,
    plain ``DistributedDataParallel`` is faster.

    Args:
        planned: from :func:`assign.apply`.
        options: options of ``DistributedDataParallel``.
    Returns:
        The wrapped model.
    """
    with _torch.reducer_by_parameter():
        wrapped = DistributedDataParallel(planned, **options)
    wrapped.register_forward_pre_hook(_torch.sync_buffers)
    return wrapped


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside a ``DistributedDataParallel``, or the module itself."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a ``DTensor`` that is in this process, in the same memory; a plain tensor as it is."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return part


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, of which each process has a part."""
    return hasattr(tensor, "to_local")  # importing the class takes half a second


def like_sharded(part: Tensor, tensor: Tensor) -> Tensor:
    """Return a ``DTensor``, sharded like ``tensor``, whose local part is ``part``; if ``tensor`` is plain, ``part``."""
    if not is_sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    sharded: Any = tensor
    return DTensor.from_local(
        part,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def sum_over_ranks(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of ``counts`` over all processes; ``counts`` itself if there is one process.

    Args:
        counts: of the same shape and dtype in all processes.
        group: None for all processes.
    """
    if not is_several():
        return counts
    total = counts.to(_device(group), copy=True)
    dist.all_reduce(total, group=group)
    return total


@contextlib.contextmanager
def synchronized_rng(device: torch.device) -> Iterator[None]:
    """Within the context, all processes draw the same random numbers. Afterwards each restores its own RNG state.

    All processes must enter the context together.
    """
    if not is_several():
        yield
        return
    seed = torch.randint(2**62, ()).to(_device(None))
    dist.broadcast(seed, src=0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        yield


def _device(group: dist.ProcessGroup | None) -> str:
    """Return the device type on which the group's collectives expect their tensors."""
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"


def check_one_module(model: nn.Module) -> None:
    """Reject a model that is wrapped already.

    Raises:
        PlanError: names the other order.
    """
    if isinstance(model, DistributedDataParallel):
        raise PlanError(
            "apply: the model is a DistributedDataParallel; a plan names the parameters of the module inside.\n"
            f"  Allowed: a module, sharded by fully_shard or not.\n  Apply the plan first: {_WRAPPED}."
        )


def check_sharded(model: nn.Module, plan: Assignment) -> None:
    """Reject plans that FSDP2 cannot store, and FSDP2 settings that would undo the plan.

    Raises:
        PlanError: names the first module or parameter.
    """
    shards = _shards(model)
    narrow = _narrow_gradient(plan)
    if is_several():
        _refuse_split(plan)
    if shards and narrow is not None:
        raise PlanError(
            f"apply: the plan stores the gradient of {narrow!r} as {gradient_format(plan.entries, narrow).name} and "
            f"its master as {master_format(plan.entries, narrow).name}, but fully_shard makes a gradient in its "
            "parameter's dtype.\n  Allowed: gradients in the format of their masters; or DistributedDataParallel.\n"
            f"  Leave {stored_grad_key(narrow)!r} and similar entries out of the plan."
        )
    if shards:
        _check_dtypes(model, plan)
    for name, module in shards.items():
        _check_policy(name, module)
        _check_masters(name, module, plan)


def wrap_distributed(compiled: Callable[..., Any], plan: Assignment) -> Callable[..., Any]:
    """Return ``call(module, *args)``, which runs ``compiled(*args)`` with the checks and hooks that DDP and FSDP2 need.

    Raises (when called):
        PlanError: DDP or FSDP2 as they are set up cannot train what the plan stores.
    """
    narrow = _narrow_gradient(plan)
    checked: WeakSet[nn.Module] = WeakSet()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_several():
            return compiled(*args, **kwargs)
        _refuse_split(plan)
        if has_scaled_gradients(plan.entries) and torch.is_grad_enabled():
            raise PlanError(
                f"several processes: the plan stores the gradient of {narrow!r} in 8 bits with a scale of its own, and "
                "gradients of several processes cannot be added in it.\n"
                "  Allowed: gradients in fp32, bf16 or fp16; or one process.\n  Search a plan with --gradients bf16."
            )
        if narrow is not None and torch.is_grad_enabled() and _torch.is_reduced_in_buckets():
            raise PlanError(
                f"DistributedDataParallel: the plan stores the gradient of {narrow!r} as "
                f"{gradient_format(plan.entries, narrow).name}, and DDP reduces gradients in buckets of "
                f"{master_format(plan.entries, narrow).name}.\n"
                "  Allowed: gradients in the format of their masters; or DDP without buckets.\n"
                "  Use assign.distributed.data_parallel(planned) instead of DistributedDataParallel(planned)."
            )
        shards = _shards(module)
        if not shards:
            return compiled(*args, **kwargs)
        if module not in checked:
            check_sharded(module, plan)
            checked.add(module)
        return _torch.fsdp_forward(module, _gathering(module, shards, compiled), args, kwargs)

    return call


def _refuse_split(plan: Assignment) -> None:
    split = first_split(plan.entries)
    if split is not None:
        raise PlanError(
            f"several processes: the plan stores {master_key(split)!r} as {master_format(plan.entries, split).name}, "
            "but its extra bits are in the optimizer of one process, and other processes do not get them.\n"
            "  Allowed: masters in fp32, bf16 or fp16; or one process.\n  Search a plan with --master bf16."
        )


def _gathering(module: nn.Module, shards: dict[str, Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``compiled`` with the parameters of all shards gathered; FSDP2's hooks at the module do the rest."""

    def call(*args: Any, **kwargs: Any) -> Any:
        inner = [shard for shard in shards.values() if shard is not module]
        for name, shard in shards.items():
            if shard is not module and not _torch.fsdp_has_root(shard):
                raise PlanError(
                    f"fully_shard: {name!r} is sharded, but the model that contains it is not, so nothing reduces "
                    "its gradients after the backward pass.\n  Allowed: fully_shard on any parts and on the model.\n"
                    "  Also call fully_shard(model), after its parts."
                )
        with _whole(inner), _torch.hidden_fsdp_hooks(shards.values()):
            return compiled(*args, **kwargs)

    return call


@contextlib.contextmanager
def _whole(shards: list[Any]) -> Iterator[None]:
    for shard in shards:
        shard.unshard()
    try:
        yield
    finally:
        if not torch.is_grad_enabled():  # no backward pass will reshard
            for shard in shards:
                shard.reshard()


def _shards(model: nn.Module) -> dict[str, Any]:
    """Return the parts of a model on which ``fully_shard`` was called, possibly the model itself, by path."""
    if not is_several():
        return {}
    from torch.distributed.fsdp import FSDPModule  # here: the import takes half a second

    return {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}


def _narrow_gradient(plan: Assignment) -> str | None:
    """Return the first parameter whose gradient the plan stores in another dtype than its master."""
    keys = (Key.parse(key, plan.entries) for key in plan.entries)
    weights = (key.name for key in keys if key.part in (Part.MASTER, Part.STORED_GRADIENT))
    formats = ((key, gradient_format(plan.entries, key), master_format(plan.entries, key)) for key in weights)
    return next((key for key, gradient, master in formats if stored_dtype(gradient) != stored_dtype(master)), None)


def _check_dtypes(model: nn.Module, plan: Assignment) -> None:
    for key, parameter in model.named_parameters():
        master = master_format(plan.entries, key)
        if parameter.is_floating_point() and str(parameter.dtype) != f"torch.{stored_dtype(master)}":
            raise PlanError(
                f"apply: the plan stores the master of {key!r} as {master.name}, but fully_shard has already sharded "
                f"it as {parameter.dtype}.\n  Allowed: masters that have the plan's dtype when they are sharded.\n"
                "  Apply the plan first: fully_shard(assign.apply(model, plan))."
            )


def _check_policy(name: str, module: nn.Module) -> None:
    policy = _torch.fsdp_policy(module)
    for option in ("param_dtype", "output_dtype"):
        dtype = getattr(policy, option)
        if dtype is not None:
            raise PlanError(
                f"apply: {name or 'the model'!r} is sharded with MixedPrecisionPolicy({option}={dtype}), but the plan "
                "decides the format of each tensor.\n  Allowed: MixedPrecisionPolicy(reduce_dtype=…), or none.\n"
                f"  Leave {option} out of fully_shard's mp_policy."
            )


def _check_masters(name: str, module: nn.Module, plan: Assignment) -> None:
    """Check that a sharded part has masters of one format: ``fully_shard`` stores its own parameters in one dtype."""
    within = [part for part in _shards(module).values() if part is not module]
    others = {parameter for part in within for parameter in part.parameters()}
    own = [key for key, p in module.named_parameters(prefix=name) if p not in others and p.requires_grad]
    masters = {master_format(plan.entries, key).name: key for key in own}
    if len(masters) > 1:
        (first, one), (second, another) = list(masters.items())[:2]
        raise PlanError(
            f"apply: fully_shard keeps the parameters of {name or 'the model'!r} in one dtype, but the plan stores "
            f"{one!r} as {first} and {another!r} as {second}.\n  Allowed: masters of one format in each part.\n"
            "  Store them in one format, or shard them separately: fully_shard on smaller parts."
        )
