"""How transcripts differ from what was said: word errors, a stated rule for hallucination, and tables with their intervals.

WER is the sum of word errors over the sum of reference words. No reward is computed here: this is what judges.
"""

from __future__ import annotations

from collections.abc import Sequence

import jiwer
import pandas as pd

from resonate_lib.evaluation import stats
from resonate_lib.rewards.rules import words

LONGEST_LOOP = 4  # words in what may be said over and over
TOGETHER = ("silence", "long")  # parts that are judged as one as well: where words are invented
TIMES = 3  # in a row make a loop
INSERTED, SHARE = 2, 0.1  # inserted words, and their share of the reference's, from which on text is invented
COUNTS = ("words", "errors", "substitutions", "deletions", "insertions")


def word_errors(hypothesis: str, reference: str) -> dict[str, int]:
    """COUNTS: words of the reference, and what the shortest edit substitutes, deletes and inserts. Empty texts count too."""
    said, asked = words(hypothesis), words(reference)
    if not asked:  # which jiwer refuses
        return dict(zip(COUNTS, (0, len(said), 0, 0, len(said)), strict=True))
    found = jiwer.process_words(" ".join(asked), " ".join(said))
    parts = found.substitutions, found.deletions, found.insertions
    return dict(zip(COUNTS, (len(asked), sum(parts), *parts), strict=True))


def longest_run(text: str) -> int:
    """The most times in a row that any 1 to LONGEST_LOOP words are said: 3 for "so it it it is", 0 for no words."""
    said = words(text)
    best = min(len(said), 1)
    for size in range(1, LONGEST_LOOP + 1):
        same = 0
        for place in range(size, len(said)):
            same = same + 1 if said[place] == said[place - size] else 0
            best = max(best, same // size + 1)
    return best


def is_loop(hypothesis: str, reference: str) -> bool:
    """Whether 1 to LONGEST_LOOP words are said TIMES or more in a row, and more often than in the reference."""
    run = longest_run(hypothesis)
    return run >= TIMES and run > longest_run(reference)


def hallucinates(hypothesis: str, reference: str) -> bool:
    """The rule that rates are counted by: over silence (an empty reference) any word; else a loop, or at least INSERTED inserted
    words that make up SHARE of the reference's or more."""
    if not words(reference):
        return bool(words(hypothesis))
    found = word_errors(hypothesis, reference)
    return is_loop(hypothesis, reference) or found["insertions"] >= max(INSERTED, SHARE * found["words"])


def judge(utterances: Sequence, hypotheses: Sequence[str], *, system: str, part: str, seed: int = 0) -> pd.DataFrame:
    """A row for every utterance: what was said and written, `word_errors`, whether it is exact, and `hallucinates`.

    utterances: with id, kind, voice, text. part: the set they belong to, such as "test". ValueError where numbers differ.
    """
    if len(utterances) != len(hypotheses):
        raise ValueError(f"{len(hypotheses)} transcripts of {len(utterances)} utterances: give one for each")
    rows = []
    for one, said in zip(utterances, hypotheses, strict=True):
        row = {"system": system, "part": part, "seed": seed, "id": one.id, "kind": one.kind, "voice": one.voice}
        row |= {"reference": one.text, "hypothesis": said, **word_errors(said, one.text)}
        rows.append(row | {"exact": words(said) == words(one.text), "hallucinated": hallucinates(said, one.text)})
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame, *, base: str, n: int = 2000) -> pd.DataFrame:
    """A line for each system and part, and one for the parts of TOGETHER as one: utterances, WER with its bootstrap interval over
    utterances, its paired change against `base` (same utterances) and that as a share of base's WER, the share of exact
    transcripts, and the hallucination rate with its interval and its paired change. WER is nan where nothing was said.

    rows: of `judge`, one seed or several. Whole utterances are resampled; the rate of one seed has Wilson's interval.
    """
    both = rows[rows["part"].isin(TOGETHER)]
    if both["part"].nunique() == len(TOGETHER):  # ids of two parts may be the same
        rows = pd.concat([rows, both.assign(part=" and ".join(TOGETHER), id=both["part"] + " " + both["id"])], ignore_index=True)
    lines = []
    for (system, part), own in rows.groupby(["system", "part"], sort=False):
        asked = rows[(rows["system"] == base) & (rows["part"] == part)]
        line = {"system": system, "part": part, "n": len(own), "words": int(own["words"].sum())}
        if line["words"]:
            line |= stats.bootstrap_ratio(own["errors"], own["words"], own["id"], n=n).columns("wer")
        paired = own.merge(asked, on=["id", "seed"], suffixes=("", "_base")) if system != base and len(asked) else None
        if line["words"] and paired is not None:
            columns = [paired[name] for name in ("errors", "words", "errors_base", "words_base", "id")]
            change = stats.paired_ratio(*columns, n=n)
            line |= change.columns("wer_change")
            line["wer_relative"] = change.mean / max(asked["errors"].sum() / asked["words"].sum(), 1e-9)
        line["exact"] = own["exact"].mean()
        lines.append(line | _invented(own, paired, n))
    return pd.DataFrame(lines)


def _invented(own: pd.DataFrame, paired: pd.DataFrame | None, n: int) -> dict[str, float]:
    """The columns of hallucination: cases, their rate with its interval, and its change where there is a base to pair with."""
    cases = int(own["hallucinated"].sum())
    rate = stats.wilson(cases, len(own)) if own["id"].is_unique else stats.bootstrap_mean(own["hallucinated"], own["id"], n=n)
    line = {"hallucinated": cases} | rate.columns("hallucination")
    if paired is not None:
        change = stats.paired_bootstrap(paired["hallucinated"], paired["hallucinated_base"], paired["id"], n=n)
        line |= change.columns("hallucination_change")
    return line
