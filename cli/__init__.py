"""The command line: ``etude train``."""
