"""Augmentation on a GPU: no waiting, its share of the copy bandwidth, its peers, the loader beside a training step.

Peers run eagerly and under `torch.compile`; since they draw on the host they cannot be captured, so they are held
against our eager time. torchvision v2 on a batch draws one crop, flip and lambda for all of it, kornia one per image
but for the mixing's, timm mixes only: none of them does the whole of ours.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor
from torchvision.transforms import v2

from deit_fast import ops
from deit_fast.data.augmentation import Plan, Recipe, sample_plan
from deit_fast.data.loader import TrainLoader
from deit_fast.ops.augment import OP
from syncs import CountSyncs

from .counts import Counts
from .machine import Machine
from .results import Contender, Figures
from .training import made_up, trainer_figures

MEAN, STD, K = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 10
PLAIN = Recipe(crop_pad=4, hflip=0.5, mixup=0.8, mixup_mode="elem")
CONTRAST = Recipe(crop_pad=4, hflip=0.5, contrast=0.4, mixup=0.8, mixup_mode="elem")
FULL = Recipe(crop_pad=4, hflip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, reprob=0.25, mixup=0.8, cutmix=1.0,
              mixup_mode="elem")
RESIZED = Recipe(rrc=True, hflip=0.5, mixup=0.8, mixup_mode="elem")
NATIVE = ("triton", "cuda")
SIZES = ((32, 4096, 50_000), (224, 256, 1_280))  # side, batch, images resident: more than the second-level cache holds


def augmentation(machine: Machine) -> Iterator[Contender]:
    """Synchronisations, speeds by size and recipe, an epoch of CIFAR-10, the loader beside a training step."""
    for side, B, M in ((8, 2, 5),) if machine.rehearse else SIZES:
        for name, recipe in (("crop, flip, mix", PLAIN), ("with contrast", CONTRAST), ("full recipe", FULL),
                             ("resized crop, flip, mix", RESIZED)):
            row = f"{name}, {side} px, batch {B}"
            for backend in NATIVE:
                yield Contender(row, backend, partial(batch_figures, machine, recipe, side, B, M, backend))
            if recipe is PLAIN:
                for peer in PEERS:
                    yield Contender(row, peer, partial(peer_figures, machine, side, B, peer, False))
                    if peer != "timm":  # a loop over the batch's images: one graph per lambda
                        yield Contender(row, f"{peer}, compiled", rank=1,
                                        measure=partial(peer_figures, machine, side, B, peer, True))
    for backend in NATIVE:
        yield Contender("epoch, full recipe", backend, partial(epoch, machine, backend))
    for B in machine.batches:
        for backend in NATIVE:
            yield Contender(f"loader beside a training step, batch {B}", backend,
                            partial(loader_beside_a_step, machine, B, backend))


@lru_cache(maxsize=1)
def pixels(machine: Machine, side: int, number: int) -> tuple[Tensor, Tensor]:
    """Random images (number, 3, side, side) uint8 on the device, and their labels."""
    return (torch.randint(256, (number, 3, side, side), dtype=torch.uint8, device=machine.device),
            torch.randint(K, (number,), device=machine.device))


def batch_figures(machine: Machine, recipe: Recipe, side: int, batch_size: int, number: int, backend: str) -> Figures:
    """Speeds of one batch, and how often it waits for the device."""
    images, labels = pixels(machine, side, number)
    order = torch.arange(number // batch_size * batch_size) * 37 % number
    drawn = sample_plan(recipe, order, 0, 0, batch_size, side, device=machine.device)
    plans = [drawn[start:start + batch_size] for start in range(0, len(drawn), batch_size)]
    if reason := unusable(machine, images, labels, plans[0], backend):
        return {"skipped": reason}
    call = partial(apply, machine, images, labels, plans[0], backend)
    return {"syncs": synchronisations(machine, call), **speeds(machine, backend, images, labels, plans)}


def apply(machine: Machine, images: Tensor, labels: Tensor, plan: Plan,
          backend: str = "triton") -> tuple[Tensor, Tensor]:
    """The plan's batch in bf16 (fp32 in a rehearsal, whose interpreter has no bf16)."""
    return ops.augment(images, labels, plan, MEAN, STD, K, smoothing=0.1, dtype=machine.variant.parameter,
                       backend=backend)


def unusable(machine: Machine, images: Tensor, labels: Tensor, plan: Plan, backend: str) -> str | None:
    """Why a native GPU backend does not serve this plan here, or None."""
    tensors = list(plan.tensors().values())
    return OP.why_not(backend, images, labels, tensors, plan.remode, plan.padding_mode, MEAN, STD, K, *images.shape[2:],
                      0.1, machine.variant.parameter, False)


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


def speeds(machine: Machine, backend: str, images: Tensor, labels: Tensor, plans: list[Plan]) -> Figures:
    """Milliseconds of a batch, and the share of the copy bandwidth: two reads and a write per pixel.

    A graph makes a batch of every plan, each from other images, and keeps them all: more than the second-level cache
    holds, so that nothing is read or written there only. Contrast's mean counts as a read more where the image does
    not stay on chip, past 2,048 pixels.
    """
    def call(plan: Plan = plans[0]) -> tuple[Tensor, Tensor]:
        return apply(machine, images, labels, plan, backend)

    out, _ = call()
    second_pass = bool((plans[0].jitter[:, 1] != 1 << 16).any()) and out[0].numel() > 3 * 2048
    moved = out.numel() * (2 + second_pass + out.element_size())  # bytes
    graph = machine.milliseconds(*(partial(call, plan) for plan in plans))
    return {"ms": graph, "of copy": machine.shares(graph, Counts(0, moved))["of copy"],
            "eager ms": eager_milliseconds(machine, call)}


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


def peer_figures(machine: Machine, side: int, batch_size: int, name: str, compiled: bool) -> Figures:
    """Eager milliseconds of crop + flip + normalise + MixUp by others, compiled by `torch.compile` or not."""
    if importlib.util.find_spec(name) is None:
        return {"skipped": "not installed"}
    peer = PEERS[name](*pixels(machine, side, batch_size), machine.variant.parameter)
    if compiled and not machine.rehearse:
        peer = torch.compile(peer)
    return {"eager ms": eager_milliseconds(machine, peer, rounds=5)}


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


PEERS = {"torchvision": torchvision_peer, "kornia": kornia_peer, "timm": timm_peer}


def epoch(machine: Machine, backend: str) -> Figures:
    """50,000 images of 32 px, full recipe, batches of 1,024 in one graph; drawing their plan apart."""
    M, side, B = (6, 8, 2) if machine.rehearse else (50_000, 32, 1024)
    images, labels = pixels(machine, side, M)
    index = torch.arange(M, device=machine.device)

    def draw() -> Plan:
        return sample_plan(FULL, index, 0, 0, B, side, device=machine.device)

    plan = draw()
    if reason := unusable(machine, images, labels, plan[:B], backend):
        return {"skipped": reason}

    def batches() -> None:
        for start in range(0, M, B):
            apply(machine, images, labels, plan[start:start + B], backend)

    return {"images": M, "plan ms": eager_milliseconds(machine, draw), "ms": machine.milliseconds(batches)}


def drain(loader: TrainLoader) -> None:
    """An epoch of its batches, used for nothing."""
    for _ in loader.epoch(0):
        pass


def loader_beside_a_step(machine: Machine, batch_size: int, backend: str) -> Figures:
    """Images per second of the loader alone, eagerly, with plans and launches, and of the report's training step."""
    split, _ = made_up(*((8 * batch_size, 8) if machine.rehearse else (45_000, 32)))
    plan = sample_plan(FULL, torch.arange(1), 0, 0, 1, split.images.shape[-1], device=machine.device)
    one = split.images[:1].to(machine.device), split.labels[:1].to(machine.device)
    if reason := unusable(machine, *one, plan, backend):
        return {"skipped": reason}
    step = trainer_figures(machine, batch_size, native=True, graphed=True)["images/s"]
    loader = TrainLoader(split, FULL, MEAN, STD, K, batch_size, smoothing=0.1, device=machine.device,
                         dtype=machine.variant.parameter, backend=backend)
    alone = 1e3 * loader.images_per_epoch / eager_milliseconds(machine, partial(drain, loader), rounds=5)
    return {"loader images/s": alone, "training step images/s": step, "loader / step": alone / step}
