"""The page of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcasync.data.atomic import replacing
from hpcasync.report.draw import Group, Plot, png, svg
from hpcasync.report.figures import plots
from hpcasync.report.run import Run

DIGITS = 5
"""Of a number in a table."""


def write_report(runs: Sequence[Run], path: Path) -> list[Plot]:
    """Write the page, and beside it each plot as ``<page>-<plot>.png``.

    Args:
        runs: those that differ only in the seed become one line with a band.
        path: of the page; of a plot with several panels each has a picture of its own.

    Raises:
        UsageError: matplotlib is not installed, or no permission to write there.
    """
    from jinja2 import Environment, PackageLoader

    drawn = plots(_groups(runs))
    shown = [
        {"title": p.title, "note": p.note, "svgs": [svg(f, f"p{i}{end}") for end, f in p.panels.items()]}
        for i, p in enumerate(drawn)
    ]
    page = Environment(loader=PackageLoader("hpcasync.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    title = ", ".join(dict.fromkeys(run.name for run in runs))
    told = {what: _told(runs, what) for what in ("missing", "deaths")}
    facts = {**told, "plots": shown, "runs": [_tables(run) for run in runs]}
    text = page.get_template("page.html").render(title=title, **facts)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    for plot in drawn:
        for end, figure in plot.panels.items():
            png(figure, path.with_name(f"{path.stem}-{plot.name}{'-' if end else ''}{end}.png"))
    return drawn


def _groups(runs: Sequence[Run]) -> list[Group]:
    """Runs of one configuration together, labelled by the first one's folder, or its path where names are equal."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.recipe, []).append(run)
    names = [some[0].name for some in groups.values()]
    return [Group(s[0].name if names.count(s[0].name) == 1 else str(s[0].folder), s) for s in groups.values()]


def _told(runs: Sequence[Run], what: str) -> list[str]:
    """What is missing, or who died: each sentence once, with the runs' names where there are several runs."""
    of: dict[str, list[str]] = {}
    for run in runs:
        for sentence in getattr(run, what):
            of.setdefault(sentence, []).append(run.name)
    return [f"{', '.join(names)}: {sentence}" if len(runs) > 1 else sentence for sentence, names in of.items()]


def _tables(run: Run) -> dict[str, object]:
    result = {k: v for k, v in run.result.items() if not isinstance(v, (dict, list))}
    tables = {"Result": result, "Configuration": run.config, "Versions and machine": run.environment}
    shown = {name: {k: _text(v) for k, v in rows.items()} for name, rows in tables.items() if rows}
    return {"name": str(run.folder), "tables": shown}


def _text(value: object) -> str:
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else "–" if value is None else str(value)
