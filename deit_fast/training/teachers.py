"""Where a run's teacher comes from: a given checkpoint, the cache, or its own training first.

A trained teacher is kept under a key of everything that made it (data fingerprint, architecture, recipe, seed), so a second
run with the same data finds it. Its folder is that of any run: `last.pt` lets a killed training go on, `summary.json` and
`metrics.csv` say how good it is. Its seed is the data seed, so that students of several seeds share one teacher.

Recipe: SGD with Nesterov momentum 0.9, cosine from `--teacher-lr` to 0 after half an epoch of warmup, weight decay 5e-4,
crop with padding 4 and flips: the usual ResNet recipe on CIFAR. Pretrained weights start at a tenth of the learning rate.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from deit_fast.data.augmentation import Recipe
from deit_fast.data.cifar import unreachable
from deit_fast.data.datasets import ImageData
from deit_fast.data.loader import EvalLoader, TrainLoader
from deit_fast.errors import CheckpointError, ConfigError, DataError
from deit_fast.models.teacher import create_teacher
from deit_fast.training import checkpoint
from deit_fast.training.config import Config, DistillationConfig, OptimConfig
from deit_fast.training.distillation import Teacher, TeacherInput
from deit_fast.training.engine import Job, Trainer
from deit_fast.training.metrics import Evaluation
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


def resolve_stem(config: DistillationConfig, device: torch.device, image_size: int) -> str:
    """The stem that `--teacher-stem auto` means: CIFAR's for small images on a GPU, else ImageNet's (see DESIGN)."""
    if config.teacher_stem != "auto":
        return config.teacher_stem
    size = config.teacher_input_size or image_size
    small_resnet = size < 64 and config.teacher_model.startswith("resnet") and config.teacher_weights == "none"
    return "cifar" if small_resnet and device.type == "cuda" else "imagenet"


def prepare_teacher(config: Config, data: ImageData, device: torch.device, log: Log) -> tuple[Teacher, TeacherReport]:
    """The frozen teacher of a run, on the device, and where it came from."""
    c = config.distillation
    stem = resolve_stem(c, device, data.train.images.shape[-1])
    if c.teacher_path is not None:
        return _given_teacher(config, data, stem, device, log)
    recipe = {"fingerprint": data.fingerprint, "model": c.teacher_model, "stem": stem, "weights": c.teacher_weights,
              "epochs": c.teacher_epochs, "lr": c.teacher_lr, "batch_size": c.teacher_batch_size,
              "input_size": c.teacher_input_size, "seed": config.data.data_seed, "version": 1}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    folder = _cache_folder(c) / f"{c.teacher_model}-{key}"
    done = folder / "done.pt"
    source = "cache"
    if not done.exists():
        source = "trained"
        log(f"teacher: training {c.teacher_model} ({stem} stem, {c.teacher_epochs} epochs) first; kept in {folder}")
        _train_teacher(config, data, stem, recipe, folder, device, log)
    state = checkpoint.load(done, device)
    network = _network(c.teacher_model, len(data.classes), stem)
    network.load_state_dict(state["model"])
    mean, std = state["metadata"]["mean"], state["metadata"]["std"]
    teacher = Teacher(network, TeacherInput(data.mean, data.std, mean, std, c.teacher_input_size)).to(device)
    split = "val" if data.val is not None else "test"
    report = TeacherReport(source, c.teacher_model, stem, split, state["row"][f"{split}_top1"])
    log(f"teacher: {c.teacher_model} ({stem} stem) from {folder}, {split} top-1 {report.top1:.4f}")
    return teacher, report


def _cache_folder(config: DistillationConfig) -> Path:
    if config.teacher_cache is not None:
        return Path(config.teacher_cache)
    return Path(os.environ.get("DEIT_FAST_CACHE") or Path.home() / ".cache" / "deit_fast") / "teachers"


def _network(name: str, num_classes: int, stem: str, weights: str | None = None) -> nn.Module:
    try:
        return create_teacher(name, num_classes, stem, weights)
    except ValueError as error:
        raise ConfigError(f"--teacher-model: {error}") from error


def _pretrained(name: str, num_classes: int, stem: str) -> nn.Module:
    """The network with torchvision's ImageNet weights, downloaded unless they are in torch's cache."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    remedy = (f"Put that file into {cached.parent}, or use --teacher-weights none (train from scratch) or --teacher-path.")
    if not cached.exists():
        why = unreachable(weights.url, 4.0)
        if why is not None:
            raise DataError(f"--teacher-weights DEFAULT: {weights.url} cannot be downloaded ({why}). {remedy}")
    try:
        return _network(name, num_classes, stem, "DEFAULT")
    except (OSError, RuntimeError) as error:
        raise DataError(f"--teacher-weights DEFAULT: {weights.url} could not be loaded ({error}). {remedy}") from error


def _train_teacher(config: Config, data: ImageData, stem: str, recipe: dict, folder: Path, device: torch.device,
                   log: Log) -> None:
    """Trains the teacher like a student, resuming where an earlier attempt was killed, and writes done.pt."""
    c = config.distillation
    pretrained = c.teacher_weights == "DEFAULT"
    torch.manual_seed(config.data.data_seed)
    network = _pretrained(c.teacher_model, len(data.classes), stem) if pretrained else _network(
        c.teacher_model, len(data.classes), stem)
    mean, std = IMAGENET if pretrained else (data.mean, data.std)
    model = nn.Sequential(TeacherInput(data.mean, data.std, mean, std, c.teacher_input_size), network).to(device)
    if config.run.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optim = OptimConfig(epochs=c.teacher_epochs, opt="sgd", lr=c.teacher_lr * (0.1 if pretrained else 1.0), sched="cosine",
                        warmup_epochs=0.5, warmup_lr=0.0, min_lr=0.0, weight_decay=5e-4)
    run = replace(config.run, output_dir=str(folder), torchcompile=False, eval_metric="top1")
    common = {"mean": data.mean, "std": data.std, "num_classes": len(data.classes), "device": device,
              "channels_last": run.channels_last}
    augmentation = Recipe(crop_pad=4, hflip=0.5 if data.flips else 0.0)
    train = TrainLoader(data.train, augmentation, batch_size=min(c.teacher_batch_size, len(data.train.labels)),
                        data_seed=config.data.data_seed, **common)
    splits = {name: EvalLoader(split, batch_size=config.data.eval_batch_size, **common)
              for name, split in (("val", data.val), ("test", data.test)) if split is not None}
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(c.teacher_model, model, _cross_entropy, train, splits, len(data.classes), folder, recipe,
              {"mean": list(mean), "std": list(std), "stem": stem})
    trainer = Trainer(job, optim, run, device, log)
    if trainer.last.exists():
        trainer.restore(trainer.last)
    trainer.fit()
    best = checkpoint.load(folder / "best.pt", device)
    best["model"] = {name.removeprefix("1."): value for name, value in best["model"].items()}  # 0 is TeacherInput
    checkpoint.save(folder / "done.pt", best)


def _cross_entropy(_images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, targets)


def _given_teacher(config: Config, data: ImageData, stem: str, device: torch.device,
                   log: Log) -> tuple[Teacher, TeacherReport]:
    """The teacher of --teacher-path: a checkpoint of ours, or anybody's weights of `--teacher-model`."""
    c = config.distillation
    path = Path(c.teacher_path)
    weights = checkpoint.load_weights(path)
    weights = {name.removeprefix("1."): value for name, value in weights.items()}
    metadata = _metadata(path)
    stem = metadata.get("stem", stem)
    classes = list(weights.values())[-1].shape[0] if weights else 0
    if classes != len(data.classes):
        raise CheckpointError(f"{path}: the teacher has {classes} classes, the data set {data.name} has "
                              f"{len(data.classes)}. Use a teacher trained on it, or leave --teacher-path out.")
    network = _network(c.teacher_model, classes, stem)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit --teacher-model {c.teacher_model} with --teacher-stem {stem}: "
                              f"{str(error).splitlines()[1].strip()[:200]}") from error
    own = metadata.get("mean", list(data.mean)), metadata.get("std", list(data.std))
    teacher = Teacher(network, TeacherInput(data.mean, data.std, *own, c.teacher_input_size)).to(device)
    split, images = ("val", data.val) if data.val is not None else ("test", data.test)
    top1 = _top1(teacher, EvalLoader(images, data.mean, data.std, len(data.classes), config.data.eval_batch_size,
                                     device=device), len(data.classes), device)
    log(f"teacher: {c.teacher_model} ({stem} stem) from {path}, {split} top-1 {top1:.4f}")
    if top1 < 2 / len(data.classes):
        log("WARNING: the teacher is hardly better than chance on this data set: is it another data set's, or are its "
            "classes in another order?")
    return teacher, TeacherReport(str(path), c.teacher_model, stem, split, top1)


def _metadata(path: Path) -> Mapping:
    """Normalisation and stem, where the file is a checkpoint of ours."""
    if path.suffix == ".safetensors":
        return {}
    try:
        return checkpoint.load(path).get("metadata", {})
    except CheckpointError:  # somebody else's weights, already read once as such
        return {}


def _top1(teacher: Teacher, loader: EvalLoader, num_classes: int, device: torch.device) -> float:
    evaluation = Evaluation(num_classes, device)
    for images, labels in loader:
        evaluation.update(teacher(images), labels)
    return evaluation.compute()["top1"]


def summary(report: TeacherReport) -> dict:
    """The report as plain values."""
    return asdict(report)
