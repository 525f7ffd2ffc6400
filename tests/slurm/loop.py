"""What a training run does, as the batch script sees it, without the seconds that importing torch takes.

    loop.py STATE STEPS [--seed N] [--fail HOW] [--hold STEP]

Every rank counts to STEPS, a step every 50 ms, and adds up what all have counted through a window. On SIGUSR1 or SIGTERM the
ranks agree on a step, rank 0 writes it to STATE, and all exit with 75; the next start goes on from there. The first one does
not go beyond STEP of --hold before there is a signal.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

caught: list[int] = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda signum, frame: caught.append(signum))

# The handlers come first.
import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("state", type=Path)
parser.add_argument("steps", type=int)
parser.add_argument("--seed", default="0")
parser.add_argument("--fail", choices=("raise", "exit", "kill"))
parser.add_argument("--hold", type=int)
args = parser.parse_args()

world = MPI.COMM_WORLD
rank, size = world.rank, world.size


def end_all(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As `hpcasync.init` has it: an exception on one rank ends the job."""
    traceback.print_exception(kind, error, trace)
    world.Abort(1)


sys.excepthook = end_all


def say(text: str) -> None:
    if rank == 0:
        print(text, flush=True)


names = world.gather(f"{MPI.Get_processor_name()}:{os.environ.get('CUDA_VISIBLE_DEVICES', '-')}")
state = args.state.with_name(f"{args.state.name}.{args.seed}")
step, total = map(int, state.read_text().split()) if state.exists() else (0, 0)
restart = os.environ.get("SLURM_RESTART_COUNT", "0")
say(f"start at {step} on {' '.join(names or [])} restart {restart} seed {args.seed} python {sys.executable}")
say(f"threads {os.environ.get('OMP_NUM_THREADS')} cpus {os.environ.get('SRUN_CPUS_PER_TASK')} argv {sys.argv[1:]}")

window = MPI.Win.Allocate(8 if rank == 0 else 0, 8, comm=world)
if rank == 0:
    np.frombuffer(window.tomemory(), np.int64)[0] = total
world.Barrier()
window.Lock_all()
while step < args.steps:
    time.sleep(0.05)
    window.Accumulate((np.array([step]), MPI.INT64_T), 0, op=MPI.SUM)
    window.Flush(0)
    step += 1
    if args.fail and step == 5 and rank == size - 1:
        if args.fail == "raise":
            raise RuntimeError("a rank that fails")
        if args.fail == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    while not (signals := world.allreduce(len(caught))) and step == args.hold and restart == "0":
        time.sleep(0.05)
    if signals:
        break
world.Barrier()
window.Sync()
total = int(np.frombuffer(window.tomemory(), np.int64)[0]) if rank == 0 else 0
window.Unlock_all()
window.Free()
if step < args.steps:
    if rank == 0:
        state.write_text(f"{step} {total}")
    signals = [number for each in world.allgather(caught) for number in each]  # rank 0 may have none yet
    say(f"stop at {step} for {signals}")
    world.Barrier()
    sys.exit(75)
say(f"done at {step} total {total}")
