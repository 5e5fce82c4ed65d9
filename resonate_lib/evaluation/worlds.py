"""What a profile's world offers the notebooks: clips with captions, prompts to train on, prompts to be measured on, and what
can be measured there.

Two worlds with the same methods. `EmbeddedWorld`: scenes whose events are known, so that the independent judge can count
them. `FolderWorld`: recordings with captions and the published benchmark, where models must judge.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from resonate_lib import runs
from resonate_lib.config import DataConfig, EvalConfig, RewardConfig, SuiteConfig, resolve
from resonate_lib.data import audio_folder, prompts, scenes
from resonate_lib.data.corpus import Corpus, LazyCorpus, open_corpus
from resonate_lib.evaluation import suite
from resonate_lib.evaluation.judge import Judge
from resonate_lib.rewards.fine import FineColumns, taught


class EmbeddedWorld:
    """Scenes of 18 events, each with its events known (`data.scenes`); prompts are combinations held out from training."""

    knows_events = True
    metrics = ("exact", "event_f1", "order", "reward", "aqa", "clap")

    def __init__(self, data: DataConfig):
        self.data = data

    def corpus(self, split: str, *, seed: int) -> Corpus:
        """Clips of a split: train, validation or test."""
        return open_corpus(self.data, split, seed=seed, cache=runs.cache_dir())

    def clips(self, split: str, count: int, *, seed: int) -> Corpus:
        """`count` scenes of a split that no corpus on disk holds."""
        return Corpus.from_scenes(count, split=split, seed=900 + seed, world_seed=self.data.world_seed)

    def rl_prompts(self, count: int, *, seed: int) -> list[dict]:
        """`count` prompts of the training split."""
        return prompts.rl_prompts(count, seed=seed, world_seed=self.data.world_seed)

    def bench(self, part: str = "accuracy", split: str = "test", *, count: int, seed: int = 0) -> list[dict]:
        """At most `count` prompts of one part of the benchmark."""
        return prompts.embedded_bench(part, split=split, count=count, seed=seed, world_seed=self.data.world_seed)

    def wrong_captions(self, record: dict, rng: np.random.Generator) -> dict[str, str]:
        """{kind: caption} wrong for the clip in one detail: an event missing or replaced, the order swapped, a count changed."""
        return {kind: wrong["caption"] for kind, wrong in self.wrong_records(record, rng).items()}

    def wrong_records(self, record: dict, rng: np.random.Generator) -> dict[str, dict]:
        """`wrong_captions`, each with the groups and relation that it asks for, which the judge needs."""
        wrong = scenes.negative_specs(scenes.Spec.of(record), rng)
        return {kind: {"caption": scenes.caption(spec, rng), "groups": [list(group) for group in spec.groups],
                       "relation": spec.relation} for kind, spec in wrong.items()}  # fmt: skip

    def judge(self, run) -> dict:
        """{"judge": the independent judge}, which counts events: a scorer of `ttabench.evaluate`."""
        return {"judge": Judge.load(run.resolve_input("judge"))}

    def originals(self, records: Sequence[dict], *, seed: int) -> torch.Tensor | None:
        """What a perfect generator could give for these prompts: (B, T)."""
        return suite.original_scenes(records, seed=seed)


class FolderWorld:
    """Recordings with a caption file, and TTA-Bench where its folder is given; which events a clip holds is not known.

    Validation and test prompts are captions of those splits of the folder (`audio_folder.split_of`) unless TTA-Bench gives
    the part. Training prompts are those of `data.prompt_list`, else the training split's captions. A recording with several
    captions is one clip, and one prompt by its first. Where TTA-Bench is given no training prompt has the text of one of its own:
    136 of the 300 of its part bias are captions of AudioCaps' train.csv.
    """

    knows_events = False
    metrics = ("aqa", "ms_clap", "clap", "reward")

    def __init__(self, data: DataConfig, *, sample_rate: int, seconds: float, tta_bench: str = ""):
        if not data.folder or not data.captions:
            raise ValueError("this profile needs recordings with captions: give -p folder DIR and -p captions FILE")
        self.data, self.sample_rate, self.seconds, self.tta_bench = data, sample_rate, seconds, tta_bench

    @cached_property
    def records(self) -> list[dict]:
        """All records of the caption file, checked by `audio_folder.load_manifest`."""
        return audio_folder.load_manifest(Path(self.data.folder) / self.data.captions, self.data.folder)

    def of_split(self, split: str) -> list[dict]:
        """Records of a split. ValueError where there are none."""
        found = [record for record in self.records if audio_folder.split_of(record) == split]
        if not found:
            raise ValueError(f"{self.data.captions} has no recordings of the split {split!r}: add some, or a column `split`")
        return found

    def corpus(self, split: str, *, seed: int) -> LazyCorpus:
        """Clips of a split; seed, the embedded world's, is not looked at."""
        return LazyCorpus(self.of_split(split), sample_rate=self.sample_rate, seconds=self.seconds)

    def clips(self, split: str, count: int, *, seed: int) -> LazyCorpus:
        """The first `count` clips of a split."""
        return self.corpus(split, seed=seed).first(count)

    def rl_prompts(self, count: int, *, seed: int) -> list[dict]:
        """All training prompts, as published, or `data.rl_prompts` of them; count, the embedded world's, is not looked at. Those
        with the text of a prompt of TTA-Bench are left out, and counted aloud."""
        listed = self.data.prompt_list
        found = prompts.read_prompts(listed) if listed else prompts.caption_prompts(self.of_split("train"))
        held = {text for record in self.records if audio_folder.split_of(record) != "train" for text in record["captions"]}
        if shared := sum(record["prompt_text"] in held for record in found) if listed else 0:
            raise ValueError(f"{listed}: {shared} of its prompts are captions of the validation or test split of "
                             f"{self.data.captions}; take them out, else what is trained on is tested on")
        kept = [record for record in found if _plain(record["prompt_text"]) not in self._tested]
        if len(kept) < len(found):
            print(f"left out: {len(found) - len(kept)} of {len(found)} training prompts, which TTA-Bench asks too")
        if not kept:
            raise ValueError("every training prompt is one of TTA-Bench's: give other recordings or another prompt_list")
        return _some(kept, self.data.rl_prompts or len(kept), f"rl/{seed}")

    def bench(self, part: str = "accuracy", split: str = "test", *, count: int, seed: int = 0) -> list[dict]:
        """Parts other than accuracy are empty without TTA-Bench."""
        if split == "test" and self.tta_bench:
            return _some(prompts.load_tta_bench(self.tta_bench, part), count, f"{part}/{seed}")
        return _some(prompts.caption_prompts(self.of_split(split)), count, f"{split}/{seed}") if part == "accuracy" else []

    def wrong_captions(self, record: dict, rng: np.random.Generator) -> dict[str, str]:
        """The caption of another recording, and none of this one's: what a clip does not hold is known no better, and this is an
        easy one."""
        others, own = self._captions, {record["caption"], *record["captions"]}
        if own.issuperset(others):
            raise ValueError(f"{record['audio_path']}: every other recording has one of its captions: none is wrong for it")
        chosen = others[int(rng.integers(len(others)))]
        while chosen in own:
            chosen = others[int(rng.integers(len(others)))]
        return {"another clip's": chosen}

    def wrong_records(self, record: dict, rng: np.random.Generator) -> dict[str, dict]:
        """`wrong_captions` as records that hold nothing else."""
        return {kind: {"caption": caption} for kind, caption in self.wrong_captions(record, rng).items()}

    @cached_property
    def _tested(self) -> set[str]:
        """The plain texts of all prompts in TTA-Bench's files that are there."""
        files = prompts.TTA_BENCH_FILES if self.tta_bench else {}
        there = [part for part, name in files.items() if (Path(self.tta_bench) / name).is_file()]
        return {_plain(record["prompt_text"]) for part in there for record in prompts.load_tta_bench(self.tta_bench, part)}

    @cached_property
    def _captions(self) -> list[str]:
        return list(dict.fromkeys(record["caption"] for record in self.records))

    def judge(self, run) -> dict:
        """Nothing: no judge here knows which events a recording holds."""
        return {}

    def originals(self, records: Sequence[dict], *, seed: int) -> torch.Tensor | None:
        """The recordings whose captions these prompts are; None for prompts that have none."""
        if not records or not all("audio_path" in record for record in records):
            return None
        return audio_folder.load_audio(records, sample_rate=self.sample_rate, seconds=self.seconds)


def _plain(text: str) -> str:
    """A prompt without case, punctuation and double spaces, to tell whether two are one."""
    return " ".join(re.findall(r"\w+", text.lower()))


def previews(profile: str, count: int, *, seed: int) -> list[dict]:
    """`count` prompts of the benchmark to play; none where a profile of recordings has not been given any."""
    if resolve(SuiteConfig, profile).world == "folder" and not resolve(DataConfig, profile).folder:
        return []
    return open_world(profile).bench(count=count, seed=seed)


def scorers(world, run, reward: str, *, text=None) -> dict:
    """Who scores the benchmark's clips: the world's judge, the training reward (`reward`) and CLAP (`reward_clap`), and second
    models that no training heard (`aqa`, `clap`, `ms_clap`); those without a source are left out. `fine` asks the model of `aqa`
    about each event by itself, where it was taught to answer that. text: shipped CLAPs' encoder."""
    found = {
        "reward": run.reward(reward, text=text),
        "reward_clap": run.scorer("clap", text=text),
        "aqa": second(run, "lalm"),
        "clap": second(run, "clap", text=text),
        "aesthetics": run.aesthetics(),
        "ms_clap": run.ms_clap(),
    }
    if taught(found["aqa"]):
        found["fine"] = FineColumns(found["aqa"], resolve(SuiteConfig, run.profile).sample_rate)
    return world.judge(run) | {name: scorer for name, scorer in found.items() if scorer is not None}


def second(run, name: str, **options):
    """The model that judges beside the reward `name` (clap, lalm); None without a source, or where it is the reward's own."""
    config = resolve(RewardConfig, run.profile)
    source = getattr(config, f"{name}_eval_source")
    if source not in ("", "shipped") and source == getattr(config, f"{name}_source"):
        print(f"{name}_eval_source is the reward itself, no second judge: left out", flush=True)
        return None
    return run.scorer(f"{name}_eval", **options)


def measured(world, scorers: dict) -> tuple[str, ...]:
    """The metrics that these scorers give, the one that systems are compared by first."""
    return tuple(name for name in world.metrics if world.knows_events or name in scorers)


def _some(records: list[dict], count: int, seed: str) -> list[dict]:
    """`count` of the records at random, in their own order; all where there are no more."""
    if len(records) <= count:
        return records
    kept = sorted(random.Random(seed).sample(range(len(records)), count))
    return [records[i] for i in kept]


def open_world(profile: str, *, tta_bench: str | None = None) -> EmbeddedWorld | FolderWorld:
    """The world of a profile. tta_bench: the benchmark's folder, None for the profile's own."""
    world, data = resolve(SuiteConfig, profile), resolve(DataConfig, profile)
    if world.world == "embedded":
        return EmbeddedWorld(data)
    bench = resolve(EvalConfig, profile).tta_bench if tta_bench is None else tta_bench
    return FolderWorld(data, sample_rate=world.sample_rate, seconds=world.seconds, tta_bench=bench)
