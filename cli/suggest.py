"""What was probably meant by an option that there is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from inspect import signature
from typing import Any, get_type_hints

# Words of other tools for what has another name here.
_SYNONYMS = {
    "epochs": "max-duration",
    "steps": "max-duration",
    "learning-rate": "lr",
    "wd": "weight-decay",
    "drop-path": "drop-rate",
    "arch": "model",
    "workers": "num-workers",
    "output": "run-name",
    "name": "run-name",
    "amp": "precision",
}


def refuse_unknown_options(arguments: Sequence[str], commands: Mapping[str, Callable[..., Any]]) -> None:
    """Refuse an option that the sub-command does not have, and name the nearest one.

    Raises:
        ValueError: With the option, the suggestion, and the command that prints the help.
    """
    if not arguments or arguments[0] not in commands:
        return
    command = arguments[0]
    known = ["help", *_options(commands[command])]
    for argument in arguments[1:]:
        name = argument.removeprefix("--").partition("=")[0].replace("_", "-")
        if not argument.startswith("--") or name.removeprefix("no-") in known or name in known:
            continue
        nearest = get_close_matches(name, known, n=1)
        guess = _SYNONYMS.get(name) or (nearest[0] if nearest else None)
        hint = f", did you mean --{guess}?" if guess in known else ";"
        raise ValueError(f"there is no option --{name}{hint} etude {command} --help lists all")


def _options(thing: Any) -> Iterator[str]:
    """The names of the options of a function or a dataclass."""
    if is_dataclass(thing):
        hints = get_type_hints(thing)
        for option in fields(thing):
            kind = hints[option.name]
            if is_dataclass(kind):
                yield from _options(kind)
            else:
                yield option.name.replace("_", "-")
        return
    hints = get_type_hints(thing)
    for name in signature(thing).parameters:
        if is_dataclass(hints[name]):
            yield from _options(hints[name])
        else:
            yield name.replace("_", "-")
