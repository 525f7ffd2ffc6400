#!/bin/bash
# any Slurm cluster, by: hpcasync submit ...
#SBATCH --job-name=resnet
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=6
#SBATCH --time=2:00:00
#SBATCH --array=0-2,7%2
#SBATCH --partition=gpu
#SBATCH '--nodelist=n[1-8]'
#SBATCH '--output=/scratch/a run'"'"'s/slurm-%A_%a.out'
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --mail-type=END

# Exit code 75 means: a checkpoint is written, start me again. 138 and 143: the signal came before the ranks could catch it.
script='/scratch/a run'"'"'s/job.sh' asked= pid= restarts=${SLURM_RESTART_COUNT:-0}
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
    elif [ "$restarts" -ge 3 ]; then
        echo "hpcasync: not requeued, 3 restarts are the limit (--max-restarts); to go on: sbatch $script"
    else
        # Said before it is done: Slurm ends this script while it is being queued again.
        echo "hpcasync: to be requeued, restart $((restarts + 1)) of at most 3"
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        echo "hpcasync: scontrol requeue failed; to go on: sbatch $script"
    fi
    exit "$code"
}

setup='/home/me/my modules.sh'
source "$setup" || { echo "hpcasync: $setup ended with exit status $?" >&2; exit 1; }
export OMP_NUM_THREADS="6"
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it from the allocation

python=/opt/env/bin/python3
# The environment goes to each node's own disk: thousands of ranks reading it from a shared file system take minutes.
disk="/tmp/hpcasync-$SLURM_JOB_ID"
on_nodes() {
    srun --mpi=none --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "$@"
}
on_nodes mkdir -p "$disk" && sbcast --force '/scratch/the cache/env.tar' "$disk/environment.tar" &&
    on_nodes tar -xf "$disk/environment.tar" -C "$disk" && on_nodes rm "$disk/environment.tar" || {
    echo "hpcasync: the environment could not be broadcast to $disk" >&2 # and a part of it must not be used
    finish 1
}
python="$disk/bin/python3"

case $SLURM_ARRAY_TASK_ID in
    0) set -- --seed 0 --output '/scratch/a run'"'"'s/0' --resume auto ;;
    1) set -- --seed 1 --output '/scratch/a run'"'"'s/1' --resume auto ;;
    2) set -- --seed 2 --output '/scratch/a run'"'"'s/2' --resume auto ;;
    7) set -- --seed 7 --output '/scratch/a run'"'"'s/7' --resume auto ;;
    *) echo "hpcasync: array element $SLURM_ARRAY_TASK_ID has no arguments here" >&2; finish 2 ;;
esac
[ -z "$asked" ] || finish 75
mpiexec="${python%/*}/mpiexec"
[ -x "$mpiexec" ] || mpiexec=mpiexec
"$mpiexec" -n "$SLURM_NTASKS" \
    "$python" -m hpcasync train --data cifar-10 --model resnet20 --mode kstep "$@" &
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
