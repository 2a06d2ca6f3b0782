#!/usr/bin/env bash
# Everything that is worth knowing about a machine with a GPU, in ten minutes and one JSON: see benchmarks/gpu.py.
#
#   benchmarks/gpu.sh                                  # torch >= 2.11 with CUDA and the package's dependencies
#   DEVICE=cpu benchmarks/gpu.sh --small               # a smoke test of the same script
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu.py --device "${DEVICE:-cuda}" --total-seconds "${TOTAL_SECONDS:-570}" "$@"
