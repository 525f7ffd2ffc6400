"""``hpcasync build-horovod``: Horovod for the installed torch and MPI, built once and cached.

Horovod 0.28.1 is its last release, and only as source. A plain ``pip install`` builds it in an isolated environment, where it
finds no torch, and "succeeds" without its torch extension. Against torch 2.1 and later it also needs C++17, which its
CMakeLists.txt does not know; two CMake files, handed over from outside, see to that without a change of its source.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcasync.comm.launch import launched_tasks
from hpcasync.data.atomic import check_writable, replacing
from hpcasync.errors import UsageError

VERSION = "0.28.1"
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"

TOOLCHAIN = """\
# Every project() includes the other file as soon as the compiler is set up.
set(CMAKE_PROJECT_INCLUDE "${CMAKE_CURRENT_LIST_DIR}/cxx17.cmake")
"""
CXX17 = """\
# Horovod asks for C++14 in two places and drops -std= from CXXFLAGS; torch's headers need C++17.
set(CMAKE_CXX11_STANDARD_COMPILE_OPTION "-std=c++17")
set(CMAKE_CXX14_STANDARD_COMPILE_OPTION "-std=c++17")
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "build-horovod",
        help="build Horovod for --collectives horovod",
        description=f"Build Horovod {VERSION} for the torch and the MPI of this environment, and install it. Minutes the first "
        "time; the wheel is kept by Python, torch and MPI version. Needs a C++ compiler, cmake and make.",
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compiler processes (default: cores)")
    parser.add_argument("--cache", metavar="DIR", help="where the wheel is kept (default: $HPCASYNC_CACHE or the user's)")
    parser.add_argument("--no-install", action="store_true", help="build only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build unless the wheel is there, then install it."""
    tasks, launcher = launched_tasks()
    if tasks > 1:
        raise UsageError(f"build-horovod was started {tasks} times by {launcher}; run it once, without a launcher")
    if args.jobs < 1:
        raise UsageError(f"--jobs={args.jobs}: expected at least 1")
    from hpcasync.data.resolve import cache_folder

    about = describe_environment()
    folder = cache_folder(args.cache) / "horovod" / environment_key(about)
    wheel = cached_wheel(folder)
    if wheel is None:
        wheel = _build(folder, about, args.jobs)
    else:
        print(f"cached: {wheel}", flush=True)
    if not args.no_install:
        # The first replaces whatever Horovod is there; the second adds what it needs.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        _call([*pip, "--force-reinstall", "--no-deps", str(wheel)], folder / "install.log")
        _call([*pip, str(wheel)], folder / "install.log")
        print(f"installed in {sys.prefix}: --collectives horovod", flush=True)
    return 0


def describe_environment() -> dict[str, str]:
    """What a build depends on: Python, torch, the MPI library and its compiler wrapper."""
    import torch

    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"no MPI can be loaded here ({error}): pip install 'hpcasync[mpich]', or load the MPI module") from error
    line = MPI.Get_library_version().split("\n")[0].rstrip("\x00 ,").strip()
    beside = Path(sys.executable).with_name("mpicxx")
    mpicxx = str(beside) if beside.exists() else shutil.which("mpicxx")
    if mpicxx is None:
        raise UsageError(f"no mpicxx beside {sys.executable} or on PATH: load the module of the MPI that mpi4py uses ({line})")
    return {"python": sys.implementation.cache_tag, "torch": torch.__version__, "mpi": line, "mpicxx": mpicxx}


def environment_key(about: dict[str, str]) -> str:
    """The name of the cache folder: one per Python, torch, MPI with version, machine, and source."""
    found = re.search(r"(MPICH|Open MPI|Intel|MVAPICH|CRAY MPICH)\D*?v?(\d[\w.]*)", about["mpi"], re.IGNORECASE)
    mpi = f"{found[1]}-{found[2]}" if found else hashlib.sha256(about["mpi"].encode()).hexdigest()[:12]
    parts = (about["python"], f"torch-{about['torch']}", mpi, platform.machine(), SHA256[:8])
    return re.sub(r"[^\w.+-]+", "", "_".join(parts).lower())


def cached_wheel(folder: Path) -> Path | None:
    """The wheel that lies in the folder, if it is whole."""
    return next((w for w in sorted(folder.glob(f"horovod-{VERSION}-*.whl")) if _has_extension(w)), None)


def _has_extension(wheel: Path) -> bool:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return any(re.fullmatch(r"horovod/torch/mpi_lib_v2.*\.so", name) for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _build(folder: Path, about: dict[str, str], jobs: int) -> Path:
    try:
        check_writable(folder / "wheel", needed=1)
    except OSError as error:
        raise UsageError(f"can't make the folder {folder}: {error.strerror}; give another one with --cache") from error
    _check_tools()
    log = folder / "build.log"
    print(f"building Horovod {VERSION} for {', '.join(about.values())} with {jobs} jobs; log: {log}", flush=True)
    began = time.perf_counter()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # Not in the cache folder: Horovod uses the path as a regular expression, and "torch-2.13.0+cpu" does not match itself.
    with tempfile.TemporaryDirectory(prefix="hpcasync_horovod_") as temporary:
        work = Path(temporary)
        (work / "toolchain.cmake").write_text(TOOLCHAIN)
        (work / "cxx17.cmake").write_text(CXX17)
        env = _build_environment(about, jobs) | {"CMAKE_TOOLCHAIN_FILE": str(work / "toolchain.cmake"), "TMPDIR": temporary}
        source = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--dest", temporary, f"horovod=={VERSION}"]
        _call([*pip, "download", *source], log, env)
        archive = work / f"horovod-{VERSION}.tar.gz"
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != SHA256:
            raise UsageError(f"the source of Horovod {VERSION} has sha256 {digest}, expected {SHA256}; check the package index")
        # Without pip's cache: it would hand out a hollow wheel, or one for another MPI, that was built before.
        flags = ["--no-cache-dir", "--no-build-isolation", "--no-deps", "--wheel-dir", temporary]
        _call([*pip, "wheel", "-v", *flags, str(archive)], log, env)
        made = cached_wheel(work)
        if made is None:
            raise UsageError(f"the build left a Horovod without its torch extension; see {log}")
        wheel = folder / made.name
        with replacing(wheel) as unfinished:
            shutil.copyfile(made, unfinished)
    print(f"built in {time.perf_counter() - began:.0f} s: {wheel}", flush=True)
    return wheel


def _build_environment(about: dict[str, str], jobs: int) -> dict[str, str]:
    path = os.pathsep.join((str(Path(about["mpicxx"]).parent), os.environ.get("PATH", os.defpath)))
    return {
        **os.environ,
        "PATH": path,  # FindMPI takes the first mpicxx
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_GLOO": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "MAKEFLAGS": f"-j{jobs}",
        "LDFLAGS": f"-Wl,--strip-all {os.environ.get('LDFLAGS', '')}".strip(),  # 1 MB in place of 50
    }


def _check_tools() -> None:
    missing = [tool for tool in ("cmake", "c++", "make") if shutil.which(tool) is None]
    if missing:
        raise UsageError(f"build-horovod needs {', '.join(missing)} on PATH: apt install g++ make cmake, or load the modules")
    modules = [name for name in ("setuptools", "packaging") if importlib.util.find_spec(name) is None]
    if not modules and importlib.util.find_spec("wheel") is None:  # newer setuptools make wheels themselves
        modules = [] if importlib.util.find_spec("setuptools.command.bdist_wheel") else ["wheel"]
    if modules:
        raise UsageError(f"build-horovod needs {', '.join(modules)}: {sys.executable} -m pip install {' '.join(modules)}")


def _call(command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
    """Run a command with its output in ``log``."""
    try:
        out = log.open("a")
    except OSError as error:
        raise UsageError(f"can't write {log}: {error.strerror}; give another folder with --cache") from error
    with out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env).returncode
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()]
        last = lines[-1].strip()[:300] if lines else "no line with an error"
        raise UsageError(f"'{' '.join(command[:5])} ...' failed with exit status {code}: {last}. The whole log: {log}")
