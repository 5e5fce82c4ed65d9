"""How far rewards and judges agree with the truth, with themselves and with each other: on scenes whose captions are right or
wrong by construction, and on generated clips with the independent judge.

Pure numbers and tables, each number with its 95 % interval; what a judge is asked beside captions (noise, other wordings) is
in `probes.py`, the pictures are in `plots.py`. A reward may be any callable of `rewards.base.Reward`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch

from resonate_lib.evaluation import measures, stats
from resonate_lib.evaluation.judge import score_detections
from resonate_lib.rewards.base import RewardResult
from resonate_lib.rewards.lalm import published

TRUE = "true"
OTHER = "another clip's"
ALL = "all kinds"
CHUNK = 256  # clips heard at a time: 65 MB of sound at 4 s and 16 kHz, 450 MB at 10 s and 44.1 kHz


# ---- scores ------------------------------------------------------------


def score_captions(rewards: Mapping[str, object], corpus, *, wrong: Callable, seed: int = 0) -> pd.DataFrame:
    """Every clip of `corpus` against its true caption and each of its wrong ones, one row for each caption.

    wrong(record, rng) -> {kind: caption, or a record with `caption`}, as a world gives them (`worlds`). Columns: clip, kind
    ("true", or such as missing, replaced, swapped, count), truth (1 or 0), caption, then those of `score_rows`.
    """
    rng = np.random.default_rng([seed, 90])
    rows, asked = [], []
    for clip, record in enumerate(corpus.records):
        for kind, found in {TRUE: record, **wrong(record, rng)}.items():
            asked.append(found if isinstance(found, dict) else {"caption": found})
            rows.append({"clip": clip, "kind": kind, "truth": int(kind == TRUE), "caption": asked[-1]["caption"]})
    return score_rows(rewards, pd.DataFrame(rows), asked, corpus.waveforms, corpus.sample_rate)


def score_rows(
    rewards: Mapping[str, object], rows: pd.DataFrame, asked: list[dict], waveforms: Callable, sample_rate: int
) -> pd.DataFrame:
    """`rows` (clip, caption) with a column of scores for each reward, and `<reward>_yes_mass` where the reward gives
    `p_yes_mass` (the probability that yes and no hold together).

    waveforms(clips) -> (B, T); asked: a record for each row, the reward's metadata. CLAPs, and judges that can be asked any
    question, hear each clip once.
    """
    rows, clips, captions = rows.copy(), rows["clip"].tolist(), rows["caption"].tolist()
    parts = [slice(start, start + CHUNK) for start in range(0, len(rows), CHUNK)]
    for name, reward in rewards.items():
        if hasattr(reward, "embed_audio"):
            found = RewardResult(_cosines(reward, clips, captions, waveforms, sample_rate))
        elif hasattr(reward, "ask"):
            found = ask_all(reward, clips, published(captions), waveforms, sample_rate)
        else:
            results = [reward(waveforms(clips[part]), sample_rate, captions[part], asked[part]) for part in parts]
            found = RewardResult(torch.cat([result.scores for result in results]))
            if "p_yes_mass" in results[0].parts:
                found.parts["p_yes_mass"] = torch.cat([result.parts["p_yes_mass"] for result in results])
        rows[name] = found.scores.numpy()
        if "p_yes_mass" in found.parts:
            rows[f"{name}_yes_mass"] = found.parts["p_yes_mass"].numpy()
    return rows


def ask_all(judge, clips: Sequence[int], questions: Sequence[str], waveforms: Callable, sample_rate: int) -> RewardResult:
    """A judge's answers to Q questions in full, the i-th about clip clips[i]: scores (Q,) and, where it gives them, the part
    `p_yes_mass`. However many questions a clip has, it is heard once."""
    heard, place = np.unique(clips, return_inverse=True)
    scores, mass = torch.empty(len(questions)), torch.empty(len(questions))
    for start in range(0, len(heard), CHUNK):
        rows = np.flatnonzero((place >= start) & (place < start + CHUNK))
        rows = rows[np.argsort(place[rows], kind="stable")]  # a clip's questions side by side: they share a batch
        audio = waveforms(heard[start : start + CHUNK].tolist())
        found = judge.ask(audio, sample_rate, [questions[row] for row in rows], (place[rows] - start).tolist())
        scores[rows] = found.scores
        mass[rows] = found.parts.get("p_yes_mass", torch.full((len(rows),), torch.nan))
    return RewardResult(scores, {} if mass.isnan().all() else {"p_yes_mass": mass})


def _cosines(clap, clips: Sequence[int], captions: Sequence[str], waveforms: Callable, sample_rate: int) -> torch.Tensor:
    heard, sound = np.unique(clips, return_inverse=True)
    read, text = np.unique(captions, return_inverse=True)
    chunks = [slice(start, start + CHUNK) for start in range(0, len(clips), CHUNK)]
    sounds = torch.cat([clap.embed_audio(waveforms(heard[c].tolist()), sample_rate) for c in chunks if len(heard[c])])
    texts = torch.cat([clap.embed_text(read[c].tolist()) for c in chunks if len(read[c])])
    return (sounds[sound] * texts[text]).sum(-1)


def as_reward(judge) -> Callable:
    """The independent judge as a reward: `clip_quality` of what it hears, above 0.5 for an exact match alone.

    Its metadata are records with groups and relation; audio at the judge's 16 kHz. Neighbouring rows of one sound are heard once.
    """

    def quality(audio, sample_rate, prompts, metadata) -> RewardResult:
        new = torch.cat([torch.tensor([True]), (audio[1:] != audio[:-1]).any(1)])
        sound = new.cumsum(0) - 1
        counts, active = (found[sound] for found in judge.detect(audio[new]))
        return RewardResult(torch.from_numpy(clip_quality(score_detections(counts, active, metadata))).float())

    return quality


def clip_quality(judged: Mapping[str, object]) -> np.ndarray:
    """One number in [0, 1] a clip from what the judge heard: the mean of its event F1 and its exact match.

    judged: `Judge.score`'s dict. F1 alone would not see order; exact match alone would not see half a success.
    """
    tp, fp, fn, exact = (np.asarray(judged[name], float) for name in ("tp", "fp", "fn", "exact"))
    total = 2 * tp + fp + fn
    return 0.5 * np.divide(2 * tp, total, out=np.zeros_like(tp), where=total > 0) + 0.5 * exact


# ---- single numbers ------------------------------------------------------


def auc(scores, truth) -> float:
    """Probability that a true one scores above a false one, a tie counting half; nan when one side is empty.

    scores (M,); truth (M,) of 0 and 1. The Mann-Whitney statistic over the number of pairs.
    """
    return measures.once(measures.auc_of(scores, truth), len(scores))


def balanced_accuracy(scores, truth, threshold: float) -> float:
    """Half the share of true ones above `threshold` plus half the share of false ones at or below it."""
    return measures.once(measures.balanced_of(scores, truth, threshold), len(scores))


def kappa(a, b) -> float:
    """Cohen's kappa of two judges' answers (M,), 1 for yes: 0 is what chance gives, 1 the same answer always."""
    return measures.once(measures.kappa_of(np.asarray(a) > 0, np.asarray(b) > 0), len(a))


def best_threshold(scores, truth) -> float:
    """The threshold with the best balanced accuracy, midway between two neighbouring scores (of equally good ones the middle one);
    choose it on other data than it is used on."""
    values = np.unique(np.asarray(scores, float))
    candidates = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    reached = np.array([balanced_accuracy(scores, truth, value) for value in candidates])
    best = np.flatnonzero(reached == reached.max())
    return float(candidates[best[len(best) // 2]])


# ---- tables ------------------------------------------------------------


def accuracy_table(rows: pd.DataFrame, thresholds: Mapping[str, float], *, n: int = 2000) -> pd.DataFrame:
    """Per reward and kind of wrong caption: pairs (n), balanced_accuracy at the reward's threshold, auc, and pair_accuracy, the
    share of clips whose true caption scores above the false one (a tie counts half); each with _low and _high by resampling clips.

    rows from `score_captions`. A kind is scored on the clips that have it; "all kinds" pools them, but not captions swapped
    between clips where there are harder ones.
    """
    lines, pooled = [], near_misses(rows)
    kinds = [*sorted(pooled["kind"].unique()), ALL]
    if OTHER in set(rows["kind"]) - set(kinds):
        kinds.append(OTHER)
    for name, threshold in thresholds.items():
        right = rows[rows["kind"] == TRUE].set_index("clip")[name]
        for kind in kinds:
            wrong = pooled if kind == ALL else rows[rows["kind"] == kind]
            both = pd.concat([rows[(rows["kind"] == TRUE) & rows["clip"].isin(wrong["clip"])], wrong])
            true, other = right.loc[both["clip"]].to_numpy(), both[name].to_numpy()
            above = (true > other) + 0.5 * (true == other)
            wanted = {
                "balanced_accuracy": measures.balanced_of(both[name], both["truth"], threshold),
                "auc": measures.auc_of(both[name], both["truth"]),
                "pair_accuracy": measures.mean_of(np.where(both["truth"] > 0, np.nan, above)),
            }
            lines.append({"reward": name, "kind": kind, "n": len(wrong), **measures.over_clips(wanted, both["clip"], n=n)})
    return pd.DataFrame(lines)


def near_misses(rows: pd.DataFrame) -> pd.DataFrame:
    """The wrong captions that differ in one detail; where there are none (recordings), those of other clips."""
    near = rows[~rows["kind"].isin([TRUE, OTHER])]
    return near if len(near) else rows[rows["kind"] == OTHER]


def one_wrong_each(rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Every clip's true caption and one of its near misses at random: as many true as false. rows from `score_captions`."""
    chosen = near_misses(rows).groupby("clip").sample(n=1, random_state=seed)
    true = rows[(rows["kind"] == TRUE) & rows["clip"].isin(chosen["clip"])]
    return pd.concat([true, chosen]).sort_index()


def yes_table(rows: pd.DataFrame, thresholds: Mapping[str, float], *, n: int = 2000) -> pd.DataFrame:
    """Per reward and kind of row (a kind of caption or of sound): rows (n), share_yes, the share above the reward's threshold
    with Wilson's interval, and mean_score with a bootstrap interval. A clip stands once in each kind."""
    lines = []
    for name, threshold in thresholds.items():
        for kind, part in rows.groupby("kind", sort=False):
            yes = stats.wilson(int((part[name] > threshold).sum()), len(part))
            score = measures.over_clips({"mean_score": measures.mean_of(part[name])}, part["clip"], n=n)
            lines.append({"reward": name, "kind": kind, "n": len(part), **named("share_yes", yes), **score})
    return pd.DataFrame(lines)


def wording_table(rows: pd.DataFrame, *, n: int = 2000) -> pd.DataFrame:
    """Per reward and wording of the question: rows (n), balanced_accuracy at 0.5, auc, share_yes and yes_mass with intervals.

    rows from `probes.ask_wordings`. With as many true captions as false ones share_yes should be 0.5.
    """
    lines = []
    for (name, wording), part in rows.groupby(["reward", "wording"], sort=False):
        wanted = {
            "balanced_accuracy": measures.balanced_of(part["score"], part["truth"], 0.5),
            "auc": measures.auc_of(part["score"], part["truth"]),
            "share_yes": measures.mean_of(part["score"] > 0.5),
            "yes_mass": measures.mean_of(part["yes_mass"]),
        }
        lines.append({"reward": name, "wording": wording, "n": len(part), **measures.over_clips(wanted, part["clip"], n=n)})
    return pd.DataFrame(lines)


def reliability_table(rows: pd.DataFrame, names: Sequence[str], *, bins: int = measures.BINS, n: int = 2000) -> pd.DataFrame:
    """How often captions are true that a judge gives about the same probability: per reward and bin of equal counts, rows (n),
    mean_score with a bootstrap interval over clips, share_true with Wilson's. A calibrated judge has the two equal in every bin.

    rows: as many true as false (`one_wrong_each`); scores in [0, 1].
    """
    lines = []
    for name in names:
        place = measures.bins_of(rows[name], bins)
        for number, part in rows.groupby(place):
            share = stats.wilson(int(part["truth"].sum()), len(part))
            score = measures.over_clips({"mean_score": measures.mean_of(part[name])}, part["clip"], n=n)
            lines.append({"reward": name, "bin": number, "n": len(part), **score, **named("share_true", share)})
    return pd.DataFrame(lines)


def calibration_table(rows: pd.DataFrame, names: Sequence[str], *, n: int = 2000) -> pd.DataFrame:
    """Per reward: ece, the expected calibration error over those bins, and brier, the mean of (score - truth)^2, with intervals.

    ece is never 0, since bins are small: ece_chance is what 95 % of perfectly calibrated judges with these scores stay below, and
    ece_low allows for it (`measures.ece_floor`). A judge that always says one half has brier 0.25. rows: as for
    `reliability_table`.
    """
    lines = []
    for name in names:
        scores, truth = rows[name].to_numpy(float), rows["truth"].to_numpy(float)
        wanted = {"ece": measures.ece_of(scores, truth), "brier": measures.mean_of((scores - truth) ** 2)}
        found = measures.over_clips(wanted, rows["clip"], n=n)
        found["ece_low"], chance = measures.ece_floor(scores, truth)
        lines.append({"reward": name, "n": len(rows), "ece_chance": chance, **found})
    return pd.DataFrame(lines)


def agreement_table(
    scores: Mapping[str, Sequence[float]], groups: Sequence, thresholds: Mapping[str, float], *, n: int = 2000
) -> pd.DataFrame:
    """Each two (a, b) of several judges of the same M rows: spearman of their scores, kappa of their yes and no at the
    thresholds, alike (`sibling_agreement`, b's order being asked for); each with _low and _high by resampling groups.

    groups (M,): the clip whose captions, or the prompt whose siblings, the rows are. Columns after a and b: n, pairs.
    """
    lines = []
    for a, b in combinations(scores, 2):
        x, y = np.asarray(scores[a], float), np.asarray(scores[b], float)
        alike, pairs = sibling_agreement(x, y, groups, n=n)
        wanted = {"spearman": measures.spearman_of(x, y), "kappa": measures.kappa_of(x > thresholds[a], y > thresholds[b])}
        found = measures.over_clips(wanted, groups, n=n) | named("alike", alike)
        lines.append({"a": a, "b": b, "n": len(x), "pairs": pairs, **found})
    return pd.DataFrame(lines)


def sibling_agreement(scores, quality, group_ids: Sequence[int], *, n: int = 2000) -> tuple[stats.Interval, int]:
    """Share of pairs within a group in which the reward prefers the clip of higher quality (a tied reward counts half), with
    an interval from resampled groups, and how many pairs differ in quality. nan without such a pair. This is what group
    advantages learn from.
    """
    scores, quality = (np.asarray(values, float) for values in (scores, quality))
    groups = np.unique(np.asarray(group_ids), return_inverse=True)[1]
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    pairs = np.array([pair for rows in members for pair in combinations(rows, 2)], int).reshape(-1, 2)
    first, second = pairs[quality[pairs[:, 0]] != quality[pairs[:, 1]]].T
    right = np.sign(scores[first] - scores[second]) == np.sign(quality[first] - quality[second])
    won = np.where(scores[first] == scores[second], 0.5, right.astype(float))
    return stats.bootstrap_mean(won, groups[first], n=n), len(won)


def named(name: str, value: stats.Interval) -> dict[str, float]:
    """The three columns of an interval: {name, name_low, name_high}."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), value, strict=True))


def as_summary(table: pd.DataFrame, value: str = "pair_accuracy") -> pd.DataFrame:
    """A table with the columns that `plots.bars_with_intervals` draws: metric, mean, low and high instead of `value`'s three."""
    return table.rename(columns={value: "mean", f"{value}_low": "low", f"{value}_high": "high"}).assign(metric=value)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A table for the eye: each number that has an interval in one cell with it, "0.52 [0.48, 0.56]"."""
    shown = table.copy()
    for name in [name for name in table if f"{name}_low" in table]:
        ends = [name, f"{name}_low", f"{name}_high"]
        shown[name] = [_cell(*values) for values in table[ends].astype(float).to_numpy()]
        shown = shown.drop(columns=ends[1:])
    return shown


def _cell(mean: float, low: float, high: float) -> str:
    if not np.isfinite(mean):
        return "–"
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]" if np.isfinite(low) else f"{mean:.2f} [no interval]"
