"""Blocks of timm that are traced, with the input that each gets in its network."""

from typing import Any

import torch
from torch import Tensor, nn

from etude.algorithms.stochastic_depth.blocks.tracing import TracedType
from etude.algorithms.stochastic_depth.discovery import search_blocks
from helpers.conversion import Call, calls_of

SIZES = {"csatv2": 64}  # others take images of 32
NETWORKS: dict[str, tuple[str, ...]] = {
    "test_byobnet": ("BottleneckBlock", "BasicBlock", "EdgeBlock", "DarkBlock"),
    "mobileone_s1": ("MobileOneBlock",),
    "repvgg_a0": ("RepVggBlock",),
    "cait_xxs24_224": ("LayerScaleBlock",),
    "coat_tiny": ("SerialBlock",),
    "convit_tiny": ("Block",),
    "cpubone_nano": ("ResidualBlock",),
    "csatv2": ("Block", "TransformerBlock"),
    "cs3darknet_focus_s": ("DarkBlock",),
    "cspresnext50": ("BottleneckBlock",),
    "cspnext_tiny": ("CspNextBlock",),
    "edgenext_xx_small": ("ConvBlock", "SplitTransposeBlock"),
    "efficientformerv2_s0": ("EfficientFormerV2Block",),
    "fasternet_t0": ("MLPBlock",),
    "fastvit_t8": ("RepMixerBlock",),
    "fastvit_mci0": ("AttentionBlock",),
    "focalnet_tiny_srf": ("FocalNetBlock",),
    "gcvit_xxtiny": ("GlobalContextVitBlock",),
    "hgnetv2_b0": ("HighPerfGpuBlock",),
    "hiera_tiny_224": ("HieraBlock",),
    "iformer_t": ("Residual",),
    "inception_next_atto": ("MetaNeXtBlock",),
    "levit_128s": ("LevitBlock", "LevitDownsample"),
    "lowformer_b0": ("ResidualBlock",),
    "test_mambaout": ("GatedConvBlock",),
    "test_coatnet": ("MbConvBlock", "TransformerBlock2d"),
    "coatnext_nano_rw_224": ("ConvNeXtBlock",),
    "test_maxvit": ("PartitionAttentionCl",),
    "maxvit_tiny_pm_256": ("ParallelPartitionAttention",),
    "gmixer_12_224": ("MixerBlock",),
    "gmlp_ti16_224": ("SpatialGatingBlock",),
    "resmlp_12_224": ("ResBlock",),
    "mobilenetv4_hybrid_medium_075": ("MobileAttention",),
    "mobilevitv2_050": ("LinearTransformerBlock",),
    "nest_tiny": ("TransformerLayer",),
    "nextvit_small": ("NextConvBlock",),
    "pvt_v2_b0": ("Block",),
    "regnetv_040": ("PreBottleneck",),
    "res2next50": ("Bottle2neck",),
    "sequencer2d_s": ("Sequencer2dBlock",),
    "starnet_s050": ("Block",),
    "swiftformer_xs": ("ConvEncoder", "Block", "LocalRepresentation"),
    "tiny_vit_5m_224": ("MBConv",),
    "tresnet_m": ("BasicBlock", "Bottleneck"),
    "twins_svt_small": ("Block",),
    "visformer_tiny": ("Block",),
    "vit_pwee_patch16_reg1_gap_256": ("ParallelScalingBlock",),
    "vit_dpwee_patch16_reg1_gap_256": ("DiffParallelScalingBlock",),
    "test_vit_relpos": ("RelPosBlock",),
    "vit_relpos_small_patch16_rpn_224": ("ResPostRelPosBlock",),
    "vitamin_small_224": ("MbConvLNBlock",),
    "volo_d1_224": ("Outlooker", "Transformer"),
    "eca_vovnet39b": ("OsaBlock",),
    "xception41": ("XceptionModule",),
    "xception41p": ("PreXceptionModule",),
    "xcit_nano_12_p8_224": ("XCABlock", "ClassAttentionBlock"),
}
"""The names of networks, with the classes of their blocks that are traced."""


class Alone(nn.Module):
    """One block, with the further arguments that it got in its network."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.block = call.block.double()
        self.args = tuple(map(_in_double, call.args))
        self.kwargs = {name: _in_double(value) for name, value in call.kwargs.items()}

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, *self.args, **self.kwargs)


def _in_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def build(name: str) -> dict[str, tuple[Alone, Tensor]]:
    """The last block of each traced class that has an identity shortcut, if there is one, and its input."""
    import timm

    torch.manual_seed(0)
    size = SIZES.get(name, 32)
    network = _create(timm, name, size)
    traced = {one.block: one for one in search_blocks(network)[0] if isinstance(one.block_type, TracedType)}
    with torch.no_grad():
        calls = calls_of(network, torch.randn(4, 3, size, size), traced.__contains__)
    chosen: dict[str, Call] = {}
    for call in calls:
        is_projection = any(branch.is_projection(call.block) for branch in traced[call.block].branches)
        if type(call.block).__name__ not in chosen or not is_projection:
            chosen[type(call.block).__name__] = call
    return {cls: _alone(call) for cls, call in chosen.items()}


def _create(timm: Any, name: str, size: int) -> nn.Module:
    options: dict[str, Any] = {"drop_path_rate": 0.2, "num_classes": 3}
    try:
        return timm.create_model(name, img_size=size, **options)
    except TypeError:
        return timm.create_model(name, **options)


def _alone(call: Call) -> tuple[Alone, Tensor]:
    alone = Alone(call)
    for parameter in alone.parameters():  # away from layer scales of 1e-5 and from normalisations that start at 0
        if parameter.dim() <= 1 or parameter.abs().max() < 1e-3:
            parameter.data += 0.3 + 0.1 * torch.rand_like(parameter)
    return alone, call.x.double()
