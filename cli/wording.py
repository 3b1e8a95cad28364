"""Errors of the library in the words of the command."""

import re

_OPTIONS = {
    "on_corrupt='skip'": "--on-corrupt skip",
    "download=True": "--download",
    "autoresume=True": "--resume auto",
    "load_path": "--resume",
    "folder must hold": "data must hold",
    "num_to_keep": "save_num_checkpoints_to_keep",
    "resume from it, pass": "resume from it, give",
}


def in_words_of_the_command(error: BaseException) -> str:
    """The message of an error on one line, with the command's options in the place of the library's arguments."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught "):  # in a loader worker; its traceback follows, and at last the error
        lines = [re.sub(r"^[\w.]+: ", "", lines[-1])]
    text = " ".join(lines) or repr(error)
    for argument, option in _OPTIONS.items():
        text = text.replace(argument, option)
    return text
