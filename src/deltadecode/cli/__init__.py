"""The command ``deltadecode``."""

from deltadecode.cli.app import main

__all__ = ["main"]
