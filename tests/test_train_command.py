"""`python -m deit_fast.train` as its users see it: the output folder, --eval, the switches, messages for bad input."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, VIT, train
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn import metrics as sk

import deit_fast
from deit_fast.data.datasets import load_dataset
from deit_fast.data.loader import EvalLoader
from deit_fast.train import main
from deit_fast.training import checkpoint

AVERAGED = (*VIT, "--model-ema", "--model-ema-decay", "0.5", "--crop-pad", "1")
NAMES = ("loss", "top1", "top5", "auc", "f1", "precision", "recall")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", input_size=8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two epochs with an average."""
    folder = tmp_path_factory.mktemp("finished")
    result = train(*AVERAGED, "--epochs", "2", "--output-dir", folder)
    assert result.code == 0, result.output
    return folder


def rows(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def exported(folder: Path, digits):
    """(model, logits (N, K), labels) of model.safetensors on the test split."""
    model = deit_fast.create_model("vit_nano_patch4_32", 10, img_size=8)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    loader = EvalLoader(digits.test, digits.mean, digits.std, 10, 100)
    with torch.no_grad():
        logits, labels = zip(*((model.eval()(images), labels) for images, labels in loader))
    return torch.cat(logits), torch.cat(labels)


class TestOutputFolder:
    def test_files_and_table(self, finished):
        assert {path.name for path in finished.iterdir()} == {
            "config.yaml", "metrics.csv", "summary.json", "last.pt", "best.pt", "model.safetensors", "curves.png",
            "confusion.png"}
        header = (finished / "metrics.csv").read_text().splitlines()[0].split(",")
        splits = [f"{prefix}{split}_{name}" for prefix in ("", "ema_") for split in ("val", "test") for name in NAMES]
        assert header == ["epoch", "lr", "train_loss", *splits, "images_per_second", "seconds"]
        table = rows(finished)
        assert [row["epoch"] for row in table] == [1, 2] and all(row["lr"] == 1e-3 for row in table)
        assert all(0 <= row[name] <= 1 for row in table for name in splits if "loss" not in name)
        for name in ("curves.png", "confusion.png"):
            with Image.open(finished / name) as picture:
                assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 20)) > 10

    def test_metrics_agree_with_scikit_learn(self, finished, digits):
        """The best epoch's row, from the logits of the exported weights."""
        logits, labels = exported(finished, digits)
        probabilities, predicted = logits.double().softmax(1).numpy(), logits.argmax(1)
        macro = {"average": "macro", "zero_division": 0}
        expected = {
            "loss": sk.log_loss(labels, probabilities), "top1": sk.accuracy_score(labels, predicted),
            "top5": sk.top_k_accuracy_score(labels, probabilities, k=5),
            "auc": sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
            "f1": sk.f1_score(labels, predicted, **macro), "precision": sk.precision_score(labels, predicted, **macro),
            "recall": sk.recall_score(labels, predicted, **macro)}
        summary = json.loads((finished / "summary.json").read_text())
        row = rows(finished)[summary["best"]["epoch"] - 1]
        for name, value in expected.items():
            assert row[f"ema_test_{name}"] == pytest.approx(value, abs=2e-6), name
        assert summary["test_of_best"]["confusion"] == sk.confusion_matrix(labels, predicted).tolist()
        by_class = sk.f1_score(labels, predicted, average=None)
        np.testing.assert_allclose(summary["test_of_best"]["per_class"]["f1"], by_class, rtol=1e-6)

    def test_summary(self, finished, digits):
        summary, table = json.loads((finished / "summary.json").read_text()), rows(finished)
        best = summary["best"]["epoch"]
        assert summary["best"]["metric"] == "ema_val_top1"
        assert summary["best"]["value"] == max(row["ema_val_top1"] for row in table) == table[best - 1]["ema_val_top1"]
        assert summary["best"]["metrics"] == pytest.approx(table[best - 1])
        assert summary["final"] == pytest.approx(table[-1])
        assert summary["data"]["name"] == "digits" and summary["data"]["fingerprint"] == digits.fingerprint
        assert (summary["data"]["train"], summary["data"]["val"], summary["data"]["test"]) == (1295, 143, 359)
        assert summary["ops"]["attention"] == summary["ops"]["augment"] == "reference"  # no --fused
        assert summary["versions"]["torch"] == torch.__version__ and summary["seeds"] == {"seed": 0, "data_seed": 0}
        assert summary["wall_seconds"] >= summary["training_seconds"] > 0
        with safe_open(finished / "model.safetensors", "pt") as file:
            assert file.metadata()["model"] == "vit_nano_patch4_32" and json.loads(file.metadata()["epoch"]) == best

    def test_config_repeats_the_run(self, finished, tmp_path):
        """-c config.yaml in another folder: the same weights bit for bit, the same config."""
        result = train("-c", finished / "config.yaml", "--output-dir", tmp_path)
        assert result.code == 0, result.output
        ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(finished / "model.safetensors")
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
        texts = [(folder / "config.yaml").read_text() for folder in (tmp_path, finished)]
        assert texts[0].replace(str(tmp_path), str(finished)) == texts[1]

    def test_eval(self, finished, tmp_path):
        """--resume gives last.pt's weights and their average, --finetune those of any weights; nothing is written."""
        before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
        flags = (*VIT, "--eval", "--output-dir", finished)
        row = rows(finished)[-1]
        output = train(*flags, "--resume").output
        for prefix in ("val", "test", "ema_val", "ema_test"):
            line = f"{prefix}: " + ", ".join(f"{name} {row[f'{prefix}_{name}']:.4f}" for name in NAMES)
            assert re.search(f"(?m)^{re.escape(line)}$", output), output
        best = rows(finished)[json.loads((finished / "summary.json").read_text())["best"]["epoch"] - 1]
        weights = finished / "model.safetensors"
        output = train(*VIT, "--eval", "--output-dir", tmp_path / "none", "--finetune", weights).output
        assert f"\ntest: loss {best['ema_test_loss']:.4f}, top1 {best['ema_test_top1']:.4f}" in output
        assert "ema_" not in output and not (tmp_path / "none").exists()
        assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before

    def test_which_ops_serve(self, tmp_path):
        """Printed and in the summary; --fused takes the automatic order. (Without: test_summary.)"""
        result = train(*VIT, "--epochs", "1", "--fused", "--output-dir", tmp_path)
        serving = json.loads((tmp_path / "summary.json").read_text())["ops"]
        assert "ops: " + ", ".join(f"{op} {backend}" for op, backend in sorted(serving.items())) in result.output
        expected = "cpu" if deit_fast.backends()["augment"]["cpu"] is None else "reference"
        assert serving["augment"] == expected and serving["attention"] == expected
        assert len(serving) == (7 if expected == "cpu" else 6)  # with cpu the block is one call of its four ops


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    assert train(*VIT, "--epochs", "1", "--drop", "0", "--output-dir", folder).code == 0
    return folder


@pytest.mark.parametrize(("flags", "difference"), [
    (["--grad-checkpointing"], 1e-6), (["--channels-last"], 1e-4), (["--deterministic"], 0.0),
    (["--amp", "--amp-dtype", "bfloat16"], 0.5), (["--tokens", "cls+cls"], None), (["--val-split", "0"], None),
    pytest.param(["--torchcompile"], 1e-4, marks=pytest.mark.slow)])
def test_switches(plain, tmp_path, flags, difference):
    """One short run each; those that change how, not what, end at the plain run's loss."""
    result = train(*VIT, "--epochs", "1", "--drop", "0", "--output-dir", tmp_path, *flags)
    assert result.code == 0 and "Traceback" not in result.output, result.output
    row = rows(tmp_path / ".")[0] if "--val-split" not in flags else None
    if difference is not None:
        assert row["train_loss"] == pytest.approx(rows(plain)[0]["train_loss"], abs=difference)
        assert flags != ["--amp", "--amp-dtype", "bfloat16"] or row["train_loss"] != rows(plain)[0]["train_loss"]


class TestBadInput:
    """Exit code 2, one message that names fact and remedy, no traceback."""

    @pytest.mark.parametrize(("flags", "words"), [
        (["--preset", "report-vitt"], "Unknown preset 'report-vitt'. Nearest: report-vit"),
        (["--model", "vit_nano_patch4"], "there is no model 'vit_nano_patch4'. Nearest: vit_nano_patch4_32"),
        (["--epoch", "1"], "Unknown flag --epoch. Nearest: --epochs"),
        (["--preset", "report-deit", "--teacher-model", "resnet19"], "there is no teacher 'resnet19'. Nearest"),
        (["-c", "missing.yaml"], "missing.yaml"),
        (["--distillation-type", "soft", "--model", "vit_nano_patch4_32"], "needs a distillation token"),
        (["--distillation-type", "none", "--model", "deit_nano_distilled_patch4_32"], "--tokens cls"),
        (["--batch-size", "2000"], "--batch-size"),
        (["--input-size", "30"], "not divisible by patch_size 4; the nearest that are: 28, 32"),
        (["--grad-accum-steps", "11"], "--grad-accum-steps 11"),
        (["--finetune", "missing.pt"], "missing.pt does not exist"),
        (["--resume", "missing.pt"], "missing.pt does not exist"),
        (["--eval", "--resume"], "last.pt does not exist"),
        (["--data-set", "folder", "--data-path", "missing"], "missing"),
        (["--aa", "rand-m99"], "rand-m99"),
        (["--crop-pad", "9"], "--crop-pad 9 is wider than the images of 8 pixels"),
        (["--mixup", "1e5"], "--mixup must be in [0, 10000], got 100000.0"),
        (["--recount", "100000"], "--recount must be in [1, 16], got 100000"),
        pytest.param(["--device", "cuda:31"], "--device cuda:31: PyTorch sees"),
        (["--output-dir", "/dev/null/x"], "/dev/null/x"),
    ])
    def test_settings(self, tmp_path, monkeypatch, capsys, flags, words):
        monkeypatch.chdir(tmp_path)
        given = [*VIT, "--teacher-cache", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "run"), *flags]
        assert main(given) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith("error: ") and words in complaint and complaint.count("\n") <= 3, complaint
        assert not (tmp_path / "run" / "last.pt").exists() and not (tmp_path / "cache").exists()

    def test_a_process(self, tmp_path):
        """The command itself, as a shell sees it."""
        result = subprocess.run([sys.executable, "-m", "deit_fast.train", "--lr", "-1"], capture_output=True, text=True,
                                cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
        assert result.returncode == 2 and not result.stdout
        assert result.stderr == "error: --lr must be > 0, got -1.0.\n"

    def test_folder_that_holds_a_run(self, finished):
        before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
        result = train(*VIT, "--output-dir", finished)
        assert result.code == 2 and "already holds a run. Continue it with --resume" in result.output
        assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before

    @pytest.mark.parametrize(("flags", "words"), [
        (["--epochs", "3", "--lr", "0.5"], "lr: 0.001 there, 0.5 here"),
        (["--epochs", "3", "--model", "deit_tiny_patch4_32"], "vit_nano_patch4_32"),
        (["--epochs", "3", "--data-seed", "1"], "data_seed: 0 there, 1 here"),
        (["--epochs", "3", "--sched", "cosine"], "sched: 'constant' there, 'cosine' here"),
        (["--epochs", "3", "--tokens", "cls+cls"], "tokens: None there, 'cls+cls' here"),
    ])
    def test_checkpoint_of_another_run(self, finished, capsys, flags, words):
        before = (finished / "last.pt").read_bytes(), (finished / "config.yaml").read_bytes()
        assert main([*AVERAGED, "--output-dir", str(finished), "--resume", *flags]) == 2
        assert words in capsys.readouterr().err
        assert ((finished / "last.pt").read_bytes(), (finished / "config.yaml").read_bytes()) == before

    @pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
    def test_truncated_checkpoint(self, finished, tmp_path, capsys, keep):
        data = (finished / "last.pt").read_bytes()
        (tmp_path / "last.pt").write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
        assert main([*VIT, "--output-dir", str(tmp_path), "--resume"]) == 2
        assert str(tmp_path / "last.pt") in capsys.readouterr().err

    def test_best_and_exported_weights_cannot_be_resumed(self, finished, tmp_path, capsys):
        for name in ("best.pt", "model.safetensors"):
            assert main([*VIT, "--output-dir", str(tmp_path), "--resume", str(finished / name)]) == 2
            assert name in capsys.readouterr().err

    def test_class_counts(self, finished, tmp_path, capsys):
        """A checkpoint for ten classes on a folder of two."""
        for split, count in (("train", 8), ("test", 2)):
            for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
                folder = tmp_path / "data" / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    Image.new("RGB", (8, 8), tuple(c + number for c in colour)).save(folder / f"{number}.png")
        data = ["--data-set", "folder", "--data-path", str(tmp_path / "data"), "--batch-size", "4"]
        data += ["--output-dir", str(tmp_path)]
        assert main([*VIT, *data, "--eval", "--resume", str(finished / "last.pt")]) == 2
        assert "num_classes 10, this run has num_classes 2" in capsys.readouterr().err
        assert main([*VIT, *data, "--eval", "--finetune", str(finished / "model.safetensors")]) == 2
        assert "has 10 classes" in capsys.readouterr().err
        assert main([*VIT, *data, "--resume", str(finished / "last.pt")]) == 2
        assert "num_classes" in capsys.readouterr().err
        assert main([*VIT, *data, "--epochs", "1", "--finetune", str(finished / "model.safetensors")]) == 0
        assert "10 classes in the checkpoint, 2 in the model: every head starts fresh" in capsys.readouterr().out

    def test_full_disk(self, tmp_path):
        """Files cannot grow beyond a limit: the second epoch's checkpoint fails, the first one's survives and loads."""
        assert train(*VIT, "--epochs", "1", "--output-dir", tmp_path).code == 0
        before = (tmp_path / "last.pt").read_bytes()
        result = train(*VIT, "--epochs", "2", "--output-dir", tmp_path, "--resume", file_limit=100_000)
        assert result.code == 2 and "could not write" in result.output, result.output
        assert "Traceback" not in result.output
        assert (tmp_path / "last.pt").read_bytes() == before and checkpoint.load(tmp_path / "last.pt")["epoch"] == 1
        assert not list(tmp_path.glob(".*.tmp"))

    @pytest.mark.parametrize("answers", [False, True])
    def test_no_network_for_pretrained_weights(self, tmp_path, answers):
        """A proxy that refuses, and one that swallows everything: within 10 seconds, with the remedy."""
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            if answers:
                listening.listen()
            proxy = f"http://127.0.0.1:{listening.getsockname()[1]}"
            started = time.monotonic()
            result = train("--preset", "report-deit", *TINY, "--teacher-model", "shufflenet_v2_x0_5",
                           "--teacher-weights", "DEFAULT", "--teacher-cache", tmp_path / "cache",
                           "--output-dir", tmp_path / "run",
                           environment={"https_proxy": proxy, "HTTPS_PROXY": proxy, "no_proxy": "", "NO_PROXY": "",
                                        "TORCH_HOME": str(tmp_path)})
        assert result.code == 2 and "Traceback" not in result.output, result.output
        assert "cannot be downloaded" in result.output and "--teacher-weights none" in result.output
        assert time.monotonic() - started < 20  # 10 of them for a loaded machine

    def test_divergence(self, tmp_path):
        result = train(*VIT, "--epochs", "2", "--lr", "1e30", "--output-dir", tmp_path)
        assert result.code == 2 and "not finite" in result.output and "Traceback" not in result.output, result.output
        assert not (tmp_path / "last.pt").exists() and not (tmp_path / "best.pt").exists()


def test_information_page():
    """`python -m deit_fast`: versions, hardware, every op, and a reason for every blank, at 80 columns."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "80"}
    result = subprocess.run([sys.executable, "-m", "deit_fast"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert f"torch {torch.__version__}" in text and "CPU: " in text and "GPU: " in text
    assert max(map(len, text.splitlines())) <= 80
    for op, row in deit_fast.backends().items():
        cells = re.search(rf"{op} +(.*)", text)[1].replace("\u2502", " ").split()
        for cell, reason in zip(cells, row.values(), strict=True):
            if reason is None:
                assert cell == "yes"
            else:
                shown = text.split(f"\n{cell} ")[1].split("\n[")[0]
                assert " ".join(shown.split()) == " ".join(reason.split())
