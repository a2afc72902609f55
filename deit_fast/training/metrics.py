"""Evaluation of a classifier over a whole split: loss, top-1, top-5, AUC, F1, precision, recall.

For class c with true positives TP, false positives FP and false negatives FN (of the arg-max prediction)
    precision = TP / (TP + FP)    recall = TP / (TP + FN)    F1 = 2 TP / (2 TP + FP + FN),
averaged over classes with equal weight (macro). Micro averages of the three equal top-1, so they would say nothing.
AUC is one-vs-rest, exact, macro over c: P(softmax_c of a sample of class c > softmax_c of another), ties one half.
Averaging the AUC of batches is wrong, so an exact AUC must keep every score; that memory (N x K fp32, 4 MB for
CIFAR-100's test set) is the price, and since it is paid, everything else is computed from the same scores at the end.

Rules for what is not defined
- 0/0 counts as 0 (zero_division=0): a class that is never predicted has precision 0.
- F1, precision, recall: a class that occurs neither in the labels nor in the predictions is left out of the mean; one
  that is predicted but has no sample counts, with recall 0. This is scikit-learn's default.
- AUC: a class without samples, or to which all samples belong, has no AUC and is left out of the mean.
  (torchmetrics would count it as 0.) When no class is left, which needs a split of one single class, `auc` is nan.
- Logits that are not finite: NaN ranks below every number, +-inf is the largest or smallest fp32 number, so all rates
  stay defined (a row of NaN predicts class 0); `loss` is the true mean and becomes nan or inf.
`compute` warns, with the counts, when either of the last two happens. It never returns nan otherwise.
- top-5 with fewer than five classes is top-K, so 1.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.functional.classification import binary_auroc

METRICS = ("loss", "top1", "top5", "auc", "f1", "precision", "recall")


class Evaluation:
    """Collects logits and labels on the device; `compute` returns the metrics, `details` the tables behind them.

    `update` never waits for the GPU. torchmetrics' own update would (torch.bincount reads its maximum on the host), so
    the metrics run over the collected batches in `compute`, one synchronising call per evaluation.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        if num_classes < 2:
            raise ValueError(f"Evaluation: num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.device = torch.device(device)
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._results: tuple[dict[str, float], dict] | None = None

    def update(self, logits: Tensor, labels: Tensor) -> None:  # (B, K), (B,)
        """Adds a batch; logits may be of any float type, labels are int64 in 0..K-1."""
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"Evaluation.update: logits must have shape (B, {self.num_classes}), got {tuple(logits.shape)}"
            )
        if labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"Evaluation.update: labels must be integers of shape ({logits.shape[0]},), "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        # Copies: a CUDA graph writes the logits of the next batch into the same memory.
        self._logits.append(logits.detach().to(self.device, torch.float32, copy=True))
        self._labels.append(labels.detach().to(self.device, torch.int64, copy=True))
        self._results = None

    def compute(self) -> dict[str, float]:
        """Returns loss, top1, top5, auc, f1, precision and recall over all samples; rates in 0..1."""
        return self._all()[0]

    def details(self) -> dict:
        """Returns {"per_class": {name: [K values]}, "confusion": K rows (true class) of K counts, "samples",
        "non_finite"}; an AUC that is not defined is None."""
        return self._all()[1]

    def _all(self) -> tuple[dict[str, float], dict]:
        if self._results is None:
            if not any(len(labels) for labels in self._labels):
                raise ValueError("Evaluation.compute: there are no samples; call update first")
            self._results = self._measure()
        return self._results

    @torch.no_grad()
    def _measure(self) -> tuple[dict[str, float], dict]:
        classes = self.num_classes
        options = {"num_classes": classes, "validate_args": False}
        by_class = {**options, "average": "none", "zero_division": 0}
        metrics = {
            "top1": MulticlassAccuracy(**options, average="micro"),
            "top5": MulticlassAccuracy(**options, average="micro", top_k=min(5, classes)),
            "f1": MulticlassF1Score(**by_class),
            "precision": MulticlassPrecision(**by_class),
            "recall": MulticlassRecall(**by_class),
            "confusion": MulticlassConfusionMatrix(**options),
        }
        metrics = {name: metric.to(self.device) for name, metric in metrics.items()}
        raw, labels = torch.cat(self._logits), torch.cat(self._labels)  # (N, K), (N,)
        loss = F.cross_entropy(raw, labels, reduction="none").double().sum()
        non_finite = (~raw.isfinite()).any(dim=1).sum()
        limits = torch.finfo(raw.dtype)
        logits = torch.nan_to_num(raw, nan=limits.min, posinf=limits.max, neginf=limits.min)
        predicted = logits.argmax(dim=1)
        for name, metric in metrics.items():  # in one piece: each update is dozens of launches and some syncs
            metric.update(logits if name == "top5" else predicted, labels)
        # The clamp: a softmax one rounding above 1 would look like logits to torchmetrics.
        scores = logits.softmax(dim=1).clamp_(0, 1)
        confusion = metrics["confusion"].compute()  # (K, K)
        support = confusion.sum(dim=1)  # (K,)
        samples = int(support.sum())
        auc = self._auc(scores, labels, support.tolist(), samples)
        counted = (support + confusion.sum(dim=0)) > 0  # (K,) in the labels or in the predictions
        per_class = {name: metrics[name].compute() for name in ("f1", "precision", "recall")}
        defined = [value for value in auc if value is not None]
        results = {
            "loss": float(loss) / samples,
            # torchmetrics divides in fp32 and would report 0.10000000149; the counts are whole numbers.
            "top1": round(float(metrics["top1"].compute()) * samples) / samples,
            "top5": round(float(metrics["top5"].compute()) * samples) / samples,
            "auc": sum(defined) / len(defined) if defined else float("nan"),
            **{name: float(values[counted].double().mean()) for name, values in per_class.items()},
        }
        self._warn(int(non_finite), samples, bool(defined))
        details = {
            "per_class": {name: values.tolist() for name, values in per_class.items()}
            | {"auc": auc, "support": support.tolist()},
            "confusion": confusion.tolist(),
            "samples": samples,
            "non_finite": int(non_finite),
        }
        return results, details

    @staticmethod
    def _auc(scores: Tensor, labels: Tensor, support: list[int], samples: int) -> list[float | None]:
        """Returns the one-vs-rest AUC of every class, None where it is not defined.

        scores (N, K), labels (N,). The classes without an AUC are known beforehand, so torchmetrics need not warn.
        """
        return [
            float(binary_auroc(scores[:, index], (labels == index).long(), thresholds=None, validate_args=False))
            if 0 < count < samples
            else None
            for index, count in enumerate(support)
        ]

    @staticmethod
    def _warn(non_finite: int, samples: int, auc_defined: bool) -> None:
        if non_finite:
            warnings.warn(
                f"evaluation: {non_finite} of {samples} samples have logits that are not finite, so the loss is not "
                "either; the model has diverged. Lower --lr, set --clip-grad, or run without --amp.",
                RuntimeWarning,
                stacklevel=4,
            )
        if not auc_defined:
            warnings.warn(
                "evaluation: all samples are of one class, so AUC is not defined (nan). Evaluate on more classes.",
                RuntimeWarning,
                stacklevel=4,
            )
