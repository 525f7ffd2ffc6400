"""An import only ever points down: the layers of docs/design.md, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import hpcasync

ROOT = Path(hpcasync.__file__).parent
LAYERS = [
    {"errors", "backoff", "docstrings", "launched", "proc", "stats"},
    {"kernels"},
    {"comm", "data", "models"},
    {"rules"},
    {"store"},
    {"modes"},
    {"train"},
    {"simulate", "replay", "report", "scaling", "slurm", "doctor", "launch", "lightning"},
    {"cli"},
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def test_every_module_has_a_layer() -> None:
    found = {p.stem for p in ROOT.iterdir() if (p.is_dir() or p.suffix == ".py") and not p.name.startswith(("__", "."))}
    assert found == set(HEIGHT)


def test_imports_point_down() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if layer.startswith("__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hpcasync"):
                parts = (node.module or "").split(".")
                for name in [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]:
                    if HEIGHT.get(name, -1) > HEIGHT[layer]:
                        wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []
