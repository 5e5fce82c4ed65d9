"""`bench`: times of the suite's stages, each as a ratio to the plain way of doing the same work.

The baseline handles one clip at a time, as the published code does for its rewards. Below 1 is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from resonate_lib.runs import shipped_weights

STAGES = ("rollout", "decode", "reward_clap", "reward_lalm", "update", "epoch")
PROMPTS = [
    "a dog barks",
    "rain falls",
    "a siren, followed by a bird",
    "two dings",
    "a cow moos while waves break",
    "a whistle",
    "a car horn, followed by an explosion",
    "an engine runs",
]
SECONDS = 20.0  # a stage that is slower is measured once


def lines() -> Iterator[str]:
    """`bench <config> <stage> ratio=<ours / baseline>` or `... skipped=<reason>`, one by one."""
    yield from _tiny()
    import torch

    reason = "needs_the_published_weights" if torch.cuda.is_available() else "needs_a_gpu"
    for config in ("mid", "paper"):
        yield from (f"bench {config} {stage} skipped={reason}" for stage in STAGES)


def _tiny() -> Iterator[str]:
    folder = shipped_weights("tiny")
    if not (folder / "base").is_dir():
        yield from (f"bench tiny {stage} skipped=no_shipped_weights" for stage in STAGES)
        return
    from resonate_lib.models.generator import Generator

    generator = Generator.load(folder / "base")
    seeds = list(range(len(PROMPTS)))
    generator.encode_prompts(PROMPTS)
    latents = generator.generate(PROMPTS, steps=10, seeds=seeds)
    audio = generator.decode(latents, iterations=8)
    yield _ratio(
        "rollout",
        lambda: generator.generate(PROMPTS, steps=10, seeds=seeds),
        lambda: [
            generator.generate([prompt], steps=10, seeds=[seed]) for prompt, seed in zip(PROMPTS, seeds, strict=True)
        ],
    )
    yield _ratio(
        "decode",
        lambda: generator.decode(latents, iterations=8),
        lambda: [generator.decode(latent[None], iterations=8) for latent in latents],
    )
    from resonate_lib.rewards import load_reward

    for name in ("clap", "lalm"):
        if not (folder / name).is_dir():
            yield f"bench tiny reward_{name} skipped=no_shipped_weights"
            continue
        reward = load_reward(name, weights=folder)
        yield _ratio(
            f"reward_{name}",
            lambda reward=reward: reward(audio, generator.sample_rate, PROMPTS, None),
            lambda reward=reward: [
                reward(clip[None], generator.sample_rate, [prompt], None)
                for clip, prompt in zip(audio, PROMPTS, strict=True)
            ],
        )
    yield from (f"bench tiny {stage} skipped=no_plain_counterpart" for stage in ("update", "epoch"))


def _ratio(stage: str, ours: Callable, baseline: Callable) -> str:
    return f"bench tiny {stage} ratio={_best(ours) / _best(baseline):.3f}"


def _best(work: Callable, repeats: int = 3) -> float:
    """Seconds of the fastest of some repeats; the first call, which fills caches, counts only when it is slow."""
    times: list[float] = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
        if sum(times) > SECONDS:
            return min(times)
    return min(times[1:])
