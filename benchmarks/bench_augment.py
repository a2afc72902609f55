"""Images per second of augmentation: ours against torchvision, kornia, timm's mixing, and the memory's speed.

The recipe is everything at once (crop with padding, flip, color jitter, normalise, erasing by noise, MixUp or CutMix
per sample), on one core for everyone: torchvision's per-image pipeline uses one however many there are. Ours draws its
plans within the measured time. Each peer's rounds alternate with ours, so that a busy machine slows both; the ratio of
the medians is printed and stands in `extra_info` as `ours_times_faster`, beside the rates.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from statistics import median

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from deit_fast import ops
from deit_fast.data.augmentation import Recipe, sample_plan
from deit_fast.ops.augment import OP

MEAN, STD, K = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 10
FULL = Recipe(crop_pad=4, hflip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, reprob=0.25, mixup=0.8, cutmix=1.0,
              mixup_mode="elem")
MIX = Recipe(mixup=0.8, cutmix=1.0, mixup_mode="elem")
FLIP_MIX = Recipe(hflip=0.5, mixup=0.8, mixup_mode="elem")
RRC = Recipe(rrc=True, interpolation="bicubic", hflip=0.5)
B = 256

Work = Callable[[], object]


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
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
    K_aug = pytest.importorskip("kornia.augmentation", reason="kornia is not installed (pip install deit_fast[bench])")
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
    K_aug = pytest.importorskip("kornia.augmentation", reason="kornia is not installed (pip install deit_fast[bench])")
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
    mixup_module = pytest.importorskip("timm.data.mixup", reason="timm is not installed (pip install deit_fast[bench])")
    mixup = mixup_module.Mixup(0.8, 1.0, mode="elem", label_smoothing=0.1, num_classes=K)
    x = images[:n].float()
    return lambda: mixup(x.clone(), labels[:n])


def compare(benchmark, capsys, name: str, peer: Work, peer_images: int, our_work: Work, our_images: int,
            rounds: int) -> None:
    """Benchmarks `peer`, running ours before each of its rounds, and prints how many times faster ours is."""
    our_times: list[float] = []

    def before() -> None:
        start = time.perf_counter()
        our_work()
        our_times.append(time.perf_counter() - start)

    our_work()
    benchmark.pedantic(peer, setup=before, rounds=rounds, warmup_rounds=1)
    peer_rate, our_rate = peer_images / benchmark.stats.stats.median, our_images / median(our_times)
    benchmark.extra_info.update(images_per_second=peer_rate, ours_images_per_second=our_rate,
                                ours_times_faster=our_rate / peer_rate)
    with capsys.disabled():
        print(f"\n  {name}: {peer_rate:,.0f} img/s, ours {our_rate:,.0f}: {our_rate / peer_rate:.2f} x")


def require_cpu() -> None:
    if OP.why_not_here("cpu"):
        pytest.skip(OP.why_not_here("cpu"))


@pytest.mark.parametrize("threads", sorted({1, torch.get_num_threads()}))
@pytest.mark.parametrize(("backend", "size"), [("cpu", 32), ("cpu", 224), ("reference", 32)])
def test_ours(benchmark, backend: str, size: int, threads: int) -> None:
    if backend == "cpu":
        require_cpu()
    torch.set_num_threads(threads)
    images, labels = images_of(size, 1024 if size == 32 else 64)
    n = B if backend == "reference" else 32 * B if size == 32 else 256
    benchmark.group = f"augment {size} px, full recipe"
    benchmark.pedantic(ours(FULL, images, labels, n, B if size == 32 else 32, backend), rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(images_per_second=n / benchmark.stats.stats.median, threads=threads)


def test_torchvision(benchmark, capsys) -> None:
    require_cpu()
    benchmark.group = "augment 32 px, full recipe"
    inputs = images_of(32)
    compare(benchmark, capsys, "torchvision v2 per image", torchvision_per_image(*inputs, B), B,
            ours(FULL, *inputs, 32 * B), 32 * B, 7)


def test_torchvision_224(benchmark, capsys) -> None:
    require_cpu()
    benchmark.group = "augment 224 px, full recipe"
    inputs = images_of(224, 64)
    compare(benchmark, capsys, "torchvision v2 per image, 224 px", torchvision_per_image(*inputs, 32), 32,
            ours(FULL, *inputs, 256, 32), 256, 5)


@pytest.mark.parametrize("source", [256, 400])
@pytest.mark.parametrize(("name", "peer"), [("torchvision v2 per image", torchvision_rrc),
                                            ("kornia batched", kornia_rrc)])
def test_resized_crop(benchmark, capsys, name: str, peer: Callable[..., Work], source: int) -> None:
    require_cpu()
    benchmark.group = f"augment {source} to 224 px: resized crop, flip, normalise"
    images, labels = images_of(source, 64)
    compare(benchmark, capsys, f"{name}, resized crop {source} to 224 px", peer(images, 32, 224), 32,
            ours(RRC, images, labels, 64, 32, size=224), 64, 5)


def test_kornia(benchmark, capsys) -> None:
    require_cpu()
    benchmark.group = "augment 32 px, full recipe"
    inputs = images_of(32)
    compare(benchmark, capsys, "kornia batched", kornia_batched(*inputs, B), B, ours(FULL, *inputs, 32 * B), 32 * B, 9)


def test_timm_mixing(benchmark, capsys) -> None:
    require_cpu()
    benchmark.group = "augment 32 px, mixing per sample"
    inputs = images_of(32)
    compare(benchmark, capsys, "timm Mixup elem", timm_elem(*inputs, B), B, ours(MIX, *inputs, 32 * B), 32 * B, 9)


def test_memory_speed(benchmark, capsys) -> None:
    """flip + mix + normalise against copying the same bytes: two uint8 reads and one float32 write per image."""
    require_cpu()
    benchmark.group = "augment 32 px, flip + mix + normalise"
    n = 1024
    inputs = images_of(32, n)
    plan = sample_plan(FLIP_MIX, torch.arange(n), 0, 0, n, 32)
    source = torch.zeros(n * 3 * 32 * 32 * (2 + 4) // 2, dtype=torch.uint8)  # reads and writes as many bytes in all
    compare(benchmark, capsys, "copy of the same bytes", source.clone, n,
            lambda: ops.augment(*inputs, plan, MEAN, STD, K, backend="cpu"), n, 30)
