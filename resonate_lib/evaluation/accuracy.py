"""How good the instruments are on held-out scenes: the judge, what the codec costs it, and the CLAP's recall@1.

Yes-or-no accuracy of a reward stands in `agreement.py`, the metrics and their intervals in `metrics.py` and `stats.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from resonate_lib.data import scenes
from resonate_lib.evaluation import measures, metrics, stats

JUDGED = ("exact", "event_f1", "event_f1_real", "event_f1_procedural", "order")
AT_A_TIME = 64  # clips read together
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

    Columns, each number with its 95 % interval over clips (_low, _high): decode, iterations, clips, mel_error (mean absolute error
    of the compressed mel) and, with a judge (None: without), exact, exact_kept (share of the originals' exact match, paired by
    clip), event_f1, event_f1_real, event_f1_procedural.
    """
    originals, records = corpus.waveforms(positions), [corpus.records[i] for i in positions]
    latents, mel = codec.encode(originals), codec.mel(originals)
    lines, first = [], None
    for rounds in (None, *iterations):
        audio = originals if rounds is None else codec.decode(latents, iterations=rounds)
        decode = "originals" if rounds is None else f"{rounds} iterations"
        line = {"decode": decode, "iterations": rounds or 0, "clips": len(records)}
        if judge is not None:
            rows = judge_rows(judge, audio, records)
            first = rows if first is None else first
            line |= _recognised(rows, first, n)
        error = measures.mean_of((codec.mel(audio) - mel).abs().flatten(1).mean(1).tolist())
        lines.append(line | measures.over_clips({"mel_error": error}, positions, n=n))
    return pd.DataFrame(lines)


def _recognised(rows: pd.DataFrame, originals: pd.DataFrame, n: int) -> dict:
    found = metrics.measure(rows, "exact", n=n).columns("exact")
    found |= stats.bootstrap_ratio(rows["exact"], originals["exact"], n=n).columns("exact_kept")
    for name in JUDGED[1:4]:
        found |= metrics.measure(rows, name, n=n).columns(name)
    return found


def recall_draws(corpus, draws: int, *, wrong, seed: int = 0) -> tuple[list[int], list[str], list[list[str]]]:
    """Draws for recall@1: clip positions, their true captions, and 9 other captions each, all different.

    Five come from wrong(record, rng) -> {kind: caption} (`worlds`), the rest describe other clips of the corpus. ValueError where
    it has too few.
    """
    rng = np.random.default_rng([seed, 91])
    texts = {record["caption"] for record in corpus.records}
    if min((len(texts - _true(record)) for record in corpus.records), default=0) < CANDIDATES - 1:
        raise ValueError(f"recall@1 among {CANDIDATES} captions needs as many different ones: the {len(corpus)} clips have fewer")
    positions, captions, others = [], [], []
    for _ in range(draws):
        place = int(rng.integers(len(corpus)))
        record, chosen = corpus.records[place], {}
        while len(chosen) < HARD:
            chosen.update(dict.fromkeys(wrong(record, rng).values()))
        chosen = dict.fromkeys(list(chosen)[:HARD])
        while len(chosen) < CANDIDATES - 1:
            other = corpus.records[int(rng.integers(len(corpus)))]
            if not _same(other, record):
                chosen.setdefault(other["caption"])
        positions.append(place)
        captions.append(record["caption"])
        others.append(list(chosen))
    return positions, captions, others


def _same(a: dict, b: dict) -> bool:
    """Whether the caption of `a` is true of `b` too; the order of "while" does not matter."""
    if "groups" not in a or "groups" not in b:
        return a["caption"] in _true(b)
    a, b = scenes.Spec.of(a), scenes.Spec.of(b)
    if a.relation != b.relation:
        return False
    return sorted(a.groups) == sorted(b.groups) if a.relation == "while" else a.groups == b.groups


def _true(record: dict) -> set[str]:
    """The texts that count as true of a clip: all captions of a recording; of a scene one, since `_same` compares what it holds."""
    return {record["caption"]} if "groups" in record else {record["caption"], *record.get("captions", ())}


def recall_hits(reward, sounds: Tensor, captions: Sequence[str], others: Sequence[Sequence[str]]) -> Tensor:
    """(n,) bool: in which of n draws the clip's own caption has the strictly highest cosine (a tie is a miss).

    sounds: (n, D) unit vectors of a CLAP (`embed_audio`); captions: the n right ones; others: the wrong ones of each draw.
    """
    texts = reward.embed_text(captions)
    rivals = reward.embed_text([text for row in others for text in row]).split([len(row) for row in others])
    best = torch.stack([(row * sound).sum(-1).max() for row, sound in zip(rivals, sounds, strict=True)])
    return (sounds * texts).sum(-1) > best


def recall_table(rewards, corpus, draws: int, *, wrong, seed: int = 0) -> pd.DataFrame:
    """Recall@1 of each CLAP (name -> reward): reward, draws, candidates, hard, recall_at_1, low, high, chance.

    The interval resamples clips: draws of one clip belong together."""
    positions, captions, others = recall_draws(corpus, draws, wrong=wrong, seed=seed)
    heard = sorted(set(positions))
    row, lines = {place: i for i, place in enumerate(heard)}, []
    hard = HARD if len(corpus) and "groups" in corpus.records[0] else 0
    for name, reward in rewards.items():
        parts = [corpus.waveforms(heard[i : i + AT_A_TIME]) for i in range(0, len(heard), AT_A_TIME)]
        sounds = torch.cat([reward.embed_audio(part, corpus.sample_rate) for part in parts])
        won = recall_hits(reward, sounds[[row[place] for place in positions]], captions, others)
        share, low, high = stats.bootstrap_mean(won.float().numpy(), np.array(positions))
        lines.append({"reward": name, "draws": draws, "candidates": CANDIDATES, "hard": hard, "recall_at_1": share,
                      "low": low, "high": high, "chance": 1 / CANDIDATES})
    return pd.DataFrame(lines)
