"""The notebooks as files (no outputs, parameters, sizes), and, slowly, as programs: the whole suite at smoke, twice."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from resonate_lib import config

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def names(paths):
    return [path.stem for path in paths]


def test_the_first_eight_are_there():
    assert [path.name[:2] for path in NOTEBOOKS][:8] == [f"{i:02d}" for i in range(8)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_stored_clean_small_and_with_a_kernel(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len(notebook.cells) <= 60
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "run: clear all outputs before saving"
            assert len(cell.source.splitlines()) <= 30
            assert "pip install" not in cell.source and "%cd" not in cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_anatomy(path):
    cells = read(path).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    for part in ("You will", "Recap", "Known limits", "Exercises"):
        assert part.lower() in text.lower(), f"{path.name} lacks {part!r}"
    assert any("assert" in cell.source for cell in cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_parameters_are_typed_flat_literals_that_papermill_reads(path):
    tagged = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    lines = [line for line in tagged[0].source.splitlines() if line.strip()]
    for line in lines:
        assert re.match(r"^[a-z_0-9]+: [a-z\[\], |A-Z]+ = [^#]+  # [^=]+$", line), line
    found = papermill.inspect_notebook(str(path))
    assert len(found) == len(lines) and all(item["help"] for item in found.values())
    assert found["profile"]["default"].strip("\"'") == "tiny" and "seed" in found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_a_knob_that_is_a_field_is_none_until_turned(path):
    fields = {name for cls in config.NOTEBOOK_CONFIGS.get(path.name[:2], ())[:1] for name in config.field_types(cls)}
    for name, item in papermill.inspect_notebook(str(path)).items():
        if name in fields and (path.name[:2], name) != ("05", "reward"):  # the one thing 05 sets otherwise
            assert item["default"] == "None", f"{name} hides the profile's value"


def run(results, *arguments):
    environment = {**os.environ, "RESONATE_RESULTS": str(results), "RESONATE_CACHE": str(results / "cache")}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "resonate_lib", "run", "--profile", "smoke", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(done.stdout.strip().splitlines()[-1])


def checksums(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "metrics").iterdir())}


@pytest.mark.slow
def test_the_whole_suite_twice_with_one_seed_gives_the_same_bytes(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    assert first != second
    one, other = checksums(first), checksums(second)
    assert one and one == other, [name for name in one if one[name] != other.get(name)]
    for name in ("listen.html", "run.json", "params.yaml"):
        assert (first / name).is_file()
    assert list((first / "audio").glob("*.flac")) and list((first / "figures").glob("*.png"))
    executed = "".join(path.read_text(encoding="utf-8") for path in (first / "notebooks").glob("*.ipynb"))
    assert "image/png" in executed and "<audio controls" in executed


@pytest.mark.slow
def test_plain_papermill_works_in_a_scratch_folder(tmp_path):
    environment = {**os.environ, "RESONATE_RESULTS": str(tmp_path), "RESONATE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "07_listening.ipynb"), str(tmp_path / "out.ipynb")]
    command += ["-p", "profile", "smoke", "-p", "prompts", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "scratch-smoke-seed0" / "listen.html").is_file()
