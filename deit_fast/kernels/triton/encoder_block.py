"""Triton encoder block: up to C = 128 one forward kernel, wider or longer its four kernels one after the other.

Backward is four launches for the four ops' seven and a sum: the MLP and the projection's input, attention, the rest of
the rows, all sums of parameter gradients. A fifth where attention's own is two. It takes what the four ops save, and
gradients that nobody wants (a frozen parameter) make it theirs.

These kernels have not run on a GPU: they are tested in Triton's interpreter and compiled, never timed. Whether they
beat the four is for `benchmarks/gpu/op_speeds.py` to say; `use_backend("triton", encoder_block="reference")` takes the
four.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from ..encoder_block import Arguments, Chain
from . import attention, layernorm_linear, layernorm_mlp, linear_residual
from .attention import LOG2E, split_keys
from .block_backward_kernels import encoder_block_bwd_mlp_kernel, encoder_block_bwd_qkv_kernel
from .block_kernels import encoder_block_fwd_kernel
from .common import (architecture, cdiv, contiguous, dot_precision, dropout_arguments, empty, launch, power_of_two,
                     refusal)
from .linear import PROGRAMS, fused, only_needed, row_splits
from .linear import Tiles as LinearTiles
from .linear import backward_tiles as linear_backward_tiles
from .reduction import Partials, reduce

OP = "encoder_block"
WIDEST, LONGEST = 128, 256  # C and N of the one kernel
FEWEST_HEADS = 3  # with one or two, most of its warps would do the same work

MATRICES = ("fc1_weight", "fc2_weight", "fc1_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
VECTORS = ("ln1_weight", "ln1_bias", "ln2_weight", "ln2_bias", "fc2_bias")  # columns of backward's two workspaces

chain = Chain(layernorm_linear, attention, linear_residual, layernorm_mlp)
saved_like = chain.saved_like


@dataclass(frozen=True)
class Tiles:
    """What one program takes at a time.

    BLOCK_R rows in LN1's product, BLOCK_M in all that follows; BLOCK_N keys, N = FULL + up to TAIL; BLOCK_H heads of
    BLOCK_D channels in Q K^T and BLOCK_V in P V; BLOCK_F features of qkv and of the MLP; BLOCK_C padded channels.
    """

    BLOCK_R: int
    BLOCK_M: int
    BLOCK_N: int
    FULL: int
    TAIL: int
    BLOCK_H: int
    BLOCK_D: int
    BLOCK_V: int
    BLOCK_F: int
    BLOCK_C: int
    num_warps: int


def tiles(N: int, C: int, H: int, F: int, itemsize: int) -> Tiles:
    """Tiles for N tokens of C channels in H heads, F hidden features and elements of `itemsize` bytes."""
    D = C // H
    BLOCK_H = min(8, power_of_two(H, 4))
    BLOCK_N = min(64 if D <= 32 else 32, 1 << (max(N, 16).bit_length() - 1))
    FULL, TAIL = split_keys(N, BLOCK_N)
    return Tiles(BLOCK_R=min(32, power_of_two(N)), BLOCK_M=16, BLOCK_N=BLOCK_N, FULL=FULL, TAIL=TAIL, BLOCK_H=BLOCK_H,
                 BLOCK_D=power_of_two(D), BLOCK_V=power_of_two(D, 8),
                 BLOCK_F=min(64 if itemsize == 2 else 32, power_of_two(F)), BLOCK_C=power_of_two(C),
                 num_warps=BLOCK_H)


def shares(B: int, row_tiles: int) -> int:
    """How many programs share an image: as long as all programs find room on an H100 at once, by shape alone."""
    most = max(1, min(row_tiles, PROGRAMS // max(1, B)))
    return cdiv(row_tiles, cdiv(row_tiles, most))


def fits(x: Tensor, num_heads: int) -> bool:
    """Whether the one kernel serves a stream x (B, N, C); in fp32 from C = 65 on, the MLP's backward wants z."""
    _, N, C = x.shape
    return C <= WIDEST and N <= LONGEST and num_heads >= FEWEST_HEADS and fused(x, C)


def why_not(*call: object) -> str | None:
    """Why this call cannot be served, or None."""
    a = Arguments(*call)
    return chain.why_not(*call) or (refusal(OP, a.x) if fits(a.x, a.num_heads) else None)


def forward(*call: object, save: bool) -> tuple[Tensor, list[Tensor]]:
    """(out (B, N, C), [qkv, y, h, then what the four save])."""
    a = Arguments(*call)
    if not fits(a.x, a.num_heads):
        return chain.forward(*call, save=save)
    B, N, C = a.x.shape
    H, F = a.num_heads, a.fc1_weight.shape[0]
    qkv, y, h, lse = saved = saved_like(*a) if save else [a.x.new_empty((B, N, 3 * C)), None, None, None]
    tensors = {f"{name}_ptr": tensor for name, tensor in zip(Arguments._fields, contiguous(*a[:13]))}
    out = a.x.new_empty(a.x.shape)
    tile = tiles(N, C, H, F, a.x.element_size())
    per_image = shares(B, cdiv(N, tile.BLOCK_M))
    attn_row_scale, mlp_row_scale = contiguous(a.attn_row_scale, a.mlp_row_scale)
    attn_dropout = dropout_arguments(a.attn_dropout_p, a.seed)
    dropout = dropout_arguments(a.dropout_p, a.seed)
    launch(OP, encoder_block_fwd_kernel, B * per_image, a.x, **tensors, out_ptr=out, qkv_ptr=qkv, y_ptr=y, h_ptr=h,
           lse_ptr=lse, attn_row_scale_ptr=attn_row_scale, mlp_row_scale_ptr=mlp_row_scale, shares=per_image,
           scale=(C // H)**-0.5 * LOG2E, eps=a.eps, N=N, H=H, D=C // H, F=F, PRECISION=dot_precision(a.x), num_stages=2,
           **asdict(tile), ATTN_THRESHOLD=attn_dropout["THRESHOLD"], ATTN_KEEP_SCALE=attn_dropout["KEEP_SCALE"],
           **{**dropout, "seed_ptr": a.seed if dropout["THRESHOLD"] or attn_dropout["THRESHOLD"] else None})
    return out, saved if save else []


def backward(grad: Tensor, saved: list[Tensor], needs: list[bool], *call: object) -> list[Tensor]:
    """[dx, the gradients of the twelve parameters] of grad (B, N, C)."""
    a = Arguments(*call)
    all_wanted = all(need for need, each in zip(needs, a) if each is not None)
    if not fits(a.x, a.num_heads) or not all_wanted or a.x.numel() == 0:
        return chain.backward(grad, saved, needs, *call)
    a = Arguments(*contiguous(*a[:13]), *a[13:18], *contiguous(*a[18:]))
    dx, grads = _backward(grad, *saved, a)
    return only_needed(a.x, needs, [dx, *(grads[name] if name in grads else None for name in a._fields[1:13])])


def _backward(grad: Tensor, qkv: Tensor, y: Tensor, h: Tensor, lse: Tensor,
              a: Arguments) -> tuple[Tensor, dict[str, Tensor]]:
    """(dx, the gradient of each parameter) by four launches."""
    (B, N, C), F, itemsize = a.x.shape, a.fc1_weight.shape[0], a.x.element_size()
    M = B * N
    mlp_tiles = layernorm_mlp.backward_tiles(M, C, F, itemsize, architecture(a.x))
    tiles = linear_backward_tiles(M, C, 3 * C, itemsize)
    mlp_blocks, blocks = cdiv(F, mlp_tiles.BLOCK_F), cdiv(3 * C, tiles.BLOCK_F) + cdiv(C, tiles.BLOCK_F)
    BLOCK_M = max(mlp_tiles.BLOCK_M, tiles.BLOCK_M)
    programs = min(cdiv(M, BLOCK_M), PROGRAMS)
    splits, rows_per_split = row_splits(M, max(mlp_blocks, blocks), BLOCK_M)
    grads = {name: empty(getattr(a, name)) for name in MATRICES + VECTORS if getattr(a, name) is not None}
    absent = {"qkv_bias": 3 * C, "fc1_bias": F}  # whose gradients are summed and dropped
    matrix, vector = (Partials.empty(a.x, rows, [grads[name] if name in grads
                                                 else a.ln1_weight.new_empty(absent.get(name, C)) for name in names])
                      for rows, names in ((splits, MATRICES), (programs, VECTORS)))
    dh, dy, dx = (a.x.new_empty(a.x.shape) for _ in range(3))

    def launch_rows(kernel: object, tiles: LinearTiles, blocks: int, **own: object) -> None:
        named = {f"{name}_ptr": tensor for name, tensor in a._asdict().items() if f"{name}_ptr" in kernel.arg_names}
        own = {**named, **own, **asdict(tiles), **dropout_arguments(a.dropout_p, a.seed)}
        launch(OP, kernel, programs + splits * blocks, a.x, dh_ptr=dh, vector_ptr=vector.workspace,
               matrix_ptr=matrix.workspace, programs=programs, rows_per_split=rows_per_split, M=M, rows_per_sample=N,
               eps=a.eps, C=C, F=F, WIDTH=matrix.workspace.shape[1], PRECISION=dot_precision(a.x), num_stages=2, **own)

    launch_rows(encoder_block_bwd_mlp_kernel, mlp_tiles, mlp_blocks, h_ptr=h, grad_ptr=grad, dy_ptr=dy)
    (dqkv,) = attention.backward(dy, [lse], [True], *a.attention(qkv))
    launch_rows(encoder_block_bwd_qkv_kernel, tiles, blocks, y_ptr=y, dqkv_ptr=dqkv, dx_ptr=dx, splits=splits)
    reduce(OP, a.x, matrix, vector)
    return dx, grads
