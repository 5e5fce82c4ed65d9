"""How well the speaker speaks: word errors as recognisers hear them, pitch and rate as they are measured in the sound itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from resonate_lib.evaluation import stats
from resonate_lib.progress import told
from resonate_lib.rewards.rules import words
from resonate_lib.speech.errors import word_errors
from resonate_lib.speech.lines import Line, class_of, measures


def judge_clips(
    system: str, clips: Sequence[Tensor], lines: Sequence[Line], ears: Mapping[str, object], limits: Mapping, sample_rate: int
) -> pd.DataFrame:
    """A row a clip: the line, heard_<ear>, errors_<ear> and words; pitch_hz, letter_s; pitch_right and rate_right, by `limits`
    (`lines.learn_limits`). ears: name -> Recogniser."""
    heard = {name: [ear.transcribe([clip], sample_rate)[0] for clip in told(clips, len(clips), f"{system}: heard by the {name}")]
             for name, ear in ears.items()}  # fmt: skip
    rows = []
    for place, (clip, line) in enumerate(zip(clips, lines, strict=True)):
        found = measures(clip, sample_rate, line.text)
        row = {"system": system, "line": place, **line.as_dict(), "words": len(words(line.text))}
        row["length_s"] = len(clip) / sample_rate
        for name, texts in heard.items():
            row |= {f"heard_{name}": texts[place], f"errors_{name}": word_errors(texts[place], line.text)["errors"]}
        row |= {"pitch_hz": found["pitch"], "letter_s": found["rate"]}
        row |= {f"{name}_right": float(class_of(name, found[name], limits) == getattr(line, name)) for name in ("pitch", "rate")}
        rows.append(row)
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame, *, ears: Sequence[str], base: str, n: int = 2000) -> pd.DataFrame:
    """A row a system: word error rate of each ear (errors of all lines over their words), its difference to `base`, and how often
    pitch and rate are right, each with its 95 % interval by bootstrap over lines; differences are paired."""
    first, table = rows[rows["system"] == base].set_index("line"), []
    for name, part in rows.groupby("system", sort=False):
        part = part.set_index("line").reindex(first.index)
        row = {"system": name, "lines": len(part)}
        for ear in ears:
            top, bottom = part[f"errors_{ear}"].to_numpy(float), part["words"].to_numpy(float)
            row |= stats.bootstrap_ratio(top, bottom, n=n).columns(f"wer_{ear}")
            if name != base:
                other = first[f"errors_{ear}"].to_numpy(float), first["words"].to_numpy(float)
                row |= stats.paired_ratio(top, bottom, *other, n=n).columns(f"change_{ear}")
        for attribute in ("pitch_right", "rate_right"):
            row |= stats.bootstrap_mean(part[attribute].to_numpy(float), n=n).columns(attribute)
        table.append(row)
    return pd.DataFrame(table)


def bars(table: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """The table's metrics as `plots.bars_with_intervals` takes them: a row for each system and metric."""
    return pd.DataFrame([
        {"system": row["system"], "metric": name, "mean": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"],
         "n": row["lines"]}
        for row in table.to_dict("records") for name in metrics
    ])  # fmt: skip


def jumps(history: Sequence[Mapping[str, float]], key: str = "reward_mean") -> float:
    """How unsteady a training is: the mean absolute change of a number from round to round; nan for less than two rounds."""
    values = np.array([row[key] for row in history if key in row], float)
    return float(np.abs(np.diff(values)).mean()) if len(values) > 1 else float("nan")


def joined(clips: Mapping[str, Sequence[Tensor]], place: int) -> dict[str, Tensor]:
    """The clips of one line by system, for players; one that says nothing is a tenth of a second of silence."""
    return {name: row[place] if len(row[place]) else torch.zeros(1600) for name, row in clips.items()}
