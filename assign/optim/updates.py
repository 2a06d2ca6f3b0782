"""SGD and AdamW for parameters stored in 16 bits without a float32 master.

Such a weight takes no update below half of its last bit: with bf16, any below 2^-9 of the weight is lost. So the weight
update, and it alone, is rounded in one of three ways:

* ``nearest``: as ``torch.optim`` does, what is lost is lost;
* ``stochastic``: to either neighbour, so that the mean is kept; the random bits come from torch's generator, where
  several processes train one model from that of the first, so that all hold the same weights;
* ``kahan``: to nearest, and what got lost is kept in a second 16-bit tensor and added to the next update.

Everything else is arithmetic of the parameter's dtype: each operation, and each state, is rounded to nearest. A
compiler that fuses operations keeps what is between them in float32, and Kahan's rest would always be zero; each
rounding here goes through the bits of the 16-bit number, so that a compiled step does what an eager one does, bit for
bit. On CPU, Inductor does not vectorise them: there an eager step is the faster one.

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
from assign.formats.parsing import parse_format
from assign.numerics.rounding import quantize
from assign.numerics.torch_dtypes import SIXTEEN_BITS, dtype_name
from assign.plan.persistent_state import COMPENSATION, UpdateRounding

_BY_CHANCE = {dtype: parse_format(f"{name}:sr") for dtype, name in SIXTEEN_BITS.items()}
_TYPES = "bfloat16, float16; float32, which is updated by the plain rule"


class _Optimizer16(Optimizer):
    """The loop over parameters and the three roundings; a subclass says by how much a weight is to change."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        defaults["rounding"] = _known(defaults["rounding"])
        super().__init__(params, defaults)
        self._check_some_rounded()

    @abstractmethod
    def _changes(self, w: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """What is to be added to the weight, one sum after another; brings the states up to date.

        Args:
            w: the parameter's values in float32.
            parameter: with its gradient.
            group: the parameter's group of options.
        Returns:
            float32, of the shape of ``w``, not rounded yet.
        """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; each group may have a ``rounding`` of its own.

        Raises:
            FormatError: a parameter's dtype, or a rounding that does not exist.
        """
        if "rounding" in param_group:
            param_group["rounding"] = _known(param_group["rounding"])
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (*SIXTEEN_BITS, torch.float32):
                raise FormatError(
                    f"{type(self).__name__}: a parameter of shape {list(parameter.shape)} is {_dtype(parameter)}.\n"
                    f"  Allowed: {_TYPES}.\n  Keep narrower or wider weights out of it, or convert them."
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's: states come back in the parameters' dtypes, those of a ``torch.optim`` optimizer too.

        Raises:
            FormatError: the states were made with another rounding.
        """
        super().load_state_dict(self._with_rounding(state_dict))

    def _with_rounding(self, state: dict[str, Any]) -> dict[str, Any]:
        """The saved state, in which torch's own optimizers name no rounding, with the one that this optimizer has."""
        groups = []
        for index, saved in enumerate(state["param_groups"]):
            own = self.param_groups[min(index, len(self.param_groups) - 1)]["rounding"]
            rounding = saved.get("rounding", own)
            if rounding != own:
                raise FormatError(
                    f"{type(self).__name__}: the saved state was made with rounding={rounding!r}, "
                    f"this optimizer has rounding={own!r}.\n"
                    "  Allowed: the same, or the state of a torch.optim optimizer.\n"
                    "  Make the optimizer with that rounding, or begin with fresh states."
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
        with self._chance():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)
        return loss

    def _chance(self) -> contextlib.AbstractContextManager[None]:
        by_chance = any(group["rounding"] == UpdateRounding.STOCHASTIC for group in self.param_groups)
        device = next(parameter.device for group in self.param_groups for parameter in group["params"])
        return synchronized_rng(device) if by_chance else contextlib.nullcontext()

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
            stored.copy_(quantize(w + change, _BY_CHANCE[parameter.dtype], saturate=False, dtype=parameter.dtype))
            return
        compensation = self._state(parameter, COMPENSATION)
        w, rest = kahan_add(w, change, compensation.float(), parameter.dtype)
        stored.copy_(w)
        compensation.copy_(rest)

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        """The parameter's state of that name, in its dtype; made of zeros. Of a sharded one, what is here."""
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return local_part(state[name])


class SGD(_Optimizer16):
    """``torch.optim.SGD`` for parameters in 16 bits.

    Args:
        params: parameters or groups of them: bfloat16, float16, or float32, which is updated by the plain rule.
        lr: a number, or a tensor without axes, which a compiled step reads anew.
        momentum: as torch's.
        dampening: as torch's.
        weight_decay: as torch's.
        nesterov: as torch's.
        rounding: of the weight update: with ``nearest`` any below half of a weight's last bit is lost; ``stochastic``
            keeps it in the mean; ``kahan`` in one more state, 2 bytes per element.
    Raises:
        FormatError: a rounding that does not exist, a parameter's dtype, or nothing stored in 16 bits to round.
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

    Both moments are kept in the parameter's dtype and rounded to nearest, so that in bf16 a ``beta2`` above 0.998 never
    lets the second moment fall, and in fp16 an ``eps`` below 6e-5 loses its bits. ``assign.analysis.audit_constants``
    warns of both.
    With ``nearest`` the weight decay is rounded on its own, as torch does, and then nearly always lost; else it is a
    part of the update.

    Args:
        params: parameters or groups of them: bfloat16, float16, or float32, which is updated by the plain rule.
        lr: a number, or a tensor without axes, which a compiled step reads anew.
        betas: as torch's.
        eps: as torch's.
        weight_decay: as torch's.
        rounding: of the weight update: with ``nearest`` any below half of a weight's last bit is lost; ``stochastic``
            keeps it in the mean; ``kahan`` in one more state, 2 bytes per element.
    Raises:
        FormatError: a rounding that does not exist, a parameter's dtype, or nothing stored in 16 bits to round.
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
        """The step's number, from 1: float64, so that ``1 - beta2 ** step`` keeps its digits. Saved in float32."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), device=parameter.device)
        state["step"] += 1
        count: Tensor = state["step"].double()
        return count


def kahan_add(w: Tensor, change: Tensor, compensation: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight and its change in Kahan's sum, every operation rounded to ``dtype``.

    Args:
        w: the weight, in float32 that holds values of ``dtype``.
        change: float32.
        compensation: what earlier sums added too much, in float32 that holds values of ``dtype``.
        dtype: bfloat16 or float16.
    Returns:
        The new weight and the new compensation, the same way.
    Source: arXiv 2010.06192, algorithm 3.
    """
    y = _rounded(_rounded(change, dtype) - compensation, dtype)
    total = _rounded(w + y, dtype)
    return total, _rounded(_rounded(total - w, dtype) - y, dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x``, float32, rounded to a value of ``dtype``, ties to even; in float32 still."""
    if dtype is torch.float32:
        return x
    # a compiler takes the liberty to leave out a cast and its way back, but not an operation on integers between them
    return (x.to(dtype).view(torch.int16) & -1).view(dtype).float()


def _known(rounding: UpdateRounding | str) -> str:
    """The rounding as a plain text, which a ``state_dict`` holds and ``torch.load`` lets pass."""
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
