"""The whole suite with the profiles `paper` and `small`, on miniature weights in the real file formats: only sizes differ.

Recordings, TTA-Bench's files, FluxAudio, VAE, BigVGAN, FLAN-T5, LAION-CLAP with RoBERTa, AudioBox-Aesthetics and two audio
language models.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import miniature
import miniature_clap
import miniature_lalm
import pytest
import test_aesthetics
import torch

from resonate_lib import audio, versions
from resonate_lib.config import DataConfig, PretrainConfig, RewardConfig, SuiteConfig
from resonate_lib.evaluation import instruments
from resonate_lib.models.generator import Generator
from resonate_lib.runs import CHECKOUT

TEXTS = ("a dog barks", "rain falls on a roof", "a door shuts and a man laughs", "birds sing", "a bell rings twice", "wind blows",
         "a car passes by", "water drips", "people talk", "an engine starts", "a cat meows", "thunder rolls", "a clock ticks",
         "music plays", "a baby cries", "leaves rustle")  # fmt: skip
SPLITS = ("train",) * 8 + ("validation",) * 2 + ("test",) * 12
# What makes it small: counts, never classes. Everything not named here is paper.yaml's.
SMALL = {
    "seconds": "1.0", "01.train_clips": 8, "01.validation_clips": 4, "01.test_clips": 4,
    "preview_prompts": 1, "num_steps": 2, "03.pairs": 4, "03.steps": 2, "03.batch_size": 2,
    "pretrain_continued_steps": 2, "02.demo_steps": 2, "02.batch_size": 2,
    "eval_clips": 12, "base_prompts": 4, "prompts_per_step": 2, "group_size": 3, "04.steps": 2, "05.steps": 2, "nft_steps": 2,
    "diffro_steps": 2, "diffro_prompts_per_step": 2,
    "nft_prompts_per_step": 2, "nft_group_size": 2, "06.prompts": 4, "07.prompts": 2, "validation_prompts": 2, "part_prompts": 2,
    "best_of": 2, "bootstrap": 100, "trials": 2, "guidance_scales": "1,4.5",
}  # fmt: skip


def recordings(folder: Path) -> Path:
    """22 recordings with a caption file in AudioCaps' columns, at two sample rates."""
    folder.mkdir()
    rows = []
    for number, split in enumerate(SPLITS):
        rate = (44100, 32000)[number % 2]
        wave = 0.1 * torch.randn(2 * rate, generator=torch.Generator().manual_seed(number)).cumsum(0).clamp(-5, 5) / 5
        audio.write(folder / f"Y{number:02d}.wav", wave, rate)
        text = TEXTS[number % len(TEXTS)] + (" again" if number >= len(TEXTS) else "")
        rows.append({"audio_id": f"Y{number:02d}", "caption": text, "split": split})
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tta_bench(folder: Path) -> Path:
    """The benchmark's six files with a few records each, in its own columns."""
    folder.mkdir()
    from resonate_lib.data.prompts import TTA_BENCH_FILES

    number = 0
    for part, name in TTA_BENCH_FILES.items():
        records = []
        for text, relation in (("a dog barks", "None"), ("rain and wind", "parallelism"), ("a bell, then a door", "sequence"),
                               ("a cat meows", "None")):  # fmt: skip
            number += 1
            events = [text] if relation == "None" else text.replace(", then", " and").split(" and ")
            records.append({"id": f"prompt_{number:04d}", "prompt_text": text, "event_count": len(events), "event_list": events,
                            "event_relation": relation, "source": "x", "notes": None, "perturbation_type": part})  # fmt: skip
        (folder / name).write_text(json.dumps(records))
    return folder


def paper_world(folder: Path) -> dict[str, str]:
    """Everything the profile needs, as parameters of a run."""
    weights = miniature.build(folder / "weights")
    checkpoint, roberta, _ = miniature_clap.make_miniature(folder / "clap")
    judges = {kind: miniature_lalm.write(folder / kind, kind) for kind in ("qwen2_5_omni", "qwen3_omni_moe")}
    return {
        "weights": str(weights), "clap_source": str(checkpoint), "roberta_source": str(roberta),
        "lalm_source": str(judges["qwen2_5_omni"]), "lalm_eval_source": str(judges["qwen3_omni_moe"]),
        "aesthetics_source": str(test_aesthetics.write(folder / "aesthetics")), "lalm_quantisation": "", "msclap_source": "",
        "folder": str(folder / "recordings"), "captions": str(recordings(folder / "recordings")),
        "tta_bench": str(tta_bench(folder / "tta")),
    }  # fmt: skip


def small_disk(folder: Path) -> Path:
    """The profiles as they are, but that miniatures need little space; returns their folder."""
    shutil.copytree(CHECKOUT / "notebooks" / "params", folder, dirs_exist_ok=True)
    for profile in ("paper", "small"):
        path = folder / f"{profile}.yaml"
        text, found = re.subn(r"disk_mb: \d+", "disk_mb: 200", path.read_text(encoding="utf-8"))
        assert found == 1
        path.write_text(text, encoding="utf-8")
    return folder


def run_suite(folder: Path, profile: str, given: dict, *arguments) -> Path:
    """The version that a whole run, or one of some notebooks, leaves."""
    command = [sys.executable, "-m", "resonate_lib", "run", "--profile", profile, *arguments]
    for name, value in given.items():
        command += ["-p", name, str(value)]
    environment = {**os.environ, "RESONATE_RESULTS": str(folder / "results"), "RESONATE_CACHE": str(folder / "cache"),
                   "RESONATE_PARAMS": str(small_disk(folder / "params")), "HF_HUB_OFFLINE": "1"}  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(done.stdout.strip().splitlines()[-1])


def heard_by(version: Path) -> tuple[set, list]:
    """The scores of notebook 02's table of the base, and the rows of notebook 05's of generated clips (none without it)."""
    base = versions.read_table(version / "metrics" / "base.csv")
    generated = version / "metrics" / "reward_on_generated.json"
    return set(base["metric"]) - {"silent", "clipping"}, json.loads(generated.read_text()) if generated.is_file() else []


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["paper", "small"])
def test_the_suite_runs_at_paper_shape(tmp_path, profile):
    given = paper_world(tmp_path / "world") | SMALL | ({} if profile == "paper" else {"lalm_eval_source": ""})
    version = run_suite(tmp_path, profile, given)
    run = versions.read(version)
    assert run["status"] == "DONE"
    scores, generated = heard_by(version)
    if profile == "paper":
        assert scores == {"aqa", "reward_clap"}
        assert {(row["reward"], row["quality"]) for row in generated} == {("lalm", "lalm_eval"), ("clap", "lalm_eval")}
    else:  # nobody but the training rewards: no row may pass for an independent verdict
        assert scores == {"reward", "reward_clap"}
        assert [row["reward"] for row in generated] == ["lalm and clap"] and "prefers_better_sibling" not in generated[0]
        assert "no independent verdict" in (version / "metrics" / "tta_words.json").read_text()
    headline = versions.read_table(version / "metrics" / "tta_headline.csv")
    assert set(headline["system"]) >= {"base", "base trained on", "DPO", "GRPO (CLAP)", "GRPO (LALM)", "DiffRO", "NFT", "best of 2"}
    assert headline["reward"].between(0, 1).all() and headline["CE"].notna().all()
    if profile == "paper":
        assert headline["aqa"].between(0, 1).all()
    assert (version / "checkpoints" / "nft" / "adapter.safetensors").is_file()
    noted = json.dumps([item["notes"].get("inputs", {}) for item in run["notebooks"].values()])
    assert "vae_44k" in noted and "sha256" in noted
    assert (version / "listen.html").stat().st_size > 10_000


@pytest.mark.slow
def test_without_an_lalm_02_and_06_run_by_the_clap(tmp_path):
    counts = ("seconds", "num_steps", "02.demo_steps", "02.batch_size", "eval_clips", "base_prompts", "06.prompts",
              "validation_prompts", "part_prompts", "best_of", "bootstrap", "guidance_scales")  # fmt: skip
    given = paper_world(tmp_path / "world") | {name: SMALL[name] for name in counts}
    given |= {"lalm_source": "", "lalm_eval_source": ""}
    version = run_suite(tmp_path, "small", given, "--only", "02,06")
    assert versions.read(version)["status"] == "DONE" and heard_by(version) == ({"reward_clap"}, [])
    assert not (version / "metrics" / "lalm.csv").exists() and (version / "metrics" / "clap.csv").is_file()
    headline = versions.read_table(version / "metrics" / "tta_headline.csv")
    assert headline["reward"].equals(headline["reward_clap"])
    executed = "".join(path.read_text(encoding="utf-8") for path in (version / "notebooks").glob("*.ipynb"))
    assert "reward.lalm_source is empty: `reward` is clap" in executed


def test_a_base_is_trained_from_nothing_around_published_parts(tmp_path):
    """Three steps on recordings read from disk: saved without codec, found again with it, its statistics measured."""
    folder = tmp_path / "recordings"
    configs = {
        "suite": SuiteConfig(world="folder", weights=str(miniature.build(tmp_path / "weights")), sample_rate=44100, seconds=1.0),
        "data": DataConfig(folder=str(folder), captions=str(recordings(folder))),
        "pretrain": PretrainConfig(steps=3, batch_size=3, micro_batch=2, checkpointing=True, hidden_dim=64, depth=3, fused_depth=1,
                                   num_heads=1, text_seq_len=77, precision="float32"),
        "reward": RewardConfig(eval_clips=4),
    }  # fmt: skip
    base, state = tmp_path / "base", tmp_path / "base.pt"
    history = instruments.build("base", configs, seed=1, folder=base, state=state, cache=tmp_path)
    assert [row["step"] for row in history] == [0, 1, 2]
    assert all(0 < row[loss] < 100 for row in history for loss in ("loss", "validation_loss"))
    made = Generator.load(base)
    assert sorted(path.name for path in base.iterdir()) == ["generator.json", "network.safetensors"]
    assert made.network.latent_std.isfinite().all() and set(made.parts) == {"vae_44k", "vocoder_44k", "t5"}
    audio_of = made.decode(made.generate(["a dog barks"], steps=2, seeds=[0]))
    assert audio_of.shape == (1, made.codec.samples) and audio_of.isfinite().all()
