#!/usr/bin/env bash
# Run the tests that need Slurm on a cluster of their own, which comes up before them and goes down after them.
#
#   make test-slurm            or  bash tests/slurm/run.sh [pytest's options]
#
# Where Slurm cannot be had (not root, no Debian packages) it says so and skips, unless REQUIRE_SLURM=1.
set -euo pipefail
cd "$(dirname "$0")/../.."
SLURM_TEST_DIR=$(mktemp -d /tmp/transfusion-slurm.XXXXXX)
export SLURM_TEST_DIR
purge=1
# Nothing in here may fail, or the exit status would be its own. (Where there is no Slurm the directory is still empty
# and not marked, and down.sh would refuse it.)
# shellcheck disable=SC2317  # the trap calls it
leave() {
    rmdir "$SLURM_TEST_DIR" 2>/dev/null || SLURM_TEST_PURGE=$purge bash tests/slurm/down.sh || :
}
trap leave EXIT
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
    .venv/bin/python -m pytest -m "slurm and not slow" tests/slurm "$@" || rc=$?
fi
if (( rc )); then
    purge=0                   # the daemons' logs may say why
    echo "test-slurm: failed; Slurm's own logs are in $SLURM_TEST_DIR/log"
fi
exit "$rc"
