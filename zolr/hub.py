"""Whether the Hugging Face hub can be asked: its clients retry for half a minute before they give up."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager


def answers() -> bool:
    """Whether asking the hub is worth it; a proxy is taken to answer."""
    if any(os.environ.get(v) for v in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    match = re.match(r"(https?)://([^/:]+)(?::(\d+))?", endpoint)
    if match is None:
        return True
    port = int(match[3] or (443 if match[1] == "https" else 80))
    try:
        socket.create_connection((match[2], port), timeout=5).close()
    except OSError:
        return False
    return True


@contextmanager
def offline_if_silent() -> Iterator[None]:
    """What is asked of the hub is looked for in the local cache alone while this lasts, if the hub does not answer."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before and not answers():
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
