"""How well the speaker speaks: word errors as recognisers hear them, pitch and rate as they are measured in the sound itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from resonate_lib.evaluation import stats
from resonate_lib.progress import told
from resonate_lib.speech.errors import word_errors, words
from resonate_lib.speech.lines import Line, class_of, measures

AT_ONCE = 20  # clips that a recogniser gets together and may share out


def judge_clips(
    system: str, clips: Sequence[Tensor], lines: Sequence[Line], ears: Mapping[str, object], limits: Mapping, sample_rate: int,
    *, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """A row a clip: id, its place; line, the same for clips of the same line; text, pitch, rate, kind, level; heard_<ear>,
    errors_<ear> and words; pitch_hz, letter_s; pitch_right and rate_right, by `limits` (`lines.learn_limits`). ears: name ->
    Recogniser."""
    parts = [clips[start : start + AT_ONCE] for start in range(0, len(clips), AT_ONCE)]
    heard = {name: [text for part in told(parts, len(clips), f"{system}: heard by the {name}", size=len)
                    for text in ear.transcribe(part, sample_rate)]
             for name, ear in ears.items()}  # fmt: skip
    rows = []
    for place, (clip, line) in enumerate(zip(clips, lines, strict=True)):
        found = measures(clip, sample_rate, line.text)
        row = {"system": system, "seed": seed, "id": place, "line": f"{line.text} ({line.pitch}, {line.rate})"}
        row |= {**line.as_dict(), "words": len(words(line.text)), "length_s": len(clip) / sample_rate}
        for name, texts in heard.items():
            row |= {f"heard_{name}": texts[place], f"errors_{name}": word_errors(texts[place], line.text)["errors"]}
        row |= {"pitch_hz": found["pitch"], "letter_s": found["rate"]}
        row |= {f"{name}_right": float(class_of(name, found[name], limits) == getattr(line, name)) for name in ("pitch", "rate")}
        rows.append(row)
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame, *, ears: Sequence[str], base: str, n: int = 2000) -> pd.DataFrame:
    """A row a system: word error rate of each ear (errors of all clips over their words), how often pitch and rate are right, and
    how each differs from `base`, with 95 % intervals by bootstrap over lines, and with several seeds over these too.

    Clips of one line are drawn together: they are no more lines. Differences are paired: the same id of the same seed.
    """
    measured = {f"wer_{ear}": (f"errors_{ear}", "words") for ear in ears}
    measured |= {name: (name, None) for name in ("pitch_right", "rate_right")}
    table = []
    for name, part in rows.groupby("system", sort=False):
        row = {"system": name, "clips": len(part), "lines": part["line"].nunique(), "seeds": part["seed"].nunique()}
        paired = part.merge(rows[rows["system"] == base], on=["id", "seed"], suffixes=("", "_base")) if name != base else None
        for metric, (top, bottom) in measured.items():
            below = part[bottom] if bottom else np.ones(len(part))
            row |= stats.bootstrap_ratio(part[top], below, part["line"], seeds=part["seed"], n=n).columns(metric)
            if paired is not None:
                sides = [paired[top], paired[bottom] if bottom else np.ones(len(paired))]
                sides += [paired[f"{top}_base"], paired[f"{bottom}_base"] if bottom else np.ones(len(paired))]
                change = stats.paired_ratio(*sides, paired["line"], paired["seed"], n=n)
                row |= change.columns(metric.replace("wer_", "change_") if bottom else f"{metric}_change")
        table.append(row)
    return pd.DataFrame(table)


def bars(table: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """The table's metrics as `plots.bars_with_intervals` takes them: a row for each system and metric."""
    return pd.DataFrame([
        {"system": row["system"], "metric": name, "mean": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"],
         "n": row["clips"]}
        for row in table.to_dict("records") for name in metrics
    ])  # fmt: skip


def jumps(history: Sequence[Mapping[str, float]], key: str = "reward_mean") -> float:
    """How unsteady a training is: the mean absolute change of a number from round to round; nan for less than two rounds."""
    values = np.array([row[key] for row in history if key in row], float)
    return float(np.abs(np.diff(values)).mean()) if len(values) > 1 else float("nan")


def joined(clips: Mapping[str, Sequence[Tensor]], place: int) -> dict[str, Tensor]:
    """The clips of one line by system, for players; one that says nothing is a tenth of a second of silence."""
    return {name: row[place] if len(row[place]) else torch.zeros(1600) for name, row in clips.items()}
