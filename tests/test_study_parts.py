"""What a study computes itself: spreads, calibration, tokens, attention, verdicts, and the two forms of the page."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from deit_fast import create_model
from deit_fast.data.datasets import load_dataset
from deit_fast.training.study.choices import choices_table, facts
from deit_fast.training.study.inspection import Inspection, attention_maps, calibrate, forward_flops
from deit_fast.training.study.page import Heading, Items, Picture, Table, Text, write_page
from deit_fast.training.study.pictures import choose
from deit_fast.training.study.results import BAR, COLUMNS, REPORT, Outcome, Result, Spread
from deit_fast.training.study.runs import BY_MODEL, DEIT_AUG, VIT, planned
from deit_fast.training.study.settings import parse
from deit_fast.training.study.tables import below_the_bar, metrics_table, tokens_verdict, verdict


def test_spread():
    """The sample standard deviation, which of one seed does not exist."""
    spread = Spread.of([0.7, 0.71, 0.75])
    assert math.isclose(spread.mean, 0.72) and math.isclose(spread.std, 0.0264575, rel_tol=1e-5)
    assert (
        spread.text() == "0.720 ± 0.026"
        and Spread.of([0.5]) == Spread(0.5, None)
        and Spread.of([0.5]).text() == "0.500"
    )


class Constant(Outcome):
    """Every metric as given."""

    def metric(self, name, which):
        return Spread(self.results[name], None)


def test_bar_and_differences():
    """A cell equal to the bar passes, one below is named; DeiT's top-1 must reach its recall."""
    even = [Constant(variant, dict(BAR[name])) for name, variant in BY_MODEL.items()]
    assert below_the_bar(even, "best") == []
    low = [Constant(variant, dict(REPORT[name])) for name, variant in BY_MODEL.items()]
    assert below_the_bar(low, "best") == ["DeiT Top-1 0.639 < 0.676"]
    shown_equal = Constant(VIT, BAR["report-vit"] | {"f1": 0.6416})  # the report gives three digits: 0.642
    assert below_the_bar([shown_equal], "best") == []
    high = [
        Constant(variant, {name: value + 0.01 for name, value in REPORT[key].items()})
        for key, variant in BY_MODEL.items()
    ]
    table = metrics_table(high, "best")
    assert table.rows[2] == ["difference", *["+0.010"] * 6] and table.rows[4][1:] == [
        f"{REPORT['report-deit'][n]:.3f}" for n in COLUMNS
    ]


def test_settings_are_those_that_the_models_were_trained_with():
    """Image size and flips are decided by the data, dropout by a flag: the table asks neither preset nor paper."""
    study = parse(["--drop", "0.2"])
    digits = load_dataset("digits", input_size=8)
    rows = {row[0]: row[1:] for row in choices_table(study, [VIT, DEIT_AUG], digits).rows}
    assert rows["model"][0] == "8 px, patch 4, C 64, depth 7, 8 heads, MLP 256, dropout 0.2"
    assert rows["flip"] == ["none (digits)", "none (digits)", "0.5"]
    mirrored = dataclasses.replace(digits, flips=True)
    assert dict((row[0], row[2]) for row in choices_table(study, [VIT, DEIT_AUG], mirrored).rows)["flip"] == "0.5"


def test_facts_can_be_copied_and_read():
    """A command with a blank in a path is quoted; a note that is a sentence of its own gets no second full stop."""
    study = parse(["--output-dir", "my runs", "--seeds", "0"])
    summary = {"commit": "c0ffee", "ops": {}, "versions": {}, "device": "a CPU", "seeds": {"data_seed": 0}}
    done = Outcome(VIT, [Result(planned(study)[0], [], summary)])
    noted = dataclasses.replace(load_dataset("digits", input_size=8), notes=("Images are JPEG files.", "no dot"))
    items = facts(study, [done], noted).items
    assert items[0].endswith("Note: Images are JPEG files. Note: no dot.")
    assert items[-1] == "**Command**: `python -m deit_fast.study --output-dir 'my runs' --seeds 0`"


def test_the_last_epoch_alone_without_a_validation_split():
    even = [Constant(variant, dict(BAR[name])) for name, variant in BY_MODEL.items()]
    assert [len(verdict(even, True, validated).items) for validated in (True, False)] == [4, 2]
    assert not any("validation" in item for item in verdict(even, True, False).items)


def test_tokens_verdict():
    def seeds(last):
        return [Inspection({}, [0.1, last], {})]

    text = tokens_verdict(
        {"CLS": [Inspection({}, [], {})], "CLS + CLS": seeds(0.95), "soft": seeds(0.8), "hard": seeds(0.97)}
    )
    assert "0.950: it does come near 1" in text and "soft: 0.800, lower" in text and "hard: 0.970, not lower" in text
    assert "does not come near" in tokens_verdict({"CLS + CLS": seeds(0.89)})


def test_calibration():
    """Against the definition, image by image; a confidence of 1 falls into the last bin."""
    torch.manual_seed(0)
    probabilities = torch.randn(500, 5).mul(2).softmax(dim=1)
    probabilities[0] = torch.tensor([1.0, 0, 0, 0, 0])
    labels = torch.randint(5, (500,))
    found = calibrate(probabilities, labels)
    confidence, predicted = probabilities.max(dim=1)
    ece = 0.0
    for b in range(15):
        members = [i for i in range(500) if min(int(confidence[i] * 15), 14) == b]
        assert found["count"][b] == len(members)
        if members:
            accuracy = sum(predicted[i] == labels[i] for i in members).item() / len(members)
            assert math.isclose(found["accuracy"][b], accuracy)
            ece += abs(accuracy - confidence[members].double().mean().item()) * len(members) / 500
    assert math.isclose(found["ece"], ece, rel_tol=1e-6)


@pytest.mark.parametrize("tokens", ["cls", "cls+dist"])
def test_attention_maps(tokens):
    """A patch that alone matches the class token's query gets all attention, in its place of the grid."""
    model = create_model("vit_nano_patch4_32", tokens=tokens, img_size=16).eval()
    images = torch.randn(2, 3, 16, 16)
    maps = attention_maps(model, images)
    P = model.num_prefix_tokens
    assert maps.shape == (2, P, 4, 4) and (maps >= 0).all() and (maps.sum(dim=(2, 3)) < 1).all()
    block = model.blocks[-1]
    with torch.no_grad():  # q = 1, k = the first channel, which only patch (1, 2) has
        block.attn.qkv.weight.zero_()
        block.attn.qkv.bias.zero_()
        block.attn.qkv.bias[:64] = 100.0
        block.attn.qkv.weight[64:128, 0] = 1.0
        block.norm1.bias.zero_()

    def mark(_, arguments):
        x = torch.zeros_like(arguments[0])
        x[:, P + 1 * 4 + 2, 0] = 1.0
        return (x,)

    block.register_forward_pre_hook(mark, prepend=True)
    expected = torch.zeros(4, 4)
    expected[1, 2] = 1.0
    assert torch.allclose(attention_maps(model, images), expected.expand(2, P, 4, 4), atol=1e-4)


def test_flops_of_the_reports_model():
    """Counted by hand: per token 12 C^2 multiply-adds a block, attention 2 N C, patches and head."""
    C, N, depth = 64, 65, 7
    by_hand = 2 * (depth * (N * 12 * C * C + 2 * N * N * C) + 64 * 48 * C + 10 * C)
    assert forward_flops(create_model("vit_nano_patch4_32").eval()) == pytest.approx(by_hand, rel=0.01)


def test_choose_takes_every_class_in_turn():
    labels = torch.tensor([2, 2, 0, 2, 0, 1])
    assert choose(labels, 5).tolist() == [2, 5, 0, 4, 1] and choose(labels, 50).tolist() == [2, 5, 0, 4, 1, 3]


def test_page(tmp_path):
    """Markup in names stays text, in both forms; a figure is in the HTML itself."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.png").write_bytes(b"\x89PNG data")
    blocks = [
        Heading(2, "A <b> & c"),
        Text("**bold** and `co<de`"),
        Items(["one", "two"]),
        Table(["x", "y|z"], [["1", "<i>"]], frozenset({0})),
        Picture("a", 'said "so"'),
    ]
    path = write_page(tmp_path, "figures", "Title", blocks)
    page, markdown = path.read_text(), (tmp_path / "report.md").read_text()
    assert "A &lt;b&gt; &amp; c" in page and "<strong>bold</strong> and <code>co&lt;de</code>" in page
    assert "&lt;i&gt;" in page and "<i>" not in page
    assert re.search(r'src="data:image/png;base64,[A-Za-z0-9+/=]+" alt="said &quot;so&quot;"', page)
    assert markdown.startswith("# Title\n\n## A <b> & c\n") and "| x | y\\|z |\n| --- | ---: |\n| 1 | <i> |" in markdown
    assert "- one\n- two" in markdown and '![said "so"](figures/a.png)' in markdown
