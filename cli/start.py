"""What the options of ``etude train`` start from: the defaults, a run that is resumed, a recipe."""

from collections.abc import Sequence
from pathlib import Path

from .options import TrainOptions
from .parsing import check_options, parse, split_options
from .recipe import apply_recipe, find_recipe, read_options

RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"


def starting_options(arguments: Sequence[str], description: str | None = None) -> TrainOptions:
    """The options that the arguments give, over those of ``--recipe``, over those of the run that is resumed.

    Args:
        arguments: Of ``etude train``.
        description: Printed by ``--help``.

    Raises:
        ValueError: If an option does not exist or has a bad value.
    """
    check_options(TrainOptions, "train", arguments)
    given = {option: words[0] for option, words in split_options(arguments) if words}
    options = TrainOptions()
    folder = resumed_folder(given.get("--resume"), given.get("--run-name"))
    if folder is not None and (folder / RECIPE).is_file():
        options = read_options(folder / RECIPE)
    if "--recipe" in given:
        options = apply_recipe(find_recipe(given["--recipe"]), options)
    return parse(TrainOptions, "train", arguments, options, description)


def resumed_folder(resume: str | None, run_name: str | None) -> Path | None:
    """The folder of the run that ``--resume`` names, which may not exist; None if there is nothing to resume."""
    if resume is None:
        return None
    if resume == "auto":
        return None if run_name is None else Path("runs") / run_name
    path = Path(resume)
    if path.is_file() or path.suffix == ".pt":
        return path.resolve().parent.parent
    return path.resolve().parent if path.name == CHECKPOINTS else path
