"""One run, from its configuration to its output folder: data, model, teacher, training, report."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchmetrics
import torchvision

import deit_fast
from deit_fast import use_backend
from deit_fast.backend import record
from deit_fast.data.augmentation import Recipe
from deit_fast.data.datasets import ImageData, load_dataset
from deit_fast.data.loader import EvalLoader, TrainLoader
from deit_fast.errors import CheckpointError, ConfigError
from deit_fast.models import VisionTransformer, create_model, load_weights
from deit_fast.training import checkpoint, report
from deit_fast.training.config import AugmentationConfig, Config, to_dict, warnings
from deit_fast.training.distillation import Objective
from deit_fast.training.engine import Job, Trainer
from deit_fast.training.optim import ModelEma
from deit_fast.training.progress import Log
from deit_fast.training.teachers import TeacherReport, prepare_teacher

# Settings that may differ between a run and its resumption: they change where and how it is watched, not what it computes.
FREE_ON_RESUME = {"preset", "data_path", "download", "eval_batch_size", "workers", "skip_bad_images", "teacher_path",
                  "teacher_cache", "output_dir", "device", "resume", "eval", "log_interval", "checkpoint_interval"}


def run(config: Config, log: Log) -> Path:
    """The output folder of a finished run (or, with `eval`, of nothing new: the metrics are only printed)."""
    with _backends(config):
        device = resolve_device(config.run.device)
        _set_determinism(config.run.deterministic)
        output_dir = Path(config.run.output_dir)
        resume = _resume_path(config, output_dir)
        for text in warnings(config):
            log(f"WARNING: {text}")
        data = load_data(config, log)
        model = build_model(config, data, device, log)
        if config.run.eval:
            return _evaluate(config, data, model, resume, device, log)
        return _train(config, data, model, resume, output_dir, device, log)


@contextmanager
def _backends(config: Config) -> Iterator[None]:
    """The automatic order with --fused, plain PyTorch without."""
    with use_backend(None if config.run.fused else "reference"):
        yield


def resolve_device(name: str) -> torch.device:
    """The device that `--device` means; "auto" is the first GPU, or the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here. Use --device cpu or auto.")
    return device


def load_data(config: Config, log: Log, input_size: int | None = None) -> ImageData:
    """The data set of a run, at the model's image size."""
    c = config.data
    size = input_size or c.input_size or _preset_size(config)
    data = load_dataset(c.data_set, c.data_path, size, c.val_split, c.data_seed, c.download, c.skip_bad_images, log)
    for note in data.notes:
        log(f"NOTE: {note}")
    val = "no validation split" if data.val is None else f"{len(data.val.labels):,} val"
    log(f"data: {data.name}, {len(data.classes)} classes, {len(data.train.labels):,} train, {val}, "
        f"{len(data.test.labels):,} test, fingerprint {data.fingerprint[:12]}")
    return data


def _preset_size(config: Config) -> int:
    from deit_fast.models.presets import PRESETS

    preset = PRESETS.get(config.model.model)
    if preset is None:
        _create(config, 10)  # raises ConfigError with the nearest names
    return preset["img_size"]


def _create(config: Config, num_classes: int, img_size: int | None = None) -> VisionTransformer:
    c = config.model
    drop = {} if c.drop is None else {"drop_rate": c.drop}
    try:
        return create_model(c.model, num_classes, tokens=c.tokens, img_size=img_size, attn_drop_rate=c.attn_drop,
                            drop_path_rate=c.drop_path, **drop)
    except ValueError as error:
        raise ConfigError(f"--model {c.model}: {error}") from error


def build_model(config: Config, data: ImageData, device: torch.device, log: Log) -> VisionTransformer:
    """The model of a run, initialised from its seed or from --finetune."""
    c = config.model
    torch.manual_seed(config.run.seed)
    model = _create(config, len(data.classes), data.train.images.shape[-1])
    if model.distilled and config.distillation.distillation_type == "none" and not config.run.eval:
        raise ConfigError(f"--distillation-type none leaves the distillation token of {c.model} untrained, and evaluation "
                          "averages its head in. Use --tokens cls, or --tokens cls+cls, or distillation soft or hard.")
    if c.finetune is not None:
        try:
            notes = load_weights(model, checkpoint.load_weights(c.finetune))
        except ValueError as error:
            raise CheckpointError(f"--finetune {c.finetune}: {error}") from error
        log(f"weights from {c.finetune}{''.join(f'; {note}' for note in notes)}")
    model.set_grad_checkpointing(config.run.grad_checkpointing)
    model.to(device)
    if config.run.channels_last:
        model.to(memory_format=torch.channels_last)
    log(f"model: {c.model}, tokens {model.tokens}, {sum(p.numel() for p in model.parameters()):,} parameters")
    return model


def build_loaders(config: Config, data: ImageData, device: torch.device) -> tuple[TrainLoader, dict[str, EvalLoader]]:
    """The training loader, and the evaluation loaders of "val" (where there is one) and "test"."""
    c, a = config.data, config.augmentation
    common = {"mean": data.mean, "std": data.std, "num_classes": len(data.classes), "device": device,
              "channels_last": config.run.channels_last}
    if c.batch_size > len(data.train.labels):
        raise ConfigError(f"--batch-size {c.batch_size} is larger than the training set of {len(data.train.labels)} images.")
    train = TrainLoader(data.train, build_recipe(a, data), batch_size=c.batch_size, data_seed=c.data_seed,
                        repeats=c.aug_repeats if c.repeated_aug else 1, smoothing=a.smoothing,
                        auto_augment=None if a.aa == "none" else a.aa, workers=c.workers, **common)
    splits = {name: EvalLoader(split, batch_size=c.eval_batch_size, **common)
              for name, split in (("val", data.val), ("test", data.test)) if split is not None}
    return train, splits


def build_recipe(a: AugmentationConfig, data: ImageData) -> Recipe:
    """What the plan draws, from the settings; sets whose mirror images mean something else are never flipped."""
    return Recipe(crop_pad=a.crop_pad, hflip=a.hflip if data.flips else 0.0, brightness=a.color_jitter,
                  contrast=a.color_jitter, saturation=a.color_jitter, reprob=a.reprob, remode=a.remode, recount=a.recount,
                  mixup=a.mixup, cutmix=a.cutmix, cutmix_minmax=a.cutmix_minmax, mixup_prob=a.mixup_prob,
                  mixup_switch_prob=a.mixup_switch_prob, mixup_mode=a.mixup_mode)


@dataclass(frozen=True)
class Serving:
    """Which backend serves each op of a step, and whether the model's dropout is drawn from a seed."""

    ops: dict[str, str]
    seeded: bool


def probe(config: Config, model: VisionTransformer, objective: Objective, train: TrainLoader,
          device: torch.device) -> Serving:
    """Tries one forward pass, without touching the random state.

    A seed makes dropout the same in every backend, at a price in plain PyTorch (30 times F.dropout): it is given only
    where native kernels draw all the masks.
    """
    with torch.random.fork_rng(), torch.no_grad(), torch.autocast(
            device.type, getattr(torch, config.run.amp_dtype), enabled=config.run.amp):
        for seed in (torch.zeros((), dtype=torch.int64, device=device), None):
            with record() as ops:
                images, targets = next(train.epoch(0))
                objective(images, model.train()(images, seed), targets)
            block = model.blocks[0]
            drawing = [*(["linear_residual", "layernorm_mlp"] if block.drop else []), *(["attention"] if block.attn_drop else [])]
            if seed is None or drawing and all(ops[op] != "reference" for op in drawing):
                return Serving(dict(ops), seed is not None)
    raise AssertionError("unreachable: the pass without a seed returns")


def _train(config: Config, data: ImageData, model: VisionTransformer, resume: Path | None, output_dir: Path,
           device: torch.device, log: Log) -> Path:
    started = time.time()
    teacher, teacher_report = None, None
    if model.distilled:
        teacher, teacher_report = prepare_teacher(config, data, device, log)
        if config.run.channels_last:
            teacher.to(memory_format=torch.channels_last)
    objective = Objective(model.tokens, config.distillation, teacher)
    train, splits = build_loaders(config, data, device)
    log(f"loader: {train.description}")
    serving = probe(config, model, objective, train, device)
    log(f"ops: {', '.join(f'{op} {backend}' for op, backend in sorted(serving.ops.items()))}")
    ema = ModelEma(model, config.model.model_ema_decay, config.model.model_ema_warmup) if config.model.model_ema else None
    settings = {key: value for key, value in to_dict(config).items() if key not in FREE_ON_RESUME}
    job = Job(config.model.model, model, objective, train, splits, len(data.classes), output_dir,
              settings | {"fingerprint": data.fingerprint},
              {"model": config.model.model, "tokens": model.tokens, "img_size": model.patch_embed.img_size,
               "classes": list(data.classes), "mean": list(data.mean), "std": list(data.std), "data": data.name},
              config.run.seed << 32 if serving.seeded else None, ema, config.augmentation.mixup_off_epoch)
    trainer = Trainer(job, config.optim, config.run, device, log)
    log(trainer.schedule.describe())
    torch.manual_seed(config.run.seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    if resume is not None:
        trainer.restore(resume)
        log(f"resumed from {resume}: {trainer.epoch} epochs and {trainer.step} steps done")
    report.write_config(output_dir / "config.yaml", to_dict(config) | {"resume": None})
    history = trainer.fit()
    _finish(config, data, model, trainer, serving, teacher_report, history, time.time() - started, log)
    return output_dir


def _finish(config: Config, data: ImageData, model: VisionTransformer, trainer: Trainer, serving: Serving,
            teacher: TeacherReport | None, history: list[dict], seconds: float, log: Log) -> None:
    """Writes the weights of the best epoch, the figures and the summary."""
    output_dir = trainer.job.output_dir
    best = checkpoint.load(output_dir / "best.pt", trainer.device)
    weights = best["model"]
    if best["ema"] is not None:
        trainer.job.ema.load_state_dict(best["ema"])
        weights = trainer.job.ema.module.state_dict()
    checkpoint.save_weights(output_dir / "model.safetensors", weights, best["metadata"] | {"epoch": best["row"]["epoch"]})
    model.load_state_dict(weights)
    details = trainer.measure(model, "test").details()
    report.plot_curves(output_dir / "curves.png", history)
    report.plot_confusion(output_dir / "confusion.png", details["confusion"], data.classes)
    report.write_summary(output_dir / "summary.json", {
        "best": best["best"] | {"metrics": best["row"]}, "final": history[-1], "test_of_best": details,
        "data": {"name": data.name, "fingerprint": data.fingerprint, "classes": list(data.classes), "notes": list(data.notes),
                 "train": len(data.train.labels), "val": 0 if data.val is None else len(data.val.labels),
                 "test": len(data.test.labels)},
        "model": {"name": config.model.model, "tokens": model.tokens,
                  "parameters": sum(p.numel() for p in model.parameters())},
        "teacher": None if teacher is None else asdict(teacher),
        "ops": serving.ops, "seeded_dropout": serving.seeded, "seeds": {"seed": config.run.seed, "data_seed": config.data.data_seed},
        "effective_lr": trainer.schedule.effective_lr, "device": describe_device(trainer.device),
        "versions": versions(), "threads": torch.get_num_threads(),
        "training_seconds": sum(row["seconds"] for row in history), "wall_seconds": seconds})
    row = best["row"]
    prefix = "ema_" if best["ema"] is not None else ""
    log(f"best epoch {row['epoch']} (by {best['best']['metric']}): test top-1 {row[f'{prefix}test_top1']:.4f}, top-5 "
        f"{row[f'{prefix}test_top5']:.4f}, AUC {row[f'{prefix}test_auc']:.4f}, F1 {row[f'{prefix}test_f1']:.4f}, precision "
        f"{row[f'{prefix}test_precision']:.4f}, recall {row[f'{prefix}test_recall']:.4f} on {data.name}")
    log(f"written to {output_dir}: {', '.join(sorted(p.name for p in output_dir.iterdir() if not p.name.startswith('.')))}")


def _evaluate(config: Config, data: ImageData, model: VisionTransformer, resume: Path | None, device: torch.device,
              log: Log) -> Path:
    """Prints the metrics of a checkpoint on every split."""
    if resume is not None:
        state = checkpoint.load(resume, device)
        checkpoint.check_matches(resume, state, name=config.model.model, num_classes=len(data.classes))
        model.load_state_dict(state["model"])
    train, splits = build_loaders(config, data, device)
    job = Job(config.model.model, model, Objective(model.tokens, config.distillation, None), train, splits,
              len(data.classes), Path(config.run.output_dir), {})
    trainer = Trainer(job, config.optim, config.run, device, log)
    for name, value in trainer.evaluate(model).items():
        log(f"{name} {value:.4f}")
    return job.output_dir


def _resume_path(config: Config, output_dir: Path) -> Path | None:
    """The checkpoint to continue from; refuses to overwrite a run that nobody asked to continue."""
    last = output_dir / "last.pt"
    if config.run.resume is None:
        if last.exists() and not config.run.eval:
            raise ConfigError(f"{output_dir} already holds a run. Continue it with --resume, or choose another --output-dir.")
        return None
    if config.run.resume != "auto":
        return Path(config.run.resume)
    if config.run.eval and not last.exists():
        raise CheckpointError(f"{last} does not exist. Name the checkpoint to evaluate: --resume PATH.")
    return last if last.exists() else None


def _set_determinism(deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def describe_device(device: torch.device) -> str:
    """The name of the processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
             ] if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """The versions that a figure depends on."""
    return {"deit_fast": deit_fast.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "torchmetrics": torchmetrics.__version__}
