"""``hpcasync build-horovod``: what decides which wheel is used. The build itself is `.ci/run`'s first step."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hpcasync.cli import main
from hpcasync.cli.build_horovod import VERSION, cached_wheel, describe_environment, environment_key

ABOUT = {"python": "cpython-311", "torch": "2.13.0+cpu", "mpi": "MPICH Version:      5.0.2", "mpicxx": "/x/mpicxx"}


def wheel(folder: Path, *names: str) -> Path:
    path = folder / f"horovod-{VERSION}-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


def test_a_wheel_per_environment() -> None:
    variants = [
        ABOUT,
        ABOUT | {"python": "cpython-312"},
        ABOUT | {"torch": "2.12.0"},
        ABOUT | {"mpi": "MPICH Version:      5.0.3"},
        ABOUT | {"mpi": "Open MPI v5.0.11, package: Open MPI user@host Distribution, ident: 5.0.11"},
        ABOUT | {"mpi": "Some other MPI"},
    ]
    keys = [environment_key(about) for about in variants]
    assert len(set(keys)) == len(keys)
    assert "mpich-5.0.2" in keys[0] and "openmpi-5.0.11" in keys[4]
    assert all("/" not in key and " " not in key for key in keys)
    assert environment_key(ABOUT | {"mpicxx": "/elsewhere/mpicxx"}) == keys[0]


def test_hollow_and_broken_wheels_are_not_used(tmp_path: Path) -> None:
    assert cached_wheel(tmp_path) is None
    wheel(tmp_path, "horovod/__init__.py", "horovod/torch/__init__.py")
    assert cached_wheel(tmp_path) is None
    # Where CMake took the path for a pattern: the extension is in the wheel, but not in the package.
    wheel(tmp_path, "tmp/build/horovod/torch/mpi_lib_v2.cpython-311-x86_64-linux-gnu.so")
    assert cached_wheel(tmp_path) is None
    path = wheel(tmp_path, "horovod/torch/mpi_lib_v2.cpython-311-x86_64-linux-gnu.so")
    assert cached_wheel(tmp_path) == path
    path.write_bytes(b"PK not a wheel")
    assert cached_wheel(tmp_path) is None


def test_cached_wheel_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "horovod" / environment_key(describe_environment())
    folder.mkdir(parents=True)
    path = wheel(folder, "horovod/torch/mpi_lib_v2.so")
    assert main(["build-horovod", "--cache", str(tmp_path), "--no-install"]) == 0
    assert capsys.readouterr().out == f"cached: {path}\n"
    (folder / "install.log").mkdir()  # a log that can't be written: nothing is installed
    assert main(["build-horovod", "--cache", str(tmp_path)]) == 2
    assert f"can't write {folder}/install.log" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    afile = tmp_path / "afile"
    afile.write_text("kept")
    for cache, says in ((afile, f"cannot write {afile}/horovod/"), (Path("/proc/x"), "cannot write /proc/x/horovod/")):
        assert main(["build-horovod", "--cache", str(cache)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"hpcasync: error: {says}") and err.count("\n") == 1, err
    assert afile.read_text() == "kept"


def test_errors(tmp_path: Path) -> None:
    """In processes of their own: the first must find no compiler, the second is one of several tasks."""
    command = [sys.executable, "-m", "hpcasync", "build-horovod", "--cache", str(tmp_path)]
    for extra, env, text in (
        ([], {"PATH": str(tmp_path)}, "build-horovod needs cmake, c++, make on PATH"),
        ([], {"PMI_SIZE": "2", "PMI_RANK": "0"}, "run it once, without a launcher"),
        (["--jobs", "0"], {}, "--jobs=0: expected at least 1"),
    ):
        done = subprocess.run([*command, *extra], env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 2 and text in done.stderr, done.stderr
    assert not list(tmp_path.rglob("*.whl"))
