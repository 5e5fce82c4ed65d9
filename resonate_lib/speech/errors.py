"""How transcripts differ from what was said: word errors, a stated rule for hallucination, and tables with their intervals.

WER is the sum of word errors over the sum of reference words. Texts are compared as `rules.spoken` writes them: digits, hyphens and
signs as words, on both sides. No reward is computed here: this is what judges.
"""

from __future__ import annotations

from collections.abc import Sequence

import jiwer
import numpy as np
import pandas as pd

from resonate_lib.evaluation import stats
from resonate_lib.rewards.rules import spoken

LONGEST_LOOP = 4  # words in what may be said over and over
JOINT = {  # parts that are judged as one as well: where words are invented, where something is said, everything
    "silence and long": ("silence", "long"), "test and long": ("test", "long"), "all": ("test", "silence", "long"),
}  # fmt: skip
TIMES = 3  # in a row make a loop
INSERTED, SHARE = 2, 0.1  # inserted words, and their share of the reference's, from which on text is invented
COUNTS = ("words", "errors", "substitutions", "deletions", "insertions")


def words(text: str) -> list[str]:
    """The words of a text as they are spoken: "Dial 5!" -> ["dial", "five"]."""
    return spoken(text).split()


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
    """A line for each system and part, those of `with_joint` included: utterances, WER with its bootstrap interval, its
    paired change against `base` (same utterances) in words and as a share of base's WER, both with intervals, the share of exact
    transcripts, and the hallucination rate with its interval and its paired change. WER is nan where nothing was said.

    rows: of `judge`, one seed or several. Whole utterances are resampled, with several seeds these too; the rate of one seed has
    Wilson's interval. The share is that of all errors over base's errors in the same words; nan where base makes none.
    """
    rows, lines = with_joint(rows), []
    for (system, part), own in rows.groupby(["system", "part"], sort=False):
        asked = rows[(rows["system"] == base) & (rows["part"] == part)]
        line = {"system": system, "part": part, "n": len(own), "words": int(own["words"].sum()), "seeds": own["seed"].nunique()}
        if line["words"]:
            line |= stats.bootstrap_ratio(own["errors"], own["words"], own["id"], seeds=own["seed"], n=n).columns("wer")
        paired = own.merge(asked, on=["id", "seed"], suffixes=("", "_base")) if system != base and len(asked) else None
        if line["words"] and paired is not None:
            errors, words_said, before, words_before = (paired[name] for name in ("errors", "words", "errors_base", "words_base"))
            both = paired["id"], paired["seed"]
            line |= stats.paired_ratio(errors, words_said, before, words_before, *both, n=n).columns("wer_change")
            line |= stats.paired_ratio(errors, before, before, before, *both, n=n).columns("wer_relative")
        line["exact"] = own["exact"].mean()
        lines.append(line | _invented(own, paired, n))
    return pd.DataFrame(lines)


def with_joint(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, and those of the parts of each of JOINT once more as one part, where there are all of them; in "all" words that are
    written over silence count as errors, beside the words of the others."""
    made = [rows]
    for name, parts in JOINT.items():
        own = rows[rows["part"].isin(parts)]
        if own["part"].nunique() == len(parts):
            made.append(own.assign(part=name, id=own["part"] + " " + own["id"]))  # ids of two parts may be the same
    return pd.concat(made, ignore_index=True)


def compared(
    rows: pd.DataFrame, pairs: Sequence[tuple[str, str]], *, top: str, bottom: str | None = None, group: str = "id", n: int = 4000
) -> pd.DataFrame:
    """A row for each pair (a, b) of systems: sum(top) / sum(bottom) (None: the mean of top) of a less that of b, over the rows of
    the same id and seed, with its interval, its p, and p as Holm corrects it for the pairs of this table.

    group: the column whose values are resampled as a whole; with several seeds these are, too.
    """
    table = []
    for one, other in pairs:
        left, right = (rows[rows["system"] == name] for name in (one, other))
        both = left.merge(right, on=["id", "seed"], suffixes=("", "_other"))
        ones = np.ones(len(both))
        sums = [both[name] if name else ones for name in (top, bottom, f"{top}_other", bottom and f"{bottom}_other")]
        found = stats.compare(*sums, both[group], both["seed"], n=n)
        table.append({"system": one, "against": other, "pairs": len(both), **found.gain.columns("change"), "p": found.p})
    return pd.DataFrame(table).assign(p_holm=lambda made: stats.holm(made["p"]))


def _invented(own: pd.DataFrame, paired: pd.DataFrame | None, n: int) -> dict[str, float]:
    """The columns of hallucination: cases, their rate with its interval, and its change where there is a base to pair with."""
    cases = int(own["hallucinated"].sum())
    rate = stats.wilson(cases, len(own))
    if own["seed"].nunique() > 1:
        rate = stats.bootstrap_mean(own["hallucinated"], own["id"], seeds=own["seed"], n=n)
    line = {"hallucinated": cases} | rate.columns("hallucination")
    if paired is not None:
        sides = paired["hallucinated"], paired["hallucinated_base"]
        line |= stats.paired_bootstrap(*sides, paired["id"], paired["seed"], n=n).columns("hallucination_change")
    return line
