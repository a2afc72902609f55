"""Every preset under the automatic order against `reference`: its four ops at its shapes, and whole training steps.

The order of an op is right when nothing is slower than `reference`; where the order leaves an op to `reference`, the
ratio in brackets says what `cpu` would have reached.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deit_fast import create_model, ops
from deit_fast.backend import record

from .models import Seeded, training
from .timing import ratio, take_turns

# Name of the models' size: batch, tokens, C, heads; hidden width 4 C. One batch is some 10 to 100 ms a block.
SHAPES = {"nano at 32": (64, 66, 64, 8), "tiny at 32": (32, 66, 192, 3), "small at 32": (16, 66, 384, 6),
          "tiny at 224": (8, 198, 192, 3), "small at 224": (4, 198, 384, 6), "base at 224": (2, 198, 768, 12)}
STEPS = {"deit_nano_distilled_patch4_32": 64, "deit_tiny_distilled_patch4_32": 16, "deit_small_distilled_patch4_32": 8,
         "deit_tiny_patch16_224": 8, "deit_small_patch16_224": 2, "deit_base_patch16_224": 1}


def op_calls(B: int, N: int, C: int, H: int, dtype: torch.dtype) -> dict[str, Callable[[str | None], Tensor]]:
    """Each op at one size without dropout (only nano has it): activations of `dtype`, fp32 parameters."""
    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype).requires_grad_()

    x, y, qkv = tensor(B, N, C, dtype=dtype), tensor(B, N, C, dtype=dtype), tensor(B, N, 3 * C, dtype=dtype)
    norm, w_qkv, w_proj = (tensor(C), tensor(C)), (tensor(3 * C, C), tensor(3 * C)), (tensor(C, C), tensor(C))
    mlp = (tensor(4 * C, C), tensor(4 * C), tensor(C, 4 * C), tensor(C))
    return {"layernorm_linear": lambda be: ops.layernorm_linear(x, *norm, *w_qkv, backend=be),
            "attention": lambda be: ops.attention(qkv, H, backend=be),
            "linear_residual": lambda be: ops.linear_residual(y, *w_proj, x, backend=be),
            "layernorm_mlp": lambda be: ops.layernorm_mlp(x, *norm, *mlp, backend=be)}


def _ratio(call: Callable[[str | None], Tensor], trained: bool, rounds: int) -> tuple[float, str]:
    """(how many times faster `cpu` is than `reference`, what the automatic order takes)."""
    def run(backend: str | None) -> object:
        with torch.set_grad_enabled(trained):
            out = call(backend)
        return out.backward(torch.ones_like(out)) if trained else out

    with record() as served:
        run(None)
    times = take_turns({name: lambda name=name: run(name) for name in ("reference", "cpu")}, rounds)
    return ratio(times, "reference", "cpu"), next(iter(served.values()))


def compare_shapes(rounds: int) -> None:
    """Prints, per size, op and dtype, `cpu`'s ratio to `reference`; `!`: the automatic order took the slower."""
    print("\nops at the presets' shapes, times faster than reference: inference / training; (left to reference)")
    for size, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            cells = []
            for name, call in op_calls(*shape, dtype).items():
                pair = []
                for trained in (False, True):
                    times, chosen = _ratio(call, trained, rounds)
                    text = f"{times:.2f}{'!' if (times < 0.97) == (chosen == 'cpu') and abs(times - 1) > 0.03 else ''}"
                    pair.append(text if chosen == "cpu" else f"({text})")
                cells.append(f"{name} {' / '.join(pair)}")
            print(f"  {size:13s}{str(dtype)[6:]:9s}{'   '.join(cells)}", flush=True)


def compare_steps(rounds: int) -> None:
    """Prints the automatic order's ratio to `reference` for whole training steps, in fp32 and under bf16 autocast."""
    print("\ntraining steps of the presets, automatic order, times faster than reference")
    for name, batch in STEPS.items():
        for autocast in (False, True):
            model = create_model(name)
            make = training(batch, model.patch_embed.img_size, model.num_classes)
            calls = {"reference": make(model, False, autocast),
                     "ours": make(Seeded(create_model(name)), True, autocast)}
            times = take_turns(calls, rounds)
            dtype = "bf16" if autocast else "fp32"
            print(f"  {name:32s} batch {batch:3d} {dtype} {ratio(times, 'reference', 'ours'):.2f}", flush=True)
