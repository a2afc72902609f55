"""What every launcher of a C++ kernel needs: pointers, workspace, and the reasons why a call is not for it.

The kernels never allocate: a call object says how many bytes of workspace it needs, the launcher takes them from PyTorch's
allocator, and they are free again when the launcher returns. Weights are packed into it anew in every call (a few
microseconds; a cache keyed by pointer would be stale after an optimizer step or an EMA swap).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import module

DTYPES = (torch.float32, torch.bfloat16)

# Whether the processor, whatever module is forced, multiplies 16-bit numbers in vectors of 512 bits. Where it does not,
# oneDNN takes no bf16 product and PyTorch's own loops run at a tenth of its fp32 rate.
FAST_BF16 = module is not None and module.supported_isas()[0] not in ("avx2", "generic")

# FLOP that are worth a thread, some 50 us of work: less than that is lost again on waking it and on barriers.
GRAIN = 4_000_000


def why_not(x: Tensor, features: int, dropout_p: float = 0.0, seed: Tensor | None = None) -> str | None:
    """Why the C++ kernels cannot serve activations x (..., C) with this many output or hidden features, or None."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}, not on the CPU"
    if x.dtype not in DTYPES:
        return f"{str(x.dtype).removeprefix('torch.')} activations have no C++ kernel: use float32 or bfloat16"
    if features == 0:
        return "there are no features to compute"
    if dropout_p > 0.0 and seed is None:
        return "dropout without a seed is PyTorch's own, which only reference draws"
    return None


def order(x: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> tuple[str, ...]:
    """The automatic order for activations x (..., C): C++ first, but not where a wide layer is slower in it.

    Measured on one core against oneDNN's and MKL's products, forward and backward together. With AMX, 1584 rows of
    C = 192 and 528 of C = 384: 0.8 to 1.0 times as fast in fp32 and 0.8 to 1.1 in bf16, while C = 64 reaches 1.0 to
    1.7 and every forward alone about 1. Zen 3 (AVX2), rows of the presets: 0.6 to 0.9 in fp32; a forward alone 0.9 to
    1.2 at C = 192 and 0.87 to 1.0 at 384 and 768; in bf16 6 to 30 times as fast as PyTorch. Seeded dropout costs
    `reference` 30 times PyTorch's own, so with it C++ is always first.
    """
    plain = seed is None or dropout_p == 0.0
    if x.device.type != "cpu" or not plain or (x.dtype == torch.bfloat16 and not FAST_BF16):
        return ("cpu", "triton")
    return ("cpu", "triton") if x.shape[-1] <= (128 if torch.is_grad_enabled() else 256) else ()


def threads(flop: int, grain: int = GRAIN) -> int:
    """The threads for so much work: PyTorch's number, but fewer for a small call. No result depends on it."""
    return max(1, min(torch.get_num_threads(), flop // grain))


def pointer(tensor: Tensor | None) -> int:
    """The address of a contiguous tensor's first element; 0 for None and for empty tensors."""
    return 0 if tensor is None else tensor.data_ptr()


def parameter(tensor: Tensor | None) -> tuple[int, bool]:
    """(address, is it bf16) as the kernels take parameters and their gradients."""
    return pointer(tensor), tensor is not None and tensor.dtype == torch.bfloat16


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, copied where they are not contiguous; the caller keeps them alive while a kernel reads them.

    A lazy minus is resolved: PyTorch does that for an operator's tensors, but not for those in a list with gaps.
    """
    return tuple(None if tensor is None else tensor.resolve_neg().contiguous() for tensor in tensors)


def run(call, backward: bool, *arguments: object) -> None:
    """Runs a call object's forward or backward in workspace of the size that it asks for."""
    workspace = torch.empty(call.workspace(backward), dtype=torch.uint8)
    (call.backward if backward else call.forward)(workspace.data_ptr(), *arguments)


def empty_grads(needs: list[bool], *tensors: Tensor | None) -> list[Tensor | None]:
    """An uninitialised gradient for every tensor that needs one, else None."""
    return [tensor.new_empty(tensor.shape) if need and tensor is not None else None for need, tensor in zip(needs, tensors)]


def given(grads: list[Tensor | None], like: Tensor) -> list[Tensor]:
    """The gradients as an operator returns them: an empty (0,) tensor where there is none."""
    return [like.new_empty(0) if grad is None else grad for grad in grads]


def seed_value(seed: Tensor | None, dropout_p: float) -> int:
    """A seed as the kernels take it; 0 where nothing is dropped."""
    return 0 if seed is None or dropout_p == 0.0 else int(seed)


def row_factors(row_scale: Tensor | None) -> Tensor | None:
    """Drop-path's factors as the kernels read them: contiguous fp32, to be kept alive by the caller."""
    return None if row_scale is None else row_scale.float().contiguous()


def residual_settings(x: Tensor, dropout_p: float, seed: Tensor | None, row_scale: Tensor | None) -> tuple[tuple, Tensor | None]:
    """((p, seed, row_scale's address, rows per sample), the tensor to keep alive) for x (B, ..., C)."""
    scale = row_factors(row_scale)
    rows_per_sample = 1 if scale is None else max(1, x.numel() // x.shape[-1] // max(1, x.shape[0]))
    return (dropout_p, seed_value(seed, dropout_p), pointer(scale), rows_per_sample), scale
