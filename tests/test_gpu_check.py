"""The check for borrowed GPUs walks through on a CPU, so that what is left to go wrong there is the GPU's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cases import VARIANTS
from deit_fast import reference, use_backend

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from gpu_check import AGAIN, SECTIONS, main  # noqa: E402
from gpu import correct  # noqa: E402
from gpu.correct import outcomes, parity  # noqa: E402
from gpu.counts import BLOCK_OPS, Block, Counts, op_counts  # noqa: E402
from gpu.inference import logits_figures  # noqa: E402
from gpu.machine import Machine  # noqa: E402
from gpu.op_speeds import Drawn, op_inputs  # noqa: E402
from gpu.results import Contender, Lost, Refused, Results, ratios, run, table  # noqa: E402
from gpu.steps import BASELINES, plain_step  # noqa: E402
from gpu.training import PRESET  # noqa: E402


def rehearse(out: Path, *flags: str) -> dict:
    """What `gpu_check.py --rehearse` leaves in its file."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "DEIT_FAST_COMMIT": "c0ffee"}
    result = subprocess.run([sys.executable, "benchmarks/gpu_check.py", "--rehearse", "--out", str(out), *flags],
                            cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(out.read_text())


HERE = {"device": "one GPU", "commit": "c0ffee", "sources": "5ca1e", "date": "today"}


class Fake:
    """A machine on which so many contenders may start, and which is lost behind the one of so many."""

    failures = (RuntimeError,)

    def __init__(self, starts: int = 1000, lost: int = -1) -> None:
        self.starts, self.lost = starts, lost

    def left(self) -> float:
        self.starts -= 1
        return float(self.starts >= 0)

    def clocks(self) -> str:
        return "1980 MHz"

    def settle(self) -> None:
        self.lost -= 1
        if self.lost == 0:
            raise Lost("the GPU")


def measure(out: Path, names: str, environment: dict = HERE, section: str = "ops", **kinds) -> list[str]:
    """Which contenders of the row are measured when a section of these runs.

    A capital raises, "x" misses its peer, "r" refuses, "k" takes the process with it.
    kinds: the names of a rank, rank2="cd", or of processes, process="e"; starts, lost: see Fake.
    """
    done: list[str] = []

    def measured(name: str) -> dict:
        done.append(name)
        if name == "x":
            raise ImportError("no x")
        if name == "r":
            raise Refused("not of this size")
        if name == "k":
            raise KeyboardInterrupt
        if name.isupper():
            raise RuntimeError("refused:\n  here")
        return {"ms": float(len(done))}

    jobs = [Contender("row", name, partial(measured, name), 2 * (name in kinds.get("rank2", "")),
                      name in kinds.get("process", "")) for name in names]
    try:
        run(section, jobs, Results(out, environment), Fake(kinds.get("starts", 1000), kinds.get("lost", -1)))
    except (KeyboardInterrupt, Lost) as end:
        done.append(type(end).__name__)
    return done


def test_finished_figures_are_kept(tmp_path: Path) -> None:
    """On the same machine what is missing is measured, then what failed; elsewhere everything, of that section."""
    out = tmp_path / "figures.json"
    assert measure(out, "abCxr") == ["a", "b", "C", "x", "r"]
    rows = json.loads(out.read_text())["ops"]["rows"]["row"]
    assert rows["a"]["ms"] == 1 and rows["C"]["error"] == "RuntimeError: refused: here"
    assert rows["x"] == {"skipped": "no x"}
    assert rows["r"] == {"refused": "not of this size"}
    assert measure(out, "abCxrd", HERE | {"date": "tomorrow"}) == ["d", "C", "x"]
    assert measure(out, "a", HERE | {"device": "another"}, section="step") == ["a"]
    sections = json.loads(out.read_text())
    assert sections["ops"]["environment"]["device"] == "one GPU" and len(sections["ops"]["rows"]["row"]) == 6
    assert sections["step"]["environment"]["device"] == "another"
    assert sections["ops"]["clocks"]["row: a"] == "1980 MHz"
    assert measure(out, "a", HERE | {"device": "another"}) == ["a"]
    assert set(json.loads(out.read_text())["ops"]["rows"]["row"]) == {"a"}, "figures of two machines in one section"


def test_sources_say_what_figures_are_of(tmp_path: Path) -> None:
    """Also where no commit does: a section's second turn on a copy without .git must not lose the first one's."""
    out = tmp_path / "figures.json"
    assert measure(out, "a", HERE | {"commit": "unknown"}) == ["a"]
    assert measure(out, "ab", HERE | {"commit": "unknown"}) == ["b"]
    assert measure(out, "abc") == ["c"]
    assert measure(out, "abc", HERE | {"sources": "others"}) == ["a", "b", "c"]


def test_what_took_the_process_or_the_gpu_comes_last(tmp_path: Path) -> None:
    """Else every later call would end at the same contender."""
    out = tmp_path / "figures.json"
    assert measure(out, "akb") == ["a", "k", "KeyboardInterrupt"]
    assert json.loads(out.read_text())["ops"]["rows"]["row"]["k"] == {"cut off": "while it ran"}
    assert measure(out, "akbDe", lost=2) == ["b", "D", "Lost"]
    assert json.loads(out.read_text())["ops"]["left out"] == ["row: e"]
    assert measure(out, "akbDe") == ["e", "k", "KeyboardInterrupt"]


def test_exit_code_of_a_lost_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 as long as some have not had their turn, so that the script calls again."""
    def lost(_machine: Machine) -> None:
        raise Lost("the GPU")

    monkeypatch.setattr(Machine, "settle", lost)
    out = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--rehearse", "--only", "rates", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == AGAIN
    main()
    assert set(json.loads(out.read_text())["rates"]["rows"]) == {"bf16 matrix product", "copy"}


def test_errors_are_counted(tmp_path: Path) -> None:
    """A failed test or other bits too."""
    rows = {str(figures): {"triton": figures} for figures in (
        {"ms": 1.0}, {"equal": True}, {"passed": 2, "failed": []}, {"skipped": "not built"},
        {"error": "refused"}, {"equal": False}, {"passed": 1, "failed": ["test_eager"]})}
    out = tmp_path / "figures.json"
    out.write_text(json.dumps({"ops": {"rows": rows}}))
    assert Results(out, HERE).errors() == 3


def test_a_run_without_tests_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next call tries again."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 4, "", "no module\nfound"))
    assert correct.tested(Machine(rehearse=True), [], "triton")["error"] == "no module found"


def test_parity_of_every_backend() -> None:
    """Of Triton in every dtype, of the CUDA kernels too."""
    rows = {(job.row, job.who) for job in parity(Machine(rehearse=False))}
    assert {("attention", f"triton, {variant.name}") for variant in VARIANTS} <= rows
    assert {("augment", "cuda, bf16"), ("augment", "triton, fp16"), ("distillation_loss", "triton, autocast")} <= rows


def test_rates_leave_the_peak_alone() -> None:
    """The first contender of a process measures them after its own time, and before it asks for its own peak."""
    class Loud(Machine):
        def milliseconds(self, *calls: Callable[[], object]) -> float:
            self.resident, self.highest = 1, 2
            return 1.0

    machine = Loud(rehearse=True)
    machine.resident, machine.highest = 10, 20
    assert machine.shares(1.0, Counts(1.0, 1.0))["of copy"] > 0
    assert (machine.resident, machine.highest) == (10, 20)


def test_order_and_end(tmp_path: Path) -> None:
    """Processes first, then by rank; what the time is too short for is named, and measured by the next call."""
    out = tmp_path / "figures.json"
    assert measure(out, "abcde", rank2="ac", process="e", starts=3) == ["e", "b", "d"]
    assert json.loads(out.read_text())["ops"]["left out"] == ["row: a", "row: c"]
    assert measure(out, "abcde", rank2="ac", process="e") == ["a", "c"]
    assert json.loads(out.read_text())["ops"]["left out"] == []
    assert measure(tmp_path / "other.json", "be", process="e") == ["e", "b"], "once each"


def test_ratios() -> None:
    """Of ours to the fastest baseline, by what was timed, in the figures and in the table."""
    row = {"triton": {"forward ms": 1.0, "both ms": 4.0, "forward of copy": 0.5},
           "eager": {"forward ms": 5.0, "both ms": 6.0}, "compiled": {"forward ms": 2.0, "both ms": 8.0},
           "SDPA math": {"refused": "no kernel"}, "four ops": {"forward ms": 0.5, "both ms": 3.0}}
    assert ratios(row) == {"triton": {"forward ms": (2.0, "compiled"), "both ms": (1.5, "eager")},
                           "four ops": {"forward ms": (4.0, "compiled"), "both ms": (2.0, "eager")}}
    assert ratios({"ours, graphs": {"ms": 1.0, "peak MB": 3.0}, "timm, max-autotune, graph": {"ms": 3.0}}) == {
        "ours, graphs": {"ms": (3.0, "timm, max-autotune, graph")}}
    assert ratios({"triton": {"error": "refused"}, "eager": {"ms": 1.0}}) == {}
    section = {"environment": HERE, "rows": {"a row": row}, "clocks": {"a row: triton": "1755 MHz"},
               "left out": ["b: c"]}
    text = "\n".join(table({"ops": section}, ("step", "ops")))
    assert "forward 2 (compiled), both 1.5 (eager) |" in text and "1755 MHz" in text and "b: c" in text
    assert "device one GPU, commit c0ffee" in text and "### step" not in text


def test_outcomes_of_a_run_that_was_cut_off() -> None:
    output = """collecting ... collected 4 items
tests/test_parity.py::test_eager[attention-triton-fp32-a-eager] PASSED   [ 25%]
tests/test_parity.py::test_eager[attention-triton-fp32-b-eager] FAILED   [ 50%]
tests/test_parity.py::test_eager[attention-triton-fp32-c-eager] SKIPPED (why) [ 75%]
tests/test_parity.py::test_eager[attention-triton-fp32-d-eager] """
    assert outcomes(output) == {"passed": 1, "skipped tests": 1,
                                "failed": ["test_eager[attention-triton-fp32-b-eager]"]}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("op", [*BLOCK_OPS, "encoder_block"])
def test_counts_are_those_of_the_reference(op: str, training: bool) -> None:
    """Products as PyTorch counts them in plain operators, and the bytes of the tensors that one op takes and gives."""
    size = Block(B=2, N=5, C=12, H=3, F=48)
    inputs, grads = op_inputs(Drawn(0, VARIANTS[0], "cpu"), op, size)
    leaves = [inputs[name].requires_grad_() for name in grads]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = getattr(reference, op)(**inputs)
        if training:
            torch.autograd.grad(out, leaves, torch.ones_like(out))
    counts = op_counts(op, size, training, 4, 4)
    assert counts.flops == counter.get_total_flops()
    touched = sum(4 * x.numel() for x in inputs.values() if isinstance(x, torch.Tensor))
    once = touched + 4 * out.numel()
    residual = 4 * inputs["residual"].numel() if "residual" in inputs else 0  # its gradient is out's
    assert counts.bytes == once + training * (2 * (touched - residual) + 4 * out.numel())


class Traced(Machine):
    """A machine whose compiled functions are traced and run as they are; `graphs` collects what was traced."""

    def __init__(self) -> None:
        super().__init__(rehearse=True)
        self.graphs: list[torch.fx.GraphModule] = []

    def compiled(self, function: Callable) -> Callable:
        """The function by way of Dynamo."""
        return torch.compile(function, backend=self._keep, fullgraph=True)

    def _keep(self, graph: torch.fx.GraphModule, _inputs: list) -> torch.fx.GraphModule:
        self.graphs.append(graph)
        return graph


@pytest.mark.parametrize("who", BASELINES)
def test_compiled_baselines_are_one_graph(who: str) -> None:
    """Of a model with two heads and of DeiT's loss in training, of the model in inference."""
    if who == "timm":
        pytest.importorskip("timm", reason="timm is the peer: pip install -e '.[bench]'")
    machine = Traced()
    with use_backend("reference"):
        step = plain_step(machine, PRESET, 1, BASELINES[who], compiled=True)
        before = [parameter.detach().clone() for parameter in step.model.parameters()]
        step.call()
    assert len(machine.graphs) == 1 and "log_softmax" in machine.graphs[0].code
    assert not any(torch.equal(old, new) for old, new in zip(before, step.model.parameters()))
    logits_figures(machine, 1, BASELINES[who], compiled=True, graphed=True)
    assert len(machine.graphs) == 2


def test_shares() -> None:
    """A millisecond of 10^9 operations is 10^12 in a second, one of 10^6 bytes a gigabyte."""
    assert Counts(4e9, 3e6).shares(2.0, 8.0, 6.0) == {"of matrix rate": 0.25, "of copy": 0.25}


def test_sections_are_merged(tmp_path: Path) -> None:
    """A section leaves the others' figures; without a GPU there is no check but a rehearsal."""
    out = tmp_path / "figures.json"
    kept = {"environment": {"device": "elsewhere"}, "rows": {"kept": {"eager": {"ms": 1.0}}}, "clocks": {},
            "left out": []}
    out.write_text(json.dumps({"ops": kept, "rates": kept}))
    results = rehearse(out, "--only", "rates")
    assert results["ops"] == kept and set(results["rates"]["rows"]) == {"bf16 matrix product", "copy"}
    environment = results["rates"]["environment"]
    assert environment["device"] == "CPU rehearsal" and environment["commit"] == "c0ffee"


def gpu_sh(tmp_path: Path, *names: str, ends: str = "exit 1", **settings: str) -> list[str]:
    """The lines that `scripts/gpu.sh` prints; in the place of Python a program that writes files and then `ends`."""
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
                       'while [ $# -gt 0 ]; do [ "$1" != --out ] || echo "{}" > "$2"; shift; done\n'
                       f'mkdir -p {tmp_path}/scratch/study && touch {tmp_path}/scratch/study/report.md; {ends}\n')
    program.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(program), "RESULTS": str(tmp_path / "results"),
                   "WORK": str(tmp_path / "scratch"), **settings}
    result = subprocess.run(["bash", "scripts/gpu.sh", *names], cwd=ROOT, env=environment, capture_output=True,
                            text=True, check=True)
    return result.stdout.splitlines()


def test_script_leaves_three_files(tmp_path: Path) -> None:
    """Whatever it runs; a failing check stops no other, and when the minutes are over nothing more is started."""
    lines = gpu_sh(tmp_path)
    assert [line.split(":")[0] for line in lines if re.search(": exit 1 after", line)] == [
        "build", "backends", "parity", "step", "ops", "graphs", "graphs-tests", "losses", "presets", "augment",
        "inference", "rates", "study", "step", "ops", "presets", "parity"]
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"gpu.log", "gpu_check.json", "study.tar.gz"}
    assert gpu_sh(tmp_path, "step", MINUTES="0") == ["step: left out, 0 minutes are over"]


@pytest.mark.parametrize(("status", "turns"), [(3, 4), (139, 4), (1, 1), (124, 1)])
def test_script_goes_on_without_what_took_the_gpu(tmp_path: Path, status: int, turns: int) -> None:
    """A few times, within the minutes; in the last quarter of a section's time nothing starts."""
    ends = "kill -SEGV $$" if status == 139 else f"exit {status}"
    lines = gpu_sh(tmp_path, "step", ends=ends, MINUTES="2")
    assert len([line for line in lines if line.startswith(f"step: exit {status} after")]) == turns
    minutes = [float(call.split()[-1]) for call in (tmp_path / "calls").read_text().splitlines()]
    assert len(minutes) == turns and all(1.2 < value <= 1.5 for value in minutes), minutes


def test_script_has_a_time_for_every_section() -> None:
    script = (ROOT / "scripts/gpu.sh").read_text()
    seconds = dict(re.findall(r"\[(\w+)\]=(\d+)", script))
    assert set(seconds) == set(SECTIONS) and all(int(value) < 480 for value in seconds.values())
    assert set(SECTIONS) <= set(re.search(r"set -- (.*)", script)[1].split())


def test_script_goes_on_from_its_copy(tmp_path: Path) -> None:
    gpu_sh(tmp_path, "step")
    (tmp_path / "scratch/gpu_check.json").write_text("earlier")
    (tmp_path / "results/gpu_check.json").unlink()
    gpu_sh(tmp_path, "step", MINUTES="0")
    assert (tmp_path / "results/gpu_check.json").read_text() == "earlier"


@pytest.mark.slow
def test_every_section(tmp_path: Path) -> None:
    results = rehearse(tmp_path / "figures.json", "--minutes", "600")
    assert set(results) == set(SECTIONS)
    assert not any(section["left out"] for section in results.values())
    rows = {name: section["rows"] for name, section in results.items()}
    assert rows["parity"]["attention"]["triton, fp32"]["exit"] == 0
    assert all(row["triton"]["equal"] for row in rows["graphs"].values())
    agreeing = rows["losses"]["fp32: graphs against eager"]
    assert {"triton", "reference"} == set(agreeing) and all(figures["equal"] for figures in agreeing.values())
    assert rows["losses"]["fp32: against reference, same masks"]["triton"]["of all steps"] < 1e-4
    assert {"ours, graphs", "four ops, graphs", "reference, eager", "reference, max-autotune, graph",
            "timm, eager"} <= set(rows["step"]["batch 2"])
    assert {"ours, graph", "reference, max-autotune, graph", "timm, graph"} <= set(rows["inference"]["batch 1"])
    assert {"triton", "four ops", "compiled"} <= set(rows["ops"]["encoder_block nano batch 1"])
    assert all(rows.values())
