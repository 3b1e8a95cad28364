"""``python -m etude`` is the command ``etude``, as torchrun needs it."""

from etude.cli.main import main

if __name__ == "__main__":
    main()
