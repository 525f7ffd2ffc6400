"""The page in a real browser: light and dark, wide and on a phone; text that can be read, nothing that scrolls sideways."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tests.report.browser import PROGRAM, Page, browser

# Of every piece of text: its words, its contrast to what lies behind it (WCAG 2.1), its size in CSS pixels, its right end.
TEXTS = """(() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length == 3 || c[3] == 1) return c; } return [255, 255, 255]; };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  for (let n; n = walk.nextNode();) {
    const e = n.parentElement, box = e.getBoundingClientRect();
    if (!n.textContent.trim() || !box.width || e.closest("style, defs, metadata")) continue;
    const style = getComputedStyle(e), drawn = e instanceof SVGElement, to = drawn ? e.getScreenCTM() : { a: 1, b: 0 };
    const a = light(parse(drawn ? style.fill : style.color)), b = light(behind(e));
    found.push([n.textContent.trim(), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
      parseFloat(style.fontSize) * Math.hypot(to.a, to.b), box.right]);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if PROGRAM is None:
        reason = "no chromium on PATH: apt-get install chromium (Debian)"
        if os.environ.get("HPCASYNC_REQUIRE_BROWSER") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    with browser(tmp_path_factory.mktemp("browser")) as one:
        yield one


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_page_can_be_read(window: Page, page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    window.open(page, width=width, dark=dark)
    assert window.run("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    scrolling = "[...document.querySelectorAll('section, .panels, table')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert window.run(scrolling) == 0
    texts = window.run(TEXTS)
    assert len(texts) > 300 and any("epochs" in t[0] for t in texts) and any("no record" in t[0] for t in texts)
    assert [t for t in texts if t[1] < 4.5] == []  # WCAG 2.1, AA
    assert [t for t in texts if t[2] < 8] == []
    assert [t for t in texts if t[3] > width] == []
    panels = window.run("[...document.querySelectorAll('.wide svg')].slice(0, 3).map(e => e.getBoundingClientRect().top)")
    assert (len(set(panels)) == 1) == (width == 1200)  # side by side, or one below the other

    shot = (255 * imread(window.screenshot(tmp_path / "shot.png"))[::3, ::3, :3]).round().astype(int)
    card = [0x1D, 0x21, 0x26] if dark else [0xF5, 0xF6, 0xF8]
    assert (shot == card).all(-1).mean() > 0.4
    assert (shot == [0x3B, 0x7D, 0xD8]).all(-1).any()  # the bars of the ranks
    assert np.ptp(shot) > 200
