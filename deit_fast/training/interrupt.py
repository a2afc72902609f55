"""Stopping politely: SIGINT and SIGTERM end a run at the next place where its state is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the run is saved and can be resumed."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Within `with`, the number of the first SIGINT or SIGTERM is kept in `arrived`; a second one acts as ever.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.arrived: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *_error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def check(self) -> None:
        """Raises Interrupted when a signal has arrived: for a caller whose state is saved."""
        if self.arrived is not None:
            raise Interrupted(self.arrived)

    def _remember(self, signum: int, _frame: FrameType | None) -> None:
        self.arrived = signum
        signal.signal(signum, self._before[signum])
