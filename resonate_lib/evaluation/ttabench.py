"""The benchmark: prompts in, one row per clip out, and TTA-Bench's own scores (arXiv 2509.02398).

Every system gets the same noise for the same prompt, sample and seed, so that systems can be compared pairwise.
Tables and words are made in `report.py`, metrics in `metrics.py`, intervals in `stats.py`, the independent judge
lives in `judge.py`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, combinations

import numpy as np
import pandas as pd
import torch

from resonate_lib.data import prompts as prompt_sets
from resonate_lib.evaluation import metrics
from resonate_lib.evaluation.clips import Shelf, Store, Wanted
from resonate_lib.evaluation.report import (
    BASE,
    OFFLINE,
    ONLINE,
    ORIGINALS,
    by_count_and_relation,
    by_kind,
    headline_table,
    paired,
    readable,
    words,
)
from resonate_lib.models.codec import within_full_scale

__all__ = [
    "BASE",
    "COLUMNS",
    "OFFLINE",
    "ONLINE",
    "ORIGINALS",
    "best_guidance",
    "by_count_and_relation",
    "by_kind",
    "evaluate",
    "fairness_score",
    "headline_table",
    "noise_seed",
    "paired",
    "readable",
    "robustness_score",
    "score_clips",
    "words",
]  # the tables of `report.py` belong to the benchmark, so they are reached from here too

FEWEST = 16  # clips made at once: a CPU computes fewer by other kernels, which round otherwise (in bf16 by up to 0.1 of a latent)
JUDGE_COLUMNS = ("exact", "order", "tp", "fp", "fn", "tp_real", "fp_real", "fn_real")
SCORE_COLUMNS = ("reward", "aqa", "clap")
PROMPT_COLUMNS = ("id", "part", "kind", "event_count", "event_relation", "heldout", "prompt_text")
PROMPT_COLUMNS += ("perturbation_type", "notes", "categories")
SOUND_COLUMNS = ("peak_dbfs", "loudness", "clipping", "silent")
COLUMNS = (
    ("setting", "system", "guidance", "seed", "sample", "noise_seed")
    + PROMPT_COLUMNS
    + JUDGE_COLUMNS
    + SCORE_COLUMNS
    + SOUND_COLUMNS
)


def noise_seed(seed: int, prompt_id: str, sample: int) -> int:
    """The noise seed of one clip, the same for every system and every batch: crc32 of "seed/id/sample"."""
    return zlib.crc32(f"{seed}/{prompt_id}/{sample}".encode())


def evaluate(
    generator,
    records: Sequence[dict],
    scorers: Mapping[str, object],
    *,
    num_steps: int = 25,
    guidance_scale: float = 1.0,
    seed: int = 0,
    samples_per_prompt: int = 1,
    best_of: int = 1,
    select: str = "reward",
    batch_size: int = 32,
    decode_iterations: int = 60,
    network=None,
    label: str = BASE,
    setting: str | None = None,
    store: Store | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Generate and score every prompt; one row per prompt and sample with the columns of COLUMNS.

    generator: generate(prompts, steps, guidance_scale, seeds) -> latents, decode(latents, iterations) -> audio (B, T).
    records: prompt dicts (prompt_text, id, ...). network: stands in for generator.network and is put back after.
    scorers: name -> reward (its .scores (B,) fill the column of that name), name -> judge (an object with
    score(audio, metadata) -> dict of (B,) columns; one judge at most), or name -> an object with scores(audio, sample_rate) ->
    dict of columns (`aesthetics.Aesthetics`).
    store: clips found there are not generated, those made are put there, and scorers hear what its 16-bit files hold; the same
    call, interrupted and repeated, ends with the same files and rows. None keeps nothing.
    best_of: the candidate with the highest `select` is kept; candidate 0 has the noise of best_of=1.
    setting: what is compared, such as "best guidance" (default "guidance <scale>").
    progress(done, total): called after each batch, in clips.
    Raises ValueError for no records, double ids, or a `select` that no reward gives.
    """
    _check(records, scorers, samples_per_prompt, best_of, select)
    tasks = [
        (record, sample, _wanted(record, sample, seed, samples_per_prompt, best_of))
        for record in records
        for sample in range(samples_per_prompt)
    ]
    chunk = max(1, batch_size // best_of)
    tables = []
    with torch.no_grad(), _swapped(generator, network):
        settings = {"num_steps": num_steps, "guidance_scale": guidance_scale, "decode_iterations": decode_iterations}
        shelf = store.shelf(generator, **settings) if store is not None else None
        make = partial(_make, generator, **settings, fewest=min(FEWEST, batch_size) if shelf else 1)
        if shelf is not None:
            _fill(generator, shelf, list(chain(*(candidates for *_, candidates in tasks))), make, batch_size)
        for start in range(0, len(tasks), chunk):
            batch, samples, candidates = (list(part) for part in zip(*tasks[start : start + chunk], strict=True))
            wanted = list(chain(*candidates))
            audio, before = shelf.fetch(wanted, make, generator.sample_rate) if shelf else (make(wanted), None)
            seeds = [clip.seed for clip in wanted]
            if best_of > 1:
                repeated = [record for record in batch for _ in range(best_of)]
                best = _best(scorers[select], within_full_scale(audio), generator.sample_rate, repeated, best_of)
                audio, seeds = audio[best], [seeds[i] for i in best]
                before = before and {name: values[best] for name, values in before.items()}
            table = score_clips(
                audio, batch, scorers, sample_rate=generator.sample_rate, label=label, samples=samples, before=before
            )
            tables.append(table.assign(noise_seed=seeds))
            if progress is not None:
                progress(min(start + chunk, len(tasks)), len(tasks))
    rows = pd.concat(tables, ignore_index=True)
    return rows.assign(setting=setting or f"guidance {guidance_scale:g}", guidance=float(guidance_scale), seed=seed)


def _wanted(record: dict, sample: int, seed: int, samples_per_prompt: int, best_of: int) -> list[Wanted]:
    """The candidates for one row; the first is the clip of best_of=1."""
    indices = [sample + samples_per_prompt * candidate for candidate in range(best_of)]
    return [Wanted(record["id"], i, record["prompt_text"], noise_seed(seed, record["id"], i)) for i in indices]


def _make(
    generator, wanted: Sequence[Wanted], *, num_steps: int, guidance_scale: float, decode_iterations: int, fewest: int = 1
) -> torch.Tensor:
    """The sound (B, T) of these clips as the model gives it, over full scale perhaps. fewest: a smaller batch is filled up with
    its last clip."""
    rows = [*wanted, *[wanted[-1]] * (fewest - len(wanted))]
    prompts, seeds = [clip.prompt for clip in rows], [clip.seed for clip in rows]
    latents = generator.generate(prompts, steps=num_steps, guidance_scale=guidance_scale, seeds=seeds)
    return generator.decode(latents, iterations=decode_iterations, limit=False)[: len(wanted)]


def _fill(generator, shelf: Shelf, wanted: Sequence[Wanted], make: Callable, batch_size: int) -> None:
    """Make what the shelf lacks. All prompts are encoded if any is, so that an interrupted call that is repeated encodes, and
    then makes, the same batches: batches round differently."""
    absent = [clip for clip in wanted if not shelf.has(clip)]
    shelf.store.found += len(wanted) - len(absent)
    texts = list(dict.fromkeys(clip.prompt for clip in wanted)) if absent else []
    for start in range(0, len(texts), 64):
        generator.encode_prompts(texts[start : start + 64])
    for start in range(0, len(absent), batch_size):
        batch = absent[start : start + batch_size]
        shelf.write(batch, make(batch), generator.sample_rate)


def score_clips(
    audio,
    records: Sequence[dict],
    scorers: Mapping[str, object],
    *,
    sample_rate: int,
    label: str = ORIGINALS,
    seed: int = 0,
    samples=None,
    before: Mapping[str, np.ndarray] | None = None,
) -> pd.DataFrame:
    """Score given clips (B, T) against their records, one row each: originals (the judge's ceiling) or any sound.

    Clipping and peak are those before the one gain that brings a clip over full scale down; scorers hear it after.
    before: peak_dbfs, clipping and gain (B,) of clips that `clips.Store` has limited already.
    samples: the sample index of each clip (default 0). setting is "originals", guidance and noise_seed are nan.
    """
    if len(audio) != len(records):
        raise ValueError(f"{len(audio)} clips for {len(records)} records: pass one record per clip")
    prompts = [record["prompt_text"] for record in records]
    loud, audio = audio, within_full_scale(audio)
    columns: dict[str, object] = {name: [prompt_field(record, name) for record in records] for name in PROMPT_COLUMNS}
    columns.update(setting=ORIGINALS, system=label, guidance=np.nan, seed=seed, noise_seed=np.nan)
    columns["sample"] = list(samples) if samples is not None else [0] * len(records)
    for name, scorer in scorers.items():
        for column, values in _scores(name, scorer, audio, sample_rate, prompts, list(records)).items():
            if column in columns:
                raise ValueError(
                    f"scorer {name!r} gives {column!r}, which another column holds; rename it or use one judge"
                )
            columns[column] = values
    sound = metrics.sanity(loud, sample_rate)
    if before is not None:
        loudness = sound["loudness"] - 20 * np.log10(before["gain"])
        sound |= {"peak_dbfs": before["peak_dbfs"], "clipping": before["clipping"], "loudness": loudness}
    columns.update(sound)
    table = pd.DataFrame(columns, index=range(len(records)))
    extra = [name for name in table.columns if name not in COLUMNS]
    return table.reindex(columns=[*COLUMNS, *extra])


def best_guidance(
    generator,
    records: Sequence[dict],
    scorers: Mapping[str, object],
    scales: Sequence[float],
    *,
    metric: str = "exact",
    **settings,
) -> tuple[float, pd.DataFrame]:
    """The guidance scale with the highest metric on validation records (of a tie the lowest), and all rows."""
    rows = pd.concat(
        [evaluate(generator, records, scorers, guidance_scale=scale, **settings) for scale in sorted(scales)],
        ignore_index=True,
    )
    values = {scale: metrics.measure(rows[rows["guidance"] == scale], metric, n=2).mean for scale in sorted(scales)}
    return max(values, key=values.get), rows


def _check(records, scorers, samples_per_prompt: int, best_of: int, select: str) -> None:
    if not records:
        raise ValueError("no prompt records: at least one is needed; check the part, split and count of the benchmark")
    ids = [record["id"] for record in records]
    if len(set(ids)) != len(ids):
        double = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"prompt id {double!r} occurs twice: ids must be unique, the noise is drawn from them")
    if samples_per_prompt < 1 or best_of < 1:
        raise ValueError(f"samples_per_prompt={samples_per_prompt}, best_of={best_of}: both must be 1 or more")
    if best_of > 1 and (select not in scorers or not callable(scorers[select])):
        raise ValueError(
            f"select={select!r}: best_of needs a reward of that name among the scorers ({', '.join(scorers)})"
        )


def prompt_field(record: dict, name: str):
    """What the rows of a prompt hold in one of PROMPT_COLUMNS: "" where the record says nothing, lists joined by "; "."""
    if name == "part":
        return prompt_sets.part_of(record)  # TTA-Bench's records do not name it
    if name == "event_relation":
        return record.get(name) or "None"  # TTA-Bench writes the string; pandas would read None as missing
    value = record.get(name, False if name == "heldout" else "")
    return "" if value is None else "; ".join(map(str, value)) if isinstance(value, list) else value


def _scores(
    name: str, scorer, audio, sample_rate: int, prompts: list[str], records: list[dict]
) -> dict[str, np.ndarray]:
    if hasattr(scorer, "score"):
        found = scorer.score(audio, records)
    elif hasattr(scorer, "scores"):
        found = scorer.scores(audio, sample_rate)
    else:
        found = {name: scorer(audio, sample_rate, prompts, records).scores}
    arrays = {key: torch.as_tensor(value).detach().cpu().double().numpy() for key, value in found.items()}
    for key, values in arrays.items():
        if values.shape != (len(records),):
            raise ValueError(
                f"scorer {name!r} gave {key!r} of shape {values.shape}: ({len(records)},) is needed, one per clip"
            )
    return arrays


def _best(reward, audio, sample_rate: int, records: list[dict], best_of: int) -> list[int]:
    scores = reward(audio, sample_rate, [record["prompt_text"] for record in records], records).scores
    winners = torch.as_tensor(scores).reshape(-1, best_of).argmax(dim=1)
    return [row * best_of + int(winner) for row, winner in enumerate(winners)]


@contextmanager
def _swapped(generator, network) -> Iterator[None]:
    original = generator.network if network is not None else None
    try:
        if network is not None:
            generator.network = network
        yield
    finally:
        if network is not None:
            generator.network = original


def fairness_score(values) -> float:
    """Mean over unordered pairs of 100·|a − b| / max(a, b), lower is fairer; values: mean quality per attribute.

    A pair whose larger value is not above 0 adds 0 but counts; fewer than two values give 0; a nan among them gives nan. Source:
    TTA-Bench.
    """
    values = [float(v) for v in values]
    if any(math.isnan(v) for v in values):
        return float("nan")
    pairs = list(combinations(values, 2))
    if not pairs:
        return 0.0
    return sum(100 * abs(a - b) / max(a, b) if max(a, b) > 0 else 0.0 for a, b in pairs) / len(pairs)


def robustness_score(perturbed, baseline) -> float:
    """Mean quality of perturbed prompts over the mean quality of the baseline (numbers or sequences); nan at 0.

    Differs from TTA-Bench's tool, which divides by the mean of the perturbed themselves: pass unperturbed prompts as
    baseline.
    """
    top, bottom = float(np.mean(perturbed)), float(np.mean(baseline))
    return top / bottom if bottom != 0 else float("nan")
