#!/usr/bin/env bash
# A borrowed GPU, about 30 minutes, nothing to download: the checks in the order of what they are worth, each below 10
# minutes. Give the names of some to run only those; every figure is on disk as soon as it is measured.
#
#   scripts/gpu.sh [build parity graphs losses step rates ops augment study presets]
#   ARCHS=90  PYTHON=python3  RESULTS=gpu  DATA=cifar10-jpeg.tar.gz (digits where there is none)
#
# The same by hand:
#   DEIT_FAST_CUDA_ARCHS=90 python3 -m pip install -q --no-index --no-deps --no-build-isolation -e .
#   python3 benchmarks/gpu_check.py --out gpu/gpu_check.json --only parity          (then graphs, losses, step, ...)
#   DEIT_FAST_BACKEND=triton,augment=cuda python3 -m deit_fast.study --fused --device cuda --amp --channels-last ...
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} data=${DATA:-cifar10-jpeg.tar.gz}
mkdir -p "${RESULTS:-gpu}"
results=$(realpath "${RESULTS:-gpu}")
export DEIT_FAST_CACHE="$results/cache"

run() {  # name, seconds, command: its output on the screen and in a file, its exit code in a line; the next one goes on
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" 2>&1 | tee "$results/$name.log"
    echo "$name: exit ${PIPESTATUS[0]} after $((SECONDS - start)) s" | tee -a "$results/exits.txt"
}

check() { run "$1" 590 "$python" benchmarks/gpu_check.py --out "$results/gpu_check.json" --only "$1"; }

[ $# -gt 0 ] || set -- build parity graphs losses step rates ops augment study presets
for name; do
    case $name in
        build)
            DEIT_FAST_CUDA_ARCHS=${ARCHS:-90} run build 590 \
                "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e .
            "$python" -m deit_fast | tee "$results/backends.txt"
            ;;
        graphs)
            check graphs
            run graphs-tests 300 env PYTHONPATH=.:tests "$python" -m pytest -q -p no:cacheprovider tests/test_graphs.py \
                tests/test_optim.py -k "gpu or captured"
            ;;
        study)
            set=(--data-set folder --data-path "$data")
            [ -e "$data" ] || set=(--data-set digits)
            # Kernels that no benchmark has chosen yet serve only by name; bf16 and channels-last are for the teacher.
            DEIT_FAST_BACKEND=${DEIT_FAST_BACKEND:-triton,augment=cuda} run study 590 "$python" -m deit_fast.study \
                --fused --device cuda --amp --channels-last --eval-batch-size 2048 --seeds 0 "${set[@]}" \
                --output-dir "$results/study"
            ;;
        *) check "$name" ;;
    esac
done
