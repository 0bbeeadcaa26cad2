"""The ``lowbit`` command."""

from lowbit_kernels.cli.app import main

__all__ = ["main"]
