"""What a traced graph tells: what flows where, and functions cut out of it."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_SHAPE_ATTRIBUTES = ("shape", "device", "dtype", "ndim", "is_cuda")
_SHAPE_METHODS = ("size", "dim", "numel", "stride", "new_zeros", "new_ones", "new_empty", "get_device")


class Flow:
    """How the values of the block's input flow to its output; sizes that are read on the way do not count.

    Args:
        graph: A traced forward whose first placeholder is the input.
        output: The value that it returns.
    """

    def __init__(self, graph: fx.Graph, output: fx.Node) -> None:
        self.input = next(iter(graph.nodes))
        self.output = output
        self._order: dict[fx.Node, int] = {}
        self._dominators: dict[fx.Node, fx.Node | None] = {self.input: None}
        self._sources: dict[fx.Node, list[fx.Node]] = {self.input: []}
        for number, node in enumerate(graph.nodes):
            self._order[node] = number
            sources = [one for one in node.all_input_nodes if one in self._sources]
            if node.op == "output" or not sources or _reads_a_shape(node):
                continue
            self._sources[node] = sources
            common = sources[0]
            for other in sources[1:]:
                common = self._common(common, other)
            self._dominators[node] = common

    @property
    def chain(self) -> list[fx.Node]:
        """The values that everything passes through, from the output to the input."""
        chain, node = [], self.output if self.output in self._sources else None
        while node is not None:
            chain.append(node)
            node = self._dominators[node]
        return chain

    def dominator(self, node: fx.Node) -> fx.Node | None:
        """The last value before `node` that everything that reaches it passes through."""
        return self._dominators[node]

    def dominates(self, node: fx.Node, target: fx.Node, source: fx.Node) -> bool:
        """Whether all that flows from `source` to `target` passes through `node`."""
        current: fx.Node | None = target
        while current is not None and current is not source:
            if current is node:
                return True
            current = self._dominators[current]
        return False

    def added_by(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two values of the input's flow that an addition adds, or None if it is none."""
        if node.target not in _ADDITIONS or node.kwargs or len(node.args) != 2:
            return None
        one, other = node.args
        if isinstance(one, fx.Node) and isinstance(other, fx.Node) and {one, other} <= self._sources.keys():
            return one, other
        return None

    def is_added(self, node: fx.Node) -> bool:
        """Whether something computed from this value is an operand of an addition."""
        return any(later.target in _ADDITIONS for later in self.computed_from(node))

    def computed_from(self, node: fx.Node) -> set[fx.Node]:
        """All later values that `node` is used for."""
        reached = {node}
        for later in self._order:
            if not reached.isdisjoint(later.all_input_nodes):
                reached.add(later)
        return reached - {node}

    def between(self, source: fx.Node, target: fx.Node) -> set[fx.Node]:
        """All nodes that compute `target` from `source`, which is not among them, with parameters that they use."""
        found: set[fx.Node] = set()
        waiting = [target]
        while waiting:
            node = waiting.pop()
            if node is source or node in found or node.op == "placeholder":
                continue
            found.add(node)
            waiting += node.all_input_nodes
        return found

    def _common(self, one: fx.Node, other: fx.Node) -> fx.Node:
        while one is not other:
            if self._order[one] < self._order[other]:
                one, other = other, one
            later = self._dominators[one]
            assert later is not None, "the input dominates everything"
            one = later
        return one


def cut_out(source: fx.Node, target: fx.Node) -> tuple[Callable[..., Any], list[str]]:
    """The part of a graph that computes `target` from `source`, as ``(block, x, *others) -> y``.

    Returns:
        The function and the names of the further arguments that it takes.

    Raises:
        LookupError: If `target` also needs values from before `source`.
    """
    graph = fx.Graph()
    copies = {source: graph.placeholder("x")}
    names: list[str] = []
    needed = _needed(source, target)
    for node in [one for one in needed if one.op == "placeholder"]:
        if node is next(iter(node.graph.nodes)):
            raise LookupError("a part of it needs values from before the branch, such as the shape of its input")
        copies[node] = graph.placeholder(str(node.target))
        names.append(str(node.target))
    for node in needed:
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, lambda one: copies[one])
    graph.output(copies[target])
    code = graph.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    exec(code.src, scope)  # what fx generates for its own modules
    return scope["forward"], names


def _needed(source: fx.Node, target: fx.Node) -> list[fx.Node]:
    """All nodes that `target` is computed from, in order, up to `source`."""
    found: set[fx.Node] = set()
    waiting = [target]
    while waiting:
        node = waiting.pop()
        if node is not source and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return [node for node in source.graph.nodes if node in found]


def _reads_a_shape(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    return node.op == "call_method" and node.target in _SHAPE_METHODS
