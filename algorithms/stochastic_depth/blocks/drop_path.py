"""The drop-path modules of other libraries (timm, torchvision, transformers): what masks a residual branch."""

from torch import nn

from .branch import Branch, get_attribute


def is_drop_path(module: object) -> bool:
    """Whether this is a module that multiplies by a random mask and has a rate."""
    return _rate_attribute(module) is not None


def rate_of(block: nn.Module, branch: Branch) -> float:
    """The rate of the block's own drop path in a branch, 0 where there is none."""
    module = get_attribute(block, branch.drop_path)
    attribute = _rate_attribute(module)
    return 0.0 if attribute is None else float(getattr(module, attribute) or 0.0)


def set_rate(block: nn.Module, name: str, rate: float) -> None:
    """Set the rate of the block's own drop path of this name; with 0 it returns its input."""
    module = get_attribute(block, name)
    attribute = _rate_attribute(module)
    assert attribute is not None, "only drop paths are silenced"
    setattr(module, attribute, rate)


def find_drop_paths(block: nn.Module) -> list[str]:
    """The names of all drop paths of a block that have a rate above 0."""
    paths = [(name, _rate_attribute(module), module) for name, module in block.named_modules()]
    return [name for name, attribute, module in paths if attribute is not None and getattr(module, attribute)]


def _rate_attribute(module: object) -> str | None:
    if not isinstance(module, nn.Module):
        return None
    name = type(module).__name__
    if name.endswith("DropPath") and hasattr(module, "drop_prob"):
        return "drop_prob"
    if name == "StochasticDepth" and hasattr(module, "p"):
        return "p"
    return None
