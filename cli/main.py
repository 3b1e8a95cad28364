"""The command ``etude``: parses the arguments, runs a subcommand and prints its errors in one line."""

import sys
from collections.abc import Callable, Sequence

from .export import export
from .plan import plan
from .suggest import refuse_unknown_options
from .train import train

COMMANDS: dict[str, Callable[..., None]] = {"train": train, "plan": plan, "export": export}


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
        import tyro
    except ModuleNotFoundError:
        sys.exit("etude: the command line needs some packages more: pip install -e '.[cli]'")
    try:
        refuse_unknown_options(arguments, COMMANDS)
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="etude",
            description="Train residual networks with stochastic depth.",
            args=arguments,
            config=(tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes),
        )
    except (ValueError, TypeError, OSError) as error:
        print(f"etude: error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"etude: training failed: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if hasattr(stop, "signal_number"):
            print("\n".join([f"etude: {stop}", *getattr(stop, "__notes__", [])]), file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("etude: interrupted", file=sys.stderr)
        sys.exit(130)
