"""Use private names of torch. This is the only module that does, and the one to check for a new torch release.

Written against torch 2.11 to 2.13.
"""

import contextlib
import functools
import inspect
import logging
import operator
import os
import threading
import types
import typing
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import fx, library, nn
from torch._C import DispatchKey
from torch._C._dynamo.eval_frame import reset_code
from torch._decomp import decompositions, get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import config as dynamo_config
from torch._dynamo import trace_rules
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import cached_backends
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException, TorchRuntimeError, Unsupported, UserError
from torch._dynamo.source import LocalSource
from torch._dynamo.variables import TorchInGraphFunctionVariable
from torch._dynamo.variables.tensor import TensorVariable
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._library.opaque_object import get_opaque_type_name, is_opaque_type, register_opaque_type
from torch._opaque_base import OpaqueBase
from torch._ops import resolve_key
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
)
from torch.amp import autocast_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
    ShapeEnv,
    StatelessSymbolicContext,
    free_unbacked_symbols,
)
from torch.fx.graph import _BoxedCodeGen
from torch.nn.utils import stateless
from torch.utils import _pytree as pytree
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "OpaqueBase",
    "PendingUnbackedSymbolNotFound",
    "TorchDispatchMode",
    "is_traceable_wrapper_subclass",
    "pytree",
]

Graphs = tuple[fx.GraphModule, fx.GraphModule]
GraphBackend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]

CaptureError = TorchDynamoException
"""Exception that Dynamo raises when it cannot capture a function as one graph."""

VALUES_MISSING = (GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound)
"""Exceptions that Dynamo raises if a size or a branch depends on values."""

CAPTURE_FAILURES = (TorchDynamoException, *VALUES_MISSING)
"""Exceptions that Dynamo raises or passes on if it cannot capture a function as one graph."""

GRAPH_BREAKS = (Unsupported, UserError, TorchRuntimeError)
"""The ``CAPTURE_FAILURES`` that concern the user's code."""

SET_GRAD_MODE = torch._C._set_grad_enabled
"""The function that a captured graph calls at the beginning and end of ``torch.no_grad`` or ``torch.enable_grad``."""

CHECKPOINT_OP = torch.ops.higher_order.tag_activation_checkpoint
"""The operator that a ``torch.utils.checkpoint`` block becomes: ``(body, *args)``."""


def fake_value(node: fx.Node) -> Any:
    """Return the value without data that Dynamo attached to a captured node, or None."""
    return node.meta.get("example_value")


def has_sizes_from_data(graph: fx.GraphModule) -> bool:
    """Whether the shape of a tensor in a captured graph depends on values.

    Such a shape is unknown, or known only because the user's code later compares it with a known one, which AOTAutograd
    does not see when it makes the tensor.
    """
    tensors = ((node, fake_value(node)) for node in graph.graph.nodes)
    return any(
        isinstance(value, torch.Tensor) and (free_unbacked_symbols(value) or node.meta.get("unbacked_bindings"))
        for node, value in tensors
    )


def joint_value(node: fx.Node) -> Any:
    """Return the value without data of a node of a joint, forward or backward graph, or None."""
    return node.meta.get("val")


def without_data(values: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """Within the context, new tensors have no data if ``values``, taken from a graph, have none."""
    found = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    return contextlib.nullcontext() if found is None else found


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Within the context, no dispatch mode is active and gradients are off: operators run on real data."""
    with _disable_current_modes(), torch.no_grad():
        yield


def is_profiled() -> bool:
    """Whether torch's profiler is running."""
    profiled: Any = torch.autograd
    return bool(profiled._profiler_enabled())


def has_fp16_convolution() -> bool:
    """Whether oneDNN has fp16 convolutions on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def is_backward(node: fx.Node) -> bool:
    """Whether a node of a joint graph runs in the backward pass."""
    return node.meta.get("partitioner_tag") == "is_backward"


def is_tangent(node: fx.Node) -> bool:
    """Whether an input of a joint graph is the gradient of one of its results."""
    return node.op == "placeholder" and str(node.target).startswith("tangents")


def is_in_neither(node: fx.Node) -> bool:
    """Whether torch has not set in which pass a node of a joint graph runs."""
    return "partitioner_tag" not in node.meta


def set_backward(node: fx.Node, backward: bool) -> None:
    """Set in which pass a node added to a joint graph runs."""
    node.meta["partitioner_tag"] = "is_backward" if backward else "is_forward"


def pin_backward(node: fx.Node) -> None:
    """Make a node added to a joint graph run in the backward pass, regardless of what a partitioner finds cheaper."""
    node.meta["partitioner_tag"] = "must_be_in_backward"


def is_recomputed(node: fx.Node) -> bool:
    """Whether the user's checkpointing asks for this node to be computed again in the backward pass."""
    return node.meta.get("recompute") is not None


def forget_recompute(node: fx.Node) -> None:
    """Remove a node from the user's checkpointed region."""
    node.meta.pop("recompute", None)
    node.meta.pop("ac_graph_id", None)


def compiled_nodes(x: Any) -> list[tuple[Any, int]]:
    """Return the autograd nodes of compiled graphs nearest to ``x``, each with the index of the result there.

    A view of a result has its own autograd node before that of the graph. So has a tensor that a graph has written to.
    """
    known = isinstance(x, torch.Tensor) and x.grad_fn is not None
    edges: list[tuple[Any, int]] = [(x.grad_fn, x.output_nr)] if known else []
    found, seen = [], set[tuple[Any, int]](edges)
    while edges:
        function, number = edges.pop()
        if "CompiledFunction" in function.name():
            found.append((function, number))
        else:
            new = [edge for edge in function.next_functions if edge[0] is not None and edge not in seen]
            seen.update(new)
            edges += new
    return found


def gradient_edge(x: torch.Tensor) -> tuple[Any, int]:
    """Return what identifies the gradient of ``x``; :func:`edge_of` returns it for an entry of ``next_functions``.

    For a leaf it is the tensor's ``id``, because ``torch.autograd.graph.get_gradient_edge`` takes microseconds for
    each.
    """
    return (id(x), 0) if x.grad_fn is None else (x.grad_fn, x.output_nr)


def edge_of(entry: tuple[Any, int]) -> tuple[Any, int]:
    """Return the :func:`gradient_edge` of the tensor of an entry of an autograd node's ``next_functions``."""
    return (id(entry[0].variable), 0) if hasattr(entry[0], "variable") else entry


def gradient_hooks(parameter: torch.Tensor) -> list[Callable[[torch.Tensor], torch.Tensor | None]]:
    """Return the hooks on the gradient of a leaf, in the order in which they were registered."""
    return list((parameter._backward_hooks or {}).values())


def accumulation_hooks(parameter: torch.Tensor) -> list[Callable[[torch.Tensor], None]]:
    """Return the hooks that run after a gradient was added to ``.grad`` of a leaf."""
    return list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())


def apply_function(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    """Return the result of an autograd function that makes one tensor; torch's own ``apply`` has no types."""
    run: Callable[..., Any] = function.apply
    return cast(torch.Tensor, run(*args))


def source_of(node: fx.Node, position: int = 0) -> fx.Node:
    """Return the argument of ``node`` at ``position``, which must be a node."""
    source = node.args[position]
    assert isinstance(source, fx.Node)
    return source


def output_of(graph: fx.GraphModule) -> fx.Node:
    """Return the output node of a graph."""
    return cast(fx.Node, next(node for node in graph.graph.nodes if node.op == "output"))


def body_of(graph: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    """Return the graph inside a checkpointed block."""
    body = graph.get_submodule(str(source_of(node).target))
    assert isinstance(body, fx.GraphModule)
    return body


def nodes_without_grad(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of a captured graph that run under ``torch.no_grad``."""
    found, enabled = set(), True
    for node in graph.nodes:
        if node.target is SET_GRAD_MODE:
            enabled = bool(node.args[0])
        elif not enabled:
            found.add(node)
    return found


def enable_grad_around(graph: fx.Graph, node: fx.Node) -> None:
    """Run a node in a region without gradients as if it were outside that region."""
    with graph.inserting_before(node):
        graph.call_function(SET_GRAD_MODE, (True,))
    with graph.inserting_after(node):
        graph.call_function(SET_GRAD_MODE, (False,))


def label(node: fx.Node, text: str) -> None:
    """Attach a text to a captured node; nodes of the joint graph made from it have the same text, in both passes."""
    node.meta["custom"] = {**node.meta.get("custom", {}), "assign": text}


def label_of(node: fx.Node) -> str:
    """Return the text that :func:`label` attached to the captured node from which this one was made; ``''`` if none."""
    custom = node.meta.get("custom") or {}
    return cast(str, custom.get("assign", ""))


def module_path(node: fx.Node) -> str:
    """Return Dynamo's path of the innermost module whose forward made the node; ``''`` outside every module."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def make_dense_output(example: Any) -> Any:
    """Return a real zero tensor with the shape of a captured output, for a graph that is never run."""
    if isinstance(example, torch.Tensor):
        shape = [int(size) for size in example.shape]
        return torch.zeros((), dtype=example.dtype, device=example.device).expand(shape)
    return example


def reshape_views(graph: fx.Graph) -> None:
    """Replace views by reshapes, which copy if no view is possible, in a graph that is run node by node.

    Torch chooses between a view and a copy by operators on tensors without data, but some kernels use another layout
    for their results.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default


def run_boxed(graph: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
    """Return a function that runs a graph node by node and frees every value, inputs included, after its last use."""
    reshape_views(graph.graph)
    graph.graph.set_codegen(_BoxedCodeGen())
    graph.recompile()

    def run(args: list[Any]) -> Any:
        return graph.forward(args)

    return boxed(run)


def boxed(run: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Mark a function for AOTAutograd as taking its arguments as one list, which it empties."""
    setattr(run, "_boxed_call", True)  # noqa: B010  a plain assignment to a function's attribute has no type
    return run


def _split(joint: fx.GraphModule, inputs: Any, kwargs: dict[str, Any]) -> Graphs:
    _read_dead_results(joint.graph)
    allowed = ("num_fwd_outputs", "static_lifetime_input_indices", "static_lifetime_input_nodes")
    return default_partition(joint, inputs, **{name: kwargs[name] for name in allowed if name in kwargs})


def _read_dead_results(graph: fx.Graph) -> None:
    """Add a reader to each multi-output operator that has none.

    With ``fallback_random``, torch keeps unused random operators in the graph, and its partitioner refuses a
    multi-output operator without a ``getitem``.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and not node.users and isinstance(joint_value(node), (tuple, list)):
            with graph.inserting_after(node):
                part = graph.call_function(operator.getitem, (node, 0))
            part.meta.update(node.meta, val=joint_value(node)[0])


def _split_minimally(joint: fx.GraphModule, inputs: Any, kwargs: dict[str, Any]) -> Graphs:
    allowed = ("num_fwd_outputs", "static_lifetime_input_indices")
    with functorch_config.patch(cse=False):
        return min_cut_rematerialization_partition(
            joint, inputs, **{name: kwargs[name] for name in allowed if name in kwargs}
        )


def eager_backend(
    partition: Callable[[fx.GraphModule, Callable[[fx.GraphModule], Graphs]], Graphs],
    compiler: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]] = run_boxed,
) -> GraphBackend:
    """Return a Dynamo backend that runs the partitioned graphs as they are.

    Args:
        partition: ``(joint graph, split) -> (forward, backward)``; ``split`` is torch's default partitioner.
        compiler: compiles each graph.
    """

    def partition_fn(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Graphs:
        return partition(joint, lambda graph: _split(graph, inputs, kwargs))

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition_fn)
    return cast(GraphBackend, backend)


def inductor_backend(
    partition: Callable[[fx.GraphModule, Callable[[fx.GraphModule], Graphs]], Graphs],
    inline: Callable[[fx.Graph], None],
    identity: str,
    passes: Sequence[Path],
    compiler: Callable[..., Callable[..., Any]] | None = None,
) -> GraphBackend:
    """Return a Dynamo backend that compiles the partitioned graphs with Inductor.

    Args:
        partition: as for :func:`eager_backend`.
        inline: edits each graph in place, right before Inductor lowers it.
        identity: text for what ``partition`` and ``inline`` depend on besides their code; both are part of Inductor's
            cache key.
        passes: the files with that code.
        compiler: compiles each graph instead of Inductor; takes the arguments of :func:`program_of`.
    """
    from torch._inductor.compile_fx import compile_fx  # here: the import takes a second, and eager never needs it
    from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn, get_hash_for_files

    key = get_hash_for_files(tuple(map(str, passes)), extra=identity).hex()

    class Keyed:
        def uuid(self) -> str:
            return key

        def __reduce__(self) -> tuple[type[str], tuple[str]]:  # pickled only for Inductor's cache key
            return str, (key,)

    class Partitioner(Keyed, CustomPartitionerFn):
        def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Graphs:
            return partition(gm, lambda graph: _split_minimally(graph, joint_inputs, kwargs))

    class Inline(Keyed, CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            inline(graph)

    patches: Any = {"custom_partitioner_fn": Partitioner(), "post_grad_custom_pre_pass": Inline()}
    if compiler is None:
        return cast(GraphBackend, functools.partial(compile_fx, config_patches=patches))
    instead = cast(
        GraphBackend, functools.partial(compile_fx, config_patches=patches, inner_compile=cast(Any, compiler))
    )

    def receive(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        both_now = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
        with functorch_config.patch(both_now):
            return instead(graph, inputs)

    return receive


@functools.cache
def _without_gradient_on_meta() -> tuple[Any, ...]:
    """Return the composite operators that torch does not decompose on the ``meta`` device while it traces.

    They have a kernel of their own for ``meta``: Python's dispatcher does not decompose them and finds no derivative.
    """
    cpu, meta, parts = DispatchKey.AutogradCPU, DispatchKey.AutogradMeta, DispatchKey.CompositeImplicitAutograd
    packets = (getattr(torch.ops.aten, name) for name in dir(torch.ops.aten))
    overloads = (getattr(each, name) for each in packets if hasattr(each, "overloads") for name in each.overloads())

    def resolved(operator: Any, key: DispatchKey) -> Any:
        try:
            return resolve_key(operator, key)
        except RuntimeError:  # raised for an operator without a kernel for this key
            return None

    lost = (each for each in overloads if resolved(each, cpu) == parts and resolved(each, meta) == meta)
    return tuple(each for each in lost if meta not in each.py_kernels)  # others have a derivative of their own there


_META_LOCK = threading.Lock()
"""Held while operators are changed for ``meta``: another thread must not change them back meanwhile."""


@contextlib.contextmanager
def gradients_on_meta() -> Iterator[None]:
    """Within the context, graphs of tensors on the ``meta`` device have the backward pass that they have elsewhere."""
    meta, parts = DispatchKey.AutogradMeta, DispatchKey.CompositeImplicitAutograd
    with _META_LOCK:
        operators = _without_gradient_on_meta()
        for each in operators:
            each.py_kernels[meta] = functools.partial(each._op_dk, parts)
            each._dispatch_cache.clear()
        try:
            yield
        finally:
            for each in operators:
                del each.py_kernels[meta]
                each._dispatch_cache.clear()


def lays_channels_last(graph: fx.GraphModule) -> bool:
    """Whether Inductor lays out the images of a graph channels-last, regardless of their layout during tracing."""
    from torch._inductor.graph import GraphLowering

    return bool(GraphLowering.decide_layout_opt(graph, is_inference=False))


class _Written(Exception):
    """Inductor has written its program; the following steps would only compile it."""


def program_of(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> str:
    """Return the Python program that Inductor writes for a graph: which buffers it makes, runs kernels on, and drops.

    Args:
        graph: in aten operators, as passed to the compiler of one graph.
        inputs: the graph's inputs, in order; tensors without data are enough.
        options: options of Inductor's own compiler of one graph.
    """
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    programs: list[str] = []

    def keep(program: str) -> None:
        programs.append(program)
        raise _Written

    with (
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(keep)),
        inductor_config.patch(fx_graph_cache=False),
    ):
        try:
            compile_fx_inner(graph, inputs, **options)
        except Exception:
            if not programs:
                raise
    return programs[0]


class _NoKernels:
    """Replacement of the kernel compiler of a program: each kernel is, or has a ``run`` that is, an empty function."""

    def __getattr__(self, _name: str) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: self

    def __call__(self, *_args: Any, **_kwargs: Any) -> None:
        return None


def load_program(program: str) -> Callable[[list[Any]], Sequence[Any]]:
    """Return a program of :func:`program_of` as a function that runs without data.

    The function takes a list of tensors, which it empties. It makes and drops every buffer, and runs no kernel.
    """
    names: dict[str, Any] = {"__name__": "rehearsed"}
    with mock.patch("torch._inductor.async_compile.AsyncCompile", _NoKernels):
        exec(compile(program, "<program of Inductor>", "exec"), names)
    for name in [name for name in names if name.startswith("empty_strided_")]:
        device = name.removeprefix("empty_strided_").removesuffix("_pinned")
        names[name] = functools.partial(_empty_strided, device)
    names["reinterpret_tensor"] = _reinterpret
    names["assert_size_stride"] = names["assert_alignment"] = lambda *_args: None
    return cast(Callable[[list[Any]], Sequence[Any]], names["call"])


def report_strides(results: Sequence[Any]) -> None:
    """Report the strides of the results of a forward graph, as Inductor does: its backward graph depends on them."""
    context = TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        context.output_strides.extend(each.stride() if isinstance(each, torch.Tensor) else None for each in results)


def _empty_strided(device: str, size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _reinterpret(tensor: torch.Tensor, size: Any, stride: Any, offset: int) -> torch.Tensor:
    return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


def changed_inputs() -> tuple[int, ...]:
    """Return the positions of the inputs that a graph changes in place; valid right after AOTAutograd received it."""
    context = TracingContext.try_get()
    found: Any = context.fw_metadata if context else None
    return () if found is None else tuple(found.mutated_inp_runtime_indices)


def trace_inline(function: Callable[..., Any], args: Sequence[Any]) -> fx.GraphModule:
    """Return the graph of ``function`` on values without data, in Inductor's own set of operators."""
    from torch._inductor.decomposition import select_decomp_table

    with without_data(args):
        return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="real")(*args)


def writes_triton(device: torch.device) -> bool:
    """Whether Inductor writes its kernels for ``device`` in Triton, as for every GPU, and not in C++."""
    return device.type != "cpu"


def compile_kernel(
    function: Callable[..., None], examples: Sequence[torch.Tensor], varying: int
) -> Callable[..., None]:
    """Return Inductor's code for a function that writes its result into one of its arguments, without guards.

    A call takes a few microseconds, while ``torch.compile`` checks guards first. The caller must therefore ensure what
    guards ensure: dtypes and devices as in the examples, and fewer than 2^31 elements. Arguments may be the same
    tensor.

    Args:
        function: takes as many tensors as there are examples, and returns nothing.
        examples: arguments; the first axes of the first ``varying`` examples have the same length, and calls may use
            any length.
        varying: number of leading examples whose first axis may have any length.
    """
    from torch._inductor import config as inductor_config  # here: the import takes a second
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    mode = FakeTensorMode(shape_env=ShapeEnv())
    dynamic, static = DimDynamic.DYNAMIC, DimDynamic.STATIC
    with torch.inference_mode(False), torch.no_grad():
        examples = [torch.empty_like(example) for example in examples]
        fakes = [
            mode.from_tensor(
                example,
                symbolic_context=StatelessSymbolicContext(
                    dynamic_sizes=[dynamic if index < varying and not axis else static for axis in range(example.dim())]
                ),
            )
            for index, example in enumerate(examples)
        ]
        with mode, enable_python_dispatcher():  # for symbolic lengths
            graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="real")(*fakes)
        output_of(graph).args = ((),)
        graph.recompile()
        # Triton fuses a product and the following sum, and rounds once, unless it must match eager
        options = {"emulate_precision_casts": True} if writes_triton(examples[0].device) else {}
        with tracing(TracingContext(mode)), inductor_config.patch(options):
            compiled: Any = compile_fx_inner(graph, fakes)

    def run(*args: torch.Tensor) -> None:
        compiled(list(args))

    return run


def compile_step(step: nn.Module, backend: GraphBackend) -> Callable[..., Any]:
    """Return ``torch.compile`` of a module as one graph with our backend; logging and recurrent layers do not break it.

    Compiled code is freed with ``step``. By default Dynamo keeps the backend, and with it the model, until
    ``torch._dynamo.reset()``; here Dynamo gets only a weak reference, so the caller must keep ``backend`` alive while
    it calls the result. ``step.forward`` must have its own code object, because the code is reset at the end.

    The step is one graph within ``DistributedDataParallel`` too, where Dynamo would split it at the buckets. If a
    module later gets or loses a hook, a new graph is made; by default Dynamo would not check. ``requires_grad_(True)``
    in the middle of a step, for example after a frozen embedding, asks for a gradient that no parameter gets; it is
    ignored here.
    """
    received = weakref.ref(backend)

    def receive(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        alive = received()
        assert alive is not None, "the caller must keep the backend alive"
        return alive(graph, inputs)

    compiled = torch.compile(step, backend=receive, fullgraph=True)
    _forget_backend(receive)
    names = ("debug", "info", "warning", "error", "warning_once", "info_once", "warning_advice")
    loggers = {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}
    options = {
        "ignore_logging_functions": loggers,
        "optimize_ddp": False,
        "skip_nnmodule_hook_guards": False,
        "allow_rnn": True,
    }

    def run(*args: Any, **kwargs: Any) -> Any:
        ignore = mock.patch.object(TensorVariable, "method_requires_grad_", _ignore_requires_grad)
        with dynamo_config.patch(options), ignore:
            return compiled(*args, **kwargs)

    weakref.finalize(step, reset_code, step.forward.__code__)
    return run


def _forget_backend(backend: GraphBackend) -> None:
    """Remove our backend from the list that ``torch._dynamo.reset()`` resets: it has no state to reset."""
    for key, known in list(cached_backends.items()):
        if getattr(known, "compiler_fn", known) is backend:
            cached_backends.pop(key, None)


def unrolled_lstm() -> contextlib.AbstractContextManager[Any]:
    """Within the context, AOTAutograd decomposes recurrent layers as for training.

    Otherwise it uses oneDNN's layer, which is for inference, for every layer whose input needs no gradient.
    """
    layer = decompositions.one_layer_lstm
    return mock.patch.object(decompositions, "select_one_layer_lstm_function", return_value=layer)


_REQUIRES_GRAD = TensorVariable.method_requires_grad_


def _ignore_requires_grad(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
    """Run Dynamo's ``Tensor.requires_grad_``, but leave tensors made by the graph itself unchanged."""
    return _REQUIRES_GRAD(self, tx, *args, **kwargs) if self.source else self


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return a number that identifies a storage while it is alive, also on the meta device, which has no addresses."""
    number: int = storage._cdata
    return number


def multiply_in_bf16(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``a @ b`` of float32 matrices, or batches of matrices, whose elements bf16 holds, summed in float32.

    On a CPU the product is in float32. There, torch multiplies in bf16 with a float32 result only under a setting of
    the whole process, which would change the products of other threads.
    """
    if a.device.type != "cuda":
        return torch.matmul(a, b)
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    return multiply(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether ``torch._scaled_mm`` is fast on a device: on CUDA from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def multiply_in_fp8(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return ``a @ b + bias`` of float8 matrices with one scale each, summed in float32 and rounded once."""
    columns = b.t().contiguous().t()  # cuBLAS reads the second matrix by columns
    return torch._scaled_mm(a.contiguous(), columns, a_scale, b_scale, bias=bias, out_dtype=dtype)


def memory_changes(profiler: torch.profiler.profile) -> list[int]:
    """Return the bytes that a finished profiler saw allocated (positive) and freed (negative), in order of time.

    Its public interfaces give sums per operator; only the raw events are a timeline.
    """
    raw: Any = profiler.profiler
    events = raw.kineto_results.events()
    return [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]


def inner_exception(error: BaseException) -> BaseException:
    """Return the exception that our own backend raised inside Dynamo, or ``error`` itself."""
    if isinstance(error, BackendCompilerFailed):
        return cast(BaseException, error.inner_exception)
    return error


def copy_fake_value(source: fx.Node, target: fx.Node) -> None:
    """Copy the value without data of one captured node to another."""
    target.meta["example_value"] = source.meta["example_value"]


def replaced_parameters(
    model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> contextlib.AbstractContextManager[None]:
    """Within the context, replace the module's parameters by these tensors; tied parameters stay tied.

    ``torch.func.functional_call`` does the same for one call of the module; a loss may call any part of it.
    """
    replaced = stateless._reparametrize_module(model, dict(tensors), tie_weights=True)
    return cast(contextlib.AbstractContextManager[None], replaced)


def is_wrapper(value: Any) -> bool:
    """Whether a value is a tensor of a wrapper subclass, such as a quantized weight; a tensor without data is none."""
    return isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)


def is_foreign(target: Any) -> bool:
    """Whether an operator is not torch's own, or has its own body."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims")


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that hold the data of ``tensor``: itself, or those in a wrapper subclass or sparse tensor."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in inner_tensors(getattr(tensor, name))]


def add_input(graph: fx.GraphModule, name: str) -> fx.Node:
    """Return one more input of a captured graph, added after the others as if Dynamo had found it."""
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    with graph.graph.inserting_after(last):
        added = graph.graph.placeholder(name)
    setattr(added, "_dynamo_source", LocalSource(name))  # noqa: B010  no such attribute is declared
    return added


def register_opaque(kind: type) -> None:
    """Allow operators to take objects of a class as arguments, and graphs to take them as inputs."""
    register_opaque_type(kind, typ="reference")


def schema_of(function: Callable[..., Any], mutates: Sequence[str]) -> str:
    """Return the schema of an operator, made from the annotations of its function.

    Like torch's ``infer_schema``, which does not support optional objects of a registered class.
    """
    signature = inspect.signature(function, eval_str=True)
    objects: dict[str, str] = {}
    parameters = []
    for name, parameter in signature.parameters.items():
        kind = next((each for each in typing.get_args(parameter.annotation) if is_opaque_type(each)), None)
        if kind is not None:
            objects[name], parameter = get_opaque_type_name(kind), parameter.replace(annotation=torch.Tensor | None)
        parameters.append(parameter)

    def plain() -> None: ...

    setattr(plain, "__signature__", signature.replace(parameters=parameters))  # noqa: B010 - functions declare no such attribute
    schema = library.infer_schema(plain, mutates_args=tuple(mutates))
    for name, kind in objects.items():
        schema = schema.replace(f"Tensor? {name}=", f"{kind}? {name}=")
    return schema


def drop_input(graph: fx.GraphModule, added: fx.Node) -> None:
    """Remove an input that :func:`add_input` added, once the graph is compiled."""
    for user in list(added.users):
        user.args = tuple(value for value in user.args if value is not added)
        user.kwargs = {name: value for name, value in user.kwargs.items() if value is not added}
    graph.graph.erase_node(added)


# ---- several processes


@contextlib.contextmanager
def reducer_by_parameter() -> Iterator[None]:
    """Within the context, a new ``DistributedDataParallel`` reduces each gradient separately, in its own dtype.

    The setting is meant for compiled autograd; its other effects on the compiler are undone.
    """
    from torch._inductor import config as inductor_config

    with dynamo_config.patch(optimize_ddp="python_reducer"), inductor_config.patch(_fuse_ddp_communication=False):
        yield


def sync_buffers(ddp: Any, _inputs: Any) -> None:
    """Copy the buffers of the first process to every process; a forward pre-hook for ``DistributedDataParallel``.

    ``DistributedDataParallel`` does this itself if configured to, but not under :func:`reducer_by_parameter`.
    """
    if ddp._check_sync_bufs_pre_fwd():
        ddp._sync_buffers()


def is_reduced_in_buckets() -> bool:
    """Whether this runs in the forward pass of a ``DistributedDataParallel`` whose buckets have the parameters' dtypes.

    The result is False for a ``DistributedDataParallel`` that reduces each gradient separately.
    """
    return nn.parallel.DistributedDataParallel._active_ddp_module is not None


def fsdp_state(module: nn.Module) -> Any:
    """Return FSDP2's state of a module on which ``fully_shard`` was called; None for any other module."""
    from torch.distributed.fsdp._fully_shard._fsdp_state import _get_module_fsdp_state

    return _get_module_fsdp_state(module)


def share_fsdp_state(model: nn.Module, twin: nn.Module) -> None:
    """Register ``twin``, which shares its ``__dict__`` with ``model``, with FSDP2 if ``model`` is registered."""
    from torch.distributed._composable_state import _insert_module_state

    state = fsdp_state(model)
    if state is not None:
        _insert_module_state(twin, state)


def fsdp_has_root(module: nn.Module) -> bool:
    """Whether another module than this one reduces its gradients; known once that module has begun its forward pass."""
    return fsdp_state(module)._is_root is False


def fsdp_policy(module: nn.Module) -> Any:
    """Return the ``MixedPrecisionPolicy`` of a module on which ``fully_shard`` was called."""
    return fsdp_state(module)._mp_policy


@contextlib.contextmanager
def hidden_fsdp_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, remove the hooks of FSDP2, which Dynamo cannot capture, from the modules."""
    names = ("_forward_pre_hooks", "_forward_hooks")
    found = [(module.__dict__, name, module.__dict__[name]) for module in modules for name in names]
    for attributes, name, hooks in found:
        kept = [(key, hook) for key, hook in hooks.items() if not _is_of_fsdp(hook)]
        attributes[name] = OrderedDict(kept)
    try:
        yield
    finally:
        for attributes, name, hooks in found:
            attributes[name] = hooks


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def fsdp_forward(module: nn.Module, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call ``function`` between FSDP2's hooks of a module's forward pass; without such hooks, only call it."""
    state = fsdp_state(module)
    if state is None:
        return function(*args, **kwargs)
    args, kwargs = state._pre_forward(module, args, kwargs)
    return state._post_forward(module, args, function(*args, **kwargs))


# ---- a step that is recorded in pieces

Modes = tuple[Any, ...]
ENTER_AUTOCAST, EXIT_AUTOCAST = autocast_mode._enter_autocast, autocast_mode._exit_autocast
NO_AUTOCAST: Modes = ()
OWN_FILES = tuple(f"{Path(each).parent}{os.sep}" for each in (torch.__file__, __file__))
"""Path prefixes of torch's own files and of this package's files."""

_APPLY = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]  # torch declares no class method
_GENERATOR = {
    (home, name): getattr(home, name)
    for home in (torch, torch.random)
    for name in ("manual_seed", "seed", "get_rng_state", "set_rng_state")
}


def autocast_modes() -> Modes:
    """Return arguments of :data:`ENTER_AUTOCAST` for the current autocast region; empty outside of one."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            return device, torch.get_autocast_dtype(device), True, torch.is_autocast_cache_enabled()
    return NO_AUTOCAST


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Within the context, no autocast region is entered."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def as_if_compiling(compiling: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Within the context, set the value of ``torch.compiler.is_compiling()``.

    If it is true, libraries take the branch that they have for graphs.
    """
    return mock.patch.object(torch.compiler, "_is_compiling_flag", compiling)


@contextlib.contextmanager
def recorded_functions(
    apply: Callable[[Any, Any, Any], Any],
    checkpointed: Callable[[], contextlib.AbstractContextManager[None]],
    before_seeding: Callable[[str], None],
) -> Iterator[None]:
    """Within the context, pass autograd functions to ``apply``, and run checkpointed blocks in ``checkpointed()``.

    Args:
        apply: takes the class, positional and keyword arguments; returns None if torch should handle the call as usual.
        checkpointed: makes the context in which a checkpointed block runs, a new one for each block.
        before_seeding: called with the name of a function that reads or sets the state of torch's generator.
    """

    def replaced(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is torch_checkpoint.CheckpointFunction:
            with checkpointed():
                return args[0](*args[2:])
        made = apply(cls, args, kwargs)
        return _APPLY(cls, *args, **kwargs) if made is None else made

    def block(*_args: Any, **_kwargs: Any) -> Iterator[None]:
        with checkpointed():
            yield

    def in_order(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before_seeding(function.__name__)
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", classmethod(replaced)))
        stack.enter_context(mock.patch.object(torch_checkpoint, "_checkpoint_without_reentrant_generator", block))
        for (home, name), function in _GENERATOR.items():
            stack.enter_context(mock.patch.object(home, name, in_order(function)))
        yield


@contextlib.contextmanager
def plain_functions() -> Iterator[None]:
    """Return a context inside :func:`recorded_functions` that restores torch's own functions, for compilation."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", classmethod(_APPLY)))
        for (home, name), function in _GENERATOR.items():
            stack.enter_context(mock.patch.object(home, name, function))
        yield


class AppliedFunction:
    """``function.apply`` as the target of a node, named as Dynamo names it."""

    __name__ = "autograd_function_apply"

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _APPLY(self.function, *args, **kwargs)


class OutsideFunction(AppliedFunction):
    """The stand-in, in the graph of a whole step, for an operator that runs outside every piece.

    Its inputs are saved for its backward pass, which makes a gradient for each of them. Its results have the sizes of
    ``results``, and no values.
    """

    def __init__(self, results: Sequence[torch.Tensor]) -> None:
        sizes = [(tuple(x.shape), x.dtype) for x in results]

        class Outside(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *read: torch.Tensor) -> tuple[torch.Tensor, ...]:
                ctx.save_for_backward(*read)
                return tuple(read[0].new_zeros(shape, dtype=dtype) for shape, dtype in sizes)

            @staticmethod
            def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return tuple(torch.zeros_like(x) for x in ctx.saved_tensors)

        super().__init__(Outside)


def stand_in_block_of(node: fx.Node, neighbour: fx.Node) -> None:
    """Move a node that was added to a captured graph into the checkpointed block of another node."""
    node.meta |= {name: neighbour.meta[name] for name in ("recompute", "ac_graph_id") if name in neighbour.meta}


def ask_recompute(node: fx.Node, region: int) -> None:
    """Mark a captured node as part of the checkpointed block with this number."""
    node.meta["recompute"] = torch_checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
    node.meta["ac_graph_id"] = region


def tracing_context(mode: FakeTensorMode) -> contextlib.AbstractContextManager[Any]:
    """Within the context, AOTAutograd traces with this mode, as if Dynamo had called it."""
    return cast(contextlib.AbstractContextManager[Any], tracing(TracingContext(mode)))


SizeGuard = Callable[[Sequence[torch.Tensor]], bool]


def symbolic_mode() -> FakeTensorMode:
    """Return a mode for tensors without data that may have symbolic sizes (:func:`symbolic`)."""
    return FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True, static_shapes=True)


def symbolic(mode: FakeTensorMode, x: torch.Tensor, dynamic: Sequence[int], name: str) -> FakeTensor:
    """Return ``x`` without data, with symbols for the sizes of the axes in ``dynamic``."""
    if not dynamic:
        return mode.from_tensor(x)
    kinds = [DimDynamic.DYNAMIC if axis in dynamic else DimDynamic.STATIC for axis in range(x.dim())]
    context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
    return mode.from_tensor(x, static_shapes=False, symbolic_context=context, source=LocalSource(name))


def as_example(mode: FakeTensorMode, x: FakeTensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in the dtype of ``like``; like that tensor, it is a leaf, requires a gradient or has a history."""
    if (x.dtype, x.requires_grad, x.is_leaf) == (like.dtype, like.requires_grad, like.is_leaf):
        return x
    with mode, torch.enable_grad():
        found = x.detach().to(like.dtype).requires_grad_(like.requires_grad)
        return found if like.is_leaf else found.clone()


def attach_examples(graph: fx.Graph, values: dict[fx.Node, Any], mode: FakeTensorMode) -> None:
    """Attach values without data to the nodes of a graph, as Dynamo does; ``values``: those of its placeholders."""
    with mode, torch.set_grad_enabled(torch.is_grad_enabled()):
        for node in graph.nodes:
            if node.op in ("call_function", "call_method"):
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                function = node.target if node.op == "call_function" else getattr(args[0], str(node.target))
                values[node] = function(*(args if node.op == "call_function" else args[1:]), **kwargs)
            if node in values:
                node.meta["example_value"] = values[node]


def size_guard(mode: FakeTensorMode, examples: Sequence[Any]) -> SizeGuard | None:
    """Return a check of the assumptions on sizes that compiling with symbolic sizes has made; None if there are none.

    Args:
        mode: the mode of the fake tensors, which knows their symbols.
        examples: arguments of the compiled function; those with symbols are fake tensors.
    """
    places = [place for place, x in enumerate(examples) if isinstance(x, FakeTensor)]
    env = mode.shape_env
    assert env is not None
    code = env.produce_guards_expression([examples[place] for place in places])
    return None if code is None else lambda args: bool(env.evaluate_guards_expression(code, [args[i] for i in places]))


RECOMPILE_LIMIT = "torch._dynamo.config.recompile_limit"
"""The setting that :func:`recompile_limit` returns."""


def recompile_limit() -> int:
    """Return how many times Dynamo compiles one piece of code before it stops compiling it."""
    return int(dynamo_config.recompile_limit)


def wrapper_like(kind: type[torch.Tensor], example: torch.Tensor) -> Any:
    """Return a tensor of class ``kind`` with the shape and dtype of ``example`` and no memory."""
    make: Any = torch.Tensor._make_wrapper_subclass
    return make(kind, example.size(), strides=example.stride(), dtype=example.dtype, device=example.device)


def without_subclasses() -> contextlib.AbstractContextManager[Any]:
    """Within the context, torch functions treat tensors of every class as plain tensors."""
    return cast(contextlib.AbstractContextManager[Any], torch._C.DisableTorchFunctionSubclass())


def is_plain() -> bool:
    """Whether torch functions are called within :func:`without_subclasses`."""
    return not torch._C._is_torch_function_enabled()


def without_functions() -> contextlib.AbstractContextManager[Any]:
    """Within the context, no mode and no tensor class intercepts torch functions."""
    return cast(contextlib.AbstractContextManager[Any], torch._C.DisableTorchFunction())


def memory_of(x: torch.Tensor) -> int:
    """Return a number that identifies the memory of a tensor; it is the same for all views of the tensor."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return id(x) if wrapped or not is_strided(x) else storage_id(x.untyped_storage())


def is_strided(x: torch.Tensor) -> bool:
    """Whether the elements of a tensor are in one memory, unlike those of a sparse tensor."""
    return x.layout == torch.strided and not x.is_nested


def is_method(function: Any) -> bool:
    """Whether a torch function is a method of tensors."""
    return getattr(torch.Tensor, getattr(function, "__name__", ""), None) is function


def is_inlined(function: Any) -> bool:
    """Whether Dynamo would trace into a Python function of torch instead of recording a call of it."""
    if not isinstance(function, types.FunctionType):
        return False
    return is_method(function) or trace_rules.lookup(function) is not TorchInGraphFunctionVariable


@functools.lru_cache(maxsize=256)
def unchecked(function: types.FunctionType) -> Callable[..., Any]:
    """Return a copy of a Python function of torch that does its work directly, without ``__torch_function__``."""
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**function.__globals__, **dict.fromkeys(names, lambda *_: False)}
    cells = function.__closure__
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def decomposition(operator: Any) -> Callable[..., Any] | None:
    """Return a function that computes a fused operator with differentiable ones; None if torch has none."""
    return get_decompositions([operator]).get(operator)
