"""What a judge is asked to find out about the judge itself: captions of sounds that are not there (silence, noise, another
clip), and the same question in other words.

The answers are tables of rows for `agreement.py`, which has the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from resonate_lib.evaluation.agreement import OTHER, ask_all, score_rows
from resonate_lib.rewards.lalm import QUESTION

WORDINGS = {
    "published": QUESTION,
    # Of AQAScore's "Thinking" variant (the published evaluation asks the published question); the other three are ours.
    "thinking": "Does this audio contain the sound events described by the text: {caption}? Please only answer yes or no.",
    "short": "Is this the sound of the following: {caption}? Yes or no?",
    "statement": "Somebody describes this audio so: {caption}. Is the description right? Answer with yes or no only.",
    "strict": "Listen to what is heard, how often and in which order. Does all of it agree with this text: {caption}? "
    "Only answer yes or no.",
}
SOUNDS = ("silence", "white noise", "pink noise")
LEVEL = 0.1  # RMS of the noises, -20 dBFS: as loud as the embedded world's events


def word(wording: str, caption: str) -> str:
    """The question about a caption in this wording. ValueError where the wording has no place, or several, for it."""
    if wording.count("{caption}") != 1:
        raise ValueError(f"wording {wording!r}: {{caption}} stands in it {wording.count('{caption}')} times; write it once")
    return wording.replace("{caption}", caption)


def ask_wordings(
    judges: Mapping[str, object], rows: pd.DataFrame, corpus, wordings: Mapping[str, str] = WORDINGS
) -> pd.DataFrame:
    """The captions of `rows` (`agreement.score_captions`) put to judges that can be asked, in every wording.

    One row for each judge, wording and caption: reward, wording, clip, kind, truth, caption, score, yes_mass (nan of a judge
    that does not tell it).
    """
    told = rows[["clip", "kind", "truth", "caption"]]
    asked = pd.concat([told.assign(wording=label) for label in wordings], ignore_index=True)
    questions = [word(wordings[label], caption) for label, caption in zip(asked["wording"], asked["caption"], strict=True)]
    tables = []
    for name, judge in judges.items():
        found = ask_all(judge, asked["clip"].tolist(), questions, corpus.waveforms, corpus.sample_rate)
        mass = found.parts.get("p_yes_mass", torch.full((len(asked),), torch.nan))
        tables.append(asked.assign(reward=name, score=found.scores.numpy(), yes_mass=mass.numpy()))
    columns = ["reward", "wording", "clip", "kind", "truth", "caption", "score", "yes_mass"]
    return pd.concat(tables, ignore_index=True)[columns]


def sound(kind: str, numbers: Sequence[int], samples: int, *, seed: int = 0) -> Tensor:
    """Silence or noise of one of SOUNDS, (B, samples): clip `number` is the same in every batch; pink falls by 3 dB an octave."""
    if kind not in SOUNDS:
        raise ValueError(f"unknown sound {kind!r}: use one of {', '.join(SOUNDS)}")
    if kind == "silence":
        return torch.zeros(len(numbers), samples)
    noise = np.stack([np.random.default_rng([seed, 94, number]).standard_normal(samples) for number in numbers])
    if kind == "pink noise":
        spectrum = np.fft.rfft(noise)
        noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(spectrum.shape[1]), 1)), samples)
    noise *= LEVEL / np.sqrt((noise**2).mean(1, keepdims=True))
    return torch.from_numpy(noise).float()


def score_sounds(rewards: Mapping[str, object], corpus, *, count: int, seed: int = 0) -> pd.DataFrame:
    """Silence and noise against the captions of the corpus's first clips, `count` at most: rows as `agreement.score_captions`
    gives them, truth 0, kind one of SOUNDS, a sound of its own for each caption.

    Where the events are known, only captions of several: noise might pass for rain alone.
    """
    records = [record for record in corpus.records if "groups" not in record or len(record["groups"]) > 1][:count]
    if not records:
        raise ValueError(f"{len(corpus)} clips, each of one event alone: noise might pass for it; take more clips")
    samples, tables = corpus.waveforms([0]).shape[1], []
    for kind in SOUNDS:
        rows = [{"clip": i, "kind": kind, "truth": 0, "caption": record["caption"]} for i, record in enumerate(records)]

        def heard(numbers, kind=kind):
            return sound(kind, numbers, samples, seed=seed)

        tables.append(score_rows(rewards, pd.DataFrame(rows), records, heard, corpus.sample_rate))
    return pd.concat(tables, ignore_index=True)


def swapped_between_clips(corpus, wrong: Callable) -> Callable:
    """`wrong` (record, rng) -> {kind: caption or record}, with a further kind: the caption of another clip of the corpus.

    Where the events are known, of a clip that shares none of them: nothing that the caption says is heard.
    """

    def swap(record: dict, rng: np.random.Generator) -> dict:
        found = wrong(record, rng)
        others = [] if OTHER in found else [other for other in corpus.records if _apart(other, record)]
        return found | ({OTHER: others[int(rng.integers(len(others)))]} if others else {})

    return swap


def _apart(a: dict, b: dict) -> bool:
    if "groups" in a and "groups" in b:
        return not {name for name, _ in a["groups"]} & {name for name, _ in b["groups"]}
    return a["caption"] not in b.get("captions", [b["caption"]])
