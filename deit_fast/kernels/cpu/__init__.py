"""The CPU backend: picks one extension module, compiled for the best instruction set that this processor runs.

There is one module per instruction set, all from the same sources; only the chosen one is imported beside the generic
one, which is asked what the processor supports. `DEIT_FAST_CPU_ISA=avx2` forces a lower set (tests and comparisons).
torch must be imported before the modules, so that they share its OpenMP run time.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch  # noqa: F401  (first, for its OpenMP library)

INTERFACE = 5  # of csrc/cpu/bindings.cpp, as the launchers know it
ISAS = ("amx", "avx512bf16", "avx512", "avx2", "generic")


def _built(isa: str) -> bool:
    return importlib.util.find_spec(f"deit_fast._cpu_{isa}") is not None


def _load(forced: str | None) -> tuple[ModuleType | None, str | None, str | None]:
    """(module, isa, None), or (None, None, reason)."""
    if not _built("generic"):
        return None, None, "the CPU extension is not built: install a C++ compiler and run `pip install -e .` again"
    generic = importlib.import_module("deit_fast._cpu_generic")
    if getattr(generic, "interface", 0) != INTERFACE:
        return None, None, "the CPU extension was built from other sources: run `pip install -e .` again"
    supported = generic.supported_isas()
    usable = [isa for isa in supported if _built(isa)]
    if forced and forced not in usable:
        return None, None, f"DEIT_FAST_CPU_ISA={forced} cannot be served: usable here: {', '.join(usable)}"
    isa = forced or usable[0]
    return importlib.import_module(f"deit_fast._cpu_{isa}"), isa, None


module, isa, _reason = _load(os.environ.get("DEIT_FAST_CPU_ISA"))


def why_not() -> str | None:
    """Why no CPU kernel can run on this machine, or None."""
    return _reason
