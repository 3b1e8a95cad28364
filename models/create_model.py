"""Builds a network by its name, from torchvision, timm or this package."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..engine.checks import check_int
from .cifar_resnet import CIFARResNet, blocks_per_stage


def create_model(
    name: str,
    num_classes: int = 1000,
    *,
    weights: str | None = None,
    image_size: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a network for images by its name.

    Under ``torch.device("meta")`` no memory is allocated for its parameters.

    Args:
        name: A torchvision classification network (``"resnet50"``), ``"timm:NAME"`` for one of timm
            (``"timm:vit_small_patch16_224"``), or ``"cifar_resnetN"`` for a CIFAR ResNet of depth N.
        num_classes: Number of classes, at least 1.
        weights: Pretrained weights: for torchvision their name (``"IMAGENET1K_V2"``, ``"DEFAULT"``), for timm
            their tag (``"augreg_in1k"``) or ``"DEFAULT"``; None for a random initialisation. With another
            number of classes the last layer is initialised randomly.
        image_size: Height and width of the images in pixels, for networks that are built for one size, such as vision
            transformers; by default the size of their published weights. Other networks take any size.
        options: Further arguments of the network's constructor, such as ``drop_path_rate`` for timm.

    Returns:
        A network that maps images ``(N, C, H, W)`` to logits ``(N, num_classes)``.

    Raises:
        TypeError: If `name` is not a string or the constructor has no such option.
        ValueError: If there is no network of this name, no weights of this name, or timm is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    check_int("num_classes", num_classes, ge=1)
    options = {**options, **_fixed_size(name, image_size)}
    try:
        return _build(name, num_classes, weights, options)
    except NotImplementedError:
        if torch.get_default_device().type != "meta":
            raise
    with torch.device("cpu"):  # RegNets compute their widths with tensors, which need data
        return _build(name, num_classes, weights, options).to("meta")


def _fixed_size(name: str, image_size: int | None) -> dict[str, Any]:
    """The option with the size of the images, for a network that is built for one size."""
    if image_size is None:
        return {}
    if name.startswith("vit_"):
        return {"image_size": image_size}
    if name.startswith("timm:") and find_spec("timm") is not None:
        from timm.models import get_pretrained_cfg

        settings = get_pretrained_cfg(name.removeprefix("timm:"), allow_unregistered=True)
        return {"img_size": image_size} if settings is not None and settings.fixed_input_size else {}
    return {}


def _build(name: str, num_classes: int, weights: str | None, options: dict[str, Any]) -> nn.Module:
    if name.startswith("timm:"):
        return _from_timm(name.removeprefix("timm:"), num_classes, weights, options)
    if name.startswith("cifar_resnet"):
        return _cifar_resnet(name, num_classes, weights, options)
    return _from_torchvision(name, num_classes, weights, options)


def _from_torchvision(name: str, num_classes: int, weights: str | None, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(
            f"model must be the name of a torchvision network, timm:NAME or cifar_resnet20 to cifar_resnet1202, "
            f"got {name!r}"
        )
    if weights is None:
        return models.get_model(name, num_classes=num_classes, **options)
    known = models.get_model_weights(name)
    names = [entry.name for entry in known]
    if weights != "DEFAULT" and weights not in names:
        raise ValueError(f"weights of {name} must be one of {', '.join(names) or 'none'}, got {weights!r}")
    network = models.get_model(name, weights=known[weights] if weights in names else "DEFAULT", **options)
    return network if num_classes == 1000 else _with_new_head(network, num_classes)


def _with_new_head(network: Any, num_classes: int) -> nn.Module:
    """Replace the last linear layer, which in torchvision is the last module that has an output per class."""
    name, last = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, attribute = name.rpartition(".")
    head = nn.Linear(last.in_features, num_classes, bias=last.bias is not None)
    setattr(network.get_submodule(parent), attribute, head)
    return network


def _from_timm(name: str, num_classes: int, weights: str | None, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(f"timm must be installed for timm:{name}: pip install timm") from error
    if not timm.is_model(name):
        raise ValueError(f"model must be a network that timm has, got 'timm:{name}'")
    tags = timm.list_pretrained(f"{name}.*") if weights is not None else []
    full_name = name if weights in (None, "DEFAULT") else f"{name}.{weights}"
    if weights is not None and (not tags or (full_name != name and full_name not in tags)):
        known = ", ".join(tag.partition(".")[2] for tag in tags) or "none"
        raise ValueError(f"weights of timm:{name} must be one of {known}, got {weights!r}")
    return timm.create_model(full_name, num_classes=num_classes, pretrained=weights is not None, **options)


def _cifar_resnet(name: str, num_classes: int, weights: str | None, options: dict[str, Any]) -> nn.Module:
    depth = name.removeprefix("cifar_resnet")
    if not depth.isdecimal():
        raise ValueError(f"model must be cifar_resnet20 to cifar_resnet1202, got {name!r}")
    if weights is not None:
        raise ValueError(f"weights of {name} must be None, since there are none, got {weights!r}")
    return CIFARResNet(blocks_per_stage(int(depth)), num_classes, **options)
