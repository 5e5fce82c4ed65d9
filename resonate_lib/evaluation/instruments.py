"""Training every instrument from nothing: the independent judge, and two CLAPs and two LALMs (reward and evaluation).

No two of them share a scene: each has a corpus of its own, told apart by the seed.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from resonate_lib import pretrain
from resonate_lib.data import scenes
from resonate_lib.data.corpus import Corpus, to_int16
from resonate_lib.evaluation.judge import Judge, fit_judge, freeze_threshold
from resonate_lib.rewards.clap import ClapReward, fit_clap
from resonate_lib.rewards.lalm import LalmReward
from resonate_lib.rewards.lalm_training import fit_lalm

JUDGE_SCENES = 100  # + seed; its threshold is frozen on validation scenes of the same number
SCENES = {"lalm": 300, "clap": 400, "lalm_eval": 500, "clap_eval": 600}  # + 10 * seed
TOWER_FIRST = 250  # steps of the LALM's audio tower alone, at most an eighth of all steps


def scene_seed(name: str, seed: int) -> int:
    """The seed of the scenes that an instrument is trained on."""
    return JUDGE_SCENES + seed if name == "judge" else SCENES[name] + 10 * seed


def roughen(corpus: Corpus, *, share: float = 2 / 3, noise: float = 0.3, iterations: int = 2, seed: int = 0) -> None:
    """Replace a random `share` of the corpus's clips by what the codec makes of their latents plus noise, in place.

    Generated clips have small errors that original ones have not. A reward that never heard any takes them for missing
    events: with 0.2 deviations of noise on every latent the judge still gets 0.84 of clips right (0.91 without), while an
    audio language model trained on originals alone falls from 0.97 to 0.48. noise: the largest deviation, drawn uniformly
    for each clip. The judge itself is trained on originals only.
    """
    codec, _ = pretrain.fit_codec(corpus)
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(corpus), generator=random)[: round(share * len(corpus))].tolist()
    deviation = codec.encode(corpus.waveforms(chosen[:256])).std((0, 1))
    told = time.monotonic()
    for start in range(0, len(chosen), 64):
        part = chosen[start : start + 64]
        latents = codec.encode(corpus.waveforms(part))
        level = noise * torch.rand(len(part), 1, 1, generator=random)
        latents += level * deviation * torch.randn(latents.shape, generator=random)
        corpus.audio[part] = to_int16(codec.decode(latents, iterations=iterations).numpy())
        if time.monotonic() - told > 5:
            told = time.monotonic()
            print(f"clips through the codec: {start + len(part)}/{len(chosen)}", flush=True)


def train_judge(config, data, *, seed: int, checkpoint=None) -> tuple[Judge, list[dict]]:
    """A judge by a `RewardConfig`, on `data.judge_clips` scenes of all combinations: it must know every one of them."""
    number = scene_seed("judge", seed)
    train = Corpus.from_scenes(data.judge_clips, split="train", seed=number, world_seed=data.world_seed, combinations="all")
    validation = Corpus.from_scenes(data.validation_clips, split="validation", seed=number, world_seed=data.world_seed)
    judge, history = fit_judge(train, steps=config.judge_steps, batch_size=config.judge_batch_size,
                               learning_rate=config.judge_learning_rate, seed=7 + seed, checkpoint=checkpoint)
    freeze_threshold(judge, validation)
    return judge, history


def train_reward(name: str, config, data, *, seed: int, checkpoint=None) -> tuple[ClapReward | LalmReward, list[dict]]:
    """The reward model `name` (clap, lalm, clap_eval, lalm_eval) by a `RewardConfig`, on as many scenes as the base model,
    two thirds of them roughened."""
    number = scene_seed(name, seed)
    corpus = Corpus.from_scenes(data.train_clips, split="train", seed=number, world_seed=data.world_seed)
    roughen(corpus, seed=number)
    if name.startswith("clap"):
        return fit_clap(corpus, steps=config.clap_steps, batch_size=config.clap_batch_size, seed=number,
                        learning_rate=config.clap_learning_rate, checkpoint=checkpoint)
    rng = np.random.default_rng([number, 92])
    texts = [scenes.caption(scenes.sample_spec(rng, "all"), rng) for _ in range(4000)]
    return fit_lalm(corpus, steps=config.lalm_steps, batch_size=config.lalm_batch_size, seed=number, texts=texts,
                    warmup_steps=min(TOWER_FIRST, config.lalm_steps // 8), learning_rate=config.lalm_learning_rate,
                    checkpoint=checkpoint)
