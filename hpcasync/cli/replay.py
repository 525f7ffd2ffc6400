"""``hpcasync replay``: re-execute a recorded asynchronous run in one process, look at a step, compare two runs."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from hpcasync.errors import UsageError


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "replay",
        help="re-execute a recorded asynchronous run, bit for bit",
        description="Re-execute a run that was trained with --record in one process without MPI, in its order of reads and "
        "writes. Exit code 0 if the parameters are bit-identical, 1 if not, with the first difference.",
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of the run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--until", type=int, metavar="STEP", help="stop when every rank has made this step")
    what.add_argument("--inspect", metavar="RANK:STEP", help="replay up to this step and show what it read and wrote")
    what.add_argument("--compare", type=Path, metavar="OTHER", help="the first step at which this run and another differ")
    parser.add_argument("--data", help="name or path of the data set, if it has moved")
    parser.add_argument("--any-code", action="store_true", help="replay although the code is not that of the run")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, last")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replay, inspect or compare; the exit code says whether all was identical."""
    from hpcasync.train.records import to_json

    options = {"data": args.data, "any_code": args.any_code}
    began = time.perf_counter()
    if args.compare is not None:
        result = _compare(args.run_folder, args.compare)
    elif args.inspect is not None:
        result = _inspect(args.run_folder, args.inspect, options)
    else:
        result = _replay(args.run_folder, args.until, options)
        result["seconds"] = time.perf_counter() - began
    if args.json:
        print(to_json(result), flush=True)
    return 0 if result["identical"] else 1


def _replay(folder: Path, until: int | None, options: dict[str, Any]) -> dict[str, Any]:
    from hpcasync.launched import place_of
    from hpcasync.replay.deaths import deaths_of
    from hpcasync.replay.replay import Replay

    if until is not None and until < 1:
        raise UsageError(f"--until {until}: expected a step, from 1")
    replay = Replay(folder, **options)
    if until is not None and until > replay.longest:
        raise UsageError(f"--until {until}: no rank of {folder} made more than {replay.longest} steps")
    outcome = replay.run(until)
    print(f"{outcome.events:,} of {outcome.recorded:,} recorded events of {len(replay.ranks)} ranks, {outcome.updates:,} updates")
    for death in deaths_of(replay.records):
        inside = f", inside its update of shards {death['shards']}: what there was of it is in the record"
        inside *= bool(death["shards"])
        print(f"Rank {death['rank']} died in {place_of(death)}{inside}")
    if until is None and not outcome.complete:
        print("The record does not reach the end of the run: replayed as far as it goes")
        for place in outcome.stopped_at:
            print(f"  rank {place['rank']} stops in step {place['step']}: what comes before in a shard is in no record")
    return {
        **_verdict(outcome),
        "complete": outcome.complete,
        "ranks": len(replay.ranks),
        "events": outcome.events,
        "recorded": outcome.recorded,
        "updates": outcome.updates,
        "steps": [max([0, *r.record.events["step"][: r.at].tolist()]) for r in replay.ranks],
        "stopped_at": outcome.stopped_at,
        "parameters_sha256": outcome.parameters_sha256,
        # Of the run's end: nothing to compare with before that.
        "recorded_sha256": replay.records[0].end.get("parameters_sha256") if outcome.complete else None,
    }


def _inspect(folder: Path, place: str, options: dict[str, Any]) -> dict[str, Any]:
    from hpcasync.replay.inspection import inspect, parse_place

    found, outcome = inspect(folder, parse_place(place), **options)
    count = len(found["samples"])
    times = ", ".join(f"{name} {1e3 * found[name]:.3f} ms" for name in ("compute", "wait", "apply", "pull"))
    print(f"rank {found['rank']}, step {found['step']}: loss {found['loss']:.6g} on {count} samples; {times}")
    for update in found["updates"]:
        of = "" if update["batch_of_step"] == found["step"] else f", replaying the batch of step {update['batch_of_step']}"
        rate = "" if update["lr"] is None else f", learning rate {update['lr']:g}"
        print(f"  {update['what']}{of}: gradient norm {update['gradient_norm']:.6g}{rate}")
        print("    largest: " + ", ".join(f"{name} {norm:.4g}" for name, norm in update["largest"]))
        for s in update["shards"]:
            did = f"wrote {s['now']}" if s["written"] else f"only read {s['now']}"
            between = f", after ranks {', '.join(map(str, s['between']))}" if s["between"] else ""
            print(f"    shard {s['shard']}: read {s['read']}, {did}, staleness {s['staleness']}{between}")
    return {**_verdict(outcome), "inspect": found}


def _compare(folder: Path, other: Path) -> dict[str, Any]:
    from hpcasync.replay.compare import compare
    from hpcasync.train.record_file import read_record

    one, two = read_record(folder), read_record(other)
    models = [str(records[0].facts["config"].get("model")) for records in (one, two)]
    if models[0] != models[1]:
        raise UsageError(f"--compare: {folder} has the model {models[0]}, {other} has {models[1]}; compare runs of one model")
    found = compare(one, two)
    for key, (mine, theirs) in found["settings"].items():
        print(f"{key}: {mine} in {folder}, {theirs} in {other}")
    for difference in found["differences"]:
        print(f"{difference['what']}: first differs at step {difference['step']}, rank {difference['rank']}")
    if found["identical"]:
        print("identical: the same samples, losses, order and parameters")
    return found


def _verdict(outcome: Any) -> dict[str, Any]:
    difference = outcome.difference
    if difference is None:
        print("identical: every loss and the parameters, bit for bit")
    else:
        print(
            f"NOT identical: first at rank {difference['rank']}, step {difference['step']}, {difference['what']}: recorded "
            f"{difference['recorded']}, replayed {difference['replayed']}"
        )
    return {"identical": outcome.identical, "first_difference": difference}
