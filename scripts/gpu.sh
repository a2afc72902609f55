#!/usr/bin/env bash
# A borrowed GPU, nothing to download: the checks in the order of what they are worth, each below 8 minutes (the build
# and the study below 10), all within MINUTES. Give the names of some to run only those.
#
#   scripts/gpu.sh [build parity step inference ops graphs losses presets rates augment study]
#   MINUTES=25  ARCHS=90  PYTHON=python3  RESULTS=gpu  WORK=build/gpu  DATA=cifar10-jpeg.tar.gz (else the digits)
#   DEIT_FAST_COMMIT: what the figures are of, where there is no .git
#
# RESULTS gets three files: gpu_check.json, gpu.log (all output, with a line "exit" for each check) and study.tar.gz.
# Every figure is on disk as soon as it is measured. Caches, the study's runs and a copy of gpu_check.json lie in WORK;
# a later call goes on from that copy if RESULTS has no file of its own.
#
# The same by hand:
#   DEIT_FAST_CUDA_ARCHS=90 python3 -m pip install -q --no-index --no-deps --no-build-isolation -e .
#   python3 benchmarks/gpu_check.py --out gpu/gpu_check.json --only parity          (then step, inference, ops, ...)
#   DEIT_FAST_BACKEND=triton,augment=cuda python3 -m deit_fast.study --fused --device cuda --amp --channels-last ...
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} data=${DATA:-cifar10-jpeg.tar.gz} minutes=${MINUTES:-25}
mkdir -p "${RESULTS:-gpu}" "${WORK:-build/gpu}"
results=$(realpath "${RESULTS:-gpu}") work=$(realpath "${WORK:-build/gpu}")
figures=$results/gpu_check.json
export DEIT_FAST_CACHE="$work/cache"
[ -e "$figures" ] || [ ! -e "$work/gpu_check.json" ] || cp "$work/gpu_check.json" "$figures"

left() {  # seconds, at most this many
    local seconds=$((60 * minutes - SECONDS))
    echo $((seconds < $1 ? seconds : $1))
}

run() {  # name, seconds, command: its output and exit code on the screen and in the log; the next one goes on
    local name=$1 limit start=$SECONDS
    limit=$(left "$2")
    shift 2
    if [ "$limit" -le 0 ]; then
        echo "$name: left out, $minutes minutes are over" | tee -a "$results/gpu.log"
        return
    fi
    echo "== $name" >> "$results/gpu.log"
    timeout -k 10 "$limit" "$@" 2>&1 | tee -a "$results/gpu.log"
    echo "$name: exit ${PIPESTATUS[0]} after $((SECONDS - start)) s" | tee -a "$results/gpu.log"
}

check() {  # a section, which has a minute to end what it is at when it may start nothing new
    run "$1" 475 "$python" benchmarks/gpu_check.py --out "$figures" --minutes $(($(left 475) / 60 - 1)) --only "$1"
    [ ! -e "$figures" ] || cp "$figures" "$work/gpu_check.json"
}

# What compiles for long comes again at the end, for what its first turn had no time left for.
[ $# -gt 0 ] || set -- build parity step inference ops graphs losses presets rates augment study step ops presets
for name; do
    case $name in
        build)
            DEIT_FAST_CUDA_ARCHS=${ARCHS:-90} run build 590 \
                "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e .
            run backends 60 "$python" -m deit_fast
            ;;
        graphs)
            check graphs
            run graphs-tests 300 env PYTHONPATH=.:tests "$python" -m pytest -q -p no:cacheprovider \
                -k "gpu or captured" tests/test_graphs.py tests/test_graph_failures.py tests/test_optim.py
            ;;
        study)
            set=(--data-set folder --data-path "$data")
            [ -e "$data" ] || set=(--data-set digits)
            # Kernels that no benchmark has chosen yet serve only by name; bf16 and channels-last are for the teacher.
            DEIT_FAST_BACKEND=${DEIT_FAST_BACKEND:-triton,augment=cuda} run study 590 "$python" -m deit_fast.study \
                --fused --device cuda --amp --channels-last --eval-batch-size 2048 --seeds 0 "${set[@]}" \
                --output-dir "$work/study"
            tar czf "$results/study.tar.gz" -C "$work" --exclude='*.pt' --exclude='*.safetensors' --exclude=teachers \
                study
            ;;
        *) check "$name" ;;
    esac
done
