"""The training step of a plain loop, for baselines, and what the presets at 224 pixels cost with each backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deit_fast
from deit_fast.models import VisionTransformer

from .counts import Block, Counts, model_counts
from .machine import Machine
from .results import Contender, Figures

PRESETS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
BATCH = 128  # of the presets at 224 pixels
Convert = Callable[[VisionTransformer], nn.Module]  # makes another model of ours


def timm_model(ours: VisionTransformer) -> nn.Module:
    """timm's model of the same size and dropout, with our weights; ImportError without timm."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer as PlainTransformer

    block = ours.blocks[0]
    model = (VisionTransformerDistilled if ours.two_heads else PlainTransformer)(
        img_size=ours.patch_embed.img_size, patch_size=ours.patch_embed.patch_size, embed_dim=ours.embed_dim,
        depth=len(ours.blocks), num_heads=block.attn.num_heads, num_classes=ours.num_classes, proj_drop_rate=block.drop,
        pos_drop_rate=ours.pos_drop.p)
    model.load_state_dict(ours.state_dict())
    if ours.two_heads:
        model.set_distilled_training(True)
    return model


BASELINES: dict[str, Convert | None] = {"reference": None, "timm": timm_model}


def counts_of(model: VisionTransformer, batch_size: int, training: bool, parameter: int) -> Counts:
    """The least that inference or a training step of a model computes and moves; parameter: bytes of one."""
    block, side = model.blocks[0], model.patch_embed.img_size
    size = Block(batch_size, model.pos_embed.shape[1], model.embed_dim, block.attn.num_heads,
                 block.mlp.fc1.out_features)
    number = sum(tensor.numel() for tensor in model.parameters())
    return model_counts(size, len(model.blocks), 3 * side * side, number, training, parameter)


def made(machine: Machine, preset: str, convert: Convert | None = None) -> tuple[VisionTransformer, nn.Module]:
    """(our model of a preset, it or what `convert` makes of it on the device); a rehearsal's has one block."""
    torch.manual_seed(0)
    ours = deit_fast.create_model(preset, **({"depth": 1} if machine.rehearse else {}))
    return ours, (ours if convert is None else convert(ours)).to(machine.device)


@dataclass(frozen=True)
class Step:
    """Forward, loss, backward and Adam on one fixed batch, and what its memory and speed are held against."""

    call: Callable[[], None]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    counts: Counts


def plain_step(machine: Machine, preset: str, batch_size: int, convert: Convert | None, compiled: bool,
               seed: Tensor | None = None) -> Step:
    """The step of a plain loop: DeiT's loss where the model has two heads; model and loss are compiled as one.

    seed: lets native ops draw the dropout; the baselines draw PyTorch's own.
    """
    ours, model = made(machine, preset, convert)
    model.train()
    side, K = ours.patch_embed.img_size, ours.num_classes
    images = torch.randn(batch_size, 3, side, side, device=machine.device)
    labels = torch.randint(K, (batch_size,), device=machine.device)
    teacher = torch.randn(batch_size, K, device=machine.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=not machine.rehearse)
    seeds = () if seed is None else (seed,)

    def loss_of(images: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        logits = model(images, *seeds)
        if isinstance(logits, tuple):
            return deit_fast.ops.distillation_loss(*logits, labels, teacher, "soft", 0.5, 3.0)
        return F.cross_entropy(logits.float(), labels)

    run = machine.compiled(loss_of) if compiled else loss_of

    def step() -> None:
        with torch.autocast(machine.device, torch.bfloat16, enabled=not machine.rehearse):
            loss = run(images, labels, teacher)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Step(step, model, optimizer, counts_of(ours, batch_size, training=True, parameter=4))


def speed(machine: Machine, batch_size: int, milliseconds: float, counts: Counts) -> Figures:
    """What every line of a step says of its time."""
    return {"ms": milliseconds, "images/s": 1e3 * batch_size / milliseconds, **machine.shares(milliseconds, counts)}


def preset_speeds(machine: Machine) -> Iterator[Contender]:
    """Milliseconds and peak memory of a step of the presets at 224 pixels, each replayed from a CUDA graph."""
    B = machine.batches[0] if machine.rehearse else BATCH
    for preset in ("vit_nano_patch4_32",) if machine.rehearse else PRESETS:
        row = f"{preset} batch {B}"
        yield Contender(row, "triton, graph", partial(preset_figures, machine, preset, B, None, False, "triton"))
        for who, convert in BASELINES.items():
            for compiled, how in ((False, "graph"), (True, "max-autotune, graph")):
                yield Contender(row, f"{who}, {how}", rank=int(compiled),
                          measure=partial(preset_figures, machine, preset, B, convert, compiled, "reference"))


def preset_figures(machine: Machine, preset: str, batch_size: int, convert: Convert | None, compiled: bool,
                   backend: str) -> Figures:
    """The speed and memory of a plain loop's replayed step."""
    seed = torch.zeros((), dtype=torch.int64, device=machine.device) if backend == "triton" else None
    with deit_fast.use_backend(backend):
        step = plain_step(machine, preset, batch_size, convert, compiled, seed)
        each = machine.milliseconds(step.call)
    return speed(machine, batch_size, each, step.counts) | machine.peak(step.model, step.optimizer)
