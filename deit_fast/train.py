"""`python -m deit_fast.train`: trains a model, writes its output folder. `--help` lists the settings."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence

from deit_fast.errors import UserError
from deit_fast.training.config import parse


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 2 with one message for what a user can cause; 128 + n after signal n."""
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what --deterministic needs, before CUDA starts
    try:
        return _run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step, after the last, or a second time
        print("interrupted; nothing is lost but the steps since the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(argv: list[str]) -> int:
    config = parse(argv)
    from deit_fast.training.interrupt import Interrupted  # after the flags: torchmetrics takes seconds to import
    from deit_fast.training.progress import Log
    from deit_fast.training.run import run

    try:
        run(config, Log())
    except Interrupted as stop:
        # The flag alone, and last: also a run that was resumed from some PATH goes on from its own folder now.
        again = argv if config.run.resume == "auto" else [*argv, "--resume"]
        print(f"stopped by {stop} and saved. Continue with: python -m deit_fast.train {shlex.join(again)}",
              file=sys.stderr)
        return 128 + stop.signum
    return 0


if __name__ == "__main__":
    sys.exit(main())
