#!/usr/bin/env bash
# Stop the cluster that up.sh started, and nothing else.
#
#   SLURM_TEST_DIR=DIR bash tests/slurm/down.sh
#
# Jobs are cancelled first, then each daemon is ended by the pid in its pid file (after a check that the pid still is
# that daemon), then whatever a job left behind: a process is only taken for one of ours when its environment has this
# cluster's SLURM_CONF *and* a SLURM_JOB_ID, or it is a slurmstepd with this cluster's SLURM_CONF. Safe to run twice, or
# when nothing is up. SLURM_TEST_PURGE=1 removes the directory; otherwise its logs stay.

set -uo pipefail
export LC_ALL=C
export PATH=$PATH:/usr/sbin:/sbin

D=${SLURM_TEST_DIR:?}
MARK="# tests/slurm/up.sh $D"
say() { printf 'slurm down: %s\n' "$*"; }

[ -d "$D" ] || { say "nothing at $D"; exit 0; }
[[ $D == /* && -e $D/.transfusion-slurm ]] || { say "$D is none of up.sh's: not touching it"; exit 2; }
export SLURM_CONF=$D/slurm.conf

pid_of() {                                  # pid_of NAME PROGRAM -> its pid, if it is alive
    local p exe                             # (a zombie has no exe; a recycled pid another one)
    { read -r p < "$D/run/$1.pid"; } 2>/dev/null || return 1
    [[ $p =~ ^[0-9]+$ ]] && exe=$(readlink "/proc/$p/exe") || return 1
    [[ ${exe##*/} == "$2"* ]] && printf '%s' "$p"
}
stop() {                                    # stop SECONDS NAME:PROGRAM...: TERM all, wait, KILL
    local secs=$1 np p i; shift
    local -A was=()
    for np in "$@"; do
        if p=$(pid_of "${np%%:*}" "${np#*:}"); then
            was[$p]=$(readlink "/proc/$p/exe")
            kill -TERM "$p" 2>/dev/null
        fi
    done
    for (( i = 0; i < secs * 20; i++ )); do
        for p in "${!was[@]}"; do
            # (Not by the pid file: the daemons remove those themselves, some early.)
            [ "$(readlink "/proc/$p/exe")" = "${was[$p]}" ] || unset "was[$p]"
        done
        (( ${#was[@]} )) || break
        sleep 0.05
    done
    (( ${#was[@]} )) && kill -KILL "${!was[@]}" 2>/dev/null
    for np in "$@"; do rm -f "$D/run/${np%%:*}.pid"; done
}
ours() {                                    # pids of this cluster's job processes
    local d p e
    for d in /proc/[0-9]*; do
        p=${d#/proc/}
        # Kernel threads and others' processes have no readable environ.
        { e=$(tr '\0' '\n' < "$d/environ"); } 2>/dev/null || continue
        grep -qxF "SLURM_CONF=$SLURM_CONF" <<< "$e" || continue
        if grep -q '^SLURM_JOB_ID=' <<< "$e" || grep -qa slurmstepd "$d/comm" 2>/dev/null; then
            (( p != $$ && p != BASHPID )) && printf '%s\n' "$p"
        fi
    done
}

# 1. The jobs, while there still are daemons to end them in good order.
if pid_of slurmctld slurmctld >/dev/null; then
    jobs=$(timeout 10 squeue -h -o %A 2>/dev/null | sort -u | tr '\n' ' ')
    if [ -n "${jobs// /}" ]; then
        say "cancelling jobs: $jobs"
        # shellcheck disable=SC2086
        timeout 20 scancel $jobs 2>/dev/null
        # A moment for those that heed a TERM; step 3 sees to the others.
        for (( i = 0; i < 8; i++ )); do
            [ -z "$(timeout 10 squeue -h -o %A 2>/dev/null)" ] && break
            sleep 0.1
        done
    fi
fi

# 2. The daemons.
nodes=()
for f in "$D"/run/slurmd-*.pid; do
    [ -e "$f" ] || continue
    n=${f##*/}; nodes+=("${n%.pid}:slurmd")
done
# A slurmd or slurmctld that still ends a job would take its time; nothing of
# theirs is worth waiting for, so each gets a second, then it is KILLed.
stop 1 slurmctld:slurmctld "${nodes[@]}"
stop 1 slurmdbd:slurmdbd mariadbd:mariadbd munged:munged

# 3. What a job left behind: it has had its TERM.
for i in 1 2 3 4 5; do
    left=$(ours | tr '\n' ' ')
    [ -n "$left" ] || break
    say "ending leftover job processes: $left"
    # shellcheck disable=SC2086
    kill -KILL $left 2>/dev/null
    sleep 0.2
done

# 4. Files. Only what up.sh made.
if [ -e "$D/etc/cgroup" ]; then             # the nodes' cgroups: rmdir takes empty ones only
    for d in /sys/fs/cgroup/{freezer,memory}/slurm_node*; do
        n=${d##*/slurm_}
        [ -d "$d" ] || continue
        grep -q "^NodeName=$n " "$SLURM_CONF" 2>/dev/null || continue
        find "$d" -depth -type d -exec rmdir {} + 2>/dev/null
    done
fi
if [ -w /etc/hosts ] && grep -qF "$MARK" /etc/hosts; then
    hosts=$(grep -vF "$MARK" /etc/hosts) && printf '%s\n' "$hosts" > /etc/hosts
fi
rm -rf -- "${D:?}"/{run,state,spool,db,munge,etc,dev}
rm -f -- "$D"/{slurm.conf,gres.conf,cgroup.conf,slurmdbd.conf,env.sh}
if [ "${SLURM_TEST_PURGE:-0}" = 1 ]; then
    rm -rf -- "$D/log" "$D/.transfusion-slurm"
    rmdir -- "$D"
fi
say "down"
