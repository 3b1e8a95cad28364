"""Hugging Face transformers: Llama, GPT-2, BERT, ViT, DINOv2, Wav2Vec2.

The layers of transformers change between its versions, so each split is checked at the first forward of a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .branch import BlockType, Branch, further_arguments, plain_class_of
from .tracing import SplitError

_ROW_ARGUMENTS = (
    *("attention_mask", "position_ids", "position_embeddings"),
    *("encoder_hidden_states", "encoder_attention_mask"),
)
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


@dataclass(frozen=True)
class _Layer(BlockType):
    """A layer of transformers."""

    row_arguments: Sequence[str] | Callable[..., Any] = _ROW_ARGUMENTS
    state_arguments: Sequence[str] = _CACHES

    @property
    def is_verified(self) -> bool:
        """False: another version may compute something else."""
        return False


def _named(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The further arguments of ``forward`` by name."""
    return {**dict(zip(further_arguments(plain_class_of(block)), args, strict=False)), **kwargs} if args else kwargs


def _of_itself(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of self-attention: those of ``forward`` without the encoder's."""
    return {name: value for name, value in _named(block, args, kwargs).items() if not name.startswith("encoder_")}


def _layers(*names: str) -> Callable[[Any], list[nn.Module]]:
    return lambda block: [block.get_submodule(name) for name in names]


# Llama


def _llama_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    attended, _ = block.self_attn(hidden_states=block.input_layernorm(x), **_named(block, args, kwargs))
    return attended


def _llama_mlp(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block.mlp(block.post_attention_layernorm(x))


_LLAMA = (
    Branch(_llama_attention, last_layer="self_attn.o_proj", layers=_layers("input_layernorm", "self_attn")),
    Branch(_llama_mlp, last_layer="mlp.down_proj", layers=_layers("post_attention_layernorm", "mlp")),
)

# GPT-2


def _gpt2_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block.attn(block.ln_1(x), **_of_itself(block, args, kwargs))[0]


def _gpt2_cross_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    named = _named(block, args, kwargs)
    if named.get("encoder_hidden_states") is None:
        return torch.zeros_like(x)
    names = ("attention_mask", "encoder_hidden_states", "encoder_attention_mask", *_CACHES)
    return block.crossattention(block.ln_cross_attn(x), **{name: named[name] for name in names if name in named})[0]


def _gpt2_mlp(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block.mlp(block.ln_2(x))


_GPT2 = (
    Branch(_gpt2_attention, last_layer="attn.c_proj", layers=_layers("ln_1", "attn")),
    Branch(_gpt2_mlp, last_layer="mlp.c_proj", layers=_layers("ln_2", "mlp")),
)
_GPT2_WITH_ENCODER = (
    _GPT2[0],
    Branch(
        _gpt2_cross_attention,
        last_layer="crossattention.c_proj",
        layers=_layers("ln_cross_attn", "crossattention"),
    ),
    _GPT2[1],
)

# BERT, RoBERTa: the sums and the normalisations after them are in its output modules


def _bert_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    output = block.attention.output
    attended = block.attention.self(x, **_of_itself(block, args, kwargs))[0]
    return output.dropout(output.dense(attended))


def _bert_mlp(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block.output.dropout(block.output.dense(block.intermediate(x)))


def _has_no_cross_attention(block: Any) -> bool:
    if block.add_cross_attention:
        raise SplitError("its cross-attention and the normalisation after it depend on whether there is an encoder")
    return True


_BERT = (
    Branch(
        _bert_attention,
        after_sum=lambda block, y: block.attention.output.LayerNorm(y),
        last_layer="attention.output.dense",
        layers=_layers("attention.self", "attention.output.dense"),
    ),
    Branch(
        _bert_mlp,
        after_sum=lambda block, y: block.output.LayerNorm(y),
        last_layer="output.dense",
        layers=_layers("intermediate", "output.dense"),
    ),
)

# ViT, DINOv2


def _vit_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block.dropout(block.attention(block.layernorm_before(x), **_named(block, args, kwargs))[0])


def _vit_mlp(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block.dropout(block.mlp(block.layernorm_after(x)))


def _dinov2_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    attended = block.attention(block.norm1(x), **_named(block, args, kwargs))[0]
    return block.drop_path(block.layer_scale1(attended))


def _dinov2_mlp(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block.drop_path(block.layer_scale2(block.mlp(block.norm2(x))))


_DINOV2 = (
    Branch(
        _dinov2_attention,
        last_layer="layer_scale1.lambda1",
        drop_path="drop_path",
        layers=_layers("norm1", "attention", "layer_scale1"),
    ),
    Branch(
        _dinov2_mlp,
        last_layer="layer_scale2.lambda1",
        drop_path="drop_path",
        layers=_layers("norm2", "mlp", "layer_scale2"),
    ),
)

# Wav2Vec2


def _wav2vec2_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block.dropout(block.attention(x, **_named(block, args, kwargs))[0])


def _stable_wav2vec2_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _wav2vec2_attention(block, block.layer_norm(x), *args, **kwargs)


def _stable_wav2vec2(block: Any) -> tuple[Branch, ...]:
    return _STABLE_WAV2VEC2 if block.adapter_layer is None else (*_STABLE_WAV2VEC2, _WAV2VEC2_ADAPTER)


_WAV2VEC2 = (
    Branch(
        _wav2vec2_attention,
        after_sum=lambda block, y: block.layer_norm(y),
        last_layer="attention.out_proj",
        layers=_layers("attention"),
    ),
    Branch(
        lambda block, x, *args, **kwargs: block.feed_forward(x),
        after_sum=lambda block, y: block.final_layer_norm(y),
        last_layer="feed_forward.output_dense",
        layers=_layers("feed_forward"),
    ),
)
_STABLE_WAV2VEC2 = (
    Branch(
        _stable_wav2vec2_attention,
        last_layer="attention.out_proj",
        layers=_layers("layer_norm", "attention"),
    ),
    Branch(
        lambda block, x, *args, **kwargs: block.feed_forward(block.final_layer_norm(x)),
        last_layer="feed_forward.output_dense",
        layers=_layers("final_layer_norm", "feed_forward"),
    ),
)
_WAV2VEC2_ADAPTER = Branch(
    lambda block, x, *args, **kwargs: block.adapter_layer(x),
    last_layer="adapter_layer.linear_2",
    layers=_layers("adapter_layer"),
)

BLOCK_TYPES: dict[str, BlockType] = {
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer": _Layer("LlamaDecoderLayer", _LLAMA),
    "transformers.models.mistral.modeling_mistral.MistralDecoderLayer": _Layer("MistralDecoderLayer", _LLAMA),
    "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer": _Layer("Qwen2DecoderLayer", _LLAMA),
    "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer": _Layer("Qwen3DecoderLayer", _LLAMA),
    "transformers.models.gpt2.modeling_gpt2.GPT2Block": _Layer(
        "GPT2Block", lambda block: _GPT2_WITH_ENCODER if hasattr(block, "crossattention") else _GPT2
    ),
    "transformers.models.bert.modeling_bert.BertLayer": _Layer("BertLayer", _BERT, is_residual=_has_no_cross_attention),
    "transformers.models.roberta.modeling_roberta.RobertaLayer": _Layer(
        "RobertaLayer", _BERT, is_residual=_has_no_cross_attention
    ),
    "transformers.models.vit.modeling_vit.ViTLayer": _Layer(
        "ViTLayer",
        (
            Branch(_vit_attention, last_layer="attention.o_proj", layers=_layers("layernorm_before", "attention")),
            Branch(_vit_mlp, last_layer="mlp.fc2", layers=_layers("layernorm_after", "mlp")),
        ),
    ),
    "transformers.models.dinov2.modeling_dinov2.Dinov2Layer": _Layer("Dinov2Layer", _DINOV2),
    "transformers.models.wav2vec2.modeling_wav2vec2.Wav2Vec2EncoderLayer": _Layer("Wav2Vec2EncoderLayer", _WAV2VEC2),
    "transformers.models.wav2vec2.modeling_wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm": _Layer(
        "Wav2Vec2EncoderLayerStableLayerNorm", _stable_wav2vec2
    ),
}
