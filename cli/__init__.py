"""The command line: ``etude train``, ``etude plan``, ``etude export``."""
