#!/usr/bin/env bash
# All five sizes' blocks, both patchers, sampling and encoding on one CUDA GPU, in under 10 minutes; options go to bench/gpu.py.
# The last line is one JSON object; it is kept in bench/results under the GPU's name.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
status=0
record=$("$python" -m bench.gpu "$@") || status=$?
[ -n "$record" ] || exit "$status"
name=$("$python" -c 'import json, sys; print(json.loads(sys.argv[1])["device"].lower().replace(" ", "-"))' "$record")
[ "$name" = cpu ] || printf '%s\n' "$record" >"bench/results/gpu-$name.json"
printf '%s\n' "$record"
exit "$status"
