"""What every command does around its work: exit codes, one message in place of a traceback, how to go on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from deit_fast.errors import UserError
from deit_fast.training.interrupt import Interrupted


def exit_code(work: Callable[[], object], command: Callable[[], str], interrupted: str) -> int:
    """0 after the work; 2 with one message for what a user can cause; 128 + n after signal n.

    command: the command line that goes on after a polite stop. interrupted: what to say of a Ctrl-C at another time,
    such as before the first step, after the last, or a second one.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what --deterministic needs, before CUDA starts
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"stopped by {stop} and saved. Continue with: {command()}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
