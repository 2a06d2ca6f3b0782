"""Make optimizers whose states have the formats of a plan, from torch, torchao or bitsandbytes.

``assign.optimizer(torch.optim.AdamW, model, plan, lr=1e-3)`` is torch's AdamW if the plan stores everything in one
dtype, and another library's AdamW if it does not. :mod:`assign.plan.optimizer_backends` says which library can store
what, and :mod:`assign.optim.states` makes the states in each library's form. The arithmetic is the library's own.

==============  ====================================================================================================
torch           any optimizer, with all states in the dtype of the parameters; SGD with any native dtypes
torchao         Adam and AdamW, each state in a format of its own; computes in float32, and compiles a step for every
                shape when first used
bitsandbytes    Adam, AdamW and SGD with momentum; states of a parameter all fp32 or all ``dynamic8``
==============  ====================================================================================================

Masters in ``bf16+8`` are joined with their extra bits for the step of their parameter, and split again afterwards
(:mod:`assign.optim.masters`), so the library sees them as float32. It also sees 16-bit masters as float32 if they have
stochastic rounding or Kahan summation and states in other formats (:mod:`assign.optim.widening`).

A second moment in bf16 does not decay if ``beta2`` is above 0.998: a step subtracts less than half a unit in the last
place. States in blocks decay with their scale.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from assign import distributed
from assign.errors import PlanError, suggest
from assign.numerics.rounding import round_in_place
from assign.numerics.torch_dtypes import torch_dtype
from assign.optim import updates
from assign.optim.gradients import forget_scale
from assign.optim.gradients import widened as widened_gradient
from assign.optim.masters import check_known, extra_bits_of, joined, load_extra_bits
from assign.optim.states import count_changed, make_states, restore, unwrapped, widened
from assign.optim.widening import Randomness, widened_master
from assign.plan.keys import Key, Part, state_key
from assign.plan.optimizer_backends import Library, Stored, choose_library, rounds_updates_itself, widen_masters
from assign.plan.persistent_state import (
    COMPENSATION,
    EXTRA_BITS,
    StateFormat,
    UpdateRounding,
    check_unsplit,
    gradient_format,
    master_format,
    parse_rounding,
    rounded_states,
    state_format,
    stored_dtype,
)
from assign.plan.plan import Assignment
from assign.tracing.loaded import complete
from assign.tracing.optimizer_states import optimizer_name


def optimizer(
    kind: type[Optimizer],
    model: nn.Module,
    plan: Assignment,
    *,
    params: Iterable[Any] | None = None,
    library: str | None = None,
    update_rounding: str | None = None,
    **options: Any,
) -> Optimizer:
    """Return an optimizer of the model's parameters whose states have the formats of ``plan``.

    Its ``load_state_dict`` accepts states that any of these libraries saved, in any formats, as long as no value is
    rounded; ``load_state_dict(state, lossy=True)`` rounds. :func:`widened_state_dict` converts in the other direction.

    Args:
        kind: a class of ``torch.optim``.
        model: after ``assign.apply(model, plan)``; may be wrapped in ``DistributedDataParallel``, or sharded.
        plan: the plan that was applied to the model.
        params: parameters or groups of them, as for torch. Default: all that require a gradient.
        library: ``torch``, ``torchao`` or ``bitsandbytes``. Default: the first installed one that can store the states.
        update_rounding: how updates of 16-bit masters are rounded: ``nearest``, ``stochastic`` or ``kahan``. Default:
            that of the plan. The last two are for SGD, Adam and AdamW.
        options: of ``kind``, e.g. ``lr``.
    Returns:
        An optimizer of the library that can store these states, before its first step.
    Raises:
        PlanError: no library can store these states with this optimizer, or it is not installed; or the optimizer has
            no such state, or there is no such rounding.
        FormatError: ``update_rounding`` needs a master in 16 bits, and there is none.
    Examples:
        ```python
        planned = assign.apply(model, plan, backend="eager")
        optimizer = assign.optimizer(adamw, planned, plan, lr=1e-3)
        loss(planned, batch).backward()
        optimizer.step()
        ```
    """
    chosen = [p for p in model.parameters() if p.requires_grad] if params is None else params
    make: Callable[..., Optimizer] = kind
    return follow(make(chosen, **options), model, plan, library=library, update_rounding=update_rounding)


def follow(
    made: Optimizer,
    model: nn.Module,
    plan: Assignment,
    *,
    library: str | None = None,
    update_rounding: str | None = None,
) -> Optimizer:
    """Return an optimizer like ``made``, which has not stepped yet, whose states have the formats of ``plan``.

    Raises:
        PlanError: as for :func:`optimizer`.
    """
    plan = complete(plan, distributed.unwrapped(model))
    rounding = plan.update_rounding if update_rounding is None else parse_rounding(update_rounding, where="optimizer")
    check_unsplit(rounding, plan.entries, where="optimizer")
    stored = _stored(made, model, plan)
    name, own = optimizer_name(made), False
    if rounding != UpdateRounding.NEAREST:
        own = library in (None, Library.TORCH) and rounds_updates_itself(name, stored.values())
        stored = stored if own else dict(zip(stored, widen_masters(name, stored.values()), strict=True))
    try:
        chosen = _choose(name, stored.values(), library)
    except PlanError as error:
        if any(map(distributed.is_sharded, stored)):
            error.add_note("  The parameters are sharded: elements are those in this process.")
        raise
    planned = _planned(
        _from_updates(made, rounding) if own else _MAKERS[chosen](made),
        one_by_one=any(each.is_alone for each in stored.values()),
        rounded=any(each.master.layout or each.rounded for each in stored.values()),
    )
    planned.assign_library, planned.assign_stored, planned.assign_rounding = chosen, stored, rounding
    planned.assign_reset()
    return planned


def widened_state_dict(planned: Optimizer) -> dict[str, Any]:
    """Return the optimizer's ``state_dict`` in float32 with torch's names, for an optimizer of ``torch.optim``.

    Nothing is lost: float32 holds every value of the narrower formats. The extra bits of masters are left out, because
    a plain optimizer has no such state: :func:`assign.optim.widened_weights` includes them.
    """
    packed = planned.state_dict()
    states = {number: widened(unwrapped(state)) for number, state in packed["state"].items()}
    states = {number: _of_library(state) for number, state in states.items()}
    groups = [{**group, "lr": float(group["lr"])} for group in packed["param_groups"]]
    if any("momentum_buffer" in state for state in states.values()):
        groups = [_translated(group, {**group, "momentum": 0.0, "dampening": 0.0}) for group in groups]
    return {"state": states, "param_groups": groups}


def _of_library(states: Mapping[str, Any], *, widened: bool = False) -> dict[str, Any]:
    """Return the states that a library's optimizer knows, without those that this package adds."""
    omitted = (EXTRA_BITS, COMPENSATION) if widened else (EXTRA_BITS,)
    return {name: value for name, value in states.items() if name not in omitted}


# ---- what the plan says


def _stored(made: Optimizer, model: nn.Module, plan: Assignment) -> dict[Tensor, Stored]:
    """Return what the plan stores for every parameter of the optimizer."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in distributed.unwrapped(model).named_parameters()}
    explicit: dict[str, dict[str, StateFormat]] = {}
    for each in (Key.parse(key, plan.entries) for key in plan.entries):
        if each.part is Part.STATE:
            explicit.setdefault(each.name, {})[each.state] = state_format(plan.entries, each.name, each.state)
    found: dict[Tensor, Stored] = {}
    for group in made.param_groups:
        has = _states_of(made, group)
        for parameter in group["params"]:
            key = names.get(parameter, "")
            given = explicit.pop(key, {})
            _check_states(made, key, given, has)
            found[parameter] = Stored(
                key=key,
                elements=distributed.local_part(parameter).numel(),
                master=master_format(plan.entries, key),
                gradient=gradient_format(plan.entries, key),
                states={state: state_format(plan.entries, key, state) for state in has or given},
                rounded=rounded_states(plan.entries, key, has or given),
            )
            _check_dtypes(found[parameter], parameter)
    if explicit:
        raise PlanError(
            f"optimizer: the plan stores states of {next(iter(explicit))!r}, which the optimizer was not given. "
            "Give it every parameter of the plan, or leave those entries out of the plan."
        )
    return found


def _states_of(made: Optimizer, group: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of the states that the optimizer keeps for a parameter; None if they are not known."""
    match optimizer_name(made):
        case "Adam" | "AdamW":
            return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))
        case "SGD":
            return ("momentum_buffer",) if group["momentum"] else ()
    return None


def _check_states(made: Optimizer, key: str, given: Collection[str], has: tuple[str, ...] | None) -> None:
    wrong = [state for state in given if has is not None and state not in has]
    if wrong and has is not None:
        close = suggest(wrong[0], has)
        raise PlanError(
            f"optimizer: the plan stores {state_key(key, wrong[0])!r}, but {type(made).__name__} with these options "
            f"keeps {', '.join(has) or 'no states'}{f' (nearest: {close})' if close else ''}. "
            "Use the optimizer that the plan was made for, or make a plan with this one."
        )


def _check_dtypes(stored: Stored, parameter: Tensor) -> None:
    found = parameter.dtype, parameter.grad_dtype
    if parameter.is_complex() or found == (
        torch_dtype(stored_dtype(stored.master)),
        torch_dtype(stored_dtype(stored.gradient)),
    ):
        return
    raise PlanError(
        f"optimizer: the plan stores {stored}, but the parameter is {found[0]} and its gradient {found[1]}. "
        "Call assign.apply(model, plan) first: it gives both their dtypes."
    )


def _choose(name: str, stored: Collection[Stored], library: str | None) -> Library:
    if library is not None and library not in list(Library):
        raise PlanError(f"optimizer: there is no library {library!r}; choose from {', '.join(Library)}.")
    wanted = tuple(Library) if library is None else (Library(library),)
    first = choose_library(name, stored, wanted)
    installed = [each for each in wanted if importlib.util.find_spec(each)]
    if first in installed:
        return first
    try:
        return choose_library(name, stored, installed)
    except PlanError:
        raise PlanError(
            f"optimizer: the plan's states need {first}, which is not installed. "
            f"Run: pip install 'precision-assign[optimizers]'."
        ) from None


# ---- the libraries' optimizers, from torch's


def _from_torch(made: Optimizer) -> Optimizer:
    """Return ``made`` itself: it rounds updates of 16-bit masters to nearest."""
    return made


def _from_updates(made: Optimizer, rounding: str) -> Optimizer:
    name = optimizer_name(made)
    names: tuple[str, ...]
    if name == "SGD":
        _refuse(made, "assign.optim.updates", {"maximize": False, "differentiable": False})
        names = ("params", "lr", "momentum", "dampening", "weight_decay", "nesterov")
    else:
        _refuse(made, "assign.optim.updates", {"maximize": False, "differentiable": False, "amsgrad": False})
        names = ("params", "lr", "betas", "eps", "weight_decay")
    kind = updates.SGD if name == "SGD" else updates.AdamW
    return kind([_part(group, *names) for group in made.param_groups], rounding=rounding)


def _from_torchao(made: Optimizer) -> Optimizer:
    optim: Any = importlib.import_module("torchao.optim")  # it has no types
    _refuse(made, "torchao", {"maximize": False, "capturable": False, "differentiable": False})
    groups = [_part(group, "params", "betas", "eps", "weight_decay", "amsgrad") for group in made.param_groups]
    for group, source in zip(groups, made.param_groups, strict=True):
        group["lr"] = _tensor_rate(source["lr"])
    kind = optim.AdamW8bit if made.param_groups[0]["decoupled_weight_decay"] else optim.Adam8bit
    planned: Optimizer = kind(groups)
    return planned


def _from_bitsandbytes(made: Optimizer) -> Optimizer:
    optim: Any = importlib.import_module("bitsandbytes.optim")  # it has no types
    if any(distributed.is_sharded(parameter) for group in made.param_groups for parameter in group["params"]):
        raise PlanError(
            f"optimizer: the plan's states need bitsandbytes, whose {type(made).__name__} takes no parameters that "
            "fully_shard has sharded.\n  Allowed: torch's optimizers, torchao's Adam and AdamW; or "
            "DistributedDataParallel.\n  Store states in fp32 or bf16, or use torch.optim.AdamW."
        )
    plain = {"maximize": False, "amsgrad": False, "nesterov": False, "dampening": 0, "capturable": False}
    _refuse(made, "bitsandbytes", plain | {"differentiable": False})
    groups = [_part(group, "params", "lr", "betas", "eps", "weight_decay") for group in made.param_groups]
    planned: Optimizer
    if optimizer_name(made) == "SGD":
        for group, source in zip(groups, made.param_groups, strict=True):
            group["betas"] = (source["momentum"], source["dampening"])
        planned = optim.SGD8bit(groups, lr=groups[0]["lr"], momentum=groups[0]["betas"][0])
    else:
        kind = optim.AdamW8bit if made.param_groups[0]["decoupled_weight_decay"] else optim.Adam8bit
        planned = kind(groups)
    return planned


_MAKERS: Mapping[Library, Callable[[Optimizer], Optimizer]] = MappingProxyType(
    {Library.TORCH: _from_torch, Library.TORCHAO: _from_torchao, Library.BITSANDBYTES: _from_bitsandbytes}
)


def _part(group: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: group[name] for name in names if name in group}


def _refuse(made: Optimizer, library: str, plain: Mapping[str, Any]) -> None:
    for group in made.param_groups:
        odd = next((name for name, value in plain.items() if group.get(name, value) != value), None)
        if odd is not None:
            raise PlanError(
                f"optimizer: the plan's states need {library}, whose {type(made).__name__} has no {odd} "
                f"(given: {odd}={group[odd]}). Leave the option out, or store fp32 states."
            )


def _tensor_rate(rate: float | Tensor) -> Tensor:
    return torch.as_tensor(rate, dtype=torch.float32).clone()


# ---- loading


class _Planned(Optimizer):
    """Mixin of every optimizer made here: its states start, and are loaded, in the formats of the plan."""

    assign_library: Library
    assign_stored: dict[Tensor, Stored]
    assign_rounding: UpdateRounding

    def assign_reset(self) -> None:
        """Reset the states to those before the first step."""
        self.state.clear()
        for parameter, stored in self.assign_stored.items():
            states = self.assign_own_states(parameter)
            with self.assign_joined(parameter, states):
                made = make_states(self.assign_library, parameter, stored)
            states |= made
            if states:
                self.state[parameter] = states

    def assign_own_states(self, parameter: Tensor) -> dict[str, Any]:
        """Return the states that this package adds to those of the library: extra bits, or Kahan's compensation."""
        stored = self.assign_stored[parameter]
        if stored.master.extra_bits:
            return {EXTRA_BITS: extra_bits_of(parameter)}
        if stored.widened and self.assign_rounding == UpdateRounding.KAHAN:
            return {COMPENSATION: torch.zeros_like(parameter, requires_grad=False)}
        return {}

    def assign_joined(
        self,
        parameter: Tensor,
        states: dict[str, Any],
        rounding: UpdateRounding = UpdateRounding.NEAREST,
        randomness: Randomness | None = None,
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the parameter is as its library needs it: float32 if widened or with extra bits."""
        stored = self.assign_stored[parameter]
        if stored.widened:
            return widened_master(parameter, states, rounding, randomness, stored.key)
        return joined(parameter, states) if stored.master.extra_bits else contextlib.nullcontext()

    def load_state_dict(self, state_dict: Mapping[str, Any], *, lossy: bool = False) -> None:
        """Load states and options; states are converted to the plan's formats.

        Args:
            state_dict: ``state_dict()`` of an optimizer of any of the libraries.
            lossy: whether values may be rounded.
        Raises:
            PlanError: the states belong to another model or lack some that the plan stores; or a value would be
                rounded, and ``lossy`` is not set. Nothing is changed then.
        """
        packed = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in packed], [len(group["params"]) for group in self.param_groups]
        if sizes[0] != sizes[1]:
            raise PlanError(
                f"load_state_dict: groups of {sizes[0]} parameters are loaded, this optimizer has {sizes[1]}. "
                "Load the state_dict of an optimizer of this model with the same groups."
            )
        numbers = (number for group in packed for number in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        loaded = {
            parameter: self._restored(parameter, unwrapped(state_dict["state"].get(number, {})), lossy=lossy)
            for parameter, number in zip(parameters, numbers, strict=True)
        }
        rate = _tensor_rate if self.assign_library is Library.TORCHAO else float
        groups = [
            _translated(theirs, mine) | {"lr": rate(theirs["lr"])}
            for mine, theirs in zip(self.param_groups, packed, strict=True)
        ]
        super().load_state_dict({"state": {}, "param_groups": groups})
        for parameter, states in loaded.items():
            if EXTRA_BITS in states:
                states[EXTRA_BITS] = load_extra_bits(parameter, states[EXTRA_BITS])
            elif self.assign_stored[parameter].master.extra_bits:  # keep those of the model
                states[EXTRA_BITS] = extra_bits_of(parameter)
        self.state.update({parameter: states for parameter, states in loaded.items() if states})

    def _restored(self, parameter: Tensor, saved: Mapping[str, Any], *, lossy: bool) -> dict[str, Any]:
        """Return a parameter's states made from saved ones, with extra bits or compensation if the plan needs them."""
        stored = self.assign_stored[parameter]
        extra = {name: value for name, value in saved.items() if name == EXTRA_BITS}
        if extra and not stored.master.extra_bits and not lossy:
            raise PlanError(
                f"load_state_dict: the loaded state has extra bits of the master of {stored.key!r}, which the plan "
                f"stores as {stored.master.name}.\n  Allowed: states with extra bits for masters in bf16+8.\n"
                "  Load assign.optim.widened_state_dict(optimizer), and assign.optim.widened_weights(model, optimizer) "
                "into the float32 model; or leave the bits out: load_state_dict(state, lossy=True)."
            )
        own_states = self.assign_own_states(parameter)
        if COMPENSATION in own_states and COMPENSATION in saved:
            own_states[COMPENSATION].copy_(saved[COMPENSATION])
        elif COMPENSATION in saved and self.assign_rounding != UpdateRounding.KAHAN:
            if not lossy:
                raise PlanError(
                    f"load_state_dict: the loaded state has Kahan's compensation of {stored.key!r}, and this optimizer "
                    f"rounds updates {self.assign_rounding}.\n  Allowed: update_rounding='kahan'.\n"
                    "  Make the optimizer with it, or leave the compensation out: load_state_dict(state, lossy=True)."
                )
            saved = {name: value for name, value in saved.items() if name != COMPENSATION}
        own = _of_library(saved, widened=stored.widened)
        with self.assign_joined(parameter, own_states):
            states = self._converted(parameter, own, lossy=lossy)
        return states | (extra if stored.master.extra_bits else own_states)

    def _converted(self, parameter: Tensor, saved: Mapping[str, Any], *, lossy: bool) -> dict[str, Any]:
        stored = self.assign_stored[parameter]
        own = make_states(self.assign_library, parameter, stored)
        wide = widened(saved)
        missing = [name for name in stored.states if name not in wide] if own or saved else []
        if missing:
            raise PlanError(
                f"load_state_dict: the plan stores {state_key(stored.key, missing[0])!r} as "
                f"{stored.states[missing[0]].name}, but the loaded state has {', '.join(wide) or 'no states'} for it.\n"
                "  Load the state_dict of an optimizer with these states after a step, or use a new optimizer."
            )
        for name in stored.states if own or saved else ():
            shape = getattr(wide[name], "shape", None)
            if shape != parameter.shape:
                raise PlanError(
                    f"load_state_dict: {state_key(stored.key, name)!r} is loaded with the shape "
                    f"{None if shape is None else tuple(shape)}, and its parameter has {tuple(parameter.shape)}. "
                    "Load the state_dict of an optimizer of this model."
                )
        states = restore(own, saved, parameter)
        kept = widened(states)
        for name in [] if lossy else [name for name, value in wide.items() if isinstance(value, Tensor)]:
            lost = count_changed(kept[name], wide[name])
            if lost:
                raise PlanError(
                    f"load_state_dict: {state_key(stored.key, name)!r} would be rounded in {lost} of its "
                    f"{wide[name].numel()} values: the plan stores {stored}.\n"
                    "  Load into a plan that stores it as it was saved, or accept it: "
                    "load_state_dict(state, lossy=True)."
                )
        return states


def _translated(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved options that ``mine`` has too. bitsandbytes stores SGD's momentum in ``betas``."""
    known = {name: value for name, value in theirs.items() if name in mine or name == "initial_lr"}
    if "momentum" in mine and "momentum" not in theirs:
        known["momentum"], known["dampening"] = theirs["betas"]
    elif "momentum" in theirs and "momentum" not in mine:
        known["betas"] = theirs["momentum"], theirs["dampening"]
    return {**mine, **known}


def _planned(made: Optimizer, *, one_by_one: bool, rounded: bool) -> _Planned:
    """Return ``made`` with a class that is also a :class:`_Planned`.

    Args:
        made: an optimizer of any of the libraries; its class is replaced.
        one_by_one: whether it steps one parameter after another, so that only one of them and its gradient is widened
            at a time.
        rounded: whether parameters or states are rounded to emulated formats after each step.
    """
    kind = type(made)
    body: dict[str, Any] = {"__module__": kind.__module__}
    if one_by_one or rounded:
        step: Any = kind.step
        plain = step.__wrapped__ if getattr(step, "hooked", False) else step  # hooks are for whole steps
        plain = _stepping_one_by_one(plain) if one_by_one else plain
        body["step"] = Optimizer.profile_hook_step(_rounding_after(plain) if rounded else plain)
    made.__class__ = type(kind.__name__, (_Planned, kind), body)
    assert isinstance(made, _Planned)
    return made


def _rounding_after(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step that rounds emulated masters and states, of the parameters that have a gradient, at its end."""

    def whole_step(self: _Planned, closure: Callable[[], float] | None = None) -> float | None:
        loss: float | None = step(self, closure)
        with torch.no_grad():
            for parameter, stored in self.assign_stored.items():
                if parameter.grad is not None:
                    formats = {name: fmt for name, fmt in stored.rounded.items() if name in self.state[parameter]}
                    for name, fmt in formats.items():
                        round_in_place(distributed.local_part(self.state[parameter][name]), fmt)
                    if stored.master.layout:
                        round_in_place(distributed.local_part(parameter), stored.master)
        return loss

    return whole_step


def _stepping_one_by_one(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a whole step that calls ``step`` for each parameter alone, with it and its gradient widened.

    Raises (when called):
        PlanError: a gradient in 8 bits was not made by a planned model, or a parameter was loaded without extra bits.
    """

    def whole_step(self: _Planned, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        randomness = None
        rounded_here = any(each.widened for each in self.assign_stored.values())
        if rounded_here and self.assign_rounding == UpdateRounding.STOCHASTIC:
            randomness = Randomness.draw(next(parameter.device for group in groups for parameter in group["params"]))
        try:
            for group in groups:
                for parameter in [each for each in group["params"] if each.grad is not None]:
                    fmt = self.assign_stored[parameter].gradient
                    self.param_groups = [{**group, "params": [parameter]}]
                    check_known(parameter, "optimizer")
                    with (
                        self.assign_joined(parameter, self.state[parameter], self.assign_rounding, randomness),
                        widened_gradient(parameter, fmt) if fmt.scaled else contextlib.nullcontext(),
                    ):
                        step(self)
                    forget_scale(parameter)
        finally:
            self.param_groups = groups
        return loss

    return whole_step
