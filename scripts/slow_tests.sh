#!/usr/bin/env bash
# The tests that take minutes, left out of the ordinary run.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python -m pytest -m slow "$@"
