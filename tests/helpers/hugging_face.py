"""A small network for each supported layer of Hugging Face transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {"vocab_size": 11, **_LAYERS}
_IMAGE = {"image_size": 8, "patch_size": 4, **_LAYERS}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SPEECH: dict[str, Any] = {
    **_TEXT,
    **dict.fromkeys(("conv_dim", "conv_stride", "conv_kernel"), (3, 3)),
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 11,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 8,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}


def _llama_like(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**_TEXT, num_key_value_heads=1, **options)
        return getattr(transformers, f"{name}Model")(config)

    return make


def _model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))

    return make


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "Llama": _llama_like("Llama"),
    "Mistral": _llama_like("Mistral"),
    "Qwen2": _llama_like("Qwen2"),
    "Qwen3": _llama_like("Qwen3", head_dim=8),
    "GPT2": _model("GPT2", **_GPT2),
    "GPT2 with an encoder": _model("GPT2", add_cross_attention=True, **_GPT2),
    "BERT": _model("Bert", **_TEXT, **_NO_DROPOUT),
    "RoBERTa": _model("Roberta", **_TEXT, **_NO_DROPOUT),
    "ViT": _model("ViT", **_IMAGE, **_NO_DROPOUT),
    "DINOv2": _model("Dinov2", **_IMAGE, drop_path_rate=0.2, **_NO_DROPOUT),
    "DINOv2 with SwiGLU": _model("Dinov2", **_IMAGE, use_swiglu_ffn=True, drop_path_rate=0.2, **_NO_DROPOUT),
    "Wav2Vec2": _model("Wav2Vec2", **_SPEECH),
    "Wav2Vec2, stable": _model("Wav2Vec2", **_SPEECH, do_stable_layer_norm=True),
    "Wav2Vec2 with adapters": _model("Wav2Vec2", **_SPEECH, do_stable_layer_norm=True, adapter_attn_dim=4),
}


class Hidden(nn.Module):
    """The last hidden states of a model of transformers, for one dictionary of inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs).last_hidden_state


def build(name: str) -> tuple[Hidden, dict[str, Tensor]]:
    """The network in double precision, with weights large enough to matter, and four samples with a mask."""
    torch.manual_seed(0)
    model = FAMILIES[name]().double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
        else:
            parameter.data.normal_(std=0.3)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1] * 5])
    if name in ("ViT",) or "DINO" in name:
        return Hidden(model), {"pixel_values": torch.randn(4, 3, 8, 8, dtype=torch.float64)}
    if "Wav2Vec2" in name:
        return Hidden(model), {
            "input_values": torch.randn(4, 40, dtype=torch.float64),
            "attention_mask": mask.repeat_interleave(8, dim=1),
        }
    inputs = {"input_ids": torch.randint(2, 11, (4, 5)), "attention_mask": mask}
    if name == "GPT2 with an encoder":
        inputs["encoder_hidden_states"] = torch.randn(4, 3, 16, dtype=torch.float64)
        inputs["encoder_attention_mask"] = mask[:, :3]
    return Hidden(model), inputs
