#!/bin/bash
# OLCF Frontier (8 GPUs of 4 AMD MI250X), by: hpcasync submit ...
#SBATCH --job-name=resnet
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=7
#SBATCH --time=2:00:00
#SBATCH --partition=batch
#SBATCH --constraint=nvme
#SBATCH --export=NONE
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
    on_nodes rm -rf "$disk"
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

unset SLURM_EXPORT_ENV  # or srun would take export=NONE too
export OMP_NUM_THREADS="7"
export MPICH_GPU_SUPPORT_ENABLED="0"
export NCCL_SOCKET_IFNAME="hsn0"
export GLOO_SOCKET_IFNAME="hsn0"
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it from the allocation

python=/opt/env/bin/python3
# The environment goes to each node's own disk: thousands of ranks reading it from a shared file system take minutes.
disk="/mnt/bb/$USER/hpcasync-$SLURM_JOB_ID"
on_nodes() {
    srun --mpi=none --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "$@"
}
on_nodes mkdir -p "$disk" && sbcast --force /scratch/cache/env.tar "$disk/environment.tar" &&
    on_nodes tar -xf "$disk/environment.tar" -C "$disk" && on_nodes rm "$disk/environment.tar" || {
    echo "hpcasync: the environment could not be broadcast to $disk" >&2 # and a part of it must not be used
    finish 1
}
python="$disk/bin/python3"

[ -z "$asked" ] || finish 75
srun --wait=60 --gpus-per-task=1 --gpu-bind=closest --cpu-bind=cores \
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
