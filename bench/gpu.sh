#!/usr/bin/env bash
# Everything on one CUDA GPU in under ten minutes (bench/gpu.py). The record is kept in bench/results under the GPU's
# name, as gpu-NAME.json for `python -m train.plan kernels=FILE` and as a table, gpu-NAME.md. With options
# (--only 7b, --device cpu) nothing is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
[ $# -gt 0 ] || set -- --keep bench/results
exec "$python" -m bench.gpu "$@"
