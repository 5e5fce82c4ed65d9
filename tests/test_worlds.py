"""The two worlds behind one set of methods: scenes with known events, and recordings with captions and TTA-Bench's files."""

import json
from collections import Counter

import miniature
import numpy as np
import pytest
import torch

from resonate_lib import audio, parameters, pretrain, runs
from resonate_lib.data import audio_folder, prompts, scenes
from resonate_lib.data.corpus import LazyCorpus
from resonate_lib.evaluation import accuracy, agreement, worlds
from resonate_lib.models.generator import Generator

TEXTS = ("a dog barks", "rain falls", "a dog barks", "a door shuts", "a bell rings", "wind blows")
SPLITS = ("train", "train", "train", "train", "validation", "test")
PARAMS = runs.CHECKOUT / "notebooks" / "params"


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
    assert world.rl_prompts(1, seed=0) == world.rl_prompts(10, seed=0)  # all of them, whatever the notebook's pool
    some = world_of(folder, data={"rl_prompts": 2})
    assert len(some.rl_prompts(10, seed=1)) == 2 and some.rl_prompts(10, seed=1) == some.rl_prompts(1, seed=1)
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


def test_no_prompt_of_the_benchmark_is_trained_on(folder, capsys):
    asked = {"id": "prompt_2401", "prompt_text": "Rain  falls.", "notes": "From train.csv, audiocap_id: 1"}
    (folder / "bias_prompt.json").write_text(json.dumps([asked]))
    found = world_of(folder, tta_bench=str(folder)).rl_prompts(10, seed=0)
    assert sorted(p["prompt_text"] for p in found) == ["a dog barks", "a door shuts"]
    assert "left out: 1 of 3 training prompts, which TTA-Bench asks too" in capsys.readouterr().out
    listed = folder / "rl.jsonl"
    listed.write_text('{"prompt": "rain falls"}\n')
    with pytest.raises(ValueError, match="every training prompt is one of TTA-Bench's"):
        world_of(folder, data={"prompt_list": str(listed)}, tta_bench=str(folder)).rl_prompts(10, seed=0)


def test_recordings_are_measured_by_an_independent_model_first():
    world = worlds.FolderWorld(worlds.DataConfig(folder="x", captions="y"), sample_rate=8000, seconds=2.0)
    assert worlds.measured(world, {"reward": 1, "ms_clap": 1}) == ("ms_clap", "reward")


def test_the_embedded_world_knows_its_events():
    world = worlds.open_world("smoke")
    assert world.knows_events and world.metrics[0] == "exact"
    records = world.bench("accuracy", "test", count=4)
    assert records == prompts.embedded_bench("accuracy", split="test", count=4)
    assert world.originals(records, seed=0).shape == (4, scenes.SIZE)
    assert world.rl_prompts(3, seed=5) == prompts.rl_prompts(3, seed=5)


@pytest.fixture
def several(tmp_path):
    """Twelve test recordings with five captions each, the last of which two neighbours share, in a caption file with a row each."""
    rows = []
    for number in range(12):
        audio.write(tmp_path / f"clip{number}.wav", 0.05 * torch.ones(20000), 8000)
        texts = [f"sound {number}, told the {place}. time" for place in range(4)] + [f"a sound like {number // 2}"]
        rows += [{"audio_id": f"clip{number}", "caption": text, "split": "test"} for text in texts]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::5] + rows))
    return tmp_path


def test_no_true_caption_of_a_recording_counts_as_wrong(several):
    world = world_of(several)
    clips = world.clips("test", 12, seed=0)
    assert len({record["audio_path"] for record in clips.records}) == len(clips) == 12
    assert [prompt["prompt_text"] for prompt in world.bench(count=99)] == [record["caption"] for record in clips.records]
    drawn = Counter(text for seed in range(200) for text in clips.captions([0], np.random.default_rng(seed)))
    assert len(drawn) == 5 and min(drawn.values()) > 20

    rows = agreement.score_captions({}, clips, wrong=world.wrong_captions)
    own = [set(record["captions"]) for record in clips.records]
    assert all((row.caption in own[row.clip]) == bool(row.truth) for row in rows.itertuples())
    positions, captions, others = accuracy.recall_draws(clips, 40, wrong=world.wrong_captions)
    for place, caption, wrong in zip(positions, captions, others, strict=True):
        assert caption in own[place] and len(set(wrong)) == 9 and not own[place] & set(wrong)


def test_too_few_wrong_captions_are_an_error_and_no_endless_search(several):
    texts = [f"sound {number}" for number in range(12)]
    rows = [{"audio_id": f"clip{number}", "caption": text, "captions": texts[: 4 if number else 12], "split": "test"}
            for number, text in enumerate(texts)]  # fmt: skip
    (several / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    world = world_of(several)
    with pytest.raises(ValueError, match=r"clip0\.wav: every other recording has one of its captions"):
        world.wrong_captions(world.records[0], np.random.default_rng(0))
    with pytest.raises(ValueError, match="needs as many different ones"):
        accuracy.recall_draws(world.clips("test", 12, seed=0), 5, wrong=world.wrong_captions)


def test_a_batch_read_ahead_is_the_batch_and_is_read_once(folder, monkeypatch):
    corpus, read, done = world_of(folder).corpus("train", seed=0), audio_folder.load_with_lengths, []
    want = corpus.with_lengths([2, 0])
    counted = lambda records, **more: done.append(len(records)) or read(records, **more)  # noqa: E731
    monkeypatch.setattr(audio_folder, "load_with_lengths", counted)
    corpus.prefetch([2, 0])
    assert corpus.waveforms([1]).shape == (1, 16000)  # others may be asked for meanwhile
    for got, expected in zip(corpus.with_lengths([2, 0]), want, strict=True):
        assert torch.equal(got, expected)
    assert sorted(done) == [1, 2]
    (folder / "clip3.wav").write_bytes(b"")
    corpus.prefetch([2])
    with pytest.raises(ValueError, match=r"clip3\.wav: the audio file is empty"):
        corpus.with_lengths([2])


def test_training_reads_ahead_and_learns_the_same(folder, tmp_path, monkeypatch):
    sizes = {"hidden_dim": 32, "depth": 2, "fused_depth": 1, "num_heads": 2}
    places, read = {"seconds": 0.5, "device": "cpu"}, LazyCorpus._read
    weights = miniature.build(tmp_path / "weights")
    begun, histories = [], []
    for ahead in (True, False):
        corpus = LazyCorpus(world_of(folder).of_split("train"), sample_rate=44100, seconds=0.5)
        monkeypatch.setattr(LazyCorpus, "_read", lambda self, positions: begun.append(list(positions)) or read(self, positions))
        if not ahead:
            monkeypatch.setattr(LazyCorpus, "prefetch", lambda self, positions: None)
        generator = Generator.new_published(weights, seed=3, **places, **sizes)
        pretrain.measure_statistics(generator, corpus)
        begun.clear()
        histories.append(pretrain.train(generator, pretrain.encode_only(generator, corpus), corpus.captions, steps=4, batch_size=5))
        assert len(begun) == 4 and all(len(positions) == 5 for positions in begun)  # each batch once
    assert histories[0] == histories[1]


@pytest.mark.parametrize(("split", "words"), [("train", "no recordings of test; this"), ("other", "unknown split 'other'")])
def test_splits_are_looked_at_before_a_run_starts(folder, split, words):
    path = folder / "captions.jsonl"
    given, declared = {"folder": str(folder), "captions": path.name}, {"01": {"folder": "str", "captions": "str"}}
    for profile in ("paper", "tiny"):
        assert parameters.check(given, declared, profile, PARAMS)["data"]["captions"] == str(path)
    path.write_text(path.read_text().replace('"test"', f'"{split}"'))
    with pytest.raises(ValueError, match=words):
        parameters.check(given, declared, "paper", PARAMS)
    if split == "train":  # a folder that is only shown
        parameters.check(given, declared, "tiny", PARAMS)


def test_a_profile_with_another_sample_rate_than_its_codec_is_refused(tmp_path, monkeypatch):
    weights = miniature.build(tmp_path / "weights")
    monkeypatch.setenv("RESONATE_PARAMS", str(tmp_path))
    run = runs.Run(path=tmp_path / "run", profile="mine", seed=0, notebook="04")

    def at(rate):
        profile = {"suite": {"world": "folder", "weights": str(weights), "sample_rate": rate, "seconds": 0.5}}
        (tmp_path / "mine.yaml").write_text(json.dumps(profile))
        return run.generator()

    made = at(44100)
    assert made.sample_rate == 44100
    with pytest.raises(ValueError, match="sample_rate=22050: published codecs are for 16000 or 44100 Hz"):
        at(22050)
    made.save(run.checkpoint("base"))
    with pytest.raises(ValueError, match="sample_rate=16000, but the codec makes sound at 44100 Hz"):
        at(16000)


def test_a_profile_of_recordings_says_what_it_needs():
    with pytest.raises(ValueError, match="-p folder DIR and -p captions FILE"):
        worlds.open_world("paper")
