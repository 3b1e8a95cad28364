"""Which packages a command needs that the library itself does not."""

from importlib.util import find_spec


def check_packages(command: str, *modules: str) -> None:
    """Refuse to begin where a package is missing that the end will need.

    Raises:
        ValueError: With the command that installs it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(f"etude {command} needs {' and '.join(missing)} installed: pip install -e '.[cli]'")
