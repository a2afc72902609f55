"""Which runs a study consists of, and whether the folders that are already there belong to it.

A variant is a preset and what is changed in it; a run is a variant and a seed, in `runs/<variant>/seed<n>` of the
study's folder. Ablations reuse the runs of the three models wherever a point of a grid is one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deit_fast.errors import ConfigError
from deit_fast.training import checkpoint
from deit_fast.training.cli import read_yaml, settings
from deit_fast.training.config import (
    PRESETS,
    AugmentationConfig,
    Config,
    DistillationConfig,
    from_dict,
    to_dict,
    unread_settings,
)
from deit_fast.training.finish import is_finished
from deit_fast.training.run import FREE_ON_RESUME
from deit_fast.training.study.settings import Study

AUGMENTING = {s.name for s in settings(AugmentationConfig)} | {"repeated_aug", "aug_repeats"}
DISTILLING = {s.name for s in settings(DistillationConfig)}
ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # at 1 the class head would stay untrained
TAUS = (1.0, 2.0, 3.0, 5.0, 10.0)

# Of each operation: its name in tables, the settings that make it, and the change that leaves it out.
OPERATIONS = {
    "crop": ("random crop", ("crop_pad", "padding_mode", "train_crop_mode", "scale", "ratio", "train_interpolation"),
             {"crop_pad": 0, "train_crop_mode": "none"}),
    "flip": ("flip", ("hflip", "alternating_flip", "vflip"), {"hflip": 0.0, "vflip": 0.0}),
    "jitter": ("color jitter", ("color_jitter", "hue", "grayscale_prob"),
               {"color_jitter": 0.0, "hue": 0.0, "grayscale_prob": 0.0}),
    "erasing": ("random erasing", ("reprob", "remode", "recount"), {"reprob": 0.0}),
    "mixup": ("MixUp", ("mixup", "mixup_prob", "mixup_mode"), {"mixup": 0.0}),
    "cutmix": (
        "CutMix",
        ("cutmix", "cutmix_minmax", "mixup_prob", "mixup_mode"),
        {"cutmix": 0.0, "cutmix_minmax": None},
    ),
}


@dataclass(frozen=True)
class Variant:
    """A preset with changes. name: of its folder; label: in tables and figures."""

    name: str
    label: str
    preset: str
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run of the study."""

    variant: Variant
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return Path(self.config.run.output_dir)

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        """Whether its folder holds the results of all its epochs."""
        return is_finished(self.folder, self.config.optim.epochs)


VIT = Variant("report-vit", "ViT", "report-vit")
DEIT = Variant("report-deit", "DeiT", "report-deit")
DEIT_AUG = Variant("report-deit-aug", "DeiT + augmentation", "report-deit-aug")
BY_MODEL = {variant.name: variant for variant in (VIT, DEIT, DEIT_AUG)}


def variants_of(ablation: str, study: Study) -> list[Variant]:
    """The points of an ablation, in the order of its table."""
    if ablation == "tokens":
        return [
            VIT,
            Variant("tokens-cls-cls", "CLS + CLS", "report-vit", {"tokens": "cls+cls"}),
            DEIT,
            Variant("tokens-hard", "CLS + distillation, hard", "report-deit", {"distillation_type": "hard"}),
        ]
    if ablation == "augmentation":
        return _augmentation(study)
    key, grid = {"alpha": ("distillation_alpha", ALPHAS), "tau": ("distillation_tau", TAUS)}[ablation]
    usual = getattr(config_of(DEIT, 0, study).distillation, key)
    return [
        DEIT
        if value == usual
        else Variant(f"{ablation}-{value:g}", f"{ablation} {value:g}", "report-deit", {key: value})
        for value in sorted({*grid, usual})
    ]


def _augmentation(study: Study) -> list[Variant]:
    """None; each operation alone; all; all but each; all with repeated augmentation."""
    full = to_dict(config_of(DEIT_AUG, 0, study))
    alone = [
        Variant(f"only-{name}", f"only {label}", "report-deit", {key: full[key] for key in keys})
        for name, (label, keys, _) in OPERATIONS.items()
    ]
    without = [
        Variant(f"no-{name}", f"all but {label}", "report-deit-aug", off)
        for name, (label, _, off) in OPERATIONS.items()
    ]
    repeated = [
        Variant(
            "only-repeated", "only repeated augmentation (of unchanged images)", "report-deit", {"repeated_aug": True}
        ),
        Variant("all-repeated", "all and repeated augmentation", "report-deit-aug", {"repeated_aug": True}),
    ]
    return [DEIT, *alone, repeated[0], DEIT_AUG, *without, repeated[1]]


def config_of(variant: Variant, seed: int, study: Study) -> Config:
    """The configuration of a run: preset < the study's flags where they mean this variant < the variant's changes."""
    preset = PRESETS[variant.preset]
    changes = {
        key: value
        for key, value in study.changes.items()
        if (key not in AUGMENTING or variant.preset == "report-deit-aug")
        and (key not in DISTILLING or preset.get("distillation_type") != "none")
    }
    folder = study.output_dir / "runs" / variant.name / f"seed{seed}"
    cache = study.changes.get("teacher_cache") or str(study.output_dir / "teachers")
    fixed = {
        "preset": variant.preset,
        "seed": seed,
        "output_dir": str(folder),
        "teacher_cache": cache,
        "teacher_logits": "stored",
        "resume": "auto",
    }
    config = from_dict({**changes, **variant.changes, **fixed})
    return replace(config, explicit=config.explicit & study.changes.keys())  # warnings are for what somebody gave


def runs_of(variants: list[Variant], study: Study) -> list[Run]:
    """A run for every seed and variant, seeds outermost, so that the first seed's comparison is complete first."""
    distinct = {variant.name: variant for variant in variants}.values()
    return [Run(variant, seed, config_of(variant, seed, study)) for seed in study.seeds for variant in distinct]


def planned(study: Study) -> list[Run]:
    """All runs that were asked for."""
    return runs_of(
        [
            *(BY_MODEL[name] for name in study.models),
            *(variant for ablation in study.ablations for variant in variants_of(ablation, study)),
        ],
        study,
    )


def check_folder(run: Run, fingerprint: str) -> None:
    """Raises ConfigError when the run's folder holds another run: of other settings, or of other data."""
    path = run.folder / "config.yaml"
    if not path.exists():
        if (run.folder / "last.pt").exists():
            raise ConfigError(f"{run.folder} holds a checkpoint without its config.yaml. Choose another --output-dir.")
        return
    theirs, ours = to_dict(from_dict(read_yaml(str(path)))), to_dict(run.config)
    unread = unread_settings(ours, theirs)
    different = [
        key for key in ours if key not in {*FREE_ON_RESUME, *unread, "epochs"} and theirs[key] != ours[key]
    ]
    longer = run.config.optim.sched != "cosine" and ours["epochs"] > theirs["epochs"]  # such a run may simply go on
    if ours["epochs"] != theirs["epochs"] and not longer:
        different.append("epochs")
    if different:
        listed = "; ".join(f"{key}: {theirs[key]!r} there, {ours[key]!r} here" for key in different)
        raise ConfigError(
            f"{run.folder} holds a run with other settings ({listed}). Nothing was changed. Give its settings, or "
            "choose another --output-dir."
        )
    found = _fingerprint(run.folder)
    if found not in (None, fingerprint):
        raise ConfigError(
            f"{run.folder} holds a run on other data (fingerprint {found[:12]} there, {fingerprint[:12]} here). "
            "Nothing was changed. Give its data, or choose another --output-dir."
        )


def _fingerprint(folder: Path) -> str | None:
    """Of the data that the run in `folder` was trained on, as far as it has got."""
    last = folder / "last.pt"
    return checkpoint.load(last)["settings"]["fingerprint"] if last.exists() else None
