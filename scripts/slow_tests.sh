#!/usr/bin/env bash
# The tests that take minutes, left out of the ordinary run, and 10,000 random calls of the CPU ops (DEIT_FAST_EXAMPLES).
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -m slow "$@"
DEIT_FAST_EXAMPLES=${DEIT_FAST_EXAMPLES:-10000} exec python -m pytest tests/test_random_calls.py
