#!/bin/bash
# Train on several machines for longer than a job may last: sbatch slurm_train.sh --dataset folder:/data/images
#
# Five minutes before the time is up SLURM wakes this script, which asks torchrun to stop. The run writes a checkpoint,
# the job goes back into the queue, and the next start continues from the newest undamaged checkpoint by itself. A
# process that is lost is survived on the same machines. All of them must see the output folder.
#SBATCH --job-name=fastdiff
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
output=${OUTPUT:-runs/$SLURM_JOB_ID}
first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# how long torchrun waits for the last checkpoint; torch 2.11 always waits for 30 seconds
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
# a new store at each restart: in the old one processes on several machines would look for the dead
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

requeue() {
    # the steps alone, on all machines; srun would kill them for a signal of its own
    scancel --signal=TERM "$SLURM_JOB_ID"
    wait "$run"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1

srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_machine:29500" \
    --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 3 \
    -m fastdiff -- train --output "$output" --no-progress "$@" &
run=$!
wait "$run"
