#!/usr/bin/env bash
# run.sh - the tests that need Slurm, on a cluster of their own that is brought up before and taken down after.
#
#   make test-slurm            or  bash tests/slurm/run.sh [pytest's options]
#
# Where Slurm cannot be had (not root, no Debian packages) it says so and skips, unless REQUIRE_SLURM=1.
set -euo pipefail
cd "$(dirname "$0")/../.."
SLURM_TEST_DIR=$(mktemp -d /tmp/transfusion-slurm.XXXXXX)
export SLURM_TEST_DIR SLURM_TEST_PURGE=1
trap 'bash tests/slurm/down.sh; rmdir "$SLURM_TEST_DIR" 2>/dev/null || :' EXIT
rc=0
timeout 600 bash tests/slurm/up.sh || rc=$?
if (( rc == 77 )) && [ "${REQUIRE_SLURM:-0}" != 1 ]; then
    echo "test-slurm: skipped, Slurm cannot be had here (the reason stands above)"
    exit 0
fi
(( rc == 0 )) || exit "$rc"
# shellcheck disable=SC1091
. "$SLURM_TEST_DIR/env.sh"
rc=0
.venv/bin/python -m pytest -m slurm tests/slurm "$@" || rc=$?
if (( rc )); then
    SLURM_TEST_PURGE=0        # the daemons' logs may say why
    echo "test-slurm: failed; Slurm's own logs are in $SLURM_TEST_DIR/log"
fi
exit "$rc"
