"""The command ``etude``: reads the options, runs a sub-command, turns its errors into one line."""

import sys
from collections.abc import Sequence

from .export import export
from .plan import plan
from .train import train


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process.

    Exits with status 2 and a message on standard error if the input is bad, with 1 if training fails, and
    with 128 + number of the signal if one stopped it.
    """
    try:
        import tyro
    except ModuleNotFoundError:
        sys.exit("etude: the command line needs some packages more: pip install -e '.[cli]'")
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"train": train, "plan": plan, "export": export},
            prog="etude",
            description="Train residual networks with stochastic depth.",
            args=arguments,
            config=(tyro.conf.PositionalRequiredArgs,),
        )
    except (ValueError, TypeError, OSError) as error:
        print(f"etude: error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"etude: training failed: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if hasattr(stop, "signal_number"):
            print(f"etude: {stop}", file=sys.stderr)
        raise
