"""The hub is asked only for what is not on this machine, and not waited for where it cannot be reached."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

SECONDS = 3.0


def reach_hub(name: str) -> None:
    """Before a model or dataset of this name is asked for: without a connection, look among the cached files only.

    The libraries would try for minutes. A name that is a path, and an environment with a proxy, are left to them.
    """
    if Path(name).exists() or name.startswith((".", "/")) or constants.HF_HUB_OFFLINE:
        return
    hub = urlsplit(constants.ENDPOINT)
    if hub.scheme in getproxies():
        return
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=SECONDS).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def offline_note() -> str:
    """What to add to the message of a failure to load something by name."""
    if not constants.HF_HUB_OFFLINE:
        return ""
    return f" ({constants.ENDPOINT} cannot be reached or HF_HUB_OFFLINE is set: only local paths and cached names work)"
