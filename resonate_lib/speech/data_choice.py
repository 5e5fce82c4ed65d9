"""Which utterances reinforcement is trained on (at random, hard ones only, those of middling difficulty, or these with long
ones), and which it is judged by.

Difficulty is a pass rate: the share of a few sampled hypotheses that are right word for word. A group whose hypotheses all pass or
all fail has no advantage; the most is learned where p (1 - p) is largest, at one half.
Source: the construction of RL data in arXiv 2509.18569.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from resonate_lib.data.corpus import to_int16
from resonate_lib.data.speech import SpeechCorpus, draw_utterances, open_speech, speak
from resonate_lib.knobs import unknown
from resonate_lib.progress import told
from resonate_lib.speech import token_policy
from resonate_lib.speech.errors import words
from resonate_lib.speech.recognition import Recogniser, clips_of

CHOICES = ("random", "hard", "middle", "middle_long")
LONG_SHARE = 1 / 3  # of what "middle_long" chooses
SILENT_SHARE = 0.1  # of what any choice holds, whatever their pass rates: invention over silence is always a part of the lesson
AT_ONCE = 24  # utterances of like length that are probed together
POOL_SEED, TEST_SEED = 700, 900  # of what reinforcement draws from (+ seed), and of what judges, the same for every seed
SHORT = ("command", "number", "name", "rare")


def silences(count: int, split: str, *, seed: int) -> SpeechCorpus:
    """Clips in which nothing is said, over noise; made anew, in no time, and without the speech packages."""
    utterances = draw_utterances(count, split=split, seed=seed, kinds=("silence",)) if count else []
    return SpeechCorpus([to_int16(clip.numpy()) for clip in speak(utterances)], utterances)


def open_pool(config, speech, *, seed: int, cache):
    """The training utterances that a choice is made from, of all kinds: none of the supervised start's sounds, and no sentence of
    the test. config: a RecognitionConfig, speech: a SpeechConfig.

    Of recordings these are the last of their order, the longest third of which count as long, and SILENT_SHARE of silences made
    here; the same recordings for every seed.
    """
    options, count = {"seed": POOL_SEED + seed, "cache": cache}, config.probe_utterances
    if not speech.speech_folder:
        return open_speech(speech, "train", count=count, **options)
    quiet = silences(round(SILENT_SHARE * count), "train", seed=POOL_SEED + seed)
    found = open_speech(speech, "train", count=count - len(quiet), last=True, **options)
    order = sorted(range(len(found)), key=lambda place: len(found.audio[place]), reverse=True)
    longest = {place for place in order[: round(LONG_SHARE * len(found))] if found.utterances[place].kind == "recording"}
    told = [replace(one, kind="long") if place in longest else one for place, one in enumerate(found.utterances)]
    return SpeechCorpus([*found.audio, *quiet.audio], [*told, *quiet.utterances], found.sample_rate)


def left_by_the_pool(count: int, pool: int) -> range:
    """The places, of `count` recordings in their order, that a pool of the last `pool` leaves to the supervised start. ValueError
    where it leaves none."""
    if count <= pool:
        raise ValueError(f"speech_folder holds {count} recordings for training, of which the choice of data takes "
                         f"probe_utterances={pool}: none are left for a start trained here; add some, or lower it")
    return range(count - pool)


def open_tests(config, speech, *, cache) -> dict:
    """{"test": short utterances, "silence", "long"}: sentences that no training has, half of them in voices that no training has;
    the same for all seeds.

    Of recordings (speech.speech_folder) the longest are the long ones, at most half, and no part of "test"; silences are always
    made here.
    """
    quiet = silences(config.eval_silence, "test", seed=TEST_SEED)
    options = {"seed": TEST_SEED, "cache": cache}
    if speech.speech_folder:
        everything = open_speech(speech, "test", count=speech.test_utterances, **options)
        if len(everything) < 2:
            raise ValueError(f"speech_folder holds {len(everything)} recording for the test: give 2 or more")
        order = sorted(range(len(everything)), key=lambda place: len(everything.audio[place]))
        first = len(order) - min(config.eval_long, len(order) // 2)
        return {"test": everything.select(sorted(order[:first])), "silence": quiet, "long": everything.select(order[first:])}
    test = open_speech(speech, "test", kinds=SHORT, **options)
    return {"test": test, "silence": quiet, "long": open_speech(speech, "test", count=config.eval_long, kinds=("long",), **options)}


def pass_rates(
    recogniser: Recogniser, corpus, positions: Sequence[int], *, samples: int, generator: torch.Generator,
    max_new_tokens: int = 48, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """The share (P,) of `samples` hypotheses, sampled for each of these P utterances, that are exact (`errors.words`). Prints its
    progress."""
    order = sorted(range(len(positions)), key=lambda place: len(corpus.audio[positions[place]]))
    rates, batches = torch.zeros(len(positions)), [order[start : start + AT_ONCE] for start in range(0, len(order), AT_ONCE)]
    for part in told(batches, len(order), "pass rates of utterances", size=len):
        with torch.no_grad():
            inputs = recogniser.inputs(clips_of(corpus, [positions[place] for place in part]))
        got = token_policy.sample(recogniser.model, inputs, group_size=samples, max_new_tokens=max_new_tokens,
                                  temperature=temperature, generator=generator)  # fmt: skip
        texts = recogniser.decode(got.ids, got.mask)
        for row, place in enumerate(part):
            asked = words(corpus.utterances[positions[place]].text)
            rates[place] = sum(words(text) == asked for text in texts[row * samples : (row + 1) * samples]) / samples
    return rates


def choose(choice: str, rates: Tensor, kinds: Sequence[str], *, count: int, generator: torch.Generator) -> list[int]:
    """`count` different indices into rates (P,), the pass rates; kinds (P,): of the utterances, among them "long" and "silence".

    SILENT_SHARE are silences at random. Of the others "random" takes any, "hard" the lowest pass rates, "middle" those nearest to
    one half, "middle_long" the same, of which LONG_SHARE of `count` are long; equal ones in random order. Where there are too few
    of a kind, others take their places. ValueError for another choice or too large a count.
    """
    if choice not in CHOICES:
        raise ValueError(unknown("choice", choice, CHOICES))
    if not 0 < count <= len(rates):
        raise ValueError(f"count={count}: {len(rates)} utterances were probed; choose 1 to that many")
    order = torch.randperm(len(rates), generator=generator)
    far = {"random": torch.zeros(len(rates)), "hard": rates}.get(choice, (rates - 0.5).abs())
    ranked = order[far[order].argsort(stable=True)].tolist()
    taken = [place for place in order.tolist() if kinds[place] == "silence"][: round(SILENT_SHARE * count)]
    if choice == "middle_long":
        taken += [place for place in ranked if kinds[place] == "long"][: round(LONG_SHARE * count)]
    later = {"silence": 2, "long": int(choice == "middle_long")}  # what only fills up
    own = set(taken)
    rest = sorted((place for place in ranked if place not in own), key=lambda place: later.get(kinds[place], 0))
    return taken + rest[: count - len(taken)]


def facts(rates: Tensor, kinds: Sequence[str], chosen: Sequence[int]) -> dict[str, float]:
    """What a choice holds, for its row of a table: number, mean pass rate, shares of always right, never right, between (whose
    groups can differ in whole transcripts), long, silent."""
    kept, own = rates[list(chosen)], [kinds[place] for place in chosen]
    return {
        "utterances": len(kept),
        "pass_rate": kept.mean().item(),
        "always": (kept == 1).float().mean().item(),
        "never": (kept == 0).float().mean().item(),
        "between": ((kept > 0) & (kept < 1)).float().mean().item(),
        "long": own.count("long") / len(own),
        "silent": own.count("silence") / len(own),
    }


def overlap(chosen: Mapping[str, Sequence[int]]) -> dict[str, dict[str, float]]:
    """For each choice the share of its utterances that each other one has too: near 1 they are the same data by other names."""
    sets = {name: set(places) for name, places in chosen.items()}
    return {name: {other: len(own & sets[other]) / len(own) for other in sets} for name, own in sets.items()}
