"""Plans for the tests of `augment`: random ones, every field anywhere in its range, not where sampling puts it; and
wrong ones, which a GPU clamps.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from deit_fast import reference
from deit_fast.data.augmentation import Plan, neutral_plan

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CLAMPED = [  # field, what is written into the first row, what the kernel takes it for on 5 images of 12x12
    ("index", -1, 0), ("index", 5, 4), ("index", 2**40, 4), ("crop", -(2**31), -12), ("crop", 2**31 - 1, 12),
    ("jitter", -7, 0), ("jitter", 2**31 - 1, 64 << 16), ("partner", -(2**63), 0), ("partner", 99, 1),
    ("lam", -1.0, 0.0), ("lam", 7.0, 1.0), ("lam", float("nan"), 0.0),
]

FAR = [  # strides of image, channel, y and x with which 4 images of 32x32 span more than 2^31 bytes
    (2**30, 1024, 32, 1), (1024, 2**30 + 4096, 32, 1), (1024 * 3, 1024, 2**26 + 2**24 + 4096 * 3, 1),
    (1024 * 3, 1024, 32, 2**26 + 2**24 + 4096 * 3), (1024, 2**31 + 4096, 32, 1),
]


def random_images(M: int, H: int, W: int, layout: str = "chw", seed: int = 0) -> Tensor:
    """(M, 3, H, W) or (M, H, W, 3) uint8, smooth in half of the images and noise in the rest."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (M, 3, H, W), dtype=torch.uint8, generator=generator)
    ramp = torch.arange(H * W).view(H, W) % 256
    images[::2] = ((images[::2, :, :1, :1] + ramp) % 256).to(torch.uint8)
    return images if layout == "chw" else images.permute(0, 2, 3, 1).contiguous()


def boxes(generator: torch.Generator, shape: tuple[int, ...], H: int, W: int) -> Tensor:
    """(*shape, 4) int32 boxes inside H x W; a third without area."""
    y0, y1 = torch.randint(H + 1, (2, *shape), generator=generator).sort(0).values
    x0, x1 = torch.randint(W + 1, (2, *shape), generator=generator).sort(0).values
    keep = torch.randint(3, shape, generator=generator) > 0
    return torch.stack([y0, x0, (y1 - y0) * keep, x1 - x0], dim=-1).int()


def source_boxes(generator: torch.Generator, B: int, H: int, W: int) -> Tensor:
    """(B, 4) int32 boxes of a source: a pixel, the whole image, or anything in between; a quarter without area."""
    box = boxes(generator, (B,), H, W)
    whole = torch.rand(B, generator=generator) < 0.2
    box = torch.where(whole[:, None], torch.tensor([0, 0, H, W]), box)
    pixel = torch.rand(B, generator=generator) < 0.1
    box = torch.where(pixel[:, None], torch.tensor([H - 1, W // 2, 1, 1]), box)
    return (box * (torch.rand(B, 1, generator=generator) < 0.9)).int()


def random_plan(B: int, M: int, source: tuple[int, int], size: tuple[int, int], recount: int = 2, remode: str = "const",
                seed: int = 0, resizes: bool = True, hue: bool = True) -> Plan:
    """A plan of B rows over M images; partners are arbitrary, half of the rows do not jitter, lambdas reach 0 and 1.

    Two thirds of the rows are resized, unless `resizes` is false; J is 4 with `hue`. Odd seeds reflect the padding.
    """
    g = torch.Generator().manual_seed(seed)
    J = 4 if hue else 3
    factors = torch.randint(3 * 65536, (B, 3), generator=g)
    factors[::5] = torch.randint((64 << 16) + 1, (len(factors[::5]), 3), generator=g)
    factors[torch.rand(B, 3, generator=g) < 0.4] = 65536
    shifts = torch.randint(-32768, 32769, (B, J - 3), generator=g)
    shifts[torch.rand(B, J - 3, generator=g) < 0.3] = 0
    lam = torch.rand(B, generator=g)
    lam[torch.rand(B, generator=g) < 0.3] = 1.0
    lam[torch.rand(B, generator=g) < 0.1] = 0.0
    cut = boxes(g, (B,), *size)
    cut[torch.rand(B, generator=g) < 0.4] = 0
    partner = torch.randint(max(B, 1), (B,), generator=g)
    if seed % 2:  # mutual partners, as sampling makes them
        partner = torch.arange(B - 1, -1, -1)
    jumps = torch.randint(7, (B, 2), generator=g) - 3
    reach = torch.tensor([source[0] - size[0], source[1] - size[1]])
    crop = jumps + (reach * torch.rand(B, 2, generator=g)).long()
    low, high = -torch.tensor(size), torch.tensor(source)
    far = torch.rand(B, 2, generator=g) < 0.1
    crop = torch.where(far, torch.where(torch.rand(B, 2, generator=g) < 0.5, low, high), crop).clamp(low, high)
    resized = source_boxes(g, B, *source) if resizes else torch.zeros((0, 4), dtype=torch.int32)
    return Plan(
        index=torch.randint(max(M, 1), (B,), generator=g), resized_crop=resized,
        bicubic=torch.rand(B, generator=g) < 0.5, crop=crop.int(), flip=torch.rand(B, generator=g) < 0.5,
        vflip=torch.rand(B, generator=g) < 0.3,
        jitter_order=torch.rand(B, J, generator=g).argsort(1).to(torch.uint8),
        jitter=torch.cat([factors, shifts], dim=1).int(), grayscale=torch.rand(B, generator=g) < 0.2,
        erase=boxes(g, (B, recount), *size), noise_key=torch.randint(-2**63, 2**63 - 1, (B,), generator=g),
        partner=partner, lam=lam, cut=cut, remode=remode, padding_mode="reflect" if seed % 2 else "constant")


def clamped_plans(field: str, value: float, meant: float) -> tuple[Tensor, Tensor, Plan, Plan]:
    """(images, labels, a plan of two rows with the value in the first, the plan that it means)."""
    images, labels, plan = random_images(5, 12, 12), torch.arange(5), neutral_plan(torch.tensor([2, 3]))
    plan = replace(plan, partner=torch.tensor([1, 0]), lam=torch.tensor([0.6, 0.3]),
                   jitter=torch.tensor([[90_000, 50_000, 70_000]] * 2, dtype=torch.int32))
    wrong, right = (getattr(plan, field).clone() for _ in range(2))
    wrong[0], right[0] = value, meant
    return images, labels, replace(plan, **{field: wrong}), replace(plan, **{field: right})


def garbage(plan: Plan) -> Plan:
    """Any bits in every integer field."""
    generator, fields = torch.Generator().manual_seed(0), {}
    for name, tensor in plan.tensors().items():
        if tensor.dtype in (torch.int32, torch.int64):
            info = torch.iinfo(tensor.dtype)
            fields[name] = torch.randint(info.min, info.max, tensor.shape, generator=generator, dtype=tensor.dtype)
    fields["jitter_order"] = torch.randint(256, plan.jitter_order.shape, generator=generator, dtype=torch.uint8)
    return replace(plan, **fields)


def far_apart(images: Tensor, strides: tuple[int, ...], device: str = "cpu") -> Tensor:
    """The images (M, 3, H, W) with these strides; what lies between the pixels is never touched."""
    span = sum((n - 1) * stride for n, stride in zip(images.shape, strides)) + 1
    return torch.empty(span, dtype=torch.uint8, device=device).as_strided(images.shape, strides).copy_(images)


def far_output(side: int, channels_last: bool) -> tuple[int, int, tuple[Tensor, Tensor, Plan], tuple[Tensor, Tensor]]:
    """(B, n, inputs, the reference's last n rows): B rows of side x side, float16, are more than 2^31 elements.

    All but the last rows are plain, and nothing but these is mixed with these.
    """
    last, M = 4, 6
    B = 2**31 // (3 * side * side) + 2 * last
    images, labels = random_images(M, 24, 20), torch.arange(M)
    end = replace(random_plan(last, M, (24, 20), (side, side), 1, "const", seed=4), padding_mode="constant")
    plain = neutral_plan(torch.arange(B - last) % M).tensors()
    plain["resized_crop"] = torch.zeros(B - last, 4, dtype=torch.int32)
    plain["jitter_order"] = torch.arange(4, dtype=torch.uint8).repeat(B - last, 1)
    plain["jitter"] = torch.tensor([[65536, 65536, 65536, 0]], dtype=torch.int32).repeat(B - last, 1)
    whole = {name: torch.cat([plain[name], tensor]) for name, tensor in end.tensors().items()}
    whole["partner"][-last:] += B - last
    expected = reference.augment(images, labels, end, MEAN, STD, 10, side, dtype=torch.float16,
                                 channels_last=channels_last)
    return B, last, (images, labels, replace(end, **whole)), expected
