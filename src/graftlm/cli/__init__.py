"""The command line: `main` runs it; each module holds the verbs of one room."""

from graftlm.cli.app import main

__all__ = ["main"]
