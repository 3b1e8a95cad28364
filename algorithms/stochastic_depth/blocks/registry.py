"""The registry of block classes, by import path, so that no library is imported that a model does not use."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from . import cifar, hugging_face, timm, timm_transformer, torchvision, transformer
from .branch import BlockType, Branch

BLOCK_TYPES: dict[str, BlockType] = {
    **torchvision.BLOCK_TYPES,
    **cifar.BLOCK_TYPES,
    **timm.BLOCK_TYPES,
    **timm_transformer.BLOCK_TYPES,
    **transformer.BLOCK_TYPES,
    **hugging_face.BLOCK_TYPES,
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
    """Make a block class with one residual branch known, so that its blocks can be dropped.

    The class's ``forward(x)`` must compute ``after_sum(shortcut(x) + residual(x))`` and nothing else, which is
    checked at the first forward of every block::

        cf.register_residual_block(
            MyBlock,
            residual=lambda block, x: block.norm(block.conv(x)),
            after_sum=lambda block, y: y.relu(),
            last_layer="norm",
        )

    For blocks with several branches or further arguments there is `register_block_type`. Register at the top
    level of a module where models are pickled to other processes.

    Args:
        cls: The class; its subclasses are not included.
        residual: ``(block, x) -> f(x)``, what can be dropped.
        shortcut: ``(block, x) -> s(x)``; by default the identity.
        after_sum: ``(block, y) -> z``; by default nothing.
        last_layer: Name of the layer or layer-scale parameter that ends the residual branch, such as ``"norm"``
            or ``"mlp.fc2"``, for `fold_stochastic_depth`.
        name: What `target_layer_name` calls it; by default the name of the class.

    Raises:
        TypeError: If `cls` is not a subclass of Module or a function is not callable.
        ValueError: If the class or the name is registered already.
    """
    for argument, function in (("residual", residual), ("shortcut", shortcut), ("after_sum", after_sum)):
        if not callable(function) and (function is not None or argument == "residual"):
            raise TypeError(f"{argument} must be a function of block and tensor, got {function!r}")
    if not all(isinstance(text, str) or text is None for text in (last_layer, name)):
        raise TypeError(f"last_layer and name must be strings, got {last_layer!r} and {name!r}")
    branch = Branch(residual, shortcut, after_sum, last_layer=last_layer)
    register_block_type(cls, BlockType(name or str(getattr(cls, "__name__", "")), (branch,)))


def register_block_type(cls: type[nn.Module], block_type: BlockType) -> None:
    """Make a block class known by a full description of it::

        cf.register_block_type(
            MyLayer,
            cf.BlockType(
                "MyLayer",
                [
                    cf.Branch(lambda block, x, mask=None: block.attn(block.norm1(x), mask), last_layer="attn.proj"),
                    cf.Branch(lambda block, x, mask=None: block.mlp(block.norm2(x)), last_layer="mlp.2"),
                ],
                row_arguments=["mask"],
            ),
        )

    Args:
        cls: The class; exactly it, not its subclasses.
        block_type: How its blocks split, checked at the first forward of every block.

    Raises:
        TypeError: If `cls` is no module class or `block_type` no `BlockType`.
        ValueError: If the class or the name is registered already.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"cls must be a subclass of torch.nn.Module, got {cls!r}")
    if not isinstance(block_type, BlockType):
        raise TypeError(f"block_type must be a BlockType, got {block_type!r}")
    earlier = BLOCK_TYPES.get(_import_path(cls))  # of a class of this name that was defined again, as in a notebook
    is_redefined = earlier is not None and earlier.cls not in (None, cls) and earlier.name == block_type.name
    if not is_redefined and (earlier is not None or block_type.name in known_names()):
        raise ValueError(f"cls and name must not be registered already, got {cls.__qualname__} and {block_type.name!r}")
    BLOCK_TYPES[_import_path(cls)] = replace(block_type, cls=cls)


def block_type_of(cls: type[nn.Module]) -> BlockType | None:
    """The registered type of exactly this class, None for any other, subclasses included."""
    found = BLOCK_TYPES.get(_import_path(cls))
    return found if found is not None and found.cls in (None, cls) else None


def known_names() -> list[str]:
    """All values of `target_layer_name`."""
    return sorted({block_type.name for block_type in BLOCK_TYPES.values()})


def _import_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
