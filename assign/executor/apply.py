"""Apply a plan to a model: the module, its parameters and its ``state_dict`` stay the same, the arithmetic changes.

The planned module shares its ``__dict__`` with the user's module: it is of the same class by ``isinstance``, and has
the same parameters and training flag. Only calling it differs: the call is captured, marked, packed and compiled, once
per shape and mode, as ``torch.compile`` does.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assign import _torch, distributed
from assign.errors import PlanError, suggest
from assign.executor.backends import Backend, make_backend
from assign.executor.context import Context, PassLog, Step
from assign.executor.fit import Scope, fit
from assign.executor.methods import methods_of, planned_method
from assign.executor.micro_batches import MicroBatchedStep, check_statistics, parameters_to_sum
from assign.executor.parameter_storage import store_parameters
from assign.executor.pipeline import CAPTURED, run_passes
from assign.executor.sparse import sparse_inputs, with_sparse_gradients
from assign.executor.unused import results_behind_inputs, without_unused_gradients
from assign.numerics.delayed import DelayedScales
from assign.numerics.promotion import Promotion
from assign.plan.keys import Key, Part
from assign.plan.persistent_state import narrow_buffers
from assign.plan.plan import Assignment
from assign.tracing.capture import Capture, Loss, call_model, check_parameters, compile_step
from assign.tracing.functionalize import functionalize
from assign.tracing.loaded import complete
from assign.tracing.tensor_sites import walk


def apply(
    model: nn.Module,
    plan: Assignment,
    *,
    backend: str = "inductor",
    promotion: Promotion | None = None,
    scales: DelayedScales | None = None,
    log_passes: PassLog | None = None,
) -> nn.Module:
    """Return the model, computing under ``plan``. Train it exactly as before.

    The result shares the parameters, their names and the ``state_dict`` of ``model``. If the plan stores masters,
    gradients or buffers in another dtype, those of ``model`` are converted, rounded to nearest. For masters in
    ``bf16+8``, the model's ``state_dict`` holds the bf16 part and the optimizer's ``state_dict`` the other 8 bits;
    :func:`assign.optim.widened_weights` joins them. Code that is called outside the module, such as a loss on its
    output, runs as usual; entries under ``loss/`` require :func:`planned_step`. Optimizer states follow the plan with
    :func:`assign.optimizer`. Sparse gradients of embeddings stay sparse (:mod:`assign.executor.sparse`).

    For several processes, wrap the planned module in ``DistributedDataParallel``, or in
    :func:`assign.distributed.data_parallel` if gradients are stored in another dtype than their masters. If masters are
    in float32, ``fully_shard`` also works, called before or after this function. See :mod:`assign.distributed`.

    Args:
        model: in any floating-point dtypes. It can still be called without the plan, unless the plan has changed the
            dtype of its parameters or buffers.
        plan: for this model.
        backend: ``inductor`` (compiled, fast) or ``eager`` (no compiler needed, exact memory, slower rounding).
        promotion: made for ``plan``; changes tensors that overflow too often to their high format.
        scales: histories of delayed scales. Default: new ones.
        log_passes: called with a :class:`assign.executor.context.PassChange` for each graph pass, whenever a graph is
            captured; says what the pass added and removed.
    Returns:
        A module of the same class as ``model``.
    Raises:
        PlanError: the plan is for another model (names the nearest keys), or the promotion for another plan.
        TraceError: a parameter to train has a dtype without arithmetic, such as float8; or the first call cannot be
            captured.
    Examples:
        ```python
        planned = assign.apply(model, plan, backend="eager")
        loss(planned, batch).backward()
        ```
    """
    store(model, plan)
    graph_backend, original = _graph_backend(plan, backend, log_passes), type(model)

    def planned_call(function: Callable[..., Any], scope: Scope) -> Callable[..., Any]:
        return compile_planned(model, function, plan, graph_backend, promotion, scales, scope=scope, log=log_passes)

    compiled = planned_call(call_model, Scope.CALL)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return compiled(self, *args, **kwargs)

    def current(_self: nn.Module) -> Assignment:
        return promotion.plan if promotion else plan

    def duplicate(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        return apply(copy.deepcopy(_plain(self, original), memo), current(self), backend=backend)

    def reduce(self: nn.Module, _protocol: int = 2) -> Any:
        return _restore, (_plain(self, original), current(self), backend)

    def plain(self: nn.Module) -> nn.Module:
        return _plain(self, original)

    def method(name: str) -> Callable[..., Any]:
        compile_method = functools.cache(lambda: planned_call(_calling(original, name), Scope.METHOD))
        return planned_method(name, plain, compile_method)

    body = {
        **{name: method(name) for name in methods_of(original)},
        "__call__": call,
        "__deepcopy__": duplicate,
        "__reduce_ex__": reduce,
        "assign_plan": property(current),
    }
    planned: nn.Module = _share(
        model, type(original.__name__, (original,), {**body, "__module__": original.__module__})
    )
    if distributed.is_several():
        _torch.share_fsdp_state(model, planned)
    return planned


class _PlannedClasses(dict[tuple[int, int, str], tuple[Assignment, Promotion | None, type]]):
    """Classes that :func:`autocast` made for a model, stored in that model; they and the model are freed together.

    A copy of the model, or a pickle, gets an empty dict instead.
    """

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return dict, ()


@contextlib.contextmanager
def autocast(
    model: nn.Module, plan: Assignment, *, backend: str = "inductor", promotion: Promotion | None = None
) -> Iterator[None]:
    """Compute under ``plan`` whenever ``model`` is called within the context.

    A second context with the same model, plan and promotion reuses the compiled code.

    Args:
        model: as for :func:`apply`; its class is replaced within the context.
        plan: as for :func:`apply`.
        backend: as for :func:`apply`.
        promotion: as for :func:`apply`.
    Returns:
        A context manager.
    Raises:
        PlanError: as for :func:`apply`; or the plan stores masters, gradients or buffers in 16 bits, which would
            outlast the context.
        TraceError: as for :func:`apply`.
    Examples:
        ```python
        with assign.autocast(model, plan, backend="eager"):
            loss(model, batch).backward()
        ```
    """
    lasting = first_lasting(plan)
    if lasting is not None:
        raise PlanError(
            f"autocast: the plan stores {lasting!r} as {plan.entries[lasting].format}, and a context cannot restore "
            "stored values at its end. Use assign.apply(model, plan)."
        )
    cache = model.__dict__.get("_assign_planned")
    if not isinstance(cache, _PlannedClasses):
        cache = model.__dict__["_assign_planned"] = _PlannedClasses()
    key = (id(plan), id(promotion), backend)
    if key not in cache:
        cache[key] = (plan, promotion, type(apply(model, plan, backend=backend, promotion=promotion)))
    original = type(model)
    object.__setattr__(model, "__class__", cache[key][-1])
    try:
        yield
    finally:
        object.__setattr__(model, "__class__", original)


def first_lasting(plan: Assignment) -> str | None:
    """Return the key of the first narrow master, gradient or buffer; applying the plan changes it in the model."""
    narrow = (key for key, entry in plan.entries.items() if entry.format != "fp32")
    return next((key for key in narrow if Key.parse(key, plan.entries).is_in_model), None)


def planned_step(
    model: nn.Module,
    loss: Loss,
    plan: Assignment,
    *,
    backend: str = "inductor",
    promotion: Promotion | None = None,
    scales: DelayedScales | None = None,
    log_passes: PassLog | None = None,
) -> Callable[[Any], Tensor]:
    """Return a function ``step(batch)`` → loss that computes model and loss under ``plan``.

    The loss is in the same graph as the model, so entries under ``loss/`` take effect. Under a plan with micro-batches,
    the step runs the parts of the batch one after another, forward and backward; the loss that it returns then gives
    the summed gradients to the parameters in ``backward``. ``DistributedDataParallel``
    reduces only gradients of modules that are called through it: use :func:`apply` there.

    Args:
        model: as for :func:`apply`; its class does not change.
        loss: ``loss(model, batch)`` → scalar tensor.
        plan: as for :func:`apply`.
        backend: as for :func:`apply`.
        promotion: as for :func:`apply`.
        scales: as for :func:`apply`.
        log_passes: as for :func:`apply`.
    Returns:
        The function; call ``backward`` on its result.
    Raises:
        PlanError: as for :func:`apply`.
        TraceError: as for :func:`apply`.
    Examples:
        ```python
        step = assign.planned_step(model, loss, plan, backend="eager")
        step(batch).backward()
        ```
    """
    store(model, plan)
    graph_backend = _graph_backend(plan, backend, log_passes)
    compiled = compile_planned(model, loss, plan, graph_backend, promotion, scales, log=log_passes)
    if plan.step.micro_batches > 1:
        return MicroBatchedStep(model, compiled, plan.step)
    return functools.partial(compiled, model)


def store(model: nn.Module, plan: Assignment) -> None:
    """Check that the plan belongs to the model, and convert parameters and gradients to the dtypes of the plan."""
    distributed.check_one_module(model)
    check_parameters(model)
    _check_parameters_named(model, plan)
    distributed.check_sharded(model, complete(plan, model))
    store_parameters(model, plan)


def compile_planned(
    model: nn.Module,
    loss: Callable[..., Any],
    plan: Assignment,
    graph_backend: _torch.GraphBackend,
    promotion: Promotion | None = None,
    scales: DelayedScales | None = None,
    *,
    scope: Scope = Scope.STEP,
    whole: bool = False,
    log: PassLog | None = None,
) -> Callable[..., Any]:
    """Return ``call(module, …)``, which computes ``loss(module, …)`` under the plan; ``module`` is what the user calls.

    The model must already store its parameters as the plan says (:func:`store`). ``graph_backend`` comes from
    :func:`make_backend`. With ``whole``, the step is one graph in any case, see ``compile_step``. ``log`` is called
    with the change of each graph pass.
    """
    if promotion is not None and not promotion.watches(plan):
        raise PlanError(
            "apply: the promotion was made for another plan. Make one for this plan: Promotion(plan), and give it to "
            "everything that runs the plan in this training."
        )
    delayed = scales or DelayedScales(plan)
    given, plan = plan, complete(plan, model)

    def receive(capture: Capture) -> Callable[..., Any]:
        check_statistics(capture, plan.step)
        functionalize(capture.graph)
        needed, sparse = results_behind_inputs(capture.graph), sparse_inputs(capture)
        walked = walk(capture)
        new = fit(given, walked, capture, scope) if capture.training else {}
        summed = parameters_to_sum(capture, needed, sparse) if plan.sums_inside else frozenset()
        step = Step(capture=capture, walked=walked, promotion=promotion, scales=delayed, summed=summed)
        run_passes(capture.graph, CAPTURED, Context(plan=plan.replace(new), step=step, log=log), "captured")

        def added(inputs: Sequence[Any]) -> list[Any]:
            return [value for each in step.added for value in each.make(inputs)]

        def filled(*inputs: Any) -> Any:
            """Run the graph; autograd gets no gradient of parameters that the graph sums, and calls no hook of them."""
            own = (x.detach() if place in summed else x for place, x in enumerate(inputs))
            return run(*own, *added(inputs))

        examples = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in added(capture.inputs)]
        run = with_sparse_gradients(graph_backend(capture.graph, [*capture.inputs, *examples]), sparse)
        for node in [node for each in step.added for node in each.nodes]:  # Dynamo counts the inputs of its graph again
            _torch.drop_input(capture.graph, node)
        call = filled if step.added else run
        return without_unused_gradients(call, capture, needed) if capture.training else call

    narrow = narrow_buffers(plan.entries)
    compiled = distributed.wrap_distributed(
        compile_step(_plain(model, type(model)), loss, receive, buffers=narrow, whole=whole), plan
    )

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        delayed.begin(torch.is_grad_enabled())
        with torch.autocast(_device_type(model), enabled=False):  # the plan decides, not a surrounding autocast
            return compiled(module, *args, **kwargs)

    return call


def _share(model: nn.Module, kind: type) -> Any:
    """Return an object of class ``kind`` that shares the model's state."""
    twin: Any = object.__new__(kind)
    object.__setattr__(twin, "__dict__", model.__dict__)
    return twin


def _plain(model: nn.Module, kind: type) -> nn.Module:
    twin: nn.Module = _share(model, kind)
    return twin


def _calling(kind: type[nn.Module], name: str) -> Callable[..., Any]:
    """Return the method ``name`` as a function."""
    method: Callable[..., Any] = getattr(kind, name)
    return lambda model, *args, **kwargs: method(model, *args, **kwargs)


def _restore(model: nn.Module, plan: Assignment, backend: str) -> nn.Module:
    return apply(model, plan, backend=backend)


def _device_type(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    return parameter.device.type if parameter is not None else "cpu"


def _graph_backend(plan: Assignment, backend: str, log: PassLog | None) -> _torch.GraphBackend:
    if backend not in list(Backend):
        near = suggest(backend, Backend)
        raise PlanError(
            f"apply: backend {backend!r} is not known{f', did you mean {near}' if near else ''}. "
            f"Choose one of: {', '.join(Backend)}."
        )
    return make_backend(plan, Backend(backend), log=log)


def _check_parameters_named(model: nn.Module, plan: Assignment) -> None:
    """Check, before capture, that every parameter of the model is in the plan and the other way round.

    A plan without any parameter is valid: its model reads its parameters outside every captured piece.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    keys = {text: Key.parse(text, plan.entries) for text in plan.entries}
    planned = {text for text, key in keys.items() if key.part is Part.TENSOR and not key.is_activation}
    planned |= {text for text, key in keys.items() if key.part is Part.BUFFER and text in names}
    unread = [name for name in names if name not in planned]
    gone = sorted(planned - set(names))
    if gone or (planned and len(unread) == len(names)):
        name = (gone or unread)[0]
        others = names if gone else planned
        near = suggest(name, others)
        who = "is in the plan but not in the model" if gone else "is in the model but not in the plan"
        raise PlanError(
            f"apply: this plan belongs to another model: parameter {name!r} {who}"
            f"{f'; nearest: {near}' if near else ''}.\n"
            f"  The plan names {len(planned)} parameters, the model has {len(names)}.\n"
            "  Use the plan's own model, or make a new plan with assign.search or 'assign search'."
        )
