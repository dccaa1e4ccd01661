"""`python -m zolr`: the command line."""

from zolr.cli import run as main

if __name__ == "__main__":
    main()
