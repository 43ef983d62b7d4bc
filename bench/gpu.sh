#!/usr/bin/env bash
# Everything on one CUDA GPU in under 10 minutes: bench/gpu.py (all five sizes' blocks, both patchers, sampling, encoding;
# takes the options) and bench/fit.py (planned against measured memory, a save's stall). Each ends with one JSON object,
# which is kept in bench/results under the GPU's name.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
status=0
keep() { # name of the bench, what it printed
  local record name
  record=$(printf '%s\n' "$2" | tail -n 1)
  name=$("$python" -c 'import json, sys; print(json.loads(sys.argv[1])["device"].lower().replace(" ", "-"))' "$record")
  [ "$name" = cpu ] || printf '%s\n' "$record" >"bench/results/$1-$name.json"
  printf '%s\n' "$record"
}
device=cuda
[[ " $* " == *" --device cpu "* ]] && device=cpu
printed=$("$python" -m bench.gpu "$@") || status=$?
[ -n "$printed" ] || exit "$status"
keep gpu "$printed"
printed=$("$python" -m bench.fit --device "$device")
keep fit "$printed"
exit "$status"
