"""Processes beside this one, which share nothing with it but perhaps their imports, and end with it."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext


def fresh(*, warm: bool = True) -> ForkServerContext | SpawnContext:
    """Processes that share nothing with this one, which may have threads or a card.

    Args:
        warm: they begin with their imports done, where that is possible. Not for what computes on a card: a library may ask
            it something when it is imported, and then no process that was forked afterwards can use it.
    """
    if not warm or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zolr.cli.warm"])
    return context


@contextmanager
def without_main() -> Iterator[None]:
    """Processes that are started inside do not import the program of this one, which may be a script that would begin again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def follow(leave: Callable[[], object]) -> None:
    """Leave when the process that started this one has ended, however it did."""
    asking = multiprocessing.parent_process()
    assert asking is not None

    def wait() -> None:
        asking.join()
        leave()

    threading.Thread(target=wait, daemon=True).start()
