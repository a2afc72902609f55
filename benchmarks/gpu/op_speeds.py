"""Speeds of single calls: what the chip reaches, and each op against plain and compiled PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import BLOCK, Maker, Variant
from cases import block_inputs as encoder_block_inputs
from deit_fast import ops, reference, use_backend

from .counts import BLOCK_OPS, Block, op_counts
from .machine import Machine, forward_backward, variant
from .results import Contender, Figures, Refused

SHAPES = {"nano": (66, 64, 8), "tiny": (198, 192, 3), "small": (198, 384, 6), "base": (198, 768, 12)}  # N, C, H
ROTATED = ("x", "qkv", "residual")  # the arguments that are other tensors in every call
SDPA = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)

# (shape, op): what the goals are about comes first, for a time that is too short cuts off the end.
GOALS = [("nano", "attention"), ("tiny", "attention"), ("nano", "layernorm_mlp"), ("tiny", "layernorm_mlp"),
         ("nano", "encoder_block")]
OTHERS = [(shape, op) for shape in SHAPES for op in (*BLOCK_OPS, "encoder_block") if (shape, op) not in GOALS]


def rates(machine: Machine) -> Iterator[Contender]:
    """What the chip reaches here: bf16 product and copy."""
    yield Contender("bf16 matrix product", "PyTorch", lambda: {"tflops": machine.tflops})
    yield Contender("copy", "PyTorch", lambda: {"gigabytes_per_second": machine.gigabytes_per_second})


class Drawn(Maker):
    """A Maker that draws on the device, for shapes that would take seconds on the host."""

    def normal(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        """Activations from N(offset, scale^2)."""
        return self._finish(torch.randn(shape, device=self.device) * scale + offset, self.variant.activation)

    def parameter(self, *shape: int, scale: float = 0.1, offset: float = 0.0) -> Tensor:
        """A parameter from N(offset, scale^2)."""
        return self._finish(torch.randn(shape, device=self.device) * scale + offset, self.variant.parameter)


def op_inputs(m: Maker, op: str, size: Block) -> tuple[dict, tuple[str, ...]]:
    """(arguments of an op of the block, those that need gradients)."""
    B, N, C, F = size.B, size.N, size.C, size.F
    if op == "attention":
        return {"qkv": m.normal(B, N, 3 * C), "num_heads": size.H}, ("qkv",)
    if op == "linear_residual":
        inputs = {"x": m.normal(B, N, C), "weight": m.parameter(C, C), "bias": m.parameter(C),
                  "residual": m.normal(B, N, C)}
        return inputs, tuple(inputs)
    if op == "encoder_block":
        return encoder_block_inputs(m, B, N, C, size.H, F), BLOCK
    inputs = {"x": m.normal(B, N, C), "ln_weight": m.parameter(C, offset=1.0), "ln_bias": m.parameter(C)}
    if op == "layernorm_linear":
        inputs |= {"weight": m.parameter(3 * C, C), "bias": m.parameter(3 * C)}
    else:
        inputs |= {"fc1_weight": m.parameter(F, C), "fc1_bias": m.parameter(F), "fc2_weight": m.parameter(C, F),
                   "fc2_bias": m.parameter(C)}
    return inputs, tuple(inputs)


def four_ops(**inputs: object) -> Tensor:
    """encoder_block as the four Triton ops: what its own kernel has to beat."""
    with use_backend("triton", encoder_block="reference"):
        return ops.encoder_block(**inputs)


def op_speeds(machine: Machine) -> Iterator[Contender]:
    """Milliseconds of each op, forward and with backward, against plain and compiled PyTorch, and every attention.

    Parameters are of the activations' dtype, and for the smaller shapes fp32 too, as under autocast.
    """
    if machine.rehearse:
        cells = [("nano", op, machine.batches, machine.variant, 0) for op in (*BLOCK_OPS, "encoder_block")]
    else:
        same, mixed = variant("bf16"), variant("bf16mixed")
        cells = [(shape, op, batches(shape), same, 0) for shape, op in GOALS]
        cells += [(shape, op, batches(shape), same, 2) for shape, op in OTHERS]
        cells += [(shape, op, batches(shape), mixed, 4) for shape, op in GOALS + OTHERS
                  if op != "attention" and shape in ("nano", "tiny")]
    for shape, op, sizes, dtypes, rank in cells:
        for B in sizes:
            yield from contenders(machine, shape, op, B, dtypes, rank)


def contenders(machine: Machine, shape: str, op: str, B: int, dtypes: Variant, rank: int) -> Iterator[Contender]:
    """The jobs of one row; the compiled ones come one rank later."""
    N, C, H = SHAPES[shape]
    size, plain = Block(B, N, C, H, 4 * C), getattr(reference, op)
    calls: dict[str, Callable] = {"triton": partial(getattr(ops, op), backend="triton"), "eager": plain}
    if op == "encoder_block":
        calls["four ops"] = four_ops
    if op == "attention" and not machine.rehearse:
        calls |= attentions()
    row = f"{op} {shape} batch {B}{', fp32 parameters' if dtypes.name == 'bf16mixed' else ''}"
    for who, call in calls.items():
        yield Contender(row, who, partial(op_figures, machine, op, size, dtypes, call), rank)
    yield Contender(row, "compiled", partial(compiled_figures, machine, op, size, dtypes, plain), rank + 1)


def batches(shape: str) -> tuple[int, ...]:
    """Batch sizes: the report's for its model, DeiT's share of a GPU for the others."""
    return (64, 1024) if shape == "nano" else (128,)


def op_figures(machine: Machine, op: str, size: Block, dtypes: Variant, call: Callable) -> Figures:
    """Milliseconds and shares of the measured rates, forward and with backward."""
    inputs, grads = op_inputs(Drawn(0, dtypes, machine.device), op, size)
    counts = {training: op_counts(op, size, training, dtypes.activation.itemsize, dtypes.parameter.itemsize)
              for training in (False, True)}
    turns = machine.turns(inputs, ROTATED, counts[False].bytes)
    with torch.no_grad():
        forward = machine.milliseconds(*(partial(call, **arguments) for arguments in turns))
    both = machine.milliseconds(*(forward_backward(call, arguments, grads) for arguments in turns))
    return {"forward ms": forward, "both ms": both,
            **{f"forward {name}": share for name, share in machine.shares(forward, counts[False]).items()},
            **{f"both {name}": share for name, share in machine.shares(both, counts[True]).items()}}


def compiled_figures(machine: Machine, op: str, size: Block, dtypes: Variant, plain: Callable) -> Figures:
    """The same of what Inductor makes of an op."""
    return op_figures(machine, op, size, dtypes, machine.compiled(plain))


def attentions() -> dict[str, Callable]:
    """Other attentions: PyTorch's by kernel, each of which may refuse the shape, and FlashAttention where installed."""
    def under(backend: SDPBackend, **inputs: object) -> Tensor:
        with sdpa_kernel(backend):
            try:
                return reference.attention(**inputs)
            except RuntimeError as error:
                if any(sign in str(error) for sign in ("available kernel", "viable backend", "cuDNN")):
                    raise Refused(str(error).splitlines()[0]) from error
                raise

    return {f"SDPA {backend.name.lower()}": partial(under, backend) for backend in SDPA} | {
        "FlashAttention 2": flash_attention_2, "FlashAttention 3": flash_attention_3}


def flash_attention_2(qkv: Tensor, num_heads: int) -> Tensor:
    """FlashAttention's own kernels; ImportError without them. qkv (B, N, 3C) -> (B, N, C)."""
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(qkv.unflatten(2, (3, num_heads, -1))).flatten(2)


def flash_attention_3(qkv: Tensor, num_heads: int) -> Tensor:
    """Its kernels for Hopper; ImportError without them. qkv (B, N, 3C) -> (B, N, C)."""
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(*qkv.unflatten(2, (3, num_heads, -1)).unbind(2))
    return (out[0] if isinstance(out, tuple) else out).flatten(2)
