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
MAX_SHIFT = 1 << 15  # half a turn of the color wheel
MIXUP_MODES = ("batch", "pair", "elem")
ERASE_MODES = ("pixel", "rand", "const")
PADDING_MODES = ("constant", "reflect")
INTERPOLATIONS = ("bilinear", "bicubic", "random")


@dataclass(frozen=True)
class Recipe:
    """What is drawn for every sample; the defaults draw nothing.

    crop_pad: shift by a random crop of the image padded by this many pixels, black ones (padding_mode "constant") or
    the image mirrored at its edge ("reflect"), as torchvision's RandomCrop. rrc: instead, a random part of the image,
    with a share of its area from U(scale) and a log aspect ratio from U(log ratio), resized to the output by
    `interpolation`, which "random" draws for each image (torchvision's and timm's RandomResizedCrop). hflip, vflip:
    probability of mirroring left-right, top-bottom. alternating_flip: hflip is drawn for an image in the first epoch
    only, and every next epoch shows it the other way round (airbench: two epochs in a row never see the same side).
    brightness, contrast, saturation: a factor from U(max(0, 1 - x), 1 + x) each; hue: a shift from U(-x, x) of a turn
    of the color wheel; all in random order (torchvision's ColorJitter). grayscale: probability of losing all color
    after that. reprob: probability of random erasing in 1 to `recount` boxes, by N(0, 1) noise (remode "pixel"), one
    N(0, 1) color per box ("rand") or the mean color ("const"). mixup, cutmix: the alphas of Beta(alpha, alpha);
    cutmix_minmax: the range of the CutMix box's sides as fractions of the image's, instead of cutmix's alpha.
    correct_lam: whether CutMix's lambda becomes what the clipped box leaves of the image, not what was drawn (boxes of
    cutmix_minmax always set it). mixup_prob: probability of mixing at all; mixup_switch_prob: of CutMix when both are
    on. mixup_mode: one draw per "batch", per "pair" or per "elem" (timm's Mixup).
    """

    crop_pad: int = 0
    padding_mode: str = "constant"
    rrc: bool = False
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    hflip: float = 0.0
    alternating_flip: bool = False
    vflip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, float] | None = None
    correct_lam: bool = True
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "grayscale", "reprob", "mixup_prob", "mixup_switch_prob"):
            _require(0.0 <= getattr(self, name) <= 1.0, name, "a probability in [0, 1]", getattr(self, name))
        for name in ("brightness", "contrast", "saturation"):
            _require(0.0 <= getattr(self, name) <= 63.0, name, "in [0, 63]", getattr(self, name))
        _require(0.0 <= self.hue <= 0.5, "hue", "in [0, 0.5]", self.hue)
        for name in ("mixup", "cutmix"):
            _require(0.0 <= getattr(self, name) <= 1e4, name, "an alpha in [0, 1e4]", getattr(self, name))
        _require(self.crop_pad >= 0, "crop_pad", "0 or more pixels", self.crop_pad)
        _require(self.recount >= 1, "recount", "1 or more boxes", self.recount)
        for name, known in (("remode", ERASE_MODES), ("mixup_mode", MIXUP_MODES), ("padding_mode", PADDING_MODES),
                            ("interpolation", INTERPOLATIONS)):
            _require(getattr(self, name) in known, name, f"one of {', '.join(known)}", getattr(self, name))
        _require(0.0 < self.scale[0] <= self.scale[1] <= 1.0, "scale", "0 < min <= max <= 1", self.scale)
        _require(1e-3 <= self.ratio[0] <= self.ratio[1] <= 1e3, "ratio", "1e-3 <= min <= max <= 1e3", self.ratio)
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

    @property
    def jitters(self) -> bool:
        """Whether brightness, contrast, saturation or hue changes."""
        return bool(self.brightness or self.contrast or self.saturation or self.hue)

    @property
    def draws(self) -> bool:
        """Whether an image looks otherwise from epoch to epoch."""
        return bool(self.crop_pad or self.rrc or self.hflip or self.vflip or self.jitters or self.grayscale
                    or self.reprob or self.mixes)

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
    | resized_crop | (B, 4), (0, 4)  | int32   | source box (y, x, h, w) resized to the output; no area: crop | (0, 4) |
    | bicubic      | (B,)            | bool    | resized by bicubic, not bilinear interpolation       | False          |
    | crop         | (B, 2)          | int32   | source (y, x) of the output's (0, 0): [-H', H], [-W', W] | 0, 0       |
    | flip         | (B,)            | bool    | mirror left-right, after the crop                    | False          |
    | vflip        | (B,)            | bool    | mirror top-bottom, after the crop                    | False          |
    | jitter_order | (B, J), J 3, 4  | uint8   | permutation: 0 brightness, 1 contrast, 2 saturation, 3 hue | 0, 1, 2  |
    | jitter       | (B, J)          | int32   | by kind, not by order, 16.16: three factors, [0, 64 * 65536] | 65536  |
    |              |                 |         | and the hue's shift in turns, [-32768, 32768]        | 0              |
    | grayscale    | (B,)            | bool    | lose all color, after the jitter                     | False          |
    | erase        | (B, recount, 4) | int32   | boxes (y, x, h, w) inside the output; no area: nothing | 0, 0, 0, 0   |
    | noise_key    | (B,)            | int64   | Philox key of remode "pixel" and "rand"              |                |
    | partner      | (B,)            | int64   | position of the mixing partner in this batch, [0, B) | own position   |
    | lam          | (B,)            | float32 | weight of the own image and label, [0, 1]            | 1              |
    | cut          | (B, 4)          | int32   | box (y, x, h, w) of the partner; no area: MixUp      | 0, 0, 0, 0     |

    A plan that resizes nothing has no rows of `resized_crop`, one that shifts no hue three columns of jitter (J 3): so
    kernels know it without reading a value. `remode` and `padding_mode` hold for the whole plan: how boxes are erased,
    and what a crop sees outside the source, black (zero before normalisation) or the source mirrored at its edge, again
    and again. Resizing sees nothing outside its box. With a cut, lam only weighs the labels: 1 - area / (H' W').
    """

    index: Tensor  # (B,)
    resized_crop: Tensor  # (B, 4) or (0, 4)
    bicubic: Tensor  # (B,)
    crop: Tensor  # (B, 2)
    flip: Tensor  # (B,)
    vflip: Tensor  # (B,)
    jitter_order: Tensor  # (B, J)
    jitter: Tensor  # (B, J)
    grayscale: Tensor  # (B,)
    erase: Tensor  # (B, recount, 4)
    noise_key: Tensor  # (B,)
    partner: Tensor  # (B,)
    lam: Tensor  # (B,)
    cut: Tensor  # (B, 4)
    remode: str = "pixel"
    padding_mode: str = "constant"

    def __len__(self) -> int:
        return self.index.shape[0]

    def __getitem__(self, rows: slice) -> Plan:
        """The plan of these rows: of one batch, when they are `slice(k * batch_size, (k + 1) * batch_size)`."""
        if not isinstance(rows, slice):
            raise TypeError(f"a plan is cut by slices, plan[0:64], got {type(rows).__name__}.")
        return replace(self, **{name: tensor[rows] for name, tensor in self.tensors().items()})

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def without_geometry(self) -> Plan:
        """The rest of the plan for images that have been cropped, resized and flipped already."""
        done = neutral_plan(self.index)
        return replace(self, resized_crop=done.resized_crop, bicubic=done.bicubic, crop=done.crop, flip=done.flip,
                       vflip=done.vflip)

    def tensors(self) -> dict[str, Tensor]:
        """The plan's tensors by name, in the table's order."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def neutral_plan(index: Tensor, device: torch.device | str | None = None) -> Plan:
    """The plan that leaves the images of `index` as they are: what evaluation uses.

    index: (B,) int64.
    """
    device = index.device if device is None else torch.device(device)
    B = index.shape[0]

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return Plan(
        index=index.to(device),
        resized_crop=zeros(0, 4),
        bicubic=zeros(B, dtype=torch.bool),
        crop=zeros(B, 2),
        flip=zeros(B, dtype=torch.bool),
        vflip=zeros(B, dtype=torch.bool),
        jitter_order=torch.arange(3, dtype=torch.uint8, device=device).repeat(B, 1),
        jitter=torch.full((B, 3), NEUTRAL_FACTOR, dtype=torch.int32, device=device),
        grayscale=zeros(B, dtype=torch.bool),
        erase=zeros(B, 1, 4),
        noise_key=zeros(B, dtype=torch.int64),
        partner=torch.arange(B, device=device),
        lam=torch.ones(B, device=device),
        cut=zeros(B, 4),
    )


def _require(condition: bool, name: str, what: str, got: object) -> None:
    if not condition:
        raise ValueError(f"Recipe: {name} must be {what}, got {got}.")
