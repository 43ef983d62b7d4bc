#!/usr/bin/env bash
# Bring up a real Slurm cluster for the tests: slurmctld, three slurmd, slurmdbd, MariaDB and munge, all of them
# Debian's packages, on this one machine. run.sh calls it, and down.sh after it.
#
#   SLURM_TEST_DIR=DIR bash tests/slurm/up.sh && . DIR/env.sh        DIR is new or empty
#   sinfo; sbatch ...; srun ...; sacct ...
#   SLURM_TEST_DIR=DIR bash tests/slurm/down.sh
#
# It needs root, but neither systemd nor cgroups, and the network only to install what is missing. Everything that it
# writes at run time is in DIR; /etc/slurm, /etc/munge and the system's database stay as they are. (Where
# namespaces are refused, node names go into /etc/hosts between marks, and down.sh takes them out.) Sockets are Unix
# ones, or listen on 127.0.0.1. (Where this machine's name resolves to another address, Slurm's daemons need 0.0.0.0.)
#
# Each "node" is a slurmd (`slurmd -N nodeX`) in a UTS and mount namespace of its own, so that `hostname` on node1
# prints node1 and the nodes' names resolve there. They share network, file system and CPUs. The CPUs, memory and GPUs
# declared are made up: jobs are scheduled against them, and a "GPU" is only an index. Where cgroup v1 can be written,
# Slurm tracks and ends a job's processes with it, and enforces --mem; elsewhere it uses parent pids, which orphans
# escape. Two clusters cannot share cgroups: the second runs without.
#
# Exit codes: 0 up; 77 Slurm cannot be had here (not root, no apt-get, packages that do not install); anything else: it
# should have come up and did not, and the ends of the logs are printed.

set -euo pipefail
exec < /dev/null        # a closed stdin (CI) would give descriptor 0 to some socket of a daemon
export LC_ALL=C

D=${SLURM_TEST_DIR:?}
NODES=3
CPUS=64 GPUS=8 MEM_MB=256000    # declared a node
PORT0=26800      # the first of the TCP ports to try
WAIT_S=30        # for each daemon
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MARK="# tests/slurm/up.sh $D"              # marks lines put into /etc/hosts
export PATH=$PATH:/usr/sbin:/sbin          # munged, slurmd, ... live there

say()  { printf 'slurm up: %s\n' "$*"; }
skip() { say "SKIP: $*"; exit 77; }

# Bounded polling: try CMD every 50 ms, at most $WAIT_S seconds.
wait_for() {                               # wait_for WHAT CMD...
    local what=$1 end=$((SECONDS + WAIT_S)); shift
    until "$@" 2>/dev/null; do
        if (( SECONDS > end )); then say "gave up after ${WAIT_S}s: $what"; return 1; fi
        sleep 0.05
    done
}

on_exit() {                                # the EXIT trap, once everything is installed
    local rc=$? f
    (( rc )) || return 0
    trap - EXIT; set +e
    say "FAILED (rc=$rc)"
    for f in "$D"/log/*.log; do
        case $f in */apt*) continue ;; esac
        [ -s "$f" ] || continue
        printf -- '----- last lines of %s\n' "$f"
        tail -n 25 "$f"
    done
    exit 1
}

nodes_idle() {
    [ "$(SLURM_CONF=$D/slurm.conf timeout 10 sinfo -h -N -p main -t idle -o %N | sort -u | wc -l)" = "$NODES" ]
}
listening() {                              # listening PORT: does anything, on any address?
    grep -qiE "$(printf '^ *[0-9]+: [0-9A-F]+:%04X [0-9A-F:]+ 0A ' "$1")" /proc/net/tcp
}

(( EUID == 0 )) || skip "needs root"
(( ${#D} <= 70 )) || { say "SLURM_TEST_DIR is too long for Unix sockets: $D"; exit 2; }
[[ $D == /* ]] || { say "SLURM_TEST_DIR must be absolute: $D"; exit 2; }
mkdir -p "$D"
[ -z "$(ls -A "$D")" ] || { say "SLURM_TEST_DIR is not empty: $D"; exit 2; }
: > "$D/.transfusion-slurm"                # down.sh removes only what is marked
chmod 755 "$D"

need=(munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins slurmdbd slurm-wlm-mysql-plugin mariadb-server-core)
missing=()
for p in "${need[@]}"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null) == installed ]] || missing+=("$p")
done
if (( ${#missing[@]} )); then
    command -v apt-get >/dev/null || skip "no apt-get, and not installed: ${missing[*]}"
    mkdir -p "$D/log"
    export DEBIAN_FRONTEND=noninteractive
    # No fsync per file, no man pages or docs to unpack and index: this is most
    # of what an install costs. (The copyright files stay.)
    apt=(apt-get -q -y -o DPkg::Lock::Timeout=120 -o Acquire::Retries=2
         -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-unsafe-io
         -o 'Dpkg::Options::=--path-exclude=/usr/share/man/*'
         -o 'Dpkg::Options::=--path-exclude=/usr/share/doc/*'
         -o 'Dpkg::Options::=--path-include=/usr/share/doc/*/copyright')
    # apt_do LOG ARGS...: again (at most 12 times 5 s) while another apt has a lock.
    apt_do() {
        local log=$1 i rc=0; shift
        for (( i = 0; i < 12; i++ )); do
            rc=0; "${apt[@]}" "$@" > "$log" 2>&1 || rc=$?
            if (( rc == 0 )) || ! grep -q 'Could not get lock\|Unable to lock' "$log"; then break; fi
            sleep 5
        done
        return $rc
    }
    # Fresh package lists, unless some were fetched within the last day and know the package.
    if ! { [ -n "$(find /var/lib/apt/lists -maxdepth 1 -name '*_Packages*' -mtime -1 -print -quit 2>/dev/null)" ] &&
           apt-cache show slurmctld >/dev/null 2>&1; }; then
        apt_do "$D/log/apt-update.log" update || say "apt-get update complained (see $D/log/apt-update.log)"
    fi
    # The packages' own daemons must not start: where nothing forbids it yet, a
    # policy-rc.d does for the time of the install.
    policy=
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        policy=/usr/sbin/policy-rc.d
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nexit 101\n' > $policy && chmod 755 $policy
    fi
    # If it fails, the lists may have been stale after all: once more with new ones.
    apt_do "$D/log/apt.log" install --no-install-recommends "${missing[@]}" ||
        { apt_do "$D/log/apt-update.log" update &&
          apt_do "$D/log/apt.log" install --no-install-recommends "${missing[@]}"; } ||
        { tail -n 15 "$D/log/apt.log"; skip "apt-get could not install ${missing[*]}"; }
    if [ -n "$policy" ]; then rm -f "$policy"; trap - EXIT; fi
fi

trap on_exit EXIT

mkdir -p "$D"/{run,log,state,munge,etc} "$D"/db/{data,tmp}
chmod 700 "$D/state" "$D/db"

# One cluster of this machine at a time, until its daemons listen: two would find the same ports and the same cgroups
# free. (The lock is on a file that is there anyway, and that both may have to edit.)
exec 8< /etc/hosts
flock -w 120 8 || { say "another cluster has been coming up for two minutes"; exit 2; }

# The ports (controller, slurmdbd, one per node): the first hundred where nothing listens on any of them.
base=
for (( b = PORT0; b < PORT0 + 2000; b += 100 )); do
    free=1
    for p in "$b" $((b+1)) $(seq $((b+10)) $((b+9+NODES))); do
        if listening "$p"; then free=0; break; fi
    done
    if (( free )); then base=$b; break; fi
done
[ -n "$base" ] || { say "no free ports from $PORT0 on"; exit 2; }

# May this process make UTS and mount namespaces? (A plain container may not.)
NS=1
unshare --uts --mount true 2>/dev/null || NS=0

# cgroup v1, both hierarchies needed writable, and no other cluster's node0 in them
# (Slurm's directory there is slurm_NODENAME).
cg_ok() {
    local h
    for h in freezer memory; do
        [ -e "/sys/fs/cgroup/$h/tasks" ] && [ ! -e "/sys/fs/cgroup/$h/slurm_node0" ] || return 1
        mkdir "/sys/fs/cgroup/$h/slurm_node0" 2>/dev/null || return 1
        rmdir "/sys/fs/cgroup/$h/slurm_node0"
    done
}
CGROUP=0
if cg_ok; then CGROUP=1; fi

# Daemons and srun can be told to bind to their own address, not to 0.0.0.0. They take their host name's address then,
# while the others call 127.0.0.1: good only where the two are the same.
comm='# (this host name is not 127.0.0.1, so no CommunicationParameters=NoInAddrAny)'
if [ "$(getent ahostsv4 "$(hostname)" 2>/dev/null | awk 'NR == 1 { print $1 }')" = 127.0.0.1 ]; then
    comm=CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
fi

# All nodes share 127.0.0.1 and differ by slurmd's port. (An address of its own for
# each, 127.0.50.x, breaks srun inside a job, for the reason above.)
host_lines() {
    local i
    for (( i = 0; i < NODES; i++ )); do printf '127.0.0.1 node%d %s\n' "$i" "$MARK"; done
}
if (( NS )); then
    { cat /etc/hosts; host_lines; } > "$D/etc/hosts"       # bind-mounted on each node
else
    say "no namespaces here: every node will see this machine's host name"
    host_lines >> /etc/hosts
fi

{
    cat <<EOF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$base
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job is held back before it may start
# again (120 s unless told), and how long a job's credential lives, so not much less.
AuthInfo=socket=$D/munge/sock,cred_expire=5
$comm
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true

$(if (( CGROUP )); then
      printf 'ProctrackType=proctrack/cgroup\nTaskPlugin=task/cgroup\n'
  else
      printf 'ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\n'
  fi)
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=1

# Quick to notice, quick to act (the defaults suit thousands of nodes).
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,bf_continue
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# Without this a job that asks for no memory gets all of its nodes' memory.
DefMemPerCPU=$(( MEM_MB / CPUS ))
SlurmdTimeout=10
KillWait=10
MinJobAge=3600

# A job of 'main' may push one of 'scavenge' out: that one is warned (with its
# --signal, if it asked for one), has GraceTime to save, is ended and requeued.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1

JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.txt
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((base + 1))
AccountingStoragePass=$D/munge/sock
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
EOF
    for (( i = 0; i < NODES; i++ )); do
        printf 'NodeName=node%d NodeAddr=127.0.0.1 Port=%d CPUs=%d RealMemory=%d Gres=gpu:fake:%d\n' \
            "$i" $((base + 10 + i)) "$CPUS" "$MEM_MB" "$GPUS"
    done
    cat <<EOF
PartitionName=main Nodes=ALL Default=YES State=UP DefaultTime=10 MaxTime=2-00:00:00 PriorityTier=10 PreemptMode=OFF
PartitionName=scavenge Nodes=ALL State=UP DefaultTime=10 MaxTime=2-00:00:00 PriorityTier=1 PreemptMode=REQUEUE \
    GraceTime=15
EOF
} > "$D/slurm.conf"
if (( CGROUP )); then
    : > "$D/etc/cgroup"                      # tells down.sh to tidy up there
    printf '%s\n' CgroupPlugin=cgroup/v1 CgroupMountpoint=/sys/fs/cgroup CgroupAutomount=no \
        ConstrainRAMSpace=yes ConstrainSwapSpace=no ConstrainCores=no ConstrainDevices=no > "$D/cgroup.conf"
fi
# Stand-ins for /dev/nvidia*, so that Slurm hands out indices and sets CUDA_VISIBLE_DEVICES: device nodes like
# /dev/null. Where mknod is refused, plain files: slurmd grumbles, and the GPUs are only counted (SLURM_GPUS_ON_NODE).
mkdir -p "$D/dev"
for (( i = 0; i < GPUS; i++ )); do
    mknod "$D/dev/nvidia$i" c 1 3 2>/dev/null || : > "$D/dev/nvidia$i"
done
[ -c "$D/dev/nvidia0" ] || say "no mknod here: CUDA_VISIBLE_DEVICES will not be set"
printf 'Name=gpu Type=fake File=%s/dev/nvidia[0-%d]\n' "$D" $((GPUS - 1)) > "$D/gres.conf"
cat > "$D/env.sh" <<EOF
export SLURM_TEST_DIR='$D'
export SLURM_CONF='$D/slurm.conf'
EOF
export SLURM_CONF=$D/slurm.conf

# The daemons. Descriptor 8 is a lock: no daemon may inherit it.

# A private MariaDB on a Unix socket, grants off, no fsync: the data is worth nothing. The system tables come in with
# the first start (--init-file), which saves a bootstrap run. Started first, as it takes longest.
for f in /usr/share/mysql/{mysql,mariadb}_system_tables.sql; do   # (named so in 10.x, 11.x)
    if [ -e "$f" ]; then
        { printf 'create database if not exists mysql;\nuse mysql;\n'; cat "$f"; } > "$D/etc/init.sql"
    fi
done
# Its files lie on a tmpfs of its own mount namespace (up to 3 s faster, by how
# busy the disk is), which goes when it ends.
onram=()
if (( NS )); then                            # shellcheck disable=SC2016
    onram=(unshare --mount --propagation private /bin/sh -c
           'mount -t tmpfs -o size=1g,mode=700 slurm-tests-db "$0" && mkdir "$0/data" "$0/tmp" && exec "$@"' "$D/db")
fi
setsid "${onram[@]}" mariadbd --no-defaults --user=root --datadir="$D/db/data" --tmpdir="$D/db/tmp" \
    --socket="$D/run/mariadbd.sock" --pid-file="$D/run/mariadbd.pid" --init-file="$D/etc/init.sql" \
    --skip-networking --skip-grant-tables --skip-log-bin --performance-schema=OFF \
    --max-connections=20 --innodb-lock-wait-timeout=900 \
    --innodb-buffer-pool-size=16M --innodb-log-file-size=4M --innodb-flush-method=nosync \
    --innodb-flush-log-at-trx-commit=0 --skip-innodb-doublewrite --sync-frm=OFF \
    --aria-pagecache-buffer-size=4M --key-buffer-size=1M \
    > "$D/log/mariadbd.log" 2>&1 < /dev/null 8>&- &
printf '%d\n' $! > "$D/run/mariadbd.pid"     # mariadbd writes the same when ready

(umask 077; head -c 1024 /dev/urandom > "$D/munge/key")
# --force: some parent directory may be closed to others (a path below /root).
munged --force --key-file="$D/munge/key" --socket="$D/munge/sock" --pid-file="$D/run/munged.pid" \
    --log-file="$D/log/munged.log" --seed-file="$D/munge/seed" 2> "$D/log/munged-start.log" 8>&-
wait_for "munged" eval "munge -n -S '$D/munge/sock' | unmunge -S '$D/munge/sock' > /dev/null"

( umask 077; cat > "$D/slurmdbd.conf" <<EOF
AuthType=auth/munge
AuthInfo=socket=$D/munge/sock
$comm
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((base + 1))
SlurmUser=root
PidFile=$D/run/slurmdbd.pid
LogFile=$D/log/slurmdbd.log
DebugLevel=verbose
# slurmdbd greets a slurmctld that registers, before that one listens.
TCPTimeout=0
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
EOF
)
wait_for "mariadbd" grep -q 'ready for connections' "$D/log/mariadbd.log"
# libmariadb looks for the server's socket where MYSQL_UNIX_PORT says.
MYSQL_UNIX_PORT=$D/run/mariadbd.sock slurmdbd 8>&-
wait_for "slurmdbd" listening $((base + 1))

slurmctld -c 8>&-
wait_for "slurmctld" listening "$base"     # a slurmd that finds none waits seconds
for (( i = 0; i < NODES; i++ )); do
    bash "$HERE/node.sh" boot "node$i" 8>&-
done
wait_for "idle nodes" nodes_idle
exec 8>&-

# Does it really work? One task on every node through srun, and (with a database) its record in sacct.
# shellcheck disable=SC2016
out=$(timeout 30 srun -p main -N "$NODES" --ntasks-per-node=1 -t 1 --job-name=selftest \
        sh -c 'echo "$SLURMD_NODENAME"' 2> "$D/log/selftest.log" | sort | tr '\n' ' ')
want=$(for (( i = 0; i < NODES; i++ )); do echo "node$i"; done | sort | tr '\n' ' ')
[ "$out" = "$want" ] || { say "srun answered '$out', not '$want'"; false; }
wait_for "sacct" eval "timeout 10 sacct -X -n -P -j 1 -o State | grep -qx COMPLETED"
# And back to all idle, so that a test's first job starts at once.
wait_for "idle nodes after the selftest" nodes_idle
say "$NODES nodes x $CPUS CPUs, $MEM_MB MB, $GPUS GPUs (all made up), Slurm $(sinfo -V | cut -d' ' -f2)," \
    "cgroups $( (( CGROUP )) && echo on || echo off), node namespaces $( (( NS )) && echo on || echo off)"
say "use: . $D/env.sh"
