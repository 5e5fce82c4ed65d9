"""How far a set of clips lies from real ones: Fréchet distance of embeddings, and KL divergence of what paired clips hold.

Both are worth what is stated with them: the embedding, the reference, how many clips of which length, and the floor, which is
what real clips get against other real clips. What is heard of a clip comes from `embedders.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import special
from scipy import stats as scipy_stats

from resonate_lib.evaluation import stats
from resonate_lib.evaluation.embedders import Clips
from resonate_lib.evaluation.report import BASE

NAN = float("nan")
NONE = stats.Interval(NAN, NAN, NAN)
KINDS = ("softmax", "sigmoid")
SMALLEST = 1e-6  # added to probabilities, as AudioLDM's evaluation adds it
LENGTH_SLACK = 0.1  # seconds: codecs round a clip to whole frames

Gaussian = tuple[np.ndarray, np.ndarray]


def gaussian(vectors: np.ndarray) -> Gaussian:
    """Mean (D,) of vectors (M, D), M >= 2, and a root R (min(M, D), D) of their covariance: RᵀR, with M − 1 below."""
    vectors = np.asarray(vectors, np.float64)
    if vectors.ndim != 2 or len(vectors) < 2:
        raise ValueError(f"vectors {vectors.shape}: a covariance needs (M, D) with M of 2 or more clips")
    mean = vectors.mean(axis=0)
    return mean, np.linalg.qr((vectors - mean) / np.sqrt(len(vectors) - 1), mode="r")


def gaussian_distance(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance of two Gaussians: |μa − μb|² + tr(Σa + Σb − 2·(ΣaΣb)^½), never below 0.

    With roots Σ = RᵀR the trace of the square root is the sum of the singular values of Ra·Rbᵀ: no square root of a matrix is
    taken, so nothing is lost where a covariance is singular, as it is with fewer clips than dimensions. Source: Dowson and
    Landau 1982; as a distance of sounds: Fréchet Audio Distance (arXiv 1812.08466).
    """
    (mean_a, root_a), (mean_b, root_b) = a, b
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum() - 2 * cross))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two sets of vectors (M, D) and (N, D) by Gaussian fits, in float64.

    Few clips make it too large, by about 1/M and 1/N: compare numbers of equal clip counts, beside their floor.
    """
    return gaussian_distance(gaussian(a), gaussian(b))


def frechet_table(
    systems: Sequence[Clips], reference: Clips, second: Clips | None = None, *, base: str = BASE, blocks: int = 20, seed: int = 0
) -> pd.DataFrame:
    """One line a system: its Fréchet distance from the reference with a 95 % interval, and all that such a number must state.

    second: other real clips, as many as a system has and best of the systems' prompts; the floor is their distance from the
    reference. Without them it is that of two halves of the reference, which is far larger, as other prompts and half as many clips
    make it: 0.08 instead of 0.005 for 200 scenes and a CLAP. gain: distance minus that of `base`, negative where nearer to the
    reference; nan for another number of clips than base's, which alone would move it. unbiased: the distance for endlessly many
    clips (the jackknife's estimate: off by about 1/M² instead of 1/M; may be negative).
    Intervals: jackknife over `blocks` blocks of prompts, left out of all sets at once (so a gain is paired), with Student's t;
    that of `distance` is about what so many clips give on average, that of `unbiased` about the truth.
    Columns: embedding, system, reference, clips, reference_clips, prompts, clip_seconds, distance, low, high, floor,
    floor_low, floor_high, floor_sets, floor_clips, gain, gain_low, gain_high, unbiased, unbiased_low, unbiased_high.
    Warns where a set has no more clips than dimensions. ValueError for sets that cannot be compared.
    """
    if not systems:
        raise ValueError("no systems: pass the clips of one or more")
    _check_comparable([*systems, reference, *([] if second is None else [second])])
    if second is not None and np.array_equal(second.vectors, reference.vectors):
        raise ValueError(f"{second.name!r} are the reference's own clips: pass other real clips, or None for its halves")
    real = _halves(reference, seed) if second is None else (reference, second)
    sets = {clips.name: clips for clips in (*real, reference, *systems)}
    _warn_of_few(sets.values())
    block = _blocks(sets.values(), blocks, seed)
    fits = {name: _leave_out(clips, block) for name, clips in sets.items()}
    floor = _distances(fits[real[0].name], fits[real[1].name])
    found = {clips.name: _distances(fits[clips.name], fits[reference.name]) for clips in systems}
    stated = {"reference": reference.name, "reference_clips": len(reference.ids), "clip_seconds": reference.seconds}
    stated |= _three("floor", _jackknife(floor))
    stated |= {"floor_sets": f"{real[0].name} and {real[1].name}", "floor_clips": len(real[1].ids)}
    rivals = {clips.name for clips in systems if clips.name != base and base in sets and len(clips.ids) == len(sets[base].ids)}
    lines = []
    for clips in systems:
        values = found[clips.name]
        line = {"embedding": clips.embedding, "system": clips.name, "clips": len(clips.ids), "prompts": len(set(clips.ids))}
        line |= dict(zip(("distance", "low", "high"), _jackknife(values), strict=True)) | stated
        line |= _three("gain", _jackknife(values - found[base]) if clips.name in rivals else NONE)
        lines.append(line | _three("unbiased", _jackknife(values, corrected=True)))
    return pd.DataFrame(lines)[list(FRECHET_COLUMNS)]


FRECHET_COLUMNS = (
    *("embedding", "system", "reference", "clips", "reference_clips", "prompts", "clip_seconds", "distance", "low", "high"),
    *("floor", "floor_low", "floor_high", "floor_sets", "floor_clips", "gain", "gain_low", "gain_high"),
    *("unbiased", "unbiased_low", "unbiased_high"),
)


def _check_comparable(sets: Sequence[Clips]) -> None:
    first = sets[0]
    names = [clips.name for clips in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"sets named {names}: each needs a name of its own, or a table could not tell them apart")
    for clips in sets[1:]:
        if clips.embedding != first.embedding or clips.vectors.shape[1] != first.vectors.shape[1]:
            raise ValueError(f"{first.name!r} is {first.embedding}, {clips.name!r} {clips.embedding}: use one embedder for all")
        if abs(clips.seconds - first.seconds) > LENGTH_SLACK:
            raise ValueError(f"{first.name!r} has clips of {first.seconds:g} s, {clips.name!r} {clips.seconds:g} s: use one length")


def _halves(reference: Clips, seed: int) -> tuple[Clips, Clips]:
    """Two disjoint halves of a set; clips of one prompt stay together."""
    ids = np.unique(reference.ids)
    if len(ids) < 4:
        raise ValueError(f"{reference.name!r} has {len(ids)} prompts: two halves need 4 or more; pass `second`, or more clips")
    chosen = np.isin(reference.ids, np.random.default_rng([seed, 61]).permutation(ids)[: len(ids) // 2])
    parts = zip(("one half", "the other half"), (chosen, ~chosen), strict=True)
    one, other = (
        Clips(f"{part} of {reference.name}", reference.vectors[kept], reference.ids[kept], reference.embedding, reference.seconds)
        for part, kept in parts
    )
    return one, other


def _warn_of_few(sets: Iterable[Clips]) -> None:
    few = [f"{clips.name!r} {len(clips.ids)}" for clips in sets if len(clips.ids) <= clips.vectors.shape[1]]
    if few:
        warnings.warn(
            f"no more clips than dimensions of the embedding ({', '.join(few)}): their number makes most of the distance; "
            "read it beside the floor, or use more clips",
            stacklevel=3,
        )


def _blocks(sets: Iterable[Clips], blocks: int, seed: int) -> dict:
    """{prompt: number of its block}: at random, one for all sets, so that sets of the same prompts lose the same ones, and set by
    set, so that each loses about as many clips with every block."""
    rng, order = np.random.default_rng([seed, 62]), {}
    for clips in sets:
        new = [identity for identity in np.unique(clips.ids.astype(str)) if identity not in order]
        order |= {str(identity): len(order) + place for place, identity in enumerate(rng.permutation(new))}
    return {identity: place % min(blocks, len(order)) for identity, place in order.items()}


def _leave_out(clips: Clips, block: dict) -> list[Gaussian | None]:
    """The set's Gaussian, then those without each block in turn; None where fewer than two clips are left."""
    of = np.array([block[str(identity)] for identity in clips.ids])
    kept = [of != number for number in range(max(block.values()) + 1)]
    return [gaussian(clips.vectors), *(gaussian(clips.vectors[mask]) if mask.sum() > 1 else None for mask in kept)]


def _distances(a: Sequence[Gaussian | None], b: Sequence[Gaussian | None]) -> np.ndarray:
    """The distance of whole sets, then without each block: (1 + blocks,)."""
    return np.array([gaussian_distance(x, y) if x is not None and y is not None else NAN for x, y in zip(a, b, strict=True)])


def _jackknife(values: np.ndarray, *, corrected: bool = False, confidence: float = 0.95) -> stats.Interval:
    """An estimate with its interval from values (1 + G,): that of all clips, then those without each of G blocks.

    corrected: the estimate less the jackknife's estimate of its bias. Source: Efron and Tibshirani 1993, chapter 11.
    """
    whole, parts = float(values[0]), values[1:]
    count = len(parts)
    estimate = count * whole - (count - 1) * float(parts.mean()) if corrected and count > 1 else whole
    if count < 2 or not np.isfinite(parts).all():
        return stats.Interval(estimate, NAN, NAN)
    error = np.sqrt((count - 1) / count * ((parts - parts.mean()) ** 2).sum())
    half = float(scipy_stats.t.ppf((1 + confidence) / 2, count - 1) * error)
    return stats.Interval(estimate, estimate - half, estimate + half)


def _three(name: str, interval: stats.Interval) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def kl(reference: np.ndarray, generated: np.ndarray, kind: str, *, published: bool = False) -> np.ndarray:
    """KL(reference ‖ generated) in nats (M,) between what paired clips hold; class logits (M, K) each.

    kind "softmax": one distribution over the classes, as AudioLDM's evaluation has it; right where one class is asked for.
    "sigmoid": every class is present or not by itself, divergences summed over classes; right where several sound at once and
    the classifier was trained so. Probabilities get 1e-6 and are made to sum to 1 again, so a class adds 13.8 nats at most.
    published: AudioLDM's formula to the letter (arXiv 2301.12503, its evaluation code): 1e-6 is added to the generated side alone,
    and "sigmoid" leaves out the half of each class that says "absent", so that it may be negative.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: use one of {', '.join(KINDS)}")
    logits = [np.asarray(side, np.float64) for side in (reference, generated)]
    if logits[0].shape != logits[1].shape or logits[0].ndim != 2:
        raise ValueError(f"logits {logits[0].shape} and {logits[1].shape}: two arrays (M, K) of one shape are needed, a row a clip")
    p, q = (special.softmax(side, axis=1) if kind == "softmax" else special.expit(side) for side in logits)
    if published:
        return (special.xlogy(p, p) - p * np.log(q + SMALLEST)).sum(axis=1)
    if kind == "softmax":
        p, q = ((side + SMALLEST) / (1 + SMALLEST * side.shape[1]) for side in (p, q))
        return special.rel_entr(p, q).sum(axis=1)
    p, q = ((side + SMALLEST) / (1 + 2 * SMALLEST) for side in (p, q))
    return (special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q)).sum(axis=1)


def kl_table(
    systems: Sequence[Clips],
    reference: Clips,
    second: Clips | None = None,
    *,
    kind: str,
    base: str = BASE,
    n: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """One line a system: mean KL in nats of its clips from the originals of the same prompts, with a 95 % interval over prompts.

    Vectors are class logits (`embedders.judge_events`, `embedders.zero_shot`). reference: one original a prompt; second: another
    original of every prompt, whose KL is the floor (nan without). gain: paired difference to `base`, negative where nearer.
    Columns: posteriors, kind, system, reference, clips, prompts, clip_seconds, kl, low, high, floor, floor_low, floor_high, gain,
    gain_low, gain_high. ValueError for a prompt without an original, and for sets that cannot be compared.
    """
    if not systems:
        raise ValueError("no systems: pass the clips of one or more")
    _check_comparable([*systems, reference, *([] if second is None else [second])])
    found = {clips.name: kl(_partners(clips, reference), clips.vectors, kind) for clips in (*systems, *_given(second))}
    floor = stats.bootstrap_mean(found[second.name], second.ids, n=n, seed=seed) if second is not None else NONE
    compared = next((clips for clips in systems if clips.name == base), None)
    lines = []
    for clips in systems:
        gain = NONE
        if compared is not None and clips is not compared and np.array_equal(clips.ids, compared.ids):
            gain = stats.paired_bootstrap(found[clips.name], found[base], clips.ids, n=n, seed=seed)
        mean = stats.bootstrap_mean(found[clips.name], clips.ids, n=n, seed=seed)
        line = {"posteriors": clips.embedding, "kind": kind, "system": clips.name, "reference": reference.name}
        line |= {"clips": len(clips.ids), "prompts": len(set(clips.ids)), "clip_seconds": clips.seconds}
        line |= dict(zip(("kl", "low", "high"), mean, strict=True))
        lines.append(line | _three("floor", floor) | _three("gain", gain))
    return pd.DataFrame(lines)


def _given(clips: Clips | None) -> tuple[Clips, ...]:
    return () if clips is None else (clips,)


def _partners(clips: Clips, reference: Clips) -> np.ndarray:
    """The reference's logits (M, K) for each of the clips, by prompt."""
    row = {identity: place for place, identity in enumerate(reference.ids)}
    if len(row) < len(reference.ids):
        raise ValueError(f"{reference.name!r} has {len(reference.ids)} clips of {len(row)} prompts: give one original a prompt")
    missing = [identity for identity in clips.ids if identity not in row]
    if missing:
        raise ValueError(f"{clips.name!r}: {len(missing)} clips have no original, such as prompt {missing[0]!r}; leave them out")
    return reference.vectors[[row[identity] for identity in clips.ids]]
