"""timm: transformers and MetaFormers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..torch_internals import swin_attention, swin_v2_cr_attention
from .branch import BlockType, Branch, get_attribute

# ViT


def _vit_attention(block: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    x = block.attn(block.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
    return block.drop_path1(block.ls1(x))


def _vit_mlp(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


# EVA


def _eva_attention(
    block: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    x = block.attn(block.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
    return block.drop_path1(_times(block.gamma_1, x))


def _eva_mlp(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block.drop_path2(_times(block.gamma_2, block.mlp(block.norm2(x))))


# BEiT


def _beit_attention(block: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    x = block.attn(block.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias)
    return block.drop_path1(_times(block.gamma_1, x))


def _times(gamma: nn.Parameter | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


# Swin


def _swin_mlp(block: Any, x: Tensor) -> Tensor:
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    return block.drop_path2(block.mlp(block.norm2(tokens))).reshape(x.shape)


def _swin_v2_mlp(block: Any, x: Tensor) -> Tensor:
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    return block.drop_path2(block.norm2(block.mlp(tokens))).reshape(x.shape)


# SAM, whose windows are rows of their own in between


def _sam_attention(block: Any, x: Tensor) -> Tensor:
    from timm.models.vision_transformer_sam import window_partition, window_unpartition

    size, window = (x.shape[1], x.shape[2]), block.window_size
    x = block.norm1(x)
    if window == 0:
        return block.drop_path1(block.ls1(block.attn(x)))
    x, padded_size = window_partition(x, window)
    return window_unpartition(block.drop_path1(block.ls1(block.attn(x))), window, size, padded_size)


def _sam_mlp(block: Any, x: Tensor) -> Tensor:
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    return block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))).reshape(x.shape)


# DaViT: images (N, C, H, W), tokens in the branches


def _davit_spatial_attention(block: Any, x: Tensor) -> Tensor:
    from timm.models.davit import window_partition, window_reverse

    _, channels, height, width = x.shape
    window_height, window_width = block.window_size
    tokens = block.norm1(x.flatten(2).transpose(1, 2)).unflatten(1, (height, width))
    tokens = functional.pad(tokens, (0, 0, 0, -width % window_width, 0, -height % window_height))
    windows = window_partition(tokens, block.window_size)
    attended = block.attn(windows.view(-1, window_height * window_width, channels))
    attended = attended.view(-1, window_height, window_width, channels)
    tokens = window_reverse(attended, block.window_size, tokens.shape[1], tokens.shape[2])
    return block.drop_path1(tokens[:, :height, :width].permute(0, 3, 1, 2))


def _davit_channel_attention(block: Any, x: Tensor) -> Tensor:
    tokens = block.attn(block.norm1(x.flatten(2).transpose(1, 2)))
    return block.drop_path1(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


def _davit_mlp(block: Any, x: Tensor) -> Tensor:
    tokens = block.mlp(block.norm2(x.flatten(2).transpose(1, 2)))
    return block.drop_path2(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


def _davit(name: str, attention: Any) -> BlockType:
    return BlockType(
        name,
        [
            Branch(attention, before=lambda block, x: block.cpe1(x), last_layer="attn.proj", drop_path="drop_path1"),
            Branch(_davit_mlp, before=lambda block, x: block.cpe2(x), last_layer="mlp.fc2", drop_path="drop_path2"),
        ],
        is_residual=lambda block: block.mlp is not None,
    )


# MetaFormer


def _token_mixer(block: Any, x: Tensor) -> Tensor:
    return block.layer_scale1(block.drop_path1(block.token_mixer(block.norm1(x))))


def _metaformer_mlp(block: Any, x: Tensor) -> Tensor:
    return block.layer_scale2(block.drop_path2(block.mlp(block.norm2(x))))


def _first_of(*names: str) -> Any:
    """The first of these layers and parameters that a block has; an Identity is none."""

    def last_layer(block: Any) -> nn.Module | nn.Parameter | None:
        found = (get_attribute(block, name) for name in names)
        return next((one for one in found if one is not None and type(one) is not nn.Identity), None)

    return last_layer


def _select_rows(block: Any, take: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
    """Masks and position embeddings of each sample have three dimensions or more, shared ones two or one row."""

    def selected(value: Any) -> Any:
        return take(value) if isinstance(value, Tensor) and value.dim() > 2 and len(value) > 1 else value

    return tuple(map(selected, args)), {name: selected(value) for name, value in kwargs.items()}


def _layers(*names: str) -> Callable[[Any], list[nn.Module]]:
    return lambda block: [block.get_submodule(name) for name in names]


def _attention_and_mlp(
    name: str, attention: Any, mlp: Any, last_layers: tuple[Any, Any], layers: tuple[Any, Any] = (None, None)
) -> BlockType:
    return BlockType(
        name,
        [
            Branch(attention, last_layer=last_layers[0], drop_path="drop_path1", layers=layers[0]),
            Branch(mlp, last_layer=last_layers[1], drop_path="drop_path2", layers=layers[1]),
        ],
        row_arguments=_select_rows,
    )


BLOCK_TYPES = {
    "timm.models.vision_transformer.Block": _attention_and_mlp(
        "TimmViTBlock",
        _vit_attention,
        _vit_mlp,
        (_first_of("ls1", "attn.proj"), _first_of("ls2", "mlp.fc2")),
        (_layers("norm1", "attn", "ls1"), _layers("norm2", "mlp", "ls2")),
    ),
    "timm.models.eva.EvaBlock": _attention_and_mlp(
        "TimmEvaBlock", _eva_attention, _eva_mlp, (_first_of("gamma_1", "attn.proj"), _first_of("gamma_2", "mlp.fc2"))
    ),
    "timm.models.beit.Block": _attention_and_mlp(
        "TimmBeitBlock", _beit_attention, _eva_mlp, (_first_of("gamma_1", "attn.proj"), _first_of("gamma_2", "mlp.fc2"))
    ),
    "timm.models.swin_transformer.SwinTransformerBlock": _attention_and_mlp(
        "TimmSwinBlock",
        lambda block, x: block.drop_path1(swin_attention(block, block.norm1(x))),
        _swin_mlp,
        ("attn.proj", "mlp.fc2"),
        (_layers("norm1", "attn"), _layers("norm2", "mlp")),
    ),
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": _attention_and_mlp(
        "TimmSwinV2Block",
        lambda block, x: block.drop_path1(block.norm1(swin_attention(block, x))),
        _swin_v2_mlp,
        ("norm1", "norm2"),
        (_layers("norm1", "attn"), _layers("norm2", "mlp")),
    ),
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock": BlockType(
        "TimmSwinV2CrBlock",
        [
            Branch(
                lambda block, x: block.drop_path1(block.norm1(swin_v2_cr_attention(block, x))),
                last_layer="norm1",
                drop_path="drop_path1",
            ),
            Branch(
                _swin_v2_mlp,
                after_sum=lambda block, y: block.norm3(y),
                last_layer="norm2",
                drop_path="drop_path2",
            ),
        ],
    ),
    "timm.models.vision_transformer_sam.Block": _attention_and_mlp(
        "TimmSamBlock", _sam_attention, _sam_mlp, (_first_of("ls1", "attn.proj"), _first_of("ls2", "mlp.fc2"))
    ),
    "timm.models.davit.SpatialBlock": _davit("TimmDaViTSpatialBlock", _davit_spatial_attention),
    "timm.models.davit.ChannelBlock": _davit("TimmDaViTChannelBlock", _davit_channel_attention),
    "timm.models.metaformer.MetaFormerBlock": BlockType(
        "TimmMetaFormerBlock",
        [
            Branch(
                _token_mixer,
                lambda block, x: block.res_scale1(x),
                projects=lambda block: type(block.res_scale1) is not nn.Identity,
                last_layer=_first_of("layer_scale1", "token_mixer.proj", "token_mixer.pwconv2"),
                drop_path="drop_path1",
            ),
            Branch(
                _metaformer_mlp,
                lambda block, x: block.res_scale2(x),
                projects=lambda block: type(block.res_scale2) is not nn.Identity,
                last_layer=_first_of("layer_scale2", "mlp.fc2"),
                drop_path="drop_path2",
            ),
        ],
    ),
}
