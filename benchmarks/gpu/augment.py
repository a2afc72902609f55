"""Augmentation on a GPU: right bits, no waiting, its share of the copy bandwidth, its peers, and the loader beside a
training step.

Peers run eagerly and under `torch.compile`; since they draw on the host they cannot be captured, so they are held
against our eager time. torchvision v2 on a batch draws one crop, flip and lambda for all of it, kornia one per image
but for the mixing's, timm mixes only: none of them does the whole of ours.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.transforms import v2

from deit_fast import ops
from deit_fast.data.augmentation import Plan, Recipe, sample_plan
from deit_fast.data.loader import TrainLoader
from deit_fast.ops.augment import OP
from syncs import CountSyncs

from .training import made_up, trainer_figures

if TYPE_CHECKING:
    from .machine import Machine, Row

ROOT = Path(__file__).resolve().parents[2]
MEAN, STD, K = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 10
PLAIN = Recipe(crop_pad=4, hflip=0.5, mixup=0.8, mixup_mode="elem")
CONTRAST = Recipe(crop_pad=4, hflip=0.5, contrast=0.4, mixup=0.8, mixup_mode="elem")
FULL = Recipe(crop_pad=4, hflip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, reprob=0.25, mixup=0.8, cutmix=1.0,
              mixup_mode="elem")
RESIZED = Recipe(rrc=True, hflip=0.5, mixup=0.8, mixup_mode="elem")
SIZES = ((32, 4096, 50_000), (224, 256, 1_280))  # side, batch, images resident: more than the second-level cache holds


def augmentation(machine: Machine) -> Iterator[Row]:
    """Tests, synchronisations, speeds by size and recipe, an epoch of CIFAR-10, the loader beside a training step."""
    yield tests(machine)
    copied = copy_speed(machine)
    yield "copy", {"gigabytes_per_second": copied}
    for side, B, M in ((8, 2, 5),) if machine.rehearse else SIZES:
        images = torch.randint(256, (M, 3, side, side), dtype=torch.uint8, device=machine.device)
        labels = torch.randint(K, (M,), device=machine.device)
        for name, recipe in (("crop, flip, mix", PLAIN), ("with contrast", CONTRAST), ("full recipe", FULL),
                             ("resized crop, flip, mix", RESIZED)):
            drawn = sample_plan(recipe, torch.arange(M // B * B) * 37 % M, 0, 0, B, side, device=machine.device)
            plans = [drawn[start:start + B] for start in range(0, len(drawn), B)]
            plan = plans[0]
            row: dict[str, float | str] = {}
            for backend in usable(machine, images, labels, plan):
                call = partial(apply, machine, images, labels, plan, backend)
                row[f"{backend} syncs"] = synchronisations(machine, call)
                row |= speeds(machine, backend, images, labels, plans, copied)
            if recipe is PLAIN:
                others = peers(machine, images[:B], labels[:B])
                fastest = min((value for name, value in others.items() if name.endswith(" ms")), default=float("nan"))
                row |= others | {f"fastest peer / {backend}": fastest / row[f"{backend} eager ms"]
                                 for backend in usable(machine, images, labels, plan)}
            yield f"{name}, {side} px, batch {B}", row
    yield epoch(machine)
    for B in machine.batches:
        yield loader_beside_a_step(machine, B)


def tests(machine: Machine) -> Row:
    """The op's tests on this machine, a skip of Triton, or of CUDA where it is built, counted as a failure.

    They replay a CUDA graph too.
    """
    cuda = OP.why_not_here("cuda")
    command = [sys.executable, "-m", "pytest", "tests/test_triton_augment.py", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "slices"] if machine.rehearse else ["tests/test_augment.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=6 * 60, check=False,
                            env={**os.environ, "DEIT_FAST_REQUIRE": "triton" if cuda else "triton,cuda",
                                 "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])})
    lines = result.stdout.strip().splitlines()
    return "tests", {"exit": result.returncode, "result": lines[-1] if lines else result.stderr[-300:],
                     "failed": [line for line in lines if line.startswith("FAILED")][:40], "cuda": cuda or "usable"}


def copy_speed(machine: Machine) -> float:
    """Gigabytes per second, read and written, of a copy of one gibibyte."""
    x = torch.empty(2**20 if machine.rehearse else 2**30, dtype=torch.uint8, device=machine.device)
    y = torch.empty_like(x)
    return 2e-6 * x.numel() / machine.milliseconds(lambda: y.copy_(x))


def apply(machine: Machine, images: Tensor, labels: Tensor, plan: Plan,
          backend: str = "triton") -> tuple[Tensor, Tensor]:
    """The plan's batch in bf16 (fp32 in a rehearsal, whose interpreter has no bf16)."""
    return ops.augment(images, labels, plan, MEAN, STD, K, smoothing=0.1, dtype=machine.variant.parameter,
                       backend=backend)


def usable(machine: Machine, images: Tensor, labels: Tensor, plan: Plan) -> list[str]:
    """The native GPU backends that serve this plan here."""
    call = (images, labels, list(plan.tensors().values()), plan.remode, plan.padding_mode, MEAN, STD, K,
            *images.shape[2:], 0.1, machine.variant.parameter, False)
    return [name for name in ("triton", "cuda") if OP.why_not(name, *call) is None]


def synchronisations(machine: Machine, call: Callable[[], object]) -> int | str:
    """How often a warm call waits for the device: 0, or what CUDA says of the first time."""
    call()
    if machine.rehearse:
        with CountSyncs() as counted:
            call()
        return counted.reads
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0


def speeds(machine: Machine, backend: str, images: Tensor, labels: Tensor, plans: list[Plan],
           copied: float) -> dict[str, float]:
    """Milliseconds of a batch, and the share of the copy bandwidth: two reads and a write per pixel.

    A graph makes a batch of every plan, each from other images, and keeps them all: more than the second-level cache
    holds, so that nothing is read or written there only. Contrast's mean counts as a read more where the image does
    not stay on chip, past 2,048 pixels.
    """
    def call(plan: Plan = plans[0]) -> tuple[Tensor, Tensor]:
        return apply(machine, images, labels, plan, backend)

    out, _ = call()
    pixels = out.numel()
    second_pass = bool((plans[0].jitter[:, 1] != 1 << 16).any()) and pixels // len(plans[0]) > 3 * 2048
    moved = pixels * (2 + second_pass + out.element_size())  # bytes
    graph = machine.milliseconds(lambda: [call(plan) for plan in plans]) / len(plans)
    return {f"{backend} ms": graph, f"{backend} share of copy": 1e-6 * moved / graph / copied,
            f"{backend} eager ms": eager_milliseconds(machine, call)}


def eager_milliseconds(machine: Machine, call: Callable[[], object], rounds: int = 20) -> float:
    """Median time of a call without a graph, launches and draws included."""
    times = []
    for _ in range(1 if machine.rehearse else 3 + rounds):
        start = time.perf_counter()
        call()
        if not machine.rehearse:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:] or times)


def peers(machine: Machine, images: Tensor, labels: Tensor) -> dict[str, float | str]:
    """Eager milliseconds of crop + flip + normalise + MixUp by others, compiled too; images (B, 3, H, W) uint8."""
    row: dict[str, float | str] = {}
    dtype = machine.variant.parameter
    for name, make in (("torchvision", torchvision_peer), ("kornia", kornia_peer), ("timm", timm_peer)):
        if importlib.util.find_spec(name) is None:
            row[name] = "not installed"
            continue
        peer = make(images, labels, dtype)
        row[f"{name} ms"] = eager_milliseconds(machine, peer, rounds=5)
        if machine.rehearse or name == "timm":  # a loop over the batch's images: one graph per lambda
            continue
        try:
            row[f"{name} compiled ms"] = eager_milliseconds(machine, torch.compile(peer), rounds=5)
        except RuntimeError as error:
            row[f"{name} compiled"] = str(error).splitlines()[0]
        torch._dynamo.reset()
    return row


def torchvision_peer(images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    one = v2.Compose([v2.RandomCrop(images.shape[-1], padding=4), v2.RandomHorizontalFlip(),
                      v2.ToDtype(dtype, scale=True), v2.Normalize(MEAN, STD)])
    mix = v2.MixUp(alpha=0.8, num_classes=K)
    return lambda: mix(one(images), labels)


def kornia_peer(images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import kornia.augmentation as augmentations

        side = images.shape[-1]
        chain = torch.nn.Sequential(augmentations.RandomCrop((side, side), padding=4),
                                    augmentations.RandomHorizontalFlip(), augmentations.Normalize(MEAN, STD))
        mix = augmentations.RandomMixUpV2(p=1.0, data_keys=["input", "class"])
    return lambda: mix(chain(images.float() / 255), labels)[0].to(dtype)


def timm_peer(images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    from timm.data.mixup import Mixup

    even = len(images) // 2 * 2  # it refuses odd batches
    mix = Mixup(0.8, mode="elem", label_smoothing=0.1, num_classes=K)
    scale = torch.tensor(STD, device=images.device, dtype=dtype).mul(255).view(3, 1, 1)
    return lambda: mix(images[:even].to(dtype) / scale, labels[:even])


def epoch(machine: Machine) -> Row:
    """50,000 images of 32 px, full recipe, batches of 1,024 in one graph; drawing their plan apart."""
    M, side, B = (6, 8, 2) if machine.rehearse else (50_000, 32, 1024)
    images = torch.randint(256, (M, 3, side, side), dtype=torch.uint8, device=machine.device)
    labels, index = torch.randint(K, (M,), device=machine.device), torch.arange(M, device=machine.device)

    def draw() -> Plan:
        return sample_plan(FULL, index, 0, 0, B, side, device=machine.device)

    plan = draw()

    def batches(backend: str) -> None:
        for start in range(0, M, B):
            apply(machine, images, labels, plan[start:start + B], backend)

    row = {"plan ms": eager_milliseconds(machine, draw)}
    for backend in usable(machine, images, labels, plan[:B]):
        row[f"{backend} ms"] = machine.milliseconds(partial(batches, backend))
    return f"epoch of {M} images, {side} px", row


def drain(loader: TrainLoader) -> None:
    """An epoch of its batches, used for nothing."""
    for _ in loader.epoch(0):
        pass


def loader_beside_a_step(machine: Machine, batch_size: int) -> Row:
    """Images per second of the loader alone, eagerly, with plans and launches, and of the report's training step."""
    split, _ = made_up(*((8 * batch_size, 8) if machine.rehearse else (45_000, 32)))
    step = trainer_figures(machine, batch_size, native=True, graphed=True)["images/s"]
    row = {"training step images/s": step}
    plan = sample_plan(FULL, torch.arange(1), 0, 0, 1, split.images.shape[-1], device=machine.device)
    for backend in usable(machine, split.images[:1].to(machine.device), split.labels[:1].to(machine.device), plan):
        loader = TrainLoader(split, FULL, MEAN, STD, K, batch_size, smoothing=0.1, device=machine.device,
                             dtype=machine.variant.parameter, backend=backend)
        milliseconds = eager_milliseconds(machine, partial(drain, loader), rounds=5)
        row[f"{backend} loader images/s"] = 1e3 * loader.images_per_epoch / milliseconds
        row[f"{backend} loader / step"] = row[f"{backend} loader images/s"] / step
    return f"loader beside a training step, batch {batch_size}", row
