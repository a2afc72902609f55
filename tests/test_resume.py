"""A killed or stopped run, resumed, ends like an undisturbed one: the same weights bit for bit, the same table."""

from __future__ import annotations

import csv
import os
import random
import re
import signal
from pathlib import Path

import pytest
import torch
from commands import EVALUATION, RENAMING, STEP, TINY, VIT, WRITING, Death, random_death, train
from safetensors.torch import load_file

from deit_fast.train import main
from deit_fast.training import checkpoint, report

# Everything that has a state or draws at random: dropout, drop-path, all augmentation, mixing, EMA, accumulation.
RICH = (*VIT, "--epochs", "2", "--model-ema", "--model-ema-decay", "0.9", "--grad-accum-steps", "2",
        "--checkpoint-interval", "3", "--drop-path", "0.1", "--attn-drop", "0.1", "--crop-pad", "1",
        "--color-jitter", "0.2", "--reprob", "0.2", "--mixup", "0.8", "--cutmix", "1", "--mixup-mode", "elem",
        "--smoothing", "0.1", "--opt", "adamw", "--weight-decay", "0.05", "--sched", "cosine",
        "--warmup-epochs", "0.5", "--clip-grad", "1")


def undisturbed(folder: Path, flags) -> Path:
    result = train(*flags, "--output-dir", folder)
    assert result.code == 0, result.output
    return folder


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The final state (weights, average, optimizer, random state), the exported weights and the table agree exactly."""
    mine, other = (flat(checkpoint.load(folder / "last.pt")) for folder in (ours, theirs))
    assert mine.keys() == other.keys()
    assert not [key for key in mine if "second" not in key and not same(mine[key], other[key])]
    mine, other = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert all(torch.equal(mine[key], other[key]) for key in mine | other)
    assert table(ours) == table(theirs)


def flat(value, where="") -> dict:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{where}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for key, item in enumerate(value) for k, v in flat(item, f"{where}/{key}").items()}
    return {where: value}


def same(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def table(folder: Path) -> list[dict]:
    """The rows of metrics.csv without the columns that a clock fills."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


@pytest.fixture(scope="module")
def rich(tmp_path_factory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("rich"), RICH)


def test_killed_at_chosen_moments(rich, tmp_path):
    """In the first step, between updates, while last.pt is written, before its rename, in evaluation, after best.pt."""
    deaths = [Death(STEP, 1), Death(STEP, 6), Death(WRITING, 30), Death(STEP, 4), Death(EVALUATION, 2),
              Death(EVALUATION, 4), Death(RENAMING, 2), Death(WRITING, 60)]
    for number, death in enumerate(deaths):
        result = train(*RICH, "--output-dir", tmp_path, "--resume", death=death)
        assert result.code == -signal.SIGKILL, f"death {number} did not come:\n{result.output}"
    result = train(*RICH, "--output-dir", tmp_path, "--resume")
    assert result.code == 0 and "resumed from" in result.output, result.output
    assert_same_run(tmp_path, rich)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")], "leftovers of killed writes stay"


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments(rich, tmp_path, seed):
    dice = random.Random(seed)
    for _ in range(3):
        train(*RICH, "--output-dir", tmp_path, "--resume", death=random_death(dice))
    train(*RICH, "--output-dir", tmp_path, "--resume", kill_after=0.5 + 2 * dice.random())
    result = train(*RICH, "--output-dir", tmp_path, "--resume")
    assert result.code == 0, result.output
    assert_same_run(tmp_path, rich)


def test_a_teacher_s_settings_do_not_matter_without_one(tmp_path):
    """A default of theirs may change between two releases, and the run goes on."""
    flags = (*VIT, "--output-dir", tmp_path)
    assert train(*flags, "--epochs", "1", "--teacher-lr", "0.02").code == 0
    assert train(*flags, "--epochs", "2", "--teacher-lr", "0.001", "--resume").code == 0
    result = train(*flags, "--epochs", "3", "--lr", "0.5", "--resume")
    assert result.code == 2 and "other settings (lr: 0.001 there, 0.5 here)" in result.output, result.output


def test_fused_run_killed(tmp_path):
    """Dropout of native ops is drawn from seeds that follow from the position: it needs no state to go on."""
    flags = (*VIT, "--fused", "--epochs", "2", "--grad-accum-steps", "2", "--checkpoint-interval", "4",
             "--attn-drop", "0.1")
    whole = undisturbed(tmp_path / "whole", flags)
    for death in (Death(STEP, 7), Death(STEP, 9), Death(WRITING, 50)):
        assert train(*flags, "--output-dir", tmp_path / "killed", "--resume", death=death).code == -signal.SIGKILL
    assert train(*flags, "--output-dir", tmp_path / "killed", "--resume").code == 0
    assert_same_run(tmp_path / "killed", whole)


def test_killed_with_policies_in_workers(tmp_path):
    """RandAugment draws in worker processes that have prefetched beyond the checkpoint."""
    flags = (*VIT, "--epochs", "1", "--aa", "rand-m9-mstd0.5-inc1", "--workers", "2", "--checkpoint-interval", "4",
             "--hflip", "0.5", "--mixup", "0.8")
    whole = undisturbed(tmp_path / "whole", flags)
    folder = tmp_path / "killed"
    assert train(*flags, "--output-dir", folder, death=Death(STEP, 7)).code == -signal.SIGKILL
    result = train(*flags, "--output-dir", folder, "--resume", death=Death(STEP, 2, signal.SIGTERM))
    assert "0 epochs and 4 of 10 steps done" in result.output
    assert result.code == 128 + signal.SIGTERM and "Traceback" not in result.output, result.output  # workers got it too
    result = train(*flags, "--output-dir", folder, "--resume", "--workers", "1")
    assert result.code == 0 and "0 epochs and 6 of 10 steps done" in result.output, result.output
    assert_same_run(folder, whole)


def test_teacher_and_student_killed(tmp_path):
    """A teacher's training goes on where it was killed, and its student is the one of an undisturbed run."""
    flags = ("--preset", "report-deit", *TINY, "--epochs", "1", "--teacher-model", "shufflenet_v2_x0_5",
             "--teacher-epochs", "2", "--checkpoint-interval", "4")
    whole = undisturbed(tmp_path / "whole", (*flags, "--teacher-cache", tmp_path / "cache"))
    folder, again = tmp_path / "killed", (*flags, "--teacher-cache", tmp_path / "other_cache")
    for call in (15, 12):  # in the teacher's second epoch, then in the student's first
        result = train(*again, "--output-dir", folder, "--resume", death=Death(STEP, call))
        assert result.code == -signal.SIGKILL, result.output
    assert "teacher: resumed from" in result.output and "1 epochs and 4 steps done" in result.output
    result = train(*again, "--output-dir", folder, "--resume")
    assert result.code == 0 and "resumed from" in result.output, result.output
    assert_same_run(folder, whole)
    files = (next((tmp_path / cache).glob("*/done.pt")) for cache in ("cache", "other_cache"))
    mine, other = map(flat, map(checkpoint.load, files))
    assert mine.keys() == other.keys() and all(same(mine[key], other[key]) for key in mine if "second" not in key)


@pytest.mark.parametrize(("signum", "target", "call"), [(signal.SIGINT, STEP, 3), (signal.SIGTERM, EVALUATION, 2)])
def test_stopped_politely(rich, tmp_path, signum, target, call):
    """A signal in the middle of a step or an evaluation: saved, the command to go on printed, exit code 128 + n."""
    result = train(*RICH, "--output-dir", tmp_path, death=Death(target, call, signum))
    assert result.code == 128 + signum and "Traceback" not in result.output, result.output
    command = re.search(r"Continue with: python -m deit_fast.train (.*)", result.output)[1]
    assert command.split() == [*RICH, "--output-dir", str(tmp_path), "--resume"]
    position = checkpoint.load(tmp_path / "last.pt")
    assert (position["epoch"], position["step"]) == ((0, 4) if target == STEP else (0, 10))  # 4: the update is complete
    assert train(*command.split()).code == 0
    assert_same_run(tmp_path, rich)


def test_longer_run(tmp_path):
    """Under a constant schedule a finished run goes on with more epochs, as if it had been longer from the start."""
    flags = (*VIT, "--crop-pad", "1")
    whole = undisturbed(tmp_path / "whole", (*flags, "--epochs", "2"))
    folder = undisturbed(tmp_path / "longer", (*flags, "--epochs", "1"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    result = train(*flags, "--epochs", "1", "--output-dir", folder, "--resume")
    assert result.code == 0 and "finished run of 1 epochs" in result.output
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before, "a finished run was rewritten"
    assert train(*flags, "--epochs", "2", "--output-dir", folder, "--resume").code == 0
    assert_same_run(folder, whole)


def test_killed_while_finishing(tmp_path):
    """The last epoch is saved, the report is not written: resuming writes it."""
    flags = (*VIT, "--epochs", "1", "--output-dir", tmp_path)
    assert train(*flags, death=Death("deit_fast.training.plots:plot_confusion", 1)).code == -signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()
    assert train(*flags, "--resume").code == 0
    assert (tmp_path / "summary.json").exists() and (tmp_path / "confusion.png").exists()


def test_a_signal_behind_the_last_evaluation_costs_no_state(tmp_path, monkeypatch):
    """When the last epoch is saved, nothing may save again: for the report the best epoch's weights are loaded."""
    write = report.write_metrics_csv

    def write_when_told_to_stop(path, rows):
        write(path, rows)
        if len(rows) == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(report, "write_metrics_csv", write_when_told_to_stop)
    flags = (*VIT, "--epochs", "2", "--model-ema", "--output-dir", str(tmp_path / "late"))
    assert main(list(flags)) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert main([*flags[:-1], str(tmp_path / "whole")]) == 0
    ours, theirs = (checkpoint.load(tmp_path / name / "last.pt")["model"] for name in ("late", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert main([*flags, "--resume"]) == 0 and (tmp_path / "late" / "summary.json").exists()


def test_resumed_elsewhere(rich, tmp_path):
    """A checkpoint of another folder brings the best weights so far with it."""
    here, there = tmp_path / "here", tmp_path / "there"
    train(*RICH, "--output-dir", here, death=Death(STEP, 13))
    result = train(*RICH, "--output-dir", there, "--resume", here / "last.pt")
    assert result.code == 0, result.output
    assert_same_run(there, rich)
    result = train(*RICH, "--output-dir", there, "--resume", here / "last.pt")
    assert result.code == 2 and "would overwrite" in result.output
    (here / "best.pt").unlink()
    result = train(*RICH, "--output-dir", tmp_path / "third", "--resume", here / "last.pt")
    assert result.code == 2 and "best.pt" in result.output and "Traceback" not in result.output
