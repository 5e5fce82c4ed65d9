"""How good the instruments are on held-out scenes: the judge, what the codec costs it, and the CLAP's recall@1.

Yes-or-no accuracy of a reward stands in `agreement.py`, the metrics and their intervals in `metrics.py` and `stats.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from resonate_lib.data import scenes
from resonate_lib.evaluation import metrics, stats

JUDGED = ("exact", "event_f1", "event_f1_real", "event_f1_procedural", "order")
HARD, CANDIDATES = 5, 10  # captions one draw chooses among, and how many of them are hard negatives


def judge_rows(judge, audio, records: Sequence[dict], **labels) -> pd.DataFrame:
    """One row a clip: what the judge counts (tp, fp, fn, exact, order, ...), id, kind, seed 0, and the labels given.

    audio (B, T) at the judge's 16 kHz; records: B manifest or prompt records with groups and relation.
    """
    columns = {name: values.numpy() for name, values in judge.score(audio, list(records)).items()}
    about = {"id": [record["id"] for record in records], "kind": [record["kind"] for record in records], "seed": 0}
    return pd.DataFrame({**labels, **about, **columns})


def judge_table(rows: pd.DataFrame, *, n: int = 2000) -> pd.DataFrame:
    """Metrics of `judge_rows` by kind of scene, and over "all" kinds: kind, metric, mean, low, high, n, prompts, seeds."""
    pooled = metrics.summarise(rows.assign(kind="all"), ["kind"], metrics=JUDGED, n=n)
    return pd.concat([pooled, metrics.summarise(rows, ["kind"], metrics=JUDGED, n=n)], ignore_index=True)


def codec_table(codec, judge, corpus, positions, iterations: Sequence[int], *, n: int = 2000) -> pd.DataFrame:
    """What the judge recognises after the codec's round trip, by the decode's iterations, beside the originals.

    Columns: decode, iterations, clips, exact with its interval, exact_kept (share of the originals' exact match),
    event_f1, event_f1_real, event_f1_procedural, mel_error (mean absolute error of the compressed mel).
    """
    originals, records = corpus.waveforms(positions), [corpus.records[i] for i in positions]
    latents, mel = codec.encode(originals), codec.mel(originals)
    lines = []
    for rounds in (None, *iterations):
        audio = originals if rounds is None else codec.decode(latents, iterations=rounds)
        rows = judge_rows(judge, audio, records)
        exact = metrics.measure(rows, "exact", n=n)
        line = {"decode": "originals" if rounds is None else f"{rounds} iterations", "iterations": rounds or 0,
                "clips": len(rows), "exact": exact.mean, "exact_low": exact.low, "exact_high": exact.high}
        first = lines[0]["exact"] if lines else exact.mean
        line["exact_kept"] = exact.mean / first if first else float("nan")
        for name in JUDGED[1:4]:
            line[name] = metrics.measure(rows, name, n=n).mean
        lines.append(line | {"mel_error": float((codec.mel(audio) - mel).abs().mean())})
    return pd.DataFrame(lines)


def recall_draws(corpus, draws: int, *, seed: int = 0) -> tuple[list[int], list[str], list[list[str]]]:
    """Draws for recall@1: clip positions, their true captions, and 9 other captions each, all different.

    Five are hard (one event, the order or a count changed), four describe other scenes of the corpus.
    """
    rng = np.random.default_rng([seed, 91])
    positions, captions, others = [], [], []
    for _ in range(draws):
        place = int(rng.integers(len(corpus)))
        spec = scenes.Spec.of(corpus.records[place])
        true, wrong = corpus.records[place]["caption"], {}
        while len(wrong) < HARD:
            wrong.update(dict.fromkeys(scenes.negatives(spec, rng).values()))
        chosen = list(wrong)[:HARD]
        while len(chosen) < CANDIDATES - 1:
            other = corpus.records[int(rng.integers(len(corpus)))]
            if not _same(scenes.Spec.of(other), spec) and other["caption"] not in chosen:
                chosen.append(other["caption"])
        positions.append(place)
        captions.append(true)
        others.append(chosen)
    return positions, captions, others


def _same(a: scenes.Spec, b: scenes.Spec) -> bool:
    """Whether two specs ask the same; the order of "while" does not matter."""
    if a.relation != b.relation:
        return False
    return sorted(a.groups) == sorted(b.groups) if a.relation == "while" else a.groups == b.groups


def recall_table(rewards, corpus, draws: int, *, seed: int = 0) -> pd.DataFrame:
    """Recall@1 of each CLAP (name -> ClapReward): reward, draws, candidates, hard, recall_at_1, low, high, chance.

    The interval resamples clips: draws of one clip belong together."""
    from resonate_lib.rewards.clap import recall_hits

    positions, captions, others = recall_draws(corpus, draws, seed=seed)
    audio, lines = corpus.waveforms(positions), []
    for name, reward in rewards.items():
        won = recall_hits(reward, audio, captions, others)
        share, low, high = stats.bootstrap_mean(won.float().numpy(), np.array(positions))
        lines.append({"reward": name, "draws": draws, "candidates": CANDIDATES, "hard": HARD, "recall_at_1": share,
                      "low": low, "high": high, "chance": 1 / CANDIDATES})
    return pd.DataFrame(lines)
