"""The one place that holds the version; `--version` reads it without importing anything else."""

__version__ = "0.1.0"
