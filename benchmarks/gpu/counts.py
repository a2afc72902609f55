"""How much a call must compute and move at the least: what its time is held against, as shares of measured rates.

Products count 2 m n k, backward twice forward's, and whatever is computed again counts nothing. Bytes are those of the
tensors that a call reads and writes, each once; backward reads what forward read and the output's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_OPS = ("layernorm_linear", "attention", "linear_residual", "layernorm_mlp")


@dataclass(frozen=True)
class Counts:
    """Floating-point operations of matrix products, and bytes of memory traffic."""

    flops: float
    bytes: float

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.flops + other.flops, self.bytes + other.bytes)

    def shares(self, milliseconds: float, tflops: float, gigabytes_per_second: float) -> dict[str, float]:
        """Which share of a rate of products, and of one of copies, a call of this time reaches."""
        return {"of matrix rate": 1e-9 * self.flops / milliseconds / tflops,
                "of copy": 1e-6 * self.bytes / milliseconds / gigabytes_per_second}


@dataclass(frozen=True)
class Block:
    """The size of an encoder block's call: B images, N tokens, C width, H heads, F hidden features."""

    B: int
    N: int
    C: int
    H: int
    F: int


def op_counts(op: str, size: Block, training: bool, activation: int = 2, parameter: int = 2) -> Counts:
    """Of an op of a block, forward or with backward; activation, parameter: bytes of a number."""
    B, N, C, F = size.B, size.N, size.C, size.F
    M = B * N
    weights = {"layernorm_linear": 3 * C * C, "attention": 0, "linear_residual": C * C, "layernorm_mlp": 2 * C * F}
    vectors = {"layernorm_linear": 5 * C, "attention": 0, "linear_residual": C, "layernorm_mlp": F + 3 * C}
    # numbers of a token: read in forward, read again in backward and given a gradient, written
    moved = {"layernorm_linear": (C, C, 3 * C), "attention": (3 * C, 3 * C, C), "linear_residual": (2 * C, C, C),
             "layernorm_mlp": (C, C, C), "encoder_block": (C, C, C)}
    parts = BLOCK_OPS if op == "encoder_block" else (op,)
    flops = sum(2 * M * weights[part] + (4 * M * N * C if part == "attention" else 0) for part in parts)
    parameters = parameter * sum(weights[part] + vectors[part] for part in parts)
    read, again, written = (activation * M * numbers for numbers in moved[op])
    forward = Counts(flops, read + written + parameters)
    if not training:
        return forward
    return forward + Counts(2 * flops, 2 * again + written + 2 * parameters)


def model_counts(block: Block, depth: int, pixels: int, parameters: int, training: bool, parameter: int) -> Counts:
    """Of a model's inference, or of its training step with Adam in fp32; activations in 16 bits.

    pixels: of an image, all channels, each a number of fp32 that the patches' projection reads; the heads count
    nothing. parameters: how many; parameter: bytes of one.
    """
    once = (sum((op_counts(op, block, training, 2, parameter) for op in BLOCK_OPS), Counts(0, 0)) for _ in range(depth))
    read = 4 * block.B * pixels
    patches = 2 * block.B * pixels * block.C
    total = sum(once, Counts((2 if training else 1) * patches, (2 if training else 1) * read))
    if training:  # weight, gradient and two moments, read; weight and moments, written
        total += Counts(0, 7 * 4 * parameters)
    return total
