"""One run, from its configuration to its output folder: data, model, teacher, training, report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from deit_fast import use_backend
from deit_fast.data.datasets import ImageData
from deit_fast.data.workers import worker_errors
from deit_fast.errors import CheckpointError, ConfigError, TrainingError
from deit_fast.models import VisionTransformer
from deit_fast.training import build, checkpoint, report
from deit_fast.training.config import Config, to_dict, warnings
from deit_fast.training.device import resolve_device, set_determinism
from deit_fast.training.distillation import Objective
from deit_fast.training.engine import Trainer, check_resumable
from deit_fast.training.evaluation import evaluate
from deit_fast.training.files import remove_leftovers
from deit_fast.training.finish import finish, is_finished
from deit_fast.training.job import Job
from deit_fast.training.optim import ModelEma
from deit_fast.training.progress import Log
from deit_fast.training.teacher_logits import TeacherLogits, stores_logits
from deit_fast.training.teachers import prepare_teacher, teacher_cache, teacher_identity

# Settings that may differ between a run and its resumption: they change where it is computed and how it is watched, not
# what. (finetune: the checkpoint brings the weights. Data and teacher are compared by their contents.)
FREE_ON_RESUME = {"preset", "data_path", "data_name", "download", "eval_batch_size", "workers", "data_loading",
                  "skip_bad_images", "finetune", "teacher_path", "teacher_cache", "output_dir", "device", "cuda_graphs",
                  "resume", "eval", "log_interval", "checkpoint_interval"}


def run(config: Config, log: Log) -> Path:
    """The output folder of a finished run (or, with `eval`, of nothing new: the metrics are only printed)."""
    with _backends(config), _memory(), worker_errors():
        device = resolve_device(config.run.device)
        set_determinism(config.run.deterministic)
        resume = _resume_path(config)
        for text in warnings(config):
            log(f"WARNING: {text}")
        data = build.load_data(config, build.check_model(config), device, log)
        model = build.build_model(config, data, device, log)
        if config.run.eval:
            evaluate(config, data, model, resume, device, log)
        else:
            _train(config, data, model, resume, device, log)
        return Path(config.run.output_dir)


@contextmanager
def _backends(config: Config) -> Iterator[None]:
    """The automatic order with --fused, plain PyTorch without."""
    with use_backend(None if config.run.fused else "reference"):
        yield


@contextmanager
def _memory() -> Iterator[None]:
    """Says what helps when the GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(f"{str(error).partition('. ')[0]}. Lower --batch-size (and raise --grad-accum-steps), or "
                            "use --amp or --grad-checkpointing.") from error


def _train(config: Config, data: ImageData, model: VisionTransformer, resume: Path | None, device: torch.device,
           log: Log) -> None:
    output_dir = Path(config.run.output_dir)
    train, splits = build.build_loaders(config, data, device)
    settings = _settings(config, data, device, model.distilled)
    state = None
    if resume is not None:  # refused before a teacher is trained for hours
        state = checkpoint.load(resume, device)
        check_resumable(resume, state, config.model.model, len(data.classes), settings)
        if state["epoch"] >= config.optim.epochs and is_finished(output_dir, state["epoch"]):
            log(f"{output_dir} holds a finished run of {state['epoch']} epochs: nothing to do. Its results are in "
                "summary.json; train longer with more --epochs, or start anew with another --output-dir.")
            return
    remove_leftovers(output_dir)
    report.write_config(output_dir / "config.yaml", to_dict(config) | {"resume": None})
    teacher, teacher_report = None, None
    if model.distilled:
        teacher, teacher_report = prepare_teacher(config, data, device, log)
    objective = Objective(model.tokens, config.distillation, teacher)
    logits = None
    if teacher is not None and stores_logits(config, train.recipe):
        logits = TeacherLogits(config, data, teacher, train, teacher_cache(config.distillation) / "logits", log).table
    log(f"loader: {train.description}")
    serving = build.probe(config, model, objective, train, device)
    log(f"ops: {', '.join(f'{op} {backend}' for op, backend in sorted(serving.ops.items()))}")
    c = config.model
    job = Job(c.model, model, objective, train, splits, len(data.classes), output_dir, settings,
              metadata={"model": c.model, "tokens": model.tokens, "img_size": model.patch_embed.img_size,
                        "classes": list(data.classes), "mean": list(data.mean), "std": list(data.std),
                        "data": data.name},
              seed=build.dropout_seed(config.run.seed, device) if serving.seeded else None,
              ema=ModelEma(model, c.model_ema_decay, c.model_ema_warmup) if c.model_ema else None,
              mixing_off=config.augmentation.mixup_off_epoch, teacher_logits=logits)
    trainer = Trainer(job, config.optim, config.run, device, log)
    log(trainer.schedule.describe())
    torch.manual_seed(config.run.seed)
    if state is not None:
        trainer.restore(resume, state)
        log(f"resumed from {resume}: {trainer.epoch} epochs and {trainer.step} of {trainer.steps_per_epoch} steps done")
    trainer.fit()
    finish(config, data, trainer, serving, teacher_report, log)


def _settings(config: Config, data: ImageData, device: torch.device, distilled: bool) -> dict:
    """What makes the run what it is: a checkpoint with other values is refused.

    The number of epochs shapes a cosine; under the other schedules a run may be made longer.
    """
    free = FREE_ON_RESUME if config.optim.sched == "cosine" else FREE_ON_RESUME | {"epochs"}
    settings = {key: value for key, value in to_dict(config).items() if key not in free}
    settings["fingerprint"] = data.fingerprint
    settings["teacher"] = teacher_identity(config, data, device) if distilled else None
    return settings


def _resume_path(config: Config) -> Path | None:
    """The checkpoint to continue from; refuses to overwrite a run that nobody asked to continue."""
    last = Path(config.run.output_dir) / "last.pt"
    if config.run.resume is None:
        if last.exists() and not config.run.eval:
            raise ConfigError(f"{last.parent} already holds a run. Continue it with --resume, or choose another "
                              "--output-dir.")
        return None
    if config.run.resume != "auto":
        path = Path(config.run.resume)
        if last.exists() and not config.run.eval and path.resolve() != last.resolve():
            raise ConfigError(f"--resume {path} would overwrite the run in {last.parent}. Choose another --output-dir.")
        return path
    if config.run.eval and not last.exists():
        raise CheckpointError(f"{last} does not exist. Name the checkpoint to evaluate: --resume PATH.")
    return last if last.exists() else None
