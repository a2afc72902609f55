"""Vision Transformer and DeiT as ordinary PyTorch modules whose heavy parts are deit_fast's ops.

A block is four ops (Dosovitskiy et al. 2020, pre-norm), called as one, `encoder_block`:

    qkv = LN(x) W_qkv + b                       layernorm_linear
    y   = softmax(q k^T / sqrt(D)) v            attention
    x   = x + drop(y W_proj + b)                linear_residual
    x   = x + drop(W2 drop(gelu(W1 LN(x))))     layernorm_mlp

Parameters carry timm's names, so timm's and DeiT's state dicts load strictly. The `nn.Linear` and `nn.LayerNorm`
modules only hold them: the ops read the weights, and forward hooks on those inner modules do not fire. In inference all
blocks are one call, `encoder`, unless somebody hooks into one or changed it.

B batch, N tokens (prefix tokens first, then patches), C width, K classes. Initialisation is DeiT's (truncated normal of
std 0.02, whose bounds of +-2 never bite; PyTorch's default for the patch projection).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_
from torch.utils.checkpoint import checkpoint

from deit_fast import ops

TOKENS = ("cls", "cls+cls", "cls+dist")


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each: (B, in_chans, H, W) -> (B, H W / patch^2, C)."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not divisible by patch_size {patch_size}; "
                             f"the nearest that are: {img_size // patch_size * patch_size}, "
                             f"{(img_size // patch_size + 1) * patch_size}.")
        self.img_size, self.patch_size = img_size, patch_size
        self.grid_size = img_size // patch_size
        self.num_patches = self.grid_size**2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"images must be (B, {self.proj.in_channels}, {self.img_size}, {self.img_size}), got "
                             f"{tuple(images.shape)}; pass img_size= to create_model for another size.")
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """The parameters of self-attention."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    """The parameters of the MLP."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)


class Block(nn.Module):
    """One encoder block: (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, qkv_bias: bool, drop: float, attn_drop: float,
                 drop_path: float, eps: float) -> None:
        super().__init__()
        self.drop, self.attn_drop, self.drop_path, self.eps = drop, attn_drop, drop_path, eps
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden_dim)

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        drop, attn_drop = (self.drop, self.attn_drop) if self.training else (0.0, 0.0)
        return ops.encoder_block(x, *self.tensors(), self.attn.num_heads, self.eps, drop, attn_drop, seed,
                                 self.row_scale(x), self.row_scale(x))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The block's parameters in the order of `ops.encoder_block`."""
        norm1, attn, norm2, mlp = self.norm1, self.attn, self.norm2, self.mlp
        layers = norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2
        return tuple(tensor for layer in layers for tensor in (layer.weight, layer.bias))

    def row_scale(self, x: Tensor) -> Tensor | None:
        """Drop-path's factors (B,): 0 with probability `drop_path`, else 1 / (1 - drop_path); None when it is off."""
        if not self.training or self.drop_path == 0.0:
            return None
        keep = 1.0 - self.drop_path
        return torch.full((x.shape[0],), keep, device=x.device).bernoulli_(keep).div_(keep)


class VisionTransformer(nn.Module):
    """ViT (tokens="cls") or DeiT with two prefix tokens and two heads ("cls+dist", "cls+cls").

    Args:
        img_size, patch_size, in_chans: of square images, in pixels.
        num_classes: K; 0 leaves the heads out and `forward` returns the normalised prefix tokens' mean (B, C).
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias, eps: C, blocks, H, hidden width / C, and LayerNorm's epsilon.
        tokens: "cls"; "cls+dist", whose second head learns from a teacher; "cls+cls", whose second head learns the
            labels too.
        drop_rate: dropout of the position embedding, the attention projection and both MLP layers (DeiT's `--drop`).
        attn_drop_rate: dropout of attention probabilities.
        drop_path_rate: stochastic depth, rising linearly from 0 at the first block to this at the last.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, num_classes: int = 1000,
                 embed_dim: int = 768, depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0,
                 qkv_bias: bool = True, tokens: str = "cls", drop_rate: float = 0.0, attn_drop_rate: float = 0.0,
                 drop_path_rate: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        if tokens not in TOKENS:
            raise ValueError(f"tokens must be one of {', '.join(TOKENS)}, got {tokens!r}.")
        rates = {"drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate, "drop_path_rate": drop_path_rate}
        for name, rate in rates.items():
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {rate}.")
        self.num_classes, self.embed_dim, self.tokens, self.eps = num_classes, embed_dim, tokens, eps
        self.num_prefix_tokens = 1 if tokens == "cls" else 2
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if self.two_heads:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        rows = self.num_prefix_tokens + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        drop_paths = [drop_path_rate * layer / max(depth - 1, 1) for layer in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, int(embed_dim * mlp_ratio), qkv_bias, drop_rate, attn_drop_rate, drop_path, eps)
            for drop_path in drop_paths)
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        self.reset_classifier(num_classes)
        self.init_weights()

    @property
    def two_heads(self) -> bool:
        """Whether there is a second prefix token with a head of its own."""
        return self.num_prefix_tokens == 2

    @property
    def distilled(self) -> bool:
        """Whether the second head is for a teacher."""
        return self.tokens == "cls+dist"

    def init_weights(self) -> None:
        """Draws all weights anew, as DeiT does."""
        for parameter in (self.cls_token, self.pos_embed, *([self.dist_token] if self.two_heads else [])):
            trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces every head by a fresh one for `num_classes`."""
        self.num_classes = num_classes
        device, dtype = self.cls_token.device, self.cls_token.dtype
        for name in ("head", "head_dist") if self.two_heads else ("head",):
            head = nn.Identity()
            if num_classes > 0:
                head = _init_linear(nn.Linear(self.embed_dim, num_classes, device=device, dtype=dtype))
            setattr(self, name, head)

    def no_weight_decay(self) -> set[str]:
        """The parameters that weight decay spares beside biases and norms: timm's; released DeiT decays dist_token."""
        return {"cls_token", "dist_token", "pos_embed"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def encode(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """The tokens behind the last block, before the final norm: (B, in_chans, H, W) -> (B, N, C)."""
        x = self.patch_embed(images)
        prefix = [self.cls_token, self.dist_token] if self.two_heads else [self.cls_token]
        x = torch.cat([*(token.expand(x.shape[0], -1, -1).to(x.dtype) for token in prefix), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        if not (self.training or torch.is_grad_enabled()) and are_alike(self.blocks):
            first = self.blocks[0]
            return ops.encoder(x, [block.tensors() for block in self.blocks], first.attn.num_heads, first.eps)
        for layer, block in enumerate(self.blocks):
            layer_seed = None if seed is None else seed * len(self.blocks) + layer
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, layer_seed, use_reentrant=False)
            else:
                x = block(x, layer_seed)
        return x

    def forward_features(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """All tokens behind the final norm: (B, in_chans, H, W) -> (B, N, C)."""
        return self.norm(self.encode(images, seed))

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, K); with two heads (cls, dist) in training mode and the mean of both logits in evaluation.

        images: (B, in_chans, H, W). seed: () int64 on the images' device, the key of every block's dropout masks
        (layer l uses seed * depth + l), None for PyTorch's own dropout. The position dropout is always PyTorch's.
        """
        x = self.encode(images, seed)
        if self.num_classes == 0:
            return F.layer_norm(x[:, :self.num_prefix_tokens], (self.embed_dim,), self.norm.weight, self.norm.bias,
                                self.eps).mean(dim=1)
        heads = (self.head, self.head_dist) if self.two_heads else (self.head,)
        logits = tuple(ops.layernorm_linear(x[:, i], self.norm.weight, self.norm.bias, head.weight, head.bias, self.eps)
                       for i, head in enumerate(heads))
        if not self.two_heads:
            return logits[0]
        return logits if self.training else (logits[0] + logits[1]) / 2


def are_alike(blocks: nn.ModuleList) -> bool:
    """Whether one call of all blocks is the same as calling each, in inference.

    It is not where somebody waits for the calls (hooks, for the features between two blocks), or changed one of them.
    """
    shapes = {(block.eps, block.attn.num_heads) for block in blocks if type(block) is Block}
    untouched = all(type(block) is Block and "forward" not in block.__dict__ and not block.training
                    and not block._forward_hooks and not block._forward_pre_hooks for block in blocks)
    heard = torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks
    return untouched and len(shapes) == 1 and not heard


def _init_linear(linear: nn.Linear) -> nn.Linear:
    trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
