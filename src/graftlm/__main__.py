"""`python -m graftlm` is the command line."""

from graftlm.cli import main

main()
