"""`BatchAugment`: the whole augmentation of a batch in one call, for loops that are not ours.

It stands where timm's `Mixup` or torchvision's `v2.MixUp` and `v2.CutMix` stand, `images, targets = mix(images,
labels)`, with timm's arguments, their order and defaults, and does the crop, flip, color jitter, normalisation and
erasing before it in the same pass of `ops.augment`. Nothing has to live on the device beforehand.

Randomness is counter-based, as for our own loaders: the numbers of a call are a function of (seed, epoch, images seen
in the epoch, recipe). Neither NumPy's nor PyTorch's generators are used or moved. So the same batches in the same order
are augmented like `TrainLoader` augments them under the same seed; a run resumes with `state_dict`, which holds three
integers; and processes that train together need seeds of their own (`seed=rank`), or all draw the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from deit_fast.data.augmentation import Plan, Recipe, sample_plan
from deit_fast.data.loader import centred_plan
from deit_fast.ops import augment
from deit_fast.reference.augment import erase, mix, mix_targets, mixed_targets, output_size, source_size

# timm's names of the recipe's mixing fields
MIXING = {"mixup_alpha": "mixup", "cutmix_alpha": "cutmix", "cutmix_minmax": "cutmix_minmax", "prob": "mixup_prob",
          "switch_prob": "mixup_switch_prob", "mode": "mixup_mode", "correct_lam": "correct_lam"}  # fmt: skip
AFTER_NORMALISATION = {*MIXING.values(), "reprob", "remode", "recount"}
# all others but alternating_flip, which needs to know an image again
TRANSFORMS = [field.name for field in fields(Recipe) if field.name not in {*MIXING.values(), "alternating_flip"}]
DRAWN_AHEAD = 16  # batches; a plan costs some hundred small operations however long it is


class BatchAugment(nn.Module):
    """Augmented, normalised images and soft targets from a batch: `images, targets = augment(images, labels)`.

    A pair will do, `augment((images, labels))`, as torchvision's. Takes images (B, 3, H, W) or (B, H, W, 3) uint8 and
    labels on one device: (B,) class numbers of any integer dtype, or (B, K) probabilities or one-hots of any dtype, as
    torchvision's. Returns images (B, 3, H', W') and targets (B, K) float32, which a loss with soft targets takes and
    must not smooth again. Nothing is changed in place. A batch may have any size, odd ones included: the middle image
    of an odd batch is not mixed.

    Float images, any (B, C, H, W), count as normalised already, which is what timm's and torchvision's mixing take:
    they are erased (C = 3) and mixed, in plain PyTorch by the op's specification, and keep their dtype. Transforms that
    come before the normalisation need uint8 and are refused.

    `eval()`: images are only normalised (the centre, where `size` is smaller; float images stay as they are) and
    targets are one-hot, without smoothing. `mixup_enabled = False` ends mixing and keeps the rest, as in timm.

    Args:
        mixup_alpha, cutmix_alpha, cutmix_minmax, prob, switch_prob, mode, correct_lam, label_smoothing, num_classes,
            multi_label: as timm's `Mixup`, with its defaults (which are MixUp with alpha 1 and smoothing 0.1) and in
            its order; the others are given by name. torchvision's `v2.MixUp(alpha=a)` is mixup_alpha=a,
            label_smoothing=0, its `v2.CutMix(alpha=a)` is mixup_alpha=0, cutmix_alpha=a, label_smoothing=0, and
            `v2.RandomChoice` of the two has both alphas. Labels (B, K) are smoothed to (1 - eps) y + eps / K, as
            one-hots are; with multi_label, which takes no other, each of the K towards one half, (1 - eps) y + eps / 2.
        mean, std: of the three channels on the scale 0..1; uint8 images need them.
        size: H', or (H', W'); default: the images' own.
        seed: of all draws, 64 bits.
        dtype: of the returned images: float32, bfloat16 or float16. Default: float32, or that of float images.
        channels_last: their memory format.
        backend: who computes it; None: see `deit_fast.use_backend`.
        transforms: any other field of `data.plan.Recipe`, such as crop_pad, hflip, brightness, contrast, saturation,
            reprob, remode, recount. Their defaults draw nothing.

    In a DataLoader's `collate_fn` it works too, but slowly: in a worker process the kernels of this project cannot run
    (OpenMP does not survive the fork), so plain PyTorch serves; a backend asked for by name raises BackendError. There
    the numbers also depend on the seed that the DataLoader gives each worker, so workers and epochs differ from each
    other, and they repeat when PyTorch's generator is seeded and the number of workers is the same. The better place is
    behind the loader, on the device.

    Raises TypeError and ValueError for arguments and batches that do not fit.
    """

    def __init__(self, mixup_alpha: float = 1.0, cutmix_alpha: float = 0.0,
                 cutmix_minmax: tuple[float, float] | None = None, prob: float = 1.0, switch_prob: float = 0.5,
                 mode: str = "batch", correct_lam: bool = True, label_smoothing: float = 0.1,
                 num_classes: int = 1000, multi_label: bool = False, *, mean: Sequence[float] | None = None,
                 std: Sequence[float] | None = None, size: int | tuple[int, int] | None = None, seed: int = 0,
                 dtype: torch.dtype | None = None, channels_last: bool = False, backend: str | None = None,
                 **transforms: object) -> None:
        super().__init__()
        unknown = sorted(set(transforms) - set(TRANSFORMS))
        if unknown:
            raise TypeError(f"BatchAugment: unknown argument {unknown[0]!r}. Transforms: {', '.join(TRANSFORMS)}.")
        self.recipe = Recipe(
            mixup=mixup_alpha, cutmix=cutmix_alpha, mixup_prob=prob, mixup_switch_prob=switch_prob, mixup_mode=mode,
            correct_lam=correct_lam, cutmix_minmax=None if cutmix_minmax is None else tuple(cutmix_minmax),
            **transforms,
        )  # fmt: skip
        self.mean, self.std = (None if values is None else tuple(values) for values in (mean, std))
        self.num_classes, self.smoothing, self.multi_label = num_classes, label_smoothing, multi_label
        self.size, self.dtype, self.channels_last, self.backend = size, dtype, channels_last, backend
        self.mixup_enabled = True
        self.seed, self.epoch, self.position = seed, 0, 0  # position: images seen in this epoch
        self._drawn: tuple[tuple, int, Plan] | None = None  # what it belongs to, its first position, the plan

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch: its draws depend on its number, not on what was drawn before."""
        self.epoch, self.position = epoch, 0

    def get_extra_state(self) -> dict[str, int]:
        """Seed and position, which make `state_dict`."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continues where `state` was taken."""
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]

    @torch.no_grad()
    def forward(self, images: Tensor | Sequence[Tensor], labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, H', W') and (B, K) of images (B, 3, H, W), (B, H, W, 3) uint8 or (B, C, H, W) float and labels (B,) or
        (B, K), or of a pair of the two.
        """
        if labels is None and isinstance(images, tuple | list) and len(images) == 2:
            images, labels = images
        labels = self._checked(images, labels)
        if images.dtype == torch.uint8:
            return self._from_pixels(images.as_subclass(Tensor), labels)
        return self._from_floats(images.as_subclass(Tensor), labels)

    def _checked(self, images: Tensor, labels: Tensor) -> Tensor:
        """labels, class numbers as int64; TypeError or ValueError for what is no batch."""
        if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
            raise TypeError(f"BatchAugment: takes two tensors, images and labels, got {type(images).__name__} and "
                            f"{type(labels).__name__}.")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError("BatchAugment: images must be uint8, or float when they are normalised, got "
                            f"{images.dtype}.")
        if images.dim() != 4:
            raise ValueError(f"BatchAugment: images must be a batch of four dimensions, got {tuple(images.shape)}.")
        dense = (len(images), self.num_classes)
        if labels.is_complex():
            raise TypeError(f"BatchAugment: labels must be numbers, got {labels.dtype}.")
        if labels.dim() == 2 or self.multi_label:
            if labels.shape != dense:
                what = "of multi_label" if self.multi_label else "that are no class numbers (B,)"
                raise ValueError(f"BatchAugment: labels {what} must have shape (B, num_classes) = {dense}, got "
                                 f"{tuple(labels.shape)}.")
            return labels
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"BatchAugment: class numbers (B,) must have an integer dtype, got {labels.dtype}. "
                            f"Probabilities have shape (B, num_classes) = {dense}.")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"BatchAugment: labels must have shape ({len(images)},), got {tuple(labels.shape)}.")
        return labels.long()

    def _from_pixels(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.mean is None or self.std is None:
            raise ValueError("BatchAugment: uint8 images are normalised here. Pass mean= and std= of the data set, on "
                             "the scale 0..1.")
        source, size = source_size(images), output_size(images, self.size)
        if self.training:
            plan = self._next_plan(len(images), source, size, images.device)
        else:
            plan = centred_plan(torch.arange(len(images), device=images.device), source, size)
        classes = labels if labels.dim() == 1 else labels.new_zeros(len(labels), dtype=torch.int64)
        images, targets = augment(images, classes, plan, self.mean, self.std, self.num_classes, size, self._smoothing(),
                                  self.dtype or torch.float32, self.channels_last, backend=self.backend)  # fmt: skip
        return images, targets if labels.dim() == 1 else self._targets(labels, plan)

    def _from_floats(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Erased and mixed, at the place in the op's order where a normalised image is."""
        self._check_floats(images, labels)
        size, dtype = tuple(images.shape[2:]), self.dtype or images.dtype
        if self.training:
            plan = self._next_plan(len(images), size, size, images.device)
            x = images.permute(0, 2, 3, 1).float()  # (B, H, W, C)
            if self.recipe.reprob:
                x = erase(x, plan.erase, plan.noise_key, plan.remode)
            images = mix(x, plan.partner, plan.lam, plan.cut).permute(0, 3, 1, 2)
        else:
            plan = centred_plan(torch.arange(len(images), device=images.device), size, size)
        format = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(dtype).contiguous(memory_format=format), self._targets(labels, plan)

    def _check_floats(self, images: Tensor, labels: Tensor) -> None:
        early = [name for name in TRANSFORMS if name not in AFTER_NORMALISATION
                 and getattr(self.recipe, name) != getattr(Recipe(), name)]  # fmt: skip
        if self.training and early:
            raise ValueError(f"BatchAugment: {', '.join(early)} come before the normalisation and need uint8 images, "
                             f"got {images.dtype}. Pass uint8 images, or leave these to what made the floats.")
        if self.recipe.reprob and images.shape[1] != 3:
            raise ValueError(f"BatchAugment: erasing needs images (B, 3, H, W), got {tuple(images.shape)}.")
        if self.size is not None and output_size(images, self.size) != tuple(images.shape[2:]):
            raise ValueError(f"BatchAugment: float images keep their size, {images.shape[2]}x{images.shape[3]}. Pass "
                             "uint8 images to crop, or leave size out.")
        if labels.device != images.device:
            raise ValueError(f"BatchAugment: labels must be on {images.device} like the images, got {labels.device}.")
        numbers = labels.dim() == 1 and labels.device.type == "cpu"
        if numbers and not ((labels >= 0) & (labels < self.num_classes)).all():
            raise ValueError(f"BatchAugment: labels must be in [0, {self.num_classes - 1}], got {labels.tolist()}.")

    def _targets(self, labels: Tensor, plan: Plan) -> Tensor:
        """(B, K) smoothed and mixed; labels: (B,) or (B, K)."""
        smoothing = self._smoothing()
        if labels.dim() == 1:
            return mixed_targets(labels, plan.partner, plan.lam, self.num_classes, smoothing)
        towards = 0.5 if self.multi_label else 1 / self.num_classes
        return mix_targets(labels.float() * (1 - smoothing) + smoothing * towards, plan.partner, plan.lam)

    def _smoothing(self) -> float:
        return self.smoothing if self.training else 0.0

    def _next_plan(self, B: int, source: tuple[int, int], size: tuple[int, int], device: torch.device) -> Plan:
        """The plan of the next B positions of the epoch; positions start at a multiple of B, as sample_plan wants."""
        first = -(-self.position // max(B, 1)) * B
        self.position = first + B
        recipe = self.recipe if self.mixup_enabled else replace(self.recipe, mixup=0.0, cutmix=0.0, cutmix_minmax=None)
        worker = get_worker_info()
        seed = self.seed if worker is None else self.seed + worker.seed
        whose = (recipe, B, source, size, device, seed, self.epoch)
        if self._drawn is None or self._drawn[0] != whose or not 0 <= first - self._drawn[1] < DRAWN_AHEAD * B:
            index = torch.arange(DRAWN_AHEAD * B, device=device) % max(B, 1)
            plan = sample_plan(recipe, index, seed, self.epoch, max(B, 1), size, first, device, source)
            self._drawn = whose, first, plan
        start = first - self._drawn[1]
        return self._drawn[2][start : start + B]
