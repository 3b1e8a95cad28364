"""The command ``etude``: reads the options, runs one of the sub-commands, turns its errors into one line."""

import sys
from collections.abc import Sequence

from .train import train


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process.

    Exits with status 2 and a message on standard error if the input is bad.
    """
    try:
        import tyro
    except ModuleNotFoundError:
        sys.exit("etude: the command line needs some packages more: pip install 'etude[cli]'")
    try:
        tyro.extras.subcommand_cli_from_dict({"train": train}, prog="etude", description=__doc__, args=arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"etude: error: {error}", file=sys.stderr)
        sys.exit(2)
