"""The page of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcasync.data.atomic import replacing
from hpcasync.report.figures import Plot, plots, png, svg
from hpcasync.report.run import Run

RESULT = 5  # digits of a number in a table


def write_report(runs: Sequence[Run], path: Path) -> list[Plot]:
    """Write the page, and beside it each plot as ``<page>-<plot>.png``.

    Args:
        runs: those that differ only in the seed become one line with a band.
        path: of the page.

    Raises:
        UsageError: matplotlib is not installed, or no permission to write there.
    """
    from jinja2 import Environment, PackageLoader

    drawn = plots(_groups(runs))
    shown = [
        {"title": p.title, "note": p.note, "svg": svg(p.figure, f"p{i}"), "wide": len(p.figure.axes) > 1}
        for i, p in enumerate(drawn)
    ]
    page = Environment(loader=PackageLoader("hpcasync.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = page.get_template("page.html").render(
        title=", ".join(r.folder.resolve().name for r in runs), plots=shown, runs=[_tables(r) for r in runs]
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    for plot in drawn:
        png(plot.figure, path.with_name(f"{path.stem}-{plot.name}.png"))
    return drawn


def _groups(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs of one configuration together, labelled by the first one's folder."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.recipe if run.config else str(run.folder), []).append(run)
    return [(some[0].folder.resolve().name, some) for some in groups.values()]


def _tables(run: Run) -> dict[str, object]:
    result = {k: v for k, v in run.result.items() if not isinstance(v, (dict, list))}
    tables = {"Result": result, "Configuration": run.config, "Versions and machine": run.environment}
    return {
        "name": str(run.folder),
        "missing": run.missing,
        "tables": {name: {k: _text(v) for k, v in rows.items()} for name, rows in tables.items() if rows},
    }


def _text(value: object) -> str:
    return f"{value:.{RESULT}g}" if isinstance(value, float) else "–" if value is None else str(value)
