"""`python -m deit_fast`: versions, hardware, and which backend of which op runs here, or why not."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

import deit_fast
from deit_fast.backend import BACKENDS
from deit_fast.kernels import cpu
from deit_fast.training.device import describe_device, versions


def main() -> None:
    """Prints the page."""
    console = Console()
    console.print("  ".join(f"{name} {version}" for name, version in versions().items()), highlight=False)
    console.print(f"CPU: {describe_device(torch.device('cpu'))}; kernels: {cpu.isa or cpu.why_not()}", highlight=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that PyTorch can use"
    console.print(f"GPU: {gpu}", highlight=False)
    table = Table(title="ops and backends (yes: runs here)")
    for heading in ("op", *BACKENDS):
        table.add_column(heading)
    reasons: dict[str, list[str]] = {}
    for op, row in deit_fast.backends().items():
        cells = []
        for backend in BACKENDS:
            if row[backend] is None:
                cells.append("yes")
            else:
                reasons.setdefault(row[backend], [])
                cells.append(f"[{list(reasons).index(row[backend]) + 1}]")
        table.add_row(op, *cells, style=None)
    console.print(table, markup=False)
    for number, reason in enumerate(reasons, start=1):
        console.print(f"[{number}] {reason}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
