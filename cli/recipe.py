"""Recipes: options of ``etude train`` in a YAML file, from the folder ``recipes`` or a path, and beside every run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from .options import TrainOptions
from .parsing import accepts, describe_type, parse
from .suggest import nearest_option, option_types

FOLDER = Path(__file__).resolve().parents[1] / "recipes"

# Belong to one start of the command, not to a training that can be repeated.
_OF_THE_COMMAND = ("recipe", "run-name", "resume", "dry-run")


class _Setting(NamedTuple):
    name: str
    value: Any
    line: int


def recipe_names() -> list[str]:
    """The names of the recipes that come with etude."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(name_or_file: str) -> Path:
    """The file of a recipe.

    Raises:
        ValueError: If there is no recipe of this name, and no such file.
    """
    path = Path(name_or_file)
    if path.is_file():
        return path
    if name_or_file in recipe_names():
        return FOLDER / f"{name_or_file}.yaml"
    close = get_close_matches(name_or_file, recipe_names(), n=1)
    hint = f", did you mean {close[0]}?" if close else f"; there are {', '.join(recipe_names())}"
    raise ValueError(f"recipe must be a file or the name of a recipe, got {name_or_file!r}{hint}")


def apply_recipe(path: Path, options: TrainOptions) -> TrainOptions:
    """The options with those of a recipe in the place of their own.

    Raises:
        ValueError: If the file is no recipe, or an option in it does not exist or has a bad value; the message gives
            the file and the line.
    """
    types, words = option_types(TrainOptions), list[str]()
    for setting in _read(path):
        where = f"{path}, line {setting.line}"
        option = setting.name.replace("_", "-")
        if "-" in setting.name or option not in types or option in _OF_THE_COMMAND:
            raise ValueError(f"{where}: {_unknown(setting.name, option, list(types))}")
        words += _as_words(option, setting.value, types[option], where)
    return parse(TrainOptions, "train", words, options)


def write_recipe(options: TrainOptions, path: Path, heading: str) -> None:
    """Write all options that a recipe can have, so that the training can be repeated from the file.

    Args:
        options: With nothing left to be decided.
        path: The file.
        heading: The first line.
    """
    import yaml

    parts = [f"# {heading}\n"]
    for title, group in options.groups():
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in group.items()}
        parts.append(f"\n# {title}\n{yaml.safe_dump(plain, sort_keys=False, width=120)}")
    path.write_text("".join(parts))


def read_options(path: Path) -> TrainOptions:
    """The options of a file that `write_recipe` wrote."""
    return apply_recipe(path, TrainOptions())


def _read(path: Path) -> Iterator[_Setting]:
    """The settings of a file with their lines."""
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text())
        node = loader.get_single_node()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a YAML file of options: {' '.join(str(error).split())}") from error
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{path} must hold options and their values, such as lr: 0.1")
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise ValueError(f"{path}, line {line}: {name} is set in line {seen[name]} already")
        seen[name] = line
        try:
            yield _Setting(name, loader.construct_object(value, deep=True), line)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}, line {line}: {name} must be a plain value") from error


def _unknown(name: str, option: str, known: Sequence[str]) -> str:
    if option in _OF_THE_COMMAND:
        return f"{name} is given to the command, as --{option}, and not in a recipe"
    guess = nearest_option(name, [option for option in known if option not in _OF_THE_COMMAND])
    return f"there is no option {name!r}" + (f", did you mean {guess.replace('-', '_')}?" if guess else "")


def _as_words(option: str, value: Any, kind: Any, where: str) -> list[str]:
    """A setting as the words of the command."""
    name = option.replace("-", "_")
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: {name} must be true or false, got {value!r}")
        return [f"--{option}" if value else f"--no-{option}"]
    items = value if isinstance(value, list) else [value]
    words = [str(item) for item in items]
    if any(isinstance(item, (bool, list, dict)) for item in items) or not accepts(kind, words):
        raise ValueError(f"{where}: {name} must be {describe_type(kind)}, got {value!r}")
    return [f"--{option}", *words]
