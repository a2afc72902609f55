"""`python -m deit_fast.study`: trains the report's models under several seeds and writes the comparison."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from deit_fast.training.command import exit_code
from deit_fast.training.study.settings import PROG, parse


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: see `exit_code`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return exit_code(lambda: _run(argv), lambda: f"{PROG} {shlex.join(argv)}", "give the command again to go on")


def _run(argv: list[str]) -> None:
    study = parse(argv)
    from deit_fast.training.progress import Log  # after the flags: torchmetrics takes seconds to import
    from deit_fast.training.study.study import run

    run(study, Log())


if __name__ == "__main__":
    sys.exit(main())
