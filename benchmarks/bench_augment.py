"""Images per second of augmentation: ours against torchvision, kornia, timm's mixing, and the memory's speed.

What is timed stands in cpu/augment.py, all of it on one core. Each peer's rounds alternate with ours, so that a busy
machine slows both; the ratio of the medians is printed and stands in `extra_info` as `ours_times_faster`, beside the
rates. `compare.py --parts augment` is the short form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import pytest
import torch
from cpu.augment import (COPIED, FULL, OURS, PEERS, RRC, B, Work, copies, flip_mix, images_of, kornia_rrc, one_thread,
                         ours, torchvision_per_image, torchvision_rrc)

from deit_fast.ops.augment import OP


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    with one_thread():
        yield


def require(package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed (pip install deit_fast[bench])")


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
    n = B if backend == "reference" else OURS if size == 32 else 256
    benchmark.group = f"augment {size} px, full recipe"
    benchmark.pedantic(ours(FULL, images, labels, n, B if size == 32 else 32, backend), rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(images_per_second=n / benchmark.stats.stats.median, threads=threads)


@pytest.mark.parametrize("peer", PEERS)
def test_peers(benchmark, capsys, peer: str) -> None:
    require_cpu()
    package, make, recipe = PEERS[peer]
    require(package)
    benchmark.group = f"augment 32 px, {'full recipe' if recipe is FULL else 'mixing per sample'}"
    inputs = images_of(32)
    compare(benchmark, capsys, peer, make(*inputs, B), B, ours(recipe, *inputs, OURS), OURS, 9)


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
    require(name.partition(" ")[0])
    benchmark.group = f"augment {source} to 224 px: resized crop, flip, normalise"
    images, labels = images_of(source, 64)
    compare(benchmark, capsys, f"{name}, resized crop {source} to 224 px", peer(images, 32, 224), 32,
            ours(RRC, images, labels, 64, 32, size=224), 64, 5)


@pytest.mark.parametrize("copy", ["copy_", "clone"])
def test_memory_speed(benchmark, capsys, copy: str) -> None:
    """flip + mix + normalise against copying the same bytes: two uint8 reads and one float32 write per value."""
    require_cpu()
    benchmark.group = "augment 32 px, flip + mix + normalise"
    images, labels = images_of(32, COPIED)
    compare(benchmark, capsys, f"{copy} of the same bytes", copies(images)[copy], COPIED, flip_mix(images, labels),
            COPIED, 30)
