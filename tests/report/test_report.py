"""``hpcasync report`` on real runs: finished, compared, cut short; in a browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hpcasync.cli import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    for seed in ("0", "1"):
        common = ["simulate", "--mode", "async", "--data", "digits", "--epochs", "2", "--seed", seed]
        assert main([*common, "--output", str(folder / f"seed{seed}")]) == 0
    return [folder / "seed0", folder / "seed1"]


def test_page_is_self_contained_and_seeds_are_a_band(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "-o", str(page)]) == 0
    text = page.read_text()
    assert "(2 seeds)" in text and "Test accuracy" in text and "Staleness" in text
    assert not re.findall(r"""(?:src|href)="(?!#)|@import|url\((?!#)""", re.sub(r' xlink:href="#', ' href="#', text))
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    names: list[str] = []
    for one in drawn:
        names += [e.attrib["id"] for e in ElementTree.fromstring(one).iter() if "id" in e.attrib]
    assert len(names) == len(set(names))
    assert len(list(tmp_path.glob("page-*.png"))) == len(drawn) >= 6


def test_run_cut_short_says_what_is_missing(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copy(runs[0] / "config.toml", cut)
    assert main(["report", str(cut)]) == 0  # no evaluation yet
    assert "no evaluation yet" in capsys.readouterr().out
    (cut / "metrics.jsonl").write_bytes((runs[0] / "metrics.jsonl").read_bytes() + b'{"epo')
    assert main(["report", str(cut)]) == 0
    text = (cut / "report.html").read_text()
    assert "Test accuracy" in text and "Missing: no run.h5" in text and "no evaluation yet" not in text


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.h5").write_text("no HDF5")
    (tmp_path / "empty").mkdir()
    for name, message in (("none", "no such folder"), ("empty", "holds no run"), ("damaged", "not a finished run")):
        assert main(["report", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1200, 500])
def test_browser_draws_it(runs: list[Path], tmp_path: Path, width: int) -> None:
    assert BROWSER is not None
    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    assert main(["report", *map(str, runs), "-o", str(page)]) == 0
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},1500",
    ]
    subprocess.run([BROWSER, *flags, f"--screenshot={shot}", page.as_uri()], check=True, timeout=120, capture_output=True)
    from matplotlib.image import imread

    colours = {tuple(c) for c in (255 * imread(shot)[::3, ::3, :3]).round().astype(int).reshape(-1, 3)}
    assert {(0x4C, 0x78, 0xA8), (0xF5, 0x85, 0x18)} & colours  # the bars of the ranks
