"""The two worlds behind one set of methods: scenes with known events, and recordings with captions and TTA-Bench's files."""

import json

import numpy as np
import pytest
import torch

from resonate_lib import audio
from resonate_lib.data import prompts, scenes
from resonate_lib.data.corpus import LazyCorpus
from resonate_lib.evaluation import worlds

TEXTS = ("a dog barks", "rain falls", "a dog barks", "a door shuts", "a bell rings", "wind blows")
SPLITS = ("train", "train", "train", "train", "validation", "test")


@pytest.fixture
def folder(tmp_path):
    """Six recordings of 3 s, the last of 1 s, with a caption file in AudioCaps' columns."""
    rows = []
    for number, (text, split) in enumerate(zip(TEXTS, SPLITS, strict=True)):
        wave = 0.1 * torch.randn(48000 if number < 5 else 16000, generator=torch.Generator().manual_seed(number))
        audio.write(tmp_path / f"clip{number}.wav", wave, 16000)
        rows.append({"audio_id": f"clip{number}", "caption": text, "split": split, "duration": 3 if number else 1.5})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def world_of(folder, **more):
    data = worlds.DataConfig(folder=str(folder), captions="captions.jsonl", **more.pop("data", {}))
    return worlds.FolderWorld(data, sample_rate=8000, seconds=2.0, **more)


def test_a_folder_gives_clips_by_split_without_short_ones(folder):
    corpus = world_of(folder).corpus("train", seed=0)
    assert isinstance(corpus, LazyCorpus) and len(corpus) == 3  # the first states 1.5 s
    clips = corpus.waveforms([0, 2])
    assert clips.shape == (2, 16000) and clips.abs().amax() > 0.05
    assert corpus.captions([0, 1, 2], np.random.default_rng(0)) == ["rain falls", "a dog barks", "a door shuts"]
    with pytest.raises(ValueError, match="shorter than 2 s"):
        LazyCorpus([{"duration": 1.0}], sample_rate=8000, seconds=2.0)


def test_prompts_of_a_folder_are_captions_each_text_once(folder):
    world = world_of(folder)
    assert sorted(p["prompt_text"] for p in world.rl_prompts(10, seed=0)) == ["a dog barks", "a door shuts", "rain falls"]
    two = world.rl_prompts(2, seed=1)
    assert len(two) == 2 and two == world.rl_prompts(2, seed=1)
    assert [p["prompt_text"] for p in world.bench(count=5)] == ["wind blows"]
    assert [p["prompt_text"] for p in world.bench("accuracy", "validation", count=5)] == ["a bell rings"]
    assert world.bench("robustness", count=5) == []
    assert world.originals(world.bench(count=1), seed=0).shape == (1, 16000)


def test_a_prompt_list_needs_no_recordings(folder):
    listed = folder / "rl.jsonl"
    listed.write_text('{"prompt": "a siren", "audio_id": "x"}\n{"prompt": "a siren"}\n{"prompt": "an owl"}\n')
    found = world_of(folder, data={"prompt_list": str(listed)}).rl_prompts(9, seed=0)
    assert [(p["prompt_text"], p["id"]) for p in found] == [("a siren", "x_00001"), ("an owl", "prompt_00003")]
    listed.write_text('{"text": "a siren"}\n')
    with pytest.raises(ValueError, match="entry 1: found columns text; it needs `prompt`"):
        prompts.read_prompts(listed)


def test_the_published_benchmark_gives_the_test_prompts(folder):
    record = {"id": "prompt_0001", "prompt_text": "a dog", "event_count": 1, "event_list": ["a dog"], "event_relation": "None"}
    (folder / "acc_prompt.json").write_text(json.dumps([record]))
    (folder / "robustness_prompt.json").write_text(json.dumps([{**record, "id": "prompt_1801"}]))
    world = world_of(folder, tta_bench=str(folder))
    assert world.bench(count=3) == [record] and world.bench("robustness", count=3)[0]["id"] == "prompt_1801"
    assert world.originals(world.bench(count=1), seed=0) is None
    assert [p["prompt_text"] for p in world.bench("accuracy", "validation", count=5)] == ["a bell rings"]


def test_the_embedded_world_knows_its_events():
    world = worlds.open_world("smoke")
    assert world.knows_events and world.metrics[0] == "exact"
    records = world.bench("accuracy", "test", count=4)
    assert records == prompts.embedded_bench("accuracy", split="test", count=4)
    assert world.originals(records, seed=0).shape == (4, scenes.SIZE)
    assert world.rl_prompts(3, seed=5) == prompts.rl_prompts(3, seed=5)


def test_a_profile_of_recordings_says_what_it_needs():
    with pytest.raises(ValueError, match="-p folder DIR and -p captions FILE"):
        worlds.open_world("paper")
