"""Which networks are converted: a sample of families, and what docs/coverage.md counts for all of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import etude
from etude.algorithms.stochastic_depth.discovery import search_blocks
from etude.models import create_model

COMPLETE = [
    *("resnet18", "regnet_y_400mf", "convnext_tiny", "efficientnet_b0", "mobilenet_v3_small", "swin_t", "maxvit_t"),
    *("timm:vit_tiny_patch16_224", "timm:eva02_tiny_patch14_224", "timm:swinv2_cr_tiny_224", "timm:davit_tiny"),
    *("timm:convnext_atto", "timm:efficientnet_b0", "timm:regnetx_002", "timm:resnetv2_18", "timm:resnest14d"),
    *("timm:poolformer_s12", "timm:xcit_nano_12_p8_224", "timm:maxvit_pico_rw_256", "timm:cspresnext50"),
    *("timm:vit_small_resnet26d_224", "timm:pvt_v2_b0", "timm:fastvit_t8", "timm:levit_128s", "timm:hiera_tiny_224"),
]
IN_PART = {
    "timm:cait_xxs24_224": "LayerScaleBlockClassAttn: its drop path drop_path masks something else, too",
    "timm:coat_tiny": "ParallelBlock: its forward returns a tuple, not a tensor",
    "timm:volo_d1_224": "ClassBlock: its drop path is added to something else than what its branch starts with",
}
NOT_AT_ALL = {
    "timm:mvitv2_tiny": "MultiScaleBlock: its forward returns a tuple, not a tensor",
    "timm:repvit_m1": "RepViTBlock: not a known type of block and without a drop path",
}


def search(name: str, **options: Any) -> tuple[int, set[str]]:
    """How many blocks are found, and why others are not."""
    with torch.device("meta"):
        found, unconverted = search_blocks(create_model(name, **options))
    return len(found), set(unconverted.values())


@pytest.mark.parametrize("name", COMPLETE)
def test_networks_of_many_families_are_converted_completely(name: str) -> None:
    assert search(name)[0] > 0
    assert search(name)[1] == set()
    if name.startswith("timm:"):
        assert search(name, drop_path_rate=0.1) == search(name)


@pytest.mark.parametrize("name", IN_PART)
def test_what_stays_of_a_network_is_named_with_the_reason(name: str) -> None:
    num_blocks, reasons = search(name)
    assert num_blocks > 0
    assert reasons == {IN_PART[name]}


@pytest.mark.parametrize("name", NOT_AT_ALL)
def test_networks_that_are_not_converted_are_named_with_the_reason(name: str) -> None:
    assert search(name) == (0, {NOT_AT_ALL[name]})


def test_the_page_counts_enough_of_all_networks() -> None:
    page = (Path(etude.__file__).parent / "docs" / "coverage.md").read_text()
    rows = re.findall(r"^\| (torchvision|timm[^|]*) \| (\d+) \| (\d+) \(", page, re.M)
    counts = {name: (int(num_models), int(num_complete)) for name, num_models, num_complete in rows}
    assert set(counts) == {"torchvision", "timm", "timm, drop_path_rate=0.1"}
    assert counts["torchvision"][1] >= 55
    for name in ("timm", "timm, drop_path_rate=0.1"):
        num_models, num_complete = counts[name]
        assert num_models > 1300
        assert num_complete >= 0.8 * num_models
