"""Run versions: numbering, records, inputs, and metrics that repeat byte for byte."""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import time

import miniature_clap
import numpy as np
import pandas as pd
import pytest
import torch

from resonate_lib import doctor, record, runs, training, versions
from resonate_lib.config import GRPOConfig, resolve
from resonate_lib.evaluation import suite


def _allocate(folder):
    return versions.allocate("tiny", {"process": os.getpid()}, folder).name


def make_version(results, profile="tiny", status="DONE", **more):
    folder = versions.allocate(profile, more, results)
    content = {
        "status": status,
        "profile": profile,
        "seeds": [0],
        "started": "2026-01-01T00:00:00+0000",
        "seconds": 60.0,
        "from_scratch": False,
        "notebooks": {},
        "config": {},
        "artefacts": {},
        "inputs": {},
        **more,
    }
    record.write_json(folder / "run.json", content)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    for name in ("RESONATE_RUN", "RESONATE_BATCH", "RESONATE_FROM", "RESONATE_FROM_SCRATCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RESONATE_RESULTS", str(tmp_path))
    return runs.open_run(profile="tiny", seed=0)


def test_runs_started_together_get_different_numbers(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        names = pool.map(_allocate, [tmp_path] * 12, chunksize=1)
    assert sorted(name.split("-")[0] for name in names) == [f"{number:04d}" for number in range(1, 13)]
    assert not list(tmp_path.glob(".claim*"))


def test_the_name_holds_the_hash_of_the_configuration(tmp_path):
    names = [versions.allocate("tiny", {"steps": steps}, tmp_path).name for steps in (1, 1, 2)]
    hashes = [name.rsplit("-", 1)[1] for name in names]
    assert hashes[0] == hashes[1] != hashes[2] and len(hashes[0]) == 8


def test_find(tmp_path):
    first, second = make_version(tmp_path), make_version(tmp_path)
    assert versions.find(first.name, tmp_path) == first
    assert (
        versions.find("2", tmp_path) == versions.find("0002", tmp_path) == versions.find("latest", tmp_path) == second
    )
    assert versions.find(str(first)) == first
    with pytest.raises(ValueError, match=f"unknown version.*{first.name[:5]}"):
        versions.find(first.name + "x", tmp_path)
    with pytest.raises(ValueError, match="no versions"):
        versions.find("1", tmp_path / "none")
    other = second.with_name("0002-tiny-00000000")  # of another machine, put beside
    shutil.copytree(second, other)
    with pytest.raises(ValueError, match=r"version 2 is any of 0002-tiny-.*: give the whole name"):
        versions.find("2", tmp_path)
    assert versions.find(other.name, tmp_path) == other


def test_a_running_version_whose_runner_is_gone_reads_interrupted(tmp_path):
    gone = {"pid": 2**22 + 1, "created": 0.0, "host": record.this_process()["host"]}
    assert versions.read(make_version(tmp_path, status="RUNNING", runner=gone))["status"] == "INTERRUPTED"
    alive = make_version(tmp_path, status="RUNNING", runner=record.this_process())
    assert versions.read(alive)["status"] == "RUNNING"
    assert list(versions.table(tmp_path)["status"]) == ["INTERRUPTED", "RUNNING"]


def test_atomic_write_leaves_nothing_when_the_disk_is_full(tmp_path, monkeypatch):
    record.atomic_write(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        record.atomic_write(tmp_path / "a.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_an_unusable_results_folder_is_one_line(tmp_path, monkeypatch, code):
    monkeypatch.setattr(record, "atomic_write", lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(ValueError, match="RESONATE_RESULTS") as caught:
        versions.require_space(tmp_path, 1)
    assert "\n" not in str(caught.value)


def test_too_little_space_is_said_before(tmp_path):
    with pytest.raises(ValueError, match="MB free and this profile needs"):
        versions.require_space(tmp_path, 10**9)


def test_metrics_are_the_same_bytes(run):
    rows = [
        {"model": "base", "f1": np.float32(0.1) * 3, "n": np.int64(4), "ok": np.bool_(True), "x": torch.tensor(2.0)},
        {"model": "a, b", "f1": float("nan"), "n": 5, "ok": False, "x": -0.0},
    ]
    returned = run.write_metrics("table", rows)
    first = [(run.metrics / f"table.{kind}").read_bytes() for kind in ("csv", "json")]
    run.write_metrics("table", pd.DataFrame(rows))
    assert first[0] == b'model,f1,n,ok,x\nbase,0.3,4,true,2\n"a, b",,5,false,0\n'
    assert json.loads(first[1])[1] == {"model": "a, b", "f1": None, "n": 5, "ok": False, "x": 0.0}
    assert (run.metrics / "table.csv").read_text().splitlines()[0] == "model,f1,n,ok,x"
    assert list(returned["model"]) == ["base", "a, b"]


def test_metrics_of_a_dict_and_uneven_rows(run):
    run.write_metrics("facts", {"f1": 1 / 3, "by": {"dog": 2}, "list": [1, 2]})
    assert (run.metrics / "facts.csv").read_text() == 'name,value\nf1,0.333333\nby.dog,2\nlist,"[1, 2]"\n'
    run.write_metrics("rows", [{"a": 1}, {"b": "x"}])
    assert (run.metrics / "rows.csv").read_text() == "a,b\n1,\n,x\n"


@pytest.mark.parametrize(
    ("name", "table", "words"),
    [
        ("clock", [{"step": 1, "seconds": 2.0}], "holds a time"),
        ("empty", [], "is empty"),
        ("a/b", [{"a": 1}], "use letters"),
        ("object", [{"a": object()}], "use numbers"),
    ],
)
def test_metrics_refused(run, name, table, words):
    with pytest.raises(ValueError, match=words):
        run.write_metrics(name, table)


def test_scratch_folder_of_a_notebook_opened_alone(run, tmp_path):
    assert run.scratch and run.path == tmp_path / "scratch-tiny-seed0"
    assert run.state("grpo") is None
    assert runs.open_run(tmp_path / "elsewhere").path == tmp_path / "elsewhere"


def test_a_done_version_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match="is DONE and is never edited"):
        runs.open_run(make_version(tmp_path))


def test_inputs_come_from_this_run_then_from_then_shipped(run, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "shipped_weights", lambda profile: tmp_path / "shipped")
    places = [tmp_path / "shipped" / "base"]
    earlier = make_version(tmp_path)
    places += [earlier / "checkpoints" / "base", earlier / "seed0" / "checkpoints" / "base", run.checkpoint("base")]
    with pytest.raises(ValueError, match=r"no 'base' in this run, shipped: run notebook 02 first"):
        run.resolve_input("base")
    monkeypatch.setenv("RESONATE_FROM", str(earlier))
    opened = runs.open_run(profile="tiny", seed=0)
    for place, source in zip(places, ["shipped", earlier.name, earlier.name, "this run"], strict=True):
        place.mkdir(parents=True)
        (place / "weights").write_text(str(place))
        assert opened.resolve_input("base") == place
        notes = json.loads((run.path / "notes" / f"{run.notebook}.json").read_text())
        assert notes["inputs"]["base"] == {"source": source, "sha256": record.sha256_tree(place)}
    assert opened.resolve_input("dpo", optional=True) is None


def test_a_fingerprint_tells_weights_and_leaves_out_what_is_missing(run):
    folder = run.checkpoint("dpo")
    folder.mkdir(parents=True)
    (folder / "weights").write_text("one")
    first = run.fingerprint("dpo", "no_such_model")
    assert first == run.fingerprint("dpo") and len(first) == 8
    (folder / "weights").write_text("two")
    assert run.fingerprint("dpo") != first


def test_a_system_that_learned_from_another_reward_than_its_name_says_is_told(run, capsys):
    base = run.generator("base")
    base.save(run.checkpoint("grpo_clap"), reward="0.5*clap+0.5*lalm")
    base.save(run.checkpoint("grpo_lalm"), reward="lalm")
    base.save(run.checkpoint("nft"), reward="lalm+2*clap")
    systems, missing = suite.load_systems(run)
    assert list(systems) == ["base", "GRPO (CLAP)", "GRPO (LALM)", "NFT"]
    assert missing == ["base trained on", "DPO", "GRPO (LALM, fine)", "GRPO (NFT's reward)", "DiffRO"]
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: GRPO")]
    assert notes == ["note: GRPO (CLAP) learned from the reward 0.5*clap+0.5*lalm, not from clap"]


def test_from_scratch_uses_nothing_shipped(run, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "shipped_weights", lambda profile: tmp_path / "shipped")
    (tmp_path / "shipped" / "base").mkdir(parents=True)
    monkeypatch.setenv("RESONATE_FROM_SCRATCH", "1")
    with pytest.raises(ValueError, match="no 'base' in this run:"):
        runs.open_run(profile="tiny").resolve_input("base")


def test_a_shipped_base_of_another_seed_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "shipped_weights", lambda profile: tmp_path / "shipped")
    monkeypatch.setenv("RESONATE_RESULTS", str(tmp_path))
    record.write_json(tmp_path / "shipped" / "base" / "generator.json", {"seed": 0})
    for seed, notebook, said in ((0, "03_a", False), (1, "03_a", True), (1, "02_a", False)):
        monkeypatch.setenv("RESONATE_NOTEBOOK", notebook)
        opened = runs.open_run(seed=seed)
        opened.resolve_input("base")
        notes = json.loads((opened.path / "notes" / f"{notebook}.json").read_text())
        assert ("note: the shipped base model is that of seed 0; run notebook 02" in capsys.readouterr().out) == said
        assert notes.get("base_seed") == (0 if said else None)


def test_doctor_knows_every_shipped_model():
    assert {path.name for path in (runs.CHECKOUT / "resonate_lib" / "weights" / "tiny").iterdir()} == set(doctor.WEIGHTS)


def test_show_prints_and_notes_the_resolved_values(run, capsys):
    shown = run.show(resolve(GRPOConfig, "tiny", steps=3))
    assert shown.steps == 3
    printed = capsys.readouterr().out
    assert "steps             = 3" in printed and "clips per step" in printed
    notes = json.loads((run.path / "notes" / f"{run.notebook}.json").read_text())
    assert notes["config"]["grpo"]["steps"] == 3


def test_summary_over_seeds(tmp_path):
    for seed, value in ((0, 1.0), (1, 3.0)):
        folder = tmp_path / f"seed{seed}" / "metrics"
        runs.write_table(folder, "headline", [{"model": "base", "f1": value}, {"model": "grpo", "f1": value + 1}])
        runs.write_table(folder, "curve", [{"step": step} for step in range(seed + 1)])
        runs.write_table(folder, "history", [{"step": step, "loss": step + value / 7} for step in range(2)])
    assert versions.summarise(tmp_path) == ["curve", "headline", "history"]
    curve = pd.read_csv(tmp_path / "metrics" / "history.csv")
    assert "loss_std" in curve and "loss_low" not in curve
    table = pd.read_csv(tmp_path / "metrics" / "headline.csv")
    assert list(table.columns) == ["model", "f1", "f1_low", "f1_high", "f1_std", "seeds"]
    assert list(table["f1"]) == [2.0, 3.0] and table["f1_std"][0] == pytest.approx(np.std([1, 3], ddof=1), rel=1e-5)
    assert list(pd.read_csv(tmp_path / "metrics" / "curve.csv")["seed"]) == [0, 1, 1]


def test_what_only_some_seeds_have_has_no_mean(tmp_path):
    for seed, clips in ((0, 300.0), (1, None), (2, 500.0)):
        rows = [{"method": "PPO", "clips": clips, "reached": float(clips is not None)},
                {"method": "NFT", "clips": 100.0, "reached": 1.0}]  # fmt: skip
        runs.write_table(tmp_path / f"seed{seed}" / "metrics", "reach", rows)
    versions.summarise(tmp_path)
    table = pd.read_csv(tmp_path / "metrics" / "reach.csv")
    assert np.isnan(table["clips"][0]) and table["clips"][1] == 100 and list(table["reached"].round(3)) == [0.667, 1.0]


def test_summary_over_seeds_averages_neither_ends_nor_identifiers_nor_clips(tmp_path):
    for seed, value in ((0, 1.0), (1, 3.0)):
        folder = tmp_path / f"seed{seed}" / "metrics"
        shared = {"system": "base", "f1": value, "f1_low": value - 1, "f1_high": value + 1, "low": 0.0, "seeds": 1, "seed": seed}
        runs.write_table(folder, "same", [{"guidance": 2.0, **shared}])
        runs.write_table(folder, "own", [{"guidance": 2.0 + seed, **shared}])
        runs.write_table(folder, "uneven", [{"seed": seed, "x": value}] * (seed + 1))
        runs.write_table(folder, "tta_rows", [{"id": "p0", "noise_seed": seed, "exact": value}])
    assert versions.summarise(tmp_path) == ["own", "same", "uneven"]
    tables = {name: pd.read_csv(tmp_path / "metrics" / f"{name}.csv") for name in ("own", "same", "uneven")}
    assert list(tables["own"].columns) == ["system", "f1", "f1_low", "f1_high", "f1_std", "seeds"]
    # the mean of 1 and 3 with Student's interval over two seeds: 2 plus and minus 12.7062 · sqrt(2) / sqrt(2)
    assert tables["own"].loc[0, "f1":"seeds"].tolist() == pytest.approx([2, -10.7062, 14.7062, 2**0.5, 2], rel=1e-5)
    assert list(tables["same"].columns) == ["guidance", *tables["own"].columns] and tables["same"]["guidance"][0] == 2
    assert list(tables["uneven"].columns) == ["seed", "x"] and list(tables["uneven"]["seed"]) == [0, 1, 1]


@pytest.mark.parametrize("mean", ["mean", "distance"])
def test_summary_over_seeds_gives_the_ends_to_the_column_before_them(tmp_path, mean):
    for seed, value in ((0, 1.0), (1, 3.0)):
        row = {"system": "base", mean: value, "low": value - 1, "high": value + 1, "floor": value, "n": 5}
        runs.write_table(tmp_path / f"seed{seed}" / "metrics", "table", [row])
    versions.summarise(tmp_path)
    table = pd.read_csv(tmp_path / "metrics" / "table.csv")
    after = ["floor", "floor_low", "floor_high", "floor_std", "n", "n_low", "n_high", "n_std", "seeds"]
    assert list(table.columns) == ["system", mean, "low", "high", f"{mean}_std", *after]
    assert table.loc[0, mean:"high"].tolist() == pytest.approx([2, -10.7062, 14.7062], rel=1e-5)


def test_compare(tmp_path):
    first = make_version(tmp_path, config={"grpo": {"steps": 1, "beta": 0.0}})
    second = make_version(tmp_path, config={"grpo": {"steps": 2, "beta": 0.0}})
    for folder, value in ((first, 0.5), (second, 0.75)):
        runs.write_table(folder / "metrics", "headline", [{"model": "base", "f1": value}])
    tables = versions.compare("1", "2", tmp_path)
    assert tables["config"].to_dict("records") == [{"name": "grpo.steps", "a": 1, "b": 2}]
    assert tables["headline"]["f1_change"][0] == 0.25


def test_verify_finds_every_kind_of_difference(tmp_path):
    folder = make_version(tmp_path)
    for name in ("same", "changed", "missing", "checkpoints/base/network"):
        record.atomic_write(folder / name, name)
    content = json.loads((folder / "run.json").read_text())
    content["artefacts"] = record.tree(folder, versions.UNHASHED)
    record.write_json(folder / "run.json", content)
    (folder / "changed").write_text("other")
    (folder / "missing").unlink()
    (folder / "new").write_text("new")
    for path in [folder / "checkpoints/base/network", folder / "checkpoints/base", folder / "checkpoints"]:
        path.unlink() if path.is_file() else path.rmdir()
    (folder / "answers").mkdir()
    (folder / "answers" / "0.json").write_text("{}")
    found = dict(versions.verify(folder)[["path", "state"]].itertuples(index=False))
    assert found == {
        "same": "ok",
        "changed": "changed",
        "missing": "missing",
        "new": "new",
        "checkpoints/base/network": "not in git",
    }


@pytest.fixture
def profile(run, tmp_path, monkeypatch):
    """profile(reward={...}, ...) writes the sections of the run's profile."""

    def write(**sections):
        (tmp_path / "tiny.yaml").write_text(json.dumps(sections))
        run.loaded.clear()

    monkeypatch.setenv("RESONATE_PARAMS", str(tmp_path))
    return write


def test_a_reward_without_a_source_is_refused(run, profile):
    profile(reward={"lalm_source": "", "clap_source": ""})
    assert run.scorer("lalm") is None
    for name, words in (("lalm", "directory, hub id or server"), ("clap", "file, directory or hub id")):
        for spec in (name, f"0.5*{name}+1*file.py:score"):
            with pytest.raises(ValueError) as caught:
                run.reward(spec)
            assert str(caught.value) == (f"reward {name!r}: {name}_source is empty; name a {words} (-p {name}_source ...), "
                                         "or use another reward")


def test_a_model_from_the_hub_is_noted_once_it_is_here(run, profile, tmp_path, monkeypatch):
    """On first use its files come with loading; a judge that no list holds has its checksums too."""
    import huggingface_hub.constants

    from resonate_lib.rewards import omni

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    profile(reward={"lalm_source": "me/judge", "lalm_eval_source": "http://host:8000/v1#judge"})
    kept = tmp_path / "hub" / "models--me--judge"

    def load(source, **_):
        (kept / "refs").mkdir(parents=True, exist_ok=True)
        (kept / "refs" / "main").write_text("a" * 40)
        (kept / "snapshots" / ("a" * 40)).mkdir(parents=True, exist_ok=True)
        (kept / "snapshots" / ("a" * 40) / "model.safetensors").write_text("weights")
        return source

    monkeypatch.setattr(omni, "open_judge", load)
    assert run.scorer("lalm") == "me/judge" and run.scorer("lalm_eval").startswith("http")
    notes = json.loads((run.path / "notes" / f"{run.notebook}.json").read_text())["inputs"]
    sha = hashlib.sha256(b"weights").hexdigest()
    assert notes["lalm"] == {"source": f"me/judge@{'a' * 40}", "sha256": {"model.safetensors": sha}}
    assert notes["lalm_eval"]["sha256"] == {}


@pytest.mark.parametrize("slip", [False, True])
def test_the_published_rate_is_the_rewards_alone(run, profile, tmp_path, slip):
    checkpoint, roberta, _ = miniature_clap.make_miniature(tmp_path / "clap")
    profile(reward={"clap_source": str(checkpoint), "clap_eval_source": str(checkpoint), "roberta_source": str(roberta),
                    "clap_published_rate": slip})
    assert run.scorer("clap").published_rate is slip and not run.scorer("clap_eval").published_rate
    notes = json.loads((run.path / "notes" / f"{run.notebook}.json").read_text())["inputs"]
    assert set(notes["clap"]["sha256"]) == set(notes["clap_eval"]["sha256"]) == {"clap.pt"}
    assert set(notes["roberta"]["sha256"]) == {"config.json", "vocab.json", "merges.txt"}


def test_sources_cover_the_library_and_name_no_folder_of_the_machine():
    found = record.sources(runs.CHECKOUT, [runs.CHECKOUT / "notebooks" / "params" / "tiny.yaml"])
    assert "resonate_lib/config.py" in found and "notebooks/params/tiny.yaml" in found
    assert not any(path.startswith("/") for path in found)


def test_seconds_of_a_training_count_from_before_an_interruption(tmp_path):
    run = runs.Run(path=tmp_path, profile="tiny", seed=0, notebook="04")

    def train(steps):
        training.fit(lambda i, _: time.sleep(0.2) or {"loss": 0.0}, steps=steps, modules={}, label="x", checkpoint=run.state("nft"))

    def noted():
        return json.loads((tmp_path / "notes" / "04.json").read_text())["wall_s"]["nft"]

    with pytest.raises(KeyboardInterrupt), run.timed("nft"):
        train(2)
        raise KeyboardInterrupt
    assert not (tmp_path / "notes").exists()
    with run.timed("nft"):
        train(3)
    assert noted() >= 0.6
    with run.timed("nft"):
        train(3)
    assert noted() >= 0.6  # all steps were done before
