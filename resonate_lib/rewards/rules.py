"""Rule-based rewards for transcripts: strings in, a float out, no model. Used by the speech notebooks.

All rules compare words after lower-casing, removing punctuation and joining runs of blanks. Rewards and penalties lie in [0, 1];
`transcript_reward` adds them up, rewards with positive and penalties with negative weights, so that no hypothesis scores more than
the reference itself; it compares both as `spoken` writes them. Text in any script is compared as it stands; an empty text is no
words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jiwer

from resonate_lib.data.speech_grammar import DIGITS, number_words
from resonate_lib.knobs import unknown


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation: "Don't stop!" -> ["dont", "stop"]."""
    kept = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P"))
    return kept.split()


def spoken(text: str) -> str:
    """The text as words alone, numbers as they are said: "Dial 5529, 25%!" -> "dial five five two nine twenty five percent".

    Up to three digits in a row are a number; more, also in groups with hyphens (555-1234) or with a thousands' comma (5,529), are
    said digit by digit. Hyphens between words are blanks, % is percent, + plus, ° degrees, $300 three hundred dollars; other
    symbols are left out. Words that are spelled out stay, so a text that is words already does not change.
    """
    text = re.sub(r"(?<=\d)[-\u2010-\u2013](?=\d)|(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"\$ ?([0-9]+(?:\.[0-9]+)?)", r"\1 dollars", text)
    text = re.sub(r"[0-9]+", lambda run: f" {_say_digits(run[0])} ", text)
    for sign, said in (("%", " percent "), ("+", " plus "), ("\u00b0", " degrees ")):
        text = text.replace(sign, said)
    text = "".join(" " if unicodedata.category(c).startswith("S") else c for c in text)
    return " ".join(words(re.sub(r"[-\u2010-\u2014:/]", " ", text)))


def _say_digits(run: str) -> str:
    return number_words(int(run)) if len(run) <= 3 else " ".join(DIGITS[int(digit)] for digit in run)


def wer_reward(hypothesis: str, reference: str) -> float:
    """max(0, 1 − (S + D + I) / N): S words replaced, D left out, I put in, of the reference's N; in [0, 1].

    "call hanna" for "call anna now": one replaced, one left out, of three, 1/3. An empty reference: 1 for an empty hypothesis,
    else 0.
    """
    said, asked = words(hypothesis), words(reference)
    if not asked:
        return float(not said)
    return max(0.0, 1.0 - jiwer.wer(" ".join(asked), " ".join(said)))


def keyword_f1(
    hypothesis: str, reference: str, keywords: Sequence[str], weights: Mapping[str, float] | None = None
) -> float:
    """F1 of the keywords (words or phrases) said against those asked, counted per occurrence, in [0, 1]:
    2 Σ w min(n, m) / Σ w (n + m) over the keywords, said n and asked m times, with weights w.

    "anna has a penguin" for "anna has a zebra", keywords anna and zebra: 2 · 1 / (1 + 2) = 0.67; with weight 3 for zebra
    2 · 1 / (1 + 4) = 0.4. weights: keyword -> weight (1 where not named). Where neither text holds a keyword, 1: nothing was asked
    or invented.
    """
    weights = weights or {}
    said = asked = both = 0.0
    for keyword in dict.fromkeys(" ".join(words(k)) for k in keywords):
        weight = next((w for k, w in weights.items() if " ".join(words(k)) == keyword), 1.0)
        in_said, in_asked = _occurrences(keyword, hypothesis), _occurrences(keyword, reference)
        said, asked, both = said + weight * in_said, asked + weight * in_asked, both + weight * min(in_said, in_asked)
    return 2.0 * both / (said + asked) if said + asked > 0 else 1.0


def _occurrences(phrase: str, text: str) -> int:
    if not phrase:
        raise ValueError("keywords holds an empty keyword: give words or phrases")
    target, heard = phrase.split(), words(text)
    return sum(heard[i : i + len(target)] == target for i in range(len(heard) - len(target) + 1))


def hallucination_penalty(hypothesis: str, reference: str) -> float:
    """Share of the hypothesis' words with no counterpart in the reference, in [0, 1]; 0 when there is none:
    Σ max(0, n − m) / Σ n over the words, said n and asked m times.

    "call anna in rome" for "call anna": two of four, 0.5. Words are matched as a multiset, so a loop ("yes yes yes" for "yes":
    0.67) and invented words both count, words left out or moved do not.
    """
    said, asked = Counter(words(hypothesis)), Counter(words(reference))
    total = said.total()
    return (said - asked).total() / total if total else 0.0


def cer_reward(hypothesis: str, reference: str) -> float:
    """max(0, 1 − character error rate), in [0, 1], over the words joined by single blanks; empty reference as `wer_reward`.

    "call ana" for "call anna": 1 edit of 9 characters, 0.89, where wer_reward gives 0.5.
    """
    said, asked = " ".join(words(hypothesis)), " ".join(words(reference))
    if not asked:
        return float(not said)
    return max(0.0, 1.0 - jiwer.cer(asked, said))


def exact_reward(hypothesis: str, reference: str) -> float:
    """1 where the words are the same in the same order, else 0: "Call Anna!" for "call anna" gives 1, "call call anna" 0."""
    return float(words(hypothesis) == words(reference))


def length_ratio_penalty(hypothesis: str, reference: str) -> float:
    """1 − min(n, m) / max(n, m) of n words said and m asked, in [0, 1]; 0 where both are empty.

    Half of a sentence and one said twice give 0.5 each, an empty hypothesis and any words over silence 1.
    """
    said, asked = len(words(hypothesis)), len(words(reference))
    return 1.0 - min(said, asked) / max(said, asked) if said or asked else 0.0


def repeat_penalty(hypothesis: str, reference: str = "", *, n: int = 2) -> float:
    """Share of the hypothesis' n-grams that are repeats beyond what the reference repeats, in [0, 1):
    sum over n-grams g of max(0, count(g, hypothesis) − max(1, count(g, reference))) / number of n-grams said.

    "yes yes yes yes" for "yes": the pair "yes yes" thrice, two of three are repeats, 0.67. "dial five five five" for itself: 0.
    Fewer than n words hold none: 0. ValueError for n under 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: n-grams of 1 word or more repeat")
    said, asked = _ngrams(hypothesis, n), _ngrams(reference, n)
    extra = sum(max(0, count - max(1, asked[gram])) for gram, count in said.items())
    return extra / said.total() if said else 0.0


def _ngrams(text: str, n: int) -> Counter:
    heard = words(text)
    return Counter(tuple(heard[i : i + n]) for i in range(len(heard) - n + 1))


def insertion_penalty(hypothesis: str, reference: str) -> float:
    """n / (n + 1) of n words said over silence (an empty reference), in [0, 1); 0 where something was to be said.

    One word over silence gives 0.5, three give 0.75: unlike in `hallucination_penalty`, which is 1 for both, fewer is better.
    """
    said = len(words(hypothesis))
    return said / (said + 1) if not words(reference) else 0.0


def format_reward(hypothesis: str, reference: str = "") -> float:
    """1 where the hypothesis is a bare transcript, else 0: empty, or words of letters and apostrophes with single blanks between.

    "call anna" gives 1; "Transcript: call anna", "call 2 anna", "<|en|> call" and " call" give 0, whatever the reference is.
    """
    return float(re.fullmatch(r"(?:(?:[^\W\d_]|['\u2019])+(?: (?:[^\W\d_]|['\u2019])+)*)?", hypothesis) is not None)


REWARDS: dict[str, Callable[[str, str], float]] = {
    "wer": wer_reward, "cer": cer_reward, "exact": exact_reward, "format": format_reward,
}  # fmt: skip
PENALTIES: dict[str, Callable[[str, str], float]] = {
    "hallucination": hallucination_penalty, "length": length_ratio_penalty, "repeat": repeat_penalty,
    "insertion": insertion_penalty,
}  # fmt: skip
NAMES = (*REWARDS, "keyword", *PENALTIES)


def parse_weights(spec: str) -> dict[str, float]:
    """A sum of rules as a configuration writes it: "wer+0.5*keyword-0.5*hallucination" -> {"wer": 1, "keyword": 0.5,
    "hallucination": -0.5}. ValueError says what is wrong with it."""
    bare = "".join(spec.split())
    terms = re.findall(r"([+-]?)(?:([0-9.]+(?:e-?[0-9]+)?)\*)?([A-Za-z_]\w*)", bare)
    if not terms or "".join(f"{sign}{weight}{'*' if weight else ''}{name}" for sign, weight, name in terms) != bare:
        raise ValueError(f"rules={spec!r}: write a sum such as 'wer+0.5*keyword-0.5*hallucination'")
    if len({name for _, _, name in terms}) < len(terms):
        raise ValueError(f"rules={spec!r}: name each rule once")
    try:
        weights = {name: float(f"{sign}{weight or 1}") for sign, weight, name in terms}
    except ValueError:
        raise ValueError(f"rules={spec!r}: a weight is not a number; write one such as 0.5") from None
    check_weights(weights)
    return weights


def check_weights(weights: Mapping[str, float]) -> None:
    """ValueError for no rule, a name that is none of NAMES, and a weight of the wrong sign."""
    if not weights:
        raise ValueError(f"no rules: name some of {', '.join(NAMES)}")
    for name, weight in weights.items():
        if name not in NAMES:
            raise ValueError(unknown("rule", name, NAMES))
        if (weight > 0) == (name in PENALTIES) and weight != 0:
            kind, sign = ("penalty", "negative") if name in PENALTIES else ("reward", "positive")
            raise ValueError(f"{weight:g}*{name}: {name} is a {kind}; give it a {sign} weight, or a wrong transcript would pay")


def transcript_reward(
    hypothesis: str,
    reference: str,
    *,
    weights: Mapping[str, float],
    keywords: Sequence[str] = (),
    keyword_weights: Mapping[str, float] | None = None,
) -> tuple[float, dict[str, float]]:
    """The weighted sum of rules, and each rule's own value: sum over names of weights[name] · rule(hypothesis, reference).

    Both are compared as `spoken` writes them, so that "dial 5" is right for "dial five"; "format" alone sees the hypothesis as it
    is. A reference in plain words is its own best hypothesis.
    weights: of NAMES, as `parse_weights` reads them; positive for rewards, negative for penalties. keywords, keyword_weights: of
    `keyword_f1`, the rule "keyword". "call bob" for "call anna", weights wer 1 and hallucination −0.5: 0.5 − 0.5 · 0.5 = 0.25.
    """
    check_weights(weights)
    said, asked = spoken(hypothesis), spoken(reference)
    parts = {name: keyword_f1(said, asked, keywords, keyword_weights) if name == "keyword"
             else (REWARDS | PENALTIES)[name](hypothesis if name == "format" else said, asked) for name in weights}  # fmt: skip
    return sum(weights[name] * value for name, value in parts.items()), parts
