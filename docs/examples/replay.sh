set -e
# An asynchronous run on two ranks, recorded.
mpiexec -n 2 hpcasync train --data digits --model mlp --mode async --rule trend-smooth --epochs 2 --record --output run
# Again, in one process: the same reads and writes in the same order, to the same bits.
hpcasync replay run
# Rank 1's tenth step: its gradient, what it had read, how stale that was, what it wrote.
hpcasync replay run --inspect 1:10
# Every step of every rank as a picture: open trace.json at ui.perfetto.dev.
hpcasync timeline run -o trace.json
