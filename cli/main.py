"""The command ``etude``: parses the arguments, runs a subcommand and prints its errors in one line."""

import sys
from collections.abc import Callable, Sequence

from .eval import evaluate
from .export import export
from .parsing import parse
from .plan import plan
from .predict import predict
from .train import train
from .wording import in_words_of_the_command

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "plan": plan,
    "export": export,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default ``sys.argv[1:]``.

    Exits with status 2 if the input is invalid, with 1 if training fails, each with a message on standard error,
    and with 128 + the signal number if a signal stopped the training.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        from importlib.metadata import version

        print(f"etude {version('etude')}")
        return
    try:
        _run(arguments)
    except (ValueError, TypeError, OSError) as error:
        _print_error(f"error: {in_words_of_the_command(error)}", error)
        sys.exit(2)
    except FloatingPointError as error:
        _print_error(f"training failed: {error}", error)
        sys.exit(1)
    except SystemExit as stop:
        if hasattr(stop, "signal_number"):
            _print_error(str(stop), stop)
        raise
    except KeyboardInterrupt:
        print("etude: interrupted", file=sys.stderr)
        sys.exit(130)


def _print_error(text: str, error: BaseException) -> None:
    """Print an error, and the command that continues a run which it ended."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith("continue it with: ")]
    print("\n".join([f"etude: {text}", *notes]), file=sys.stderr)


def _run(arguments: list[str]) -> None:
    try:
        import tyro
    except ModuleNotFoundError:
        sys.exit("etude: the command line needs some packages more: pip install -e '.[cli]'")
    if arguments and arguments[0] == "train":
        from .start import starting_options

        train(starting_options(arguments[1:], train.__doc__))
    elif arguments and arguments[0] in COMMANDS:
        parse(COMMANDS[arguments[0]], arguments[0], arguments[1:])
    else:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="etude", description="Train image classifiers with stochastic depth.", args=arguments
        )
