#!/bin/bash
#SBATCH --job-name=soup
#SBATCH --time=04:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# usage: sbatch slurm.sh [soup.yaml [output]]
# One task a process and no launcher between: each gets the signal itself, writes its part of the checkpoint, and exits 75.

file=${1:-soup.yaml}
output=${2:-output}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500 OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

before=$(cksum 2>/dev/null < "$output/run.json")
# shellcheck disable=SC2016 # each task has its own numbers
srun --kill-on-bad-exit=0 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
  exec python -m soup_xb train "$0" --output "$1" --resume' "$file" "$output"
code=$?
# An untouched run.json tells of an earlier job: this one failed before its first step, and would fail there again.
if [ "$(cksum < "$output/run.json")" != "$before" ] && grep -q '"status": "interrupted"' "$output/run.json"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
