"""`python -m deit_fast.train`: trains a model, writes its output folder. `--help` lists the settings."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from deit_fast.training.command import exit_code
from deit_fast.training.config import parse


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: see `exit_code`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return exit_code(lambda: _run(argv), lambda: _continued(argv),
                     "nothing is lost but the steps since the last checkpoint")


def _run(argv: list[str]) -> None:
    config = parse(argv)
    from deit_fast.training.progress import Log  # after the flags: torchmetrics takes seconds to import
    from deit_fast.training.run import run

    run(config, Log())


def _continued(argv: list[str]) -> str:
    """The command line that goes on, with --resume alone and last: also a run that was resumed from some PATH goes on
    from its own folder now."""
    again = argv if parse(argv).run.resume == "auto" else [*argv, "--resume"]
    return f"python -m deit_fast.train {shlex.join(again)}"


if __name__ == "__main__":
    sys.exit(main())
