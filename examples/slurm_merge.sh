#!/bin/bash
# DiDi-Merging on several machines under SLURM: one process per CPU socket or GPU, which share the matrices out among
# themselves and write one model. The job may be cut off: submitted again with the same settings it goes on where it was, with
# any number of processes.
#
#   sbatch examples/slurm_merge.sh modelpool=CausalLMPool/llama_for_causallm method.output_dir=/shared/merged
#
# method.output_dir, the checkpoints and the base model must be on a file system that all machines share.
#SBATCH --job-name=didi-merge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
set -eu

# One thread per core of a process: matrices are worked on side by side.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:?run me with sbatch}"
# A matrix that takes longer than this (seconds) makes the other processes give up.
export FUSION_BENCH_DIDI_RANK_TIMEOUT="${FUSION_BENCH_DIDI_RANK_TIMEOUT:-3600}"

# srun starts the processes, Lightning Fabric reads who they are from SLURM's variables. With GPUs: --gpus-per-task=1 above and
# fabric.accelerator=cuda below. A process that dies ends the job step at once.
exec srun --kill-on-bad-exit=1 fusion_bench \
    method=didi \
    taskpool=dummy \
    fabric.accelerator=cpu \
    ++fabric.num_nodes="$SLURM_NNODES" \
    fabric.devices="$SLURM_NTASKS_PER_NODE" \
    "$@"
