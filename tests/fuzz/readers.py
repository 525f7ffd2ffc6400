"""Every file that hpcasync reads: how a good one is made, and what reads it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.data import helpers


@dataclass(frozen=True)
class Reader:
    """A kind of file.

    Attributes:
        make: writes a good file, or a folder with it, into an empty folder, and returns the file that is to be spoilt.
        read: reads it; given that file.
        contents: it is HDF5 without a checksum over all, whose contents can be spoilt too.
        packed: spoilt before gzip packs it, so that the spoilt bytes reach the reader.
        slow: it takes a tenth of a second, so only a third as many are tried.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    contents: bool = False
    packed: bool = False
    slow: bool = False


def _imported(path: Path) -> Any:
    from hpcasync.data import import_dataset

    out = path.parent / "imported.h5"
    source = path if path.suffix in (".csv", ".npz", ".tgz") else path.parent
    return import_dataset(source, out, overwrite=True)


def _idx(folder: Path) -> Path:
    return helpers.idx_folder(folder, compress=False) / "train-images-idx3-ubyte"


def _idx_gz(folder: Path) -> Path:
    return helpers.idx_folder(folder) / "train-labels-idx1-ubyte.gz"


def _cifar(folder: Path) -> Path:
    return helpers.folder_of(folder, helpers.cifar10_files()) / "data_batch_3"


class _Evil:
    """Its pickle makes a folder when it is loaded by anything but a careful unpickler."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def _cifar_evil(folder: Path) -> Path:
    files = helpers.cifar10_files(py2=False)
    x, y = helpers.images(4, shape=(3072,), classes=10)
    files["data_batch_1"] = pickle.dumps({"data": x, "labels": y.tolist(), "more": _Evil(folder / "EXECUTED")}, protocol=2)
    return helpers.folder_of(folder, files) / "data_batch_1"


def _cifar_archive(folder: Path) -> Path:
    return helpers.archive_of(folder / "cifar.tgz", helpers.cifar10_files())


def _csv(folder: Path) -> Path:
    rows = ["a,b,label", *(f"{i},{i * 0.5},{'xyz'[i % 3]}" for i in range(12))]
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder / "table.csv"


def _npz(folder: Path) -> Path:
    x, y = helpers.images(12)
    np.savez(folder / "arrays.npz", x=x, y=y)
    return folder / "arrays.npz"


def _dataset(folder: Path) -> Path:
    from hpcasync.data import write_dataset

    return write_dataset(folder / "data.h5", helpers.arrays(12, 6))


def _open_dataset(path: Path) -> Any:
    from hpcasync.data import Dataset

    dataset = Dataset(path, verify=True)
    return [dataset.as_torch(split)[0] for split in ("train", "test")]


def _partition(folder: Path) -> Path:
    from hpcasync.data.partition_file import save_partition

    return save_partition(folder / "parts.h5", [np.arange(5), np.arange(5, 12)], 12, checksum="abc")


def _partition_npz(folder: Path) -> Path:
    np.savez(folder / "parts.npz", **{"0": np.arange(5), "1": np.arange(5, 12)})
    return folder / "parts.npz"


def _open_partition(path: Path) -> Any:
    from hpcasync.data.partition_file import load_partition

    return load_partition(path, workers=2, samples=12, checksum="abc")


def _checkpoint(folder: Path) -> Path:
    import torch

    from hpcasync.comm import init
    from hpcasync.modes import KStep
    from hpcasync.train.checkpoint import save_checkpoint

    model = torch.nn.Linear(3, 2)
    with KStep(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model, world=init(), every=2) as mode:
        model(torch.ones(1, 3)).sum().backward()
        mode.step()
        save_checkpoint(folder / "checkpoint.h5", mode, extra={"epoch": 1, "pair": (1, 2.5), "array": np.arange(4)})
    return folder / "checkpoint.h5"


def _open_checkpoint(path: Path) -> Any:
    import torch

    from hpcasync.comm import init
    from hpcasync.modes import KStep
    from hpcasync.train.checkpoint import load_checkpoint

    model = torch.nn.Linear(3, 2)
    with KStep(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model, world=init(), every=2) as mode:
        return load_checkpoint(path, mode)


def _config(folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text('data = "digits"\nmodel = "mlp"\nmode = "async"\nepochs = 2\nlr = 0.05\nstaleness = 4\n')
    return path


def _open_config(path: Path) -> Any:
    from hpcasync.train import make_config, read_config

    return make_config(read_config(str(path)), {})


def _site(folder: Path) -> Path:
    from hpcasync.slurm.site import FILES

    return Path(shutil.copy(FILES / "frontier.toml", folder / "mine.toml"))


def _open_site(path: Path) -> Any:
    from hpcasync.slurm.site import read_site

    return read_site(str(path))


def _run(folder: Path, *words: str) -> Path:
    from hpcasync.cli import main

    arguments = ["simulate", "--data", "digits", "--model", "logistic", "--workers", "2", "--epochs", "1"]
    assert main([*arguments, *words, "--output", str(folder / "run")]) == 0
    return folder / "run" / "run.h5"


def _open_run(path: Path) -> Any:
    from hpcasync.simulate.like import read_like
    from hpcasync.train.plot import read_curves

    return read_like(path.parent), read_curves(path.parent)


def _record(folder: Path) -> Path:
    from hpcasync.cli import main
    from hpcasync.train.record_file import rank_path

    arguments = ["train", "--data", "digits", "--model", "logistic", "--epochs", "1", "--record"]
    assert main([*arguments, "--output", str(folder / "run")]) == 0
    return rank_path(folder / "run", 0)


def _open_record(path: Path) -> Any:
    from hpcasync.train.record_file import read_record

    return read_record(path.parent.parent)


def _unfinished(folder: Path, name: str) -> Path:
    _inside(folder).unlink()
    return folder / "run" / name


def _inside(folder: Path) -> Path:
    return _run(folder, "--rule", "trend-smooth")


def _metrics(folder: Path) -> Path:
    return _unfinished(folder, "metrics.jsonl")


def _run_config(folder: Path) -> Path:
    return _unfinished(folder, "config.toml")


def _reported(path: Path) -> Any:
    from hpcasync.report.draw import svg
    from hpcasync.report.figures import plots
    from hpcasync.report.page import _groups, _tables
    from hpcasync.report.run import read_run

    run = read_run(path.parent)
    drawn = plots(_groups([run]))
    return _tables(run), [svg(figure, name) for plot in drawn for name, figure in plot.panels.items()]


def _reported_record(path: Path) -> Any:
    from hpcasync.replay.compare import compare
    from hpcasync.replay.timeline import entries
    from hpcasync.train.record_file import read_record

    records = read_record(path.parent.parent)
    return _reported(path.parent), list(entries(records)), compare(records, records)


def _replayed(path: Path) -> Any:
    from hpcasync.replay.replay import Replay

    return Replay(path.parent.parent).run()


def _like(path: Path) -> Any:
    from hpcasync.cli import main

    words = ["--data", "digits", "--model", "logistic", "--workers", "2", "--epochs", "1", "--batch", "240"]
    return main(["simulate", *words, "--like", str(path.parent), "--output", str(path.parent / "again")])


def _lock(folder: Path) -> Path:
    from hpcasync.train.lock import RunLock

    lock = RunLock(folder)
    words = lock.path.read_bytes()
    lock.release()
    lock.path.write_bytes(words.replace(str(os.getpid()).encode(), b"1"))
    return lock.path


def _open_lock(path: Path) -> Any:
    from hpcasync.train.lock import RunLock, holder_of

    found = holder_of(path.parent)
    lock = RunLock(path.parent)
    lock.release()
    return found


def _ledger(folder: Path) -> Path:
    (folder / "1-1.json").write_text('["/dev/shm/hpcasync-fuzz-that-is-not-there", "/tmp/no/segment"]')
    return folder / "1-1.json"


def _open_ledger(path: Path) -> Any:
    from hpcasync.launch.processes import Ledger

    return Ledger(path.parent).clear()


def _wrapper_page(folder: Path) -> Path:
    (folder / "rank-1").write_text("137\n")
    return folder / "rank-1"


def _first_page(folder: Path) -> Path:
    (folder / "first").write_text("1 137\n")
    return folder / "first"


def _death_page(folder: Path) -> Path:
    from hpcasync.launched import DEATH, death

    (folder / f"{DEATH}1").write_text(json.dumps(death(1, 1.0, "hung")))
    return folder / f"{DEATH}1"


def _open_pages(path: Path) -> Any:
    from hpcasync.launch.job import Job, _ended, _what_ended
    from hpcasync.launch.library import find_library

    found = [Job(find_library(), 2, ["true"], survive)._find_deaths(path.parent) for survive in (False, True)]
    return _ended(path.parent), [_what_ended(1, deaths) for deaths in found]


READERS = {
    "idx": Reader(_idx, _imported),
    "idx-gz": Reader(_idx_gz, _imported),
    "idx-in-gz": Reader(_idx_gz, _imported, packed=True),
    "cifar": Reader(_cifar, _imported),
    "cifar-evil": Reader(_cifar_evil, _imported),
    "cifar-archive": Reader(_cifar_archive, _imported),
    "cifar-in-archive": Reader(_cifar_archive, _imported, packed=True),
    "csv": Reader(_csv, _imported),
    "npz": Reader(_npz, _imported),
    "dataset": Reader(_dataset, _open_dataset, contents=True),
    "partition": Reader(_partition, _open_partition, contents=True),
    "partition-npz": Reader(_partition_npz, _open_partition),
    "checkpoint": Reader(_checkpoint, _open_checkpoint),
    "config": Reader(_config, _open_config),
    "site": Reader(_site, _open_site),
    "run": Reader(_run, _open_run, contents=True),
    "record": Reader(_record, _open_record, contents=True),
    "metrics": Reader(_metrics, _reported, slow=True),
    "run-config": Reader(_run_config, _reported, slow=True),
    "run-report": Reader(_inside, _reported, contents=True, slow=True),
    "record-report": Reader(_record, _reported_record, contents=True, slow=True),
    "replay": Reader(_record, _replayed, contents=True, slow=True),
    "like": Reader(_run, _like, contents=True),
    "lock": Reader(_lock, _open_lock),
    "ledger": Reader(_ledger, _open_ledger),
    "wrapper-page": Reader(_wrapper_page, _open_pages),
    "first-page": Reader(_first_page, _open_pages),
    "death-page": Reader(_death_page, _open_pages),
}
