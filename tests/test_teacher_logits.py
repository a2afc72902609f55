"""Stored teacher logits are those of the batches that the student sees, and are computed once."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import STEP, TINY, Death, train
from oracle import assert_within_budget
from torch import nn

from deit_fast.data.augmentation import Recipe
from deit_fast.data.datasets import load_dataset
from deit_fast.data.loader import TrainLoader
from deit_fast.training import checkpoint
from deit_fast.training.config import from_dict
from deit_fast.training.distillation import Objective, Teacher, TeacherInput
from deit_fast.training.teacher_logits import TeacherLogits, stores_logits

FULL = Recipe(
    crop_pad=1, hflip=0.5, brightness=0.3, saturation=0.3, reprob=0.5, mixup=0.8, cutmix=1.0, mixup_mode="elem"
)
K = 10


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", input_size=8, log=lambda _: None)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.GELU(), nn.Flatten(), nn.Linear(16 * 36, K)).eval()


class Counting(Teacher):
    """A teacher that counts the images it was shown."""

    shown = 0

    def forward(self, images):
        self.shown += len(images)
        return super().forward(images)


def make(data, network, folder, recipe=FULL, data_seed=0, batch_size=64, repeats=1, aa=None):
    config = from_dict({"data_set": "digits", "teacher_logits": "stored", "aa": aa or "none"})
    loader = TrainLoader(
        data.train, recipe, data.mean, data.std, K, batch_size, data_seed=data_seed, repeats=repeats, auto_augment=aa
    )
    teacher = Counting(network, TeacherInput(data.mean, data.std, data.mean, data.std))
    lines: list[str] = []
    return TeacherLogits(config, data, teacher, loader, folder, lines.append), loader, teacher, lines


@pytest.mark.parametrize("case", [
    dict(recipe=FULL), dict(recipe=Recipe()), dict(recipe=Recipe(), repeats=3, batch_size=300),
    dict(recipe=FULL, repeats=3, batch_size=24), dict(recipe=Recipe(hflip=0.5), aa="ra", batch_size=320),
], ids=["augmented", "per image", "repeated", "augmented and repeated", "policy"])  # fmt: skip
def test_stored_equals_online(data, network, tmp_path, case):
    """Of every batch of two epochs, and from the middle of one: the order and the plan are the loader's."""
    logits, loader, teacher, _ = make(data, network, tmp_path, **case)
    exact = copy.deepcopy(network).double()
    for epoch, start in ((0, 0), (1, 2)):
        batches, stored = list(loader.epoch(epoch, start)), logits.table(epoch).split(loader.batch_size)[start:]
        assert len(batches) == len(stored) == len(loader) - start
        for (images, _), ours in zip(batches, stored):
            with torch.no_grad():
                truth = exact(images.double())
            assert_within_budget("logits", ours, truth, teacher(images).half())


def test_objective_is_the_same_either_way(data, network, tmp_path):
    """The online path rounds to fp16 as well, so that the loss agrees to the last bits."""
    logits, loader, teacher, _ = make(data, network, tmp_path)
    objective = Objective("cls+dist", from_dict({}).distillation, teacher)
    (images, targets), stored = next(loader.epoch(0)), logits.table(0)[:64]
    heads = torch.randn(64, K), torch.randn(64, K)
    online, cached = objective(images, heads, targets), objective(images, heads, targets, stored)
    assert torch.allclose(online, cached, rtol=1e-5)
    with torch.no_grad():  # logits of 5.001 and 0: fp16 knows no such number
        network = copy.deepcopy(network)
        network[4].weight.zero_()
        network[4].bias.zero_()
        network[4].bias[0] = 5.001
    teacher.network = network
    rounded = torch.zeros(64, K)
    rounded[:, 0] = 5.0
    assert torch.equal(objective(images, heads, targets), objective(images, heads, targets, rounded))


def test_computed_once(data, network, tmp_path):
    """Without augmentation one pass over the images serves all epochs, with it one per epoch; other runs find both."""
    logits, _, teacher, _ = make(data, network, tmp_path, Recipe())
    for epoch in range(3):
        logits.table(epoch)
    assert teacher.shown == len(data.train) and len(list(tmp_path.iterdir())) == 1
    logits, loader, teacher, _ = make(data, network, tmp_path)
    for epoch in (0, 1, 0):
        logits.table(epoch)
    assert teacher.shown == 2 * loader.images_per_epoch and len(list(tmp_path.iterdir())) == 3
    for recipe in (Recipe(), FULL):
        logits, _, teacher, _ = make(data, network, tmp_path, recipe)
        logits.table(1)
        assert teacher.shown == 0


def test_anything_else_has_another_key(data, network, tmp_path):
    """Another recipe, seed, batch size, number of repeats, teacher or data set never reads these tables."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[4].bias[3] += 1e-3
    pixel = copy.deepcopy(data.train.images)
    pixel[0, 0, 0, 0] ^= 1
    changed = replace(data, train=replace(data.train, images=pixel), fingerprint="f" * 64)
    cases = [
        (data, network, {}),
        (data, network, dict(recipe=replace(FULL, reprob=0.6))),
        (data, network, dict(data_seed=1)),
        (data, network, dict(batch_size=32)),
        (data, network, dict(repeats=3)),
        (data, other, {}),
        (changed, network, {}),
    ]
    for count, (of, by, settings) in enumerate(cases, 1):
        logits, _, teacher, _ = make(of, by, tmp_path, **settings)
        logits.table(0)
        assert teacher.shown > 0 and len(list(tmp_path.iterdir())) == count, settings


@pytest.mark.parametrize("damage", ["flipped", "truncated", "foreign", "another's"])
def test_corrupt_table_is_computed_anew(data, network, tmp_path, damage):
    logits, _, _, _ = make(data, network, tmp_path)
    good = logits.table(0).clone()
    (path,) = tmp_path.iterdir()
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)
    elif damage == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "foreign":
        path.write_bytes(b"no table")
    else:  # a table of another epoch under this name
        checkpoint.save(path, {"key": "0" * 64, "logits": torch.zeros(1280, K).half(), "seconds": 1.0})
    logits, _, teacher, lines = make(data, network, tmp_path)
    assert torch.equal(logits.table(0), good) and teacher.shown > 0
    assert "computed anew" in lines[0] and str(path) in lines[0]
    logits, _, teacher, _ = make(data, network, tmp_path)  # and it was mended on the disk
    assert torch.equal(logits.table(0), good) and teacher.shown == 0


def test_who_stores():
    """auto stores where one pass serves all epochs: nothing is drawn, whatever else the recipe says."""
    for choice, recipe, aa, expected in [
        ("auto", Recipe(), "none", True),
        ("auto", Recipe(hflip=0.5), "none", False),
        ("auto", Recipe(cutmix=1.0), "none", False),
        ("auto", Recipe(), "ra", False),
        ("stored", FULL, "none", True),
        ("online", Recipe(), "none", False),
    ]:
        assert stores_logits(from_dict({"teacher_logits": choice, "aa": aa}), recipe) == expected, (choice, recipe, aa)


DEIT = (
    "--preset",
    "report-deit-aug",
    *TINY,
    "--epochs",
    "2",
    "--teacher-model",
    "shufflenet_v2_x0_5",
    "--teacher-epochs",
    "1",
    "--teacher-logits",
    "stored",
    "--checkpoint-interval",
    "3",
    "--mixup-off-epoch",
    "1",
)


def test_training_from_tables_killed_and_resumed(tmp_path):
    """A killed run that reads tables ends bit for bit like a whole one, and a second seed reads the same tables."""
    flags = (*DEIT, "--teacher-cache", tmp_path / "cache")
    result = train(*flags, "--output-dir", tmp_path / "whole")
    assert result.code == 0 and result.output.count("teacher logits: epoch") == 2, result.output
    killed = tmp_path / "killed"
    result = train(*flags, "--output-dir", killed, death=Death(STEP, 15))
    assert result.code < 0 and "teacher logits" not in result.output, result.output
    result = train(*flags, "--output-dir", killed, "--resume")
    assert result.code == 0 and "resumed from" in result.output, result.output
    ours, theirs = (checkpoint.load(Path(tmp_path, name, "last.pt"))["model"] for name in ("whole", "killed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    result = train(*flags, "--seed", "1", "--output-dir", tmp_path / "other")
    assert result.code == 0 and "teacher logits" not in result.output, result.output
