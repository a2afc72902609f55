"""What is drawn (`Recipe`) and what was drawn (`Plan`) for data augmentation.

Augmentation is split in two: sampling turns a recipe into a plan, a table with one row per sample, and `ops.augment`
applies a plan to images. A plan is plain data: it can be printed, sliced, moved to another device and replayed, and
every backend that is given the same plan must produce the same pixels, which is what makes an augmentation kernel
testable at all.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

NEUTRAL_FACTOR = 1 << 16  # 1.0 in the 16.16 fixed-point format of Plan.jitter
MAX_FACTOR = 64 << 16  # 255 times this, plus as much again, still fits an int32: the kernels' arithmetic
MIXUP_MODES = ("batch", "pair", "elem")
ERASE_MODES = ("pixel", "const")


@dataclass(frozen=True)
class Recipe:
    """What is drawn for every sample; the defaults draw nothing.

    crop_pad: shift by a random crop of the image padded by this many black pixels (torchvision's RandomCrop). hflip:
    its probability. brightness, contrast, saturation: a factor from U(max(0, 1 - x), 1 + x) each, applied in random
    order (torchvision's ColorJitter). reprob: probability of random erasing, by N(0, 1) noise (remode "pixel") or the
    mean color ("const"), in 1 to `recount` boxes. mixup, cutmix: the alphas of Beta(alpha, alpha); cutmix_minmax: the
    range of the CutMix box's sides as fractions of the image's, instead of cutmix's alpha. mixup_prob: probability of
    mixing at all; mixup_switch_prob: of CutMix when both are on. mixup_mode: one draw per "batch", per "pair" or per
    "elem" (timm's Mixup).
    """

    crop_pad: int = 0
    hflip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, float] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"

    def __post_init__(self) -> None:
        for name in ("hflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            _require(0.0 <= getattr(self, name) <= 1.0, name, "a probability in [0, 1]", getattr(self, name))
        for name in ("brightness", "contrast", "saturation"):
            _require(0.0 <= getattr(self, name) <= 63.0, name, "in [0, 63]", getattr(self, name))
        for name in ("mixup", "cutmix"):
            _require(0.0 <= getattr(self, name) <= 1e4, name, "an alpha in [0, 1e4]", getattr(self, name))
        _require(self.crop_pad >= 0, "crop_pad", "0 or more pixels", self.crop_pad)
        _require(self.recount >= 1, "recount", "1 or more boxes", self.recount)
        _require(self.remode in ERASE_MODES, "remode", f"one of {', '.join(ERASE_MODES)}", self.remode)
        _require(self.mixup_mode in MIXUP_MODES, "mixup_mode", f"one of {', '.join(MIXUP_MODES)}", self.mixup_mode)
        if self.cutmix_minmax is not None:
            low, high = self.cutmix_minmax
            _require(0.0 <= low <= high <= 1.0, "cutmix_minmax", "0 <= min <= max <= 1", self.cutmix_minmax)

    @property
    def mixes(self) -> bool:
        """Whether MixUp or CutMix is on."""
        return self.mixup > 0 or self.cuts

    @property
    def cuts(self) -> bool:
        """Whether CutMix is on."""
        return self.cutmix > 0 or self.cutmix_minmax is not None

    def at(self, epoch: int, mixing_off: int) -> Recipe:
        """The recipe of an epoch, counted from 0: without mixing from epoch `mixing_off` on (0: never without)."""
        if mixing_off == 0 or epoch < mixing_off:
            return self
        return replace(self, mixup=0.0, cutmix=0.0, cutmix_minmax=None)


@dataclass(frozen=True, eq=False)
class Plan:
    """The augmentation of B samples: tensors on one device, one row per sample, in the order in which they are applied.

    | name         | shape           | dtype   | range                                                | neutral        |
    |--------------|-----------------|---------|------------------------------------------------------|----------------|
    | index        | (B,)            | int64   | row of images and labels, [0, M)                     |                |
    | crop         | (B, 2)          | int32   | source (y, x) of the output's (0, 0): [-H', H], [-W', W] | 0, 0       |
    | flip         | (B,)            | bool    | mirror left-right, after the crop                    | False          |
    | jitter_order | (B, 3)          | uint8   | permutation of 0 brightness, 1 contrast, 2 saturation | 0, 1, 2       |
    | jitter       | (B, 3)          | int32   | their factors (by kind, not by order), 16.16: [0, 64 * 65536] | 65536 |
    | erase        | (B, recount, 4) | int32   | boxes (y, x, h, w) inside the output; no area: nothing | 0, 0, 0, 0   |
    | noise_key    | (B,)            | int64   | Philox key of remode "pixel"                         |                |
    | partner      | (B,)            | int64   | position of the mixing partner in this batch, [0, B) | own position   |
    | lam          | (B,)            | float32 | weight of the own image and label, [0, 1]            | 1              |
    | cut          | (B, 4)          | int32   | box (y, x, h, w) of the partner; no area: MixUp      | 0, 0, 0, 0     |

    Outside the source everything is black (zero before normalisation). `remode` holds for the whole plan. With a cut,
    lam only weighs the labels: 1 - area / (H' W').
    """

    index: Tensor  # (B,)
    crop: Tensor  # (B, 2)
    flip: Tensor  # (B,)
    jitter_order: Tensor  # (B, 3)
    jitter: Tensor  # (B, 3)
    erase: Tensor  # (B, recount, 4)
    noise_key: Tensor  # (B,)
    partner: Tensor  # (B,)
    lam: Tensor  # (B,)
    cut: Tensor  # (B, 4)
    remode: str = "pixel"

    def __len__(self) -> int:
        return self.index.shape[0]

    def __getitem__(self, rows: slice) -> Plan:
        """The plan of these rows: of one batch, when they are `slice(k * batch_size, (k + 1) * batch_size)`."""
        if not isinstance(rows, slice):
            raise TypeError(f"a plan is cut by slices, plan[0:64], got {type(rows).__name__}.")
        return Plan(**{name: tensor[rows] for name, tensor in self.tensors().items()}, remode=self.remode)

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device."""
        return Plan(**{name: tensor.to(device) for name, tensor in self.tensors().items()}, remode=self.remode)

    def tensors(self) -> dict[str, Tensor]:
        """The plan's tensors by name, in the table's order."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "remode"}


def neutral_plan(index: Tensor, device: torch.device | str | None = None) -> Plan:
    """The plan that leaves the images of `index` as they are: what evaluation uses.

    index: (B,) int64.
    """
    device = index.device if device is None else torch.device(device)
    B = index.shape[0]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    return Plan(
        index=index.to(device),
        crop=zeros(B, 2),
        flip=torch.zeros(B, dtype=torch.bool, device=device),
        jitter_order=torch.arange(3, dtype=torch.uint8, device=device).repeat(B, 1),
        jitter=torch.full((B, 3), NEUTRAL_FACTOR, dtype=torch.int32, device=device),
        erase=zeros(B, 1, 4),
        noise_key=torch.zeros(B, dtype=torch.int64, device=device),
        partner=torch.arange(B, device=device),
        lam=torch.ones(B, device=device),
        cut=zeros(B, 4),
    )


def _require(condition: bool, name: str, what: str, got: object) -> None:
    if not condition:
        raise ValueError(f"Recipe: {name} must be {what}, got {got}.")
