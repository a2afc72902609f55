"""The study's flags: its own, and those of `train` that may be changed for all of its runs at once.

A study compares runs that differ in one thing, so a flag of `train` reaches the runs that it means: augmentation flags
the models that are augmented, distillation flags those with a teacher, everything else all of them. What tells the
runs apart (preset, model, tokens, seed) is not a flag here.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deit_fast.errors import ConfigError
from deit_fast.training.cli import Parser, Section, convert, nearest, setting, settings
from deit_fast.training.config import (
    SETTINGS,
    AugmentationConfig,
    DataConfig,
    DistillationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)

PROG = "python -m deit_fast.study"
FIXED = ("seed", "resume", "eval", "finetune", "model", "tokens", "aug", "teacher_logits", "eval_metric")
ABLATIONS = ("tokens", "augmentation", "alpha", "tau")
MODELS = ("report-vit", "report-deit", "report-deit-aug")

# --smoke: every file of the report within two minutes of two CPU cores. Flags go before.
SMOKE = {
    "data_set": "digits",
    "input_size": 16,
    "epochs": 2,
    "batch_size": 32,
    "teacher_model": "resnet18",
    "teacher_epochs": 2,
    "teacher_batch_size": 32,
    "log_interval": 1000,
}
SMOKE_STUDY = {"seeds": "0,1", "ablation": "tokens"}


@dataclass(frozen=True)
class StudyConfig(Section):
    """Study."""

    models: str = setting(",".join(MODELS), "what is compared, with commas", metavar="NAMES")
    seeds: str = setting(
        "0,1,2",
        "seeds of weights and dropout, with commas; the data seed is --data-seed for all",
        pattern=r"\d{1,9}(,\d{1,9})*",
        metavar="N,N",
    )
    ablation: str | None = setting(None, f"further runs, with commas: {', '.join(ABLATIONS)}", metavar="NAMES")
    jobs: int = setting(1, "runs at the same time", within="[1, inf)")
    smoke: bool = setting(False, "digits, small and short: shows in two minutes every file that a study writes")
    report_only: bool = setting(False, "write the report from finished runs, train nothing")


@dataclass(frozen=True)
class Study:
    """What was asked for. `changes`: settings of `train`, converted, that go before the presets'."""

    output_dir: Path
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    ablations: tuple[str, ...]
    jobs: int = 1
    smoke: bool = False
    report_only: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    command: str = ""


def parse(argv: Sequence[str]) -> Study:
    """The Study of a command line (without the program's name); --help prints the flags and exits with 0."""
    sections = (StudyConfig, DataConfig, AugmentationConfig, ModelConfig, DistillationConfig, OptimConfig, RunConfig)
    parser = Parser(
        sections,
        (),
        PROG,
        "Train the report's ViT, DeiT and DeiT + augmentation under several seeds, and write "
        "report.md and report.html with the comparison into --output-dir (here: runs/study). A study that was "
        "stopped goes on when the command is given again. Flags of `train` hold for all runs; those of augmentation "
        "and distillation for the models that have it.",
        omit=FIXED,
    )
    words = parser.words(argv)
    own = {s.name: s for s in settings(StudyConfig)}
    if words.get("smoke"):
        words = {**SMOKE, **SMOKE_STUDY, **words}
    config = StudyConfig(
        **{name: convert(own[name], word, own[name].flag) for name, word in words.items() if name in own}
    )
    changes = {
        name: convert(SETTINGS[name], word, SETTINGS[name].flag) for name, word in words.items() if name not in own
    }
    output_dir = Path(changes.pop("output_dir", "runs/study"))
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"--output-dir {output_dir} is a file. Name a folder.")
    return Study(
        output_dir,
        _names("--models", config.models, MODELS),
        tuple(dict.fromkeys(map(int, config.seeds.split(",")))),
        _names("--ablation", config.ablation or "", ABLATIONS),
        config.jobs,
        config.smoke,
        config.report_only,
        changes,
        f"{PROG} {shlex.join(argv)}",
    )


def _names(flag: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names in `text`, each once, in the order of `known`; ConfigError for others."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise ConfigError(f"{flag}: there is no {name!r:.80}. {nearest(name, known)} Known: {', '.join(known)}.")
    if flag == "--models" and not names:
        raise ConfigError(f"--models is empty. Known: {', '.join(known)}.")
    return tuple(name for name in known if name in names)
