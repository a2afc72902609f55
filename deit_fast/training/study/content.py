"""What the report says: figures first, then tables and text, all from the runs' own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deit_fast import use_backend
from deit_fast.data.datasets import ImageData
from deit_fast.errors import ConfigError
from deit_fast.training.build import build_recipe
from deit_fast.training.progress import Log
from deit_fast.training.study import figures, pictures, tables
from deit_fast.training.study.choices import choices_table, facts, teacher_text
from deit_fast.training.study.inspection import Inspection, forward_flops, inspect, load
from deit_fast.training.study.page import Block, Heading, Items, Picture, Text, write_page
from deit_fast.training.study.results import Outcome, Spread, outcome
from deit_fast.training.study.runs import (
    BY_MODEL,
    DEIT,
    DEIT_AUG,
    Variant,
    check_folder,
    config_of,
    runs_of,
    variants_of,
)
from deit_fast.training.study.settings import ABLATIONS, Study

CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}
FIGURES = "figures"


def write_report(study: Study, data: ImageData, log: Log) -> Path:
    """The path of report.html, written with report.md, study.json and the figures.

    Models and ablations that an earlier command finished in the same folder are in it too.
    """
    models = [v for v in BY_MODEL.values() if v.name in study.models or _all_finished([v], study, data)]
    ablations = {
        name: variants_of(name, study)
        for name in ABLATIONS
        if name in study.ablations or _all_finished(variants_of(name, study), study, data)
    }
    everything = {v.name: v for v in (*models, *(v for variants in ablations.values() for v in variants))}
    every_run = runs_of(list(everything.values()), study)
    outcomes = {name: outcome(variant, every_run, study) for name, variant in everything.items()}
    main = [outcomes[variant.name] for variant in models]
    tokens = [outcomes[v.name] for v in ablations.get("tokens", models)]
    log(f"study: looking into {len({o.variant.name for o in (*main, *tokens)})} models")
    inspected = {
        o.variant.name: [inspect(result, data) for result in o.results]
        for o in {o.variant.name: o for o in (*main, *tokens)}.values()
    }
    loaded = [(o.variant.label, load(o.results[0], data)) for o in main]
    folder = study.output_dir / FIGURES
    _draw(folder, study, main, data, inspected, loaded)
    flops = {o.variant.name: forward_flops(model) for o, (_, model) in zip(main, loaded)}
    blocks = [
        *_opening(study, main, data),
        *_metrics(main, data),
        *_cost(study, main, flops),
        *_figures(main, data),
        *_tokens(folder, "tokens" in ablations, tokens, inspected),
        *(
            block
            for name, variants in ablations.items()
            if name != "tokens"
            for block in _ablation(name, [outcomes[v.name] for v in variants])
        ),
        Heading(2, "Settings, and what the report leaves open"),
        choices_table(study, models, data),
    ]
    tables.write_json(study, outcomes, inspected, flops, data)
    page = write_page(study.output_dir, FIGURES, "ViT, DeiT and DeiT with augmentation", blocks)
    log(f"study: report.md, report.html, study.json and {FIGURES}/ written to {study.output_dir}")
    return page


def _all_finished(variants: list[Variant], study: Study, data: ImageData) -> bool:
    """Whether every seed of every variant is finished in the folder, on this data with these settings."""
    runs = runs_of(variants, study)
    if not all(run.finished for run in runs):
        return False
    try:
        for run in runs:
            check_folder(run, data.fingerprint)
    except ConfigError:  # another study's, which this one was not asked about
        return False
    return True


def _draw(
    folder: Path,
    study: Study,
    main: Sequence[Outcome],
    data: ImageData,
    inspected: dict[str, list[Inspection]],
    loaded: list,
) -> None:
    figures.plot_courses(folder, "top1_top5", ("top1", "top5"), main)
    figures.plot_courses(folder, "auc_f1", ("auc", "f1"), main)
    figures.plot_courses(folder, "precision_recall", ("precision", "recall"), main)
    figures.plot_confusions(folder, "confusion", main, data.classes)
    figures.plot_classes(folder, "per_class", main, data.classes)
    figures.plot_reliability(
        folder, "reliability", {o.variant.label: inspected[o.variant.name][0].calibration for o in main}
    )
    config = config_of(DEIT_AUG, study.seeds[0], study)
    pictures.plot_augmentation(
        folder, "augmentation", data, build_recipe(config.augmentation, data), config.data.data_seed
    )
    with use_backend("reference"):
        pictures.plot_attention(folder, "attention", data, loaded)


def _opening(study: Study, main: Sequence[Outcome], data: ImageData) -> list[Block]:
    return [
        Text(
            "A plain Vision Transformer, the same one distilled from a teacher through a second token (DeiT), "
            "and that with data "
            'augmentation: trained alike, measured alike, and compared with the study that this one repeats '
            '("the report").'
        ),
        *(
            [Text("**This is the smoke version: it shows what a study writes. Its figures mean nothing.**")]
            if study.smoke
            else []
        ),
        *(
            []
            if _comparable(data)
            else [
                Text(
                    f"**The data is {data.name}, not CIFAR-10: the report's figures stand beside these for "
                    "the layout only and are no yardstick.**"
                )
            ]
        ),
        facts(study, main, data),
    ]


def _comparable(data: ImageData) -> bool:
    return set(data.classes) == CIFAR10


def _metrics(main: Sequence[Outcome], data: ImageData) -> list[Block]:
    n = len(main[0].results)
    spread = f"mean ± sample standard deviation over {n} seeds" if n > 1 else "one seed, so without a deviation"
    total = len(data.train) + (0 if data.val is None else len(data.val))
    split = (
        "No validation split was cut off, so the epoch shown is the last one, as in the report."
        if data.val is None
        else f"Training saw {len(data.train):,} of {total:,} training images: {len(data.val):,} chose the best "
             "epoch. The report "
        "trained on all 50,000 of CIFAR-10's and shows the last epoch; `--val-split 0` does so too."
    )
    supports = set(main[0].results[0].summary["test_of_best"]["per_class"]["support"])
    balanced = "as the test set here is" if len(supports) == 1 else "as CIFAR-10's is (the test set here is not quite)"
    best = "the last epoch (no validation split)" if data.val is None else "the best epoch by validation top-1"
    return [
        Heading(2, "Table 1"),
        Text(f"On the test set of {data.name}, at {best}; {spread}."),
        tables.metrics_table(main, "best"),
        *(
            []
            if data.val is None
            else [
                Text("The same at the last epoch, which is what the report shows:"),
                tables.metrics_table(main, "last"),
            ]
        ),
        tables.verdict(main, _comparable(data), data.val is not None),
        Items(
            [
                split,
                f"On balanced test data, {balanced}, macro recall is the same number as top-1. The report's DeiT row "
                "(top-1 .639, "
                "recall .676) therefore contradicts itself, and its top-1 and top-5 repeat the ViT row. The bar for "
                "DeiT is .676 here.",
                "The seeds differ in weights and dropout. The data seed (order, augmentation, validation split, "
                "teacher) is the same "
                "for all, so the deviations leave it out.",
            ]
        ),
        Heading(3, "The epochs"),
        tables.epochs_table(main),
    ]


def _cost(study: Study, main: Sequence[Outcome], flops: dict[str, int]) -> list[Block]:
    return [
        Heading(2, "What it costs"),
        tables.cost_table(main, flops),
        Text(
            "Training is the time of the steps; with evaluation, both splits after every epoch are in it, and "
            "what starting "
            "took. Peak memory is the process's on a CPU and that of the tensors on a GPU. FLOPs are those of a "
            "forward pass, a "
            "multiplication and its addition counted as two. Images/s is the mean over epochs of training."
        ),
        *teacher_text(study, main),
    ]


def _figures(main: Sequence[Outcome], data: ImageData) -> list[Block]:
    bands = "" if len(main[0].results) == 1 else " Bands: one standard deviation over seeds."
    return [
        Heading(2, "Course of training"),
        Picture(
            "top1_top5", f"Top-1 and top-5 accuracy on the test set after every epoch (the report's Figure 5).{bands}"
        ),
        Picture("auc_f1", f"AUC and F1 after every epoch (Figure 6).{bands}"),
        Picture("precision_recall", f"Precision and recall after every epoch (Figure 7).{bands}"),
        Heading(2, "Augmentation"),
        Picture(
            "augmentation",
            "Training images as the augmentation kernel makes them (Figure 4): each operation alone and certain "
            "to happen, at the strength of DeiT + augmentation, and the recipe itself."
            + ("" if data.flips else f" Mirrored images of {data.name} mean something else, so there is no flip."),
        ),
        Heading(2, "Classes"),
        Picture(
            "confusion", "Confusion matrices on the test set, all seeds added up. Colour: share of the true class."
        ),
        Picture("per_class", "F1 of every class at the best epoch."),
        Heading(2, "Confidence"),
        Picture(
            "reliability",
            f"Accuracy against confidence in 15 bins, seed {main[0].results[0].run.seed}; on the dashed line "
            "confidence is right. ECE: mean distance from it, weighted by the images in a bin.",
        ),
        Heading(2, "What the tokens look at"),
        Picture(
            "attention",
            "Attention of the class and the second token to the patches in the last block, mean over heads, seed "
            f"{main[0].results[0].run.seed}, over the first test images of each class. Each map has its own scale.",
        ),
    ]


def _tokens(
    folder: Path, complete: bool, outcomes: Sequence[Outcome], inspected: dict[str, list[Inspection]]
) -> list[Block]:
    """Section 3.4 of the report; without its ablation only for the tokens that the three models have."""
    labels = {"report-vit": "CLS", "report-deit": "CLS + distillation, soft"} if complete else {}
    found = {labels.get(o.variant.name, o.variant.label): inspected[o.variant.name] for o in outcomes}
    two = {
        label: [Spread.of(list(layer)) for layer in zip(*(seed.cosines for seed in seeds))]
        for label, seeds in found.items()
        if seeds[0].cosines
    }
    blocks: list[Block] = [Heading(2, "One token, two tokens"), tables.tokens_table(found)]
    if two:
        figures.plot_cosines(folder, "tokens", two)
        blocks.append(
            Picture(
                "tokens",
                "Cosine between the two tokens' embeddings of the same image, mean over the test set, at the "
                "input (position included) and after every layer.",
            )
        )
    if complete:
        blocks += [
            Text(
                "The report (section 3.4) says that two class tokens end with a cosine near 1, and that class and "
                f"distillation token end near 1 but always lower. {tables.tokens_verdict(found)}"
            )
        ]
    else:
        blocks += [Text("`--ablation tokens` adds two class tokens and hard distillation.")]
    return blocks


def _ablation(name: str, outcomes: list[Outcome]) -> list[Block]:
    title = {
        "augmentation": "Augmentation, each alone and each left out",
        "alpha": "Weight of the teacher, alpha",
        "tau": "Temperature, tau",
    }[name]
    base = next(o for o in outcomes if o.variant.name == DEIT.name)
    c = base.results[0].run.config.distillation
    value = {"alpha": f" (alpha {c.distillation_alpha:g})", "tau": f" (tau {c.distillation_tau:g})"}.get(name, "")
    table = tables.ablation_table(outcomes, base, f"{base.variant.label}{value}")
    return [Heading(2, f"Ablation: {title}"), table]
