"""Graph pass on the joint graph: store saved activations in their own format, not in that of their carrier.

Each forward value that the backward pass reads is traced back, through views and exact conversions, to the mark that
made it. The mark of a parameter or of the batch is computed again in the backward pass, because its source is still
stored, unless this would save a copy of the source in another layout. Any other value is encoded right after its last
reader in the forward pass and decoded right before its first reader in the backward pass. Values of a native 16-bit
format are saved as they are, not as the float32 copy that an operator asked for.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from assign import _torch
from assign.executor.context import Context
from assign.formats.parsing import parse_format
from assign.formats.rows import BlockFormat, Format
from assign.numerics.blocks import memory_order
from assign.numerics.rounding import stream_of
from assign.plan.keys import Key, saved_key
from assign.plan.plan import Assignment
from assign.plan.table import MARK
from assign.tracing.joint import describe, is_view, origin, read_marked_outputs

_QUANTIZE = torch.ops.assign.quantize.default
_SEED = torch.ops.assign.seed.default
_CHANNELS_LAST = (0, 2, 3, 1)


def pack(joint: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Store saved activations in their own format; the graph of an all-fp32 plan stays as it is.

    If images are laid out channels-last, blocks run along their channels first, and an input in another layout would be
    saved as a copy of itself.
    """
    if any(node.target is _QUANTIZE or _is_narrow(node) for node in joint.graph.nodes):
        read_marked_outputs(joint.graph, _QUANTIZE)
        _Packer(joint.graph, context.plan, context.channels_last).run()
        joint.graph.lint()
        joint.recompile()
    return joint


def _is_narrow(node: fx.Node) -> bool:
    value = _torch.joint_value(node)
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)


class _Packer:
    def __init__(self, graph: fx.Graph, plan: Assignment, channels_last: bool) -> None:
        self.graph = graph
        self.plan = plan
        self.channels_last = channels_last
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def run(self) -> None:
        """Group the values that the backward pass reads by their origin, and handle each origin once."""
        by_source: dict[fx.Node, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op != "call_function" or _torch.is_backward(node) or _torch.is_recomputed(node):
                continue
            if isinstance(_torch.joint_value(node), torch.Tensor) and any(map(_torch.is_backward, node.users)):
                by_source.setdefault(origin(node), []).append(node)
        for source, saved in by_source.items():
            if saved != [source] or source.target is _QUANTIZE:
                self._move(source, saved)

    def _move(self, source: fx.Node, saved: list[fx.Node]) -> None:
        readers = sorted(
            {user for node in saved for user in node.users if _torch.is_backward(user)}, key=self.order.__getitem__
        )
        first = readers[0]
        if source.target is not _QUANTIZE:
            restored = {source: source}
        elif _reads_input(source) and not self._is_laid_out_anew(source):
            restored = {source: self._mark_again(source, first)}
        else:
            restored = {source: self._encode(source, first)}
        for reader in readers:
            for node in [n for n in reader.all_input_nodes if n in saved]:
                reader.replace_input_with(node, self._replay(node, restored, reader))

    def _is_laid_out_anew(self, mark: fx.Node) -> bool:
        value = _torch.joint_value(mark)
        return self._becomes_channels_last(value) and not value.is_contiguous(memory_format=torch.channels_last)

    def _becomes_channels_last(self, value: torch.Tensor) -> bool:
        return self.channels_last and value.dim() == 4

    def _replay(self, node: fx.Node, restored: dict[fx.Node, fx.Node], reader: fx.Node) -> fx.Node:
        """Return ``node`` recomputed in the backward pass from the restored values, right before ``reader``."""
        if node in restored:
            return restored[node]
        parent = _torch.source_of(node)
        source = self._replay(parent, restored, reader)
        with self.graph.inserting_before(reader):
            new = self.graph.node_copy(node, lambda n: source if n is parent else n)
        describe(new, _torch.joint_value(node), node, backward=True)
        if is_view(node):
            restored[node] = new
        return new

    def _mark_again(self, mark: fx.Node, first: fx.Node) -> fx.Node:
        """Return a copy of the mark of a parameter or of the batch, and of its scale, placed right before ``first``."""
        scale = mark.args[1]
        with self.graph.inserting_before(first):
            if isinstance(scale, fx.Node):
                twin = self.graph.node_copy(scale)
                describe(twin, _torch.joint_value(scale), scale, backward=True)
                scale = twin
            again = self.graph.call_function(_QUANTIZE, (mark.args[0], scale, *mark.args[2:]), dict(mark.kwargs))
        describe(again, _torch.joint_value(mark), mark, backward=True)
        return again

    def _encode(self, mark: fx.Node, first: fx.Node) -> fx.Node:
        """Return the mark's value as decoded from its narrow storage, right before ``first``."""
        value = _torch.joint_value(mark)
        key = _torch.label_of(mark).removeprefix(MARK)
        name, live = str(mark.args[2]), dict(mark.kwargs)  # ``live`` looks up the format of a promoted tensor
        source, scale, after = mark, mark.args[1], self._last_forward_reader(mark)
        if saved_key(key) in self.plan.entries and self.plan.saved_format(key).name != name:
            chosen = self.plan.saved_format(key)
            if isinstance(chosen, BlockFormat):
                return self._encode_blocks(mark, chosen, after, first)
            name, live = chosen.name, {}
            source, scale, after = self._narrow(mark, chosen, after)
        if parse_format(name).code_bytes >= value.dtype.itemsize:
            return source
        code = self._call(torch.ops.assign.encode.default, (source, scale, name), mark, after=after, kwargs=live)
        return self._call(
            torch.ops.assign.decode.default, (code, scale, name, value.dtype), mark, before=first, kwargs=live
        )

    def _encode_blocks(self, mark: fx.Node, fmt: BlockFormat, after: fx.Node, first: fx.Node) -> fx.Node:
        """Return the mark's value as decoded from blocks; the mark itself if blocks take no fewer bytes."""
        value = _torch.joint_value(mark)
        if fmt.bytes_of(value.numel()) >= value.numel() * value.dtype.itemsize:
            return mark
        order = list(_CHANNELS_LAST) if self._becomes_channels_last(value) else memory_order(value)
        size = self._size(mark)
        randomness = (self._seed(value.device), self._stream(mark)) if fmt.stochastic else ()
        encode, decode = torch.ops.assign.encode_blocks.default, torch.ops.assign.decode_blocks.default
        code = self._call(encode, (mark, fmt.name, order, *randomness), mark, after=after)
        return self._call(decode, (code, fmt.name, size, order, value.dtype), mark, before=first)

    def _size(self, mark: fx.Node) -> list[Any]:
        """Return the sizes of a value: numbers, and nodes for symbolic sizes."""
        sizes: list[Any] = []
        for axis, size in enumerate(_torch.joint_value(mark).shape):
            known = isinstance(size, int)
            sizes.append(size if known else self._call(torch.ops.aten.sym_size.int, (mark, axis), mark, after=mark))
        return sizes

    def _narrow(self, mark: fx.Node, fmt: Format, after: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node]:
        """Return a copy of the mark's value in the format of the saved activation, its scale, and the last new node."""
        scale = None
        if fmt.scaled:
            after = scale = self._call(torch.ops.assign.scale.default, (mark, fmt.name), mark, after=after)
        randomness: tuple[Any, ...] = ()
        if fmt.stochastic:
            randomness = (self._seed(_torch.joint_value(mark).device), self._stream(mark))
        dtype = _torch.joint_value(mark).dtype
        rounded = self._call(_QUANTIZE, (mark, scale, fmt.name, True, dtype, *randomness), mark, after=after)
        return rounded, scale, rounded

    def _stream(self, mark: fx.Node) -> int:
        return stream_of(saved_key(_torch.label_of(mark).removeprefix(MARK)))

    def _seed(self, device: torch.device) -> fx.Node:
        """Return the node that draws the graph's seed; add it at the beginning of the graph if no mark needed one."""
        drawn: fx.Node | None = next((node for node in self.graph.nodes if node.target is _SEED), None)
        if drawn is not None:
            return drawn
        begin = next(node for node in self.graph.nodes if node.op != "placeholder")
        return self._call(_SEED, (device,), begin, before=begin, backward=False)

    def _call(
        self,
        target: Any,
        args: tuple[Any, ...],
        like: fx.Node,
        *,
        after: fx.Node | None = None,
        before: fx.Node | None = None,
        backward: bool | None = None,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> fx.Node:
        """Return a new node: a forward node right after ``after``, or a backward node right before ``before``."""
        place = self.graph.inserting_after(after) if after else self.graph.inserting_before(before)
        with place:
            node = self.graph.call_function(target, args, dict(kwargs))
        with _torch.without_data(map(_torch.joint_value, self.graph.nodes)):
            value = target(*map_arg(args, _torch.joint_value), **map_arg(dict(kwargs), _torch.joint_value))
        describe(node, value, like, backward=after is None if backward is None else backward)
        return node

    def _last_forward_reader(self, mark: fx.Node) -> fx.Node:
        """Return the last forward node that reads the mark's storage."""
        last, family = mark, [mark]
        while family:
            for user in family.pop().users:
                if _torch.is_backward(user) or user not in self.order or user.op == "output":
                    continue
                last = max(last, user, key=self.order.__getitem__)
                if is_view(user):
                    family.append(user)
        return last


def _reads_input(mark: fx.Node) -> bool:
    """Whether a mark is that of a parameter or of the batch, and not that of a result of an earlier piece."""
    label = _torch.label_of(mark)
    key = Key.of_step(label.removeprefix(MARK))
    made_before = label.startswith(MARK) and key.is_activation and not key.is_input
    return isinstance(mark.args[0], fx.Node) and mark.args[0].op == "placeholder" and not made_before
