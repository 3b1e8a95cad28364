"""Which block classes are known: by their import path, so that nothing is imported which a model does not use."""

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
    """Make a block class of your own known, so that its blocks can be dropped.

    The class's ``forward(x)`` must compute ``after_sum(shortcut(x) + residual(x))`` and nothing else::

        cf.register_residual_block(
            MyBlock,
            residual=lambda block, x: block.norm(block.conv(x)),
            after_sum=lambda block, y: y.relu(),
            last_layer="norm",
        )

    Register at the top level of a module where models are pickled to other processes.

    Args:
        cls: The class; exactly it, not its subclasses.
        residual: ``(block, x) -> f(x)``, what can be dropped.
        shortcut: ``(block, x) -> s(x)``; by default the identity.
        after_sum: ``(block, y) -> z``; by default nothing.
        last_layer: Attribute with the normalisation or linear layer that ends the residual branch, for
            `fold_stochastic_depth`.
        name: What `target_layer_name` calls it; by default the name of the class.

    Raises:
        TypeError: If `cls` is no module class or a function cannot be called.
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
    earlier = BLOCK_TYPES.get(_import_path(cls))  # of a class of this name that was defined again, as in a notebook
    is_redefined = earlier is not None and earlier.cls not in (None, cls) and earlier.name == name
    if not is_redefined and (earlier is not None or name in known_names()):
        raise ValueError(f"cls and name must not be registered already, got {cls.__qualname__} and {name!r}")
    given: dict[str, Any] = {} if shortcut is None else {"shortcut": shortcut}
    if after_sum is not None:
        # Only a class that is known to chain can promise that its inputs have gone through after_sum.
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
    """Everything that `target_layer_name` can be."""
    return sorted({block_type.name for block_type in BLOCK_TYPES.values()})


def _import_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
