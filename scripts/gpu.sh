#!/usr/bin/env bash
# A borrowed GPU, nothing to download: the checks in the order of what they are worth, each below 8 minutes (the study
# below 10), all within MINUTES. Give the names of some to run only those.
#
#   scripts/gpu.sh [build parity step ops graphs losses presets augment inference rates study]
#   MINUTES=25  ARCHS=90  PYTHON=python3  RESULTS=gpu  WORK=build/gpu  DATA=cifar10-jpeg.tar.gz (else the digits)
#   DEIT_FAST_COMMIT: what the figures are of, where there is no .git;  DEIT_FAST_CPU_ISAS=generic
#
# With a quarter of an hour in commands of ten minutes, which end by themselves before they are ended:
#   MINUTES=9 scripts/gpu.sh build parity step ops;  MINUTES=4 scripts/gpu.sh graphs losses presets augment
#
# RESULTS gets three files: gpu_check.json, gpu.log (all output, with a line "exit" for each check) and study.tar.gz.
# Every figure is on disk as soon as it is measured. Caches, the study's runs and a copy of gpu_check.json lie in WORK;
# a later call goes on from that copy if RESULTS has no file of its own.
#
# The same by hand:
#   DEIT_FAST_CUDA_ARCHS=90 python3 -m pip install -q --no-index --no-deps --no-build-isolation -e .
#   python3 benchmarks/gpu_check.py --out gpu/gpu_check.json --only parity          (then step, ops, graphs, ...)
#   DEIT_FAST_BACKEND=triton,augment=cuda python3 -m deit_fast.study --fused --device cuda --amp --channels-last ...
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} data=${DATA:-cifar10-jpeg.tar.gz} minutes=${MINUTES:-25}
mkdir -p "${RESULTS:-gpu}" "${WORK:-build/gpu}"
results=$(realpath "${RESULTS:-gpu}") work=$(realpath "${WORK:-build/gpu}")
figures=$results/gpu_check.json
export DEIT_FAST_CACHE="$work/cache" PYTHONUNBUFFERED=1 PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
[ -e "$figures" ] || [ ! -e "$work/gpu_check.json" ] || cp "$work/gpu_check.json" "$figures"

left() {  # seconds, at most this many
    local seconds=$((60 * minutes - SECONDS))
    echo $((seconds < $1 ? seconds : $1))
}

run() {  # name, seconds, command: its output and exit code on the screen and in the log; the next one goes on
    local name=$1 limit status start=$SECONDS
    limit=$(left "$2")
    shift 2
    if [ "$limit" -le 0 ]; then
        echo "$name: left out, $minutes minutes are over" | tee -a "$results/gpu.log"
        return
    fi
    echo "== $name" >> "$results/gpu.log"
    timeout -k 10 "$limit" "$@" 2>&1 | tee -a "$results/gpu.log"
    status=${PIPESTATUS[0]}
    echo "$name: exit $status after $((SECONDS - start)) s" | tee -a "$results/gpu.log"
    return "$status"
}

# Seconds of a section's turn. What compiles for long comes again at the end, for what its first turn left out.
declare -A turns=([parity]=300 [step]=150 [ops]=210 [graphs]=90 [losses]=120 [presets]=150 [augment]=150
                  [inference]=120 [rates]=45)

check() {  # a section; in the last quarter of its time, a minute at most, it starts nothing new
    local again=3 limit starts
    while :; do
        limit=$(left "${turns[$1]}")
        starts=$((limit > 240 ? limit - 60 : limit * 3 / 4))
        run "$1" "$limit" "$python" benchmarks/gpu_check.py --out "$figures" --only "$1" \
            --minutes "$((starts / 60)).$((starts % 60 * 10 / 60))"
        # 3: an error took the GPU from the process. Above 128: it died itself. What took it comes last from now on.
        case $? in 3 | 132 | 134 | 135 | 136 | 139) [ $((again--)) -gt 0 ] || break ;; *) break ;; esac
    done
    [ ! -e "$figures" ] || cp "$figures" "$work/gpu_check.json"
}

[ $# -gt 0 ] || set -- build parity step ops graphs losses presets augment inference rates study step ops presets parity
for name; do
    case $name in
        build)
            DEIT_FAST_CUDA_ARCHS=${ARCHS:-90} DEIT_FAST_CPU_ISAS=${DEIT_FAST_CPU_ISAS:-generic} run build 180 \
                "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e .
            run backends 60 "$python" -m deit_fast
            ;;
        graphs)
            check graphs
            run graphs-tests 150 env PYTHONPATH=.:tests "$python" -m pytest -q -p no:cacheprovider \
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
exit 0
