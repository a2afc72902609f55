#!/usr/bin/env bash
# The tests that take minutes, left out of the ordinary run (test_augment_far.py makes outputs of 4.4 GB), and random
# calls: 10,000 of the CPU ops (DEIT_FAST_EXAMPLES), 12,000 of `augment`, 3,000 of its CUDA kernels on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -m slow "$@"
DEIT_FAST_EXAMPLES=${DEIT_FAST_EXAMPLES:-10000} exec python -m pytest tests/test_random_calls.py \
    tests/test_augment.py tests/test_cuda_on_host.py -k "random"
