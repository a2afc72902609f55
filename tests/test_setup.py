"""The build: what it leaves out, and what it says, where a compiler, an instruction set or nvcc is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, without anything built."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "deit_fast", folder / "deit_fast", ignore=ignore)
    return folder


def build(checkout: Path, path: str, **environment: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key not in ("CXX", "CXXFLAGS", "CUDA_HOME")}
    return subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=checkout, capture_output=True, text=True,
                          env=env | {"PATH": path} | environment)


def test_without_a_compiler_the_build_succeeds_and_says_so(checkout: Path, tmp_path: Path) -> None:
    result = build(checkout, path=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler was found" in result.stdout + result.stderr
    assert not list((checkout / "deit_fast").glob("*.so"))
    code = ("import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)];"  # of an install
            "import deit_fast, torch; model = deit_fast.create_model('vit_nano_patch4_32');"
            "model(torch.zeros(1, 3, 32, 32)); print(deit_fast.backends()['augment']['cpu'])")
    served = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(checkout)})
    assert served.returncode == 0, served.stderr
    assert "the CPU extension is not built: install a C++ compiler" in served.stdout


def test_a_compiler_error_is_not_hidden(checkout: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *probe.cpp*) exit 0;; esac\necho "catastrophic" >&2\nexit 1\n')
    compiler.chmod(0o755)
    result = build(checkout, path=f"{tmp_path}:/usr/bin:/bin", DEIT_FAST_CUDA="0")
    assert result.returncode != 0
    assert "catastrophic" in result.stdout + result.stderr


def load_setup() -> object:
    """setup.py's functions, without running setup()."""
    import setuptools

    spec = importlib.util.spec_from_file_location("deit_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    original, setuptools.setup = setuptools.setup, lambda **kwargs: None
    try:
        spec.loader.exec_module(module)
    finally:
        setuptools.setup = original
    return module


def test_unknown_flags_are_noticed() -> None:
    setup = load_setup()
    compiler = setup.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    assert setup.compiles(compiler, []) and not setup.compiles(compiler, ["-mno-such-isa"])


def test_cuda_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup()
    monkeypatch.setenv("DEIT_FAST_CUDA_ARCHS", "8.0;9.0")
    assert setup.cuda_targets("nvcc") == ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90",
                                          "-gencode", "arch=compute_90,code=compute_90"]
    monkeypatch.setenv("DEIT_FAST_CUDA", "0")
    assert setup.find_nvcc() is None


@pytest.mark.parametrize(("listed", "archs"), [("80 86 89 90", ["80", "90"]), ("75 80 90 100 120", ["80", "90", "100"]),
                                               ("80 86", ["80"]), ("", ["80"])])
def test_an_nvcc_gets_the_targets_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str,
                                                archs: list[str]) -> None:
    """CUDA 12.6 refuses compute_100, which is newer."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n" + "".join(f"echo compute_{arch}\n" for arch in listed.split()))
    nvcc.chmod(0o755)
    monkeypatch.delenv("DEIT_FAST_CUDA_ARCHS", raising=False)
    targets = load_setup().cuda_targets(str(nvcc))
    assert [word for word in targets if "code=sm_" in word] == [f"arch=compute_{a},code=sm_{a}" for a in archs]
    assert targets[-1] == f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"


def test_cpu_isas(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup()
    assert setup.cpu_isas() == list(setup.ISAS)
    monkeypatch.setenv("DEIT_FAST_CPU_ISAS", "")
    assert setup.cpu_isas() == ["generic"]
    if "avx2" in setup.ISAS:
        monkeypatch.setenv("DEIT_FAST_CPU_ISAS", "avx2,avx512")
        assert setup.cpu_isas() == ["generic", "avx2", "avx512"]
    monkeypatch.setenv("DEIT_FAST_CPU_ISAS", "avx2 sse9")
    with pytest.raises(SystemExit, match="there is no sse9 here"):
        setup.cpu_isas()
