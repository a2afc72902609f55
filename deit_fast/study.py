"""`python -m deit_fast.study`: trains the report's models under several seeds and writes the comparison."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence

from deit_fast.errors import UserError
from deit_fast.training.study.settings import PROG, parse


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 2 with one message for what a user can cause; 128 + n after signal n."""
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what --deterministic needs, before CUDA starts
    try:
        return _run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; give the command again to go on", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(argv: list[str]) -> int:
    study = parse(argv)
    from deit_fast.training.interrupt import Interrupted  # after the flags: torchmetrics takes seconds to import
    from deit_fast.training.progress import Log
    from deit_fast.training.study.study import run

    try:
        run(study, Log())
    except Interrupted as stop:
        print(f"stopped by {stop} and saved. Continue with: {PROG} {shlex.join(argv)}", file=sys.stderr)
        return 128 + stop.signum
    return 0


if __name__ == "__main__":
    sys.exit(main())
