"""The teacher of a study's runs, and its logits for every epoch of their plans, made before the first student."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from deit_fast import use_backend
from deit_fast.training import build
from deit_fast.training.cli import settings
from deit_fast.training.config import AugmentationConfig, Config, DataConfig, to_dict
from deit_fast.training.device import resolve_device, set_determinism
from deit_fast.training.progress import Log
from deit_fast.training.teacher_logits import TeacherLogits
from deit_fast.training.teachers import prepare_teacher, teacher_cache

_PLAN = {s.name for part in (DataConfig, AugmentationConfig) for s in settings(part)} | {
    "epochs",
    "amp",
    "amp_dtype",
    "device",
    "fused",
    "channels_last",
}


def plan_of(config: Config) -> str:
    """A name of everything that a run's teacher and its plans depend on: runs with the same one share the logits."""
    flat = {key: value for key, value in to_dict(config).items() if key in _PLAN or key.startswith("teacher_")}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:12]


def prepare(config: Config, log: Log) -> dict:
    """The teacher's report, after making sure that it is trained and that its logits of every epoch are on disk."""
    with use_backend(None if config.run.fused else "reference"):
        device = resolve_device(config.run.device)
        set_determinism(config.run.deterministic)
        data = build.load_data(config, build.check_model(config), device, log)
        train, _ = build.build_loaders(config, data, device)
        teacher, report = prepare_teacher(config, data, device, log)
        logits = TeacherLogits(config, data, teacher, train, teacher_cache(config.distillation) / "logits", log)
        recipe = train.recipe
        for epoch in range(config.optim.epochs):
            train.recipe = recipe.at(epoch, config.augmentation.mixup_off_epoch)
            logits.table(epoch)
    return {"teacher": asdict(report), "plan": plan_of(config), "logits_seconds": logits.seconds}
