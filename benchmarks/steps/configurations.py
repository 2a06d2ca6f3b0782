"""Ways to run a training step: PyTorch's own, with its peers' tools added, and ours. Rows of data and their meaning."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assign.executor.apply import planned_step
from assign.optim.optimizers import follow
from assign.plan.plan import Assignment
from assign.plan.space import SearchSpace
from assign.planner import search
from benchmarks.steps.workloads import Workload

BASELINE = "autocast + compile"

_FP8_PASS = {
    "quant_type": "torch.float8_e4m3fn",
    "use_scaling": True,  # left out, torch 2.13 scales forward and not backward, and gradients become NaN
    "size_in_mb": 0.01,  # of its default, 100, no tensor of the small models is
    "exclude_primals": True,
    "allowed_dtypes": "torch.bfloat16",  # fp32 ones hold statistics and log-sum-exp: in 8 bits, NaN
}


class UnavailableError(Exception):
    """A configuration cannot run here; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One way to run a step.

    Attributes:
        autocast, compiled: under ``torch.autocast`` in bf16; model and loss through ``torch.compile``.
        adam: ``torch`` (fp32 states), ``torchao`` or ``bitsandbytes`` (8-bit states), ``torchao-fp8`` (fp8 states).
        memory_budget: ``torch._functorch.config.activation_memory_budget``.
        fp8_pass: Inductor's ``activation_quantization_aten_pass``.
        float8_linear: torchao's ``convert_to_float8_training``.
        recipe, low_ratio, backend: a plan, and how it runs; recipe ``''`` means no plan.
        saved, gradients, states: formats of the plan's saved copies, stored gradients and AdamW's states.
    """

    name: str
    autocast: bool = False
    compiled: bool = False
    adam: str = "torch"
    memory_budget: float = 1.0
    fp8_pass: bool = False
    float8_linear: bool = False
    recipe: str = ""
    low_ratio: float = 0.0
    backend: str = ""
    saved: str | None = None
    gradients: str | None = None
    states: str | None = None

    @property
    def uses_inductor(self) -> bool:
        return self.compiled or self.backend == "inductor"


def _peer(name: str, **more: Any) -> Configuration:
    return Configuration(name=f"{BASELINE} + {name}", autocast=True, compiled=True, **more)


def _ours(what: str, recipe: str, low_ratio: float, backend: str, **more: Any) -> Configuration:
    name = f"{what}, {backend}"
    return Configuration(name=name, recipe=recipe, low_ratio=low_ratio, backend=backend, **more)


CONFIGURATIONS: dict[str, Configuration] = {
    "autocast-compile": Configuration(name=BASELINE, autocast=True, compiled=True),
    "fp32": Configuration(name="eager fp32"),
    "autocast": Configuration(name="autocast bf16", autocast=True),
    "fp32-compile": Configuration(name="fp32 + compile", compiled=True),
    "adam8-torchao": _peer("8-bit AdamW (torchao)", adam="torchao"),
    "adam8-bitsandbytes": _peer("8-bit AdamW (bitsandbytes)", adam="bitsandbytes"),
    "budget": _peer("recompute budget 0.5", memory_budget=0.5),
    "adam8-budget": _peer("8-bit AdamW (torchao) + recompute budget 0.5", adam="torchao", memory_budget=0.5),
    "adamfp8-budget": _peer("fp8 AdamW (torchao) + recompute budget 0.5", adam="torchao-fp8", memory_budget=0.5),
    "fp8-pass": _peer("fp8 activation pass", fp8_pass=True),
    "best-peer": _peer("all three (torchao)", adam="torchao", memory_budget=0.5, fp8_pass=True),
    "float8-torchao": _peer("float8 training (torchao)", float8_linear=True),
    "bf16-inductor": _ours("plan: all bf16", "native", 0.0, "inductor"),
    "bf16-eager": _ours("plan: all bf16", "native", 0.0, "eager"),
    "greedy-inductor": _ours("plan: native, low ratio 0.5", "native", 0.5, "inductor"),
    "greedy-eager": _ours("plan: native, low ratio 0.5", "native", 0.5, "eager"),
    "low-inductor": _ours("plan: native, all low", "native", 1.0, "inductor"),
    "low-eager": _ours("plan: native, all low", "native", 1.0, "eager"),
    "low-adam8": _ours("plan: native, all low + 8-bit AdamW (torchao)", "native", 1.0, "inductor", states="dynamic8"),
    "delayed-inductor": _ours("plan: native-delayed, all low", "native-delayed", 1.0, "inductor"),
    "saved8-adam8": _ours(
        "plan: bf16, saved e4m3:block64, bf16 gradients + 8-bit AdamW",
        "native",
        0.0,
        "inductor",
        saved="e4m3:block64",
        gradients="bf16",
        states="dynamic8",
    ),
    "saved4-adam8": _ours(
        "plan: bf16, saved int4:block64, bf16 gradients + 8-bit AdamW",
        "native",
        0.0,
        "inductor",
        saved="int4:block64",
        gradients="bf16",
        states="dynamic8",
    ),
    "saved4-adamfp8": _ours(
        "plan: bf16, saved int4:block64, bf16 gradients + fp8 AdamW",
        "native",
        0.0,
        "inductor",
        saved="int4:block64",
        gradients="bf16",
        states="e4m3:block256",
    ),
    "low-adamfp8": _ours(
        "plan: native, all low, bf16 gradients + fp8 AdamW",
        "native",
        1.0,
        "inductor",
        gradients="bf16",
        states="e4m3:block256",
    ),
    "hfp8-inductor": _ours("plan: hfp8 (emulated), all low", "hfp8", 1.0, "inductor"),
    "hfp8-eager": _ours("plan: hfp8 (emulated), all low", "hfp8", 1.0, "eager"),
}
"""By the name that ``--configs`` takes; in the order in which they run."""


def check_available(configuration: Configuration, device: torch.device) -> None:
    """Refuse what cannot run here, before anything is made.

    Raises:
        UnavailableError: a package or the device is missing.
    """
    if configuration.float8_linear:
        if device.type != "cuda":
            raise UnavailableError("float8 training needs a GPU with fp8 products")
        if torch.cuda.get_device_capability(device) < (8, 9):
            raise UnavailableError(f"{torch.cuda.get_device_name(device)} has no fp8 products")
        _need("torchao.float8")
    if configuration.adam != "torch" or configuration.states:
        _need("bitsandbytes" if configuration.adam == "bitsandbytes" else "torchao.optim")


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # an extension that does not load raises anything
        raise UnavailableError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error


def make_optimizer(
    configuration: Configuration, model: nn.Module, plan: Assignment | None, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW with states of 32 or 8 bits, the plan's own where it has some; torch's is the fused one."""
    made: torch.optim.Optimizer
    parameters: Any = list(model.parameters())
    if plan is not None and configuration.states:
        made = follow(adamw(parameters, learning_rate), model, plan)
    elif configuration.adam == "torch":
        made = torch.optim.AdamW(parameters, lr=learning_rate, fused=True)
    elif configuration.adam.startswith("torchao"):
        kind = "AdamWFp8" if configuration.adam == "torchao-fp8" else "AdamW8bit"
        made = getattr(_need("torchao.optim"), kind)(parameters, lr=learning_rate, weight_decay=0.01)
    else:
        made = _need("bitsandbytes").optim.AdamW8bit(parameters, lr=learning_rate, weight_decay=0.01)
    return made


def adamw(parameters: Any, learning_rate: float = 1e-3) -> torch.optim.Optimizer:
    """The optimizer whose states a plan stores; it has none itself until it steps."""
    return torch.optim.AdamW(parameters, lr=learning_rate)


def make_plan(configuration: Configuration, model: nn.Module, batch: Any, workload: Workload) -> Assignment | None:
    """Our plan for this model; None where the configuration has none."""
    if not configuration.recipe:
        return None
    return search(
        model,
        batch,
        workload.loss,
        space=SearchSpace(
            recipe=configuration.recipe,
            saved=configuration.saved,
            gradients=configuration.gradients,
            optimizer_states=configuration.states,
        ),
        low_ratio=configuration.low_ratio,
        optimizer=adamw,
    )


def make_loss(
    configuration: Configuration, model: nn.Module, workload: Workload, plan: Assignment | None, device: torch.device
) -> Callable[[Any], Tensor]:
    """``loss(batch)``, run as the configuration says; changes torch's global settings, so once in a process."""
    if plan is not None:
        return planned_step(model, workload.loss, plan, backend=configuration.backend)
    if configuration.float8_linear:
        _need("torchao.float8").convert_to_float8_training(model, module_filter_fn=_fits_fp8)
    if configuration.memory_budget < 1:
        import torch._functorch.config as functorch

        functorch.activation_memory_budget = configuration.memory_budget
    if configuration.fp8_pass:
        import torch._inductor.config as inductor

        inductor.post_grad_fusion_options["activation_quantization_aten_pass"] = _FP8_PASS
    compute = torch.compile(workload.loss) if configuration.compiled else workload.loss

    def loss(batch: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=configuration.autocast):
            return compute(model, batch)

    return loss


def _fits_fp8(module: nn.Module, name: str) -> bool:
    """The products that fp8 hardware takes; the output layer stays, as torchao's own examples have it."""
    sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else ()
    return bool(sizes) and all(size % 16 == 0 for size in sizes) and "head" not in name
