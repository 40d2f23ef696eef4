"""report/index.html: what it holds, that it loads nothing, and how a browser lays it out.

Truth: the page parsed by html.parser beside report.md and the run directories; boxes measured by
chromium at two widths, where it is installed, behind a proxy that notes each request.

Run: make test ARGS=tests/report/test_report_page.py
"""

import json
import re
import shutil
import socket
import subprocess
import threading
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from lora_lab.runs import find_runs
from tests.conftest import Lab, command, only_run
from tests.copied_runs import copy_run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-features=NetworkTimeServiceQuerying", "--disable-domain-reliability"),
    *("--hide-scrollbars", "--virtual-time-budget=5000"),
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")

MEASURE = """
<script>addEventListener("load", () => {
  const width = document.documentElement.clientWidth, wide = [], over = [];
  for (const one of document.body.querySelectorAll("*")) {
    const box = one.getBoundingClientRect();
    if (!one.closest(".scroll, pre, script, details:not([open])") || one.matches(".scroll"))
      if (box.right > width + 0.5 || box.left < -0.5) wide.push(one.tagName + " " + one.className);
  }
  const blocks = [...document.querySelectorAll("header > *, h2, h3, .scroll, figure, p, details")]
    .filter(one => !one.parentElement.closest("figure, .scroll"))
    .map(one => [one, one.getBoundingClientRect()]);
  for (const [i, [one, a]] of blocks.entries()) for (const [other, b] of blocks.slice(i + 1))
    if (!one.contains(other) && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1)
      over.push(one.outerHTML.slice(0, 60) + " / " + other.outerHTML.slice(0, 60));
  const images = [...document.images].map(one => [one.complete, one.naturalWidth]);
  document.querySelector("th button").click(); document.querySelector("th button").click();
  const first = [...document.querySelector("tbody").rows].map(row => row.cells[0].innerText);
  const requests = performance.getEntriesByType("resource").map(one => one.name);
  const page = document.documentElement.scrollWidth;
  const measured = {requests, width, wide, over, images, first, page};
  parent.postMessage(JSON.stringify(measured), "*");
})</script>
"""


class Page(HTMLParser):
    """The page's table cells, links, and whatever it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("td", "th"):
            self.cells.append("")
            self._open = True
        if tag == "a":
            self.links.append(unquote(given["href"] or ""))
        elif tag == "link" or given.get("src") or given.get("srcset"):
            self.loads.append(given.get("src") or given.get("srcset") or given.get("href") or tag)

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.cells[-1] += data


@pytest.fixture
def folder(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A report over 5 ranks × 2 alphas × 2 seeds, and one run that failed."""
    assert lab("digits", "adapter.r=3", "runs_dir=first", "figures=true") == 0
    first = only_run("first")
    keys = ("adapter.r", "adapter.alpha", "seed")
    points = product((1, 2, 3, 5, 8), (4.0, 8.0), (0, 1))
    copy_run(first, (dict(zip(keys, point, strict=True)) for point in points), Path("runs"))
    assert lab("digits", "optimizer=sgd", "optimizer.lr=1e30", "adapter.r=2") == 1
    assert command(monkeypatch, "report", "runs/digits") == 0
    return Path("runs/digits/report")


def test_it_holds_each_cell_run_and_failure_and_loads_nothing(folder: Path):
    text = (folder / "index.html").read_text()
    page = Page(text)
    cells = [line.split("|")[1:-1] for line in _table((folder / "report.md").read_text())]
    for row in cells[2:]:
        for cell in row:
            assert cell.strip().strip("*") in page.cells
    assert "21 runs" in text
    runs = find_runs(folder.parent)
    for run in runs:
        assert run.path.name in page.cells
        assert any(link.startswith(f"../{run.path.name}") for link in page.links)
    for link in page.links:
        assert (folder / link).exists(), link
    (failed,) = [run for run in runs if not run.finished]
    assert str(failed.status["error"]).partition("\n")[0] in page.cells
    assert f"../{failed.path.name}/log.txt" in page.links
    last = len(page.cells) - page.cells[::-1].index(failed.path.name) - 1
    assert page.cells[last + 1 : last + 4] == ["failed", "0", "–"], "it has no final loss"
    assert page.loads
    assert len([link for link in page.links if link.endswith(".png")]) == len(page.loads)
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    plain = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?:|//\w|@import|url\(", plain)
    assert "model.hidden: [16]" in text, "what all configs share"


def _table(markdown: str) -> list[str]:
    return markdown.split("## cells\n\n")[1].split("\n\n")[0].splitlines()


def test_an_error_text_cannot_break_the_page(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    assert lab("digits") == 0
    run = only_run()
    status = json.loads((run.path / "status.json").read_text())
    error = "Bad: <script>alert(1)</script> & \"'"
    (run.path / "status.json").write_text(json.dumps({**status, "state": "failed", "error": error}))
    assert command(monkeypatch, "report", "runs/digits") == 0
    text = Path("runs/digits/report/index.html").read_text()
    assert "<script>alert" not in text
    assert error in Page(text).cells


def test_a_run_has_its_page(lab: Lab):
    assert lab("digits", "figures=true") == 0
    report = only_run().path / "report"
    page = Page((report / "index.html").read_text())
    assert len(page.loads) == 5
    assert {link for link in page.links if link.endswith(".png")} == {
        path.name for path in report.glob("*.png")
    }
    assert {"effective rank", "epoch"} & {cell.rpartition(": ")[2] for cell in page.cells}


@needs_browser
def test_nothing_is_cut_off_or_overlaps_or_asks_a_host(folder: Path):
    text = (folder / "index.html").read_text()
    (folder / "measured.html").write_text(text.replace("</body>", f"{MEASURE}</body>"))
    for width, dark in product((1280, 400), (False, True)):
        layout = _laid_out(folder, width, dark)
        assert [name for name in layout["requests"] if not name.startswith("data:")] == []
        assert layout["width"] == width
        assert layout["page"] == width, "the page itself does not scroll sideways"
        assert layout["wide"] == []
        assert layout["over"] == []
        assert layout["images"]
        assert all(complete and pixels for complete, pixels in layout["images"])
        ranks = [int(r) for r in layout["first"]]
        assert ranks == sorted(ranks, reverse=True), "two clicks on a head sort downward"
        assert ranks[0] == 8


def _laid_out(folder: Path, width: int, dark: bool) -> dict[str, Any]:
    """In an iframe as wide as the screen would be: a window cannot be narrower than 500 pixels."""
    (folder / "frame.html").write_text(
        "<body style='margin:0'><script>onmessage = e => document.title = e.data</script>"
        f"<iframe src=measured.html style='border:0;width:{width}px;height:3000px'></iframe>"
    )
    with Proxy() as proxy:
        flags = [*FLAGS, f"--proxy-server=127.0.0.1:{proxy.port}", "--user-data-dir=profile"]
        flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
        flags += ["--dump-dom", f"--window-size={max(width, 600)},3000"]
        done = subprocess.run(
            [BROWSER or "", *flags, (folder / "frame.html").absolute().as_uri()],
            capture_output=True,
            text=True,
            timeout=100,
        )
        # The browser asks its maker about updates and the time, whatever the page.
        # Chromium may open a connection ahead of time and send nothing: no host is asked by that.
        requests = [r for r in proxy.requests if r]
        assert not [r for r in requests if not re.search(rb"google(apis)?\.com", r)]
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    return json.loads(title.group(1))


class Proxy:
    """What a browser would go through to reach any host: notes whoever asks."""

    def __enter__(self) -> "Proxy":
        self.requests: list[bytes] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                self.requests.append(connection.recv(1000))
