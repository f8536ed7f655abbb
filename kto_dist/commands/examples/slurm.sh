#!/usr/bin/env bash
# One run on several nodes under Slurm: `sbatch slurm.sh`. Preempted, or out of time, it saves a checkpoint and queues
# again, and goes on from there. Edit the lines below; --signal is the time before the end that a step and its
# checkpoint may take (cluster.grace).
#SBATCH --job-name=kto
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
CONFIG=${CONFIG:-config.yaml}   # the run's settings, at this path on every node
PYTHON=${PYTHON:-.venv/bin/python}   # with kto_dist, at this path on every node
PORT=${PORT:-29500}   # free on the first node
MOST_STARTS=${MOST_STARTS:-50}   # of this job, after which it is left alone

set -uo pipefail
step='' stopped=0
# to every rank, which saves and ends
trap 'stopped=1; [ -z "$step" ] || kill -TERM "$step" 2>/dev/null' TERM
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$PORT NNODES=$SLURM_JOB_NUM_NODES SLOTS=${SLURM_GPUS_ON_NODE:-1}

# a task a node: it starts a rank a GPU. --kill-on-bad-exit: a node that fails ends the others
# shellcheck disable=SC2016  # expanded on each node
srun --kill-on-bad-exit=1 bash -c \
  'export NODE_RANK=$SLURM_NODEID KTO_DIST_HOST=$SLURMD_NODENAME; exec "$@"' rank \
  "$PYTHON" -u -m kto_dist.cluster.agent train "$CONFIG" "$@" &
step=$!
# what came before there was a step
[ "$stopped" -eq 0 ] || kill -TERM "$step" 2>/dev/null
wait "$step"
status=$?
# a trap ends `wait` early: the step goes on until it has saved
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
  status=$?
done

if [ "$status" -eq 143 ] || [ "$stopped" -eq 1 ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MOST_STARTS" ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
