"""The study's tables and the sentences that their figures decide."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from deit_fast.data.datasets import ImageData
from deit_fast.training.device import commit
from deit_fast.training.files import atomic_write
from deit_fast.training.progress import duration
from deit_fast.training.study.inspection import Inspection
from deit_fast.training.study.page import Items, Table
from deit_fast.training.study.results import BAR, COLUMNS, REPORT, Outcome, Spread
from deit_fast.training.study.settings import Study

NEAR = 0.9  # a cosine that counts as "near 1"


def metrics_table(outcomes: Sequence[Outcome], which: str) -> Table:
    """Table 1: the six metrics of each model, the report's figures below, and the difference."""
    rows, light = [], set()
    for outcome in outcomes:
        ours = {name: outcome.metric(name, which) for name in COLUMNS}
        theirs = REPORT[outcome.variant.name]
        rows.append([f"**{outcome.variant.label}**", *(ours[name].text() for name in COLUMNS)])
        rows.append(["the report", *(f"{theirs[name]:.3f}" for name in COLUMNS)])
        rows.append(["difference", *(f"{ours[name].mean - theirs[name]:+.3f}" for name in COLUMNS)])
        light |= {len(rows) - 2, len(rows) - 1}
    return Table(["Model", *COLUMNS.values()], rows, frozenset(light))


def epochs_table(outcomes: Sequence[Outcome]) -> Table:
    """Which epoch was the best by validation, for each seed, and its top-1 on both splits."""
    rows = []
    for outcome in outcomes:
        for result in outcome.results:
            row, last = result.row("best"), result.row("last")
            name = f"{outcome.prefix}val_top1"
            rows.append(
                [
                    outcome.variant.label,
                    str(result.run.seed),
                    f"{row['epoch']:.0f} of {last['epoch']:.0f}",
                    f"{row[name]:.4f}" if name in row else "-",
                    f"{row[f'{outcome.prefix}test_top1']:.4f}",
                    f"{last[f'{outcome.prefix}test_top1']:.4f}",
                ]
            )
    return Table(
        ["Model", "seed", "best epoch", "its validation top-1", "its test top-1", "last epoch's test top-1"], rows
    )


def below_the_bar(outcomes: Sequence[Outcome], which: str) -> list[str]:
    """For every cell of Table 1 that is below the report's, to the report's three digits: "model metric ours < bar"."""
    return [
        f"{outcome.variant.label} {COLUMNS[name]} {outcome.metric(name, which).mean:.3f} < {bar:.3f}"
        for outcome in outcomes
        for name, bar in BAR[outcome.variant.name].items()
        if round(outcome.metric(name, which).mean, 3) < bar
    ]


def verdict(outcomes: Sequence[Outcome], comparable: bool, validated: bool) -> Items:
    """What Table 1 says: against the report, and of the models among each other; of the best epoch, where one was
    chosen by validation, and of the last."""
    items = []
    best = [("best", "best epoch by validation")] if validated else []
    for which, words in (*best, ("last", "last epoch")):
        cells = len(outcomes) * len(COLUMNS)
        below = below_the_bar(outcomes, which)
        if comparable:
            items.append(
                f"At the {words}, {cells - len(below)} of {cells} cells are at or above the report's"
                + (f"; below: {'; '.join(below)}." if below else ".")
            )
        order = sorted(outcomes, key=lambda outcome: outcome.metric("top1", which).mean, reverse=True)
        ranked = ", ".join(f"{outcome.variant.label} {outcome.metric('top1', which).text()}" for outcome in order)
        items.append(f"Top-1 at the {words}, in order: {ranked}.")
    return Items(items)


def cost_table(outcomes: Sequence[Outcome], flops: Mapping[str, int]) -> Table:
    """What a run of each model costs, mean over seeds."""
    rows = []
    for outcome in outcomes:
        speeds = [row["images_per_second"] for result in outcome.results for row in result.rows]
        rows.append(
            [
                outcome.variant.label,
                f"{outcome.mean('model', 'parameters'):,.0f}",
                f"{flops[outcome.variant.name] / 1e6:,.1f} M",
                f"{sum(speeds) / len(speeds):,.0f}",
                duration(outcome.mean("training_seconds")),
                duration(outcome.mean("wall_seconds")),
                f"{outcome.mean('peak_memory_bytes') / 2**20:,.0f} MiB",
            ]
        )
    return Table(["Model", "parameters", "FLOPs/image", "images/s", "training", "with evaluation", "peak memory"], rows)


def tokens_table(inspections: Mapping[str, Sequence[Inspection]]) -> Table:
    """Accuracy of each head and of their mean, and the cosine of the tokens; label -> one Inspection per seed."""
    rows = []
    for label, seeds in inspections.items():
        heads = [
            Spread.of([seed.heads[name] for seed in seeds]).text() if name in seeds[0].heads else "-"
            for name in ("class", "second", "mean of both")
        ]
        cosines = [
            Spread.of([seed.cosines[layer] for seed in seeds]).text() if seeds[0].cosines else "-" for layer in (0, -1)
        ]
        rows.append([label, *heads, *cosines])
    return Table(
        ["Tokens", "class head", "second head", "mean of both", "cosine at the input", "after the last layer"], rows
    )


def tokens_verdict(inspections: Mapping[str, Sequence[Inspection]]) -> str:
    """Whether the report's claim on the cosines holds here, as a sentence."""
    last = {
        label: Spread.of([seed.cosines[-1] for seed in seeds])
        for label, seeds in inspections.items()
        if seeds[0].cosines
    }
    twice = last.pop("CLS + CLS")
    near = "does" if twice.mean >= NEAR else "does not"
    parts = [f"The cosine of CLS + CLS ends at {twice.text()}: it {near} come near 1 (at least {NEAR:g})."]
    for label, value in last.items():
        lower = "lower, as claimed" if value.mean < twice.mean else "not lower, against the claim"
        parts.append(f"{label}: {value.text()}, {lower}.")
    return " ".join(parts)


def ablation_table(outcomes: Sequence[Outcome], base: Outcome, base_label: str) -> Table:
    """Test metrics of every variant at its best epoch, and its top-1 against that of the base."""
    rows = []
    for outcome in outcomes:
        top1 = outcome.metric("top1", "best")
        is_base = outcome.variant.name == base.variant.name
        against = "" if is_base else f"{top1.mean - base.metric('top1', 'best').mean:+.3f}"
        rows.append(
            [
                base_label if is_base else outcome.variant.label,
                top1.text(),
                against,
                outcome.metric("f1", "best").text(),
                outcome.metric("auc", "best").text(),
                outcome.metric("loss", "best").text(),
                outcome.metric("top1", "last").text(),
            ]
        )
    return Table(
        ["Variant", "Top-1", f"against {base.variant.label}", "F1", "AUC", "test loss", "Top-1, last epoch"], rows
    )


def write_json(
    study: Study,
    outcomes: dict[str, Outcome],
    inspected: dict[str, list[Inspection]],
    flops: dict[str, int],
    data: ImageData,
) -> None:
    """study.json: what the tables show, for programs."""
    metrics = {
        name: {
            which: {metric: asdict(o.metric(metric, which)) for metric in (*COLUMNS, "loss")}
            for which in ("best", "last")
        }
        for name, o in outcomes.items()
    }
    document = {
        "command": study.command,
        "commit": commit(),
        "data": data.name,
        "fingerprint": data.fingerprint,
        "seeds": study.seeds,
        "metrics": metrics,
        "forward_flops": flops,
        "inspections": {name: [asdict(i) for i in seeds] for name, seeds in inspected.items()},
    }
    text = json.dumps(document, indent=1)
    atomic_write(study.output_dir / "study.json", lambda file: file.write(f"{text}\n".encode()))
