#!/usr/bin/env bash
# Cut the power of a node of the cluster that up.sh started, and bring it back.
#
#   bash tests/slurm/node.sh kill  node1   # slurmd, job steps and tasks of node1, all KILLed
#   bash tests/slurm/node.sh start node1   # boot it where it is off, wait until it is back in service
#   bash tests/slurm/node.sh boot  node1   # boot it without waiting: what up.sh does
#
# After `kill`, Slurm takes some 15-30 s to call the node down (SlurmdTimeout=10),
# ends its jobs with NODE_FAIL and requeues those that may be.

set -euo pipefail
exec < /dev/null
export LC_ALL=C
export PATH=$PATH:/usr/sbin:/sbin
D=${SLURM_TEST_DIR:?}
export SLURM_CONF=$D/slurm.conf
cmd=${1:-} node=${2:-}
case $cmd:$node in kill:node*|start:node*|boot:node*) ;; *) echo "usage: $0 kill|start|boot nodeN" >&2; exit 2 ;; esac
[ -r "$SLURM_CONF" ] || { echo "slurm node: no cluster at $D" >&2; exit 2; }

# The pids of everything that runs on the node: what shares its UTS namespace or,
# where nodes have none of their own, its slurmd and what that one's jobs run.
pids_on() {
    local d p ns e
    ns=$(cat "$D/run/$node.uts" 2>/dev/null || true)
    for d in /proc/[0-9]*; do
        p=${d#/proc/}
        if [ -n "$ns" ]; then
            [ "$(readlink "$d/ns/uts" 2>/dev/null)" = "$ns" ] && echo "$p"
        else
            { e=$(tr '\0' '\n' < "$d/environ"); } 2>/dev/null || continue
            grep -qxF "SLURM_CONF=$SLURM_CONF" <<< "$e" || continue
            if grep -qxE "(SLURMD_NODENAME|SLURM_TEST_NODE)=$node" <<< "$e"; then echo "$p"; fi
        fi
    done
    return 0
}

boot() {
    mkdir -p "$D/spool/$node"
    rm -f "$D/run/$node.uts"
    # SLURM_TEST_NODE marks slurmd and slurmstepds; jobs do not inherit it.
    if [ -e "$D/etc/hosts" ]; then         # shellcheck disable=SC2016
        SLURM_TEST_NODE=$node unshare --uts --mount --propagation private /bin/sh -c '
            hostname "$1" && mount --bind "$2/etc/hosts" /etc/hosts &&
            readlink /proc/self/ns/uts > "$2/run/$1.uts" && exec slurmd -N "$1"' sh "$node" "$D"
    else
        SLURM_TEST_NODE=$node slurmd -N "$node"
    fi
}

is_on() {
    local p exe
    { read -r p < "$D/run/slurmd-$node.pid"; } 2>/dev/null || return 1
    exe=$(readlink "/proc/$p/exe") && [[ ${exe##*/} == slurmd* ]]
}

case $cmd in
kill)
    for _ in 1 2 3; do                     # again for what was just being forked
        mapfile -t p < <(pids_on)
        (( ${#p[@]} )) || break
        kill -KILL "${p[@]}" 2>/dev/null || true
        sleep 0.1
    done
    rm -f "$D/run/slurmd-$node.pid"
    ;;
boot)
    boot
    ;;
start)
    # One that was only set down still runs; a second slurmd would lose track of what runs there.
    if ! is_on; then boot; fi
    SECONDS=0
    while (( SECONDS < 30 )); do
        case $(timeout 10 sinfo -h -n "$node" -p main -o %T 2>/dev/null) in
            idle|mixed|allocated) exit 0 ;;
            *down*|*drain*) timeout 10 scontrol update nodename="$node" state=resume 2>/dev/null || true ;;
        esac
        sleep 0.1
    done
    echo "slurm node: $node did not come back:" >&2
    timeout 10 sinfo -N -l >&2 || true
    tail -n 20 "$D/log/slurmd-$node.log" >&2 || true
    exit 1
    ;;
esac
