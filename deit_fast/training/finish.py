"""What a finished run leaves: the weights of its best epoch, their tables and pictures, and the summary."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from deit_fast.data.datasets import ImageData
from deit_fast.training import checkpoint, plots, report
from deit_fast.training.build import Serving
from deit_fast.training.config import Config
from deit_fast.training.device import commit, describe_device, peak_memory, versions
from deit_fast.training.engine import Trainer
from deit_fast.training.metrics import METRICS
from deit_fast.training.progress import Log
from deit_fast.training.teachers import TeacherReport

_WORDS = {"top1": "top-1", "top5": "top-5", "auc": "AUC", "f1": "F1"}


def is_finished(output_dir: Path, epochs: int) -> bool:
    """Whether the folder's summary is that of a run of so many epochs."""
    try:
        return json.loads((output_dir / "summary.json").read_text())["final"]["epoch"] == epochs
    except (OSError, ValueError, LookupError, TypeError):  # none, or none of ours
        return False


def finish(config: Config, data: ImageData, trainer: Trainer, serving: Serving, teacher: TeacherReport | None,
           log: Log) -> None:
    """Writes model.safetensors, curves.png, confusion.png and, last of all, summary.json."""
    trainer.signals.check()  # behind the last evaluation; from here on the model holds the best epoch's weights
    output_dir, model, history = trainer.job.output_dir, trainer.job.model, trainer.history
    best = checkpoint.load(output_dir / "best.pt", trainer.device)
    row, prefix = best["row"], "" if best["ema"] is None else "ema_"
    weights = best["model"] if best["ema"] is None else best["ema"]["module"]
    checkpoint.save_weights(output_dir / "model.safetensors", weights, best["metadata"] | {"epoch": row["epoch"]})
    model.load_state_dict(weights)
    details = trainer.measure(model, "test").details()
    plots.plot_curves(output_dir / "curves.png", history)
    plots.plot_confusion(output_dir / "confusion.png", details["confusion"], data.classes)
    report.write_summary(output_dir / "summary.json", {
        "best": best["best"] | {"metrics": row}, "final": history[-1], "test_of_best": details,
        "data": {"name": data.name, "fingerprint": data.fingerprint, "classes": list(data.classes),
                 "notes": list(data.notes), "train": len(data.train), "val": 0 if data.val is None else len(data.val),
                 "test": len(data.test)},
        "model": {"name": config.model.model, "tokens": model.tokens,
                  "parameters": sum(p.numel() for p in model.parameters())},
        "teacher": None if teacher is None else asdict(teacher),
        "ops": serving.ops, "seeded_dropout": serving.seeded,
        "seeds": {"seed": config.run.seed, "data_seed": config.data.data_seed},
        "effective_lr": trainer.schedule.effective_lr, "device": describe_device(trainer.device),
        "versions": versions(), "commit": commit(), "peak_memory_bytes": peak_memory(trainer.device),
        "threads": torch.get_num_threads(),
        "training_seconds": sum(row["seconds"] for row in history), "wall_seconds": trainer.wall_seconds})
    figures = ", ".join(f"{_WORDS.get(name, name)} {row[f'{prefix}test_{name}']:.4f}" for name in METRICS)
    which, why = ("last", "no validation split") if data.val is None else ("best", f"by {best['best']['metric']}")
    log(f"{which} epoch {row['epoch']} ({why}), on the test split of {data.name}: {figures}")
    names = sorted(path.name for path in output_dir.iterdir() if not path.name.startswith("."))
    log(f"written to {output_dir}: {', '.join(names)}")
