"""The widgets in a real browser: JupyterLab with headless Chromium; the slider moves, the figure changes.

Optional. Needs chromium, node and playwright-core: `npm install --prefix tests/browser`, or MINIMIND_PLAYWRIGHT names the folder
of an installed playwright-core. Without them the tests are skipped and say what is missing.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

HERE = Path(__file__).resolve().parent / "browser"
CHROMIUM = os.environ.get("MINIMIND_CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PLAYWRIGHT = Path(os.environ.get("MINIMIND_PLAYWRIGHT") or HERE / "node_modules" / "playwright-core")
MISSING = [
    name
    for name, there in {
        "chromium (set MINIMIND_CHROMIUM, or install it)": CHROMIUM,
        "node": shutil.which("node"),
        "playwright-core (npm install --prefix tests/browser, or set MINIMIND_PLAYWRIGHT)": PLAYWRIGHT.is_dir(),
    }.items()
    if not there
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason="no browser test: missing " + ", ".join(MISSING))

# The cells that a widget needs, so that a test does not run the whole chapter.
WIDGETS = {
    "04_attention": [
        "attention-imports", "attention-picture", "attention-words", "attention-read-one", "attention-causal-mask", "attention-repeat-kv",
        "attention-weights", "attention-grouped", "attention-projections", "attention-matrices-faster", "attention-class", "attention-copier",
        "attention-copied", "attention-train",
        "attention-train-both", "attention-maps", "attention-head-scores", "attention-map-draw", "attention-map-figure", "attention-map-widget",
    ],
    "05_rope": ["rope-imports", "rope-picture", "rope-decay", "rope-decay-figure", "rope-widget"],
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, root):
    """A JupyterLab on this machine alone, with its own settings and a secret; gives (folder, address, token)."""
    folder, port, token = tmp_path_factory.mktemp("lab"), free_port(), secrets.token_hex(16)
    settings = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
                                                              "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}  # fmt: skip
    whole = folder / "jupyterlab_settings_dir" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    whole.parent.mkdir(parents=True)
    whole.write_text('{"windowingMode": "none"}')  # else JupyterLab keeps cells that are out of view out of the page
    environment = dict(os.environ, **settings, PYTHONPATH=str(root), MINIMIND_MAX_STEPS="2", MINIMIND_RUN=str(folder / "run"))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if server.poll() is not None:
                pytest.fail("JupyterLab ended: " + (folder / "lab.log").read_text()[-2000:])
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not answer within two minutes")
        yield folder, address, token
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def move_slider(lab, root, chapter: str, *options: str) -> dict:
    """Run the cells of a widget in the browser and move its slider by one step."""
    folder, address, token = lab
    notebook = nbformat.read(root / "chapters" / f"{chapter}.ipynb", as_version=4)
    by_id = {cell.id: cell for cell in notebook.cells}
    notebook.cells = [by_id[name] for name in ("parameters", "setup", *WIDGETS[chapter])]
    for cell in notebook.cells:
        cell.update(outputs=[], execution_count=None)
    by_id["parameters"].source = 'profile = "smoke"'
    nbformat.write(notebook, folder / f"{chapter}.ipynb")
    command = ["node", str(HERE / "move_slider.js"), f"{address}/lab/tree/{chapter}.ipynb?token={token}", CHROMIUM, str(PLAYWRIGHT), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("chapter", WIDGETS)
def test_the_slider_moves_and_the_figure_changes(lab, root, chapter):
    seen = move_slider(lab, root, chapter)
    assert seen["value_after"] != seen["value_before"], "the slider did not move"
    assert seen["after"] != seen["before"], "the slider moved, but the figure stayed the same"


def test_the_figure_stays_when_nobody_moves_the_slider(lab, root):
    """Shows that the test above can fail: without a move there is no other figure."""
    seen = move_slider(lab, root, "05_rope", "dry")
    assert seen["value_after"] == seen["value_before"] and seen["after"] == seen["before"]
