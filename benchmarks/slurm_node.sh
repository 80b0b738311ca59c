#!/usr/bin/env bash
# A Slurm of one node on this machine, for tests of `launch.py submit --to=slurm`: munged, slurmctld and slurmd, all in one
# directory, without systemd, cgroups or accounting. As root; on Debian: apt-get install slurm-wlm
#
#   benchmarks/slurm_node.sh start DIRECTORY      # then: export SLURM_CONF=DIRECTORY/slurm.conf
#   benchmarks/slurm_node.sh stop DIRECTORY
#
# It is no example of a cluster: jobs are bounded by nothing, and times are short (KillWait 20 s, credentials 5 s, which is also how
# long a job that was put back into the queue waits).
set -euo pipefail

if [ $# -ne 2 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$2"
directory=$(cd "$2" && pwd)
export SLURM_CONF=$directory/slurm.conf

ended() {  # waits for the process of a pid file
  for _ in $(seq 100); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.1
  done
  echo "process $1 does not end" >&2
  return 1
}

stop() {
  for name in slurmd slurmctld munged; do
    if [ -f "$directory/$name.pid" ]; then
      pid=$(cat "$directory/$name.pid")
      if kill "$pid" 2>/dev/null; then ended "$pid"; fi
      rm -f "$directory/$name.pid"
    fi
  done
}

start() {
  for name in munged slurmctld slurmd sinfo; do
    command -v "$name" >/dev/null || { echo "$name is not installed: apt-get install slurm-wlm" >&2; exit 1; }
  done
  mkdir -p "$directory/state" "$directory/spool"
  chmod 755 "$directory"  # munged wants nobody else to write here
  [ -f "$directory/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$directory/munge.key")
  munged --key-file="$directory/munge.key" --socket="$directory/munge.socket" --pid-file="$directory/munged.pid" \
    --log-file="$directory/munged.log" --seed-file="$directory/munge.seed" --force 2>>"$directory/munged.log"
  host=$(hostname -s)
  cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=${SLURM_NODE_PORT:-16817}
SlurmdPort=$((${SLURM_NODE_PORT:-16817} + 1))
AuthType=auth/munge
AuthInfo=socket=$directory/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
MpiDefault=none
ReturnToService=2
KillWait=20
MinJobAge=3600
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
  slurmctld
  slurmd -N "$host"
  for _ in $(seq 100); do
    if sinfo --noheader --format=%T 2>/dev/null | grep -q idle; then
      echo "export SLURM_CONF=$SLURM_CONF"
      return 0
    fi
    sleep 0.2
  done
  echo "the node is not idle after 20 s; see $directory/slurmctld.log and slurmd.log" >&2
  exit 1
}

case $1 in
  start) stop; start ;;
  stop) stop ;;
  *) echo "say start or stop, not $1" >&2; exit 2 ;;
esac
