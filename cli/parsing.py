"""Turns the arguments of a command into its options, and says in one line what is wrong with them."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from .suggest import nearest_option, option_types

T = TypeVar("T")


def parse(
    thing: Callable[..., T], command: str, arguments: Sequence[str], default: Any = None, description: str | None = None
) -> T:
    """Parse the arguments of a command.

    Args:
        thing: A dataclass of options, of which an object is made, or a function, which is called with its options.
        command: The name of the command.
        arguments: What follows it.
        default: An object whose values hold where no argument is given.
        description: Printed by ``--help``; by default the docstring of `thing`.

    Raises:
        ValueError: If an option does not exist or has a bad value.
    """
    import tyro

    check_options(thing, command, arguments)
    if "--help" not in arguments and "-h" not in arguments:
        _check_values(thing, command, arguments)
    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
    given = {} if default is None else {"default": default}
    return tyro.cli(thing, prog=f"etude {command}", args=arguments, config=config, description=description, **given)


def split_options(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option with the words that belong to it; the words before the first one come with the name ``""``."""
    name, words = "", list[str]()
    for argument in arguments:
        if _is_option(argument):
            yield name, words
            name, equals, value = argument.partition("=")
            words = [value] if equals else []
        else:
            words.append(argument)
    yield name, words


def check_options(thing: Any, command: str, arguments: Sequence[str]) -> None:
    """Refuse an option that the command does not have, and name the one that was probably meant.

    Raises:
        ValueError: With the option, the suggestion, and the command that prints the help.
    """
    known = ["help", *option_types(thing)]
    for option, _ in split_options(arguments):
        name = option.lstrip("-").replace("_", "-")
        exists = option.startswith("--") and (name.removeprefix("no-") in known or name in known)
        if option in ("", "-h") or exists:
            continue
        guess = nearest_option(name, known)
        hint = f", did you mean --{guess}?" if guess else ";"
        raise ValueError(f"there is no option {option}{hint} etude {command} --help lists all")


def describe_type(kind: Any) -> str:
    """A type in words, for messages."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe_type(part) for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        return ("one of " if len(get_args(kind)) > 1 else "") + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of words"
    return {int: "an int", float: "a number", bool: "true or false", str: "a word"}[kind]


def _is_option(argument: str) -> bool:
    return argument.startswith("-") and argument != "-" and not re.match(r"-\.?\d", argument)


def _check_values(thing: Any, command: str, arguments: Sequence[str]) -> None:
    types, has_positionals = option_types(thing), not is_dataclass(thing)
    for option, words in split_options(arguments):
        if not option and words and not has_positionals:
            raise ValueError(f"etude {command} takes options only, got {words[0]!r}; data is given with --data")
        name = option.removeprefix("--").replace("_", "-")
        negated = name not in types and name.removeprefix("no-") in types
        kind = types.get(name.removeprefix("no-") if negated else name)
        if kind is None:
            continue
        if has_positionals and get_origin(kind) is not tuple:
            words = words[:1] if kind is not bool else []  # the others belong to the command itself
        if kind is bool:
            if words:
                raise ValueError(f"--{name} takes no value, got {words[0]!r}; --no-{name} turns it off")
        elif negated or not accepts(kind, words):
            got = f"got {' '.join(words)!r}" if words else "got none"
            raise ValueError(f"{option} must be {describe_type(kind)}, {got}; etude {command} --help explains it")


def accepts(kind: Any, words: Sequence[str]) -> bool:
    """Whether the words can be values of an option of this type."""
    if get_origin(kind) in (Union, UnionType):
        return any(accepts(part, words) for part in get_args(kind))
    if get_origin(kind) is tuple:
        return True
    if len(words) != 1:
        return False
    if kind is NoneType:
        return words[0] == "None"
    if get_origin(kind) is Literal:
        return words[0] in get_args(kind)
    try:
        kind(words[0])
    except ValueError:
        return False
    return True
