"""`python -m zolr`: the command line."""

from zolr.cli import run

run()
