"""The study command: its smoke version yields every file, goes on where it was stopped, and refuses bad input."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deit_fast.study import main
from deit_fast.training.config import to_dict, warnings
from deit_fast.training.study.runs import config_of, planned, runs_of, variants_of
from deit_fast.training.study.settings import ABLATIONS, parse

# The digits at 8 x 8 pixels in 10 batches: a run takes seconds.
TINY = ("--smoke", "--input-size", "8", "--batch-size", "128", "--seeds", "0", "--teacher-model", "shufflenet_v2_x0_5",
        "--teacher-epochs", "1", "--teacher-batch-size", "64", "--device", "cpu", "--fused")
FIGURES = ("top1_top5", "auc_f1", "precision_recall", "augmentation", "confusion", "per_class", "reliability",
           "attention", "tokens")
MODELS = ("report-vit", "report-deit", "report-deit-aug")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Weights are equal to the bit only under equal thread counts, and `--jobs` divides the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, _one_thread) -> Path:
    folder = tmp_path_factory.mktemp("study")
    assert main([*TINY, "--jobs", "2", "--output-dir", str(folder)]) == 0
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def test_every_file(smoke):
    """Figures in both formats, both pages; the HTML holds every figure and refers to nothing outside itself."""
    for name in FIGURES:
        assert (smoke / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (smoke / "figures" / f"{name}.svg").read_text()
    markdown, page = (smoke / "report.md").read_text(), (smoke / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(FIGURES) == markdown.count(".png)")
    assert not re.search(r'(src|href)="(?!data:)|@import|<script', page)
    assert {path.name for path in (smoke / "runs").iterdir()} == {*MODELS, "tokens-cls-cls", "tokens-hard"}
    files = {"config.yaml", "metrics.csv", "summary.json", "model.safetensors", "best.pt", "last.pt"}
    for folder in (smoke / "runs").glob("*/seed0"):
        assert files <= {path.name for path in folder.iterdir()}
    assert "The data is digits, not CIFAR-10" in markdown
    assert json.loads((smoke / "study.json").read_text())["data"] == "digits"


def test_the_page_says_what_the_runs_say(smoke):
    """The cells of Table 1 are the test metrics in metrics.csv, at the epoch that validation chose and at the last."""
    markdown = (smoke / "report.md").read_text()
    for name, label in zip(MODELS, ("ViT", "DeiT", "DeiT + augmentation"), strict=True):
        folder = smoke / "runs" / name / "seed0"
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        best = max(rows, key=lambda row: float(row["val_top1"]))  # the first of equals, as the trainer
        for row in (best, rows[-1]):
            names = ("top1", "top5", "f1", "auc", "precision", "recall")
            cells = " | ".join(f"{float(row[f'test_{metric}']):.3f}" for metric in names)
            assert f"| **{label}** | {cells} |" in markdown
        summary = json.loads((folder / "summary.json").read_text())
        assert f"{summary['model']['parameters']:,}" in markdown and summary["peak_memory_bytes"] > 2**26
    assert f"top-1 **{summary['teacher']['top1']:.4f}**" in markdown
    for fact in (summary["data"]["fingerprint"][:16], summary["device"], str(summary["commit"]),
                 summary["versions"]["torch"]):
        assert fact in markdown


def test_the_teacher_is_trained_once_and_read_by_all(smoke):
    assert len(list((smoke / "teachers").glob("shufflenet*"))) == 1
    assert len(list((smoke / "teachers" / "logits").iterdir())) == 1 + 2  # each image once; two augmented epochs
    summaries = [json.loads(p.read_text()) for p in smoke.glob("runs/*/seed0/summary.json")]
    assert all(s["teacher"] is None or s["teacher"]["source"].startswith("from ") for s in summaries)


def test_finished_runs_are_left_alone(smoke, capsys):
    """Asked again, only the report is written; asked for less, what was finished before stays in it."""
    before = snapshot(smoke / "runs") | snapshot(smoke / "teachers")
    less = ("--models", "report-vit", "--ablation", "tokens", "--report-only")
    assert main([*TINY, "--output-dir", str(smoke), *less]) == 0
    assert snapshot(smoke / "runs") | snapshot(smoke / "teachers") == before
    assert "**DeiT + augmentation**" in (smoke / "report.md").read_text()


BAD = [
    (["--models", "report-vitt"], "there is no 'report-vitt'. Nearest: report-vit"),
    (["--models", ","], "--models is empty"),
    (["--ablation", "alhpa"], "there is no 'alhpa'. Nearest: alpha"),
    (["--seeds", "0,x"], "--seeds"),
    (["--jobs", "0"], "--jobs must be >= 1"),
    (["--seed", "1"], "Unknown flag --seed. Nearest: --seeds"),
    (["--epochs", "0"], "--epochs must be >= 1"),
    (["--epochs", "1"], "report-vit/seed0 holds a run with other settings (epochs: 2 there, 1 here)"),
    (["--lr", "0.01"], "holds a run with other settings (lr: 0.001 there, 0.01 here). Nothing was changed"),
    (["--val-split", "0.2"], "val_split: 0.1 there, 0.2 here"),
    (["--seeds", "0,5", "--report-only"], "report-vit, seed 5; report-deit, seed 5"),
    (["--output-dir", __file__], "is a file"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input(smoke, capsys, flags, message):
    """Named in one message, exit code 2, nothing written."""
    before = snapshot(smoke)
    assert main([*TINY, "--output-dir", str(smoke), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and "Traceback" not in error, error
    assert snapshot(smoke) == before


def test_another_data_set_in_the_folder(smoke, tmp_path, capsys):
    """The same settings on other images: known by the checkpoint's fingerprint."""
    folder = tmp_path / "study"
    shutil.copytree(smoke, folder)
    last = folder / "runs" / "report-deit" / "seed0" / "last.pt"
    state = torch.load(last, weights_only=True)
    state["settings"]["fingerprint"] = "0123456789ab" + "0" * 52
    torch.save(state, last)
    before = snapshot(folder)
    assert main([*TINY, "--output-dir", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "report-deit/seed0 holds a run on other data (fingerprint 0123456789ab there" in error
    assert snapshot(folder) == before


def test_damaged_results(smoke, tmp_path, capsys):
    folder = tmp_path / "study"
    shutil.copytree(smoke, folder)
    path = folder / "runs" / "report-vit" / "seed0" / "metrics.csv"
    path.write_text("epoch,lr\n1,nonsense\n")
    assert main([*TINY, "--output-dir", str(folder)]) == 2
    assert "report-vit/seed0 is no finished run" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_and_continued(smoke, tmp_path, capsys, signum):
    """A study killed or stopped in its second run goes on there, and its weights are those of an undisturbed one."""
    flags = [*TINY, "--models", "report-vit,report-deit", "--ablation", "none", "--checkpoint-interval", "2"]
    command = [sys.executable, "-m", "deit_fast.study", *flags, "--output-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    last = tmp_path / "runs" / "report-deit" / "seed0" / "last.pt"
    while not last.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signum)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == (-9 if signum == signal.SIGKILL else 128 + signum), output
    time.sleep(1)  # its child has gone with it: nobody writes any more
    before = last.stat().st_mtime_ns
    vit = snapshot(tmp_path / "runs" / "report-vit")
    time.sleep(1)
    assert last.stat().st_mtime_ns == before
    assert main([*flags, "--output-dir", str(tmp_path)]) == 0
    assert "1 of 2 runs are finished already" in capsys.readouterr().out
    assert snapshot(tmp_path / "runs" / "report-vit") == vit
    for name in ("report-vit", "report-deit"):
        ours, theirs = (load_file(folder / "runs" / name / "seed0/model.safetensors") for folder in (smoke, tmp_path))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)


def test_a_run_that_fails_is_named(tmp_path, capfd):
    """A loss that is not finite ends the study with exit code 2; what is wrong the run itself has said."""
    flags = ("--models", "report-vit", "--ablation", "none", "--lr", "1e30", "--output-dir", str(tmp_path))
    assert main([*TINY, *flags]) == 2
    error = capfd.readouterr().err
    assert "report-vit, seed 0: the run ended with an error, see above" in error


def test_flags_reach_the_runs_that_they_mean():
    study = parse(["--color-jitter", "0.4", "--distillation-type", "hard", "--teacher-lr", "0.2", "--lr", "0.002",
                   "--ablation", "augmentation", "--seeds", "3,1"])
    runs = {(run.variant.name, run.seed): to_dict(run.config) for run in planned(study)}
    vit, deit, aug = (runs[name, 3] for name in MODELS)
    assert [c["color_jitter"] for c in (vit, deit, aug)] == [0.0, 0.0, 0.4]
    assert [c["distillation_type"] for c in (vit, deit, aug)] == ["none", "hard", "hard"]
    assert all(c["lr"] == 0.002 for c in runs.values())
    assert aug["teacher_lr"] == 0.2 and runs["report-vit", 1]["seed"] == 1
    assert runs["only-jitter", 1]["color_jitter"] == 0.4 and runs["no-jitter", 1]["color_jitter"] == 0.0


def test_warnings_are_about_what_somebody_gave():
    assert not [text for run in planned(parse([])) for text in warnings(run.config)]
    (vit,) = planned(parse(["--models", "report-vit", "--seeds", "0", "--amp-dtype", "float16"]))
    assert warnings(vit.config) == ["--amp-dtype has no effect: --amp is off."]


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_points_of_an_ablation_differ_and_reuse_the_models(ablation):
    """No two points are the same run, and every one differs from its base in what it is named after."""
    study = parse(["--data-set", "cifar10"])
    variants = variants_of(ablation, study)
    own = ("output_dir", "preset")
    flats = [{key: value for key, value in to_dict(config_of(v, 0, study)).items() if key not in own} for v in variants]
    for index, flat in enumerate(flats):
        assert flat not in flats[:index], variants[index].name
    assert len({v.name for v in variants}) == len({v.label for v in variants}) == len(variants)
    assert "report-deit" in {v.name for v in variants}
    assert len(runs_of([*variants, *variants], study)) == 3 * len(variants)


def test_each_operation_is_alone_or_left_out():
    study = parse([])
    variants = variants_of("augmentation", study)
    neutral = to_dict(config_of(next(v for v in variants if v.name == "report-deit"), 0, study))
    acting = {"crop_pad", "hflip", "color_jitter", "reprob", "mixup", "cutmix", "repeated_aug"}
    counts = {}
    for variant in variants:
        flat = to_dict(config_of(variant, 0, study))
        counts[variant.name] = sum(flat[key] != neutral[key] for key in acting)
    assert counts.pop("report-deit") == 0 and counts.pop("report-deit-aug") == 6 and counts.pop("all-repeated") == 7
    assert {name: count for name, count in counts.items() if count != (1 if name.startswith("only-") else 5)} == {}
