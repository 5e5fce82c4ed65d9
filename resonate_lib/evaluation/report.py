"""What the benchmark's rows say: the headline table with paired gains, breakdowns, sentences from the intervals.

Rows come from `ttabench.evaluate` and `ttabench.score_clips`; metrics and their intervals live in `metrics.py` and
`stats.py`. Nothing here is hard coded: other rows give other sentences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from resonate_lib.evaluation import metrics, stats

PAIR = ["setting", "seed", "id", "sample"]
BASE, OFFLINE, ONLINE = "base", ("DPO",), ("GRPO (CLAP)", "GRPO (LALM)", "NFT")
ALTERNATIVES = ("base trained on", "best of 4")
ORIGINALS = "originals"
NO_VERDICT = "By the training reward, which is no independent verdict (no lalm_eval, no clap_eval)."


def paired(
    rows: pd.DataFrame, a: str, b: str, *, metric: str = "exact", n: int = 2000, seed: int = 0
) -> stats.Interval:
    """System a minus system b in one setting, paired by seed, prompt and sample, with a 95 % interval."""
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
    return stats.paired_ratio(
        *metrics.parts(left, metric), *metrics.parts(right, metric), left["id"], left["seed"], n=n, seed=seed
    )


def headline_table(
    rows: pd.DataFrame, *, base: str = BASE, names: Sequence[str] = metrics.HEADLINE, n: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """One line per setting and system: each metric with its 95 % interval, and the paired gain over `base`.

    Columns: setting, system, guidance, prompts, clips, seeds, then for each metric m: m, m_low, m_high, m_gain,
    m_gain_low, m_gain_high (gain nan for base itself and for originals). guidance is the mean over seeds where each
    seed has its own best one.
    """
    lines = []
    for (setting, system), group in rows.groupby(["setting", "system"], sort=False):
        line = {
            "setting": setting,
            "system": system,
            "guidance": group["guidance"].mean(),
            "prompts": group["id"].nunique(),
            "clips": len(group),
            "seeds": group["seed"].nunique(),
        }
        peers = rows[rows["setting"] == setting]
        for name in names:
            line.update(
                zip((name, f"{name}_low", f"{name}_high"), metrics.measure(group, name, n=n, seed=seed), strict=True)
            )
            gain = stats.Interval(np.nan, np.nan, np.nan)
            if system != base and base in set(peers["system"]):
                gain = paired(peers, system, base, metric=name, n=n, seed=seed)
            line.update(zip((f"{name}_gain", f"{name}_gain_low", f"{name}_gain_high"), gain, strict=True))
        lines.append(line)
    return pd.DataFrame(lines)


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
    """The headline table as text for the eye: "0.52 [0.48, 0.56]" and, for gains, "+0.08 [+0.03, +0.13]"."""

    def cell(line, name: str, sign: str) -> str:
        values = [line[name], line[f"{name}_low"], line[f"{name}_high"]]
        if not np.isfinite(values[0]):
            return "–"
        ends = ", ".join(f"{v:{sign}.3f}" for v in values[1:]) if np.isfinite(values[1]) else "no interval"
        return f"{values[0]:{sign}.3f} [{ends}]"

    shown = table[["setting", "system", "prompts", "clips", "seeds"]].copy()
    for name in names:
        shown[name] = [cell(line, name, "") for _, line in table.iterrows()]
        shown[f"{name} gain"] = [cell(line, f"{name}_gain", "+") for _, line in table.iterrows()]
    return shown


def words(
    rows: pd.DataFrame,
    *,
    metric: str = "exact",
    base: str = BASE,
    offline: Sequence[str] = OFFLINE,
    online: Sequence[str] = ONLINE,
    alternatives: Sequence[str] = ALTERNATIVES,
) -> str:
    """What the rows show, per setting: gains over base, online against offline, and what the same time buys otherwise.

    Everything comes from the paired 95 % intervals of `metric`; a system that is absent from the rows is not mentioned.
    """
    paragraphs = []
    for setting, peers in rows.groupby("setting", sort=False):
        present = set(peers["system"])
        if base not in present or setting == ORIGINALS:
            continue
        here = {
            key: [s for s in group if s in present]
            for key, group in (("off", offline), ("on", online), ("else", alternatives))
        }
        gains = {s: paired(peers, s, base, metric=metric) for s in here["off"] + here["on"] + here["else"]}
        seeds, prompts = peers["seed"].nunique(), peers["id"].nunique()
        lines = [
            f"At {setting} ({prompts} prompts, {_count(seeds, 'seed')}, {metric}, paired 95 % intervals, in points):"
        ]
        lines += [f"{s} {_against(gains[s], base)}." for s in here["off"] + here["on"]]
        lines += _online_against(peers, here, metric)
        lines += [_alternative(peers, s, gains[s], here["on"], base, metric) for s in here["else"]]
        paragraphs.append(" ".join(lines))
    said = "\n\n".join(paragraphs) or f"No setting holds the system {base!r}, so nothing can be compared."
    return f"{NO_VERDICT} {said}" if metric == "reward" else said


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _points(value: stats.Interval) -> str:
    ends = f"{100 * value.low:+.1f} to {100 * value.high:+.1f}" if np.isfinite(value.low) else "no interval"
    return f"{100 * value.mean:+.1f} ({ends})"


def _against(value: stats.Interval, other: str) -> str:
    if not value.excludes_zero:
        return f"is not shown to differ from {other}: {_points(value)}"
    return f"{'beats' if value.mean > 0 else 'falls behind'} {other}: {_points(value)}"


def _online_against(peers: pd.DataFrame, here: dict, metric: str) -> list[str]:
    """Each online system against each offline one, then the verdict."""
    found = [(on, off, paired(peers, on, off, metric=metric)) for on in here["on"] for off in here["off"]]
    if not found:
        return []
    ahead = sum(value.excludes_zero and value.mean > 0 for _, _, value in found)
    behind = sum(value.excludes_zero and value.mean < 0 for _, _, value in found)
    if ahead == len(found):
        verdict = "So online beats offline here."
    elif ahead == 0 and behind == 0:
        verdict = "So these numbers do not show that online beats offline, nor the reverse."
    elif ahead == 0:
        verdict = (
            f"So online does not beat offline here: offline is ahead in {behind} of {_count(len(found), 'comparison')}."
        )
    else:
        verdict = f"So online beats offline in {ahead} of {_count(len(found), 'comparison')}" + (
            f" and falls behind in {behind}." if behind else "; the rest show no difference."
        )
    return [f"{on} {_against(value, off)}." for on, off, value in found] + [verdict]


def _alternative(peers, system: str, gain: stats.Interval, online: Sequence[str], base: str, metric: str) -> str:
    against = [f"{on} {_against(paired(peers, on, system, metric=metric), 'it')}" for on in online]
    return "; ".join([f"Of the alternatives, {system} {_against(gain, base)}", *against]) + "."
