"""SGD and AdamW for parameters stored in 16 bits without a float32 master.

Such a weight loses every update below half of its last bit: with bf16, every update below 2^-9 of the weight. The
weight update is therefore rounded in one of three ways:

* ``nearest``: as in ``torch.optim``; such updates are lost;
* ``stochastic``: to one of the two neighbours at random, which keeps the mean. The random bits come from torch's
  generator; if several processes train one model, from that of the first, so that all have the same weights;
* ``kahan``: to nearest; the lost part is stored in a second 16-bit tensor and added to the next update.

All other arithmetic is in the parameter's dtype: each operation and each state is rounded to nearest. A compiler that
fuses operations would keep intermediates in float32, and Kahan's compensation would always be zero. Each rounding here
therefore goes through the bits of the 16-bit number, and a compiled step equals an eager one bit for bit. On CPU,
Inductor does not vectorise these operations, so an eager step is faster there.

Source: arXiv 2010.06192 (the three updates); torch.optim (what is updated).
"""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from assign.distributed import local_part, synchronized_rng
from assign.errors import FormatError, suggest
from assign.numerics.rounding import STOCHASTIC, quantize
from assign.numerics.torch_dtypes import SIXTEEN_BITS, dtype_name
from assign.plan.persistent_state import COMPENSATION, UpdateRounding

_TYPES = "bfloat16, float16; float32, which is updated by the plain rule"


class _Optimizer16(Optimizer):
    """The loop over parameters and the three roundings; a subclass computes the change of a weight."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        defaults["rounding"] = _known(defaults["rounding"])
        super().__init__(params, defaults)
        self._check_some_rounded()

    @abstractmethod
    def _changes(self, w: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Update the states and return the changes to add to the weight, one after another.

        Args:
            w: the parameter's values in float32.
            parameter: with its gradient.
            group: the parameter's group of options.
        Returns:
            float32, of the shape of ``w``, not rounded yet.
        """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; it may have a ``rounding`` of its own.

        Raises:
            FormatError: a parameter has another dtype, or the rounding does not exist.
        """
        if "rounding" in param_group:
            param_group["rounding"] = _known(param_group["rounding"])
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (*SIXTEEN_BITS, torch.float32):
                raise FormatError(
                    f"{type(self).__name__}: a parameter of shape {list(parameter.shape)} is {_dtype(parameter)}.\n"
                    f"  Allowed: {_TYPES}.\n  Leave such parameters out of the optimizer, or convert them."
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states, as in torch: also those of a ``torch.optim`` optimizer, converted to the parameters' dtypes.

        Raises:
            FormatError: the states were made with another rounding.
        """
        super().load_state_dict(self._with_rounding(state_dict))

    def _with_rounding(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the saved state with this optimizer's rounding in each group; torch's own optimizers have none."""
        groups = []
        for index, saved in enumerate(state["param_groups"]):
            own = self.param_groups[min(index, len(self.param_groups) - 1)]["rounding"]
            rounding = saved.get("rounding", own)
            if rounding != own:
                raise FormatError(
                    f"{type(self).__name__}: the saved state was made with rounding={rounding!r}, "
                    f"this optimizer has rounding={own!r}.\n"
                    "  Allowed: the same, or the state of a torch.optim optimizer.\n"
                    "  Make the optimizer with that rounding, or start with new states."
                )
            groups.append({**saved, "rounding": own})
        return {**state, "param_groups": groups}

    def _check_some_rounded(self) -> None:
        rounding = self.defaults["rounding"]
        dtypes = {parameter.dtype for group in self.param_groups for parameter in group["params"]}
        if rounding != UpdateRounding.NEAREST and not dtypes & SIXTEEN_BITS.keys():
            raise FormatError(
                f"{type(self).__name__}: rounding={rounding!r}, but no parameter is stored in 16 bits.\n"
                f"  Allowed: {_TYPES}.\n  Convert the model first, model.to(torch.bfloat16), or use torch.optim."
            )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, as ``torch.optim`` does; may be compiled.

        Raises:
            FormatError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._synchronized():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)
        return loss

    def _synchronized(self) -> contextlib.AbstractContextManager[None]:
        is_stochastic = any(group["rounding"] == UpdateRounding.STOCHASTIC for group in self.param_groups)
        device = next(parameter.device for group in self.param_groups for parameter in group["params"])
        return synchronized_rng(device) if is_stochastic else contextlib.nullcontext()

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise FormatError(
                f"{type(self).__name__}: the gradient of a parameter of shape {list(parameter.shape)} is sparse.\n"
                "  Allowed: dense gradients.\n  Make the layer with sparse=False."
            )
        stored = local_part(parameter)
        w = stored.float()
        changes = self._changes(w, parameter, group)
        rounding = group["rounding"] if parameter.dtype in SIXTEEN_BITS else UpdateRounding.NEAREST
        if rounding == UpdateRounding.NEAREST:
            for change in changes:
                w = _rounded(w + change, parameter.dtype)
            stored.copy_(w)
            return
        change = changes[0] if len(changes) == 1 else changes[0] + changes[1]
        if rounding == UpdateRounding.STOCHASTIC:
            stored.copy_(quantize(w + change, STOCHASTIC[parameter.dtype], saturate=False, dtype=parameter.dtype))
            return
        compensation = self._state(parameter, COMPENSATION)
        w, rest = kahan_add(w, change, compensation.float(), parameter.dtype)
        stored.copy_(w)
        compensation.copy_(rest)

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        """Return the parameter's state of that name, the local part of a sharded one; a new state is zero."""
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return local_part(state[name])


class SGD(_Optimizer16):
    """``torch.optim.SGD`` for parameters in 16 bits.

    Args:
        params: parameters or groups of them: bfloat16, float16, or float32, which is updated as in ``torch.optim``.
        lr: a number, or a 0-dimensional tensor, which a compiled step reads each time.
        momentum: as in torch.
        dampening: as in torch.
        weight_decay: as in torch.
        nesterov: as in torch.
        rounding: of the weight update. ``nearest`` loses every update below half of a weight's last bit; ``stochastic``
            keeps it in the mean; ``kahan`` keeps it in one more state, 2 bytes per element.
    Raises:
        FormatError: the rounding does not exist, a parameter has another dtype, or no parameter is stored in 16 bits.
        ValueError: a number that torch refuses too.
    Source: arXiv 2010.06192, algorithms 2 and 3; torch.optim.SGD.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        *,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        rounding: UpdateRounding | str = UpdateRounding.NEAREST,
    ) -> None:
        _check_numbers(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError("SGD: nesterov=True needs a momentum above 0 and no dampening.")
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "nesterov": nesterov, "rounding": rounding})

    def _changes(self, w: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, ...]:
        assert parameter.grad is not None
        grad, dtype, momentum = local_part(parameter.grad).float(), parameter.dtype, group["momentum"]
        if group["weight_decay"] != 0:
            grad = _rounded(grad + w * group["weight_decay"], dtype)
        if momentum != 0:
            first = "momentum_buffer" not in self.state[parameter]
            state = self._state(parameter, "momentum_buffer")
            buffer = grad
            if not first:
                buffer = _rounded(_rounded(state.float() * momentum, dtype) + grad * (1 - group["dampening"]), dtype)
            state.copy_(buffer)
            grad = _rounded(grad + buffer * momentum, dtype) if group["nesterov"] else buffer
        return (grad * -group["lr"],)


class AdamW(_Optimizer16):
    """``torch.optim.AdamW`` for parameters in 16 bits.

    Both moments are stored in the parameter's dtype and rounded to nearest. In bf16 the second moment therefore never
    decays if ``beta2`` is above 0.998, and in fp16 an ``eps`` below 6e-5 loses bits; both are reported by
    ``assign.analysis.audit_constants``. With ``nearest`` the weight decay is rounded separately, as in torch, and then
    nearly always lost; otherwise it is part of the update.

    Args:
        params: parameters or groups of them: bfloat16, float16, or float32, which is updated as in ``torch.optim``.
        lr: a number, or a 0-dimensional tensor, which a compiled step reads each time.
        betas: as in torch.
        eps: as in torch.
        weight_decay: as in torch.
        rounding: of the weight update. ``nearest`` loses every update below half of a weight's last bit; ``stochastic``
            keeps it in the mean; ``kahan`` keeps it in one more state, 2 bytes per element.
    Raises:
        FormatError: the rounding does not exist, a parameter has another dtype, or no parameter is stored in 16 bits.
        ValueError: a number that torch refuses too.
    Source: arXiv 2010.06192, algorithms 4 and 5; torch.optim.AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay: float = 1e-2,
        rounding: UpdateRounding | str = UpdateRounding.NEAREST,
    ) -> None:
        _check_numbers(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamW: betas are {betas}; each must be at least 0 and below 1.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "rounding": rounding})

    def _changes(self, w: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, ...]:
        assert parameter.grad is not None
        (beta1, beta2), dtype, lr = group["betas"], parameter.dtype, group["lr"]
        grad, step = local_part(parameter.grad).float(), self._count(parameter)
        mean, square = self._state(parameter, "exp_avg"), self._state(parameter, "exp_avg_sq")
        first = _rounded(mean.float() + (grad - mean.float()) * (1 - beta1), dtype)
        second = _rounded(_rounded(square.float() * beta2, dtype) + grad * grad * (1 - beta2), dtype)
        mean.copy_(first)
        square.copy_(second)
        step_size = (lr / (1 - beta1**step)).float()
        root = _rounded(_rounded(second.sqrt(), dtype) / (1 - beta2**step).sqrt().float(), dtype)
        change = first * -step_size / _rounded(root + group["eps"], dtype)
        return (w * (-lr * group["weight_decay"]), change) if group["weight_decay"] != 0 else (change,)

    def _count(self, parameter: Tensor) -> Tensor:
        """Return the number of this step, from 1. It is saved as float32.

        The result is float64, so that ``1 - beta2 ** step`` keeps its digits.
        """
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), device=parameter.device)
        state["step"] += 1
        count: Tensor = state["step"].double()
        return count


def kahan_add(w: Tensor, change: Tensor, compensation: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Add a change to a weight with Kahan summation, every operation rounded to ``dtype``.

    Args:
        w: the weight; float32 with values of ``dtype``.
        change: float32.
        compensation: what earlier sums added too much; float32 with values of ``dtype``.
        dtype: bfloat16 or float16.
    Returns:
        The new weight and the new compensation, both float32 with values of ``dtype``.
    Source: arXiv 2010.06192, algorithm 3.
    """
    y = _rounded(_rounded(change, dtype) - compensation, dtype)
    total = _rounded(w + y, dtype)
    return total, _rounded(_rounded(total - w, dtype) - y, dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x``, float32, rounded to values of ``dtype``, ties to even; the result is float32."""
    if dtype is torch.float32:
        return x
    # a compiler may remove a cast and the cast back, but not an integer operation between them
    return (x.to(dtype).view(torch.int16) & -1).view(dtype).float()


def _known(rounding: UpdateRounding | str) -> str:
    """Return the rounding as a plain string, which ``torch.load`` accepts in a ``state_dict``."""
    allowed = [each.value for each in UpdateRounding]
    if rounding not in allowed:
        close = suggest(str(rounding), allowed)
        raise FormatError(
            f"{rounding!r} is not a way to round a weight update{f', did you mean {close}?' if close else '.'}\n"
            f"  Allowed: {', '.join(allowed)}.\n  Choose one of these."
        )
    return str(rounding)


def _check_numbers(**numbers: float | Tensor) -> None:
    for name, value in numbers.items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name} is {value}; it must be at least 0.")


def _dtype(tensor: Tensor) -> str:
    return dtype_name(tensor.dtype)
