"""Checks for the packages that a command needs in addition to the library's own requirements."""

from importlib.util import find_spec


def check_packages(command: str, *modules: str) -> None:
    """Check that the modules can be imported, before any work is done.

    Raises:
        ValueError: If one is missing, with the command that installs it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(f"etude {command} needs {' and '.join(missing)} installed: pip install -e '.[cli]'")
