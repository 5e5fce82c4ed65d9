"""Training everything that ships from nothing: the two base models (a flow and a diffusion, on the same scenes), the independent
judge, two CLAPs and two LALMs.

No two of the others share a scene: each has a corpus of its own, told apart by the seed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from resonate_lib import pretrain, progress, training
from resonate_lib.config import PretrainConfig, plain
from resonate_lib.data import audio_folder, scenes
from resonate_lib.data.corpus import Corpus, LazyCorpus, corpus_manifest, open_corpus, to_int16
from resonate_lib.diffusion import Diffusion
from resonate_lib.evaluation.judge import Judge, fit_judge, freeze_threshold
from resonate_lib.evaluation.worlds import FolderWorld
from resonate_lib.models.generator import Generator, codec_mode
from resonate_lib.rewards.clap import ClapReward, fit_clap
from resonate_lib.rewards.lalm import LalmReward
from resonate_lib.rewards.lalm_training import fit_lalm

JUDGE_SCENES = 100  # + seed; its threshold is frozen on validation scenes of the same number
SCENES = {"lalm": 300, "clap": 400, "lalm_eval": 500, "clap_eval": 600}  # + 10 * seed
LEVELS = (-12.0, 3.0)  # dB, lowest and highest gain of a reward's training clips
BITS = 8  # of a base's weights on disk, as those that ship: the judge hears no difference to 16
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
    batches = [chosen[start : start + 64] for start in range(0, len(chosen), 64)]
    for part in progress.told(batches, len(chosen), "clips through the codec", size=len):
        latents = codec.encode(corpus.waveforms(part))
        level = noise * torch.rand(len(part), 1, 1, generator=random)
        latents += level * deviation * torch.randn(latents.shape, generator=random)
        corpus.audio[part] = to_int16(codec.decode(latents, iterations=iterations).numpy())


def vary_level(corpus: Corpus, *, seed: int = 0) -> None:
    """Give every clip of the corpus a random gain within LEVELS, in place; none is driven past 0.95 of full scale.

    Generated clips are 4 dB quieter than scenes. A reward that never heard quiet clips says yes to a clip more readily when it is
    louder (P(yes) 0.55 at -6 dB, 0.68 at +6 dB, where the judge hears no improvement), and training makes it louder.
    """
    random = np.random.default_rng([seed, 93])
    for index in range(len(corpus)):
        clip = corpus.audio[index].astype(np.float32)
        gain = min(10 ** (random.uniform(*LEVELS) / 20), 0.95 * 32767 / max(float(np.abs(clip).max()), 1.0))
        corpus.audio[index] = np.rint(clip * gain).astype(np.int16)


def to_build(run, world) -> list[str]:
    """What a run trains before anything else: all of it from scratch; else the base where the shipped one is of another seed.

    Of recordings in a folder the base alone, from scratch: its rewards are published models.
    """
    found = None if run.from_scratch else run.resolve_input("base", optional=not world.knows_events)
    if run.from_scratch:
        return ["base", "lalm", "lalm_eval", "judge", "clap", "clap_eval"] if world.knows_events else ["base"]
    if found is None:
        return []
    own = found == run.checkpoint("base") or (world.knows_events and Generator.facts(found).get("seed", run.seed) != run.seed)
    return ["base"] if own else []


def to_build_diffusion(run, world) -> list[str]:
    """What notebook 08 trains first: the diffusion base from scratch and where there is none, else nothing, whatever the seed: its
    seeds are of training, from one base. Nothing for recordings in a folder, where it is a published pipeline."""
    if not world.knows_events:
        return []
    found = None if run.from_scratch else run.resolve_input("diffusion", optional=True)
    return ["diffusion"] if found in (None, run.checkpoint("diffusion")) else []


def demonstrate(base: Generator, world, config, *, seed: int) -> tuple[list[dict], float | None]:
    """`config.demo_steps` steps of pre-training, for the eye: from nothing on a few scenes, or of a copy of a published base on
    recordings. Returns the history, and the share of variance the codec keeps (None of a published one)."""
    if world.knows_events:
        small = Corpus.from_scenes(min(256, world.data.train_clips), seed=seed, world_seed=world.data.world_seed)
        _, history, kept = pretrain.build_base(small, config, seed=seed, steps=config.demo_steps)
        return history, kept
    corpus = world.corpus("train", seed=seed)
    copy = base.fork()
    history = pretrain.train_by(copy, pretrain.encode_only(copy, corpus), corpus.captions, config, steps=config.demo_steps,
                                learning_rate=config.continued_learning_rate, seed=seed)
    return history, None


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
    two thirds of them roughened, all at various levels; an LALM's with slips. KeyError for another name."""
    number = scene_seed(name, seed)
    make = {"shares": scenes.CLAP_SHARES} if name.startswith("clap") else {"slips": scenes.LALM_SLIPS}
    corpus = Corpus.from_scenes(data.train_clips, split="train", seed=number, world_seed=data.world_seed, **make)
    roughen(corpus, seed=number)
    vary_level(corpus, seed=number)
    if name.startswith("clap"):
        return fit_clap(corpus, steps=config.clap_steps, batch_size=config.clap_batch_size, seed=number,
                        learning_rate=config.clap_learning_rate, checkpoint=checkpoint)
    rng = np.random.default_rng([number, 92])
    texts = [scenes.caption(scenes.sample_spec(rng, "all"), rng) for _ in range(4000)]
    return fit_lalm(corpus, steps=config.lalm_steps, batch_size=config.lalm_batch_size, seed=number, texts=texts,
                    warmup_steps=min(TOWER_FIRST, config.lalm_steps // 8), learning_rate=config.lalm_learning_rate,
                    checkpoint=checkpoint)


def build(name: str, configs: dict, *, seed: int, folder: Path, state: Path | None, cache: Path) -> list[dict]:
    """Train `name` (base, diffusion, judge or a reward) from nothing and save it in `folder`; returns the training history.

    configs: "suite", "pretrain", "reward" and "data", the resolved dataclasses, and for the diffusion base "diffusion". state: the
    file a killed training goes on from.
    """
    data, rewards = configs["data"], configs["reward"]
    if folder.is_dir() and (history := training.history_done(state)):  # saved after its last step, by the run that is resumed
        return history
    if name in ("base", "diffusion"):
        config, process = _recipe(name, configs)
        if configs["suite"].world == "folder":
            return _build_published(configs, config, process, seed=seed, folder=folder, state=state)
        records = audio_folder.load_manifest(corpus_manifest(data, "train", seed=seed, cache=cache))
        corpus = LazyCorpus(records, sample_rate=scenes.SAMPLE_RATE, seconds=scenes.SECONDS)  # in memory 12,000 take 1.5 GB
        validation = open_corpus(data, "validation", seed=seed, cache=cache).first(rewards.eval_clips)
        base, history, kept = pretrain.build_base(corpus, config, validation=validation, seed=seed, checkpoint=state,
                                                  diffusion=process)
        made = {"clips": len(corpus), "world_seed": data.world_seed, "variance_kept": kept}
        base.save(folder, bits=BITS, seed=seed, **made, **plain(config))
    elif name == "judge":
        judge, history = train_judge(rewards, data, seed=seed, checkpoint=state)
        made = {key: value for key, value in plain(rewards).items() if key.startswith("judge_")}
        judge.save(folder, seed=seed, scenes=scene_seed(name, seed), clips=data.judge_clips, world_seed=data.world_seed, **made)
    else:
        trained, history = train_reward(name, rewards, data, seed=seed, checkpoint=state)
        trained.card |= {"scenes": scene_seed(name, seed), "clips": data.train_clips, "world_seed": data.world_seed}
        trained.save(folder)
    return history


def _recipe(name: str, configs: dict) -> tuple[PretrainConfig, Diffusion | None]:
    """How the base model `name` is trained, and its process: None for the flow. The diffusion base has steps of its own."""
    if name == "base":
        return configs["pretrain"], None
    own = configs["diffusion"]
    return replace(configs["pretrain"], steps=own.steps), Diffusion(schedule=own.schedule, prediction=own.prediction)


def _build_published(
    configs: dict, config: PretrainConfig, process: Diffusion | None, *, seed: int, folder: Path, state: Path | None
) -> list[dict]:
    """A network trained from nothing on recordings, around the published codec and text encoder."""
    suite = configs["suite"]
    places = {key: getattr(suite, key) or None for key in ("vae", "vocoder", "text")}
    sizes = {key: getattr(config, key) for key in ("hidden_dim", "depth", "fused_depth", "num_heads", "mlp_ratio", "text_seq_len")}
    mode = codec_mode(suite.sample_rate)
    generator = Generator.new_published(suite.weights, mode=mode, seconds=suite.seconds, seed=seed, diffusion=process, **places,
                                        **sizes)
    world = FolderWorld(configs["data"], sample_rate=generator.sample_rate, seconds=suite.seconds)
    corpus = world.corpus("train", seed=seed)
    pretrain.measure_statistics(generator, corpus)
    held = pretrain.held_out(generator, world.corpus("validation", seed=seed).first(configs["reward"].eval_clips))
    history = pretrain.train_by(generator, pretrain.encode_only(generator, corpus), corpus.captions, config, seed=seed,
                                checkpoint=state, held=held)
    generator.save(folder, seed=seed, clips=len(corpus), **plain(config))
    return history


def build_all(names: Sequence[str], configs: dict, run, *, seed: int, cache: Path, workers: int = 2) -> dict[str, list[dict]]:
    """`build` for every name into `run.checkpoint(name)`; returns {name: history}.

    Everything runs on the CPU. With several cores two are trained at a time, each in a process of its own on its share of
    them: networks of this size gain little from a second thread. More than two would need more memory than a laptop has.
    """
    places = {name: (run.checkpoint(name), run.state(name)) for name in names}
    workers = min(workers, len(names), os.cpu_count() or 1)
    if workers < 2:
        return {name: build(name, configs, seed=seed, folder=folder, state=state, cache=cache)
                for name, (folder, state) in places.items()}
    threads = (os.cpu_count() or 1) // workers
    with tempfile.TemporaryDirectory() as logs, ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        told = {name: Path(logs) / name for name in names}
        futures = {name: pool.submit(_build_apart, told[name], threads, name, configs, seed=seed, folder=folder, state=state,
                                     cache=cache) for name, (folder, state) in places.items()}  # fmt: skip
        try:
            _follow(futures, told)
            return {name: future.result() for name, future in futures.items()}
        except BaseException:  # also an interrupt: nothing may go on training unseen
            for process in list(pool._processes.values()):
                process.terminate()
            raise


def _build_apart(log: Path, threads: int, *arguments, **options) -> list[dict]:
    """`build` in a worker process: its lines go to a file that the parent reads."""
    torch.set_num_threads(threads)
    with log.open("w", buffering=1) as lines, contextlib.redirect_stdout(lines):
        return build(*arguments, **options)


def _follow(futures: dict, logs: dict[str, Path], every: float = 5.0) -> None:
    """Print the newest line of each running training until all are done; an error of one ends the waiting at once."""
    shown: dict[str, str] = {}
    waiting = set(futures.values())
    while waiting:
        done, waiting = wait(waiting, timeout=every, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()  # raises what ended it
        for name, log in logs.items():
            lines = log.read_text().splitlines() if log.is_file() else []
            if lines and lines[-1] != shown.get(name):
                shown[name] = lines[-1]
                print(f"{name} | {lines[-1]}", flush=True)
