"""Exports a network to a file."""

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

ExportFormat = Literal["safetensors", "torch_export", "onnx"]

_PACKAGES = {"safetensors": ("safetensors",), "torch_export": (), "onnx": ("onnx", "onnxscript")}


def export_network(
    network: nn.Module, path: str | Path, export_format: ExportFormat, input_shape: Sequence[int] = (3, 224, 224)
) -> None:
    """Export a network without stochastic depth to a file.

    Args:
        network: Maps inputs ``(N, *input_shape)`` to outputs.
        path: The file to write.
        export_format: ``safetensors`` contains the weights, for ``load_state_dict`` of the same network;
            ``torch_export`` (a ``.pt2`` file) and ``onnx`` contain the network too, for any N.
        input_shape: Shape of one sample, for the formats that contain the network.

    Raises:
        ValueError: If the format is unknown, the network has stochastic depth, or a package that the
            format needs is not installed. No file is then written.
    """
    if export_format not in get_args(ExportFormat):
        known = ", ".join(get_args(ExportFormat))
        raise ValueError(f"export_format must be one of {known}, got {export_format!r}")
    if any(hasattr(module, "plain_class") for module in network.modules()):  # only converted blocks have this attribute
        raise ValueError(
            f"network must be plain to export it, {type(network).__name__} has stochastic depth: "
            "fold_stochastic_depth(model) comes first"
        )
    if hasattr(network, "loss"):
        raise ValueError(f"network must map inputs to outputs, got a {type(network).__name__}: export its .module")
    missing = [package for package in _PACKAGES[export_format] if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"export_format={export_format!r} needs {' and '.join(missing)} installed: pip install -e '.[export]'"
        )
    _WRITERS[export_format](copy.deepcopy(network).eval(), Path(path), _example(network, input_shape))


def _example(network: nn.Module, input_shape: Sequence[int]) -> Tensor:
    like = next(network.parameters())
    return torch.zeros(2, *input_shape, dtype=like.dtype, device=like.device)


def _write_safetensors(network: nn.Module, path: Path, example: Tensor) -> None:
    from safetensors.torch import save

    # Not save_file, which lets nobody but the owner read the file.
    path.write_bytes(save({name: value.contiguous() for name, value in network.state_dict().items()}))


def _write_torch_export(network: nn.Module, path: Path, example: Tensor) -> None:
    program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("N")},))
    torch.export.save(program, path)


def _write_onnx(network: nn.Module, path: Path, example: Tensor) -> None:
    torch.onnx.export(
        network,
        (example,),
        path,
        dynamo=True,
        input_names=["inputs"],
        output_names=["outputs"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        external_data=False,
        verbose=False,
    )


_WRITERS: dict[str, Callable[[nn.Module, Path, Tensor], None]] = {
    "safetensors": _write_safetensors,
    "torch_export": _write_torch_export,
    "onnx": _write_onnx,
}
