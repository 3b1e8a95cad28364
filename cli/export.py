"""``etude export``: the trained network of a run as a file, with the drop rates folded into the weights."""

from pathlib import Path
from typing import Literal

_SUFFIXES = {"safetensors": ".safetensors", "torch_export": ".pt2", "onnx": ".onnx"}


def export(
    run: str,
    export_format: Literal["safetensors", "torch_export", "onnx"] = "safetensors",
    output: str | None = None,
) -> None:
    """Export the network of a finished run, with its drop rates folded into the weights.

    The result is an ordinary torchvision network, without stochastic depth.

    Args:
        run: The folder of the run, such as runs/resnet50-20260101-120000.
        export_format: safetensors contains the weights; torch_export and onnx contain the network too.
        output: The file to write; by default network.safetensors, network.pt2 or network.onnx in the run's folder.
    """
    from ..models import export_network
    from .weights import load_folded

    folder = Path(run)
    path = Path(output) if output is not None else folder / f"network{_SUFFIXES[export_format]}"
    network, image_size = load_folded(folder / "weights.pt")
    export_network(network, path, export_format, (3, image_size, image_size))
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
