"""The embedded world: events, scenes, captions, splits, folders of recordings, prompts, codec, generator, judge."""

import itertools
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from resonate_lib import audio
from resonate_lib.data import audio_folder, events, prompts, scenes
from resonate_lib.data.corpus import Corpus
from resonate_lib.evaluation import suite
from resonate_lib.evaluation.judge import Judge, _distinct, asked_counts, freeze_threshold, relation_scores
from resonate_lib.models.codec import MelCodec
from resonate_lib.models.generator import Generator

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "resonate_lib" / "weights" / "tiny"
REAL = [name for name, event in events.EVENTS.items() if event.source == "real"]


def rng(*seed):
    return np.random.default_rng(seed or (0,))


def spec(*groups, relation="single"):
    return scenes.Spec(tuple(groups), relation)


@pytest.fixture(scope="module")
def generator():
    if not (WEIGHTS / "base").is_dir():
        pytest.skip("no shipped base model in resonate_lib/weights/tiny")
    return Generator.load(WEIGHTS / "base")


# ---- events ------------------------------------------------------------


def test_the_world_has_the_events_it_promises():
    assert len(REAL) >= 5
    assert len(events.EVENTS) - len(REAL) >= 12


@pytest.mark.parametrize("name", list(events.EVENTS))
def test_an_event_is_finite_of_known_level_and_never_twice_the_same(name):
    one, again, other = (events.render_event(name, rng(seed)) for seed in (1, 1, 2))
    assert one.dtype == np.float32 and np.isfinite(one).all()
    assert np.array_equal(one, again)
    assert one.shape != other.shape or not np.allclose(one, other)
    assert 0.05 < np.sqrt(np.mean(one[np.abs(one) > 0.01] ** 2)) < 0.4
    high = events.EVENTS[name].seconds[1]
    assert len(one) <= (high + 0.01) * events.SAMPLE_RATE


@pytest.mark.parametrize("name", REAL)
def test_takes_of_train_and_test_are_apart_unless_declared(name):
    train, test = events.takes(name)["train"], events.takes(name)["test"]
    assert len(train) and len(test)
    shared = any(len(a) == len(b) and np.array_equal(a, b) for a in train for b in test)
    assert shared == events.EVENTS[name].same_recording


def test_an_unknown_event_is_named_with_those_there_are():
    assert events.mentioned("Two dogs bark, followed by RAIN") == ["dog", "rain"] and not events.mentioned("a zebra sings")
    with pytest.raises(ValueError, match=r"unknown event 'drum'.*cow"):
        events.render_event("drum", rng())


# ---- scenes ------------------------------------------------------------


def test_the_same_arguments_give_the_same_scene_and_others_do_not():
    (one, first), (same, again) = (scenes.make_scene(5, split="train", seed=1) for _ in range(2))
    assert np.array_equal(one, same) and first == again
    other, _ = scenes.make_scene(5, split="train", seed=2)
    assert not np.array_equal(one, other)


def test_onsets_are_exact():
    """A single event in near silence: before its onset only the noise floor, right after it the event."""
    for seed in range(8):
        wave, placed = scenes.render(spec(("beep", 1)), rng(seed))
        start = round(placed[0]["onset"] * scenes.SAMPLE_RATE)
        before, after = wave[:start], wave[start : start + 1600]
        if len(before) > 100:
            assert np.abs(before).max() < 0.005
        assert np.abs(after).max() > 0.02
        end = round(placed[0]["offset"] * scenes.SAMPLE_RATE)
        assert np.abs(wave[end + 1 :]).max(initial=0) < 0.005


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_scenes_keep_to_their_length_order_and_peak(split):
    for index in range(40):
        wave, record = scenes.make_scene(index, split=split, seed=3)
        assert wave.shape == (64000,) and np.abs(wave).max() <= 0.951
        asked = dict(record["groups"])
        heard = {name: sum(e["name"] == name for e in record["events"]) for name in asked}
        assert heard == asked
        assert all(0 <= e["onset"] < e["offset"] <= 4.0 for e in record["events"])
        if record["relation"] == "followed by":
            order = [name for name, _ in itertools.groupby(record["events"], key=lambda e: e["name"])]
            assert order == [name for name, _ in record["groups"]]
        if record["relation"] == "while":
            a, b = record["events"]
            assert min(a["offset"], b["offset"]) - max(a["onset"], b["onset"]) > 0


def test_held_out_combinations_never_occur_in_training():
    kept = scenes.held_out(0)
    pairs = kept["pairs:test"] | kept["pairs:validation"]
    orders = kept["orders:test"] | kept["orders:validation"]
    assert pairs and orders and not kept["pairs:test"] & kept["pairs:validation"]
    random = rng(4)
    for _ in range(1500):
        drawn = scenes.sample_spec(random, "train")
        for first, second in itertools.combinations(drawn.names, 2):
            assert frozenset((first, second)) not in pairs
            assert drawn.relation != "followed by" or (first, second) not in orders


@pytest.mark.parametrize("split", ["validation", "test"])
def test_prompts_of_several_events_hold_a_held_out_combination(split):
    random = rng(5)
    drawn = [scenes.sample_spec(random, split) for _ in range(200)]
    several = [s for s in drawn if len(s.groups) > 1]
    assert several and all(scenes.combination_split(s) == split for s in several)


def test_occurrences_of_a_count_differ_in_gain_and_sound():
    _, placed = scenes.render(spec(("ding", 3)), rng(6))
    assert len(placed) == 3
    assert len({event["level_db"] for event in placed}) == 3
    wave, _ = scenes.render(spec(("ding", 3)), rng(6))
    cut = [wave[round(e["onset"] * 16000) :][:4000] for e in placed]
    assert not np.allclose(cut[0] / np.abs(cut[0]).max(), cut[1] / np.abs(cut[1]).max(), atol=0.05)


def test_negatives_are_wrong_and_of_every_kind():
    random, seen = rng(7), set()
    for _ in range(300):
        truth = scenes.sample_spec(random)
        for kind, wrong in scenes.negative_specs(truth, random).items():
            seen.add(kind)
            assert wrong != truth
            assert sorted(wrong.groups) != sorted(truth.groups) or (wrong.groups != truth.groups and kind == "swapped")
        captions = scenes.negatives(truth, random)
        assert all(text and text[0] == text[0].upper() for text in captions.values())
    assert seen == {"missing", "replaced", "swapped", "count"}


def test_a_slip_sounds_one_event_twice_and_the_record_tells_it():
    slipped = 0
    for index in range(60):
        _, record = scenes.make_scene(index, split="train", seed=0, slips=1.0)
        _, plain = scenes.make_scene(index, split="train", seed=0)
        heard = [event["name"] for event in record["events"]]
        assert {name: heard.count(name) for name, _ in record["groups"]} == dict(record["groups"])
        assert all(event["offset"] - event["onset"] > 0.05 for event in record["events"])
        counts = [count for _, count in record["groups"]]
        assert plain["kind"] == "count" or sum(counts) <= len(counts) + 1
        slipped += plain["kind"] != "count" and max(counts) == 2
    assert slipped > 20


def test_three_events_of_which_one_slips_end_before_the_scene_does(monkeypatch):
    monkeypatch.setattr(scenes.ev, "render_event", lambda name, rng, split, seconds: np.ones(int(seconds * scenes.SAMPLE_RATE)))
    slipped = 0
    for index in range(4000):
        rng = np.random.default_rng(index)
        spec = scenes.slip(scenes.sample_spec(rng, "train", "three"), rng)
        name, onset, wave, _ = scenes._layout(spec, rng, "train")[-1]
        assert onset + len(wave) / scenes.SAMPLE_RATE <= scenes.SECONDS + 0.02, (spec, name)
        slipped += any(count == 2 for _, count in spec.groups)
    assert slipped > 1000


def test_negatives_for_training_hold_no_held_out_combination():
    random, seen = rng(8), set()
    for _ in range(500):
        for kind, wrong in scenes.negative_specs(scenes.sample_spec(random), random, "train").items():
            assert len(wrong.groups) == 1 or scenes.combination_split(wrong) == "train"
            seen.add(kind)
    assert seen == {"missing", "replaced", "swapped", "count"}


def test_captions_say_every_event_and_the_number():
    text = scenes.caption(spec(("ding", 3), ("cow", 1), relation="followed by"), rng(8)).lower()
    assert "three" in text and "moo" in text
    assert len({scenes.caption(spec(("dog", 1), ("rain", 1), relation="while"), rng(9, i)) for i in range(30)}) > 6


# ---- corpora and folders ------------------------------------------------------------


def test_a_corpus_on_disk_equals_the_one_in_memory(tmp_path):
    manifest = scenes.make_corpus(tmp_path / "corpus", split="train", count=6, seed=2, workers=1)
    records = audio_folder.load_manifest(manifest)
    assert len(records) == 6
    for record in records:
        assert audio.read(record["audio_path"])[0].shape == (64000,)
        assert len(record["sha256"]) == 64
    disk, memory = Corpus.from_manifest(manifest), Corpus.from_scenes(6, seed=2, workers=1)
    assert np.abs(disk.audio.astype(int) - memory.audio.astype(int)).max() <= 1
    assert disk.activity([0]).shape == (1, 100, len(scenes.CLASSES))
    assert scenes.make_corpus(tmp_path / "corpus", split="train", count=6) == manifest  # reused


def test_anybodys_recordings_in_csv_with_audio_id(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full((22050, 2), 0.25), 44100)
    (tmp_path / "captions.csv").write_text("audio_id,caption\na,a hum\n")
    records = audio_folder.load_manifest(tmp_path / "captions.csv")
    clip = audio_folder.load_audio(records, sample_rate=16000, seconds=1.0)
    assert clip.shape == (1, 16000)
    assert clip[0, 100:7000].mean() == pytest.approx(0.25, abs=0.01) and not clip[0, 8200:].any()


def test_captions_of_any_shape_are_read_whole(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(160), 16000)
    (tmp_path / "a.csv").write_text('audio_id,caption,captions\na,"a dog\nbarks",a dog\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"audio_id": "a", "caption": "one\u2028two", "captions": ["x", "y"]}\n', encoding="utf-8")
    (from_csv,), (from_jsonl,) = (audio_folder.load_manifest(tmp_path / name) for name in ("a.csv", "a.jsonl"))
    assert from_csv["caption"] == "a dog\nbarks" and from_csv["captions"] == ["a dog"]
    assert from_jsonl["caption"] == "one\u2028two" and from_jsonl["captions"] == ["x", "y"]
    (tmp_path / "b.csv").write_bytes("audio_id,caption\na,caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.csv is not UTF-8"):
        audio_folder.load_manifest(tmp_path / "b.csv")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.csv", "audio_id,text\na,hum\n", ValueError, "needs `caption`"),
        ("a.csv", "audio_id,caption\n", ValueError, "no entries"),
        ("a.csv", "audio_id,caption\nb,hum\n", FileNotFoundError, "no recording"),
        ("a.jsonl", "{broken\n", ValueError, "line 1 is not JSON"),
        ("a.txt", "x\n", ValueError, "unknown kind of caption file"),
    ],
)
def test_a_bad_caption_file_is_refused_with_the_fix(tmp_path, name, content, error, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        audio_folder.load_manifest(tmp_path / name)


def test_missing_empty_and_corrupt_recordings_are_refused(tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "noise.flac").write_bytes(os.urandom(500))
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    for name in ("absent.wav", "empty.wav", "noise.flac", "none.wav"):
        with pytest.raises((ValueError, OSError), match=name):
            audio.read(tmp_path / name)


# ---- prompts ------------------------------------------------------------


@pytest.mark.parametrize("part", prompts.EMBEDDED_PARTS)
def test_the_embedded_benchmark_is_fixed_unique_and_in_the_schema(part):
    records, again = (prompts.embedded_bench(part, count=40) for _ in range(2))
    assert records == again and len({record["id"] for record in records}) == 40
    for record in records:
        assert record["event_count"] == len(record["event_list"]) == len(record["groups"])
        assert record["event_relation"] in ("None", "parallelism", "sequence")
        assert record["heldout"] and scenes.combination_split(scenes.Spec.of(record)) == "test"
    assert {record["kind"] for record in records} == set(prompts.BENCH_KINDS)
    texts = {record["prompt_text"] for record in records}
    assert len(texts) == 40 and not texts & {record["prompt_text"] for record in prompts.rl_prompts(2000)}


def test_more_held_out_prompts_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="ask for fewer than 100000"):
        prompts.embedded_bench("generalization", split="validation", count=100_000)


def test_robustness_changes_the_text_and_keeps_the_meaning():
    for record in prompts.embedded_bench("robustness", count=40):
        assert record["prompt_text"] != record["unperturbed"] or record["perturbation_type"] == "uppercase"


def test_training_prompts_hold_no_held_out_combination():
    records = prompts.rl_prompts(300, seed=1)
    assert all(scenes.combination_split(scenes.Spec.of(record)) == "train" for record in records)
    assert {record["kind"] for record in records} == set(prompts.BENCH_KINDS)


def test_the_published_benchmark_is_read_as_it_is():
    default = ROOT / ".." / "shared" / "prompts" / "tta_bench"
    folder = Path(os.environ.get("RESONATE_TTA_BENCH", default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"no TTA-Bench prompts in {folder}: set RESONATE_TTA_BENCH")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = {part: len(prompts.load_tta_bench(folder, part)) for part in prompts.TTA_BENCH_FILES}
    assert list(counts.values()) == [1500, 300, 300, 299, 300, 300]
    with pytest.warns(UserWarning, match="event_count differs from event_list in 5 records"):
        records = prompts.load_tta_bench(folder, "accuracy")
    assert records == json.loads((folder / "acc_prompt.json").read_text(encoding="utf-8"))


def test_a_missing_or_broken_benchmark_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"acc_prompt\.json"):
        prompts.load_tta_bench(tmp_path, "accuracy")
    (tmp_path / "acc_prompt.json").write_text('[{"id": "x"}]')
    with pytest.raises(ValueError, match="record 1: needs `id` and `prompt_text`"):
        prompts.load_tta_bench(tmp_path, "accuracy")
    with pytest.raises(ValueError, match="unknown part"):
        prompts.load_tta_bench(tmp_path, "speed")


# ---- codec ------------------------------------------------------------


def test_the_codec_has_its_shapes_and_keeps_almost_everything():
    corpus = Corpus.from_scenes(60, seed=3, workers=1)
    codec = MelCodec()
    kept = codec.fit([corpus.waveforms(range(60))])
    assert kept > 0.95
    clips = corpus.waveforms(range(4))
    latents = codec.encode(clips)
    assert latents.shape == (4, 31, 96)
    exact, coded = codec.mel(clips), torch.log1p(codec.gain * codec.to_mel(latents)).transpose(1, 2)
    assert (exact - coded).pow(2).mean() < 0.05 * exact.var()
    sound = codec.decode(latents, iterations=8)
    assert sound.shape == (4, 64000) and sound.abs().max() <= 0.991
    error = (codec.mel(sound) - exact).pow(2).mean() / exact.var()
    assert error < 0.15


# ---- generator ------------------------------------------------------------


def test_a_seed_fixes_a_sample_whatever_its_batch(generator):
    texts = ["a dog barks", "rain falls, followed by a cow mooing", "three dings"]
    alone = [
        generator.generate([text], steps=3, guidance_scale=2.0, seeds=[7 + i], precision="float32") for i, text in enumerate(texts)
    ]
    together = generator.generate(texts, steps=3, guidance_scale=2.0, seeds=[7, 8, 9], precision="float32")
    assert torch.allclose(torch.cat(alone), together, atol=1e-4)
    assert not torch.allclose(together[0], together[1])
    assert generator.decode(together, iterations=2).shape == (3, 64000)


def test_another_seed_gives_another_sample(generator):
    one, other = (generator.generate(["a dog barks"], steps=2, seeds=[seed]) for seed in (1, 2))
    assert not torch.allclose(one, other)


def test_a_prompt_of_too_many_tokens_is_refused(generator):
    with pytest.raises(ValueError, match=f"at most {generator.text.length}"):
        generator.encode_prompts(["a dog barks and " * 30])


def test_a_prompt_encodes_alike_whoever_asks_and_in_whatever_batch(generator):
    one, other = (Generator(generator.text, generator.network, generator.codec, generator.network_config) for _ in range(2))
    alone = one.encode_prompts(["a dog barks"])
    with torch.autocast("cpu", torch.bfloat16):
        among = other.encode_prompts(["rain falls while a cow moos and a siren wails", "a dog barks"])
    assert torch.allclose(alone.text_f[0].float(), among.text_f[1].float(), atol=2e-3)
    assert torch.allclose(alone.text_f_c[0], among.text_f_c[1], atol=1e-5)


def test_a_seed_for_each_prompt_is_needed(generator):
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        generator.generate(["a", "b"], seeds=[1])


def test_saved_and_loaded_gives_the_same_latents(generator, tmp_path):
    generator.save(tmp_path / "copy", bits=32)
    again = Generator.load(tmp_path / "copy")
    one, other = (g.generate(["a dog barks"], steps=2, seeds=[3], precision="float32") for g in (generator, again))
    assert torch.allclose(one, other, atol=2e-3)  # token states are kept as float16
    (tmp_path / "copy" / "network.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"network\.safetensors is missing"):
        Generator.load(tmp_path / "copy")


# ---- judge ------------------------------------------------------------


def tracks(**frames):
    active = torch.zeros(1, 100, len(scenes.CLASSES), dtype=torch.bool)
    for name, (first, last) in frames.items():
        active[0, first:last, scenes.CLASSES.index(name)] = True
    return active


def test_relations_by_hand():
    then = [{"groups": [["dog", 1], ["rain", 1]], "relation": "followed by"}]
    while_ = [{"groups": [["dog", 1], ["rain", 1]], "relation": "while"}]
    order, right = relation_scores(tracks(dog=(0, 20), rain=(30, 60)), then)
    assert order.item() == 1 and right.item()
    order, right = relation_scores(tracks(rain=(0, 20), dog=(30, 60)), then)
    assert order.item() == 0 and not right.item()
    order, right = relation_scores(tracks(dog=(10, 20), rain=(0, 60)), then)
    assert not right.item()  # in order by its centre, but on top of each other
    order, right = relation_scores(tracks(dog=(10, 20), rain=(0, 60)), while_)
    assert torch.isnan(order).item() and right.item()
    order, right = relation_scores(tracks(dog=(10, 20)), while_)
    assert not right.item()


def test_the_multiset_counts_within_class(monkeypatch):
    judge = Judge()
    metadata = [{"groups": [["ding", 3], ["cow", 1]], "relation": "followed by"}]
    asked = asked_counts(metadata)
    assert asked.sum() == 4 and asked[0, scenes.CLASSES.index("ding")] == 3
    heard = asked.clone()
    heard[0, scenes.CLASSES.index("ding")] = 2
    heard[0, scenes.CLASSES.index("dog")] = 1
    monkeypatch.setattr(judge, "detect", lambda audio: (heard, tracks(ding=(0, 20), cow=(40, 60), dog=(80, 90))))
    scores = judge.score(None, metadata)
    assert [scores[k].item() for k in ("tp", "fp", "fn", "exact", "order")] == [3, 1, 1, 0, 1]
    assert [scores[k].item() for k in ("tp_real", "fp_real", "fn_real")] == [1, 1, 0]


def test_two_edges_of_one_bark_count_once():
    rising = torch.zeros(1, 100, 3, dtype=torch.bool)
    for frame, name in ((0, 0), (1, 0), (3, 0), (7, 0), (20, 1), (26, 1), (31, 1), (99, 2)):
        rising[0, frame, name] = True
    assert _distinct(rising).tolist() == [[2, 2, 1]]


def test_the_threshold_is_the_middle_of_what_validation_cannot_tell_apart(monkeypatch):
    judge = Judge()
    corpus = Corpus.from_scenes(4, split="validation", seed=1, workers=1)
    right = {0.2: 0.5, 0.3: 0.98, 0.4: 1.0, 0.5: 1.0, 0.6: 0.9}

    def shares(counts, active, records):
        assert len(records) == 8
        return {"exact": torch.tensor(right[judge.threshold])}

    monkeypatch.setattr("resonate_lib.evaluation.judge.score_detections", shares)
    assert freeze_threshold(judge, corpus, tuple(right)) == judge.threshold == 0.5
    right[0.4] = right[0.5] = 0.98
    assert freeze_threshold(judge, corpus, tuple(right)) == 0.4


def test_a_saved_judge_hears_the_same(tmp_path):
    judge = Judge(threshold=0.35).eval()
    judge.save(tmp_path)
    again, wave = Judge.load(tmp_path), torch.randn(2, 64000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert again.threshold == 0.35
    close = [torch.allclose(a, b, atol=0.05) for a, b in zip(judge(judge.mel(wave)), again(again.mel(wave)), strict=True)]
    assert all(close)
    with pytest.raises(FileNotFoundError, match="no judge in"):
        Judge.load(tmp_path / "absent")


def test_the_shipped_judge_knows_originals_from_other_originals():
    if not (WEIGHTS / "judge").is_dir():
        pytest.skip("no shipped judge in resonate_lib/weights/tiny")
    judge = Judge.load(WEIGHTS / "judge")
    records = prompts.embedded_bench("accuracy", count=50)
    waves = suite.original_scenes(records, seed=1)
    assert waves.shape == (50, 64000) and torch.equal(waves, suite.original_scenes(records, seed=1))
    scores = judge.score(waves, records)
    f1 = 2 * scores["tp"].sum() / (2 * scores["tp"] + scores["fp"] + scores["fn"]).sum()
    assert f1 > 0.9 and scores["exact"].mean() > 0.75
    other = judge.score(waves.roll(1, 0), records)
    assert other["exact"].mean() < 0.2


def test_recordings_keep_their_split_whatever_else_is_in_the_folder():
    names = [{"audio_path": f"/somewhere/{i}.wav"} for i in range(400)]
    splits = [audio_folder.split_of(record) for record in names]
    assert {"train", "validation", "test"} == set(splits) and 0.8 < splits.count("train") / 400 < 0.97
    assert splits == [audio_folder.split_of({"audio_path": f"/elsewhere/{i}.wav"}) for i in range(400)]


@pytest.mark.parametrize(("names", "split"), [
    ("train Training", "train"), ("val valid validation dev eval Evaluation", "validation"), ("test testing TEST", "test")])
def test_splits_go_by_the_names_that_data_sets_use(names, split):
    for name in names.split():
        assert audio_folder.split_of({"audio_path": "a.wav", "split": name}) == split
    with pytest.raises(ValueError, match=r"a\.wav: unknown split 'held out'; use train, training, validation, val"):
        audio_folder.split_of({"audio_path": "a.wav", "split": "held out"})


def test_entries_of_one_recording_are_one_record_with_all_captions(tmp_path):
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(160), 16000)
    rows = ["a,a hum,val,1", "b,a hiss,test,2", "a,a buzz,validation,3", "a,a hum,val,4"]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["audio_id,caption,split,number", *rows]))
    one, other = audio_folder.load_manifest(path)
    assert one["caption"] == "a hum" and one["captions"] == ["a hum", "a buzz"] and one["number"] == "1"
    assert other["captions"] == ["a hiss"]
    path.write_text("\n".join(["audio_id,caption,split,number", *rows, "b,a whistle,train,5"]))
    with pytest.raises(ValueError, match=r"entry 5: .*b\.wav is in train here and in test before; give all entries"):
        audio_folder.load_manifest(path)


def test_a_batch_is_read_in_order_and_its_first_bad_file_is_named(tmp_path):
    records = [{"audio_path": str(tmp_path / f"{number}.wav")} for number in range(24)]
    for number, record in enumerate(records):
        soundfile.write(record["audio_path"], np.full(1600 + 80 * number, number / 32), 16000)
    batch, lengths = audio_folder.load_with_lengths(records, sample_rate=16000, seconds=0.15)
    assert batch.shape == (24, 2400) and torch.allclose(batch[:, 1000], torch.arange(24) / 32, atol=1e-4)
    assert lengths.tolist() == [min(1600 + 80 * number, 2400) for number in range(24)]
    for number in (17, 5, 21):
        Path(records[number]["audio_path"]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"/5\.wav: the audio file is empty"):
        audio_folder.load_with_lengths(records, sample_rate=16000, seconds=0.15)


def test_roughen_changes_its_share_of_the_clips_and_repeats_with_its_seed():
    from resonate_lib.evaluation.instruments import roughen

    def made(seed):
        corpus = Corpus.from_scenes(12, seed=4, workers=1)
        original = corpus.audio.copy()
        roughen(corpus, share=0.5, seed=seed)
        return corpus.audio, (corpus.audio != original).any(1)

    audio_one, changed = made(1)
    assert changed.sum() == 6
    assert np.array_equal(audio_one, made(1)[0]) and not np.array_equal(audio_one, made(2)[0])


def test_levels_vary_within_their_range_and_without_clipping():
    from resonate_lib.evaluation.instruments import vary_level

    def made(seed):
        corpus = Corpus.from_scenes(24, seed=4, workers=1)
        before = np.abs(corpus.audio).max(1) / 32767
        vary_level(corpus, seed=seed)
        return corpus.audio, before, np.abs(corpus.audio).max(1) / 32767

    audio_one, before, after = made(1)
    gains = 20 * np.log10(after / before)
    assert -12.1 < gains.min() < -8 and gains.max() < 3.1 and gains.std() > 2 and after.max() <= 0.951
    assert np.array_equal(audio_one, made(1)[0]) and not np.array_equal(audio_one, made(2)[0])


@pytest.mark.parametrize("name", ["clap", "clap_eval", "lalm", "lalm_eval"])
def test_rewards_learn_at_all_levels_and_lalms_from_slips(name, monkeypatch):
    from resonate_lib import config
    from resonate_lib.evaluation import instruments

    done = []
    monkeypatch.setattr(instruments.Corpus, "from_scenes", lambda count, **made: done.append(made) or "corpus")
    for step in ("roughen", "vary_level"):
        monkeypatch.setattr(instruments, step, lambda corpus, seed, step=step: done.append(step))
    for fit in ("fit_clap", "fit_lalm"):
        monkeypatch.setattr(instruments, fit, lambda corpus, fit=fit, **_: done.append(fit))
    reward, data = (config.resolve(cls, "smoke") for cls in (config.RewardConfig, config.DataConfig))
    instruments.train_reward(name, reward, data, seed=0)
    made, *steps = done
    lalm = name.startswith("lalm")
    assert steps == ["roughen", "vary_level", "fit_lalm" if lalm else "fit_clap"]
    assert made["split"] == "train" and made.get("slips", 0) == (scenes.LALM_SLIPS if lalm else 0)


def test_a_finished_training_is_not_begun_again(tmp_path):
    from resonate_lib import training
    from resonate_lib.evaluation import instruments

    rows = training.fit(lambda i, _: {"loss": 1.0}, steps=2, modules={}, label="x", checkpoint=tmp_path / "base.pt")
    configs = {"suite": None, "data": None, "reward": None, "pretrain": None}  # any use of them would fail
    (tmp_path / "base").mkdir()
    one = {"seed": 0, "folder": tmp_path / "base", "cache": tmp_path}
    assert instruments.build("base", configs, state=tmp_path / "base.pt", **one) == rows
    with pytest.raises(AttributeError):
        instruments.build("base", configs, state=tmp_path / "none.pt", **one)


def test_two_trainings_at_a_time_give_what_one_alone_gives(tmp_path, capfd):
    from types import SimpleNamespace

    from resonate_lib import config
    from resonate_lib.evaluation import instruments

    configs = {
        "pretrain": config.resolve(config.PretrainConfig, "smoke"),
        "reward": config.resolve(config.RewardConfig, "smoke"),
        "data": config.resolve(config.DataConfig, "smoke"),
    }
    for folder, workers in (("apart", 2), ("alone", 1)):
        run = SimpleNamespace(checkpoint=lambda n, f=folder: tmp_path / f / n, state=lambda n: None)
        histories = instruments.build_all(
            ["judge", "clap"], configs, run, seed=3, cache=tmp_path / "cache", workers=workers
        )
        assert {name: len(lines) for name, lines in histories.items()} == {"judge": 3, "clap": 3}
    assert "judge | " in capfd.readouterr().out
    for name in ("judge", "clap"):
        one, two = (load_file(next((tmp_path / f / name).glob("*.safetensors"))) for f in ("apart", "alone"))
        assert all(torch.allclose(one[key].float(), two[key].float(), rtol=1e-2, atol=1e-3) for key in one)
    with pytest.raises(KeyError, match="nothing"):
        instruments.build_all(["judge", "nothing"], configs, run, seed=3, cache=tmp_path / "cache", workers=2)


def test_an_error_in_one_training_is_raised_while_the_other_runs():
    from concurrent.futures import Future

    from resonate_lib.evaluation import instruments

    running, failed = Future(), Future()
    failed.set_exception(KeyError("nothing"))
    with pytest.raises(KeyError, match="nothing"):
        instruments._follow({"judge": running, "nothing": failed}, {})
    assert not running.done()


# --- what the world has of a prompt -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "known", "strange"),
    [
        ("Water flowing, wind blowing, a dog whimpers.", ["dog"], ["water", "flowing", "wind", "blowing", "whimpers"]),
        ("A man snoring.", [], ["man", "snoring"]),
        ("Boys are talking and a dog is barking.", ["dog"], ["boys", "talking"]),
        ("Water running followed by wind.", [], ["water", "wind"]),
        ("A lion roaring followed by a synthesized whoosh then birds chirpings.", ["bird"],
         ["lion", "roaring", "synthesized", "whoosh"]),
        ("A man talking before shouting then whistling followed by rustling", ["whistle"],
         ["man", "talking", "shouting", "rustling"]),
        ("THREE dogs bark twice, then it is raining!", ["dog", "rain"], []),
        ("a person falls", [], []),
        ("", [], []),
    ],
)  # fmt: skip
def test_which_words_of_a_prompt_the_world_has(text, known, strange):
    found = prompts.vocabulary(text)
    assert (list(found.events), list(found.strange)) == (known, strange)
    assert bool(found.note) == (bool(strange) or not known)
    assert all(word in found.note for word in (*known, *strange) if found.note)


def test_the_papers_prompts_are_outside_the_world_and_its_own_are_not():
    paper = prompts.clap_ppo_prompts()
    assert len(paper) == len({record["id"] for record in paper}) == 6
    assert all(prompts.vocabulary(record["prompt_text"]).note for record in paper)
    for part in ("accuracy", "generalization"):
        for record in prompts.embedded_bench(part, count=200):
            found = prompts.vocabulary(record["prompt_text"])
            assert not found.note and {name for name, _ in record["groups"]} == set(found.events), record["prompt_text"]
