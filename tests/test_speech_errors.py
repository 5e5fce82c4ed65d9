"""Word errors, the hallucination rule and their tables, against counts by hand; and which utterances are chosen to train on."""

import math
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import tones
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resonate_lib import seeds, versions
from resonate_lib.config_speech import RecognitionConfig, SpeechConfig
from resonate_lib.data.speech import SpeechCorpus, Utterance
from resonate_lib.evaluation import stats
from resonate_lib.speech import data_choice, errors

WORDS = st.lists(st.sampled_from(["yes", "no", "stop", "go"]), max_size=8).map(" ".join)


def test_word_errors_by_hand():
    assert errors.word_errors("Call Anna!", "call anna") == {
        "words": 2, "errors": 0, "substitutions": 0, "deletions": 0, "insertions": 0,
    }  # fmt: skip
    assert errors.word_errors("call call hanna", "call anna now")["errors"] == 2
    assert errors.word_errors("", "call anna") == {"words": 2, "errors": 2, "substitutions": 0, "deletions": 2, "insertions": 0}
    assert errors.word_errors("so it is", "") == {"words": 0, "errors": 3, "substitutions": 0, "deletions": 0, "insertions": 3}
    assert errors.word_errors("東京 now", "東京 now")["errors"] == 0
    assert errors.word_errors("Room 342, twenty-five percent", "room three hundred forty-two, 25%")["errors"] == 0


@given(WORDS, WORDS)
@settings(max_examples=50, deadline=None)
def test_word_errors_are_jiwers_and_bounded(said, asked):
    found = errors.word_errors(said, asked)
    n, m = len(said.split()), len(asked.split())
    assert abs(n - m) <= found["errors"] <= max(n, m) and found["insertions"] - found["deletions"] == n - m
    if asked:
        assert found["errors"] == round(jiwer.wer(asked, said) * m)


def test_runs_and_loops():
    assert [errors.longest_run(text) for text in ("", "yes", "yes no", "so it it it is")] == [0, 1, 1, 3]
    assert errors.longest_run("go on and go on and go on and stop") == 3
    assert errors.longest_run("a b c d a b c d a b c d") == 3 and errors.longest_run("a b c d e a b c d e a b c d e") == 1
    assert errors.is_loop("stop the the the lamp", "stop the lamp")
    assert not errors.is_loop("dial five five five", "dial five five five")
    assert errors.is_loop("five five five five", "five five five")
    assert not errors.is_loop("go go", "go")


def test_the_rule_for_hallucination():
    long = " ".join(first + last for first in "abcde" for last in "fghijklm")  # 40 words
    assert errors.hallucinates("the", "") and not errors.hallucinates("", "") and not errors.hallucinates("!?", "")
    assert not errors.hallucinates("call hanna", "call anna")  # a mistake is not invented
    assert not errors.hallucinates("call anna now", "call anna") and errors.hallucinates("call anna now please", "call anna")
    assert not errors.hallucinates(long + " a b c", long) and errors.hallucinates(long + " a b c d", long)
    assert errors.hallucinates(long + " and and and", long) and not errors.hallucinates("", long)


@given(WORDS)
@settings(max_examples=40, deadline=None)
def test_what_was_said_is_never_a_hallucination(text):
    assert not errors.hallucinates(text, text) and not errors.hallucinates("", text)


def test_summary_by_hand():
    said = [SimpleNamespace(id=f"u{i}", kind="command", voice="v", text="one two three four") for i in range(4)]
    quiet = [SimpleNamespace(id=f"s{i}", kind="silence", voice="v", text="") for i in range(4)]
    base = errors.judge(said, ["one two"] * 2 + ["one two three four"] * 2, system="base", part="test")
    better = errors.judge(said, ["one two three"] + ["one two three four"] * 3, system="tuned", part="test")
    over = [errors.judge(quiet, texts, system=name, part="silence") for name, texts in
            (("base", ["a", "b", "", ""]), ("tuned", [""] * 4))]  # fmt: skip
    table = errors.summary(errors.pd.concat([base, better, *over]), base="base", n=500).set_index(["system", "part"])
    assert [table.loc[(name, "test"), "wer"] for name in ("base", "tuned")] == pytest.approx([4 / 16, 1 / 16])
    line = table.loc[("tuned", "test")]
    assert line["wer_change"] == pytest.approx(-3 / 16) and line["wer_relative"] == pytest.approx(-0.75)
    assert line["wer_change_low"] <= -3 / 16 <= line["wer_change_high"] <= 0 and line["exact"] == 0.75
    assert -1 <= line["wer_relative_low"] <= -0.75 <= line["wer_relative_high"] <= 0
    for name, cases in (("base", 2), ("tuned", 0)):
        line = table.loc[(name, "silence")]
        expected = stats.wilson(cases, 4)
        assert (line["hallucination"], line["hallucination_low"], line["hallucination_high"]) == tuple(expected)
        assert math.isnan(line["wer"]) and line["words"] == 0 and line["hallucinated"] == cases
    with pytest.raises(ValueError, match="3 transcripts of 4 utterances"):
        errors.judge(said, ["a"] * 3, system="base", part="test")


def invented_by(system, cases, part, seed=0):
    """Six utterances of a part, whose ids are those of the other part too; of the first `cases` words are invented."""
    text = "" if part == "silence" else "one two three four"
    said = [SimpleNamespace(id=f"u{i}", kind=part, voice="v", text=text) for i in range(6)]
    texts = [text + (" so so so" if i < cases else "") for i in range(6)]
    return errors.judge(said, texts, system=system, part=part, seed=seed)


def test_silence_and_long_together_and_the_paired_change_of_their_hallucinations():
    given = {("base", "silence"): 5, ("base", "long"): 2, ("tuned", "silence"): 1, ("tuned", "long"): 2}
    rows = errors.pd.concat([invented_by(system, cases, part) for (system, part), cases in given.items()])
    table = errors.summary(rows, base="base", n=2000).set_index(["system", "part"])
    line = table.loc[("tuned", "silence and long")]
    assert (line["n"], line["hallucinated"], line["words"]) == (12, 3, 24)
    assert (line["hallucination_low"], line["hallucination_high"]) == tuple(stats.wilson(3, 12))[1:]
    assert line["hallucination_change"] == pytest.approx(-4 / 12)
    assert line["hallucination_change_low"] < -4 / 12 < line["hallucination_change_high"] <= 0
    expected = stats.paired_bootstrap([1] + 5 * [0] + 2 * [1] + 4 * [0], 5 * [1] + [0] + 2 * [1] + 4 * [0], n=2000)
    assert line["hallucination_change_low"] == pytest.approx(expected.low, abs=0.06)
    assert table.loc[("tuned", "long"), "hallucination_change"] == 0 == table.loc[("tuned", "long"), "wer_change"]
    assert math.isnan(table.loc[("base", "silence"), "hallucination_change"])
    assert len(errors.summary(invented_by("base", 1, "long"), base="base", n=200)) == 1
    joint = errors.with_joint(rows)
    both = joint[joint["part"] == "silence and long"]
    found = errors.compared(both, [("tuned", "base"), ("base", "base")], top="hallucinated", n=2000)
    assert found["change"].tolist() == pytest.approx([-4 / 12, 0]) and found["pairs"].tolist() == [12, 12]
    assert found["change_low"][0] < -4 / 12 < found["change_high"][0] <= 0
    assert found["p_holm"][0] == pytest.approx(2 * found["p"][0])
    more = errors.pd.concat([rows, *(invented_by(system, 1, "test") for system in ("base", "tuned"))])
    line = errors.summary(more, base="base", n=300).set_index(["system", "part"]).loc[("tuned", "all")]
    assert (line["n"], line["words"], line["hallucinated"]) == (18, 48, 4)
    assert line["wer_relative"] == pytest.approx((3 + 6 + 3) / (15 + 6 + 3) - 1)
    words = errors.compared(rows[rows["part"] == "long"], [("tuned", "base")], top="errors", bottom="words", n=200)
    assert words["change"].tolist() == [0.0]


def test_seeds_that_differ_widen_the_interval():
    """Without errors in one seed and with many in the other: over both the interval reaches from the one to the other."""
    rows = errors.pd.concat([invented_by("base", cases, "long", seed) for seed, cases in enumerate((0, 6))])
    line = errors.summary(rows, base="base", n=500).iloc[0]
    assert line["seeds"] == 2 and (line["wer_low"], line["wer_high"]) == (0, 0.75) and line["hallucination_high"] == 1


def test_several_seeds_of_the_same_clips_are_no_more_clips():
    seeds = errors.pd.concat([invented_by("base", 2, "silence", seed) for seed in range(4)])
    line = errors.summary(seeds, base="base", n=2000).iloc[0]
    one = stats.bootstrap_mean([1, 1, 0, 0, 0, 0], n=2000)
    assert line["n"] == 24 and (line["hallucination_low"], line["hallucination_high"]) == (one.low, one.high)
    assert line["hallucination_high"] - line["hallucination_low"] > 1.5 * np.ptp(stats.wilson(8, 24)[1:])


# --- which utterances -----------------------------------------------------------------------------------------------------

RATES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=3, max_size=30)


@given(RATES, st.integers(0, 2**31), st.sampled_from(data_choice.CHOICES), st.data())
@settings(max_examples=80, deadline=None)
def test_choices_keep_what_they_say(values, seed, choice, data):
    rates, kinds = torch.tensor(values), [("long", "rare", "silence", "name")[k % 4] for k in range(len(values))]
    count = data.draw(st.integers(1, len(values)))
    chosen = data_choice.choose(choice, rates, kinds, count=count, generator=torch.Generator().manual_seed(seed))
    assert len(chosen) == len(set(chosen)) == count
    assert chosen == data_choice.choose(choice, rates, kinds, count=count, generator=torch.Generator().manual_seed(seed))
    held = [kinds[place] for place in chosen]
    assert held.count("silence") >= min(round(data_choice.SILENT_SHARE * count), kinds.count("silence"))
    worth = {"hard": rates, "middle": (rates - 0.5).abs()}.get(choice)
    spoken = [place for place in range(len(values)) if kinds[place] != "silence"]
    kept, left = ([place for place in spoken if (place in chosen) == own] for own in (True, False))
    if worth is not None and kept and left:
        assert worth[kept].max() <= worth[left].min()
    if left:  # a silence stands for nothing that could have been taken
        assert held.count("silence") <= round(data_choice.SILENT_SHARE * count)
    if choice == "middle_long":
        assert held.count("long") >= min(round(data_choice.LONG_SHARE * count), kinds.count("long"))


def test_choice_errors_and_facts():
    rates, random = torch.tensor([0.0, 0.5, 1.0, 0.5]), torch.Generator().manual_seed(0)
    kinds = ["rare", "long", "silence", "rare"]
    with pytest.raises(ValueError, match="unknown choice 'midle'; did you mean 'middle'"):
        data_choice.choose("midle", rates, kinds, count=1, generator=random)
    with pytest.raises(ValueError, match="count=5: 4 utterances were probed"):
        data_choice.choose("random", rates, kinds, count=5, generator=random)
    found = data_choice.facts(rates, kinds, [0, 1, 2])
    third = pytest.approx(1 / 3)
    assert found == {"utterances": 3, "pass_rate": 0.5, "always": third, "never": third, "between": third, "long": third,
                     "silent": third}  # fmt: skip


def test_overlap_of_choices():
    shares = data_choice.overlap({"a": [1, 2, 3, 4], "b": [3, 4]})
    assert shares == {"a": {"a": 1.0, "b": 0.5}, "b": {"a": 1.0, "b": 1.0}}


def test_of_recordings_the_long_ones_are_no_part_of_the_test(monkeypatch):
    clips = [np.zeros(1000 + 10 * k, np.int16) for k in range(9)]
    recordings = [Utterance(f"r{k}", "a", "recording", 0, "", 0, 0, (), None, 0) for k in range(9)]
    monkeypatch.setattr(data_choice, "open_speech", lambda *_, **__: SpeechCorpus(clips, recordings))
    for most, long in ((3, 3), (100, 4)):
        config = RecognitionConfig(eval_long=most, eval_silence=2)
        tests = data_choice.open_tests(config, SpeechConfig(speech_folder="x"), cache=None)
        ids = {name: {one.id for one in corpus.utterances} for name, corpus in tests.items()}
        assert ids["long"] == {f"r{k}" for k in range(9 - long, 9)} and len(ids["test"]) == 9 - long
        assert not ids["long"] & ids["test"] and len(ids["silence"]) == 2


def test_silences_are_silent_and_need_nothing_installed():
    quiet = data_choice.silences(3, "test", seed=1)
    assert quiet.texts == [""] * 3 and all(0.8 <= len(clip) / 16000 <= 4 for clip in quiet.audio)
    assert len(data_choice.silences(0, "test", seed=1)) == 0


def test_pass_rates_count_exact_samples(monkeypatch):
    corpus = tones.Tones(["red", "green blue", "", "seven"])
    said = {"red": ["Red!", "red", "blue", "red red"], "green blue": ["green blue"] * 4, "": ["", "a", "", ""], "seven": ["x"] * 4}
    order = []

    def inputs(clips):
        order.append(sorted(range(4), key=lambda place: len(corpus.audio[place])))
        return {}

    def decode(ids, mask):
        return [text for place in order[-1] for text in said[corpus.texts[place]]]

    stub = SimpleNamespace(model=None, inputs=inputs, decode=decode)
    monkeypatch.setattr(data_choice.token_policy, "sample", lambda *a, **k: SimpleNamespace(ids=None, mask=None))
    rates = data_choice.pass_rates(stub, corpus, range(4), samples=4, generator=torch.Generator())
    assert rates.tolist() == [0.5, 1.0, 0.75, 0.0]


def test_a_pool_of_recordings_has_long_ones_and_silences_and_leaves_the_start_its_own(monkeypatch):
    clips = [np.zeros(1000 + 10 * k, np.int16) for k in range(50)]
    recordings = [Utterance(f"r{k}", "a", "recording", 0, "", 0, 0, (), None, 0) for k in range(50)]
    corpus = SpeechCorpus(clips, recordings)

    def opened(speech, split, *, count=None, last=False, **_):
        places = range(50) if count is None else range(50 - count, 50) if last else range(count)
        return corpus.select(places)

    monkeypatch.setattr(data_choice, "open_speech", opened)
    config, speech = RecognitionConfig(probe_utterances=20, chosen=15, utterances_per_step=4), SpeechConfig(speech_folder="x")
    pool = data_choice.open_pool(config, speech, seed=0, cache=None)
    kinds = [one.kind for one in pool.utterances]
    assert len(pool) == 20 and kinds.count("silence") == 2 and kinds.count("long") == 6
    assert {one.id for one in pool.utterances if one.kind == "long"} == {f"r{k}" for k in range(44, 50)}
    rates, chosen = torch.full((20,), 0.5), {}
    for name in data_choice.CHOICES:
        chosen[name] = data_choice.choose(name, rates, kinds, count=15, generator=torch.Generator().manual_seed(0))
    long = {name: data_choice.facts(rates, kinds, places)["long"] for name, places in chosen.items()}
    assert long["middle_long"] == pytest.approx(5 / 15) and chosen["middle"] != chosen["middle_long"]
    left = {recordings[place].id for place in data_choice.left_by_the_pool(50, 20)}
    assert len(left) == 30 and not left & {one.id for one in pool.utterances}
    with pytest.raises(ValueError, match="holds 20 recordings for training, of which the choice of data takes probe_utterances=20"):
        data_choice.left_by_the_pool(20, 20)


def test_seeds_are_pooled_with_the_seed_as_second_level(tmp_path):
    """Rows of both notebooks over two seeds: the tables at the top are of all rows, not means of the seeds' tables."""
    def write(folder, name, rows):
        (folder / "metrics").mkdir(parents=True, exist_ok=True)
        rows.to_csv(folder / "metrics" / f"{name}.csv", index=False)

    told = {"texts": "held out", "words": 4, "pitch_right": 1.0, "rate_right": 0.0, "line": "x"}
    for seed, wrong in enumerate((0, 4)):
        rows = [invented_by(system, cases, part, seed) for system, cases in (("supervised", 6), ("grpo", wrong))
                for part in ("silence", "long")]  # fmt: skip
        write(tmp_path / f"seed{seed}", "asr_rows", errors.pd.concat(rows))
        spoken = [{"system": name, "seed": seed, "id": k, **told, "line": f"{k}", "errors_judge": wrong if name == "GRPO" else 4}
                  for name in ("supervised", "GRPO") for k in range(6)]  # fmt: skip
        write(tmp_path / f"seed{seed}", "tts_rows", errors.pd.DataFrame(spoken))
    seeds.summarise(tmp_path, 300)
    heard = versions.read_table(tmp_path / "metrics" / "asr_summary.csv").set_index(["system", "part"])
    assert heard.loc[("grpo", "silence"), ["n", "hallucinated", "seeds"]].tolist() == [12, 4, 2]
    assert heard.loc[("grpo", "silence"), "hallucination_change"] == pytest.approx(-8 / 12)
    table = versions.read_table(tmp_path / "metrics" / "tts_summary.csv").set_index("system")
    line = table.loc["GRPO"]
    assert (line["wer_judge"], line["wer_judge_low"], line["wer_judge_high"], line["seeds"]) == (0.5, 0.0, 1.0, 2)
    assert (line["change_judge"], line["change_judge_low"], line["change_judge_high"]) == (-0.5, -1.0, 0.0)
