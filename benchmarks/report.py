"""Markdown tables of a benchmark run: `pytest benchmarks --benchmark-only --benchmark-json=run.json`, then

    python benchmarks/report.py run.json

A row per benchmark, grouped as they ran against each other: median time, how many times faster than the slowest of its
group, and what it stored beside its time (errors against fp64, images per second, loss and top-1).
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path


def main(path: str) -> None:
    """Prints the tables."""
    run = json.loads(Path(path).read_text())
    cpu = run["machine_info"]["cpu"]
    print(f"{cpu.get('brand_raw', 'unknown CPU')}, {cpu.get('count', '?')} cores; {run['datetime'][:10]}, "
          f"commit {run['commit_info'].get('id', 'unknown')[:10]}\n")
    groups = defaultdict(list)
    for benchmark in run["benchmarks"]:
        groups[benchmark["group"] or benchmark["fullname"]].append(benchmark)
    for group, benchmarks in groups.items():
        print_group(group, benchmarks)


def print_group(group: str, benchmarks: list[dict]) -> None:
    """Prints one group's table."""
    extras = list(dict.fromkeys(key for b in benchmarks for key, value in b["extra_info"].items() if not isinstance(value, dict)))
    slowest = max(b["stats"]["median"] for b in benchmarks)
    print(f"### {group}\n\n| {' | '.join(['', 'median', 'times faster', *extras])} |")
    print("|" + "---|" * (3 + len(extras)))
    for b in sorted(benchmarks, key=lambda b: b["stats"]["median"]):
        median = b["stats"]["median"]
        cells = [b["name"], f"{median * 1e3:.3f} ms", f"{slowest / median:.2f}",
                 *(_short(b["extra_info"].get(key, "")) for key in extras)]
        print(f"| {' | '.join(cells)} |")
    print()


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/report.py run.json")
    main(sys.argv[1])
