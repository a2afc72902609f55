"""RandAugment and TrivialAugment on uint8 images, by torchvision, drawn per position in the epoch.

Policies (`--aa`):

- `ra`: torchvision's RandAugment as its references use it, 2 of 14 ops at level 9 of 30.
- `ta_wide`: torchvision's TrivialAugmentWide, one op at a random level.
- `rand-m9-mstd0.5-inc1` and its kind: timm's notation. n (2) ops with replacement, each applied with probability p
  (0.5) at magnitude N(m, mstd) clamped to [0, 10], empty space filled with the data set's mean.

timm's notation is served by torchvision's ops, so it is not timm's RandAugment exactly. Same: shear, rotation, color,
contrast, brightness, sharpness, solarize and translation (within 1 %) have the same range, m of 10 being level 3 m of
30. Different: Invert and SolarizeAdd are missing and Identity is there (14 ops against 15); posterize keeps 8 to 4
bits where timm's `inc` set keeps 4 to 0; magnitudes are rounded to 30 levels; interpolation is bilinear, timm's mixes
in bicubic; without `inc1` timm uses another set of ranges, here it makes no difference. Sections `t`, `w` and `mmax`
are refused.

torchvision draws from PyTorch's global generator. Here that generator is seeded per image from (data seed, epoch,
position) and put back afterwards, so the result depends neither on the number of workers nor on where a run was
resumed, and the main process's own stream (dropout) is left as it was.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from deit_fast.data.augmentation import Plan
from deit_fast.errors import ConfigError
from deit_fast.reference.geometry import geometry

TOP_LEVEL = 30  # torchvision counts levels 0..30
TIMM_TOP = 10.0  # timm counts magnitudes 0..10
KNOWN = "none, ra, ta_wide, or timm's rand-m9-n2-p0.5-mstd0.5-inc1 with m in 0..10"


class Policy:
    """A callable (3, H, W) uint8 -> (3, H, W) uint8 that draws from PyTorch's global generator."""

    def __init__(self, name: str, mean: tuple[float, ...]) -> None:
        from torchvision.transforms import InterpolationMode, v2

        self.name = name
        bilinear = InterpolationMode.BILINEAR
        self.layers = None
        if name == "ra":
            self.transform = v2.RandAugment(interpolation=bilinear)
        elif name == "ta_wide":
            self.transform = v2.TrivialAugmentWide(interpolation=bilinear)
        else:
            self.layers, self.prob, self.magnitude, self.magnitude_std = _parse_rand(name)
            fill = [round(255 * channel) for channel in mean]
            self.transform = v2.RandAugment(num_ops=1, num_magnitude_bins=31, interpolation=bilinear, fill=fill)

    def __call__(self, image: Tensor) -> Tensor:
        if self.layers is None:
            return self.transform(image)
        for _ in range(self.layers):
            gate, noise = torch.rand(()).item(), torch.randn(()).item()
            if gate < self.prob:
                magnitude = min(max(self.magnitude + self.magnitude_std * noise, 0.0), TIMM_TOP)
                self.transform.magnitude = round(magnitude / TIMM_TOP * TOP_LEVEL)
                image = self.transform(image)
        return image


def create_policy(name: str | None, mean: tuple[float, ...]) -> Policy | None:
    """The policy of that name, None for "none"; ConfigError for a name that is not known. mean fills empty space."""
    return None if name in (None, "", "none") else Policy(name, mean)


def _parse_rand(name: str) -> tuple[int, float, float, float]:
    """(ops per image, probability of each, magnitude, its standard deviation) of timm's notation."""
    values = {"n": 2.0, "p": 0.5, "m": TIMM_TOP, "mstd": 0.0, "inc": 1.0}  # timm's defaults, but for inc
    head, *sections = name.split("-")
    if head != "rand":
        raise ConfigError(f"--aa {name}: unknown policy. Known: {KNOWN}.")
    for section in sections:
        found = re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", section)
        if found is None:
            raise ConfigError(f"--aa {name}: section {section!r} is not understood. Known: {KNOWN}.")
        values[found[1]] = float(found[2])
    limits = {"n": 16.0, "p": 1.0, "m": TIMM_TOP, "mstd": TIMM_TOP, "inc": 1.0}
    for key, top in limits.items():
        if values[key] > top or (key in ("n", "inc") and values[key] % 1):
            raise ConfigError(f"--aa {name}: {key}{values[key]:g} is out of range (at most {top:g}). Known: {KNOWN}.")
    return int(values["n"]), values["p"], values["m"], values["mstd"]


class PolicyBatches(Dataset):
    """Item k: the images of batch k of an epoch, (B, 3, *size) uint8, after crop, flips and policy, DeiT's order.

    batches: whose item k is the images of batch k, (B, 3, H, W) uint8. plan: what happens to them, N samples on the
    CPU. Its geometry must not be applied again (`Plan.without_geometry`). Runs in worker processes: it uses plain torch and
    torchvision only, none of our kernels, because OpenMP does not survive the fork.
    """

    def __init__(self, batches: Dataset, plan: Plan, policy: Policy, batch_size: int, size: tuple[int, int],
                 data_seed: int, epoch: int) -> None:
        self.batches, self.plan, self.policy = batches, plan, policy
        self.batch_size, self.size = batch_size, size
        self.data_seed, self.epoch = data_seed, epoch

    def __len__(self) -> int:
        return -(-len(self.plan) // self.batch_size)

    def __getitem__(self, batch: int) -> Tensor:
        first = batch * self.batch_size
        last = min(first + self.batch_size, len(self.plan))
        with torch.random.fork_rng(devices=[]), _one_thread():
            rows = self.plan[first:last]
            own = replace(rows, index=torch.arange(len(rows)))
            images = geometry(self.batches[batch], own, *self.size).permute(0, 3, 1, 2).contiguous()
            for image, position in zip(images, range(first, last)):  # (3, *size)
                torch.default_generator.manual_seed(position_seed(self.data_seed, self.epoch, position))
                image.copy_(self.policy(image))
        return images


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread inside, as in a worker: at 32 pixels 2 threads ran 530 images/s, 1 thread 6,700 (2 busy cores)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def position_seed(data_seed: int, epoch: int, position: int) -> int:
    """A 63-bit seed that is a pure function of its arguments and differs between them."""
    packed = struct.pack("<QQQ", data_seed % 2**64, epoch, position)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1
