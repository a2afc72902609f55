"""Evaluation against scikit-learn and against its own written rules."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from deit_fast.training.metrics import METRICS, Evaluation
from needs import needs_gpu


def make(samples, classes, kind="balanced", dtype=torch.float32, seed=0):
    """Returns logits (N, K) that know something about the labels, and the labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "balanced":
        labels = torch.arange(samples) % classes
    elif kind == "unbalanced":
        labels = torch.multinomial(0.8 ** torch.arange(classes).double(), samples, True, generator=generator)
        labels[:classes] = torch.arange(classes)  # every class at least once
    else:  # absent: the first and the last third of the classes have no sample
        labels = torch.randint(classes // 3, classes - classes // 3, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator)
    logits[torch.arange(samples), labels] += 1.5
    return logits.to(dtype), labels


def evaluate(logits, labels, classes, batch=37):
    evaluation = Evaluation(classes, "cpu")
    for start in range(0, len(labels), batch):  # 37 never divides the sample counts used here: the last is uneven
        evaluation.update(logits[start : start + batch], labels[start : start + batch])
    return evaluation


def truth(logits, labels, classes):
    """Returns the metrics by scikit-learn and NumPy in fp64."""
    scores = logits.float().softmax(dim=1).double().numpy()
    raw, labels = logits.double().numpy(), labels.numpy()
    predicted = raw.argmax(axis=1)
    names = np.arange(classes)
    present = [c for c in names if 0 < (labels == c).sum() < len(labels)]
    auc = np.mean([sk.roc_auc_score(labels == c, scores[:, c]) for c in present])
    if 2 < classes == len(present):  # scikit-learn's own one-vs-rest insists on rows whose sum is 1 in fp64
        rows = scores / scores.sum(axis=1, keepdims=True)
        ovr = sk.roc_auc_score(labels, rows, multi_class="ovr", average="macro", labels=names)
        assert auc == pytest.approx(ovr, abs=1e-3)  # the division breaks ties of saturated scores
    log_softmax = raw - raw.max(axis=1, keepdims=True)
    log_softmax -= np.log(np.exp(log_softmax).sum(axis=1, keepdims=True))
    return {
        "loss": -log_softmax[np.arange(len(labels)), labels].mean(),
        "top1": sk.accuracy_score(labels, predicted),
        "top5": sk.top_k_accuracy_score(labels, raw, k=5, labels=names) if classes > 5 else 1.0,
        "auc": auc,
        **{
            name: score(labels, predicted, average="macro", zero_division=0)
            for name, score in (
                ("f1", sk.f1_score), ("precision", sk.precision_score), ("recall", sk.recall_score),
            )
        },
    }


@pytest.mark.parametrize("kind", ["balanced", "unbalanced", "absent"])
@pytest.mark.parametrize(("classes", "samples"), [(4, 100), (10, 500), (100, 1500)])
def test_equals_scikit_learn(kind, classes, samples):
    logits, labels = make(samples, classes, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # absent classes: no warning either
        got = evaluate(logits, labels, classes).compute()
    want = truth(logits, labels, classes)
    assert tuple(got) == METRICS and all(type(value) is float for value in got.values())
    for name in METRICS:
        assert got[name] == pytest.approx(want[name], abs=2e-6), name
    assert got["top1"] == want["top1"] and got["top5"] == want["top5"]  # fractions of whole numbers, to the last bit


@pytest.mark.parametrize("kind", ["balanced", "unbalanced"])
def test_two_classes(kind):
    logits, labels = make(200, 2, kind)
    got, want = evaluate(logits, labels, 2).compute(), truth(logits, labels, 2)
    for name in METRICS:
        assert got[name] == pytest.approx(want[name], abs=2e-6), name
    assert got["top5"] == 1.0


def test_bf16_logits():
    # bf16 has so few values that scores tie: the AUC must count ties as one half, and lie within the bounds for top-5.
    logits, labels = make(600, 10, dtype=torch.bfloat16)
    got, want = evaluate(logits, labels, 10).compute(), truth(logits, labels, 10)
    for name in ("loss", "auc"):
        assert got[name] == pytest.approx(want[name], abs=2e-6), name
    own = logits.gather(1, labels[:, None])
    best = ((logits > own).sum(dim=1) < 5).double().mean().item()
    worst = ((logits >= own).sum(dim=1) <= 5).double().mean().item()
    assert worst - 1e-6 <= got["top5"] <= best + 1e-6 and best - worst < 0.05
    assert got["top1"] == pytest.approx(want["top1"], abs=0.01)


def test_tied_scores_count_half():
    logits = torch.zeros(10, 4)
    labels = torch.arange(10) % 4
    assert evaluate(logits, labels, 4).compute()["auc"] == pytest.approx(0.5)


def test_saturated_softmax_is_not_taken_for_logits():
    # Confident logits: the softmax holds exact ones and zeros, AUC and top-5 must still see the order.
    generator = torch.Generator().manual_seed(1)
    logits = 200 * torch.randn(300, 10, generator=generator)
    labels = torch.randint(10, (300,), generator=generator)
    got, want = evaluate(logits, labels, 10).compute(), truth(logits, labels, 10)
    for name in METRICS:
        assert got[name] == pytest.approx(want[name], rel=1e-5, abs=2e-6), name


def test_batches_do_not_matter():
    logits, labels = make(500, 10, "unbalanced")
    one = evaluate(logits, labels, 10, batch=500).compute()
    many = evaluate(logits, labels, 10, batch=1).compute()
    for name in METRICS:  # a mean of batch means would differ by about 1/500
        assert many[name] == pytest.approx(one[name], abs=1e-7), name


def test_absent_and_only_predicted_classes():
    # Class 0: two samples, one right. Class 1: one sample, right. Class 2: no sample, predicted once. Class 3: nothing.
    logits = torch.tensor([[4.0, 1, 2, 0], [1, 2, 5, 0], [1, 6, 2, 0]])
    evaluation = evaluate(logits, torch.tensor([0, 0, 1]), 4)
    got, tables = evaluation.compute(), evaluation.details()
    assert got["precision"] == pytest.approx((1 + 1 + 0) / 3)
    assert got["recall"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert got["f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert tables["confusion"] == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert tables["per_class"]["support"] == [2, 1, 0, 0]
    assert tables["per_class"]["auc"][2:] == [None, None]
    assert got["auc"] == pytest.approx(sum(tables["per_class"]["auc"][:2]) / 2)
    assert tables["per_class"]["recall"] == pytest.approx([0.5, 1, 0, 0])
    json.dumps(tables)


def test_one_class_only():
    evaluation = evaluate(torch.randn(8, 3), torch.ones(8, dtype=torch.int64), 3)
    with pytest.warns(RuntimeWarning, match="AUC is not defined"):
        got = evaluation.compute()
    assert math.isnan(got["auc"]) and all(math.isfinite(got[name]) for name in METRICS if name != "auc")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_logits(value):
    logits, labels = make(100, 10)
    logits[7] = value
    logits[8, int(labels[8])] = value
    evaluation = evaluate(logits, labels, 10)
    with pytest.warns(RuntimeWarning, match="2 of 100 samples have logits that are not finite"):
        got = evaluation.compute()
    assert not math.isfinite(got["loss"])
    assert all(0 <= got[name] <= 1 for name in METRICS if name != "loss")
    assert evaluation.details()["non_finite"] == 2


def test_nan_is_never_a_hit():
    logits = torch.zeros(4, 3)
    logits[:, 2] = float("nan")
    with pytest.warns(RuntimeWarning):
        assert evaluate(logits, torch.tensor([2, 2, 2, 0]), 3).compute()["top1"] == 0.25


def test_keeps_its_own_copy():
    # A CUDA graph reuses the memory of logits and labels for the next batch.
    logits, labels = make(40, 10)
    want = evaluate(logits, labels, 10).compute()
    evaluation, buffer, targets = Evaluation(10), torch.empty(20, 10), torch.empty(20, dtype=torch.int64)
    for start in (0, 20):
        buffer.copy_(logits[start : start + 20])
        targets.copy_(labels[start : start + 20])
        evaluation.update(buffer, targets)
    assert evaluation.compute() == pytest.approx(want)


def test_update_after_compute_counts():
    logits, labels = make(60, 10)
    evaluation = evaluate(logits[:30], labels[:30], 10)
    first = evaluation.compute()
    evaluation.update(logits[30:], labels[30:])
    assert evaluation.compute() == pytest.approx(evaluate(logits, labels, 10).compute()) and first["loss"] > 0


def test_bad_arguments():
    evaluation = Evaluation(10)
    with pytest.raises(ValueError, match="no samples"):
        evaluation.compute()
    evaluation.update(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="no samples"):
        evaluation.compute()
    with pytest.raises(ValueError, match=r"shape \(B, 10\), got \(4, 9\)"):
        evaluation.update(torch.zeros(4, 9), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels must be integers"):
        evaluation.update(torch.zeros(4, 10), torch.zeros(4, 10))
    with pytest.raises(ValueError, match="at least 2"):
        Evaluation(1)


@needs_gpu
def test_update_does_not_synchronise():
    logits, labels = make(100, 10)
    logits, labels = logits.cuda(), labels.cuda()
    evaluation = Evaluation(10, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluation.update(logits, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert evaluation.compute() == pytest.approx(evaluate(logits.cpu(), labels.cpu(), 10).compute(), abs=1e-6)
