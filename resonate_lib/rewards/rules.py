"""Rule-based rewards for transcripts: strings in, a float out, no model. Used by the speech notebooks.

All rules compare words after lower-casing, removing punctuation and joining runs of blanks.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

import jiwer


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation: "Don't stop!" -> ["dont", "stop"]."""
    kept = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P"))
    return kept.split()


def wer_reward(hypothesis: str, reference: str) -> float:
    """max(0, 1 − word error rate), in [0, 1]; with an empty reference 1 for an empty hypothesis, else 0."""
    said, asked = words(hypothesis), words(reference)
    if not asked:
        return float(not said)
    return max(0.0, 1.0 - jiwer.wer(" ".join(asked), " ".join(said)))


def keyword_f1(
    hypothesis: str, reference: str, keywords: Sequence[str], weights: Mapping[str, float] | None = None
) -> float:
    """F1 of the keywords (words or phrases) said against those asked, counted per occurrence, in [0, 1].

    weights: keyword -> weight (1 where not named). Where neither text holds a keyword, 1: nothing was asked or invented.
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
    """Share of the hypothesis' words with no counterpart in the reference, in [0, 1]; 0 when there is none.

    Words are matched as a multiset, so a loop ("yes yes yes" for "yes") and invented words both count, words left
    out or moved do not.
    """
    said, asked = Counter(words(hypothesis)), Counter(words(reference))
    total = said.total()
    return (said - asked).total() / total if total else 0.0
