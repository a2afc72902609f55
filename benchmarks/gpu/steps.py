"""Speed and memory of a training step, against eager and compiled PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import deit_fast

from .machine import Machine, Row


def step_speeds(machine: Machine) -> Iterator[Row]:
    """Milliseconds and peak memory of a training step (forward, cross-entropy, backward, Adam) per contender."""
    presets = ("deit_nano_distilled_patch4_32", "deit_tiny_patch16_224", "deit_small_patch16_224",
               "deit_base_patch16_224")
    for preset in presets[:1] if machine.rehearse else presets:
        for B in machine.batches if "nano" in preset else (min(machine.batches[-1], 128),):
            row: dict[str, float] = {}
            for who in ("automatic", "eager", "compiled"):
                torch.manual_seed(0)
                model = deit_fast.create_model(preset, device=machine.device)
                side = model.patch_embed.img_size
                images = torch.randn(B, 3, side, side, device=machine.device)
                labels = torch.randint(model.num_classes, (B,), device=machine.device)
                # a seed lets native ops draw the preset's dropout; the baselines draw PyTorch's own
                seed = torch.zeros((), dtype=torch.int64, device=machine.device) if who == "automatic" else None
                optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=not machine.rehearse)
                run = machine.compiled(model) if who == "compiled" else model

                def step() -> None:
                    with torch.autocast(machine.device, torch.bfloat16, enabled=not machine.rehearse):
                        logits = run(images, seed)
                    logits = logits if isinstance(logits, tuple) else (logits,)
                    loss = sum(F.cross_entropy(each.float(), labels) for each in logits)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()

                if not machine.rehearse:
                    torch.cuda.reset_peak_memory_stats()
                with deit_fast.use_backend(None if who == "automatic" else "reference"):
                    row[f"{who} step"] = machine.milliseconds(step)
                if not machine.rehearse:
                    row[f"{who} peak MB"] = torch.cuda.max_memory_allocated() / 2**20
                torch._dynamo.reset()
            yield f"{preset} batch {B}", row
