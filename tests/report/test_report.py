"""``hpcasync report`` on real runs: finished, compared, cut short, at work."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest
from matplotlib.colors import to_hex

from hpcasync.cli import main
from hpcasync.report.draw import COLOURS, Group
from hpcasync.report.figures import plots
from hpcasync.report.run import read_run
from hpcasync.train.lock import RunLock
from tests.mpi import MpiRun


def test_page_is_self_contained_and_seeds_are_a_band(runs: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(runs["seed0"]), str(runs["seed1"]), "-o", str(page)]) == 0
    text = page.read_text()
    assert "(2 seeds)" in text and "Test accuracy" in text and "Staleness" in text
    assert text.count("Mean of 2 runs") == 3  # bars, staleness, shrink share
    assert "virtual seconds</text>" in text and ">seconds</text>" not in text
    assert not re.findall(r"""(?:src|href)="(?!#)|@import|url\((?!#)""", re.sub(r' xlink:href="#', ' href="#', text))
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    names: list[str] = []
    for one in drawn:
        names += [e.attrib["id"] for e in ElementTree.fromstring(one).iter() if "id" in e.attrib]
    assert len(names) == len(set(names))
    assert len(list(tmp_path.glob("page-*.png"))) == len(drawn) == 3 * 3 + 4


def test_seeds_are_a_band_also_without_common_seconds(runs: dict[str, Path]) -> None:
    one, two = (read_run(runs[name]) for name in ("seed0", "seed1"))
    one.inside = two.inside = {}
    two.curves["seconds"] = two.curves["seconds"] + 1000
    two.curves = {name: np.append(values, values[-1:] + 1) for name, values in two.curves.items()}  # an epoch further
    drawn = {plot.name: plot for plot in plots([Group("seeds", [one, two])])}
    axis = drawn["test_loss"].panels["seconds"].axes[0]
    assert len(axis.lines) == len(axis.collections) == 1
    both = one.curves["seconds"], two.curves["seconds"][:2]
    np.testing.assert_allclose(np.asarray(axis.lines[0].get_xdata(), float), np.mean(both, 0))
    axis = drawn["throughput"].panels[""].axes[0]
    assert axis.get_ylabel() == "samples / (virtual seconds)"
    single = plots([Group("one", [one])])
    speeds = next(plot for plot in single if plot.name == "throughput").panels[""].axes[0].lines[0].get_ydata()
    spent, done = np.diff(one.curves["seconds"], prepend=0.0), np.diff(one.curves["samples"], prepend=0.0)
    np.testing.assert_allclose(np.asarray(speeds, float), done / spent)
    assert one.curves["samples"][-1] == one.ranks["samples"].sum()
    for run in (one, two):
        run.curves = {name: values[:1] for name, values in run.curves.items()}
    for figure in plots([Group("seeds", [one, two])])[0].panels.values():
        assert len(figure.axes[0].containers) == 1  # one point with whiskers


def test_long_tails_are_cut_and_ranks_keep_their_colours(runs: dict[str, Path]) -> None:
    run = read_run(runs["seed0"])
    run.ranks = {name: np.delete(values, 2, axis=0) for name, values in run.ranks.items()}  # rank 2 has died
    width = run.ranks["staleness"].shape[1]
    run.ranks["staleness"] = np.pad(run.ranks["staleness"], ((0, 0), (0, 100 - width)))
    run.ranks["staleness"] *= 1000
    run.ranks["staleness"][0, 95] = 1
    plot = next(plot for plot in plots([Group("run", [run])]) if plot.name.startswith("staleness"))
    axis = plot.panels[""].axes[0]
    assert "of the updates or less are beyond, up to 95." in plot.note and axis.get_xlim()[1] < 20
    assert [line.get_color() for line in axis.lines] == [COLOURS[0], COLOURS[1], COLOURS[3]]


def test_methods_have_their_plots_and_many_ranks_fit(page: Path) -> None:
    text = page.read_text()
    for title in ("Shrink share: seed0", "Held gradients: turns", "Scores of remembered batches: guided", "Block momentum: bl"):
        assert f"<h2>{title}" in text
    assert "Line: mean of 12 ranks" in text
    assert {p.name for p in page.parent.glob("page-out_of_turn*")} == {"page-out_of_turn-turns.png"}


def test_other_ranks_or_the_same_seed_twice_are_no_seeds(runs: dict[str, Path], tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(runs["seed0"], again)
    page = tmp_path / "page.html"
    assert main(["report", str(runs["seed0"]), str(again), "-o", str(page)]) == 0
    assert "(2 runs)" in page.read_text()
    with h5py.File(again / "run.h5", "r+") as file:  # a live run does not have its ranks in its configuration
        file.attrs["result"] = json.dumps(json.loads(file.attrs["result"]) | {"ranks": 5})
    assert read_run(again).recipe != read_run(runs["seed0"]).recipe


def test_run_cut_short_says_what_is_missing(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copy(runs["seed0"] / "config.toml", cut)
    lock = RunLock(cut)
    assert main(["report", str(cut)]) == 0
    assert "no evaluation yet" in (said := capsys.readouterr().out) and "the run is at work, by its lock (process" in said
    lock.release()
    (cut / "metrics.jsonl").write_bytes((runs["seed0"] / "metrics.jsonl").read_bytes() + b'{"epo')
    assert main(["report", str(cut)]) == 0
    text = (cut / "report.html").read_text()
    assert "Test accuracy" in text and "Shrink share" in text and "no evaluation yet" not in text
    assert "no run.h5: the run was cut short; it left no checkpoint" in text
    assert read_run(cut).recipe == read_run(runs["seed1"]).recipe
    assert "no times and no staleness" in text and "Where the time went" not in text


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)  # the record's own tests run on both
def test_live_run_finished_and_cut_short(mpirun: MpiRun, runs: dict[str, Path], tmp_path: Path) -> None:
    run, page = tmp_path / "run", tmp_path / "page.html"
    words = ["--data", "digits", "--rule", "gsgm", "--epochs", "2", "--record", "--checkpoint-every", "0"]
    mpirun.cli(["train", *words, "--output", run], n=2)
    assert main(["report", str(run), "-o", str(page)]) == 0
    assert ">seconds</text>" in (text := page.read_text()) and "virtual" not in text and ">samples/s</text>" in text
    assert main(["report", str(run), str(runs["seed0"]), "-o", str(page)]) == 0
    assert "seconds, real or virtual" in page.read_text()
    whole = read_run(run)
    for name in ("run.h5", "result.json"):
        (run / name).unlink()
    cut = read_run(run)
    width = cut.ranks["staleness"].shape[1]
    assert cut.recipe == whole.recipe
    np.testing.assert_array_equal(cut.ranks["staleness"], whole.ranks["staleness"][:, :width])
    assert cut.ranks["staleness"].sum() == whole.ranks["staleness"].sum() > 0
    for share in ("compute", "communicate", "wait"):
        assert (cut.ranks[share] <= whole.ranks[share] + 0.05 * whole.ranks["seconds"] + 0.1).all()
    (run / "record" / "rank-00000.h5").unlink()
    (run / "config.toml").unlink()
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "so far (1 of 2 ranks)" in text and "no config.toml" in text
    assert "Staleness" in text and "Order of updates" in text and "Held gradients" in text
    order = next(plot for plot in plots([Group("run", [read_run(run)])]) if plot.name.startswith("order"))
    assert to_hex(order.panels[""].axes[0].collections[0].get_edgecolors()[0]) == COLOURS[1]  # rank 1's, as in its histogram


def test_empty_folder_and_damaged_lines(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, page = tmp_path / "empty", tmp_path / "page.html"
    empty.mkdir()
    assert main(["report", str(empty)]) == 0
    said, text = capsys.readouterr().out, (empty / "report.html").read_text()
    for words in ("the folder is empty; train", "no config.toml", "no evaluation yet", "no times and no stal", "no record"):
        assert words in said and words in text
    assert "<svg" not in text and "no plots" in said
    assert main(["report", str(empty), str(runs["seed0"]), "-o", str(page)]) == 0
    assert "empty: no run.h5: nothing of a run is here" in (text := page.read_text()) and "Test accuracy" in text
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "more" / "page.html")]) == 0
    assert "nothing of a run is here, only empty, page" in capsys.readouterr().out
    good = (runs["seed0"] / "metrics.jsonl").read_bytes()
    wrong = ("{}", "[1]", "{", '{"epoch": "one"}', "[" * 100_000, "null", "\0\0", "\xff", '{"inside": {"scores": 1}}')
    (empty / "metrics.jsonl").write_bytes(good + "\n".join(wrong).encode("latin-1") + b"\n" + good[:20])
    assert main(["report", str(empty)]) == 0
    assert f"{len(wrong)} of {len(wrong) + 2} lines of metrics.jsonl are damaged" in capsys.readouterr().out
    np.testing.assert_array_equal(read_run(empty).curves["epoch"], [1, 2])
    assert main(["report", str(tmp_path)]) == 0
    assert "there are runs in folders of it: give those (empty)" in capsys.readouterr().out


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.h5").write_text("no HDF5")
    (tmp_path / "file").touch()
    for place in (".", "/", str(tmp_path), "/proc/none/a.html"):
        assert main(["report", str(tmp_path), "-o", place]) == 2
        assert f"cannot write {Path(place)}: " in capsys.readouterr().err
    for name, message in (("none", "no such folder"), ("file", "is a file"), ("damaged", "not a finished run")):
        assert main(["report", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("card", ["#f5f6f8", "#1d2126"])
def test_colours_can_be_seen_on_both_backgrounds(card: str) -> None:
    def light(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    from hpcasync.report import page

    assert card in Path(page.__file__).with_name("page.html").read_text()
    for colour in COLOURS:
        low, high = sorted((light(colour), light(card)))
        assert (high + 0.05) / (low + 0.05) > 3

