"""csrc/cuda compiled by nvcc, where there is one, for every generation of GPUs: what the chip gets, without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = shutil.which("nvcc")
REGISTERS = 65536  # of a multiprocessor
RESIDENT = {"augment_staged_kernel": 4 * 256, "augment_sliced_kernel": 4 * 256, "augment_gray_kernel": 5 * 256,
            "resize_weights_kernel": 8 * 128, "resize_kernel": 3 * 256}  # threads that must find room there
STATIC_SHARED = 2048  # bytes that the tests on a CPU leave for static arrays (cuda_on_host/cuda_runtime.h)

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


class Usage(NamedTuple):
    """What one kernel needs: stack and spilled bytes, registers per thread, bytes of static shared memory."""

    kernel: str
    stack: int
    spills: int
    registers: int
    shared: int


def known(arch: str) -> bool:
    """Whether this nvcc compiles for compute capability `arch`: 100 came with CUDA 12.8, 90 with 11.8."""
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return f"compute_{arch}" in listed.split()


@cache
def compiled(arch: str) -> tuple[list[Usage], str]:
    """The usage of every kernel in csrc/cuda/augment.cu on one architecture, and all that the compiler says."""
    command = [NVCC, "-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", f"-I{CSRC}", f"-arch=sm_{arch}", "-cubin",
               "-o", "/dev/null", str(CSRC / "cuda" / "augment.cu")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    entries = result.stderr.split("Compiling entry function '")[1:]
    return [usage(entry) for entry in entries], result.stderr


def usage(entry: str) -> Usage:
    """What ptxas says of one kernel."""
    name = next(name for name in RESIDENT if name in entry.partition("'")[0])
    spills = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    stack, stored, loaded = map(int, re.search(spills, entry).groups())
    shared = re.search(r"(\d+) bytes smem", entry)
    return Usage(name, stack, stored + loaded, int(re.search(r"Used (\d+) registers", entry)[1]),
                 int(shared[1]) if shared else 0)


@pytest.fixture(params=["80", "90", "100"])
def arch(request: pytest.FixtureRequest) -> str:
    if not known(request.param):
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    return request.param


def test_every_kernel_compiles_without_a_warning(arch: str) -> None:
    usages, said = compiled(arch)
    names = [found.kernel for found in usages]
    assert {name: names.count(name) for name in RESIDENT} == {  # a staged and a sliced one for each dtype
        name: 3 if name in ("augment_staged_kernel", "augment_sliced_kernel") else 1 for name in RESIDENT}
    assert "warning" not in said, said


def test_nothing_spills(arch: str) -> None:
    for found in compiled(arch)[0]:
        assert found.stack == found.spills == 0, found


def test_enough_threads_fit_a_multiprocessor(arch: str) -> None:
    """Registers are given out in eights."""
    for found in compiled(arch)[0]:
        assert -(-found.registers // 8) * 8 * RESIDENT[found.kernel] <= REGISTERS, found
        assert found.shared <= STATIC_SHARED, found
