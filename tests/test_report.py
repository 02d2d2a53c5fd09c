"""report.html in a browser: no errors, the slider changes the picture, the tables sort."""

import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WATCH = "<script>window.onerror = message => { document.title = 'error: ' + message; };</script>"
ACT = """<script>
  const input = document.querySelector("input[type=range]"), seen = [];
  const grids = [...document.querySelectorAll(".grid")];
  const shown = () => grids.filter(g => g.getBoundingClientRect().height).map(g => g.alt);
  seen.push(shown());
  input.value = input.max;
  input.dispatchEvent(new Event("input"));
  seen.push(shown(), document.querySelector("output").value);
  const column = k => [...document.querySelector("table").tBodies[0].rows].map(row => row.cells[k].textContent);
  const headings = [...document.querySelectorAll("th button")];
  const steps = () => column(1).map(Number);
  headings[1].click();
  seen.push(steps());
  headings[1].click();
  seen.push(steps(), headings[1].parentElement.ariaSort, document.documentElement.scrollWidth <= window.innerWidth);
  if (!document.title.startsWith("error")) document.title = JSON.stringify(seen);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_report_in_a_browser(smoke, tmp_path):
    page = (smoke / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(http|//)""", page)  # needs no network
    watched = tmp_path / "report.html"
    watched.write_text(page.replace("<head>", "<head>" + WATCH).replace("</body>", ACT + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,800", "--dump-dom"]
    done = subprocess.run([*command, f"file://{watched}"], capture_output=True, text=True, timeout=60)
    title = re.search("<title>(.*?)</title>", done.stdout)[1].replace("&quot;", '"')
    assert title == (
        '[["Samples, teacher, 8 steps"],["Samples, 1 step"],"1 step",[1,2,4,8],[8,4,2,1],"descending",true]'
    )
