#!/bin/bash
# Train on several machines under SLURM, for as long as it takes:
#   sbatch --nodes 2 examples/slurm.sh --data /shared/books --out /shared/runs/books --lanes 64
# What stands behind the script's name goes to memformer train. --out must be a folder that all machines share.

#SBATCH --job-name=memformer
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# The last line: five minutes before the time is over this script gets a signal.

set -u
first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# How long torchrun waits for a step and a checkpoint after it was told to stop, before it kills.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

stopped=
stop() {
    stopped=yes
    scancel --signal=TERM "$SLURM_JOB_ID" # to torchrun and the processes, not to this script: they save and end
}
trap stop USR1

srun --kill-on-bad-exit=0 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first_machine:29400" \
    -m memformer train --auto-resume "$@" &
running=$!

wait "$running"
status=$?
if [ -n "$stopped" ]; then
    wait "$running" # the first one was cut short by the signal
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
