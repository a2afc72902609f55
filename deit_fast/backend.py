"""Which backend serves an op: the only place that chooses.

The order of say: the call's `backend=` argument, then `use_backend(...)`, then the environment's `DEIT_FAST_BACKEND` (read
once at import), then the op's own order, which a benchmark justifies. What someone asked for runs or raises; only the
op's own order may step down, in the end to `reference`, which is plain PyTorch and runs anywhere.

The override is a plain module global, rebound and never mutated: Dynamo guards on it, so code compiled under one choice is
compiled anew under another (a ContextVar breaks fullgraph compilation on torch 2.13).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from deit_fast.errors import UserError

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Tested without a GPU (interpreter, compilation, shared arithmetic) but never timed on one: no benchmark justifies a place in
# the automatic order yet, so these serve only when someone asks for them by name.
BY_NAME_ONLY = ("triton", "cuda")

OPS: dict[str, Op] = {}
Result = TypeVar("Result")


class BackendError(RuntimeError, UserError):
    """A backend was asked for by name and cannot serve the call."""


class KernelError(BackendError):
    """A kernel that showed only when it was launched that it cannot be compiled or loaded here.

    Whoever raises it has seen to it that the backend's why_not gives the reason from now on.
    """


def _always(*_call: object) -> str | None:
    return None


@dataclass(frozen=True)
class Offer:
    """One native backend of one op: why it cannot run on this machine, and why it cannot serve a given call."""

    machine: Callable[[], str | None]
    call: Callable[..., str | None] = _always


@dataclass(frozen=True)
class Op:
    """An op and its native backends, in the automatic order of preference.

    `offers` maps a native backend to its Offer; `order(*call)` returns the backends to try for a call, best first, and
    defaults to the order of `offers`; `parts` are the ops whose work it does in one call, which a record names with it.
    Creating an Op registers it under its name.
    """

    name: str
    offers: Mapping[str, Offer] = field(default_factory=dict)
    order: Callable[..., tuple[str, ...]] | None = None
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def why_not_here(self, backend: str) -> str | None:
        """Why `backend` cannot run this op on this machine, whatever the call, or None."""
        if backend == "reference":
            return None
        if backend not in self.offers:
            return f"there is no {backend} kernel for this op"
        return self.offers[backend].machine()

    def why_not(self, backend: str, *call: object) -> str | None:
        """Why `backend` cannot serve this call (the op's tensors and settings), or None."""
        reason = self.why_not_here(backend)
        if reason is None and backend != "reference":
            reason = self.offers[backend].call(*call)
        return reason

    def usable(self, *call: object) -> tuple[str, ...]:
        """The backends that can serve this call."""
        return tuple(name for name in BACKENDS if self.why_not(name, *call) is None)

    def asked(self, requested: str | None) -> str | None:
        """The backend that somebody named for a call with this `backend=` argument, or None: the op's order counts."""
        if requested is not None:
            return requested
        return _override.get(self.name) or _override.get("*") or _environment.get(self.name) or _environment.get("*")

    def select(self, requested: str | None, *call: object) -> str:
        """The backend that serves this call; BackendError when the one asked for by name cannot."""
        asked = self.asked(requested)
        if asked is None:
            order = tuple(self.offers) if self.order is None else self.order(*call)
            order = (name for name in order if name not in BY_NAME_ONLY)
            chosen = next((name for name in order if self.why_not(name, *call) is None), "reference")
        else:
            self._require(asked, *call)
            chosen = asked
        if _record is not None:
            if not (self.parts and chosen == "reference"):  # then the parts serve, each as it is asked
                _record.update(dict.fromkeys((self.name, *self.parts), chosen))
        return chosen

    def run(self, requested: str | None, call: tuple, compute: Callable[[str], Result]) -> Result:
        """What `compute(backend)` returns for the backend that serves the call.

        Where the op's own order chose one whose kernel then does not compile, the next serves this very call, and a
        line on stderr says so.
        """
        while True:
            chosen = self.select(requested, *call)
            try:
                return compute(chosen)
            except KernelError as error:
                if self.asked(requested) is not None:
                    raise
                assert self.why_not(chosen, *call) is not None, "the kernel would be tried for ever"
                self.report_step_down(error, self.select(None, *call))

    def report_step_down(self, error: KernelError, backend: str) -> None:
        """Prints that `backend` takes over from one whose kernel failed."""
        print(f"deit_fast: {error} Backend {backend!r} serves {self.name} instead.", file=sys.stderr)

    def _require(self, backend: str, *call: object) -> None:
        if backend not in BACKENDS:
            raise BackendError(f"{self.name}: there is no backend {backend!r}. Known: {', '.join(BACKENDS)}.")
        if backend != "reference" and backend not in self.offers:
            problem = "is not offered"
        else:
            reason = self.why_not(backend, *call)
            if reason is None:
                return
            problem = f"cannot serve this call: {reason}"
        raise BackendError(
            f"{self.name}: backend {backend!r} {problem}. Usable here: {', '.join(self.usable(*call))}."
        )


def _parse_environment(text: str) -> dict[str, str]:
    """{"*": "triton", "attention": "reference"} from "triton,attention=reference"; names are checked when an op is called."""
    parts = [part.strip().rpartition("=") for part in text.split(",") if part.strip()]
    return {op or "*": name for op, _, name in parts}


_environment = _parse_environment(os.environ.get("DEIT_FAST_BACKEND", ""))
_override: dict[str, str] = {}
_record: dict[str, str] | None = None


@contextmanager
def use_backend(backend: str | None = None, **per_op: str) -> Iterator[None]:
    """Chooses the backend of every op called inside: `with use_backend("triton", attention="reference"): ...`.

    `backend` serves all ops (None leaves them as they are), keywords name single ops. Raises BackendError for an unknown
    backend, ValueError for an unknown op; whether a backend can serve a call shows when the op is called.
    """
    global _override
    for name in filter(None, (backend, *per_op.values())):
        if name not in BACKENDS:
            raise BackendError(f"use_backend: there is no backend {name!r}. Known: {', '.join(BACKENDS)}.")
    for op in per_op:
        if op not in OPS:
            raise ValueError(f"use_backend: there is no op {op!r}. Known: {', '.join(sorted(OPS))}.")
    before = _override
    _override = {**({} if backend else before), **({"*": backend} if backend else {}), **per_op}
    try:
        yield
    finally:
        _override = before


@contextmanager
def record() -> Iterator[dict[str, str]]:
    """Yields a dict that collects, for every op called inside, the backend that served it last."""
    global _record
    before, _record = _record, {}
    try:
        yield _record
    finally:
        _record = before


def backends() -> dict[str, dict[str, str | None]]:
    """For every op and backend, None where it runs on this machine, else the reason why not."""
    return {name: {backend: op.why_not_here(backend) for backend in BACKENDS} for name, op in sorted(OPS.items())}
