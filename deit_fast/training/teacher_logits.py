"""A teacher's logits, computed once and kept on disk, instead of in every step of every run.

A teacher is frozen and augmentation is a pure function of (data seed, epoch, position), so what a teacher says of a
batch is known before the batch is trained on. Without augmentation it says the same in every epoch: one pass over the
images, kept per image. With augmentation there is one table per epoch, in the order of its plan. Every student, seed
and ablation with the same plans reads the same tables: a ResNet-50, which costs more than the report's student, is paid
for once.

A table holds fp16, (N, K): 0.9 MB for an epoch of CIFAR-10. The objective rounds a teacher's logits to fp16 also where
it computes them on the spot, so that both ways teach the same but for the last bit, in which batches of another size
differ.

Tables are files under a key of everything that they depend on: the teacher's weights and input, the images, the recipe,
the seed, the epoch. A file that is damaged (its checksums say so), truncated or of another key is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from deit_fast.data.augmentation import Recipe, epoch_order
from deit_fast.data.datasets import ImageData
from deit_fast.data.loader import EvalLoader, TrainLoader
from deit_fast.errors import CheckpointError
from deit_fast.training import checkpoint
from deit_fast.training.config import Config
from deit_fast.training.device import autocast
from deit_fast.training.distillation import Teacher
from deit_fast.training.progress import Log, duration

# A GPU needs many images to be busy. Two CPU cores ran a ResNet-50 at 551 images/s in batches of 64 (32 pixels, best of
# five) and at 228 in batches of 512, whose activations leave the caches.
IMAGES_PER_PASS = {"cuda": 512, "cpu": 64}
VERSION = 1


def stores_logits(config: Config, recipe: Recipe) -> bool:
    """Whether a run keeps its teacher's logits: --teacher-logits, whose auto means where one pass serves all epochs."""
    choice = config.distillation.teacher_logits
    return choice == "stored" or (choice == "auto" and same_every_epoch(config, recipe))


def same_every_epoch(config: Config, recipe: Recipe) -> bool:
    """Whether an image looks the same in every epoch."""
    return not recipe.draws and config.augmentation.aa == "none"


class TeacherLogits:
    """The teacher's logits of every batch of a TrainLoader, from disk, or computed and kept there first.

    folder: of the tables; it is made. seconds: what computing the tables took, whichever process did it.
    """

    def __init__(
        self, config: Config, data: ImageData, teacher: Teacher, loader: TrainLoader, folder: Path, log: Log
    ) -> None:
        self.config, self.data, self.teacher, self.loader = config, data, teacher, loader
        self.folder, self.log = folder, log
        self.seconds = 0.0
        c = config.run
        self.identity = {
            "version": VERSION,
            "teacher": _digest(teacher),
            "data": data.fingerprint,
            "images": len(data.train),
            "mean": list(data.mean),
            "std": list(data.std),
            "amp": c.amp_dtype if c.amp else None,
        }
        self._per_image: Tensor | None = None  # (M, K) fp16

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """Iterates the logits (B, K) fp32 of the batches that `loader.epoch(epoch, start)` iterates.

        Like there, the recipe of the moment of the call counts.
        """
        table, B = self.table(epoch), self.loader.batch_size  # (N, K)
        return (table[step * B : (step + 1) * B].float() for step in range(start, len(self.loader)))

    def table(self, epoch: int) -> Tensor:
        """(N, K) fp16 on the loader's device: the logits of an epoch's images in the order of its plan."""
        loader = self.loader
        if not same_every_epoch(self.config, loader.recipe):
            return self._stored(self._plan_key(epoch), f"epoch {epoch + 1}", self._of_epoch, epoch)
        if self._per_image is None:
            self._per_image = self._stored(self.identity, "each image once", self._of_images)
        order = epoch_order(len(loader.images), loader.data_seed, epoch, loader.repeats)[: loader.images_per_epoch]
        return self._per_image[order.to(self._per_image.device)]

    def _plan_key(self, epoch: int) -> dict:
        loader = self.loader
        return self.identity | {
            "recipe": asdict(loader.recipe),
            "aa": self.config.augmentation.aa,
            "batch_size": loader.batch_size,
            "repeats": loader.repeats,
            "data_seed": loader.data_seed,
            "epoch": epoch,
            "size": list(loader.size),
        }

    def _stored(self, key: dict, what: str, compute, *arguments) -> Tensor:
        """The table under `key`, computed and written when there is none that is whole."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{name[:24]}.pt"
        if path.exists():
            try:
                state = checkpoint.load(path)
                checkpoint.check_matches(path, state, key=name)
                self.seconds += state["seconds"]
                return state["logits"].to(self.loader.device)
            except CheckpointError as error:
                self.log(f"WARNING: {error} These teacher logits are computed anew.")
        started = time.perf_counter()
        with torch.no_grad(), autocast(self.loader.device, self.config.run):
            logits = torch.cat([self.teacher(images).half() for images in self._joined(compute(*arguments))])  # (N, K)
        logits = logits.cpu()
        seconds = time.perf_counter() - started
        checkpoint.save(path, {"key": name, "logits": logits, "seconds": seconds})
        self.seconds += seconds
        self.log(
            f"teacher logits: {what}, {len(logits):,} images in {duration(seconds)} ({len(logits) / seconds:,.0f} "
            "img/s), "
            f"kept in {path}"
        )
        return logits.to(self.loader.device)

    def _of_epoch(self, epoch: int) -> Iterator[Tensor]:
        return (images for images, _ in self.loader.epoch(epoch))

    def _of_images(self) -> Iterator[Tensor]:
        data, size = self.data, IMAGES_PER_PASS[self.loader.device.type]
        loader = EvalLoader(data.train, data.mean, data.std, len(data.classes), size, device=self.loader.device,
                            channels_last=self.config.run.channels_last,
                            workers=self.config.data.workers)  # fmt: skip
        return (images for images, _ in loader)

    def _joined(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Batches (B, 3, H, W) joined until they hold IMAGES_PER_PASS images: (P, 3, H, W)."""
        waiting, count = [], 0
        for images in batches:
            waiting.append(images)
            count += len(images)
            if count >= IMAGES_PER_PASS[self.loader.device.type]:
                yield torch.cat(waiting)
                waiting, count = [], 0
        if waiting:
            yield torch.cat(waiting)


def _digest(teacher: Teacher) -> str:
    """A fingerprint of a teacher's weights and of what it does to its input."""
    digest = hashlib.sha256(str(teacher.input.input_size).encode())
    for name, tensor in (
        *teacher.network.state_dict().items(),
        ("scale", teacher.input.scale),
        ("shift", teacher.input.shift),
    ):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
