#!/bin/bash
# A SLURM cluster of one node on this machine, for tests:
#   slurm.sh install      Debian's packages, where they are absent and this is root
#   slurm.sh start DIR    starts munged, slurmctld and slurmd, all their files in DIR
#   slurm.sh stop DIR     stops them
# Its commands (sbatch, squeue, …) find it by SLURM_CONF=DIR/slurm.conf.
set -euo pipefail

tools=(munged slurmctld slurmd sbatch)

installed() { for tool in "${tools[@]}"; do command -v "$tool" >/dev/null || return 1; done; }

install() {
    installed && return
    [ "$(id -u)" = 0 ] || { echo "SLURM is not installed, and only root can install it"; return 1; }
    command -v apt-get >/dev/null || { echo "SLURM is not installed, and neither is apt-get"; return 1; }
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -y -qq slurm-wlm munge >/dev/null
    installed
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

start() {
    local dir=$1
    [ "$(id -u)" = 0 ] || { echo "slurmd must be run by root"; return 1; }
    installed || { echo "SLURM is not installed: $0 install"; return 1; }
    mkdir -p "$dir"/{state,spool,munge}
    chmod 755 "$dir" "$dir/munge"
    head -c 1024 /dev/urandom >"$dir/munge/key"
    chmod 600 "$dir/munge/key"
    trap 'stop "$dir"' ERR
    # As root, and with files where only this cluster looks.
    munged --force --num-threads=2 --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
        --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    cat >"$dir/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000
KillWait=10
ReturnToService=2
MpiDefault=none
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 * 9 / 10)) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
    export SLURM_CONF=$dir/slurm.conf
    slurmctld -c
    slurmd
    for _ in $(seq 100); do
        sinfo --noheader --format=%t 2>/dev/null | grep -qx idle && return
        sleep 0.2
    done
    tail -n 20 "$dir/slurmctld.log" "$dir/slurmd.log"
    stop "$dir"
    return 1
}

stop() {
    local dir=$1
    export SLURM_CONF=$dir/slurm.conf
    if scancel --user="$(id -un)" 2>/dev/null; then
        for _ in $(seq 150); do [ -z "$(squeue --noheader 2>/dev/null)" ] && break; sleep 0.2; done
    fi
    for pid in "$dir/slurmd.pid" "$dir/slurmctld.pid" "$dir/munge/pid"; do
        if [ -s "$pid" ]; then
            local process
            process=$(cat "$pid")
            kill "$process" 2>/dev/null || true
            for _ in $(seq 50); do kill -0 "$process" 2>/dev/null || break; sleep 0.1; done
        fi
    done
}

"$@"
