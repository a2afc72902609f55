"""The page's facts: data, hardware, commit, seeds, teacher, and the settings beside what the report says of them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from deit_fast import create_model
from deit_fast.data.datasets import ImageData
from deit_fast.training.config import to_dict
from deit_fast.training.device import commit
from deit_fast.training.progress import duration
from deit_fast.training.study.page import Items, Table, Text
from deit_fast.training.study.results import Outcome
from deit_fast.training.study.runs import BY_MODEL, Variant, config_of
from deit_fast.training.study.settings import Study

SILENT = "says nothing"
# (key, what it is, what the report says)
_SETTINGS = (
    ("epochs", "epochs", "20"),
    ("batch_size", "batch size", "64"),
    ("opt", "optimizer", "Adam"),
    ("lr", "learning rate", "0.001"),
    ("sched", "its course", SILENT),
    ("weight_decay", "weight decay", SILENT),
    ("smoothing", "label smoothing", SILENT),
    ("val_split", "validation share of the training set", "none"),
    ("distillation_type", "distillation", "soft"),
    ("distillation_tau", "temperature tau", "3.0"),
    ("distillation_alpha", "weight of the teacher, alpha", SILENT),
    ("distillation_reduction", "reduction of the divergence", "per image (its equation)"),
    ("teacher_model", "teacher", "ResNet-50"),
    ("teacher_stem", "its stem (auto: CIFAR's on a GPU, ImageNet's on a CPU)", SILENT),
    ("teacher_weights", "its start", SILENT),
    ("teacher_epochs", "its epochs", SILENT),
    ("teacher_lr", "its peak learning rate (AdamW, warmup, cosine to 0)", SILENT),
    ("crop_pad", "random crop, padding", "used, strength not given"),
    ("hflip", "flip", "0.5"),
    ("color_jitter", "color jitter, brightness, contrast, saturation", "used, strength not given"),
    ("reprob", "random erasing, probability", "used, strength not given"),
    ("mixup", "MixUp, alpha", "used, strength not given"),
    ("cutmix", "CutMix, alpha", "used, strength not given"),
    ("mixup_prob", "probability of mixing", SILENT),
    ("mixup_mode", "mixing drawn for", SILENT),
    ("repeated_aug", "repeated augmentation", "in its abstract only"),
    ("amp", "mixed precision", SILENT),
    ("fused", "fused ops", SILENT),
)


def facts(study: Study, main: Sequence[Outcome], data: ImageData) -> Items:
    """Data, hardware, commit, seeds."""
    summaries = [result.summary for outcome in main for result in outcome.results]
    val = "no validation split" if data.val is None else f"{len(data.val):,} validation"
    commits = sorted({str(summary["commit"]) for summary in summaries})
    backends = sorted({f"{op} {backend}" for summary in summaries for op, backend in summary["ops"].items()})
    versions = summaries[0]["versions"]
    return Items(
        [
            f"**Data**: {data.name}, {len(data.classes)} classes, {len(data.train):,} training, {val}, "
            f"{len(data.test):,} test images; "
            f"fingerprint `{data.fingerprint[:16]}`." + "".join(f" Note: {note.rstrip('.')}." for note in data.notes),
            f"**Hardware**: {'; '.join(sorted({summary['device'] for summary in summaries}))}; {study.jobs} "
            f"{'run' if study.jobs == 1 else 'runs'} at a time.",
            f"**Seeds**: {', '.join(map(str, study.seeds))}; data seed {summaries[0]['seeds']['data_seed']}.",
            f"**Code**: commit {', '.join(f'`{name}`' for name in commits)} (this page: `{commit()}`); "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + ".",
            f"**Ops**: {', '.join(backends)}.",
            f"**Command**: `{study.command}`",
        ]
    )


def teacher_text(study: Study, main: Sequence[Outcome]) -> list[Text]:
    """The teacher's accuracy and price, where a model has one."""
    taught = [result for outcome in main for result in outcome.results if result.summary["teacher"]]
    if not taught:
        return []
    t = taught[0].summary["teacher"]
    trained = f" Its training took {duration(t['training_seconds'])}." if t["training_seconds"] else ""
    prepared = [json.loads(path.read_text()) for path in sorted((study.output_dir / "teachers").glob("teacher-*.json"))]
    seconds = sum(entry["logits_seconds"] for entry in prepared)
    logits = (
        (
            f" Its logits for all plans of the study took {duration(seconds)}, once; the students read them from "
            "disk, and their "
            "times above leave both out."
        )
        if prepared
        else ""
    )
    return [
        Text(
            f"**Teacher**: {t['model']} with the {t['stem']} stem, {t['split']} top-1 **{t['top1']:.4f}**, one "
            "for all runs."
            f"{trained}{logits}"
        )
    ]


def choices_table(study: Study, models: Sequence[Variant], data: ImageData) -> Table:
    """Every setting that matters, of each model as it was trained on the data, beside the report's."""
    flat = {variant.name: to_dict(config_of(variant, study.seeds[0], study)) for variant in models}
    rows = []
    for variant in models:
        settings = flat[variant.name]
        drop = {} if settings["drop"] is None else {"drop_rate": settings["drop"]}
        model = create_model(settings["model"], tokens=settings["tokens"], **drop)
        block = model.blocks[0]
        settings["shape"] = (
            f"{data.train.images.shape[-1]} px, patch {model.patch_embed.patch_size}, C {model.embed_dim}, "
            f"depth {len(model.blocks)}, {block.attn.num_heads} heads, MLP {block.mlp.fc1.out_features}, "
            f"dropout {block.drop:g}"
        )
        if not data.flips:
            settings["hflip"] = f"none ({data.name})"
    for key, what, report in (
        ("shape", "model", "32 px, patch 4, C 64, depth 7, 8 heads, MLP 256, dropout 0.1"),
        *_SETTINGS,
    ):
        rows.append([what, *(_cell(flat[v.name], key) for v in models), report])
    return Table(["Setting", *(BY_MODEL[v.name].label for v in models), "The report"], rows, words=True)


def _cell(flat: dict, key: str) -> str:
    """A setting as text; a dash where the model has no teacher that it could be about."""
    teaching = key.startswith(("teacher_", "distillation_"))
    if teaching and flat["distillation_type"] == "none":
        return "-"
    if key in ("mixup_prob", "mixup_mode") and not (flat["mixup"] or flat["cutmix"]):
        return "-"
    value = flat[key]
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
