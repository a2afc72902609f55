"""`augment` where offsets pass 2^31: sources whose pixels lie far apart in memory, and outputs of more elements.

Memory that nobody touches costs nothing: a source of 3 GB has a few pages that are ever written or read, and of an
output of 4 GB the last rows are made, where a backend can be made to begin there. tests/test_triton_augment.py has the
same for Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cuda_on_host
from augment_plans import FAR, MEAN, STD, far_apart, far_output, random_images, random_plan
from deit_fast import ops, reference
from deit_fast.kernels.augment_args import pack, workspace
from deit_fast.ops.augment import OP
from needs import skip_or_fail
from test_augment import ON_HOST, native, ours  # noqa: F401, a fixture


def free_memory() -> int:
    """Bytes that this machine can still give."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.parametrize("resizes", [False, True])
@pytest.mark.parametrize("strides", FAR)
def test_sources_far_apart(native: str, strides: tuple[int, ...], resizes: bool) -> None:  # noqa: F811
    device = "cuda" if native in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    images, labels = random_images(4, 32, 32), torch.arange(4)
    plan = random_plan(5, 4, (32, 32), (32, 32), seed=3, resizes=resizes)
    plan = replace(plan, index=torch.tensor([3, 2, 1, 0, 3]))
    x, targets = ours(native, far_apart(images, strides, device), labels, plan, MEAN, STD, 10)
    other, other_targets = reference.augment(images, labels, plan, MEAN, STD, 10)
    assert torch.equal(x, other) and torch.equal(targets, other_targets)


@pytest.mark.parametrize("hwc", [False, True])
def test_many_images(native: str, hwc: bool) -> None:  # noqa: F811
    """700,000 images of 32 px, of which the first and the last ones are drawn."""
    M, drawn = 700_000, torch.tensor([699_999, 0, 699_997, 699_051, 1])
    device = "cuda" if native in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    images = torch.empty((M, 32, 32, 3) if hwc else (M, 3, 32, 32), dtype=torch.uint8, device=device)
    few, labels = random_images(5, 32, 32, "hwc" if hwc else "chw"), torch.arange(M) % 10
    images[drawn.to(device)] = few.to(device)
    plan = random_plan(5, 5, (32, 32), (32, 32), seed=1)
    x, targets = ours(native, images, labels, replace(plan, index=drawn[plan.index]), MEAN, STD, 10)
    other, other_targets = reference.augment(few, labels[drawn], plan, MEAN, STD, 10)
    assert torch.equal(x, other) and torch.equal(targets, other_targets)


@pytest.mark.parametrize("channels_last", [False, True])
def test_last_rows_of_a_large_output_on_host(channels_last: bool) -> None:
    """The CUDA kernels' last blocks, resized rows among them: tiles and output lie beyond 2^31."""
    if cuda_on_host.why_not():
        skip_or_fail(ON_HOST, cuda_on_host.why_not())
    B, last, inputs, expected = far_output(224, channels_last)
    shape = (B, 224, 224, 3) if channels_last else (B, 3, 224, 224)
    out, targets = torch.empty(shape, dtype=torch.float16), torch.empty(B, 10)
    out = out.permute(0, 3, 1, 2) if channels_last else out
    images, labels, plan = inputs
    tensors = list(plan.tensors().values())
    arguments, _kept = pack(images, labels, tensors, plan.remode, plan.padding_mode, MEAN, STD, 10, 224, 224, 0.0,
                            torch.float16, channels_last, out, targets)
    space = workspace(cuda_on_host.module(), images, tensors, out, B)
    with cuda_on_host.beginning_at(B - last, B):
        cuda_on_host.module().augment_fwd(*arguments, space.data_ptr(), 0, 0)
    assert torch.equal(out[-last:], expected[0]) and torch.equal(targets[-last:], expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_large_output(backend: str, channels_last: bool) -> None:
    """All rows, in 4.4 GB."""
    if OP.why_not_here(backend) or backend == "triton" and not torch.cuda.is_available():
        skip_or_fail(backend, OP.why_not_here(backend) or "there is no CUDA GPU")
    if free_memory() < 8 << 30:
        skip_or_fail(backend, "less than 8 GB of memory are free")
    device = "cpu" if backend == "cpu" else "cuda"
    B, last, inputs, expected = far_output(224, channels_last)
    x, targets = ops.augment(*(tensor.to(device) for tensor in inputs), MEAN, STD, 10, 224, dtype=torch.float16,
                             channels_last=channels_last, backend=backend)
    assert torch.equal(x[-last:].cpu(), expected[0]) and torch.equal(targets[-last:].cpu(), expected[1])
