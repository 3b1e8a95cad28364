"""``python -m etude`` runs the command ``etude``, for use with torchrun."""

from etude.cli.main import main

if __name__ == "__main__":
    main()
