"""Imported before helpers are forked: what every prediction needs, without what libraries say at their start."""

from importlib import import_module

from zolr.cli import quieten

quieten()  # before the libraries
for name in ("zolr.cli.job", "zolr.memory"):
    import_module(name)
