"""Build deit_fast's extension modules with ninja; neither torch nor a GPU is needed.

The extensions take raw pointers and sizes and know nothing of torch, so one build serves every torch version and runs
under plain build isolation. There is one CPU module per instruction set (`deit_fast._cpu_avx2`, ...), each compiled from
the same sources in csrc/cpu, so that an inline function compiled for AVX-512 cannot leak into the AVX2 path; the loader
picks one at import. `deit_fast._cuda` is built when nvcc is found.

Environment: CXX, CXXFLAGS, CUDA_HOME as everywhere; DEIT_FAST_CPU_ISAS="avx2" limits the CPU modules (generic is
always built: the loader asks it what the processor runs); DEIT_FAST_CUDA=0 leaves `_cuda` out;
DEIT_FAST_CUDA_ARCHS="90" names its targets (default: those of 80, 90 and 100 that nvcc knows, plus PTX of the last).
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
X86_64 = {"generic": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": AVX512BF16,
          "amx": [*AVX512BF16, "-mamx-tile", "-mamx-bf16"]}
CUDA_ARCHS = ("80", "90", "100")
ISAS = X86_64 if platform.machine() in ("x86_64", "AMD64") else {"generic": []}

# Contraction is off because backends must agree to the last bit where they use the same arithmetic; a fused
# multiply-add is written out as one.
CXX_FLAGS = "-std=c++17 -O3 -g0 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wextra".split()
NVCC_FLAGS = "-std=c++17 -O3 --fmad=false -Xcompiler -fPIC,-fvisibility=hidden".split()


def find_compiler() -> list[str] | None:
    """The C++ compiler's command, or None."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return [found] if found else None


def find_nvcc() -> str | None:
    """The path of nvcc, or None when there is none or DEIT_FAST_CUDA=0."""
    if os.environ.get("DEIT_FAST_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def compiles(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler accepts these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <cmath>\nint main() { return 0; }\n")
        command = [*compiler, *flags, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def cpu_isas() -> list[str]:
    """The instruction sets to build a CPU module for: DEIT_FAST_CPU_ISAS ("avx2", "avx2 avx512") and generic, or all."""
    wanted = os.environ.get("DEIT_FAST_CPU_ISAS", " ".join(ISAS)).replace(",", " ").split()
    if unknown := [isa for isa in wanted if isa not in ISAS]:
        raise SystemExit(f"DEIT_FAST_CPU_ISAS: there is no {', '.join(unknown)} here. Known: {', '.join(ISAS)}.")
    return [isa for isa in ISAS if isa in (*wanted, "generic")]


def known_archs(nvcc: str) -> list[str]:
    """Those of CUDA_ARCHS that this nvcc compiles for: 100 came with CUDA 12.8, 90 with 11.8."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [arch for arch in CUDA_ARCHS if f"compute_{arch}" in listed] or [CUDA_ARCHS[0]]


def cuda_targets(nvcc: str) -> list[str]:
    """The -gencode arguments for DEIT_FAST_CUDA_ARCHS ("80 90", "8.0;9.0"), or for what this nvcc knows."""
    asked = os.environ.get("DEIT_FAST_CUDA_ARCHS", "")
    archs = asked.replace(".", "").replace(";", " ").replace(",", " ").split() or known_archs(nvcc)
    targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return [word for target in targets for word in ("-gencode", target)]


class NinjaBuild(build_ext):
    """Writes build.ninja for all extension modules and runs it once."""

    def build_extensions(self) -> None:
        compiler = find_compiler()
        if compiler is None:
            self.warn("no C++ compiler was found: deit_fast is installed without its CPU kernels and runs on plain PyTorch. "
                      "Install g++ and run `pip install -e .` again to get them.")
            self.extensions = []
            return
        folder = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}-{platform.machine()}"
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath("build.ninja").write_text(self.ninja_text(compiler))
        subprocess.run([ninja_command(), "-C", str(folder)], check=True)

    def ninja_text(self, compiler: list[str]) -> str:
        """The text of build.ninja; drops CPU modules whose instruction set the compiler does not know."""
        import pybind11
        from sysconfig import get_paths

        includes = [f"-I{path}" for path in (ROOT / "csrc", pybind11.get_include(), get_paths()["include"])]
        flags = [*CXX_FLAGS, *includes, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        nvcc = find_nvcc()
        lines = [
            f"cxx = {quote(compiler)}",
            "rule cxx\n  command = $cxx $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $cxx -shared $in -o $out -fopenmp",
        ]
        if nvcc:
            # nvcc compiles the plain C++ and links too: it alone knows where its headers and its run time are.
            lines.append(f"rule nvcc\n  command = {quote([nvcc])} $flags -MMD -MF $out.d -c $in -o $out\n"
                         "  depfile = $out.d\n  deps = gcc")
            lines.append(f"rule nvcc_link\n  command = {quote([nvcc])} -shared -cudart static $in -o $out")
        for extension in list(self.extensions):
            name = extension.name.rpartition(".")[2]
            defines = [f"-DDEIT_FAST_MODULE={name}"]
            extra: list[str] = []
            cuda = name == "_cuda"
            if not cuda:
                extra = ISAS[name.removeprefix("_cpu_")]
                if not compiles(compiler, extra):
                    self.warn(f"{' '.join(compiler)} does not know {' '.join(extra)}: {name} is left out.")
                    self.extensions.remove(extension)
                    continue
            objects = []
            for source in extension.sources:
                out = f"{name}/{Path(source).name}.o"
                words = [*NVCC_FLAGS, *cuda_targets(nvcc), *includes] if cuda else [*flags, *extra]
                lines.append(f"build {out}: {'nvcc' if cuda else 'cxx'} {ninja_path(ROOT / source)}\n"
                             f"  flags = {quote([*words, *defines])}")
                objects.append(out)
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            lines.append(f"build {ninja_path(target)}: {'nvcc_link' if cuda else 'link'} {' '.join(objects)}")
        return "\n".join(lines) + "\n"


def ninja_command() -> str:
    """The path of ninja: the build requirement's own, or the system's."""
    try:
        import ninja
    except ImportError:
        return "ninja"
    return os.path.join(ninja.BIN_DIR, "ninja")


def quote(words: list[str]) -> str:
    """Words for a command in build.ninja, quoted for the shell, `$` doubled for ninja."""
    return shlex.join(words).replace("$", "$$")


def ninja_path(path: Path) -> str:
    """A path as ninja wants it in a build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def sources(folder: str, *endings: str) -> list[str]:
    """The files of csrc/<folder> with these endings, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob("*") if path.suffix in endings)


extensions = [Extension(f"deit_fast._cpu_{isa}", sources("cpu", ".cpp")) for isa in cpu_isas()]
if find_nvcc() and sources("cuda", ".cu"):
    extensions.append(Extension("deit_fast._cuda", sources("cuda", ".cu", ".cpp")))

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
