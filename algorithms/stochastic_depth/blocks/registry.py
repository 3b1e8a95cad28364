"""The registry of block classes, by import path, so that no library is imported that a model does not use."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import cifar, timm, torchvision, transformer
from .branch import BlockType, Branch

BLOCK_TYPES: dict[str, BlockType] = {
    **torchvision.BLOCK_TYPES,
    **cifar.BLOCK_TYPES,
    **timm.BLOCK_TYPES,
    **transformer.BLOCK_TYPES,
}


def register_residual_block(
    cls: type[nn.Module],
    residual: Callable[..., Tensor],
    *,
    shortcut: Callable[[Any, Tensor], Tensor] | None = None,
    after_sum: Callable[[Any, Tensor], Tensor] | None = None,
    last_layer: str | None = None,
    name: str | None = None,
) -> None:
    """Register a block class, so that its blocks can be dropped.

    The class's ``forward(x)`` must compute exactly ``after_sum(shortcut(x) + residual(x))``::

        cf.register_residual_block(
            MyBlock,
            residual=lambda block, x: block.norm(block.conv(x)),
            after_sum=lambda block, y: y.relu(),
            last_layer="norm",
        )

    If models are pickled to other processes, register at the top level of a module.

    Args:
        cls: The class; its subclasses are not included.
        residual: ``(block, x) -> f(x)``, what can be dropped.
        shortcut: ``(block, x) -> s(x)``; by default the identity.
        after_sum: ``(block, y) -> z``; by default nothing.
        last_layer: Attribute with the normalisation or linear layer that ends the residual branch, for
            `fold_stochastic_depth`.
        name: Its name in `target_layer_name`; by default the name of the class.

    Raises:
        TypeError: If `cls` is not a subclass of Module or a function is not callable.
        ValueError: If the class or the name is registered already.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"cls must be a subclass of torch.nn.Module, got {cls!r}")
    for argument, function in (("residual", residual), ("shortcut", shortcut), ("after_sum", after_sum)):
        if not callable(function) and (function is not None or argument == "residual"):
            raise TypeError(f"{argument} must be a function of block and tensor, got {function!r}")
    if not all(isinstance(text, str) or text is None for text in (last_layer, name)):
        raise TypeError(f"last_layer and name must be strings, got {last_layer!r} and {name!r}")
    name = name or cls.__name__
    earlier = BLOCK_TYPES.get(_import_path(cls))  # a class of this name that was redefined, as in a notebook
    is_redefined = earlier is not None and earlier.cls not in (None, cls) and earlier.name == name
    if not is_redefined and (earlier is not None or name in known_names()):
        raise ValueError(f"cls and name must not be registered already, got {cls.__qualname__} and {name!r}")
    given: dict[str, Any] = {} if shortcut is None else {"shortcut": shortcut}
    if after_sum is not None:
        # Only for the known classes it is certain that after_sum was applied to their inputs.
        given.update(after_sum=after_sum, input_is_final=lambda block: False)
    if last_layer is not None:
        given["last_layer"] = lambda block: getattr(block, last_layer, None)
    changes_shape = (lambda block: False) if shortcut is None else (lambda block: True)
    BLOCK_TYPES[_import_path(cls)] = BlockType(name, (Branch(residual, **given),), changes_shape, cls=cls)


def block_type_of(cls: type[nn.Module]) -> BlockType | None:
    """The registered type of exactly this class, None for any other, subclasses included."""
    found = BLOCK_TYPES.get(_import_path(cls))
    return found if found is not None and found.cls in (None, cls) else None


def known_names() -> list[str]:
    """All values of `target_layer_name`."""
    return sorted({block_type.name for block_type in BLOCK_TYPES.values()})


def _import_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
