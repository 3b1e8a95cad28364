"""How each type of residual block splits: shortcut, residual branch, and what follows their sum.

The known types are named by their import path, so that nothing is imported which a model does not use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Branch:
    """One residual step ``after_sum(shortcut(x) + residual(x))`` of a block.

    Every function takes the block first.

    Args:
        residual: ``(block, x, ...) -> f(x)``, what can be dropped. It gets the further arguments of the
            block's ``forward``, if there are any.
        shortcut: ``(block, x) -> s(x)``, always computed.
        after_sum: ``(block, y) -> z``, what follows the sum.
        input_is_final: Whether ``after_sum(x)`` is x for the inputs the block gets, so that a dropped
            branch with an identity shortcut gives back its input. True where nothing follows the sum,
            and in a chain of blocks that all end in the same ReLU.
        ends_in_relu: Whether `after_sum` is nothing but a ReLU and the inputs are final.
        last_layer: ``(block) -> layer``, the normalisation or linear layer that ends the residual
            branch and can take over a factor; None where there is none.
        gives_new_tensor: Whether `residual` gives a tensor that nobody else holds, so that evaluation can
            add in place.
        layers: ``(block) -> layers`` that `residual` computes with and nothing else does; None where that is
            not known.
    """

    residual: Callable[..., Tensor]
    shortcut: Callable[[Any, Tensor], Tensor] = lambda block, x: x
    after_sum: Callable[[Any, Tensor], Tensor] = lambda block, y: y
    input_is_final: Callable[[Any], bool] = lambda block: True
    ends_in_relu: Callable[[Any], bool] = lambda block: False
    last_layer: Callable[[Any], nn.Module | None] = lambda block: None
    gives_new_tensor: bool = False
    layers: Callable[[Any], Sequence[nn.Module]] | None = None

    def run(self, block: nn.Module, x: Tensor, scale: float, *args: Any, **kwargs: Any) -> Tensor:
        """The step with the residual branch times `scale`, which is not computed where that is 0."""
        if scale == 0:
            return self.drop(block, x)
        residual = self.residual(block, x, *args, **kwargs)
        shortcut = self.shortcut(block, x)
        if self.gives_new_tensor and not torch.is_grad_enabled():
            return self.after_sum(block, torch.add(shortcut, residual, alpha=scale, out=residual))
        return self.after_sum(block, torch.add(shortcut, residual, alpha=scale))

    def drop(self, block: nn.Module, x: Tensor) -> Tensor:
        """The step without its residual branch."""
        shortcut = self.shortcut(block, x)
        if shortcut is x and self.input_is_final(block):
            return x
        return self.after_sum(block, shortcut)


@dataclass(frozen=True)
class BlockType:
    """How one class of blocks is made of branches, which must be all that its ``forward`` does.

    Args:
        name: What `target_layer_name` calls it.
        branches: The residual steps in the order in which they run.
        changes_shape: Whether a block's shortcut is more than the identity.
        batch_dim: The dimension of a block's input that counts the samples.
        select: ``(block, take, ...) -> (args, kwargs)``, the further arguments of ``forward`` for some
            samples only, where ``take(tensor)`` selects those from a tensor's first dimension.
        cls: The class itself, where a user registered it.
    """

    name: str
    branches: tuple[Branch, ...]
    changes_shape: Callable[[Any], bool] = lambda block: False
    batch_dim: Callable[[Any], int] = lambda block: 0
    select: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] = lambda block, take, *args, **kwargs: (args, kwargs)
    cls: type[nn.Module] | None = None


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


# torchvision: ResNet, ResNeXt, Wide ResNet


def _basic_residual(block: Any, x: Tensor) -> Tensor:
    x = block.relu(block.bn1(block.conv1(x)))
    return block.bn2(block.conv2(x))


def _bottleneck_residual(block: Any, x: Tensor) -> Tensor:
    x = block.relu(block.bn1(block.conv1(x)))
    x = block.relu(block.bn2(block.conv2(x)))
    return block.bn3(block.conv3(x))


def _projection(block: Any, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)


def _has_projection(block: Any) -> bool:
    return block.downsample is not None


def _all_but_projection(block: Any) -> list[nn.Module]:
    return [layer for name, layer in block.named_children() if name != "downsample"]


def _relu(block: Any, y: Tensor) -> Tensor:
    return block.relu(y)


def _ends_in_relu(block: Any) -> bool:
    return type(block.relu) is nn.ReLU


# timm: ResNet and its relatives


def _timm_basic_residual(block: Any, x: Tensor) -> Tensor:
    x = block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))
    return _timm_ending(block, block.bn2(block.conv2(x)))


def _timm_bottleneck_residual(block: Any, x: Tensor) -> Tensor:
    x = block.act1(block.bn1(block.conv1(x)))
    x = block.aa(block.act2(block.drop_block(block.bn2(block.conv2(x)))))
    return _timm_ending(block, block.bn3(block.conv3(x)))


def _timm_ending(block: Any, x: Tensor) -> Tensor:
    x = x if block.se is None else block.se(x)
    return x if block.drop_path is None else block.drop_path(x)


# Transformers


def _vit_attention(block: Any, x: Tensor) -> Tensor:
    x = block.ln_1(x)
    return block.dropout(block.self_attention(x, x, x, need_weights=False)[0])


def _attention(
    block: Any,
    x: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    x = block.norm1(x) if block.norm_first else x
    masks = _as_float(src_mask, x), _as_float(src_key_padding_mask, x)
    return block._sa_block(x, *masks, is_causal=is_causal)


def _as_float(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask that is added to the attention, as both masks must be of one kind."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask, float("-inf"))


def _feed_forward(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block._ff_block(block.norm2(x) if block.norm_first else x)


def _select_masks(
    block: Any,
    take: Callable[[Tensor], Tensor],
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if src_mask is not None and src_mask.dim() == 3:  # one mask per sample and head: (N * heads, L, L)
        heads = block.self_attn.num_heads
        src_mask = take(src_mask.unflatten(0, (-1, heads))).flatten(0, 1)
    if src_key_padding_mask is not None:
        src_key_padding_mask = take(src_key_padding_mask)
    return (src_mask, src_key_padding_mask, is_causal), {}


def _unless_post_norm(norm: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda block, y: y if block.norm_first else getattr(block, norm)(y)


BLOCK_TYPES = {
    "torchvision.models.resnet.BasicBlock": BlockType(
        "ResNetBasicBlock",
        (
            Branch(
                _basic_residual,
                _projection,
                _relu,
                input_is_final=_ends_in_relu,
                ends_in_relu=_ends_in_relu,
                last_layer=lambda block: block.bn2,
                gives_new_tensor=True,
                layers=_all_but_projection,
            ),
        ),
        _has_projection,
    ),
    "torchvision.models.resnet.Bottleneck": BlockType(
        "ResNetBottleneck",
        (
            Branch(
                _bottleneck_residual,
                _projection,
                _relu,
                input_is_final=_ends_in_relu,
                ends_in_relu=_ends_in_relu,
                last_layer=lambda block: block.bn3,
                gives_new_tensor=True,
                layers=_all_but_projection,
            ),
        ),
        _has_projection,
    ),
    "etude.models.cifar_resnet.CIFARBasicBlock": BlockType(
        "CIFARBasicBlock",
        (
            Branch(
                _basic_residual,
                lambda block, x: block.option_a_shortcut(x),
                _relu,
                input_is_final=_ends_in_relu,
                ends_in_relu=_ends_in_relu,
                last_layer=lambda block: block.bn2,
                gives_new_tensor=True,
                layers=_all_but_projection,
            ),
        ),
        lambda block: block.stride != 1 or block.new_channels > 0,
    ),
    "timm.models.resnet.BasicBlock": BlockType(
        "TimmBasicBlock",
        (
            Branch(
                _timm_basic_residual,
                _projection,
                lambda block, y: block.act2(y),
                input_is_final=lambda block: type(block.act2) is nn.ReLU,
                ends_in_relu=lambda block: type(block.act2) is nn.ReLU,
                last_layer=lambda block: block.bn2 if block.se is None else None,
                layers=_all_but_projection,
            ),
        ),
        _has_projection,
    ),
    "timm.models.resnet.Bottleneck": BlockType(
        "TimmBottleneck",
        (
            Branch(
                _timm_bottleneck_residual,
                _projection,
                lambda block, y: block.act3(y),
                input_is_final=lambda block: type(block.act3) is nn.ReLU,
                ends_in_relu=lambda block: type(block.act3) is nn.ReLU,
                last_layer=lambda block: block.bn3 if block.se is None else None,
                layers=_all_but_projection,
            ),
        ),
        _has_projection,
    ),
    "torchvision.models.vision_transformer.EncoderBlock": BlockType(
        "ViTEncoderBlock",
        (
            Branch(
                _vit_attention,
                last_layer=lambda block: block.self_attention.out_proj,
                layers=lambda block: [block.ln_1, block.self_attention],
            ),
            Branch(
                lambda block, x: block.mlp(block.ln_2(x)),
                last_layer=lambda block: block.mlp[3],
                layers=lambda block: [block.ln_2, block.mlp],
            ),
        ),
    ),
    "torch.nn.modules.transformer.TransformerEncoderLayer": BlockType(
        "TransformerEncoderLayer",
        (
            Branch(
                _attention,
                after_sum=_unless_post_norm("norm1"),
                input_is_final=lambda block: block.norm_first,
                last_layer=lambda block: block.self_attn.out_proj,
                layers=lambda block: [block.self_attn, *([block.norm1] if block.norm_first else [])],
            ),
            Branch(
                _feed_forward,
                after_sum=_unless_post_norm("norm2"),
                input_is_final=lambda block: block.norm_first,
                last_layer=lambda block: block.linear2,
                layers=lambda block: [block.linear1, block.linear2, *([block.norm2] if block.norm_first else [])],
            ),
        ),
        batch_dim=lambda block: 0 if block.self_attn.batch_first else 1,
        select=_select_masks,
    ),
}
