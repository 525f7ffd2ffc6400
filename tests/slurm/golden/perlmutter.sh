#!/bin/bash
# NERSC Perlmutter, GPU nodes (4 NVIDIA A100), by: hpcasync submit ...
#SBATCH --job-name=resnet
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=2:00:00
#SBATCH --constraint=gpu
#SBATCH --qos=regular
#SBATCH --gpus-per-node=4
#SBATCH --account=project_1
#SBATCH --output=/scratch/run/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

# Exit code 75 means: a checkpoint is written, start me again. 138 and 143: the signal came before the ranks could catch it.
script=/scratch/run/job.sh asked= pid= restarts=${SLURM_RESTART_COUNT:-0}
pass_on() {
    asked=$1
    echo "hpcasync: $(date +%T) got $1, asking the ranks for a checkpoint"
    [ -z "$pid" ] || kill -USR1 "$pid" 2>/dev/null
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
finish() {
    local code=$1 state
    case $code in
        75 | 138 | 143) ;;
        *) exit "$code" ;;
    esac
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null)
    if [ "$state" != RUNNING ]; then
        echo "hpcasync: not requeued, the job is ${state:-gone}"
    elif [ "$restarts" -ge 20 ]; then
        echo "hpcasync: not requeued, 20 restarts are the limit (--max-restarts); to go on: sbatch $script"
    else
        # Said before it is done: Slurm ends this script while it is being queued again.
        echo "hpcasync: to be requeued, restart $((restarts + 1)) of at most 20"
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        echo "hpcasync: scontrol requeue failed; to go on: sbatch $script"
    fi
    exit "$code"
}

export OMP_NUM_THREADS="16"
export MPICH_GPU_SUPPORT_ENABLED="0"
export MPICH_OFI_NIC_POLICY="NUMA"
export NCCL_SOCKET_IFNAME="hsn"
export GLOO_SOCKET_IFNAME="hsn0"
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it from the allocation

python=/opt/env/bin/python3

[ -z "$asked" ] || finish 75
srun --wait=60 --cpu-bind=cores --gpu-bind=none \
    bash -c 'export CUDA_VISIBLE_DEVICES="$((3 - SLURM_LOCALID % 4))"; exec "$@"' rank \
    "$python" -m hpcasync train --data cifar-10 --model resnet20 --mode kstep --output /scratch/run --resume auto &
pid=$!
[ -z "$asked" ] || kill -USR1 "$pid"
# A trap ends `wait` with 128 + the signal's number, even as the launcher ends; bash still knows the real status then.
while :; do
    wait "$pid"; code=$?
    kill -0 "$pid" 2>/dev/null || break
done
if [ "$code" -gt 128 ]; then
    wait "$pid"; again=$?
    [ "$again" -eq 127 ] || code=$again
fi
finish "$code"
