"""Checks that a saved state fits the optimizer or learning rate scheduler that loads it.

``load_state_dict`` of torch accepts nearly anything: a wrong name, type or shape raises many steps later, or changes
the training without an error.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..torch_internals import INNER_SCHEDULERS, copy_without_hooks, step_without_hooks


def check_fits(saved: Any, live: Any, num_steps: int) -> None:
    """Check that a saved state fits an optimizer or scheduler. Other objects are not checked.

    Args:
        saved: The ``state_dict`` in the checkpoint.
        live: The object that loads it, before its first step.
        num_steps: Number of optimizer steps of the saved run.

    Raises:
        ValueError: If a name, type or shape differs; the message names the first one.
    """
    if isinstance(live, Optimizer):
        _check_optimizer(saved, live)
    elif isinstance(live, LRScheduler):
        name = type(live).__name__
        own = live.state_dict()
        _require(isinstance(saved, dict), name, "a dict", saved)
        if _is_torchs(live):
            _check_same(saved, own, name)
            _check_progress(saved, own, num_steps, name)
        else:  # a scheduler of the user may add entries to its state in any step
            for key in own:
                _check_kind(saved.get(key), own[key], f"{name}.{key}")


def _check_optimizer(saved: Any, live: Optimizer) -> None:
    name = type(live).__name__
    _require(isinstance(saved, dict) and saved.keys() >= {"state", "param_groups"}, name, "an optimizer's state", saved)
    groups, states = saved["param_groups"], saved["state"]
    own = live.state_dict()["param_groups"]
    _require(isinstance(groups, list) and len(groups) == len(own), f"{name}.param_groups", f"{len(own)} groups", groups)
    for number, (group, own_group) in enumerate(zip(groups, own, strict=True)):
        place = f"{name}.param_groups.{number}"
        _require(isinstance(group, dict), place, "a dict", group)
        _check_names(group, own_group, place)
        for key, value in own_group.items():
            if key == "params":
                _require(_is_same(group[key], value), f"{place}.params", f"{len(value)} parameters", group[key])
            else:
                check = _check_same if key in live.defaults else _check_kind
                check(group[key], value, f"{place}.{key}")
    _require(isinstance(states, dict), f"{name}.state", "a dict", states)
    expected = _expected_states(live) if _is_torchs(live) else {}
    parameters = [parameter for group in live.param_groups for parameter in group["params"]]
    for key, state in states.items():
        place = f"{name}.state.{key}"
        if isinstance(key, str) and not _is_torchs(live):
            continue  # shared by all parameters
        is_known = type(key) is int and 0 <= key < len(parameters) and isinstance(state, dict)
        _require(is_known, place, f"the state of one of {len(parameters)} parameters", state)
        if key in expected:
            _check_same(state, expected[key], place)
        else:
            _check_plausible(state, parameters[key], place)


def _expected_states(live: Optimizer) -> dict[int, dict[str, Any]]:
    """The state of each parameter after a first step, which a copy of the optimizer makes on meta tensors.

    Empty if the optimizer makes no state on meta tensors.
    """
    if live.state:  # created by the constructor
        return live.state_dict()["state"]
    twin = copy_without_hooks(live)
    twin.state = defaultdict(dict)
    stand_ins = []
    for group in live.param_groups:
        twin.param_groups = [_on_meta(group)]
        stand_ins += twin.param_groups[0]["params"]
        # Some optimizers cannot finish a step on meta tensors, but have created their state by then.
        with suppress(RuntimeError, TypeError, ValueError, AssertionError):
            step_without_hooks(twin)
    return {number: dict(twin.state[stand_in]) for number, stand_in in enumerate(stand_ins) if twin.state}


def _on_meta(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of a parameter group with parameters and gradients on the meta device."""
    stand_ins = [torch.empty(param.shape, dtype=param.dtype, device="meta") for param in group["params"]]
    for stand_in in stand_ins:
        stand_in.grad = torch.empty_like(stand_in)
    options: dict[str, Any] = {name: False for name in ("foreach", "fused", "capturable") if name in group}
    lr = float(group["lr"]) if isinstance(group["lr"], Tensor) else group["lr"]
    return {**group, **options, "lr": lr, "params": stand_ins}


def _is_torchs(thing: Any) -> bool:
    return f"{type(thing).__module__}.".startswith("torch.optim.")


def _check_progress(saved: Any, own: Any, num_steps: int, place: str) -> None:
    """Check that a scheduler has made at most one step per optimizer step."""
    if "last_epoch" in own:
        first, last = own["last_epoch"], saved["last_epoch"]
        bounds = f"an int in [{first}, {first + num_steps}]"
        _require(first <= last <= first + num_steps, f"{place}.last_epoch", bounds, last)
    pairs = zip(saved.get(INNER_SCHEDULERS, ()), own.get(INNER_SCHEDULERS, ()), strict=True)
    for number, (inner, own_inner) in enumerate(pairs):
        _check_progress(inner, own_inner, num_steps, f"{place}.{INNER_SCHEDULERS}.{number}")


def _check_same(saved: Any, own: Any, place: str) -> None:
    """Check that a value has the same type, names, lengths and shapes as `own`."""
    if isinstance(own, Tensor):
        fits = isinstance(saved, Tensor) and not saved.is_meta and _form(saved) == _form(own)
        _require(fits, place, _form(own), saved)
    elif isinstance(own, Mapping):
        _require(isinstance(saved, Mapping), place, "a dict", saved)
        _check_names(saved, own, place)
        for key, value in own.items():
            _check_same(saved[key], value, f"{place}.{key}")
    elif isinstance(own, (list, tuple)):
        _require(type(saved) is type(own) and len(saved) == len(own), place, f"{len(own)} values", saved)
        for number, (value, own_value) in enumerate(zip(saved, own, strict=True)):
            _check_same(value, own_value, f"{place}.{number}")
    elif type(own) is float:
        _require(type(saved) in (int, float) and not math.isnan(saved), place, "a number", saved)
    elif isinstance(own, (bool, int, str, type(None))):
        _require(type(saved) is type(own), place, f"a {type(own).__name__}", saved)


def _check_kind(saved: Any, own: Any, place: str) -> None:
    """Check the type of a value that the optimizer may change: a number to a tensor, None to anything."""
    if isinstance(own, (bool, str)):
        _require(type(saved) is type(own), place, f"a {type(own).__name__}", saved)
    elif isinstance(own, (int, float)):
        is_number = type(saved) in (int, float) or (isinstance(saved, Tensor) and saved.numel() == 1)
        _require(is_number and not math.isnan(saved), place, "a number", saved)
    elif isinstance(own, Tensor):
        _require(isinstance(saved, Tensor) and saved.shape == own.shape, place, _form(own), saved)
    elif isinstance(own, (list, tuple, dict)):
        _require(isinstance(saved, type(own)), place, f"a {type(own).__name__}", saved)


def _check_plausible(state: Mapping[Any, Any], parameter: Tensor, place: str) -> None:
    """Check the state of an unknown optimizer: names are strings, and tensors are not on the meta device."""
    for name, value in state.items():
        _require(isinstance(name, str), place, "values by name", name)
        _require(not isinstance(value, Tensor) or not value.is_meta, f"{place}.{name}", "a tensor with memory", value)


def _check_names(saved: Mapping[Any, Any], own: Mapping[Any, Any], place: str) -> None:
    if missing := [name for name in own if name not in saved]:
        raise ValueError(f"the checkpoint must fit the run, {place} has no {missing[0]!r}")
    if unknown := [name for name in saved if name not in own]:
        raise ValueError(f"the checkpoint must fit the run, whose {place} has no {unknown[0]!r:.100}")


def _is_same(saved: Any, own: list[int]) -> bool:
    return isinstance(saved, list) and all(type(number) is int for number in saved) and saved == own


def _require(is_right: bool, place: str, expected: str, found: Any) -> None:
    if not is_right:
        found = _form(found) if isinstance(found, Tensor) else f"{found!r:.100}"
        raise ValueError(f"the checkpoint must fit the run, {place} must be {expected}, got {found}")


def _form(tensor: Tensor) -> str:
    return f"a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
