"""What the benchmark's rows say: the headline table with paired gains, breakdowns, sentences from the intervals.

Rows come from `ttabench.evaluate` and `ttabench.score_clips`; metrics and their intervals live in `metrics.py` and
`stats.py`, text for eyes, Markdown and LaTeX in `tables.py`. Nothing here is hard coded: other rows give other sentences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd

from resonate_lib.evaluation import metrics, stats
from resonate_lib.evaluation.tables import to_latex, to_markdown, with_intervals

__all__ = [
    "BASE",
    "BY_REWARD",
    "NO_VERDICT",
    "OFFLINE",
    "ONLINE",
    "ORIGINALS",
    "Claim",
    "by_count_and_relation",
    "by_kind",
    "claims",
    "compared",
    "corrected",
    "headline_table",
    "paired",
    "power_note",
    "readable",
    "to_latex",
    "to_markdown",
    "with_intervals",
    "words",
]  # what writes tables belongs to them, so it is reached from here too

PAIR = ["setting", "seed", "id", "sample"]
BASE, OFFLINE = "base", ("DPO",)
ONLINE = ("GRPO (CLAP)", "GRPO (LALM)", "GRPO (LALM, fine)", "GRPO (NFT's reward)", "DiffRO", "NFT")
BY_REWARD = (("GRPO (LALM)", "GRPO (CLAP)"),)  # one algorithm, the LALM's reward and CLAP's
ORIGINALS = "originals"
NO_VERDICT = "By the training reward, which is no independent verdict (no lalm_eval, no clap_eval)."


def paired(
    rows: pd.DataFrame, a: str, b: str, *, metric: str = "exact", n: int = 2000, seed: int = 0
) -> stats.Interval:
    """System a minus system b in one setting, paired by seed, prompt and sample, with a 95 % interval."""
    return compared(rows, a, b, metric=metric, n=n, seed=seed).gain


def compared(
    rows: pd.DataFrame, a: str, b: str, *, metric: str = "exact", n: int = 2000, seed: int = 0
) -> stats.Comparison:
    """System a against system b in one setting, paired by seed, prompt and sample. ValueError where they share no clip."""
    sides = [rows[rows["system"] == system].set_index(PAIR) for system in (a, b)]
    for system, side in zip((a, b), sides, strict=True):
        if not side.index.is_unique:
            raise ValueError(
                f"system {system!r} has two rows for one prompt, sample and seed: drop the copies before comparing"
            )
    common = sides[0].index.intersection(sides[1].index)
    if not len(common) or rows["setting"].nunique() > 1:
        raise ValueError(
            f"{a!r} and {b!r} share {len(common)} clips: pass rows of one setting, with the same prompts and seeds"
        )
    left, right = (side.loc[common].reset_index() for side in sides)
    return stats.compare(
        *metrics.parts(left, metric), *metrics.parts(right, metric), metrics.families(left), left["seed"], n=n, seed=seed
    )


class Claim(NamedTuple):
    """A comparison and its p after Holm's correction over the family it was made in."""

    found: stats.Comparison
    p: float

    @property
    def side(self) -> int:
        """1: a is shown to be better, -1: worse, 0: nothing is shown.

        Shown is what leaves 0 out of the bootstrap interval, has a corrected p below 0.05, and, with several seeds, leaves 0 out
        of Student's interval over them as well: the bootstrap of three to five seeds is too narrow (see `stats`).
        """
        over_seeds = self.found.t.excludes_zero if np.isfinite(self.found.t.low) else self.found.seeds < 2
        shown = self.found.gain.excludes_zero and self.p < 0.05 and over_seeds
        return int(np.sign(self.found.gain.mean)) if shown else 0


def corrected(found: dict) -> dict:
    """`Claim`s of a family of comparisons, by their keys."""
    p_values = stats.holm([comparison.p for comparison in found.values()])
    return {key: Claim(comparison, float(p)) for (key, comparison), p in zip(found.items(), p_values, strict=True)}


def claims(
    rows: pd.DataFrame, metric: str = "exact", *, base: str | Mapping[str, str] = BASE, n: int = 2000, seed: int = 0
) -> dict[tuple[str, str], Claim]:
    """Whatever is compared in one setting and metric, corrected together: (a, b) -> `Claim` about a - b. Table, figure and words
    all take their claims from here, so that what one calls shown the others do.

    Every system's gain over `base` (as in `headline_table`); where that is one for all, also online against offline systems and
    the LALM's reward against CLAP's.
    """
    systems = list(rows["system"].unique())
    own = base if isinstance(base, Mapping) else {system: base for system in systems if system != base}
    pairs = [(system, own[system]) for system in systems if own.get(system) in systems]
    if not isinstance(base, Mapping):
        pairs += [pair for pair in (*product(ONLINE, OFFLINE), *BY_REWARD) if set(pair) <= set(systems)]
    n = stats.resamples(n, len(pairs))
    return corrected({pair: compared(rows, *pair, metric=metric, n=n, seed=seed) for pair in pairs})


def headline_table(
    rows: pd.DataFrame,
    *,
    base: str | Mapping[str, str] = BASE,
    names: Sequence[str] = metrics.HEADLINE,
    n: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """One line per setting and system: each metric with its 95 % interval, and the paired gain over `base`, one for all systems or
    system -> base.

    Columns: setting, system, guidance, prompts, clips, seeds, then for each metric m: m, m_low, m_high, and of the gain (nan for
    base itself and for originals) m_gain, m_gain_low, m_gain_high, m_p, m_p_holm (over the setting's `claims` in this metric),
    m_effect (gain over the deviation of the prompts' differences), m_t, m_t_low, m_t_high (Student's interval over the seeds'
    gains, nan with one seed). guidance is the mean over seeds where each seed has its own best one. Metrics are corrected each by
    itself: the one that `words` is about is primary, the others are exploratory.
    """
    lines = []
    for setting, peers in rows.groupby("setting", sort=False):
        found = {name: claims(peers, name, base=base, n=n, seed=seed) for name in names}
        for system, group in peers.groupby("system", sort=False):
            pair = system, base.get(system) if isinstance(base, Mapping) else base
            line = {"setting": setting, "system": system, "guidance": group["guidance"].mean()}
            line |= {"prompts": group["id"].nunique(), "clips": len(group), "seeds": group["seed"].nunique()}
            for name in names:
                line |= metrics.measure(group, name, n=n, seed=seed).columns(name) | _gain(name, found[name].get(pair))
            lines.append(line)
    return pd.DataFrame(lines)


def _gain(name: str, claim: Claim | None) -> dict[str, float]:
    nothing = stats.Interval(np.nan, np.nan, np.nan)
    found, p = claim or (stats.Comparison(nothing, np.nan, np.nan, nothing, 0, 0, np.nan), np.nan)
    line = found.gain.columns(f"{name}_gain") | {f"{name}_p": found.p, f"{name}_p_holm": p, f"{name}_effect": found.effect}
    return line | found.t.columns(f"{name}_t")


def by_count_and_relation(
    rows: pd.DataFrame, *, names: Sequence[str] = ("exact", "event_f1", "order", "aqa", "clap")
) -> pd.DataFrame:
    """`metrics.summarise` per setting, system and (event_count, event_relation), as TTA-Bench groups accuracy."""
    return metrics.summarise(rows, ["setting", "system", "event_count", "event_relation"], metrics=names)


def by_kind(
    rows: pd.DataFrame, *, names: Sequence[str] = ("exact", "event_f1", "order", "aqa", "clap")
) -> pd.DataFrame:
    """`metrics.summarise` per setting, system and kind of prompt (single, while, followed by, three, count)."""
    return metrics.summarise(rows, ["setting", "system", "kind"], metrics=names)


def readable(table: pd.DataFrame, names: Sequence[str] = metrics.HEADLINE) -> pd.DataFrame:
    """The headline table as text for the eye: "0.52 [0.48, 0.56]" and, for gains, "+0.08 [+0.03, +0.13]".

    Of every metric m the columns m, "m gain", "m p" (after Holm), "m effect", and with several seeds "m gain over seeds" (t).
    clips_made, how many clips a system learned from, where the table has it.
    """
    ends = [f"{name}{part}{end}" for name in names for part in ("", "_gain", "_t") for end in ("", "_low", "_high")]
    few = table.drop(columns=[name for name in table.columns if name not in ends])
    texts = with_intervals(few, signed=[f"{name}{part}" for name in names for part in ("_gain", "_t")])
    shown = table[["setting", "system", "prompts", "clips", "seeds", *(["clips_made"] if "clips_made" in table else [])]].copy()
    for name in names:
        shown[name], shown[f"{name} gain"] = texts[name], texts[f"{name}_gain"]
        shown[f"{name} p"] = [p_text(p) for p in table[f"{name}_p_holm"].astype(float)]
        shown[f"{name} effect"] = [effect_text(value) for value in table[f"{name}_effect"].astype(float)]
        if table[f"{name}_t_low"].notna().any():
            shown[f"{name} gain over seeds"] = texts[f"{name}_t"]
    return shown


def words(
    rows: pd.DataFrame,
    *,
    metric: str = "exact",
    base: str = BASE,
    clips_made: Mapping[str, int] | None = None,
    n: int = 2000,
    seed: int = 0,
) -> str:
    """What the rows show, per setting: gains over base, online against offline, the LALM's reward against CLAP's, and what the
    same time buys otherwise.

    `metric` is the primary one (exact match, or aqa where no judge counts events), all others are exploratory. Everything comes
    from its `claims`; with the n and seed of the headline table these are the table's. A system that is absent from the rows is not
    mentioned. clips_made: how many clips each system learned from, said beside the verdict.
    """
    paragraphs = []
    for setting, peers in rows.groupby("setting", sort=False):
        systems = list(peers["system"].unique())
        if base not in systems or setting == ORIGINALS:
            continue
        found = claims(peers, metric, base=base, n=n, seed=seed)
        seeds, prompts = peers["seed"].nunique(), peers["id"].nunique()
        lines = [
            f"At {setting} ({prompts} prompts, {_count(seeds, 'seed')}, {metric}, paired 95 % intervals, in points):",
            *([_rule(metric, len(found), seeds)] if found else []),
        ]
        trained = [system for system in (*OFFLINE, *ONLINE) if system in systems]
        lines += [f"{system} {_against(found[system, base], base)}." for system in trained]
        versus = {pair: claim for pair, claim in found.items() if pair[1] != base}
        lines += [f"{a} {_against(claim, b)}." for (a, b), claim in versus.items()]
        lines += _verdict(claim for (_, b), claim in versus.items() if b in OFFLINE) + _learned(trained, clips_made or {})
        if other := [f"{system} {_against(found[system, base], base)}" for system in systems if system not in (base, *trained)]:
            lines.append(f"Of the alternatives, {'; '.join(other)}.")
        paragraphs.append(" ".join(lines))
    said = "\n\n".join(paragraphs) or f"No setting holds the system {base!r}, so nothing can be compared."
    return f"{NO_VERDICT} {said}" if metric == "reward" else said


def power_note(rows: pd.DataFrame, metric: str = "exact", *, base: str = BASE, difference: float | None = None) -> str:
    """A sentence: which paired difference these prompts can show, and how many prompts `difference` needs (power 80 %).

    difference: default the next smaller of 1, 2, 5, 10, ... The deviation of the prompts' differences is the median over systems
    against `base` in all settings.
    """
    found = []
    for setting, peers in rows.groupby("setting", sort=False):
        others = [system for system in peers["system"].unique() if system != base]
        if setting != ORIGINALS and len(others) < peers["system"].nunique():
            found += [compared(peers, system, base, metric=metric, n=2) for system in others]
    found = [comparison for comparison in found if comparison.deviation > 0]
    if not found:
        return f"No system differs from {base} on two prompts, so nothing can be said about power."
    deviation, prompts = float(np.median([c.deviation for c in found])), max(c.prompts for c in found)
    shown = stats.detectable(deviation, prompts)
    difference = difference or _rounder(shown)
    seeds = max(c.seeds for c in found)
    of_seeds, rest = "", ""
    if seeds > 1:
        of_seeds = " between these very models"
        rest = f" How much training differs from seed to seed is not in this: {seeds} seeds, and only more of them, tell."
    return (
        f"With these {prompts} prompts a difference of {100 * shown:.3g} points in {metric} can be shown{of_seeds}; "
        f"{100 * difference:.3g} points need {stats.prompts_needed(deviation, difference)} prompts (one paired comparison, power "
        f"80 %, deviation {100 * deviation:.1f} points a prompt).{rest}"
    )


def _rounder(value: float) -> float:
    """The largest of ..., 0.1, 0.2, 0.5, 1, 2, 5, ... below value."""
    power = 10.0 ** (math.floor(math.log10(value)) - 1)
    return max(step * power for step in (1, 2, 5, 10, 20, 50) if step * power < value)


def p_text(p: float) -> str:
    """A p value for the eye: three decimals, "<0.001", "–" where there is none."""
    return "–" if not np.isfinite(p) else f"{p:.3f}" if p >= 0.001 else "<0.001"


def effect_text(effect: float) -> str:
    """An effect size for the eye: two decimals with its sign, "–" where there is none."""
    return f"{effect:+.2f}" if np.isfinite(effect) else "–"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _rule(metric: str, comparisons: int, seeds: int) -> str:
    over = ", and Student's interval over the seeds (t) clear of 0 too" if seeds > 1 else ""
    return (
        f"{metric} is the primary metric, all others are exploratory. A difference counts as shown with an interval clear of 0 and "
        f"p < 0.05 after Holm's correction over the {_count(comparisons, 'comparison')} here{over}."
    )


def _points(claim: Claim) -> str:
    gain, t = claim.found.gain, claim.found.t
    if not np.isfinite(gain.low):
        return f"{100 * gain.mean:+.1f} (no interval)"
    ends = f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
    over = f"; t {100 * t.low:+.1f} to {100 * t.high:+.1f}" if np.isfinite(t.low) else ""
    p = p_text(claim.p)
    return f"{100 * gain.mean:+.1f} ({ends}{over}; p {p if p.startswith('<') else f'= {p}'})"


def _against(claim: Claim, other: str) -> str:
    if not claim.side:
        return f"is not shown to differ from {other}: {_points(claim)}"
    return f"{'beats' if claim.side > 0 else 'falls behind'} {other}: {_points(claim)}"


def _verdict(claims: Iterable[Claim]) -> list[str]:
    """Online systems against offline ones, in a sentence; none without a comparison."""
    sides = [claim.side for claim in claims]
    if not sides:
        return []
    ahead, behind, made = sides.count(1), sides.count(-1), _count(len(sides), "comparison")
    if ahead == len(sides):
        return ["So online beats offline here."]
    if ahead == 0 and behind == 0:
        return ["So these numbers do not show that online beats offline, nor the reverse."]
    if ahead == 0:
        return [f"So online does not beat offline here: offline is ahead in {behind} of {made}."]
    rest = f" and falls behind in {behind}." if behind else "; the rest show no difference."
    return [f"So online beats offline in {ahead} of {made}{rest}"]


def _learned(systems: Sequence[str], clips_made: Mapping[str, int]) -> list[str]:
    """How many clips each system learned from, in a sentence; none where nothing is known."""
    known = [f"{system} {'learned ' * (not i)}from {clips_made[system]:,}{' clips' * (not i)}"
             for i, system in enumerate(system for system in systems if system in clips_made)]  # fmt: skip
    return [f"{', '.join(known)}."] if known else []
