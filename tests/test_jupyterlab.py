"""A notebook as a student meets it: opened in JupyterLab in a real browser, run from top to bottom, looked at and listened to.

Needs a Chromium (RESONATE_CHROMIUM, else the PATH); without one the tests skip.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

CELLS = "document.querySelectorAll('.jp-CodeCell').length"
# [12] has run, [*] runs, [ ] waits; cells out of sight are rendered too (windowing is switched off below).
PENDING = """[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
             .filter(p => !/\\[\\d+\\]/.test(p.textContent)).length"""
ERRORS = """[...document.querySelectorAll('.jp-OutputArea-output')]
            .map(o => o.textContent).filter(t => /Traceback|Error:/.test(t)).join('\\n')"""


def chromium() -> str:
    found = os.environ.get("RESONATE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        pytest.skip("no Chromium: install one, or name it in RESONATE_CHROMIUM")
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab that serves copies of the notebooks; everything it and its kernels write lands in tmp_path."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
        path.write_text(path.read_text().replace('profile: str = \\"tiny\\"', 'profile: str = \\"smoke\\"'))
    settings = tmp_path / "lab-settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    port = free_port()
    env = os.environ | {
        "RESONATE_RESULTS": str(tmp_path / "results"), "RESONATE_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1",
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "lab-settings"), "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces")}  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=",
               f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=", "--LabApp.check_for_updates_class="
               "jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/api", server, tmp_path / "lab.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def wait_for(address, server, log):
    for _ in range(120):
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab did not answer: {log.read_text()[-2000:]}")


def choose_kernel(page):
    """Answers JupyterLab's question which kernel to use, if it asks."""
    page.wait_for_timeout(2000)
    if page.locator(".jp-Dialog").count():
        page.click(".jp-Dialog .jp-mod-accept")


@pytest.mark.parametrize(("name", "players"), [("00_start_here", 1), ("07_listening", 2)])
def test_a_notebook_runs_in_the_browser_and_can_be_seen_and_heard(lab, tmp_path, name, players):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.goto(f"{lab}/lab/tree/notebooks/{name}.ipynb?reset")
        page.wait_for_selector(".jp-CodeCell", timeout=60_000)
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=60_000)
        choose_kernel(page)
        page.click("text=Run >> nth=0")
        page.click("li[data-command='runmenu:run-all']")
        choose_kernel(page)
        page.wait_for_function(f"{CELLS} > 0 && {PENDING} === 0", timeout=300_000)
        assert not page.evaluate(ERRORS)
        assert page.locator("audio").count() >= players
        loaded = page.evaluate("""async () => Promise.all([...document.querySelectorAll('audio')].map(a => new Promise(done => {
            if (a.readyState > 0) return done(a.duration);
            a.onloadedmetadata = () => done(a.duration); a.onerror = () => done(-1); a.load(); })))""")
        assert all(3.5 < seconds < 4.5 for seconds in loaded), loaded
        images = page.evaluate("[...document.querySelectorAll('.jp-RenderedImage img')].map(i => i.naturalWidth)")
        assert images and min(images) > 200
        page.screenshot(path=str(tmp_path / f"{name}.png"), full_page=True)
        browser.close()
