"""Rules for transcripts: known answers by hand, and properties that must hold for any text (hypothesis)."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resonate_lib.rewards import rules

WORDS = st.lists(st.sampled_from(["call", "anna", "five", "the", "zebra", "don't", "in", "größe", "café"]), max_size=8)
TEXTS = WORDS.map(" ".join)
ANY = st.text(max_size=40)
PAIRED = {**rules.REWARDS, **rules.PENALTIES, "keyword": lambda h, r: rules.keyword_f1(h, r, ["anna", "zebra"], {"zebra": 3.0})}
WEIGHTS = {"wer": 1.0, "cer": 0.3, "exact": 0.5, "keyword": 0.5, "format": 0.2, "hallucination": -0.5, "length": -0.3,
           "repeat": -0.4, "insertion": -0.7}  # fmt: skip


def total(hypothesis, reference, weights=WEIGHTS):
    return rules.transcript_reward(
        hypothesis, reference, weights=weights, keywords=["anna", "zebra"], keyword_weights={"zebra": 3.0}
    )[0]


@settings(max_examples=150, deadline=None)
@given(st.one_of(ANY, TEXTS), st.one_of(ANY, TEXTS))
def test_every_rule_lies_between_0_and_1(hypothesis, reference):
    for name, rule in PAIRED.items():
        assert 0.0 <= rule(hypothesis, reference) <= 1.0, name


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS)
def test_the_reference_itself_is_the_best_hypothesis(hypothesis, reference):
    assert total(reference, reference) >= total(hypothesis, reference) - 1e-12
    if reference.split() != hypothesis.split():
        assert total(reference, reference) > total(hypothesis, reference)


@settings(max_examples=100, deadline=None)
@given(WORDS.filter(bool), st.integers(3, 12))
def test_empty_and_looping_hypotheses_score_low(said, times):
    reference = " ".join(said)
    looped = " ".join([reference] * times)
    whole, empty, loop = total(reference, reference), total("", reference), total(looped, reference)
    assert whole == pytest.approx(1.0 + 0.3 + 0.5 + 0.5 + 0.2)
    assert empty <= 0.5 + 0.2 - 0.3 + 1e-12 and loop < whole - 1.5  # the keyword rule is 1 where nothing was asked
    assert rules.wer_reward(looped, reference) == 0.0 and rules.length_ratio_penalty(looped, reference) >= 0.6


def edits(a, b):
    """Levenshtein distance by dynamic programming."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@settings(max_examples=100, deadline=None)
@given(TEXTS, TEXTS.filter(bool))
def test_wer_and_cer_are_edit_distances(hypothesis, reference):
    said, asked = rules.words(hypothesis), rules.words(reference)
    assert rules.wer_reward(hypothesis, reference) == pytest.approx(max(0, 1 - edits(said, asked) / len(asked)))
    letters = " ".join(asked)
    assert rules.cer_reward(hypothesis, reference) == pytest.approx(max(0, 1 - edits(" ".join(said), letters) / len(letters)))


def test_cer_and_exact():
    assert rules.cer_reward("call ana", "call anna") == pytest.approx(8 / 9)
    assert rules.cer_reward("", "anna") == 0.0 == rules.cer_reward("hm", "") and rules.cer_reward("", "") == 1.0
    assert rules.exact_reward("Call Anna!", "call anna") == 1.0 and rules.exact_reward("call call anna", "call anna") == 0.0
    assert rules.exact_reward("", "...") == 1.0


def test_length_ratio_penalty():
    assert rules.length_ratio_penalty("a b", "a b c d") == 0.5 == rules.length_ratio_penalty("a b c d", "a b")
    assert rules.length_ratio_penalty("x y", "a b") == 0.0 == rules.length_ratio_penalty("", "")
    assert rules.length_ratio_penalty("", "a") == 1.0 == rules.length_ratio_penalty("a", "")


def test_repeat_penalty_counts_what_the_reference_does_not_repeat():
    assert rules.repeat_penalty("yes yes yes yes", "yes") == pytest.approx(2 / 3)
    assert rules.repeat_penalty("dial five five five", "dial five five five") == 0.0
    assert rules.repeat_penalty("call anna call anna call anna") == pytest.approx(3 / 5)
    assert rules.repeat_penalty("yes", "") == 0.0 == rules.repeat_penalty("", "")
    assert rules.repeat_penalty("yes yes yes", n=1) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="n=0"):
        rules.repeat_penalty("a", "a", n=0)


def test_insertion_penalty_is_about_silence_alone():
    assert rules.insertion_penalty("thank you so", "") == 0.75 and rules.insertion_penalty("hm", " . ") == 0.5
    assert rules.insertion_penalty("", "") == 0.0 == rules.insertion_penalty("many more words", "one")


@pytest.mark.parametrize("text", ["", "call anna", "don't stop", "größe", "Call Anna"])
def test_format_reward_of_bare_transcripts(text):
    assert rules.format_reward(text) == 1.0


@pytest.mark.parametrize(
    "text", ["Transcript: call", "call 2 anna", "<|en|> call", " call", "call  anna", "call anna.", "call\nanna", "a_b"]
)
def test_format_reward_of_anything_else(text):
    assert rules.format_reward(text) == 0.0


@pytest.mark.parametrize(("written", "said"), [
    ("Dial 5529.", "dial five five two nine"), ("dial 555-1234", "dial five five five one two three four"),
    ("Room 342", "room three hundred forty two"), ("set it to 25%", "set it to twenty five percent"),
    ("What is 12 + 40?", "what is twelve plus forty"), ("twenty-five", "twenty five"), ("0 and 100", "zero and one hundred"),
    ("at 7:30", "at seven thirty"), ("", ""), ("...", ""), ("Don't", "dont"), ("5, 5, 2", "five five two"),
    ("It is $300!", "it is three hundred dollars"), ("$ 5,529", "five five two nine dollars"), ("20° now", "twenty degrees now"),
    ("5,529", "five five two nine"), ("1,234,567 and 1,23", "one two three four five six seven and one twenty three"),
    ("2 + 2 = 4", "two plus two four"), ("$ and € ~ now", "and now"),
])  # fmt: skip
def test_spoken(written, said):
    assert rules.spoken(written) == said


@settings(max_examples=150, deadline=None)
@given(ANY)
def test_what_is_spoken_once_stays(text):
    once = rules.spoken(text)
    assert rules.spoken(once) == once and rules.words(once) == once.split()


def test_a_sum_of_rules_is_read_and_added():
    weights = rules.parse_weights("wer + 0.5*keyword-0.5*hallucination")
    assert weights == {"wer": 1.0, "keyword": 0.5, "hallucination": -0.5}
    score, parts = rules.transcript_reward("call bob", "call anna", weights=weights, keywords=["anna"])
    assert parts == {"wer": 0.5, "keyword": 0.0, "hallucination": 0.5} and score == pytest.approx(0.25)
    assert rules.parse_weights("-1e-2*repeat+exact") == {"repeat": -0.01, "exact": 1.0}


def test_both_texts_are_compared_as_they_are_spoken_and_format_as_written():
    weights = {"wer": 1.0, "exact": 1.0, "format": 1.0}
    score, parts = rules.transcript_reward("Dial 5, twenty-five!", "dial five 25", weights=weights)
    assert score == 2.0 and parts == {"wer": 1.0, "exact": 1.0, "format": 0.0}


def test_examples_of_the_docstrings():
    assert rules.wer_reward("call hanna", "call anna now") == pytest.approx(1 / 3)
    said = "anna has a penguin", "anna has a zebra", ["anna", "zebra"]
    assert rules.keyword_f1(*said) == pytest.approx(2 / 3) and rules.keyword_f1(*said, {"zebra": 3.0}) == pytest.approx(0.4)
    assert rules.hallucination_penalty("call anna in rome", "call anna") == 0.5
    assert rules.hallucination_penalty("yes yes yes", "yes") == pytest.approx(2 / 3)


def test_rare_words_weigh_more_where_told():
    scores = [total(said, "anna has a zebra", {"keyword": 1.0}) for said in ("anna has a penguin", "emma has a zebra")]
    assert scores == [pytest.approx(2 / 5), pytest.approx(6 / 7)]


@pytest.mark.parametrize(("spec", "said"), [
    ("", "write a sum"), ("wer+", "write a sum"), ("wer*2", "write a sum"), ("2*", "write a sum"), ("wer+wer", "each rule once"),
    ("wed", "did you mean 'wer'"), ("hallucination", "give it a negative weight"), ("-wer", "give it a positive weight"),
    ("1.2.3*wer", "not a number"), ("wer cer", "unknown rule"),
])  # fmt: skip
def test_a_bad_sum_is_one_clear_line(spec, said):
    with pytest.raises(ValueError, match=said.replace("*", r"\*")) as error:
        rules.parse_weights(spec)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no rules"):
        rules.transcript_reward("a", "a", weights={})


def test_each_rule_can_be_named_by_itself():
    for name, (hypothesis, reference) in itertools.product(rules.NAMES, [("a b", "a"), ("", ""), ("ä", "日本")]):
        sign = "-" if name in rules.PENALTIES else ""
        score, parts = rules.transcript_reward(hypothesis, reference, weights=rules.parse_weights(sign + name))
        assert set(parts) == {name} and abs(score) == parts[name]
