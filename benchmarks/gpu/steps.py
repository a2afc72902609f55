"""The training step of a plain loop, for baselines, and what the presets at 224 pixels cost with each backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

import deit_fast

from .machine import Machine, Row

PRESETS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")


def timm_model(ours: nn.Module) -> nn.Module:
    """timm's distilled DeiT of the same size and dropout, with our weights; ImportError without timm."""
    from timm.models.deit import VisionTransformerDistilled

    block = ours.blocks[0]
    model = VisionTransformerDistilled(
        img_size=ours.patch_embed.img_size, patch_size=ours.patch_embed.patch_size, embed_dim=ours.embed_dim,
        depth=len(ours.blocks), num_heads=block.attn.num_heads, num_classes=ours.num_classes, proj_drop_rate=block.drop,
        pos_drop_rate=ours.pos_drop.p)
    model.load_state_dict(ours.state_dict())
    model.set_distilled_training(True)
    return model


def baseline_step(machine: Machine, preset: str, batch_size: int, convert: Callable[[nn.Module], nn.Module] | None,
                  compiled: bool, seed: torch.Tensor | None = None) -> Callable[[], None]:
    """Forward, loss, backward and Adam on one fixed batch, as a call: DeiT's loss where the model has two heads.

    convert: makes another model of ours. seed: lets native ops draw the dropout; the baselines draw PyTorch's own.
    """
    torch.manual_seed(0)
    model = deit_fast.create_model(preset, **({"depth": 1} if machine.rehearse else {}))
    side, K = model.patch_embed.img_size, model.num_classes
    model = (model if convert is None else convert(model)).to(machine.device).train()
    images = torch.randn(batch_size, 3, side, side, device=machine.device)
    labels = torch.randint(K, (batch_size,), device=machine.device)
    teacher = torch.randn(batch_size, K, device=machine.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=not machine.rehearse)
    run = machine.compiled(model) if compiled else model
    seeds = () if seed is None else (seed,)

    def step() -> None:
        with torch.autocast(machine.device, torch.bfloat16, enabled=not machine.rehearse):
            logits = run(images, *seeds)
            if isinstance(logits, tuple):
                loss = deit_fast.ops.distillation_loss(*logits, labels, teacher, "soft", 0.5, 3.0)
            else:
                loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def preset_speeds(machine: Machine) -> Iterator[Row]:
    """Milliseconds and peak memory of a step of the presets at 224 pixels, each replayed from a CUDA graph."""
    for preset in ("vit_nano_patch4_32",) if machine.rehearse else PRESETS:
        B = min(machine.batches[-1], 128)
        row: dict[str, float] = {}
        for who, backend in (("triton", "triton"), ("eager", "reference"), ("compiled", "reference")):
            machine.reset_peak()
            seed = torch.zeros((), dtype=torch.int64, device=machine.device) if who == "triton" else None
            step = baseline_step(machine, preset, B, None, who == "compiled", seed)
            with deit_fast.use_backend(backend):
                row[f"{who} step"] = machine.milliseconds(step)
            row |= {f"{who} {name}": value for name, value in machine.peak().items()}
            torch._dynamo.reset()
        yield f"{preset} batch {B}", row
