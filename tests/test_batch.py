"""The runner on real kernels: what stops it before a start, and what a failure, a death or Ctrl-C leaves behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch

from resonate_lib import __main__ as cli
from resonate_lib import audio, batch, kernel, record, seeds, versions
from resonate_lib.batch import Request

PARAMETERS = 'profile: str = "tiny"\nseed: int = 0\nrun: str = None  # run folder\nsteps: int = None  # rounds\n'
OPEN = "from resonate_lib import runs\nrun = runs.open_run(run, profile=profile, seed=seed)"


def write_notebook(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook of code cells, the first tagged `parameters`."""
    made = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *map(nbformat.v4.new_code_cell, cells),
    ]
    notebook = nbformat.v4.new_notebook(cells=made)
    # A kernelspec that no machine has: the runner must use this very python.
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / name)
    return folder / name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A notebooks folder with a profile; results and cache lie beside it."""
    for name in ("RESONATE_RUN", "RESONATE_BATCH", "RESONATE_FROM", "RESONATE_PARAMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RESONATE_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("RESONATE_NOTEBOOKS", str(tmp_path / "notebooks"))
    monkeypatch.setenv("RESONATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "no_kernelspecs"))
    (tmp_path / "notebooks" / "params").mkdir(parents=True)
    (tmp_path / "notebooks" / "params" / "tiny.yaml").write_text("suite: {disk_mb: 1}\ngrpo: {steps: 5}\n")
    return tmp_path / "notebooks"


def record_of(folder: Path) -> dict:
    return versions.read(versions.find("latest", folder.parent / "results"))


def test_a_run_ends_done_with_everything_recorded(folder, capsys):
    write_notebook(
        folder, "03_first.ipynb", OPEN, "import sys, os; print(sys.executable)\nrun.record('facts', {'a': 1})"
    )
    write_notebook(
        folder,
        "04_second.ipynb",
        OPEN,
        "from resonate_lib.config import GRPOConfig, resolve",
        "config = run.show(resolve(GRPOConfig, profile, steps=steps))",
        "run.write_metrics('history', [{'step': i, 'reward': i / 3} for i in range(config.steps)])",
    )
    write_notebook(folder, "08_later.ipynb", "1 / 0")
    assert cli.main(["run", "-p", "steps", "3"]) == 0
    out, err = capsys.readouterr()
    version = Path(out.splitlines()[-1])
    run = json.loads((version / "run.json").read_text())
    assert version.name == run["version"] and version.name.startswith("0001-tiny-") and "DONE" in err and "left" in err
    assert {key: item["status"] for key, item in run["notebooks"].items()} == {"03_first": "DONE", "04_second": "DONE"}
    assert run["notebooks"]["04_second"]["notes"]["config"]["grpo"]["steps"] == 3
    assert run["overrides"] == {"03": {"steps": 3}, "04": {"steps": 3}} or run["overrides"]["04"] == {"steps": 3}
    assert run["peak_rss_mb"] > 50 and run["inputs"]["resonate_lib/runs.py"] and run["packages"]["papermill"]
    assert (version / "metrics" / "history.csv").read_text().startswith("step,reward\n0,0\n1,0.333333\n")
    executed = (version / "notebooks" / "03_first.ipynb").read_text()
    assert "<python>/bin/" in executed and sys.prefix not in executed  # this python ran it; its folder is not told
    assert set(versions.verify(version).query("kind == 'artefact'")["state"]) == {"ok"}
    assert cli.main(["run", "--resume", version.name]) == 2
    assert "is DONE and is never edited" in capsys.readouterr().err


def test_same_seed_twice_gives_the_same_metrics_and_seeds_are_summed_up(folder):
    write_notebook(
        folder, "04_a.ipynb", OPEN, "import random\nrandom.seed(seed)\nrun.write_metrics('m', {'x': random.random()})"
    )
    first, run = batch.start(Request(seeds=(0, 1)))
    second, _ = batch.start(Request(seeds=(0, 1)))
    assert run["status"] == "DONE" and list(run["notebooks"]) == ["seed0/04_a", "seed1/04_a"]
    files = sorted(path.relative_to(first) for path in first.rglob("metrics/*"))
    assert len(files) == 6 and all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    assert (first / "seed0/metrics/m.csv").read_text() != (first / "seed1/metrics/m.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "stepz", "3"], "unknown parameter 'stepz'; did you mean 'steps'"),
        (["-p", "steps", "1.5"], "steps='1.5': not a whole number"),
        (["-p", "group_size", "1"], "a group of one has no advantage"),
        (["-p", "run", "x"], "use RESONATE_RESULTS"),
        (["-p", "steps"], "write -p name value"),
        (["-p", "04.stepz", "3"], "unknown parameter of notebook 04 'stepz'; did you mean 'steps'"),
        (["-p", "09.steps", "3"], "unknown notebook '09'; did you mean '04'"),
        (["-p", "04.steps", "1.5"], "steps='1.5': not a whole number"),
        (["-p", "04.seed", "3"], "use --seed"),
        (["-p", "world_seed", "x"], "world_seed='x': not a whole number"),
        (["-p", "data.world_sed", "1"], "unknown parameter of the data 'world_sed'; did you mean 'world_seed'"),
        (["-p", "steps=1", "-p", "steps=2"], "given 2 times"),
        (["-p", "reward", "mine.py:score"], "no file mine.py"),
        (["-p", "reward", "clpa"], "no reward 'clpa' (nearest: 'clap')"),
        (["-p", "reward", "0.5*clap+lalmm"], "no reward 'lalmm' (nearest: 'lalm')"),
        (["-p", "reward", "x*clap"], "'x' is not a number"),
        (["-p", "reward", "nan*clap"], "the weight of clap is nan"),
        (["-p", "reward", "0*clap+lalm"], "the weight of clap is 0"),
        (["-p", "reward", "clap+clap"], "stands in it twice"),
        (["-p", "reward", "no_such_module.part:score"], "no module 'no_such_module.part' here"),
        (["-p", "suite.seconds", "5"], "the embedded world's scenes have 4"),
        (["-p", "data.captions", "x.csv"], "captions='x.csv' without a folder"),
        (["-p", "reward", f"{__file__}:recrod_of"], "no function 'recrod_of' (nearest: 'record_of')"),
        (["-p", "profile", "tinny"], "unknown profile 'tinny'; did you mean 'tiny'"),
        (["--profile", "tinny"], "unknown profile"),
        (["--only", "05"], "unknown notebook '05'; did you mean '04'"),
        (["--seed", "0", "0"], "give different whole numbers"),
        (["--seed", "x"], "not a whole number"),
        (["--seed", str(2**40)], "give different whole numbers from 0 to 2147483647"),
        (["--from", "7"], "no versions"),
        (["--resume", "7"], "no versions"),
    ],
)
def test_bad_requests_start_nothing(folder, capsys, arguments, words):
    write_notebook(folder, "04_a.ipynb", "1", parameters=PARAMETERS + "group_size: int = None\nreward: str = None\n")
    assert cli.main(["run", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (folder.parent / "results").exists()


def test_a_reward_of_ones_own_is_a_whole_path_even_with_a_plus_in_it(folder, tmp_path, monkeypatch):
    write_notebook(folder, "04_a.ipynb", "1", parameters=PARAMETERS + "reward: str = None\n")
    (tmp_path / "a+b").mkdir()
    (tmp_path / "a+b" / "mine.py").write_text("raise RuntimeError\ndef score(audio, sample_rate, prompts, metadata): ...\n")
    monkeypatch.chdir(tmp_path)
    for spec in ("./a+b/mine.py:score", "clap+0.5*./a+b/mine.py:score"):
        plan = batch.make_plan(Request(overrides={"reward": spec}), results=tmp_path / "results")
        assert plan.parameters["04"]["reward"] == spec.replace("./", f"{tmp_path}/")


def test_a_dotted_parameter_is_for_one_notebook_alone(folder, capsys):
    for name in ("03_a", "04_b", "05_c"):
        write_notebook(folder, f"{name}.ipynb", "1")
    plan = batch.make_plan(Request(overrides={"05.steps": "7", "steps": "40"}), results=folder.parent)
    assert plan.parameters == {"03": {"steps": 40}, "04": {"steps": 40}, "05": {"steps": 7}}
    assert capsys.readouterr().err == "steps = 40 in 03, 04 (one of them alone: -p 03.steps 40)\n"
    plan = batch.make_plan(Request(overrides=cli.parameters([["04.steps=3"]])), results=folder.parent)
    assert plan.parameters == {"03": {}, "04": {"steps": 3}, "05": {}} and capsys.readouterr().err == ""


def test_data_values_reach_every_notebook_and_survive_resume(folder, capsys):
    """Notebook 04 does not declare world_seed: it resolves the data section, as 02 to 07 do."""
    (folder / "params" / "tiny.yaml").write_text("suite: {disk_mb: 1}\ndata: {train_clips: 50}\nminutes: {'04': 1}\n")
    show = "from resonate_lib.config import DataConfig, resolve\nrun.show(resolve(DataConfig, profile))"
    write_notebook(folder, "01_a.ipynb", OPEN, show, parameters=PARAMETERS + "world_seed: int = None\n")
    fails_once = "state = run.state('x')\nif not state.exists(): state.write_text(''); raise RuntimeError('first time')"
    write_notebook(folder, "04_b.ipynb", OPEN, fails_once, show)
    plain = batch.make_plan(Request(), results=folder.parent)
    assert cli.main(["run", "--from-scratch", "-p", "world_seed", "3", "-p", "test_clips", "20", "-p", "04.steps", "2"]) == 1
    captured = capsys.readouterr()
    assert "world_seed = 3 in the data of every notebook" in captured.err
    version = Path(captured.out.splitlines()[-1])
    assert not version.name.endswith(batch.record.hash8(plain.payload))
    assert cli.main(["run", "--resume", version.name]) == 0
    run, wanted = record_of(folder), {"world_seed": 3, "test_clips": 20}
    for key in ("01_a", "04_b"):
        seen = run["notebooks"][key]["notes"]["config"]["data"]
        assert seen["train_clips"] == 50 and {name: seen[name] for name in wanted} == wanted
    recorded = batch.yaml.safe_load((version / "params.yaml").read_text())
    assert recorded["overrides"] == {"01": {"world_seed": 3}, "04": {"steps": 2}, "data": wanted}
    assert recorded["config"]["data"]["world_seed"] == 3 and "profile/tiny.yaml" in run["artefacts"]


def test_the_estimate_knows_who_trains_an_own_base(folder):
    table = "minutes: {'02': 1, '04': 2}\nminutes_own_base: {'02': 30}\nminutes_from_scratch: {'02': 70}\n"
    (folder / "params" / "tiny.yaml").write_text("suite: {disk_mb: 1}\n" + table)
    for name in ("02_a", "04_b"):
        write_notebook(folder, f"{name}.ipynb", OPEN)
    results = folder.parent / "results"
    plan = batch.make_plan(Request(seeds=(0, 1)), results=results)
    scratch = batch.make_plan(Request(seeds=(0, 1), from_scratch=True), results=results)
    assert [batch._expected(plan, results / "x", seed) for seed in (0, 1)] == [
        {"02": 60, "04": 120},
        {"02": 1800, "04": 120},
    ]
    assert batch._expected(scratch, results / "x", 0)["02"] == batch._expected(scratch, results / "x", 1)["02"] == 4200
    assert cli.main(["run"]) == 0  # measured for seed 0, which says nothing about an own base
    assert batch._expected(plan, results / "x", 0)["02"] < 60 and batch._expected(plan, results / "x", 1)["02"] == 1800
    longer = batch.make_plan(Request(overrides={"04.steps": "9", "train_clips": "99"}), results=results)
    assert batch._expected(longer, results / "x", 0)["02"] == 60  # other data: that run says nothing about this one
    longer = batch.make_plan(Request(overrides={"04.steps": "9"}), results=results)
    assert batch._expected(longer, results / "x", 0)["02"] < 60 and batch._expected(longer, results / "x", 0)["04"] == 120


def test_space_is_asked_for_every_seed_and_where_corpora_go(folder, monkeypatch, capsys):
    write_notebook(folder, "04_a.ipynb", "1")
    monkeypatch.setattr(versions.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2 * 2**20}))
    assert cli.main(["run", "--seed", "0", "1", "2"]) == 2
    assert "has 2 MB free and this profile needs 3 MB" in capsys.readouterr().err
    cached = {"cache": 0, "results": 2**40}
    monkeypatch.setattr(versions.shutil, "disk_usage", lambda path: type("Usage", (), {"free": cached[path.name]}))
    assert cli.main(["run"]) == 2
    err = capsys.readouterr().err
    assert "cache has 0 MB free" in err and "set RESONATE_CACHE" in err
    monkeypatch.setenv("RESONATE_CACHE", str(folder / "params" / "tiny.yaml" / "cache"))
    assert cli.main(["run"]) == 2
    err = capsys.readouterr().err
    assert "a file stands where a folder should be" in err and "set RESONATE_CACHE" in err and err.count("\n") == 1


@pytest.fixture
def published(folder, tmp_path, monkeypatch):
    """A profile of published weights, miniatures but for the recordings, with two notebooks; returns the weights' directory."""
    import miniature

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = miniature.build(tmp_path / "weights")
    suite = f"{{world: folder, weights: {weights}, sample_rate: 44100, seconds: 1.0, disk_mb: 1}}"
    (folder / "params" / "paper.yaml").write_text(f"suite: {suite}\nlisten: {{prompts: 2}}\n")
    write_notebook(folder, "00_a.ipynb", OPEN)
    fails_once = "state = run.state('x')\nif not state.exists(): state.write_text(''); raise RuntimeError('first time')"
    write_notebook(folder, "07_b.ipynb", OPEN, fails_once)
    return weights


def test_a_run_that_lacks_memory_or_a_part_starts_nothing(folder, published, monkeypatch, capsys):
    from resonate_lib import memory

    asked = ["run", "--profile", "paper", "-p", "folder", str(folder), "-p", "captions", "x.csv"]
    splits = ("train", "validation", "test")
    (folder / "x.csv").write_text("audio_path,caption,split\n" + "".join(f"{s}.wav,a dog,{s}\n" for s in splits))
    for split in splits:
        audio.write(folder / f"{split}.wav", torch.zeros(800), 8000)

    def refused(words):
        assert cli.main(asked) == 2
        err = capsys.readouterr().err
        assert words in err and err.splitlines()[-1].startswith("error: ")
        assert not list((folder.parent / "results").glob("0*"))

    with monkeypatch.context() as patch:
        patch.setattr(memory, "available", lambda device: 10_000)
        refused("does not fit on this")
    vocoder = published / "bigvgan_generator.pt"
    vocoder.rename(published / "away")
    refused("BigVGAN v2, 44.1 kHz")
    (published / "away").rename(vocoder)
    checkpoint = published / "Resonate_PT.pth"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:5000])
    refused("get it again")
    checkpoint.write_bytes(whole)
    assert cli.main(asked) == 1 and "memory, notebook 07" in capsys.readouterr().err
    version = versions.find("latest", folder.parent / "results")
    record = (version / "run.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available", lambda device: 10_000)
        assert cli.main(["run", "--resume", version.name]) == 2 and (version / "run.json").read_text() == record
    capsys.readouterr()
    assert cli.main(["run", "--resume", version.name]) == 0
    err = capsys.readouterr().err
    assert "memory, notebook 07" in err and "memory, notebook 00" not in err  # what is done needs none


def test_only_the_first_notebook_needs_no_recordings(folder, published):
    assert list(batch.make_plan(Request(profile="paper", only=("00",)), results=folder.parent).notebooks) == ["00"]
    for only in (None, ("07",)):
        with pytest.raises(ValueError, match="add -p folder DIR and -p captions FILE"):
            batch.make_plan(Request(profile="paper", only=only), results=folder.parent)


def test_doctor_looks_in_a_directory_for_published_weights(folder, published, capsys):
    (published / "music_speech_audioset_epoch_15_esc_89.98.pt").write_bytes(b"x")
    empty = folder.parent / "empty"
    empty.mkdir()
    (folder / "params" / "small.yaml").write_text(f"suite: {{weights: {empty}}}\nreward: {{clap_source: lukewys/laion_clap}}\n")
    said = {}
    for place in (published, empty):
        cli.main(["doctor", "--profile", "small", "--weights", str(place)])
        said[place] = capsys.readouterr().out
    assert "5 of 18 published parts are here" in said[published] and "0 of 18" in said[empty]
    assert f"-> {published}/" in said[published] and f"-> {empty}/flan-t5-large" in said[empty]
    assert cli.main(["doctor", "--weights", str(folder / "absent")]) == 2
    assert "there is no such directory" in capsys.readouterr().err


def test_a_damaged_notebook_is_one_line(folder, capsys):
    (folder / "04_a.ipynb").write_text('{"cells": [')
    assert cli.main(["run"]) == 2
    assert "04_a.ipynb: not a valid notebook" in capsys.readouterr().err


def test_a_results_folder_that_cannot_be_used(folder, capsys, monkeypatch):
    write_notebook(folder, "04_a.ipynb", "1")
    (folder.parent / "file").write_text("")
    monkeypatch.setenv("RESONATE_RESULTS", str(folder.parent / "file"))
    assert cli.main(["run"]) == 2
    err = capsys.readouterr().err
    assert "cannot write to" in err and "set RESONATE_RESULTS" in err and err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_read_only_results_folder(folder, capsys):
    write_notebook(folder, "04_a.ipynb", "1")
    (folder.parent / "results").mkdir(mode=0o500)
    assert cli.main(["run"]) == 2
    assert "no permission to write" in capsys.readouterr().err


def test_a_failing_cell(folder, capsys):
    write_notebook(folder, "04_a.ipynb", "raise RuntimeError('no such luck\\nat all')", "print('never')")
    write_notebook(folder, "05_b.ipynb", "1")
    assert cli.main(["run"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: 04_a: cell 3: RuntimeError: no such luck at all")
    run = record_of(folder)
    assert run["status"] == "FAILED" and run["notebooks"]["05_b"]["status"] == "PENDING"
    executed = versions.find("latest", folder.parent / "results") / "notebooks" / "04_a.ipynb"
    assert "no such luck" in executed.read_text()


FORKS = """
import os, time
kept = os.urandom(2**20) * 300
for _ in range(2):
    if os.fork() == 0:
        time.sleep(60)
print("there", flush=True)
time.sleep(60)
"""


def test_pages_that_a_forked_process_shares_are_counted_once():
    before = kernel.resident_mb()
    with subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == b"there\n"
            assert 300 < kernel.resident_mb() - before < 450
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_killed_kernel_reads_as_killed(folder):
    write_notebook(folder, "04_a.ipynb", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "print('never')")
    version, run = batch.start(Request())
    assert run["status"] == "FAILED" and "cell 3: the kernel died, killed by SIGKILL" in run["exit_reason"]
    cells = nbformat.read(version / "notebooks" / "04_a.ipynb", as_version=4).cells
    assert [cell.metadata.papermill.status for cell in cells] == ["completed", "completed", "failed", "pending"]


def test_a_kernel_that_exits_is_no_success(folder):
    write_notebook(folder, "04_a.ipynb", "import os; os._exit(0)", "print('never')")
    _, run = batch.start(Request())
    assert run["status"] == "FAILED" and "exit code 0" in run["exit_reason"]


def test_resume_runs_what_is_not_done(folder, capsys):
    count = "with open(run.path / 'count.txt', 'a') as file: file.write('{0} ')"
    write_notebook(folder, "03_a.ipynb", OPEN, count.format("03"))
    write_notebook(
        folder,
        "04_b.ipynb",
        OPEN,
        "state = run.state('x')\nprevious = state.read_text() if state.is_file() else ''",
        "state.write_text('saved')\nassert previous == 'saved', 'first time'",
        count.format("04"),
    )
    version, run = batch.start(Request(overrides={"steps": "3"}))
    assert run["status"] == "FAILED" and "first time" in run["exit_reason"] and (version / ".state").is_dir()
    spent = run["notebooks"]["04_b"]["seconds"] = run["notebooks"]["04_b"]["seconds"] + 1000
    record.write_json(version / "run.json", run)
    assert cli.main(["run", "--resume", version.name]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(version)
    run = record_of(folder)
    assert run["status"] == "DONE" and len(run["resumed"]) == 1
    assert spent < run["notebooks"]["04_b"]["seconds"] < spent + 100  # both of its parts
    assert (version / "count.txt").read_text() == "03 04 " and not (version / ".state").exists()


def test_two_that_resume_at_once_do_not_both_run(folder, monkeypatch):
    write_notebook(folder, "04_a.ipynb", "raise ValueError('no')")
    version, _ = batch.start(Request())
    real = batch._require_space

    def meanwhile(*arguments):
        run = json.loads((version / "run.json").read_text())
        record.write_json(version / "run.json", run | {"status": "RUNNING", "runner": record.this_process()})
        real(*arguments)

    monkeypatch.setattr(batch, "_require_space", meanwhile)
    with pytest.raises(ValueError, match="is running now"):
        batch.resume(version.name)


def test_resume_refuses_a_changed_configuration(folder, capsys):
    write_notebook(folder, "04_a.ipynb", "1 / 0")
    version, _ = batch.start(Request())
    (folder / "params" / "tiny.yaml").write_text("suite: {disk_mb: 1}\ngrpo: {steps: 6}\n")
    assert cli.main(["run", "--resume", version.name]) == 2
    assert "have changed since it started" in capsys.readouterr().err


def test_resume_refuses_changed_sources(folder, capsys):
    write_notebook(folder, "03_a.ipynb", "1")
    write_notebook(folder, "04_b.ipynb", "1 / 0")
    version, before = batch.start(Request())
    capsys.readouterr()
    write_notebook(folder, "04_b.ipynb", "1")
    assert cli.main(["run", "--resume", version.name]) == 2
    err = capsys.readouterr().err
    assert "04_b.ipynb changed since it started" in err and "start a new run" in err and err.count("\n") == 1
    assert json.loads((version / "run.json").read_text()) == before  # the record still names what ran


def test_the_benchmark_over_seeds_pools_their_rows(folder):
    """exact is 1 in half of the prompts for the system and in none for the base, in both seeds."""
    rows = """rows = [
        {"setting": "guidance 1", "system": system, "guidance": 1.0 + seed, "seed": seed, "sample": 0, "noise_seed": i,
         "id": f"p{i}", "part": "accuracy", "kind": "single", "event_count": 1, "event_relation": "None",
         "exact": float(system != "base" and i % 2), "tp": 1, "fp": 0, "fn": 1, "tp_real": 1, "fp_real": 0, "fn_real": 0,
         "order": 1.0, "reward": 0.5, "aqa": 0.5, "clap": 0.5}
        for system in ("base", "best of 2", "DPO") for i in range(20)]
    run.write_metrics("tta_rows", rows)
    run.write_metrics("tta_parts_rows", [{**row, "part": "generalization"} for row in rows])
    run.write_metrics("tta_by_count_and_relation", [{"event_relation": "None", "exact": 1.0}])
    run.write_metrics("tta_headline", [{"system": "DPO", "exact": 0.5, "exact_low": 0.1, "exact_high": 0.9}])"""
    write_notebook(folder, "06_a.ipynb", OPEN, "\n".join(line.removeprefix("    ") for line in rows.splitlines()))
    version, run = batch.start(Request(seeds=(0, 1), overrides={}))
    assert run["status"] == "DONE", run["exit_reason"]
    names = ["by_count_and_relation", "by_kind", "headline", "words", "real_procedural", "parts", "parts_gains", "accuracy"]
    names += ["generalization"]
    assert {path.stem.removeprefix("tta_") for path in (version / "metrics").glob("*.csv")} == set(names)
    groups = versions.read_table(version / "metrics" / "tta_by_count_and_relation.csv")
    assert set(groups["event_relation"]) == {"None"} and (groups["seeds"] == 2).all() and groups["low"].notna().all()
    line = versions.pd.read_csv(version / "metrics" / "tta_headline.csv").set_index("system").loc["DPO"]
    assert line["seeds"] == 2 and line["clips"] == 40 and line["exact_gain"] == 0.5 and line["event_f1_gain"] == 0
    assert 0.2 < line["exact_gain_low"] < 0.45 and 0.55 < line["exact_gain_high"] < 0.8
    words = json.loads((version / "metrics" / "tta_words.json").read_text())["words"]
    assert "20 prompts, 2 seeds" in words and "Of the alternatives, best of 2 beats base" in words
    assert (version / "figures" / "tta_gains.png").stat().st_size > 1000 and "figures/tta_gains.png" in run["artefacts"]
    apart = [batch.start(Request(seeds=(seed,)))[0].name for seed in (1, 0)]
    assert cli.main(["results", "pool", *apart]) == 0
    pooled = versions.find("latest")
    mine, theirs = (sorted(path for path in top.rglob("metrics/*") if path.is_file()) for top in (pooled, version))
    assert [path.relative_to(pooled) for path in mine] == [path.relative_to(version) for path in theirs] and len(mine) > 20
    assert [path.read_bytes() for path in mine] == [path.read_bytes() for path in theirs]
    run = versions.read(pooled)
    assert list(run["notebooks"]) == ["seed0/06_a", "seed1/06_a"] and run["seeds"] == [0, 1] and run["sources_differ"] == []
    assert [part["version"] for part in run["pooled"]] == apart and all(part["git"] for part in run["pooled"])
    assert set(versions.verify(pooled).query("kind == 'artefact'")["state"]) == {"ok"}
    assert not [*pooled.glob("seed*/run.json"), *pooled.glob("seed*/params.yaml")]
    content = json.loads((version.parent / apart[0] / "run.json").read_text())
    content["notebooks"]["06_a"]["notes"]["inputs"] = {"judge": {"source": "shipped", "sha256": "1"}, "base": {"sha256": "2"}}
    (version.parent / apart[0] / "run.json").write_text(json.dumps(content))
    assert cli.main(["results", "pool", *apart]) == 0  # the other says nothing of a judge; bases may differ
    content["notebooks"]["06_a"]["notes"]["inputs"]["judge"]["sha256"] = "3"
    content["seeds"] = [0]
    (version.parent / apart[1] / "run.json").write_text(json.dumps(content))
    assert cli.main(["results", "pool", *apart]) == 2


def test_where_files_lie_does_not_keep_seeds_apart():
    settings = {"suite": {"weights": "/one/disk/weights", "steps": 3, "scales": [1.0, "/a/b"]}}
    elsewhere = {"suite": {"weights": "/another/weights", "steps": 3, "scales": [1.0, "/c/b"]}}
    assert seeds._anywhere(settings) == seeds._anywhere(elsewhere)
    for other in ({"weights": "/one/disk/others"}, {"steps": 4}, {"weights": "weights/tiny"}):
        assert seeds._anywhere(settings) != seeds._anywhere({"suite": settings["suite"] | other})


def test_only_finished_runs_of_the_same_settings_and_other_seeds_are_pooled(folder, capsys):
    write_notebook(folder, "04_a.ipynb", OPEN, "run.write_metrics('m', {'x': seed, 'steps': steps})\nassert seed != 3")
    wanted = [Request(), Request(seeds=(1,), overrides={"steps": 7}), Request(), Request(seeds=(3,))]
    for request in wanted:
        batch.start(request)
    for names, words in (
        (["1"], "two versions or more"),
        (["1", "2"], "differ in overrides: only runs of the same settings"),
        (["1", "3"], "seed 0 is in more than one"),
        (["1", "4"], "is FAILED: finish it first (run --resume 0004-tiny-"),
        (["1", "9"], "version"),
    ):
        assert cli.main(["results", "pool", *names]) == 2
        assert words in capsys.readouterr().err
    assert len(versions.table()) == 4


RECORDINGS = "folder: str = None\ncaptions: str = None\n"


@pytest.fixture
def recordings(tmp_path):
    """A folder with a good recording and three bad ones."""
    place = tmp_path / "recordings"
    audio.write(place / "good.wav", torch.zeros(1600), 16000)
    (place / "empty.wav").write_bytes(b"")
    (place / "corrupt.flac").write_bytes(bytes(range(256)) * 9)
    (place / "cut.wav").write_bytes((place / "good.wav").read_bytes()[:2000])
    return place


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file,text\ngood.wav,a hiss", "found columns file, text; it needs `caption`"),
        ("audio_path,caption\nempty.wav,a hiss", "empty.wav: the audio file is empty"),
        ("audio_path,caption\ncorrupt.flac,a hiss", "corrupt.flac: not a readable audio file"),
        ("audio_path,caption\ncut.wav,a hiss", "cut off before its stated end"),
        ("audio_path,caption\ngone.wav,a hiss", "no recording at"),
        ("audio_path,caption\n", "holds no entries"),
        ("audio_path,caption\ngood.wav,a dog, then rain", "entry 1 has more cells than there are columns"),
        (None, "needs its caption file too"),
    ],
)
def test_bad_recordings_start_nothing(folder, recordings, capsys, content, words):
    write_notebook(folder, "01_a.ipynb", "1", parameters=PARAMETERS + RECORDINGS)
    (recordings / "captions.csv").write_text(content or "")
    given = [] if content is None else ["-p", "captions", "captions.csv"]
    assert cli.main(["run", "-p", "folder", str(recordings), *given]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (folder.parent / "results").exists()


def test_a_caption_file_may_lie_anywhere(folder, recordings, monkeypatch):
    write_notebook(folder, "01_a.ipynb", "1", parameters=PARAMETERS + RECORDINGS)
    monkeypatch.chdir(folder)
    for place in (recordings, folder):
        (place / f"{place.name}.csv").write_text("audio_path,caption\ngood.wav,a hiss\n")
        given = {"folder": "../recordings", "captions": f"{place.name}.csv"}
        plan = batch.make_plan(Request(overrides=given), results=folder.parent)
        found = {"folder": str(recordings), "captions": str(place / f"{place.name}.csv")}
        assert plan.parameters == {"01": found, "data": found}


def test_notebook_05_needs_both_rewards(folder, recordings):
    for number in ("03", "05"):
        write_notebook(folder, f"{number}_a.ipynb", "1")
    splits = ("train", "validation", "test")
    for split in splits:
        (recordings / f"{split}.wav").write_bytes((recordings / "good.wav").read_bytes())
    (recordings / "captions.csv").write_text("audio_path,caption,split\n" + "".join(f"{s}.wav,{s},{s}\n" for s in splits))
    (folder / "params" / "mine.yaml").write_text("suite: {world: folder}\nreward: {lalm_source: ''}\n")
    with pytest.raises(ValueError, match=r"lalm_source is empty.*--only 03"):
        given = {"data.folder": str(recordings), "data.captions": "captions.csv"}
        batch.make_plan(Request(profile="mine", overrides=given), results=folder.parent)


def test_data_that_a_later_notebook_cannot_use_is_refused_before_the_start(folder, recordings):
    (recordings / "captions.csv").write_text("audio_path,caption\ngood.wav,a hiss\n")
    write_notebook(folder, "01_a.ipynb", OPEN)
    write_notebook(folder, "04_a.ipynb", OPEN)
    mine = {"folder": str(recordings), "captions": "captions.csv"}
    for given, said in ((mine, "--only 01"), ({"world_seed": "1"}, "--from-scratch")):
        with pytest.raises(ValueError, match=said):
            batch.start(Request(overrides=given))
        assert batch.start(Request(overrides=given, only=("01",)))[1]["status"] == "DONE"
    assert batch.start(Request(overrides={"world_seed": "1"}, from_scratch=True))[1]["status"] == "DONE"


def test_listen_prints_the_preference_rate(folder, capsys):
    write_notebook(folder, "07_a.ipynb", OPEN, "for name in ('', '_ppo'): (run.path / f'listen{name}.html').write_text('page')")
    version, _ = batch.start(Request(seeds=(0, 1)))
    assert cli.main(["listen", "1"]) == 0
    assert capsys.readouterr().out == f"{version}/seed0/listen.html\n{version}/seed0/listen_ppo.html\n"
    for seed, preferred in ((0, "DPO"), (1, "base")):
        (version / f"seed{seed}" / "answers").mkdir()
        answer = {"trial": 0, "a": "base", "b": "DPO", "preferred": preferred, "listener": "x"}
        (version / f"seed{seed}" / "answers" / "x.jsonl").write_text(json.dumps(answer) + "\n")
    assert cli.main(["listen", "1"]) == 0
    heads, values = (line.split() for line in capsys.readouterr().out.splitlines()[2:])
    assert heads == ["question", "system", "wins", "losses", "ties", "listeners", "rate", "low", "high"]
    assert values[:7] == ["preference", "DPO", "1", "1", "0", "1", "0.5"]


def test_the_kernel_sees_from_and_from_scratch(folder):
    write_notebook(
        folder, "04_a.ipynb", OPEN, "run.record('from', [run.from_version and run.from_version.name, run.from_scratch])"
    )
    first, run = batch.start(Request(from_scratch=True))
    assert run["notebooks"]["04_a"]["notes"]["from"] == [None, True]
    _, run = batch.start(Request(from_version="1"))
    assert run["notebooks"]["04_a"]["notes"]["from"] == [first.name, False]


def test_from_scratch_the_first_listen_comes_last(folder):
    for name in ("00_a.ipynb", "01_b.ipynb", "02_c.ipynb"):
        write_notebook(folder, name, "1")
    plan = batch.make_plan(Request(from_scratch=True, seeds=(0, 1)), results=folder.parent)
    assert [job[0] for job in plan.jobs()][:4] == ["seed0/01_b", "seed0/02_c", "seed0/00_a", "seed1/01_b"]
    plan = batch.make_plan(Request(), results=folder.parent)
    assert [job[0] for job in plan.jobs()] == ["00_a", "01_b", "02_c"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_with_a_record(folder, number):
    write_notebook(folder, "04_a.ipynb", "import time; print('here', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-m", "resonate_lib", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": str(batch.CHECKOUT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not _printed(folder):
        time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("interrupted: 04_a") and "--resume 0001-tiny" in err
    run = record_of(folder)
    assert run["status"] == "INTERRUPTED" and run["ended"] and out.strip().endswith(run["version"])
    assert not list(Path(out.strip()).rglob("*.part"))


def _printed(folder: Path) -> bool:
    found = list((folder.parent / "results").glob("*/notebooks/04_a.ipynb"))
    return bool(found) and '"status": "running"' in found[0].read_text()


def test_plain_papermill_works_too(folder, tmp_path):
    import papermill

    from resonate_lib.kernel import manager_for

    write_notebook(folder, "04_a.ipynb", OPEN, "run.write_metrics('m', {'steps': steps})")
    papermill.execute_notebook(
        folder / "04_a.ipynb",
        tmp_path / "out.ipynb",
        parameters={"steps": 2},
        progress_bar=False,
        kernel_manager_class=manager_for({"PYTHONPATH": str(batch.CHECKOUT)}, {}),
    )
    assert (tmp_path / "results" / "scratch-tiny-seed0" / "metrics" / "m.csv").read_text() == "name,value\nsteps,2\n"


def test_estimates_come_from_earlier_runs(folder):
    write_notebook(folder, "04_a.ipynb", "1")
    version, run = batch.start(Request())
    plan = batch.make_plan(Request(), results=version.parent)
    assert batch._expected(plan, version.parent / "0002-tiny-00000000", 0)["04"] == run["notebooks"]["04_a"]["seconds"]


def test_later_seeds_are_expected_to_take_what_earlier_ones_took(folder, monkeypatch):
    told, begin = [], batch.kernel.Watch.begin
    write_notebook(folder, "04_a.ipynb", "1")
    monkeypatch.setattr(batch.kernel.Watch, "begin", lambda *a: (told.append(a[3]), begin(*a))[1])
    _, run = batch.start(Request(seeds=(0, 1)))
    assert told == [60, run["notebooks"]["seed0/04_a"]["seconds"]]


def test_a_disk_that_fills_up_is_recorded(folder, monkeypatch):
    """The kernel's own writes fail in a cell; the runner's fail in Papermill's saving."""
    write_notebook(folder, "04_a.ipynb", "import errno; raise OSError(errno.ENOSPC, 'No space left on device')")
    _, run = batch.start(Request())
    assert run["status"] == "FAILED" and "No space left on device" in run["exit_reason"]

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("papermill.execute_notebook", full)
    version, run = batch.start(Request())
    assert "the disk is full; free some space" in versions.read(version)["exit_reason"]
    assert not (version / ".reserve").exists()


def test_the_estimate_is_at_least_what_the_running_training_says(capsys):
    watch = kernel.Watch()
    watch.begin("03_offline_dpo", 31, expected=60.0, after=120.0)
    numbers = "loss 0.5468  grad_norm 0.4366  part_lalm 0.8191  part_clap 0.7597  reward 0.5"
    watch.write(f"base trained on: step 15/1500  {numbers}  29:10 left\n")
    watch.say()
    line = capsys.readouterr().err.splitlines()[-1]
    assert "about 31:" in line and line.endswith("29:10 left") and "step 15/1500" in line
    assert len(line.rpartition(" | ")[2]) <= kernel.WIDTH
    watch.write("saved\n")
    watch.say()
    line = capsys.readouterr().err.splitlines()[-1]
    assert "about 2:" in line and line.endswith("| saved")
