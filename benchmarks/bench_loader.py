"""Whether training waits for its images: what each loader delivers alone, beside what a training step takes.

The step is the report's DeiT at batch 64 on the fast backends (forward, distillation loss, backward, AdamW), the recipe
the full one of bench_augment.py. A loader's epoch counts everything: its plan, starting its workers, decoding. On a CPU
loader and step share the cores, so a loader R times as fast as the step takes about 1 / R of the step's time from it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from bench_augment import FULL, compare
from compare import BATCH
from cpu.models import DROP, MODEL, Seeded, training
from deit_fast import create_model
from deit_fast.data.datasets import load_dataset
from deit_fast.data.loader import TrainLoader
from deit_fast.data.split import Split
from deit_fast.kernels import cpu

IMAGES = 8192
WORKERS = 2


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> dict[str, Split]:
    """IMAGES real digits of 32 pixels (scikit-learn's, again and again): on the device, in memory, as JPEG files."""
    root = tmp_path_factory.mktemp("jpegs")
    digits = load_dataset("digits", val_split=0.0, log=lambda text: None)
    for name, split in (("train", digits.train), ("test", digits.test)):
        for number, (image, label) in enumerate(zip(split.images, split.labels.tolist())):
            path = Path(root, "set", name, str(label), f"{number}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=90)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEIT_FAST_CACHE", str(root / "cache"))
        data = load_dataset("folder", root / "set", 32, 0.0, log=lambda text: None, data_loading="stream")
    files = data.train.subset(torch.arange(IMAGES) % len(data.train))
    pixels = files.images[:]
    return {"files": files, "resident": Split(pixels, files.labels), "memory": Split(pixels, files.labels, stream=True)}


@pytest.mark.parametrize("kind, policy", [("resident", None), ("memory", None), ("files", None),
                                          ("resident", "rand-m9-mstd0.5-inc1")])
def test_loader_beside_a_training_step(benchmark, capsys, splits, kind: str, policy: str | None) -> None:
    if cpu.why_not():
        pytest.skip(cpu.why_not())
    loader = TrainLoader(splits[kind], FULL, (0.5,) * 3, (0.25,) * 3, 10, BATCH, smoothing=0.1, workers=WORKERS,
                         auto_augment=policy)
    step = training(BATCH)(Seeded(create_model(MODEL, drop_rate=DROP)), True, False)

    def epoch() -> None:
        for _ in loader.epoch(0):
            pass

    benchmark.group = "loader alone beside a training step"
    compare(benchmark, capsys, f"a training step against {loader.description.split(' below ')[0]}", step, BATCH, epoch,
            loader.images_per_epoch, 5)
