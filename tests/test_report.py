"""The files of a run: columns that tools rely on, JSON that parsers accept, pictures that show what they should."""

import csv
import json
import math

import numpy as np
import pytest
import yaml
from PIL import Image

from deit_fast.errors import CheckpointError
from deit_fast.training import plots, report
from deit_fast.training.metrics import METRICS

HEADER = (
    "epoch,lr,train_loss,"
    "val_loss,val_top1,val_top5,val_auc,val_f1,val_precision,val_recall,"
    "test_loss,test_top1,test_top5,test_auc,test_f1,test_precision,test_recall,"
)
EMA_HEADER = (
    "ema_val_loss,ema_val_top1,ema_val_top5,ema_val_auc,ema_val_f1,ema_val_precision,ema_val_recall,"
    "ema_test_loss,ema_test_top1,ema_test_top5,ema_test_auc,ema_test_f1,ema_test_precision,ema_test_recall,"
)
COLOURS = {"train": (77, 77, 77), "val": (0, 114, 178), "test": (213, 94, 0), "ema_test": (230, 159, 0)}


def history(epochs, prefixes=("val", "test"), value=lambda epoch: epoch / (epoch + 2)):
    return [
        {"epoch": epoch, "lr": 0.001, "train_loss": value(epoch), "images_per_second": 210.5, "seconds": 3.25}
        | {f"{prefix}_{name}": value(epoch) for prefix in prefixes for name in METRICS}
        for epoch in range(1, epochs + 1)
    ]


def picture(path):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)  # (H, W, 3)
    for strip in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
        assert (strip == 255).all(), "something reaches the border: a label is cut off"
    return pixels


def coloured(pixels, colour):
    return int((np.abs(pixels - np.array(colour)).max(axis=2) < 12).sum())


class TestTables:
    def test_columns(self, tmp_path):
        report.write_metrics_csv(tmp_path / "metrics.csv", history(2, ("test",)))
        lines = (tmp_path / "metrics.csv").read_bytes().decode().split("\n")
        assert lines[0] == HEADER + "images_per_second,seconds"
        third = repr(1 / 3)
        assert lines[1] == f"1,0.001,{third}," + "," * 7 + f"{third}," * 7 + "210.5,3.25"
        assert len(lines) == 4 and lines[3] == ""

    def test_ema_columns_and_gaps(self, tmp_path):
        rows = history(2, ("val", "test", "ema_val", "ema_test"))
        del rows[0]["ema_val_auc"]
        rows[1]["val_auc"], rows[1]["train_loss"] = None, float("nan")
        report.write_metrics_csv(tmp_path / "metrics.csv", rows)
        text = (tmp_path / "metrics.csv").read_text()
        assert text.splitlines()[0] == HEADER + EMA_HEADER + "images_per_second,seconds"
        first, second = csv.DictReader(text.splitlines())
        assert first["ema_val_auc"] == "" and second["val_auc"] == "" and second["train_loss"] == "nan"
        assert float(second["ema_test_recall"]) == 0.5

    def test_no_epoch_yet(self, tmp_path):
        report.write_metrics_csv(tmp_path / "metrics.csv", [])
        assert (tmp_path / "metrics.csv").read_text() == HEADER + "images_per_second,seconds\n"

    def test_a_misspelt_column_is_not_lost(self, tmp_path):
        with pytest.raises(ValueError, match=r"unknown columns \['val_acc'\]"):
            report.write_metrics_csv(tmp_path / "metrics.csv", [{"epoch": 1, "val_acc": 0.5}])

    def test_summary_is_json(self, tmp_path):
        summary = {"best": {"top1": 0.5, "auc": math.nan}, "list": [math.inf, 1, (2.5, -math.inf)], "name": "d\u00e9"}
        report.write_summary(tmp_path / "summary.json", summary)

        def refuse(constant):
            raise AssertionError(f"{constant} is not JSON")

        text = (tmp_path / "summary.json").read_text(encoding="utf-8")
        assert json.loads(text, parse_constant=refuse) == {
            "best": {"top1": 0.5, "auc": None}, "list": [None, 1, [2.5, None]], "name": "d\u00e9",
        }

    def test_config_round_trip(self, tmp_path):
        config = {"model": "vit", "lr": 1e-6, "cutmix_minmax": (0.2, 0.8), "data_path": None, "aug": True, "aa": "none"}
        report.write_config(tmp_path / "config.yaml", config)
        text = (tmp_path / "config.yaml").read_text()
        assert yaml.safe_load(text) == {**config, "cutmix_minmax": [0.2, 0.8]}
        assert [line.split(":")[0] for line in text.splitlines() if not line.startswith("-")] == list(config)

    def test_unwritable_place(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="could not write"):
            report.write_summary(tmp_path / "file" / "summary.json", {})


class TestCurves:
    def test_every_line_is_there(self, tmp_path):
        plots.plot_curves(tmp_path / "curves.png", history(60, ("val", "test", "ema_test")))
        pixels = picture(tmp_path / "curves.png")
        # Lines of equal value lie on top of each other: the legend is what always shows.
        assert all(coloured(pixels, colour) > 50 for colour in COLOURS.values())

    def test_one_epoch_is_visible(self, tmp_path):
        plots.plot_curves(tmp_path / "curves.png", history(1, ("test",)))
        pixels = picture(tmp_path / "curves.png")
        panels = pixels[:, : pixels.shape[1] * 3 // 4]  # without the legend
        assert coloured(panels, COLOURS["test"]) > 6 * 10 and coloured(pixels, COLOURS["val"]) == 0

    def test_values_that_cannot_be_drawn(self, tmp_path):
        rows = history(5)
        rows[1]["val_loss"], rows[2]["val_loss"], rows[3]["train_loss"] = math.nan, math.inf, None
        plots.plot_curves(tmp_path / "a.png", rows)
        plots.plot_curves(tmp_path / "b.png", history(3, value=lambda epoch: math.nan))
        assert coloured(picture(tmp_path / "a.png"), COLOURS["val"]) > 50
        assert coloured(picture(tmp_path / "b.png"), COLOURS["val"]) == 0

    def test_a_lone_value_in_a_long_run_is_visible(self, tmp_path):
        rows = history(100, ("test",))
        rows[50]["val_top1"] = 0.1
        plots.plot_curves(tmp_path / "curves.png", rows)
        pixels = picture(tmp_path / "curves.png")
        assert coloured(pixels[: pixels.shape[0] // 2], COLOURS["val"]) > 10

    def test_nothing_to_draw(self, tmp_path):
        with pytest.raises(ValueError, match="no epochs"):
            plots.plot_curves(tmp_path / "curves.png", [])


class TestConfusion:
    @pytest.mark.parametrize("classes", [2, 10, 20, 100])
    def test_sizes(self, tmp_path, classes):
        confusion = np.full((classes, classes), 3) + 97 * np.eye(classes, dtype=int)
        names = [f"quite_a_long_class_name_{index}" for index in range(classes)]
        plots.plot_confusion(tmp_path / "confusion.png", confusion.tolist(), names)
        pixels = picture(tmp_path / "confusion.png")
        assert 500 < pixels.shape[0] < 2200 and 500 < pixels.shape[1] < 2200

    def test_rows_are_normalised(self, tmp_path):
        # A rare class that is always right is as dark as a common one.
        plots.plot_confusion(tmp_path / "a.png", [[1000, 0], [0, 2]], ["common", "rare"])
        pixels = picture(tmp_path / "a.png")
        dark = pixels.sum(axis=2) < 220
        rows = np.flatnonzero(dark[:, : pixels.shape[1] * 3 // 4].sum(axis=1) > 100)
        assert len(rows) > pixels.shape[0] * 0.6

    def test_missing_class_and_names_that_look_like_formulas(self, tmp_path):
        plots.plot_confusion(tmp_path / "a.png", [[5, 0, 1], [0, 0, 0], [2, 0, 3]], ["$\\frac$", "a_$b", "100%"])
        assert coloured(picture(tmp_path / "a.png"), (221, 221, 221)) > 5000  # the grey row

    def test_shape_is_checked(self, tmp_path):
        with pytest.raises(ValueError, match=r"must be 3 x 3, got \(2, 2\)"):
            plots.plot_confusion(tmp_path / "a.png", [[1, 0], [0, 1]], ["a", "b", "c"])
