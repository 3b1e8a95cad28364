"""``etude plan``: the drop rate and the cost of each block of a network, and the expected savings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .packages import check_packages

if TYPE_CHECKING:
    from ..algorithms.stochastic_depth import Savings
    from ..algorithms.stochastic_depth.savings import Resource


def plan(
    model: str,
    drop_rate: float | None = None,
    drop_distribution: Literal["linear", "uniform"] = "linear",
    drop_unit: Literal["block", "branch"] = "block",
    protect_projections: bool = False,
    image_size: int = 224,
    picture: str | None = None,
) -> None:
    """Print the drop rate and the cost of each block of a network, and the expected savings.

    The costs are computed from shapes: nothing is trained and no weights are loaded.

    Args:
        model: A network with residual blocks: from torchvision, such as resnet50 or vit_b_16, from timm, such as
            timm:vit_small_patch16_224, or a CIFAR ResNet, such as cifar_resnet110.
        drop_rate: Probability in [0, 1] that the last block is dropped; by default 0.2, or the network's own rates.
        drop_distribution: Rates that rise linearly with depth, or the same rate for every block.
        drop_unit: Drop the blocks of a transformer, or their branches separately.
        protect_projections: Never drop a block whose shortcut is not the identity.
        image_size: Height and width of the images in pixels.
        picture: A PNG file to save a plot of the table to.
    """
    if picture is not None:
        check_packages("plan --picture", "matplotlib")
    import torch

    from ..algorithms.stochastic_depth import apply_stochastic_depth, expected_savings
    from ..algorithms.stochastic_depth.discovery import find_blocks
    from ..models import create_model

    with torch.device("meta"):
        network = create_model(model)
    _, unconverted = find_blocks(network, None)
    apply_stochastic_depth(
        network,
        drop_rate=drop_rate,
        drop_distribution=drop_distribution,
        drop_unit=drop_unit,
        protect_projections=protect_projections,
    )
    savings = expected_savings(network, (3, image_size, image_size))
    print(as_table(savings))
    for reason in sorted(set(unconverted.values())):
        print(f"not converted: {list(unconverted.values()).count(reason)} {reason}")
    if picture is not None:
        from .picture import draw_plan

        draw_plan(savings, f"{model}, drop rate {max(savings.rates):g} {drop_distribution}", Path(picture))
        print(f"\n{picture}")


def as_table(savings: Savings) -> str:
    """The costs of every block and the savings, as aligned text."""
    header = (
        f"{'block':<28} {'rate':>6} {'MMACs':>9} {'share':>7} {'parameters':>12} {'activations':>12} {'gradients':>11}"
    )
    lines = [header, f"{'':<28} {'':>6} {'':>9} {'':>7} {'':>12} {'per sample':>12} {'':>11}"]
    lines += [
        f"{block.name:<28} {block.drop_rate:>6.3f} {block.macs / 1e6:>9.1f} {block.macs / savings.macs:>7.2%} "
        f"{block.parameters:>12,} {_mebibytes(block.activation_bytes):>12} {_mebibytes(block.gradient_bytes):>11}"
        for block in savings.blocks
    ]
    lines += [
        f"{'whole network':<28} {'':>6} {savings.macs / 1e6:>9.1f} {'':>7} {'':>12} "
        f"{_mebibytes(savings.activation_bytes):>12} {_mebibytes(savings.gradient_bytes):>11}",
        "",
        f"{'saved':<28} {'expected':>9} {'at most':>9}",
    ]
    everything = [1.0] * len(savings.blocks)
    resources: dict[str, Resource] = {
        "training MACs": "macs",
        "activation memory": "activation_bytes",
        "gradient bytes": "gradient_bytes",
    }
    for name, resource in resources.items():
        expected, most = savings.share(resource, savings.rates), savings.share(resource, everything)
        lines.append(f"{name:<28} {expected:>9.2%} {most:>9.2%}")
    lines.append("\nThe block method saves all three; the sample method saves no gradient bytes.")
    return "\n".join(lines)


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:.2f} MiB"
