"""Spoken utterances: what is drawn, that it is said the same every time, the corpus in the cache, and folders of recordings."""

import dataclasses
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torchaudio

from resonate_lib import audio
from resonate_lib.config_speech import SpeechConfig
from resonate_lib.data import speech, speech_folder, speech_grammar, speech_voices
from resonate_lib.data.speech import SpeechCorpus, draw_utterances, open_speech, speak, split_of_sentence
from resonate_lib.rewards import rules

RATE = 16000


@pytest.fixture(scope="module")
def train():
    return draw_utterances(6000, split="train", seed=0)


@pytest.fixture(scope="module")
def test_draw():
    return draw_utterances(600, split="test", seed=0)


def sentences(utterances):
    """Each sentence said, long utterances taken apart."""
    joins = "|".join(speech_grammar.JOINS)
    return {part for u in utterances if u.text for part in re.split(rf" (?:{joins}) ", u.text)}


def test_splits_share_no_sentence_and_the_test_has_voices_of_its_own(train, test_draw):
    validation = draw_utterances(600, split="validation", seed=0)
    said = [sentences(part) for part in (train, validation, test_draw)]
    assert all(len(part) > 300 for part in said)
    assert not said[0] & said[1] and not said[0] & said[2] and not said[1] & said[2]
    for part, name in zip(said, ("train", "validation", "test"), strict=True):
        assert {split_of_sentence(sentence) for sentence in part} == {name}
    unseen = [u.voice in speech_voices.TEST_VOICES for u in test_draw]
    assert 0.4 < sum(unseen) / len(unseen) < 0.6
    assert {u.voice for u in train + validation} == set(speech_voices.TRAIN_VOICES)


def test_texts_are_plain_words_of_the_vocabulary_and_keywords_are_among_them(train):
    vocabulary = set(speech.vocabulary())
    assert 250 <= len(vocabulary) <= 400
    for u in train:
        assert rules.spoken(u.text) == u.text and set(u.text.split()) <= vocabulary
        assert set(u.keywords) <= set(u.text.split()) and bool(u.keywords) == bool(u.text)
        assert (u.kind == "silence") == (u.text == "") and u.level in range(4)
    assert set(" ".join(u.text for u in train).split()) == vocabulary, "every word is learned"


def test_rare_words_are_rare_in_training_and_equal_in_the_test(train, test_draw):
    rare = speech_grammar.SLOTS["rare"]
    counts = Counter(word for u in train for word in u.keywords if word in rare)
    assert all(counts[word] >= 3 for word in rare) and counts[rare[0]] > 6 * counts[rare[-1]]
    held_out = Counter(word for u in test_draw for word in u.keywords if word in rare)
    assert max(held_out.values()) < 0.08 * held_out.total()
    assert speech.keyword_weights()[rare[0]] > speech.keyword_weights()["anna"] > 1


def test_the_same_draw_again_a_longer_one_and_other_seeds():
    few = draw_utterances(20, split="train", seed=4)
    assert draw_utterances(50, split="train", seed=4)[:20] == few != draw_utterances(20, split="train", seed=5)
    assert {u.kind for u in draw_utterances(40, split="test", seed=0, kinds=("silence", "long"))} == {"silence", "long"}
    assert {u.voice for u in draw_utterances(9, split="test", seed=0, voices=("en-us",))} == {"en-us"}
    assert speech.Utterance.of(json.loads(json.dumps(few[0].as_dict())) | {"more": 1}) == few[0]


@pytest.mark.parametrize(("wrong", "said"), [
    ({"split": "dev"}, "unknown split 'dev'"), ({"count": 0}, "count=0"), ({"kinds": ("names",)}, "use some of command"),
    ({"kinds": ()}, "use some"),
])  # fmt: skip
def test_a_wrong_draw_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        draw_utterances(**({"count": 1, "split": "train", "seed": 0} | wrong))


@pytest.mark.parametrize(("number", "said"), [
    (0, "zero"), (7, "seven"), (13, "thirteen"), (20, "twenty"), (42, "forty two"), (100, "one hundred"),
    (305, "three hundred five"), (999, "nine hundred ninety nine"),
])  # fmt: skip
def test_number_words(number, said):
    assert speech_grammar.number_words(number) == said


def test_every_number_has_its_own_words():
    assert len({speech_grammar.number_words(number) for number in range(1000)}) == 1000
    with pytest.raises(ValueError, match="number=1000"):
        speech_grammar.number_words(1000)


# Sound


@pytest.fixture(scope="module")
def espeak():
    return pytest.importorskip("espeakng_loader")


def utterance(**values):
    start = draw_utterances(1, split="train", seed=0, kinds=("command",))[0]
    return dataclasses.replace(start, **({"text": "open the door", "noise_db": None, "seed": 3} | values))


def test_the_same_utterance_sounds_the_same_whatever_was_said_before(espeak):
    drawn = [utterance(voice=voice) for voice in speech_voices.VOICES]
    first, again = speak(drawn), speak(drawn[::-1])[::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(speak([utterance()])[0], speak([utterance(seed=4)])[0])


def test_voice_rate_and_pitch_are_heard(espeak):
    def bare(**values):
        return speech_voices.say(utterance(**values))

    assert len(bare(rate=220)) < 0.8 * len(bare(rate=130))

    def fundamental(wave):
        """Hz, the median over the clip."""
        found = torchaudio.functional.detect_pitch_frequency(torch.from_numpy(wave).float(), RATE, freq_low=60, freq_high=400)
        return float(found.median())

    assert fundamental(bare(pitch=70)) > 1.15 * fundamental(bare(pitch=30))
    assert fundamental(bare(voice="en-us+f4")) > 1.3 * fundamental(bare(voice="en-us"))


def test_level_noise_and_silence(espeak):
    clean, noisy = speak([utterance()])[0], speak([utterance(noise_db=5.0)])[0]
    loud = clean[clean.abs() > clean.abs().max() * 10**-1.5]
    assert -26.5 < 10 * torch.log10(loud.square().mean()) < -19.5 and clean.abs().max() <= 0.951
    assert clean[:600].std() < 2e-4 < 1e-2 < noisy[:600].std(), "the margin before the first word holds dither alone, or noise"
    assert clean.unique().numel() > 1000 and (clean[:200] != 0).all()
    still, hiss = (speak([utterance(kind="silence", text="", noise_db=db)])[0] for db in (None, 10.0))
    assert still.abs().max() < 1e-3 < hiss.std() and 0.8 * RATE <= len(still) <= 4 * RATE


def test_lengths_of_what_is_said(espeak):
    drawn = [u for u in draw_utterances(200, split="train", seed=6) if u.kind in ("long", "command")]
    waves = speak(drawn)
    seconds = {kind: [len(w) / RATE for u, w in zip(drawn, waves, strict=True) if u.kind == kind] for kind in ("long", "command")}
    assert max(seconds["command"]) < 4.5 and np.mean(np.array(seconds["command"]) < 4) > 0.97
    assert max(seconds["long"]) <= 10.0 and np.median(seconds["long"]) > 4.5


@pytest.mark.parametrize(("wrong", "said"), [
    ({"voice": "en-us+f11"}, r"no voice 'en-us\+f11' \(nearest: 'en-us\+f1'\)"), ({"text": " "}, "a silence has no text"),
    ({"kind": "silence"}, "a silence has no text"), ({"text": "größe"}, "'ö' in 'größe' is not ASCII"),
    ({"text": "?!"}, "nothing to say"), ({"rate": 5}, "rate=5: use 80 to 300"), ({"pitch": 100}, "pitch=100"),
])  # fmt: skip
def test_what_cannot_be_said_is_one_clear_error(wrong, said):
    with pytest.raises(ValueError, match=said) as error:
        speak([utterance(**wrong)])
    assert "\n" not in str(error.value)


# The corpus


@pytest.fixture(scope="module")
def small(espeak, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return open_speech(SpeechConfig(train_utterances=6), "train", seed=0, cache=cache), cache


def test_a_corpus_is_spoken_once_and_read_again(small, monkeypatch):
    corpus, cache = small
    monkeypatch.setattr(speech, "speak", lambda utterances: pytest.fail("spoken again"))
    again = open_speech(SpeechConfig(train_utterances=6), "train", seed=0, cache=cache)
    assert again.utterances == corpus.utterances == draw_utterances(6, split="train", seed=0) and again.texts == corpus.texts
    assert all(np.array_equal(a, b) and a.dtype == np.int16 for a, b in zip(again.audio, corpus.audio, strict=True))
    (folder,) = (cache / "speech").iterdir()
    assert {path.name for path in folder.iterdir()} == {"audio.npy", "manifest.jsonl"}


def test_waveforms_are_padded_and_never_cut(small):
    corpus, _ = small
    longest = float(corpus.seconds().max())
    batch = corpus.waveforms([2, 0], longest)
    assert batch.shape == (2, round(longest * RATE)) and batch.dtype == torch.float32
    assert torch.equal(batch[0, : len(corpus.audio[2])], torch.from_numpy(corpus.audio[2] / np.float32(32767)))
    assert not batch[0, len(corpus.audio[2]) :].any()
    with pytest.raises(ValueError, match=r"more than seconds=0\.5"):
        corpus.waveforms([0], 0.5)
    assert corpus.select([4, 1]).texts == [corpus.texts[4], corpus.texts[1]]
    with pytest.raises(ValueError, match="1 clips for 0 utterances"):
        SpeechCorpus([np.zeros(3, np.int16)], [])


def test_a_damaged_corpus_and_an_interrupted_one(small, monkeypatch, tmp_path):
    corpus, _ = small
    speech.write_corpus(tmp_path / "c", corpus.utterances[:2])
    samples = np.load(tmp_path / "c" / "audio.npy")
    samples[7] += 1
    np.save(tmp_path / "c" / "audio.npy", samples)
    with pytest.raises(ValueError, match="remove"):
        speech.read_corpus(tmp_path / "c")

    def break_off(utterances):
        raise KeyboardInterrupt

    monkeypatch.setattr(speech, "speak", break_off)
    with pytest.raises(KeyboardInterrupt):
        speech.write_corpus(tmp_path / "d", corpus.utterances)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


# Recordings


@pytest.fixture
def librispeech(tmp_path):
    waves = {}
    for place, lines in {"train-clean/19/198": ["19-198-0000 CALL ANNA", "19-198-0001 DON'T STOP"],
                         "train-clean/26/495": ["26-495-0000 OPEN THE DOOR"],
                         "test-clean/61/70": ["61-70-0000 A ZEBRA"]}.items():  # fmt: skip
        folder = tmp_path / "LibriSpeech" / place
        folder.mkdir(parents=True)
        speaker, chapter = place.split("/")[1:]
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(lines) + "\n")
        for number, line in enumerate(lines):
            name = line.split()[0]
            waves[name] = 0.1 * torch.sin(torch.arange(8000 * (number + 1)) / (5 + len(waves)))
            audio.write(folder / f"{name}.flac", waves[name], RATE)
    return tmp_path / "LibriSpeech", waves


def test_librispeech_folders_are_read_as_a_corpus(librispeech):
    root, waves = librispeech
    corpus = speech_folder.read_folder(root, "train", longest=10)
    assert [u.id for u in corpus.utterances] == ["19-198-0000", "19-198-0001", "26-495-0000"]
    assert corpus.texts == ["call anna", "don't stop", "open the door"] and corpus.utterances[2].voice == "26"
    assert corpus.seconds().tolist() == [0.5, 1.0, 0.5]
    batch = corpus.select([1, 2]).waveforms([0, 1], 1.0)
    torch.testing.assert_close(batch[0], waves["19-198-0001"], atol=1e-4, rtol=0)
    assert speech_folder.read_folder(root / "test-clean", "test", longest=10).texts == ["a zebra"]


def test_recordings_are_cut_by_one_order_from_both_ends(librispeech, monkeypatch):
    root, _ = librispeech
    ids = [f"{speaker}-1-{k:04d}" for speaker in (1, 2, 3) for k in range(20)]
    clips = [np.zeros(100, np.int16)] * len(ids)
    drawn = [speech.Utterance(name, "a", "recording", 0, "", 0, 0, (), None, 0) for name in ids]
    monkeypatch.setattr(speech_folder, "read_folder", lambda *a, **k: SpeechCorpus(clips, drawn))
    config = SpeechConfig(speech_folder=str(root))

    def named(seed=0, **options):
        return [one.id for one in open_speech(config, "train", seed=seed, cache=root, **options).utterances]

    everything = named()
    assert sorted(everything) == ids != everything and named(seed=5) == everything
    assert named(count=40) == everything[:40] and named(count=25, last=True) == everything[-25:]
    assert len({name[0] for name in named(count=12)}) == 3  # by name they would be one speaker's
    assert named(count=100) == named(count=100, last=True) == everything


def test_long_recordings_are_left_out_and_counted(librispeech, capsys):
    root, _ = librispeech
    assert len(speech_folder.read_folder(root, "train", longest=0.8)) == 2
    assert "1 recordings of train are longer than 0.8 s" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_caption_file_is_read_as_a_corpus(librispeech, tmp_path, suffix):
    rows = [{"audio_path": "LibriSpeech/train-clean/19/198/19-198-0000.flac", "text": "Call  Anna", "split": "train"},
            {"audio_path": "slow.wav", "text": "", "split": "train"}]  # fmt: skip
    audio.write(tmp_path / "slow.wav", torch.zeros(4001), 8000)
    file = tmp_path / f"all.{suffix}"
    if suffix == "csv":
        file.write_text("\n".join(["audio_path,text,split", *(",".join(row.values()) for row in rows)]) + "\n")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = speech_folder.read_folder(file, "train", longest=10)
    assert corpus.texts == ["call anna", ""] and [u.kind for u in corpus.utterances] == ["recording", "silence"]
    assert len(corpus.audio[1]) == 8002 == len(np.asarray(corpus.audio[1]))


def test_what_is_missing_in_a_folder_is_named(librispeech, tmp_path):
    root, _ = librispeech
    (root / "train-clean/26/495/26-495-0000.flac").unlink()
    (tmp_path / "x.csv").write_text("audio_path,caption\na.wav,b\n")
    (tmp_path / "empty").mkdir()
    for path, split, error, said in ((root, "train", FileNotFoundError, "26-495-0000.flac"),
                                     (root, "validation", ValueError, "no recordings of validation"),
                                     (tmp_path / "x.csv", "train", ValueError, "needs `audio_path` and `text`"),
                                     (tmp_path / "empty", "train", FileNotFoundError, "no \\*.trans.txt"),
                                     (tmp_path / "nowhere", "train", FileNotFoundError, "no folder or file")):  # fmt: skip
        with pytest.raises(error, match=said):
            speech_folder.read_folder(path, split, longest=10)
