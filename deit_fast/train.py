"""`python -m deit_fast.train`: trains a model, writes its output folder. `--help` lists the settings."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from deit_fast.errors import UserError
from deit_fast.training.config import parse


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 2 with one message for what a user can cause; 128 + n after signal n."""
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what --deterministic needs, before CUDA starts
    try:
        config = parse(argv)
        from deit_fast.training.engine import Interrupted  # after the flags: torchmetrics takes seconds to import
        from deit_fast.training.progress import Log
        from deit_fast.training.run import run
    except UserError as error:
        return _fail(error)
    try:
        run(config, Log())
    except UserError as error:
        return _fail(error)
    except Interrupted as stop:
        again = argv if config.run.resume else [*argv, "--resume"]
        print(f"stopped by {stop} and saved. Continue with: python -m deit_fast.train {shlex.join(again)}", file=sys.stderr)
        return 128 + stop.signum
    return 0


def _fail(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
