"""Finds the residual branches of a block of any class by tracing its own forward with torch.fx.

The children of the block are leaves of the trace, so their code may do anything. Going back from the output, every
addition whose two sides start at one earlier value that everything passes through is a residual step.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from .branch import BlockType, Branch, further_arguments, get_attribute
from .drop_path import is_drop_path
from .graphs import Flow, cut_out

_CONSTANTS = (bool, int, float, str, type(None))
_SOME_TENSOR = torch.empty(0)  # in place of an argument that is not known yet


class SplitError(ValueError):
    """A block cannot be split into residual branches; the message says why."""


@dataclass(frozen=True)
class TracedType(BlockType):
    """A block type whose branches are traced, for each instance and each kind of further arguments."""

    @property
    def is_verified(self) -> bool:
        """False: the first forward checks the trace."""
        return False

    def branches_of(self, block: nn.Module, args: Sequence[Any] = (), kwargs: Any = None) -> Sequence[Branch]:
        """The branches of one block, for these further arguments of its ``forward``.

        Raises:
            SplitError: If the block cannot be split, or has another number of branches than with default arguments.
        """
        values = bind_arguments(self.cls, args, kwargs or {})
        if not hasattr(block, "drop_plan"):  # not converted, so nothing is kept in it
            return trace_branches(block, self.cls, values)
        traces = block.__dict__.setdefault("traced_branches", {})
        key = block.training, tuple((name, _kind(value)) for name, value in values.items())
        if key not in traces:
            traces[key] = trace_branches(block, self.cls, values)
        expected = len(block.drop_indices)  # type: ignore[arg-type]  # a converted block has a tuple
        if len(traces[key]) != expected:
            raise SplitError(f"it has {len(traces[key])} branches with these arguments and {expected} without")
        return traces[key]

    def select(
        self, block: Any, take: Callable[[Tensor], Tensor], num_rows: int, args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The further arguments for some rows; those with as many rows as the input have one per sample."""

        def selected(value: Any) -> Any:
            return take(value) if isinstance(value, Tensor) and value.dim() > 0 and len(value) == num_rows else value

        return tuple(map(selected, args)), {name: selected(value) for name, value in kwargs.items()}


@cache
def traced_type(cls: Any) -> TracedType:
    """The traced type of a class, always the same one."""
    return TracedType(cls.__name__, (), cls=cls)


def has_marks(block: nn.Module) -> bool:
    """Whether the block has drop paths of its own, or places where its class puts them."""
    cls: Any = type(block)
    marks = _constructed_drop_paths(cls)
    return any(is_drop_path(child) or name in marks for name, child in block.named_children())


def bind_arguments(cls: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The further arguments of ``forward`` by name, as far as they are given; missing ones must be tensors."""
    _, _, *parameters = inspect.signature(cls.forward).parameters.values()
    given = {**dict(zip(further_arguments(cls), args, strict=False)), **kwargs}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [one.name for one in parameters if one.default is one.empty and one.kind in kinds]
    return {**{name: _SOME_TENSOR for name in required if name not in given}, **given}


def trace_branches(block: nn.Module, cls: Any, arguments: dict[str, Any]) -> list[Branch]:
    """The residual branches of a block; none if it has drop paths that no shortcut goes around.

    Args:
        block: A block, converted or not.
        cls: Its plain class.
        arguments: Further arguments of ``forward`` by name: tensors stay free, other values are fixed.

    Raises:
        SplitError: If the forward cannot be traced or does not split.
    """
    plain = cls.__new__(cls)
    plain.__dict__.update(block.__dict__)  # the same children, in front of the class's own forward
    graph = _trace(plain, arguments)
    (output,) = (node for node in graph.nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node):
        raise SplitError(f"its forward returns a {type(output.args[0]).__name__}, not a tensor")
    flow = Flow(graph, output.args[0])
    marks = _constructed_drop_paths(cls)
    steps = [step for node in flow.chain if (step := _step(flow, node, plain, marks)) is not None]
    marked = [node for node in graph.nodes if _is_mark(node, plain, marks)]
    if any(step.mark for step in steps):
        steps = [step for step in steps if step.mark]
        _check_not_used_elsewhere(flow, steps, marked)
    elif marked:
        if any(flow.is_added(node) for node in marked):
            raise SplitError("its drop path is added to something else than what its branch starts with")
        return []  # no shortcut goes around this one
    unknown = [name for name, value in arguments.items() if value is _SOME_TENSOR]  # it may turn out to be a size
    return _branches(flow, steps[::-1], plain, unknown) if steps else []


def _check_not_used_elsewhere(flow: Flow, steps: Sequence["_Step"], marked: Sequence[fx.Node]) -> None:
    """Refuse a drop path that also masks something else, which it would no longer do."""
    ends = {node for step in steps for node in flow.between(step.source, step.residual)}
    for node in marked:
        if node not in ends and any(step.mark == str(node.target) for step in steps):
            raise SplitError(f"its drop path {node.target} masks something else, too")


@dataclass(frozen=True)
class _Step:
    """An addition, and what it adds: values that start at `source`."""

    source: fx.Node
    shortcut: fx.Node
    residual: fx.Node
    total: fx.Node
    mark: str | None  # the drop path at the end of the residual side


def _step(flow: Flow, total: fx.Node, block: nn.Module, marks: Sequence[str]) -> _Step | None:
    """What an addition adds, or None if it is no addition of two sides, or none of a shortcut and a residual."""
    sides = flow.added_by(total)
    source = flow.dominator(total)
    if sides is None or source is None or sides[0] is sides[1]:
        return None
    inside = [flow.between(source, side) for side in sides]
    found = [[node for node in nodes if _is_mark(node, block, marks)] for nodes in inside]
    if found[0] and found[1]:
        raise SplitError("it has drop paths on both sides of an addition")
    if found[0] or found[1]:
        residual = 0 if found[0] else 1
        if len({str(node.target) for node in found[residual]}) > 1:
            raise SplitError("it has several drop paths in one branch")
        if not any(_ends(flow, node, sides[residual], source, block) for node in found[residual]):
            raise SplitError(f"its drop path {found[residual][0].target} is not at the end of the branch")
    elif source in sides:
        residual = 1 - sides.index(source)
    else:
        return None
    if any(node.op == "call_module" for node in inside[0] & inside[1]):
        raise SplitError("shortcut and residual branch have layers in common")
    mark = str(found[residual][0].target) if found[residual] else None
    return _Step(source, sides[1 - residual], sides[residual], total, mark)


def _ends(flow: Flow, mark: fx.Node, side: fx.Node, source: fx.Node, block: nn.Module) -> bool:
    """Whether a branch passes through the drop path, and after it through no layer but scales."""
    later = flow.between(mark, side) & flow.computed_from(mark)
    modules = [get_attribute(block, str(node.target)) for node in later if node.op == "call_module"]
    names = [type(module).__name__ for module in modules if not is_drop_path(module)]
    return all(name in _PASSING or "Scale" in name for name in names) and flow.dominates(mark, side, source)


def _branches(flow: Flow, steps: Sequence[_Step], block: nn.Module, unknown: Container[str]) -> list[Branch]:
    branches: list[Branch] = []
    cls: Any = type(block)
    names = further_arguments(cls)
    ends = [*(step.source for step in steps[1:]), flow.output]
    for number, (step, end) in enumerate(zip(steps, ends, strict=True)):
        before = (
            _fixed_function(flow.input, step.source, unknown) if number == 0 and flow.input is not step.source else None
        )
        own = flow.between(step.source, step.residual) - flow.between(step.source, step.shortcut)
        layers = sorted({str(node.target) for node in own if node.op == "call_module"})
        branches.append(
            Branch(
                _function(step.source, step.residual, names),
                None if step.shortcut is step.source else _fixed_function(step.source, step.shortcut, unknown),
                None if end is step.total else _fixed_function(step.total, end, unknown),
                before,
                last_layer=_last_layer(step.residual, block),
                drop_path=step.mark,
                layers=_layers_named(layers) if not any(node.op == "get_attr" for node in own) else None,
            )
        )
    return branches


def _layers_named(names: Sequence[str]) -> Callable[[Any], list[nn.Module]]:
    return lambda block: [block.get_submodule(name) for name in names]


def _fixed_function(source: fx.Node, target: fx.Node, unknown: Container[str]) -> Callable[[Any, Tensor], Tensor]:
    """``(block, x) -> y``: as `_function`, for what takes no tensors among the further arguments."""
    compute, names = _cut_out(source, target)
    if known := [name for name in names if name not in unknown]:
        raise SplitError(f"what is around its residual branches needs the tensor {known[0]}")
    return compute


def _cut_out(source: fx.Node, target: fx.Node) -> tuple[Callable[..., Tensor], list[str]]:
    try:
        return cut_out(source, target)
    except LookupError as error:
        raise SplitError(str(error)) from error


def _function(source: fx.Node, target: fx.Node, all_names: Sequence[str]) -> Callable[..., Tensor]:
    """``(block, x, ...) -> y``: the part of the trace that computes `target` from `source`."""
    compute, names = _cut_out(source, target)
    if not names:
        return lambda block, x, *args, **kwargs: compute(block, x)

    def function(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        values = {**dict(zip(all_names, args, strict=False)), **kwargs}
        return compute(block, x, *(values[name] for name in names))

    return function


class _BlockTracer(fx.Tracer):
    """Traces one forward with the children as leaves and the further arguments fixed, apart from tensors."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        x = self.create_proxy("placeholder", "x", (), {})
        values = {
            name: self.create_proxy("placeholder", name, (), {}) if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }
        return (lambda root: root_fn(root, x, **values)), [self.root]


def _trace(block: nn.Module, arguments: dict[str, Any]) -> fx.Graph:
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not _is_constant(value):
            raise SplitError(f"its argument {name} is a {type(value).__name__}, which a trace cannot hold")
    try:
        graph = _BlockTracer(arguments).trace(block)
    except Exception as error:  # whatever the block's own code raises when it gets proxies for tensors
        reason = str(error).strip().splitlines()
        raise SplitError(f"its forward cannot be traced ({reason[0] if reason else type(error).__name__})") from error
    return graph


def _is_constant(value: Any) -> bool:
    """Whether this is a number, a string, None or a tuple of such values, such as a size."""
    return all(map(_is_constant, value)) if isinstance(value, tuple) else isinstance(value, _CONSTANTS)


def _kind(value: Any) -> Any:
    return "tensor" if isinstance(value, Tensor) else repr(value)


def _is_mark(node: fx.Node, block: nn.Module, marks: Sequence[str]) -> bool:
    if node.op != "call_module":
        return False
    return str(node.target) in marks or is_drop_path(get_attribute(block, str(node.target)))


@cache
def _constructed_drop_paths(cls: Any) -> tuple[str, ...]:
    """The attributes to which the constructors of a class assign a drop path, or an Identity in its place."""
    names: list[str] = []
    for base in cls.__mro__:
        if base in (nn.Module, object) or "__init__" not in base.__dict__:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base.__init__)))
        except (OSError, TypeError, SyntaxError):
            continue  # no source code to read: only real drop paths are marks
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and any(
                isinstance(inner, ast.Name) and inner.id in ("DropPath", "StochasticDepth")
                for inner in ast.walk(node.value)
            ):
                names += [one.attr for one in node.targets if isinstance(one, ast.Attribute)]
    return tuple(names)


_LAST_OF = {"Mlp": "fc2", "ConvMlp": "fc2", "GlobalResponseNormMlp": "fc2", "SwiGLU": "fc3", "GluMlp": "fc2"}
_PASSING = ("Identity", "Dropout")


def _last_layer(node: fx.Node, block: nn.Module) -> str | None:
    """The name of the layer or layer-scale parameter that ends a branch, as far as a trace shows it."""
    while True:
        if node.op == "call_module":
            name = str(node.target)
            module = get_attribute(block, name)
            if is_drop_path(module) or type(module).__name__ in _PASSING:
                node = node.all_input_nodes[0]
                continue
            inner = _LAST_OF.get(type(module).__name__, "proj" if "Attention" in type(module).__name__ else None)
            return name if inner is None else f"{name}.{inner}"
        if node.op == "call_method" and node.target in ("permute", "transpose", "reshape", "view", "flatten"):
            node = node.all_input_nodes[0]
            continue
        if node.op in ("call_function", "call_method") and "mul" in str(node.target):
            factors = [one for one in node.all_input_nodes if one.op == "get_attr"]
            return str(factors[0].target) if len(factors) == 1 else None
        return None
