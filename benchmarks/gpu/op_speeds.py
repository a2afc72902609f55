"""Speeds of single calls: what the chip reaches, and each op against plain and compiled PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import BLOCK, Maker
from cases import block_inputs as encoder_block_inputs
from deit_fast import ops, reference, use_backend

from .machine import Machine, Row, forward_backward

SHAPES = {"nano": (66, 64, 8), "tiny": (198, 192, 3), "small": (198, 384, 6)}  # N, C, H


def rates(machine: Machine) -> Iterator[Row]:
    """What the chip reaches here: bf16 product and copy."""
    n = 256 if machine.rehearse else 8192
    a, b = (torch.randn(n, n, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    yield "bf16 matrix product", {"tflops": 2e-9 * n**3 / machine.milliseconds(lambda: a @ b)}
    x = torch.empty(2**20 if machine.rehearse else 2**30, dtype=torch.uint8, device=machine.device)
    y = torch.empty_like(x)
    yield "copy", {"gigabytes_per_second": 2e-6 * x.numel() / machine.milliseconds(lambda: y.copy_(x))}


def block_inputs(machine: Machine, B: int, N: int, C: int, H: int) -> dict[str, tuple[dict, tuple[str, ...]]]:
    """op -> (its inputs at one size, the arguments that need gradients)."""
    m = Maker(0, machine.variant, machine.device)
    layernorm = {"ln_weight": m.parameter(C, offset=1.0), "ln_bias": m.parameter(C)}
    x = partial(m.normal, B, N)
    return {
        "layernorm_linear": ({"x": x(C), **layernorm, "weight": m.parameter(3 * C, C), "bias": m.parameter(3 * C)},
                             ("x", "ln_weight", "ln_bias", "weight", "bias")),
        "attention": ({"qkv": x(3 * C), "num_heads": H}, ("qkv",)),
        "linear_residual": ({"x": x(C), "weight": m.parameter(C, C), "bias": m.parameter(C), "residual": x(C)},
                            ("x", "weight", "bias", "residual")),
        "layernorm_mlp": ({"x": x(C), **layernorm, "fc1_weight": m.parameter(4 * C, C), "fc1_bias": m.parameter(4 * C),
                           "fc2_weight": m.parameter(C, 4 * C), "fc2_bias": m.parameter(C)},
                          ("x", "ln_weight", "ln_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")),
        "encoder_block": (encoder_block_inputs(m, B, N, C, H, 4 * C), BLOCK),
    }


def four_ops(**inputs: object) -> Tensor:
    """encoder_block as the four Triton ops: what its own kernel has to beat."""
    with use_backend("triton", encoder_block="reference"):
        return ops.encoder_block(**inputs)


def op_speeds(machine: Machine) -> Iterator[Row]:
    """Milliseconds of each op, forward and with backward, against plain and compiled PyTorch and every SDPA."""
    for shape, (N, C, H) in list(SHAPES.items())[:1] if machine.rehearse else SHAPES.items():
        for B in machine.batches:
            for name, (inputs, grads) in block_inputs(machine, B, N, C, H).items():
                plain = getattr(reference, name)
                contenders = {"triton": partial(getattr(ops, name), backend="triton"), "eager": plain,
                              "compiled": machine.compiled(plain)}
                if name == "encoder_block":
                    contenders["four ops"] = four_ops
                row = {}
                for who, op in contenders.items():
                    with torch.no_grad():
                        row[f"{who} forward"] = machine.milliseconds(partial(op, **inputs))
                    row[f"{who} both"] = machine.milliseconds(forward_backward(op, inputs, grads))
                    torch._dynamo.reset()
                if name == "attention" and not machine.rehearse:
                    row.update(sdpa_speeds(machine, inputs))
                yield f"{name} {shape} batch {B}", row


def sdpa_speeds(machine: Machine, inputs: dict) -> dict[str, float | str]:
    """Milliseconds of the plain attention under each SDPA backend that takes the shape."""
    row: dict[str, float | str] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION,
                    SDPBackend.MATH):
        with sdpa_kernel(backend):
            try:
                with torch.no_grad():
                    row[f"{backend.name} forward"] = machine.milliseconds(partial(reference.attention, **inputs))
                both = forward_backward(reference.attention, inputs, ("qkv",))
                row[f"{backend.name} both"] = machine.milliseconds(both)
            except RuntimeError as error:
                row[f"{backend.name} refused"] = str(error).splitlines()[0]
    return row
