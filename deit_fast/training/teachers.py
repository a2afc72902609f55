"""Where a run's teacher comes from: a given checkpoint, the cache, or its own training first.

A trained teacher is kept under a key of everything that made it (data fingerprint, architecture, recipe, seed), so a
second run with the same data finds it. Its folder is that of any run: `last.pt` lets a killed training go on,
`metrics.csv` says how it went, and `done.pt` is the teacher. Its seed is the data seed, so that students of several
seeds share one teacher.

Recipe: AdamW, cosine from `--teacher-lr` to 0 after a warmup over a fifth of the epochs (at least half of one), weight
decay 0.05, crop with padding 4 and flips. SGD as for long trainings fails in short ones: on CIFAR-10 (JPEG copy), ImageNet
stem, batches of 128, ResNet-50's mean training loss of its second epoch was 2.3 with SGD at 0.02, and at 0.05, every
residual branch starting at zero, 3.8 after 60 steps, where AdamW at 0.001 had 2.1. Pretrained weights start at a tenth.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deit_fast.data.augmentation import Recipe
from deit_fast.data.datasets import ImageData
from deit_fast.data.loader import TrainLoader
from deit_fast.errors import CheckpointError, ConfigError
from deit_fast.models.teacher import create_teacher, head_of, skeleton
from deit_fast.training import checkpoint
from deit_fast.training.build import build_eval_loaders
from deit_fast.training.config import Config, DistillationConfig, OptimConfig
from deit_fast.training.distillation import Teacher, TeacherInput
from deit_fast.training.engine import Trainer
from deit_fast.training.evaluation import measure
from deit_fast.training.job import Job
from deit_fast.training.pretrained import pretrained_weights
from deit_fast.training.progress import Log

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class TeacherReport:
    """What a run's summary says of its teacher: where it came from and how good it is on a split."""

    source: str
    model: str
    stem: str
    split: str
    top1: float
    training_seconds: float | None  # None: not known, for it was not trained here


def resolve_stem(config: DistillationConfig, device: torch.device, image_size: int) -> str:
    """The stem that `--teacher-stem auto` means: CIFAR's for small images on a GPU, else ImageNet's (see DESIGN)."""
    if config.teacher_stem != "auto":
        return config.teacher_stem
    size = config.teacher_input_size or image_size
    small_resnet = size < 64 and config.teacher_model.startswith("resnet") and config.teacher_weights == "none"
    return "cifar" if small_resnet and device.type == "cuda" else "imagenet"


def teacher_identity(config: Config, data: ImageData, device: torch.device) -> str:
    """What makes a run's teacher that teacher: the contents of --teacher-path, or everything its training reads."""
    c = config.distillation
    if c.teacher_path is not None:
        return hashlib.sha256(_read(Path(c.teacher_path))).hexdigest()[:16]
    return _key(_recipe(config, data, resolve_stem(c, device, data.train.images.shape[-1])))


def teacher_cache(config: DistillationConfig) -> Path:
    """The folder of trained teachers and of their stored logits."""
    home = Path(os.environ.get("DEIT_FAST_CACHE") or Path.home() / ".cache/deit_fast")
    return Path(config.teacher_cache or home / "teachers")


def prepare_teacher(config: Config, data: ImageData, device: torch.device, log: Log) -> tuple[Teacher, TeacherReport]:
    """The frozen teacher of a run, on the device, and where it came from."""
    c = config.distillation
    stem = resolve_stem(c, device, data.train.images.shape[-1])
    _check_network(config, data, stem)
    if c.teacher_path is not None:
        source = str(c.teacher_path)
        network, metadata = _given(config, data, stem)
        stem = metadata.get("stem", stem)
    else:
        source, network, metadata = _cached_or_trained(config, data, stem, device, log)
    own = metadata.get("mean", data.mean), metadata.get("std", data.std)
    teacher = Teacher(network, TeacherInput(data.mean, data.std, *own, c.teacher_input_size)).to(device)
    if config.run.channels_last:
        teacher.to(memory_format=torch.channels_last)
    split, loader = next(iter(build_eval_loaders(config, data, device).items()))  # validation, where there is one
    top1 = measure(teacher, loader, len(data.classes), device, config.run).compute()["top1"]
    log(f"teacher: {c.teacher_model} ({stem} stem), {source}, {split} top-1 {top1:.4f}")
    if hardly_better_than_chance(top1, loader.labels):
        log("WARNING: the teacher is hardly better than chance on this data set. Was it trained on another one, or on "
            "classes in another order, or too short (--teacher-epochs)?")
    return teacher, TeacherReport(source, c.teacher_model, stem, split, top1, metadata.get("training_seconds"))


def hardly_better_than_chance(top1: float, labels: Tensor) -> bool:
    """Whether a top-1 on labels (N,) says little more than the largest class's share does.

    With many classes, less than twice that share; with few, where no teacher reaches twice, less than a tenth of the
    way from it to 1.
    """
    chance = (labels.bincount().max() / len(labels)).item()
    return top1 < min(2 * chance, chance + (1 - chance) / 10)


def _cached_or_trained(config: Config, data: ImageData, stem: str, device: torch.device,
                       log: Log) -> tuple[str, nn.Module, Mapping]:
    """(source, network, metadata) of the teacher under this run's key, trained first when it is not there."""
    c = config.distillation
    recipe = _recipe(config, data, stem)
    folder = teacher_cache(c) / f"{c.teacher_model}-{_key(recipe)}"
    source = f"from {folder}"
    if not (folder / "done.pt").exists():
        source = f"trained first, kept in {folder}"
        log(f"teacher: training {c.teacher_model} ({stem} stem, {c.teacher_epochs} epochs) first, in {folder}")
        _train(config, data, stem, recipe, folder, device, log)
    state = checkpoint.load(folder / "done.pt", device)
    network = create_teacher(c.teacher_model, len(data.classes), stem)
    network.load_state_dict(state["model"])
    return source, network, state["metadata"]


def _recipe(config: Config, data: ImageData, stem: str) -> dict:
    """Everything that a trained teacher depends on."""
    c = config.distillation
    return {"fingerprint": data.fingerprint, "model": c.teacher_model, "stem": stem, "weights": c.teacher_weights,
            "epochs": c.teacher_epochs, "lr": c.teacher_lr, "batch_size": c.teacher_batch_size,
            "input_size": c.teacher_input_size, "seed": config.data.data_seed,
            "amp": config.run.amp_dtype if config.run.amp else None, "version": 3}


def _key(recipe: dict) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _check_network(config: Config, data: ImageData, stem: str) -> None:
    """Raises ConfigError unless there is such a network and it takes the batches that it is to get."""
    c = config.distillation
    size, batch_size = c.teacher_input_size or data.train.images.shape[-1], _batch_size(config, data)
    try:
        network = skeleton(c.teacher_model, len(data.classes), stem).train(c.teacher_path is None)
        network(torch.empty(batch_size, 3, size, size, device="meta"))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"--teacher-model {c.teacher_model} with {batch_size} images of {size} pixels: {error} "
                          "Change --teacher-model, --teacher-stem, --teacher-input-size or "
                          "--teacher-batch-size.") from error


def _batch_size(config: Config, data: ImageData) -> int:
    return min(config.distillation.teacher_batch_size, len(data.train))


def _train(config: Config, data: ImageData, stem: str, recipe: dict, folder: Path, device: torch.device,
           log: Log) -> None:
    """Trains the teacher like a student, resuming where an earlier attempt was killed, and writes done.pt."""
    c = config.distillation
    pretrained = pretrained_weights(c.teacher_model) if c.teacher_weights == "DEFAULT" else None
    torch.manual_seed(config.data.data_seed)
    network = create_teacher(c.teacher_model, len(data.classes), stem, pretrained)
    mean, std = (data.mean, data.std) if pretrained is None else IMAGENET
    model = nn.Sequential(TeacherInput(data.mean, data.std, mean, std, c.teacher_input_size), network).to(device)
    if config.run.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optim = OptimConfig(epochs=c.teacher_epochs, opt="adamw", lr=c.teacher_lr * (1.0 if pretrained is None else 0.1),
                        sched="cosine", warmup_epochs=max(0.5, 0.2 * c.teacher_epochs), warmup_lr=0.0, min_lr=0.0,
                        weight_decay=0.05)
    run = replace(config.run, output_dir=str(folder), torchcompile=False, eval_metric="top1")
    train = TrainLoader(data.train, Recipe(crop_pad=4, hflip=0.5 if data.flips else 0.0), data.mean, data.std,
                        len(data.classes), _batch_size(config, data), data_seed=config.data.data_seed, device=device,
                        channels_last=run.channels_last, workers=config.data.workers)
    job = Job(c.teacher_model, model, _cross_entropy, train, build_eval_loaders(config, data, device),
              len(data.classes), folder, recipe, {"mean": list(mean), "std": list(std), "stem": stem}, title="teacher ",
              remedy="Lower --teacher-lr.")
    trainer = Trainer(job, optim, run, device, log)
    if trainer.last.exists():
        trainer.restore(trainer.last, checkpoint.load(trainer.last, device))
        log(f"teacher: resumed from {trainer.last}, {trainer.epoch} epochs and {trainer.step} steps done")
    trainer.fit()
    trainer.signals.check()
    best = checkpoint.load(folder / "best.pt", device)
    metadata = best["metadata"] | {"training_seconds": trainer.wall_seconds}
    checkpoint.save(folder / "done.pt", best | {"model": _without_input(best["model"]), "metadata": metadata})


def _cross_entropy(_images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """() ; logits (B, K), targets (B, K)."""
    return nn.functional.cross_entropy(logits, targets)


def _without_input(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights from those of `_train`'s sequence, in which it is number 1; any other weights as they are."""
    ours = all(name.startswith("1.") for name in weights)
    return {name.removeprefix("1.") if ours else name: tensor for name, tensor in weights.items()}


def _given(config: Config, data: ImageData, stem: str) -> tuple[nn.Module, Mapping]:
    """(network, metadata) of --teacher-path: a checkpoint of ours, or anybody's weights of `--teacher-model`."""
    c, path = config.distillation, Path(config.distillation.teacher_path)
    weights = _without_input(checkpoint.load_weights(path))
    metadata = _metadata(path)
    if metadata.get("model", c.teacher_model) != c.teacher_model:
        raise CheckpointError(f"{path} is a {metadata['model']}, and --teacher-model says {c.teacher_model}. Pass "
                              f"--teacher-model {metadata['model']}.")
    stem = metadata.get("stem", stem)
    network = create_teacher(c.teacher_model, len(data.classes), stem)
    head = head_of(c.teacher_model, stem)
    if head in weights and len(weights[head]) != len(data.classes):
        raise CheckpointError(f"{path}: the teacher has {len(weights[head])} classes, the data set {data.name} has "
                              f"{len(data.classes)}. Use a teacher trained on it, or leave --teacher-path out.")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit --teacher-model {c.teacher_model} with --teacher-stem {stem}: "
                              f"{str(error).splitlines()[1].strip()[:200]}") from error
    return network, metadata


def _metadata(path: Path) -> Mapping:
    """Architecture, normalisation and stem, where the file is a checkpoint of ours."""
    try:
        state = checkpoint.load(path)
    except CheckpointError:  # somebody else's weights, already read once as such
        return {}
    return state["metadata"] | {"model": state["name"]}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"--teacher-path {path} cannot be read: {error.strerror}. Check the path.") from error
