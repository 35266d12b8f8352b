"""How a process ends whose threads may still be in torch."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave() -> NoReturn:
    """End this process successfully without taking its interpreter down.

    A thread of torch's C++ may still want the interpreter, to hand over what a worker has read or
    to free what gloo has sent. If the interpreter has gone, Python (before 3.14) unwinds that
    thread, which aborts the process, and whoever waits for it takes the work for failed.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
