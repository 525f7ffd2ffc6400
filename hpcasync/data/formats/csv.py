"""Read a CSV file: one sample per line, numbers, and one column with the class."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from hpcasync.data.formats.split import encode_labels, stratified
from hpcasync.data.layout import Arrays
from hpcasync.errors import UsageError, unknown

_LABELS = ("label", "class", "target", "y")


def matches(src: Path) -> bool:
    """Whether ``src`` is named like a CSV file."""
    return src.is_file() and src.suffix.lower() == ".csv"


def read(
    src: Path,
    *,
    label: str | int | None = None,
    header: bool | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Arrays:
    """Read ``src``: features ``(N, F)`` float32, labels int64, cut into training and test parts class by
    class.

    Labels may be names or any whole numbers; they become 0, 1, ... in sorted order, and the names are kept.

    Args:
        src: the file, UTF-8.
        label: the label column, by name or index (negative from the end); default: a column named label,
            class, target or y, else the last.
        header: whether the first line holds names; default: it does if one of its fields but the label is no
            number.
        test_fraction: the part that becomes the test split.
        seed: of that cut.

    Raises:
        UsageError: an empty file, a missing column, and, with its line, a ragged row or a field that is no
            number.
    """
    rows, lines = _rows(src)
    has_header = _looks_like_header(rows[0]) if header is None else header
    names = [n.strip() for n in rows[0]] if has_header else []
    if has_header:
        rows, lines = rows[1:], lines[1:]
        if not rows:
            raise UsageError(f"{src} holds a header and no samples, expected one sample per line")
    width = len(names or rows[0])
    column = _column(src, label, names, width)
    if width < 2:
        raise UsageError(f"{src} has one column, expected features and a label separated by commas")
    features = np.empty((len(rows), width - 1), dtype=np.float32)
    labels = []
    for i, (row, line) in enumerate(zip(rows, lines, strict=True)):
        if len(row) != width:
            raise UsageError(f"{src}, line {line}: {len(row)} fields, expected {width} as in the first line")
        labels.append(row.pop(column).strip())
        try:
            with np.errstate(over="ignore"):  # refused below, with its line
                features[i] = [float(field) for field in row]
        except ValueError:
            bad = next(field for field in row if not _is_number(field))
            raise UsageError(
                f"{src}, line {line}: {bad!r} is no number; fill, remove or encode it first"
            ) from None
        if not labels[-1]:
            raise UsageError(
                f"{src}, line {line}: the label is empty, expected a class; fill or remove the line"
            )
        if not np.isfinite(features[i]).all():
            raise UsageError(
                f"{src}, line {line}: NaN, infinity or a number too large for float32, expected finite "
                "numbers; fill or remove the line"
            )
    y, class_names = encode_labels(src, labels)
    train, test = stratified(src, y, test_fraction, seed)
    return Arrays(
        features[train],
        y[train],
        features[test],
        y[test],
        name=src.stem,
        classes=int(y.max()) + 1,
        class_names=class_names,
    )


def _rows(src: Path) -> tuple[list[list[str]], list[int]]:
    rows, lines = [], []
    try:
        with src.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if any("\0" in field for field in row):
                    raise csv.Error(f"a zero byte in line {reader.line_num}")
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{src} is no CSV text in UTF-8 ({error}); convert it first") from error
    if not rows:
        raise UsageError(f"{src} is empty, expected one sample per line")
    return rows, lines


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _looks_like_header(row: list[str]) -> bool:
    # A label may be a word in any row; two words, or one of the usual names, make a header.
    words = [f.strip() for f in row if f.strip() and not _is_number(f)]
    return len(words) > 1 or any(w.lower() in _LABELS for w in words)


def _column(src: Path, label: str | int | None, names: list[str], width: int) -> int:
    if label is None:
        lower = [n.lower() for n in names]
        return next((lower.index(n) for n in _LABELS if n in lower), width - 1)
    if isinstance(label, str) and label in names:
        return names.index(label)
    try:
        index = int(label)
    except ValueError:
        if names:
            raise unknown(f"label column of {src}:", str(label), names) from None
        raise UsageError(
            f"{src} has no header, so label {label!r} cannot be found; give the index of the column, "
            f"0 to {width - 1}, or header=True"
        ) from None
    if not -width <= index < width:
        raise UsageError(f"{src}: label column {index}, expected 0 to {width - 1} ({width} columns)")
    return index % width
