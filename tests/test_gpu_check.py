"""The check for borrowed GPUs walks through on a CPU, so that what is left to go wrong there is the GPU's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def rehearse(out: Path, *flags: str) -> dict:
    """What `gpu_check.py --rehearse` leaves in its file."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "benchmarks/gpu_check.py", "--rehearse", "--out", str(out), *flags],
                            cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(out.read_text())


def test_sections_are_merged(tmp_path: Path) -> None:
    """A section replaces its own figures and leaves the others'; without a GPU there is no check but a rehearsal."""
    out = tmp_path / "figures.json"
    out.write_text(json.dumps({"ops": {"kept": {"ms": 1.0}}, "rates": {"old": {"ms": 1.0}}}))
    results = rehearse(out, "--only", "rates")
    assert results["ops"] == {"kept": {"ms": 1.0}} and set(results["rates"]) == {"bf16 matrix product", "copy"}
    assert results["environment"]["device"] == "CPU rehearsal"


def gpu_sh(tmp_path: Path, *names: str, **settings: str) -> list[str]:
    """The lines that `scripts/gpu.sh` prints, a program that writes its arguments in the place of Python."""
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" != --out ] || echo "{}" > "$2"; shift; done\n'
                       f'mkdir -p {tmp_path}/work/study && touch {tmp_path}/work/study/report.md; exit 3\n')
    program.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(program), "RESULTS": str(tmp_path / "results"),
                   "WORK": str(tmp_path / "work"), **settings}
    result = subprocess.run(["bash", "scripts/gpu.sh", *names], cwd=ROOT, env=environment, capture_output=True, text=True,
                            check=True)
    return result.stdout.splitlines()


def test_script_leaves_three_files(tmp_path: Path) -> None:
    """Whatever it runs; a failing check stops no other, and when the minutes are over nothing more is started."""
    lines = gpu_sh(tmp_path)
    assert [line.split(":")[0] for line in lines if re.search(": exit 3 after", line)] == [
        "build", "backends", "parity", "step", "inference", "ops", "graphs", "graphs-tests", "losses", "presets", "rates",
        "augment", "study"]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["gpu.log", "gpu_check.json", "study.tar.gz"]
    assert gpu_sh(tmp_path, "step", MINUTES="0") == ["step: left out, 0 minutes are over"]


def test_script_goes_on_from_its_copy(tmp_path: Path) -> None:
    gpu_sh(tmp_path, "step")
    (tmp_path / "work/gpu_check.json").write_text("earlier")
    (tmp_path / "results/gpu_check.json").unlink()
    gpu_sh(tmp_path, "step", MINUTES="0")
    assert (tmp_path / "results/gpu_check.json").read_text() == "earlier"


@pytest.mark.slow
def test_every_section(tmp_path: Path) -> None:
    results = rehearse(tmp_path / "figures.json")
    script = (ROOT / "scripts/gpu.sh").read_text()
    listed = re.search(r"set -- (.*)", script)[1].split()
    assert set(results) - {"environment"} <= set(listed), "scripts/gpu.sh leaves out a section"
    assert results["parity"]["tests/test_parity.py attention"]["exit"] == 0
    assert all(row["equal"] for row in results["graphs"].values())
    agreeing = [row["equal"] for name, row in results["losses"].items() if "graphs against eager" in name]
    assert agreeing and all(agreeing)
    apart = next(row for name, row in results["losses"].items() if name.startswith("triton against reference"))
    assert apart["of all steps"] < 1e-4
    assert {"batch 2: ours, graphs", "batch 2: reference, max-autotune, graph"} <= set(results["step"])
    assert {"triton both", "four ops both"} <= set(results["ops"]["encoder_block nano batch 1"])
    assert all(rows and "cut off" not in rows for rows in results.values())
