"""Augmentation on a CPU: what is timed of ours, of torchvision, kornia and timm, and of copying memory; and the part of
compare.py about it.

The recipe is everything at once (crop with padding, flip, color jitter, normalise, erasing by noise, MixUp or CutMix
per sample). Ours draws its plans within the measured time.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision.transforms import v2

from deit_fast import ops
from deit_fast.data.augmentation import Recipe, sample_plan

from .timing import Candidates, median, ratio, take_turns

MEAN, STD, K = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 10
FULL = Recipe(crop_pad=4, hflip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, reprob=0.25, mixup=0.8, cutmix=1.0,
              mixup_mode="elem")
MIX = Recipe(mixup=0.8, cutmix=1.0, mixup_mode="elem")
FLIP_MIX = Recipe(hflip=0.5, mixup=0.8, mixup_mode="elem")
RRC = Recipe(rrc=True, interpolation="bicubic", hflip=0.5)
B = 256
OURS = 32 * B  # images of a turn of ours, B of a peer's
COPIED = 1024  # images whose bytes are copied

Work = Callable[[], object]


@contextmanager
def one_thread() -> Iterator[None]:
    """One core for everyone: torchvision's pipeline uses one however many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def images_of(size: int, n: int = 1024) -> tuple[Tensor, Tensor]:
    """(n, 3, size, size) uint8, noise, and (n,) labels."""
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8), torch.randint(K, (n,))


def ours(recipe: Recipe, images: Tensor, labels: Tensor, n: int, batch: int = B, backend: str | None = None,
         size: int | None = None) -> Work:
    """n images in batches, their plans included; size: of the output, default the images' own."""
    source = images.shape[-1]

    def work() -> None:
        plan = sample_plan(recipe, torch.arange(n) % len(images), 0, 0, batch, size or source, source_size=source)
        for start in range(0, n, batch):
            ops.augment(images, labels, plan[start:start + batch], MEAN, STD, K, size, 0.1, backend=backend)

    return work


def torchvision_rrc(images: Tensor, n: int, size: int) -> Work:
    """v2's RandomResizedCrop, flip and normalisation on one image at a time."""
    one = v2.Compose([v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(),
                      v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    return lambda: torch.stack([one(image) for image in images[:n]])


def kornia_rrc(images: Tensor, n: int, size: int) -> Work:
    """kornia's batched crop with a box per sample; bicubic, but not antialiased: it does less."""
    import kornia.augmentation as K_aug

    chain = torch.nn.Sequential(K_aug.RandomResizedCrop((size, size), resample="BICUBIC"), K_aug.RandomHorizontalFlip(),
                                K_aug.Normalize(MEAN, STD))
    return lambda: chain(images[:n].float() / 255)


def torchvision_per_image(images: Tensor, labels: Tensor, n: int) -> Work:
    """v2's transforms on one image at a time, then MixUp or CutMix on the batch."""
    one = v2.Compose([v2.RandomCrop(images.shape[-1], padding=4), v2.RandomHorizontalFlip(),
                      v2.ColorJitter(0.4, 0.4, 0.4), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
                      v2.RandomErasing(0.25, value="random")])
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=K), v2.CutMix(alpha=1.0, num_classes=K)])
    return lambda: mix(torch.stack([one(image) for image in images[:n]]), labels[:n])


def kornia_batched(images: Tensor, labels: Tensor, n: int) -> Work:
    """kornia's batched transforms with per-sample parameters; it erases with a constant, its erasing knows no noise."""
    import kornia.augmentation as K_aug

    size = images.shape[-1]
    chain = torch.nn.Sequential(K_aug.RandomCrop((size, size), padding=4), K_aug.RandomHorizontalFlip(),
                                K_aug.ColorJitter(0.4, 0.4, 0.4, 0.0), K_aug.Normalize(MEAN, STD),
                                K_aug.RandomErasing(p=0.25))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        mix = K_aug.RandomCutMixV2(p=1.0, data_keys=["input", "class"])
    return lambda: mix(chain(images[:n].float() / 255), labels[:n])


def timm_elem(images: Tensor, labels: Tensor, n: int) -> Work:
    """timm's Mixup in mode "elem" on normalised floats: mixing alone."""
    from timm.data.mixup import Mixup

    mixup = Mixup(0.8, 1.0, mode="elem", label_smoothing=0.1, num_classes=K)
    x = images[:n].float()
    return lambda: mixup(x.clone(), labels[:n])


def flip_mix(images: Tensor, labels: Tensor) -> Work:
    """Flip, mix and normalise all images at once, by a plan drawn beforehand."""
    n = len(images)
    plan = sample_plan(FLIP_MIX, torch.arange(n), 0, 0, n, images.shape[-1])
    return lambda: ops.augment(images, labels, plan, MEAN, STD, K, backend="cpu")


def copies(images: Tensor) -> Candidates:
    """Copies that read and write as many bytes as `flip_mix`, two uint8 reads and a float32 write of each value.

    Ours allocates its output, as `clone` does; `copy_` writes memory that was written before.
    """
    source = torch.zeros(images.numel() * (2 + 4) // 2, dtype=torch.uint8)
    target = torch.zeros_like(source).fill_(1)
    return {"copy_": lambda: target.copy_(source), "clone": source.clone}


PEERS = {  # name: package, what makes its work, our recipe
    "torchvision v2 per image": ("torchvision", torchvision_per_image, FULL),
    "kornia batched": ("kornia", kornia_batched, FULL),
    "timm Mixup elem": ("timm", timm_elem, MIX),
}


def compare_augment(rounds: int) -> None:
    """Prints how many times faster ours makes an image of 32 pixels than each peer, and its share of a copy's speed."""
    with one_thread():
        inputs = images_of(32)
        for title, recipe in (("full recipe", FULL), ("mixing alone", MIX)):
            print(f"\naugmentation at 32 px, {title}, one thread")
            candidates: Candidates = {"ours": ours(recipe, *inputs, OURS, backend="cpu")}
            for name, (package, make, theirs) in PEERS.items():
                if theirs is recipe and importlib.util.find_spec(package) is None:
                    print(f"  without {name}: {package} is not installed")
                elif theirs is recipe:
                    candidates[name] = make(*inputs, B)
            times = take_turns(candidates, rounds)
            print(f"  {'ours':26s}{OURS / median(times, 'ours'):10,.0f} images/s")
            for name in list(candidates)[1:]:
                print(f"  {name:26s}{B / median(times, name):10,.0f} images/s, "
                      f"ours {ratio(times, name, 'ours') * OURS / B:.2f} times as fast", flush=True)
        print("\nflip + mix + normalise at 32 px, one thread, against copying the same bytes")
        images, labels = images_of(32, COPIED)
        copied = copies(images)
        times = take_turns({"ours": flip_mix(images, labels), **copied}, 4 * rounds)
        moved = images.numel() * (2 + 4) / 1e9
        print(f"  {'ours':26s}{moved / median(times, 'ours'):10.2f} GB/s")
        for name in copied:
            print(f"  {name:26s}{moved / median(times, name):10.2f} GB/s, "
                  f"ours {ratio(times, name, 'ours'):.2f} of it", flush=True)
