#!/usr/bin/env bash
# Runs the parity suite and the random calls against CPU kernels built with AddressSanitizer and UBSan, in a copy of the
# repository, so that the build in place stays as it is; then the CUDA kernels' tests on a CPU. Takes about 20 minutes
# on 2 cores.
#
#   scripts/sanitize.sh [isa ...]      default: the set that the processor would use, and generic
#   PYTHON=...                         the interpreter (python3)
#   DEIT_FAST_EXAMPLES=...             how many random calls of each kind
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$root"/{setup.py,pyproject.toml,README.md,csrc,deit_fast,tests} "$copy"
rm -f "$copy"/deit_fast/_c*.so

cd "$copy"
export DEIT_FAST_CUDA=0
[ $# -eq 0 ] || export DEIT_FAST_CPU_ISAS="$*"
CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" CXXFLAGS="-O1 -g1" \
    "$python" setup.py build_ext --inplace

# The interpreter itself is not instrumented: the runtime comes first by preloading, and its leaks are not ours.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$copy DEIT_FAST_REQUIRE=
overrun='
import torch
from deit_fast.kernels.cpu import launch, module
x, weight, out = torch.ones(4, 8), torch.ones(8, 8), torch.empty(4 * 8 - 1)  # one element short
call = module.LinearResidual(False, 4, 8, 8, x.data_ptr(), (weight.data_ptr(), False), (0, False), 0.0, 0, 0, 1, 1)
launch.run(call, False, x.data_ptr(), out.data_ptr())'
for isa in "${@:-}" generic; do
    echo "== ${isa:-the best instruction set}"
    export DEIT_FAST_CPU_ISA=$isa
    if "$python" -c "$overrun" 2>overrun.log || ! grep -q "ERROR: AddressSanitizer" overrun.log; then
        echo "a write behind a tensor went unnoticed: the sanitizers are not at work" >&2
        exit 1
    fi
    "$python" -m pytest -q -p no:cacheprovider tests/test_parity.py -k "cpu and test_eager"
    "$python" -m pytest -q -p no:cacheprovider tests/test_random_calls.py tests/test_encoder_block.py \
        tests/test_freeze.py tests/test_cpu_kernels.py tests/test_cpu_attention.py tests/test_augment.py \
        -k "not instruction_set and not compile"
done
echo "== the CUDA kernels on a CPU"
CUDA_ON_HOST_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g1" \
    "$python" -m pytest -q -p no:cacheprovider tests/test_cuda_on_host.py
