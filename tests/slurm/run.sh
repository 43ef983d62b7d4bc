#!/usr/bin/env bash
# Run the tests that need Slurm on a cluster of their own, which comes up before them and goes down after.
#
#   make test-slurm            or  bash tests/slurm/run.sh [pytest's options]
#
# Where Slurm cannot be had (not root, no Debian packages) it says so and skips, unless REQUIRE_SLURM=1.
set -euo pipefail
cd "$(dirname "$0")/../.."
SLURM_TEST_DIR=$(mktemp -d /tmp/transfusion-slurm.XXXXXX)
export SLURM_TEST_DIR SLURM_TEST_PURGE=1
# rmdir: where up.sh found no Slurm, or never got to mark the directory, there is nothing for down.sh to purge.
trap 'bash tests/slurm/down.sh; rmdir "$SLURM_TEST_DIR" 2>/dev/null || :' EXIT
# From a signal, too, the way out is through the trap above.
trap 'exit 130' INT
trap 'exit 143' TERM HUP
rc=0
timeout 600 bash tests/slurm/up.sh || rc=$?
if (( rc == 77 )); then
    if [ "${REQUIRE_SLURM:-0}" != 1 ]; then
        echo "test-slurm: skipped, Slurm cannot be had here (the reason stands above)"
        exit 0
    fi
    echo "test-slurm: failed, Slurm cannot be had here (the reason stands above) and REQUIRE_SLURM=1"
    exit 1
fi
if (( rc == 0 )); then
    # shellcheck disable=SC1091
    . "$SLURM_TEST_DIR/env.sh"
    .venv/bin/python -m pytest -m slurm tests/slurm "$@" || rc=$?
fi
if (( rc )); then
    SLURM_TEST_PURGE=0        # the daemons' logs may say why
    echo "test-slurm: failed; Slurm's own logs are in $SLURM_TEST_DIR/log"
fi
exit "$rc"
