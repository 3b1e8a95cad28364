"""A small network for each hand-written block type of torchvision and timm."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.efficientnet import FusedMBConv, FusedMBConvConfig, MBConv, MBConvConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.mnasnet import _InvertedResidual
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.mobilenetv3 import InvertedResidual as V3InvertedResidual
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=3, **options)

    return make


def _mbconvs(block: type[nn.Module], config: Any) -> Callable[[], nn.Module]:
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    return lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        block(config(2, 3, 1, 8, 8, 1), 0.2, norm),
        block(config(2, 3, 2, 8, 12, 1), 0.2, norm),
        block(config(2, 3, 1, 12, 12, 1), 0.2, norm),
    )


def _convs(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks)


def _v3(channels: tuple[int, int]) -> nn.Module:
    return V3InvertedResidual(
        InvertedResidualConfig(channels[0], 3, 16, channels[1], True, "HS", 1, 1, 1), nn.BatchNorm2d
    )


def _metaformer(separable: bool = False, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from timm.models.metaformer import MetaFormer, Pooling, SepConv

        mixer = SepConv if separable else Pooling
        return MetaFormer(
            depths=(1, 1), dims=(32, 32), token_mixers=mixer, num_classes=3, drop_path_rate=0.2, **options
        )

    return make


def _norm_free() -> nn.Module:
    from timm.models.nfnet import NfCfg, NormFreeNet

    config = NfCfg(depths=(1, 2), channels=(8, 16), stem_type="3x3", stem_chs=8, skipinit=True)
    return NormFreeNet(config, num_classes=3, drop_path_rate=0.2)


def _convnext(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from timm.models.convnext import ConvNeXt

        return ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 16, 16, 16), num_classes=3, drop_path_rate=0.2, **options)

    return make


SWIN: dict[str, Any] = {
    "patch_size": [4, 4],
    "embed_dim": 8,
    "depths": [2],
    "num_heads": [2],
    "window_size": [4, 4],
    "num_classes": 3,
}
TIMM_VIT: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "drop_path_rate": 0.2}
TIMM_SWIN: dict[str, Any] = {
    "img_size": 32,
    "depths": (2,),
    "embed_dim": 16,
    "num_heads": (2,),
    "window_size": 4,
    "drop_path_rate": 0.2,
}
SWIN_V2_CR = {name: value for name, value in TIMM_SWIN.items() if name != "window_size"} | {"window_size": (4, 4)}
SAM: dict[str, Any] = {**TIMM_VIT, "neck_chans": 8, "patch_size": 4, "window_size": 3, "global_attn_indexes": (1,)}
DAVIT: dict[str, Any] = {
    "depths": (1, 1),
    "embed_dims": (8, 16),
    "num_heads": (2, 2),
    "window_size": 3,
    "drop_path_rate": 0.2,
}
SMALL = {"drop_path_rate": 0.2}
CHANNELS: dict[str, Any] = {"layers": (2, 1, 1, 1), "channels": (16, 16, 16, 16)}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "RegNet": lambda: RegNet(BlockParams([2, 1], [8, 16], [4, 4], [1.0, 1.0], [2, 2], 0.25), num_classes=3),
    "ConvNeXt": lambda: ConvNeXt([CNBlockConfig(8, None, 2)], 0.2, layer_scale=0.5, num_classes=3),
    "MBConv": _mbconvs(MBConv, MBConvConfig),
    "FusedMBConv": _mbconvs(FusedMBConv, FusedMBConvConfig),
    "MobileNetV2": lambda: _convs(InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 12, 2, 2)),
    "MobileNetV3": lambda: _convs(_v3((8, 8)), _v3((8, 12))),
    "MNASNet": lambda: _convs(_InvertedResidual(8, 8, 3, 1, 2), _InvertedResidual(8, 12, 3, 2, 2)),
    "Swin": lambda: SwinTransformer(stochastic_depth_prob=0.2, **SWIN),
    "Swin V2": lambda: SwinTransformer(stochastic_depth_prob=0.2, block=SwinTransformerBlockV2, **SWIN),
    "MaxViT": lambda: MaxVit((32, 32), 8, 4, [8, 16], [1, 2], 4, 0.2, num_classes=3),
    "timm ViT": _timm("vit_tiny_patch16_224", **TIMM_VIT),
    "timm ViT with layer scale": _timm("vit_tiny_patch16_224", init_values=0.5, **TIMM_VIT),
    "timm EVA": _timm("eva02_tiny_patch14_224", **{**TIMM_VIT, "img_size": 28}),
    "timm EVA with gamma": _timm("eva_giant_patch14_224", init_values=0.5, **{**TIMM_VIT, "img_size": 28}),
    "timm BEiT": _timm("beit_base_patch16_224", **TIMM_VIT),
    "timm Swin": _timm("swin_tiny_patch4_window7_224", **TIMM_SWIN),
    "timm Swin V2": _timm("swinv2_tiny_window8_256", **TIMM_SWIN),
    "timm Swin V2 Cr": _timm("swinv2_cr_tiny_224", extra_norm_period=2, **SWIN_V2_CR),
    "timm SAM": _timm("samvit_base_patch16", **SAM),
    "timm DaViT": _timm("davit_tiny", **DAVIT),
    "timm PoolFormer": _metaformer(layer_scale_init_values=0.5, res_scale_init_values=None),
    "timm MetaFormer": _metaformer(separable=True, layer_scale_init_values=None, res_scale_init_values=0.5),
    "timm ConvNeXt": _convnext(ls_init_value=0.5),
    "timm ConvNeXt V2": _convnext(ls_init_value=None, use_grn=True, conv_mlp=True),
    "timm RegNet": _timm("regnetx_002", **SMALL),
    "timm PreAct Bottleneck": _timm("resnetv2_50", layers=(2, 1, 1, 1), channels=(16, 16, 16, 16), drop_path_rate=0.2),
    "timm PreAct basic": _timm("resnetv2_18", layers=(2, 1, 1, 1), channels=(16, 16, 16, 16), drop_path_rate=0.2),
    "timm ResNetV2 Bottleneck": _timm(
        "resnetv2_50", layers=(2, 1, 1, 1), channels=(16, 16, 16, 16), preact=False, drop_path_rate=0.2
    ),
    "timm NormFree": _norm_free,
    "timm ResNeSt": _timm("resnest14d", stem_width=4, **CHANNELS),
    "timm SKNet": _timm("skresnet18", **{**SMALL, **CHANNELS}),
    "timm SKNet Bottleneck": _timm("skresnet50", **{**SMALL, **CHANNELS}),
    "timm SENet": _timm("legacy_senet154", layers=(2, 1, 1, 1)),
    "timm SE-ResNet": _timm("legacy_seresnet50", layers=(2, 1, 1, 1)),
    "timm SE-ResNeXt": _timm("legacy_seresnext50_32x4d", layers=(2, 1, 1, 1)),
    "timm SE-ResNet basic": _timm("legacy_seresnet18", layers=(2, 1, 1, 1)),
    "timm EfficientNet": _timm("tf_efficientnetv2_b0", **SMALL),
    "timm MobileNet V4": _timm("mobilenetv4_conv_small_035", **SMALL),
    "timm MobileNet V3": _timm("mobilenetv3_small_050", **SMALL),
}


CANNOT_FOLD = [name for name in FAMILIES if name.startswith("timm SE")]  # a squeeze-and-excitation ends the branch


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network in double precision, with normalisations away from their initial values, and four images."""
    torch.manual_seed(0)
    network = FAMILIES[name]().double()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("skipinit_gain"):
            nn.init.constant_(parameter, 0.5)  # it starts at 0
    size = 28 if "EVA" in name else 32
    return network, torch.randn(4, 3, size, size, dtype=torch.float64)
