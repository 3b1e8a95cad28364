"""Describes algorithms, callbacks, schedules and other settings as plain values.

`describe` gives nested dictionaries and lists of numbers, strings and None, from which
the `repr` of an algorithm, the settings that are logged and saved, and the comparisons over ranks and at a resume.
No description holds a memory address, so the same program gives the same description in every process.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import sys
from collections.abc import Mapping
from enum import Enum
from numbers import Number
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .time import Time

_MAX_LENGTH = 64  # items of a list or elements of a tensor up to which its values are kept, and not their hash
_LIBRARIES = ("torch.", f"{__name__.partition('.')[0]}.")
_NOT_KEPT = {"opaque": "not kept as an attribute"}
_MISSING = object()
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_AS_TEXT = (PurePath, Time, torch.device, torch.dtype, range, slice, bytes)


def describe(value: Any) -> Any:
    """Describe a setting as plain values, so that different settings have different descriptions.

    - Numbers, strings and containers of them unchanged; long lists and large tensors as their hash.
    - Dataclasses as ``{"class": name, field: value, ...}``, with the fields that take part in ``__init__`` and in
      comparisons.
    - Other algorithms, callbacks and callable objects likewise, with their public attributes and with the arguments
      of ``__init__`` that are attributes, also private ones (``rate`` or ``_rate``).
    - Functions as module, qualified name, a hash of their code with all constants, default values and the values
      of their closure. The values of global variables and the functions that they call are not included. Functions
      of torch and of this package are given by name only, so that another version of these can resume a run.
    - Everything else as ``{"opaque": name of its class}``: two objects of the class cannot be distinguished.

    Args:
        value: Any object.

    Returns:
        Nested dictionaries, lists, strings, finite numbers, booleans and None.
    """
    return _describe(value, ())


def represent(value: Any) -> str:
    """A `repr` that is made from `describe`: ``Name(argument=value, ...)`` with the arguments of ``__init__``."""
    description = describe(value)
    if isinstance(description, dict) and "class" in description:
        arguments = _arguments(value)
        description = {name: item for name, item in description.items() if name == "class" or name in arguments}
    return as_text(description)


def as_text(description: Any) -> str:
    """A description as one line, the way it would be written in Python."""
    if isinstance(description, list):
        return f"[{', '.join(map(as_text, description))}]"
    if not isinstance(description, dict):
        return repr(description)
    kind, *_ = [*description, ""]
    if kind == "opaque":
        return f"<{description['opaque']}>"
    if kind == "sha256":
        return f"<{description.get('of')}, sha256 {description['sha256']}>"
    if kind == "function":
        return str(description["function"])
    if kind == "partial":
        return _call_as_text("partial", [description["partial"], *description["args"]], description["keywords"])
    if kind == "class":
        keywords = {name: item for name, item in description.items() if name not in ("class", "__call__")}
        return _call_as_text(description["class"], [], keywords)
    return f"{{{', '.join(f'{name!r}: {as_text(item)}' for name, item in description.items())}}}"


def find_opaque(description: Any, name: str = "") -> list[str]:
    """The parts of a description where different values look the same, as ``name (what it is)``."""
    if isinstance(description, dict):
        if "opaque" in description:
            return [f"{name} ({description['opaque']})"]
        items = list(description.items())
    elif isinstance(description, list):
        items = list(enumerate(description))
    else:
        return []
    return [place for key, item in items for place in find_opaque(item, f"{name}.{key}" if name else str(key))]


def _call_as_text(name: str, args: list[Any], keywords: dict[str, Any]) -> str:
    keywords = {name: item for name, item in keywords.items() if item != _NOT_KEPT}
    return f"{name}({', '.join([*map(as_text, args), *(f'{key}={as_text(item)}' for key, item in keywords.items())])})"


def _describe(value: Any, parents: tuple[int, ...]) -> Any:
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)  # NaN differs from itself
    if isinstance(value, (str, Number, *_AS_TEXT)):
        return str(value)
    if id(value) in parents:
        return "..."
    parents = (*parents, id(value))
    if isinstance(value, (Tensor, np.ndarray)):
        return _describe_array(value, parents)
    if isinstance(value, Mapping):
        return {str(key): _describe(item, parents) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return _describe_list(value, parents)
    if isinstance(value, (set, frozenset)):
        return sorted((_describe(item, parents) for item in value), key=json.dumps)
    if callable(value):
        return _describe_callable(value, parents)
    return _describe_object(value, parents)


def _describe_array(value: Tensor | np.ndarray[Any, Any], parents: tuple[int, ...]) -> Any:
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_meta:
            return {"opaque": type(value).__qualname__}
        if value.numel() <= _MAX_LENGTH:
            return _describe(value.tolist(), parents)
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        if value.dtype.hasobject:
            return {"opaque": type(value).__qualname__}
        if value.size <= _MAX_LENGTH:
            return _describe(value.tolist(), parents)
        raw = value.tobytes()
    return _hash_of(f"{value.dtype} of shape {tuple(value.shape)}", raw)


def _describe_list(values: list[Any] | tuple[Any, ...], parents: tuple[int, ...]) -> Any:
    if len(values) <= _MAX_LENGTH:
        return [_describe(value, parents) for value in values]
    if not set(map(type, values)) <= {bool, int, float, str, type(None)}:
        described = [_describe(value, parents) for value in values]
        if find_opaque(described):
            return {"opaque": f"{type(values).__qualname__} of {len(values)}"}
        values = [json.dumps(item) for item in described]
    return _hash_of(f"{len(values)} items", repr(list(values)).encode())


def _describe_callable(value: Any, parents: tuple[int, ...]) -> Any:
    if isinstance(value, functools.partial):
        keywords = {name: _describe(item, parents) for name, item in value.keywords.items()}
        args = [_describe(item, parents) for item in value.args]
        return {"partial": _describe(value.func, parents), "args": args, "keywords": keywords}
    if isinstance(value, MethodType):
        return {**_describe_function(value.__func__, parents), "self": _describe(value.__self__, parents)}
    if isinstance(value, FunctionType):
        return _describe_function(value, parents)
    if isinstance(value, (type, BuiltinFunctionType, np.ufunc)):
        return {"function": _name_of(value)}
    if isinstance(value, nn.Module):
        return {"opaque": type(value).__qualname__}
    if hasattr(value, "__wrapped__"):  # functools.lru_cache
        return _describe(value.__wrapped__, parents)
    called = _describe_function(type(value).__call__, parents)
    return {**_describe_attributes(value, parents), **({"__call__": called} if "code" in called else {})}


def _describe_function(function: Any, parents: tuple[int, ...]) -> dict[str, Any]:
    name = _name_of(function)
    if not isinstance(function, FunctionType) or name.startswith(_LIBRARIES):
        return {"function": name}
    code = f"{sys.version_info.major}.{sys.version_info.minor}:{_hash_code(function.__code__)}"
    closure = {}
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            closure[variable] = _describe(cell.cell_contents, parents)
        except ValueError:  # the cell is empty: the variable is assigned later, or never
            closure[variable] = {"opaque": "not assigned yet"}
    described = {
        "defaults": [_describe(item, parents) for item in function.__defaults__ or ()],
        "kwdefaults": {name: _describe(item, parents) for name, item in (function.__kwdefaults__ or {}).items()},
        "closure": closure,
    }
    return {"function": name, "code": code, **{key: item for key, item in described.items() if item}}


def _describe_object(value: Any, parents: tuple[int, ...]) -> Any:
    """A dataclass, or what the caller asked for itself, by its attributes; any other object only by its class."""
    if _is_own_dataclass(value) or len(parents) == 1:
        return _describe_attributes(value, parents)
    return {"opaque": type(value).__qualname__}


def _describe_attributes(value: Any, parents: tuple[int, ...]) -> dict[str, Any]:
    attributes = _arguments(value)
    if not _is_own_dataclass(value):
        names = [*getattr(value, "__dict__", ()), *_slots(value)]
        public = {name: getattr(value, name) for name in names if not name.startswith("_") and hasattr(value, name)}
        attributes = {**attributes, **public}
    described = {name: _NOT_KEPT if item is _MISSING else _describe(item, parents) for name, item in attributes.items()}
    return {"class": type(value).__qualname__, **described}


def _arguments(value: Any) -> dict[str, Any]:
    """The arguments that an object was built with, as far as its attributes tell."""
    if _is_own_dataclass(value):
        fields = [field for field in dataclasses.fields(value) if field.init and field.compare]
        return {field.name: getattr(value, field.name) for field in fields}
    try:
        parameters = inspect.signature(type(value)).parameters.values()
    except (TypeError, ValueError):  # a class that is not written in Python
        return {}
    names = [parameter.name for parameter in parameters if parameter.kind not in _VARIADIC]
    return {name: getattr(value, name, getattr(value, f"_{name}", _MISSING)) for name in names}


def _is_own_dataclass(value: Any) -> bool:
    """Whether the class itself is a dataclass; a subclass that is none may have settings besides the fields."""
    return "__dataclass_fields__" in vars(type(value))


def _slots(value: Any) -> list[str]:
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    return [name for names in slots for name in ((names,) if isinstance(names, str) else names)]


def _name_of(function: Any) -> str:
    module = getattr(function, "__module__", None) or "builtins"
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", type(function).__qualname__)
    return f"{'__main__' if module == '__mp_main__' else module}.{name}"  # as a spawned process calls it


def _hash_code(code: CodeType) -> str:
    """A hash of what a function does, whatever the line that it stands in."""
    num_arguments = code.co_argcount + code.co_kwonlyargcount
    parts = (
        code.co_code,
        code.co_exceptiontable,
        code.co_names,
        code.co_varnames[:num_arguments],
        code.co_freevars,
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags),
        [_describe_constant(constant) for constant in code.co_consts],
    )
    return _sha256(repr(parts).encode())


def _describe_constant(constant: Any) -> Any:
    if isinstance(constant, CodeType):
        return _hash_code(constant)
    if isinstance(constant, tuple):
        return tuple(_describe_constant(item) for item in constant)
    if isinstance(constant, frozenset):
        return sorted(map(repr, constant))  # their order differs between processes
    return constant


def _hash_of(of: str, raw: bytes) -> dict[str, str]:
    return {"sha256": _sha256(raw), "of": of}


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]
