"""``etude export``: the trained network of a run as a file, with the drop rates folded into the weights."""

from pathlib import Path
from typing import Literal, get_args

ExportFormat = Literal["safetensors", "torch_export", "onnx"]

_SUFFIXES: dict[ExportFormat, str] = {"safetensors": ".safetensors", "torch_export": ".pt2", "onnx": ".onnx"}


def export(run: str, export_format: ExportFormat | None = None, output: str | None = None) -> None:
    """Export the network of a finished run, with its drop rates folded into the weights.

    The result is an ordinary network of torchvision, timm or the CIFAR ResNets, without stochastic depth.

    Args:
        run: The folder of the run, such as runs/resnet50-20260101-120000.
        export_format: safetensors contains the weights; torch_export and onnx contain the network too. By default
            as the suffix of the output says, .safetensors, .pt2 or .onnx; safetensors without an output.
        output: The file to write; by default network.safetensors, network.pt2 or network.onnx in the run's folder.
    """
    chosen = choose_format(export_format, output)
    path = Path(output) if output is not None else Path(run) / f"network{_SUFFIXES[chosen]}"
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"output must be a file in an existing folder, there is none at {path.parent}")
    from ..models import export_network
    from .trained import load_trained

    trained = load_trained(Path(run))
    image_size = trained.recorded.image_size
    export_network(trained.folded(), path, chosen, (3, image_size, image_size))
    if trained.recorded.blurpool and chosen == "safetensors":
        print("the weights are those of a network with BlurPool: cf.apply_blurpool(network) before loading them")
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def choose_format(export_format: ExportFormat | None, output: str | None) -> ExportFormat:
    """The format to write.

    Raises:
        ValueError: If the suffix of the output says none, or another one than `export_format`.
    """
    if output is None:
        return export_format or "safetensors"
    suffix = Path(output).suffix
    found = next((name for name in get_args(ExportFormat) if _SUFFIXES[name] == suffix), None)
    if found is None:
        raise ValueError(f"output must end in {', '.join(_SUFFIXES.values())}, got {output!r}")
    if export_format not in (None, found):
        raise ValueError(f"export_format must be {found} for {output}, got {export_format!r}")
    return found
