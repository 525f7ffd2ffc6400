"""From a name or a path to a file: embedded, imported once, fetched; by many processes at once."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from hpcasync.data import Dataset, fetch, info, known, loader, open_dataset, resolve, write_dataset
from hpcasync.data.embedded.make_digits import make
from hpcasync.data.public import PUBLIC
from hpcasync.data.resolve import cache_folder
from hpcasync.errors import UsageError

from .helpers import archive_of, arrays, cifar10_files, features, idx_folder


def test_digits_come_with_the_package():
    dataset = open_dataset("digits")
    dataset.verify()
    x = np.concatenate([dataset.array("train/x"), dataset.array("test/x")])
    assert x.shape == (1797, 1, 8, 8) and x.dtype == np.uint8 and (x.min(), x.max()) == (0, 16)
    assert len(dataset.array("test/y")) == 359
    batch = dataset.as_torch("train").batch(np.arange(1438))[0]
    assert abs(float(batch.mean())) < 1e-5 and abs(float(batch.std()) - 1) < 1e-3
    assert "CC BY 4.0" in dataset.header.source


def test_digits_are_those_of_scikit_learn(tmp_path):
    pytest.importorskip("sklearn")
    assert info(make(tmp_path / "d.h5"))["checksum"] == info("digits")["checksum"]


def test_info_is_plain_and_complete(small):
    found = info(str(small))
    assert found["name"] == "small" and found["path"] == str(small) and found["verified"] is True
    assert found["shape"] == [1, 6, 5] and found["classes"] == 3
    assert found["splits"]["test"] == {
        "samples": 20,
        "shape": [20, 1, 6, 5],
        "dtype": "uint8",
        "class_counts": [7, 7, 6],
    }
    assert found["normalisation"]["scale"] == 1 / 255
    assert found["bytes"] == small.stat().st_size


def test_names_and_paths(small, monkeypatch):
    assert known() == ("digits", "mnist", "fashion-mnist", "cifar-10", "cifar-100")
    assert resolve("Digits").name == "digits.h5"
    assert resolve(str(small)) == small
    monkeypatch.chdir(small.parent)
    small.rename("digits")
    assert resolve("digits").name == "digits.h5"  # a known name wins
    assert resolve("./digits") == Path("digits")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("minst", "unknown data set 'minst'; did you mean 'mnist'"),
        ("no/such.h5", "data file no/such.h5: not found"),
        (os.path.dirname(__file__), "is a folder, expected an HDF5 file"),
        (
            "fashion_mnist",
            "'fashion-mnist' is not on this machine: .* HPCASYNC_DATA is not set; run 'hpcasync data fetch",
        ),
    ],
)
def test_what_cannot_be_found(source, words):
    with pytest.raises(UsageError, match=words):
        resolve(source)


def test_the_cache_is_the_argument_or_the_variable_or_the_users(own_cache, monkeypatch, tmp_path):
    assert cache_folder(tmp_path) == tmp_path
    assert cache_folder() == own_cache
    monkeypatch.delenv("HPCASYNC_CACHE")
    assert cache_folder().name == "hpcasync"


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """$HPCASYNC_DATA with a small mnist in it, which nobody may write to."""
    folder = idx_folder(tmp_path / "raw" / "mnist", n=3000)
    monkeypatch.setenv("HPCASYNC_DATA", str(tmp_path / "raw"))
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


def test_raw_files_are_imported_once(raw, own_cache):
    before = sorted(raw.iterdir())
    path = resolve("MNIST")
    assert path == own_cache / "mnist.h5"
    stamp = path.stat().st_mtime_ns
    assert resolve("mnist").stat().st_mtime_ns == stamp
    assert sorted(raw.iterdir()) == before
    assert info(path)["source"].startswith("MNIST, LeCun")
    with pytest.raises(UsageError, match="fashion_mnist does not exist"):
        resolve("fashion-mnist")


def _resolve_at(barrier, answers):
    barrier.wait()
    path = resolve("mnist")
    answers.put((str(path), Dataset(path, verify=True).header.checksum))


def test_many_processes_import_at_once(raw, own_cache):
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(6), context.Queue()
    processes = [context.Process(target=_resolve_at, args=(barrier, answers)) for _ in range(6)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=250) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(found) == 1
    assert os.listdir(own_cache) == ["mnist.h5"]


def test_a_full_disk_while_importing_to_the_cache(raw, own_cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UsageError, match="the disk is full"):
        resolve("mnist")
    assert os.listdir(own_cache) == []


# fetch


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """A web server on this machine and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Quiet, directory=folder)
    ) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()
        thread.join()


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_fetch_downloads_checks_and_imports(server, own_cache, monkeypatch):
    url, folder = server
    idx_folder(folder)
    digests = hashes(folder)
    files = {name: digests[name] for name in PUBLIC["mnist"].files}
    monkeypatch.setitem(PUBLIC, "mnist", replace(PUBLIC["mnist"], files=files))
    bar = Mock()
    path = fetch("mnist", mirror=url, progress=bar)
    assert path == own_cache / "mnist.h5" == resolve("mnist")
    assert bar.total == (folder / "t10k-labels-idx1-ubyte.gz").stat().st_size and bar.close.call_count == 4
    assert info(path)["splits"]["train"]["samples"] == 30
    for file in folder.iterdir():
        file.unlink()
    assert fetch("mnist", mirror=url) == path  # already here: nothing is asked
    path.unlink()
    assert fetch("mnist", mirror=url) == path  # the checked raw files are still here


def test_fetch_an_archive_with_an_md5(server, tmp_path, monkeypatch):
    url, folder = server
    archive = archive_of(folder / "cifar-10-python.tar.gz", cifar10_files())
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(
        PUBLIC, "cifar-10", replace(PUBLIC["cifar-10"], files={archive.name: f"md5:{digest}"})
    )
    assert Dataset(fetch("cifar10", mirror=url + "/", cache=tmp_path / "c")).shape == (3, 32, 32)


def test_fetch_a_wrong_checksum(server, own_cache):
    url, folder = server
    idx_folder(folder)
    with pytest.raises(
        UsageError, match=r"train-images-idx3-ubyte.gz: the downloaded file has another checksum"
    ):
        fetch("mnist", mirror=url)
    assert [p for p in own_cache.rglob("*") if p.is_file()] == []


def test_fetch_from_a_server_that_lacks_the_file_or_is_not_there(server, own_cache):
    with pytest.raises(UsageError, match=r"cannot download .*404"):
        fetch("mnist", mirror=server[0])
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UsageError, match=r"cannot download http://127.0.0.1.*refused.*check the network"):
            fetch("mnist", mirror=f"http://127.0.0.1:{unused.getsockname()[1]}")
    with pytest.raises(UsageError, match=r"cannot download gopher://a.*give the address of a folder, http"):
        fetch("mnist", mirror="gopher://a")
    assert [p for p in own_cache.rglob("*") if p.is_file()] == []


def test_fetch_names(own_cache, tmp_path):
    assert fetch("digits") == resolve("digits")
    with pytest.raises(UsageError, match="unknown public data set 'imagenet'"):
        fetch("imagenet")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*another cache folder"):
        fetch("mnist", cache=tmp_path / "file", mirror="http://127.0.0.1:9")


# the real files


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_real_files(real_data, name):
    dataset = open_dataset(name)
    found = info(dataset)
    assert found["splits"]["train"]["samples"] == 60000 and found["splits"]["test"]["class_counts"][0] in (
        980,
        1000,
    )
    known_mean, known_std = {"mnist": (0.1307, 0.3081), "fashion-mnist": (0.2860, 0.3530)}[name]
    assert found["normalisation"]["mean"] == pytest.approx([known_mean], abs=1e-4)
    assert found["normalisation"]["std"] == pytest.approx([known_std], abs=1e-4)
    seen = sum(len(y) for _, y in loader(dataset, batch=256))
    assert seen == 60000


def test_fetch_the_real_files_from_a_mirror(real_data, server, monkeypatch):
    url, folder = server
    for file in (real_data / "mnist").glob("*.gz"):
        (folder / file.name).symlink_to(file)
    path = fetch("mnist", mirror=url)
    assert info(path, verify=False)["splits"]["test"]["class_counts"][1] == 1135


def test_importing_the_package_needs_no_mpi():
    code = "import sys; import hpcasync.data, hpcasync.models; sys.exit('mpi4py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=250).returncode == 0


def test_a_damaged_gzip_names_the_raw_file(raw):
    path = raw / "train-images-idx3-ubyte.gz"
    raw.chmod(0o755)
    path.write_bytes(gzip.compress(b"nothing"))
    with pytest.raises(UsageError, match=r"mnist/train-images-idx3-ubyte.gz starts with magic number"):
        resolve("mnist")


def test_loader_of_features_and_images_from_paths(tmp_path):
    for given in (arrays(), features()):
        path = write_dataset(tmp_path / f"{given.name}.h5", given)
        assert sum(len(y) for _, y in loader(path)) == 50
