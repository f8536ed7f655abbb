"""A page in headless Chromium: how wide it gets in a phone's frame, whether pictures load, what the console says."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHY_NOT = "no Chromium on the PATH: `apt-get install chromium` lets this test open the page"

# The page is opened in a frame, since a window cannot be as narrow as a phone.
_FRAME = """<!doctype html><body style="margin:0">
<iframe id="page" style="border:0;height:800px;width:WIDTHpx"></iframe>
<pre id="found"></pre><script>
const frame = document.getElementById("page");
// a page has loaded when its pictures have, or have failed to
frame.onload = () => {
  const inside = frame.contentDocument, root = inside.documentElement;
  const pictures = [...inside.images];
  const wide = [...inside.body.querySelectorAll("*")].filter(
    entry => entry.getBoundingClientRect().right > root.clientWidth + 1 && !entry.closest(".wide, pre, picture"));
  document.getElementById("found").textContent = JSON.stringify({
    visible: root.clientWidth, needed: root.scrollWidth, pictures: pictures.length,
    loaded: pictures.filter(picture => picture.naturalWidth > 0).length,
    scrolled: [...inside.querySelectorAll(".wide")].filter(entry => entry.scrollWidth > entry.clientWidth + 1).map(
      entry => entry.innerText.slice(0, 60)),
    pwned: frame.contentWindow.pwned === 1, too_wide: wide.slice(0, 5).map(entry => entry.outerHTML.slice(0, 120))});
};
frame.src = "PAGE";
</script>"""


@dataclass(frozen=True, kw_only=True)
class Seen:
    visible: int
    needed: int
    # pixels: the frame's width, and what the page takes
    pictures: int
    loaded: int
    pwned: bool
    # a script of the page set window.pwned
    too_wide: list[str]
    scrolled: list[str]
    # what is cut off until one scrolls it sideways
    console: list[str]


def look(page: Path, folder: Path, width: int = 360) -> Seen:
    frame = folder / f"frame-{width}.html"
    frame.write_text(_FRAME.replace("WIDTH", str(width)).replace("PAGE", page.resolve().as_uri()), encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ]
    # virtual time passes at once, so that the dump waits for the script and not for the clock
    command += ["--hide-scrollbars", "--enable-logging=stderr", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=20000"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    found = re.search(r'<pre id="found">(\{.*?\})</pre>', done.stdout, re.S)
    assert found, f"Chromium showed nothing: {done.stdout[-500:]} {done.stderr[-2000:]}"
    values = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return Seen(**values, console=[line for line in done.stderr.splitlines() if "CONSOLE" in line])
