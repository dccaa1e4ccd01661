"""Processes beside this one: they begin with the libraries imported, share nothing else with it, and end with it."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext


def fresh() -> ForkServerContext | SpawnContext:
    """Processes that share nothing with this one, which may have threads or a card, but, where that is possible, their imports."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zolr.cli.warm"])
    return context


def follow(leave: Callable[[], object]) -> None:
    """Leave when the process that started this one has ended, however it did."""
    asking = multiprocessing.parent_process()
    assert asking is not None

    def wait() -> None:
        asking.join()
        leave()

    threading.Thread(target=wait, daemon=True).start()
