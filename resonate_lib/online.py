"""What every online algorithm shares: draw prompts, sample groups of clips, hear them with the reward, compare within
groups, let a watch hear them too.

No loss here: `grpo.py`, `nft.py` and `dpo.py` decide what to learn from the rollouts.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resonate_lib import samplers
from resonate_lib.models.flux_audio import Condition, FluxAudio
from resonate_lib.training import autocast, fit

SAVE_EVERY = 5  # rounds between saved training states: one takes seconds, so little is lost; large states: `training.fit`


@dataclass
class Rollouts:
    """n = prompts * group_size clips, siblings adjacent.

    latents (n, N, C) final, in network space, sampled with guidance_scale; cond the n conditions; rewards (n,) float32;
    parts name -> (n,) what the reward is made of; group_ids (n,); advantages (n,) float64 or None before they are
    computed; trajectory only with an SDE; audio (n, T) as the reward heard it, at sample_rate Hz; metadata the n records.
    """

    latents: Tensor
    cond: Condition
    rewards: Tensor
    parts: dict[str, Tensor]
    group_ids: Tensor
    advantages: Tensor | None
    trajectory: samplers.Trajectory | None
    prompts: list[str]
    audio: Tensor
    guidance_scale: float
    metadata: list[dict]
    sample_rate: int

    @property
    def groups(self) -> int:
        """How many groups; ids run from 0."""
        return int(self.group_ids.max()) + 1


def group_advantages(rewards: Tensor, group_ids: Tensor, *, global_std: bool, eps: float = 1e-4) -> Tensor:
    """Advantages (n,) float64: (reward - mean of its group) / (deviation + eps), population deviations.

    rewards, group_ids: (n,). global_std: the deviation of all n rewards (published), else of the group. A group of
    equal rewards gets exactly 0: its mean would be off by a rounding error that then counts as an advantage.
    Source: GRPO (arXiv 2402.03300) as in Flow-GRPO. ValueError for a group of one, which has no advantage.
    """
    rewards, adv = rewards.detach().double().cpu(), torch.zeros(len(rewards), dtype=torch.float64)
    group_ids = torch.as_tensor(group_ids).cpu()
    for group in group_ids.unique():
        members = (group_ids == group).nonzero().flatten()
        values = rewards[members]
        if len(members) == 1:
            raise ValueError(
                f"group {int(group)} holds one clip: a group of one has no advantage; use group_size 2 or more"
            )
        if bool((values == values[0]).all()):
            continue
        spread = (rewards if global_std else values).std(correction=0)
        adv[members] = (values - values.mean()) / (spread + eps)
    return adv


def draw_records(records: list[dict], count: int, generator: torch.Generator) -> list[dict]:
    """`count` different records at random. ValueError when there are fewer."""
    if count > len(records):
        raise ValueError(f"{count} prompts a step, but only {len(records)} records: give more records or ask for fewer")
    return [records[i] for i in torch.randperm(len(records), generator=generator)[:count].tolist()]


def k_repeat_indices(
    dataset_len: int, batch_size: int, k: int, *, epoch: int, replicas: int = 1, rank: int = 0, seed: int = 42
) -> list[int]:
    """The published sampler's record numbers of one batch: batch_size of them on each of `replicas` devices, here for `rank`.

    Over all devices each drawn record comes k times, shuffled; `epoch` is the number of the batch since training began. The
    suite draws by `draw_records` and keeps siblings adjacent; this repeats the published draws. ValueError when k does not
    divide the batch, or there are fewer records than it takes. Source: the published trainer (Flow-GRPO's sampler).
    """
    total = replicas * batch_size
    if total % k or total // k > dataset_len:
        raise ValueError(f"k={k}: must divide replicas * batch_size = {total}, and {total}/k must be at most {dataset_len} records")
    generator = torch.Generator().manual_seed(seed + epoch)
    drawn = torch.randperm(dataset_len, generator=generator)[: total // k].repeat_interleave(k)
    shuffled = drawn[torch.randperm(total, generator=generator)]
    return shuffled[rank * batch_size : (rank + 1) * batch_size].tolist()


def draw_seed(generator: torch.Generator) -> int:
    """A seed below 2**62 from the generator."""
    return int(torch.randint(2**62, (1,), generator=generator))


def sample_seeds(seed: int, count: int) -> list[int]:
    """One seed per clip; the first ones do not depend on `count`."""
    generator = torch.Generator().manual_seed(seed)
    return [draw_seed(generator) for _ in range(count)]


@torch.no_grad()
def collect(
    generator, network: FluxAudio, reward, records: list[dict], *, group_size: int, steps: int, guidance_scale: float,
    seed: int, decode_iterations: int, sde: dict | None = None, precision: str = "auto", sample_batch: int = 0,
    unnormalise: bool = True,
) -> Rollouts:  # fmt: skip
    """Sample group_size clips for each record, decode them and score them.

    generator: gives encode_prompts, decode, sample_rate, latent_shape, diffusion; `network` is the policy that samples (it may
    be a copy of generator.network). records: dicts with prompt_text, handed to the reward as metadata. sde: keyword arguments
    of `samplers.rollout` (noise_level, kind, window, last_step_noise), for a diffusion model of `Diffusion.rollout` (eta,
    kind, variance, window), or None for the deterministic solver.
    The first noise and all later ones of clip i come from one generator seeded by (seed, i); with a window the siblings
    (clips of one prompt) share the first noise, so that they differ by the window's alone. sample_batch: most clips
    sampled, decoded and scored at once (0: all); it bounds memory and changes nothing but rounding. unnormalise=False
    repeats the published RL code, whose codec got normalised latents. Advantages are None: deviations are the algorithm's
    choice.
    """
    metadata = [record for record in records for _ in range(group_size)]
    prompts = [record["prompt_text"] for record in metadata]
    cond = generator.encode_prompts([record["prompt_text"] for record in records]).repeat(group_size)
    cond = cond.to(network.latent_mean.device)
    sources = [torch.Generator().manual_seed(s) for s in sample_seeds(seed, len(prompts))]
    device = network.latent_mean.device
    noise = torch.stack([torch.randn(*generator.latent_shape, generator=g) for g in sources]).to(device)
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}  # equal prompts form one group
    group_ids = torch.tensor([numbers[prompt] for prompt in prompts])
    sampler = generator.diffusion or samplers
    if sde is not None and sde.get("window"):
        noise = noise[[prompts.index(prompt) for prompt in prompts]]

    def sample(rows: slice):
        trajectory = None
        with autocast(precision, device.type):
            if sde is None:
                latents = sampler.ode_sample(network, noise[rows], cond.index(rows), steps=steps, guidance_scale=guidance_scale)
            else:
                trajectory = sampler.rollout(
                    network, noise[rows], cond.index(rows), steps=steps, guidance_scale=guidance_scale,
                    generators=sources[rows], **sde,
                )  # fmt: skip
                latents = trajectory.final
        audio = generator.decode(latents, iterations=decode_iterations, normalised=unnormalise)
        result = reward(audio, generator.sample_rate, prompts[rows], metadata[rows])
        return latents, trajectory, audio.cpu(), result.scores.float().cpu(), result.parts

    latents, trajectories, audio, scores, named = zip(*map(sample, parts(len(prompts), sample_batch)), strict=True)
    return Rollouts(
        _join(latents), cond, _join(scores), {name: _join([part[name] for part in named]) for name in named[0]}, group_ids,
        None, None if sde is None else _join_trajectories(trajectories), prompts, _join(audio), guidance_scale, metadata,
        generator.sample_rate,
    )  # fmt: skip


def collect_round(generator, policy, reward, records: list[dict], config, i: int, random: torch.Generator, **options) -> Rollouts:
    """The rollouts of round i of a training by `config`, advantages computed: `collect` with the round's guidance and a seed
    drawn from `random`. options: how an algorithm samples otherwise."""
    rollouts = collect(
        generator, policy, reward, records, group_size=config.group_size, steps=config.num_steps,
        guidance_scale=config.guidance_scales[i % len(config.guidance_scales)], seed=draw_seed(random),
        decode_iterations=config.decode_iterations, precision=config.precision, sample_batch=config.sample_batch, **options,
    )  # fmt: skip
    rollouts.advantages = group_advantages(rollouts.rewards, rollouts.group_ids, global_std=config.global_std)
    return rollouts


def watched_rounds(config) -> range:
    """The rounds that a watch hears: the first, and every config.watch_every after it; none where that is 0.

    Rounded up to whole turns of the guidances, so that all of them have the first one: others could not be compared.
    """
    turns = len(config.guidance_scales)
    every = -(-config.watch_every // turns) * turns
    return range(0, config.steps, every) if every else range(0)


def heard_by(watch, rollouts: Rollouts, config, i: int) -> dict:
    """What `watch(rollouts)` says of round i, for the history; {} without a watch, and in rounds that it does not hear.

    Called when the round has been learned from, so that nothing a watch does can reach the training: it gets no generator,
    no gradient, and what it draws from torch's own is put back. An alarm (`alarm`: what has parted from the reward) is printed.
    """
    if watch is None or i not in watched_rounds(config):
        return {}
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            found = watch(rollouts)
        except OSError as error:  # a served judge that is gone, or a full disk: the training does not depend on it
            print(f"round {i + 1}: not watched ({error})", flush=True)
            return {}
    if found.get("alarm"):
        print(f"round {i + 1}: ALARM, the reward has risen and this has parted from it: {found['alarm']}", flush=True)
    return found


def fit_rounds(
    policy, records: list[dict], config, one_round, *, label: str, seed: int = 0, checkpoint=None, callback=None, watch=None,
    **modules,
) -> list[dict]:  # fmt: skip
    """The config.steps rounds of an online training of `policy`, in place; returns one dict of metrics a round.

    one_round(i, chosen, optimizer, random) -> (metrics, what it made), on config.prompts_per_step different records. Around it: the
    rate's warm-up; watch(made) by config.watch_every (`heard_by`; one with a state_dict is saved and restored too); with config.ema
    the average of the weights over the rounds, which is what remains at the end; callback(i, metrics), while the policy is what it
    would be if this round were the last. modules: what else changes and must be in the checkpoint (`training.fit`), by name.
    """
    average = companion_of(policy, "average") if config.ema else policy
    optimizer = make_optimizer(policy, config.learning_rate)

    def step(i: int, random: torch.Generator) -> dict[str, float]:
        warm_up(optimizer, i, config.learning_rate, config.warmup_steps)
        metrics, made = one_round(i, draw_records(records, config.prompts_per_step, random), optimizer, random)
        metrics |= heard_by(watch, made, config, i)
        if config.ema:
            average_in(average, policy, i, config.ema)
        if callback is not None:
            with holding(policy, average):
                callback(i, metrics)
        return metrics

    modules = {"network": policy, "optimizer": optimizer, **modules} | ({"average": average} if config.ema else {})
    modules |= {"watch": watch} if hasattr(watch, "state_dict") else {}
    history = fit(step, steps=config.steps, modules=modules, label=label, seed=seed, checkpoint=checkpoint, save_every=SAVE_EVERY)
    policy.load_state_dict(average.state_dict())
    return history


def parts(count: int, most: int) -> list[slice]:
    """0 .. count-1 in as few slices of at most `most` as there can be (0: one of all), their lengths differing by one at most.

    Even lengths because the length picks the kernels, and those the rounding: clips scored in batches of the length they
    were sampled in have a first ratio of exactly 1. In others it is off by about 1e-6 in float32; in bfloat16 on a CPU it
    still is exactly 1 (tested), except for a clip alone, whose ratio is off by 2e-4, twice the published clip_range.
    """
    number = -(-count // most) if most else 1
    edges = [count * i // number for i in range(number + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


def _join(tensors) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _join_trajectories(pieces: tuple[samplers.Trajectory, ...]) -> samplers.Trajectory:
    """Rollouts of several batches as one; grid, noise level and stochastic steps are common to them."""
    joined = {name: _join([getattr(piece, name) for piece in pieces]) for name in ("latents", "log_probs", "noises")}
    return replace(pieces[0], **joined)


def reward_metrics(rollouts: Rollouts) -> dict[str, float]:
    """reward_mean and reward_std over the step's clips, zero_groups: share of prompts whose clips all tie, and part_*
    means.

    Parts may hold NaN where they do not apply; their mean is over the rest.
    """
    rewards, ids = rollouts.rewards, rollouts.group_ids
    tied = [bool((rewards[ids == i] == rewards[ids == i][0]).all()) for i in range(rollouts.groups)]
    metrics = {
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "zero_groups": sum(tied) / len(tied),
    }
    return metrics | {f"part_{name}": part.float().nanmean().item() for name, part in rollouts.parts.items()}


def gains(history: list[dict], clips_a_round: int, *, turns: int = 1) -> list[dict]:
    """A training history as rows of `clips` generated so far and `gain`: reward_mean less that of the first tenth of the
    rounds, in units of reward_std there, so that runs of different rewards fit one axis.

    turns: rounds that differ by plan (guidances in turn); the start is averaged over whole turns.
    """
    first = history[: turns * max(1, len(history) // (10 * turns))]
    start = sum(row["reward_mean"] for row in first) / len(first)
    spread = sum(row["reward_std"] for row in first) / len(first) + 1e-8
    return [{"clips": (row["step"] + 1) * clips_a_round, "gain": (row["reward_mean"] - start) / spread} for row in history]


def minibatches(kept: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    """Indices `kept` (m,) in random order, in at most `count` parts that differ by one in size at most."""
    shuffled = kept[torch.randperm(len(kept), generator=generator)]
    return list(shuffled.tensor_split(min(count, len(kept))))


TRAINED = {"all": ("",), "attention": ("qkv", "_norm", "adaLN_modulation", "text_", "t_embed")}
TRAINED["attention"] += ("to_q", "to_k", "to_v", "time_", "timestep_proj", "class_embedding", "global_proj", "cross_attention_proj")


@contextlib.contextmanager
def only(network: FluxAudio, trained: str) -> Iterator[None]:
    """Within the block gradients reach the named part of the weights alone; afterwards those they reached before.

    "all": every weight (published). "attention": projections to and norms of queries, keys and values, modulations, and
    all that sees text or time only; not the audio stream's convolutions and output projections. Those hold most of the
    weights, and there the gradients of two rounds of a few hundred clips have next to nothing in common (cosine 0.002,
    against 0.05 to 0.08 in attention), while Adam moves them as far as the rest. ValueError for another name.
    """
    if trained not in TRAINED:
        raise ValueError(f"trained={trained!r}: allowed are {', '.join(TRAINED)}")
    before = {name: p for name, p in network.named_parameters() if p.requires_grad}
    left_out = [p for name, p in before.items() if not any(part in name for part in TRAINED[trained])]
    try:
        for p in left_out:
            p.requires_grad_(False)
        yield
    finally:
        for p in left_out:
            p.requires_grad_(True)


@contextlib.contextmanager
def learning(network: FluxAudio, config, *, seed: int = 0) -> Iterator:
    """Within the block, what learns: the network itself, or with config.trained "lora" adapters on it that stand for it.

    "all" and "attention": see `only`. "lora": `models.lora` with config.lora_rank and lora_alpha, drawn from the seed; at the
    end of the block they are merged, so that the network is an ordinary one again. config.checkpointing holds meanwhile.
    """
    network.checkpointing, network.adapter = config.checkpointing, None
    try:
        if config.trained != "lora":
            with only(network, config.trained):
                yield network
            return
        from resonate_lib.models import lora  # peft takes seconds to import

        policy = lora.attach(network, config.lora_rank, config.lora_alpha, seed=seed)
        try:
            yield policy
        finally:
            lora.merge(policy)
    finally:
        network.checkpointing = False


def check_flow(generator, method: str) -> None:
    """ValueError where the generator is a diffusion model, whose network predicts no velocity: `method` would learn nonsense."""
    if generator.diffusion is not None:
        raise ValueError(f"{method} needs a flow, and this generator is a {generator.diffusion}: train it by ppo, or name a flow")


def reference_of(policy):
    """What the policy of `learning` was at its start and stays: a frozen copy, or the network without its adapters."""
    return frozen_copy(policy) if isinstance(policy, torch.nn.Module) else policy.reference()


def companion_of(policy, name: str):
    """A policy equal to this one that moves only by `follow`: a frozen copy, or one more adapter on the same network.

    Of adapters A and B are averaged, not their product, as Flow-GRPO and DiffusionNFT do.
    """
    return frozen_copy(policy) if isinstance(policy, torch.nn.Module) else policy.companion(name)


def make_optimizer(network: FluxAudio, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over the trainable float32 weights with the published RL settings (betas 0.9/0.999, weight decay 1e-4, eps
    1e-8).

    The published code steps bfloat16 weights directly, where an update below 1/512 of a weight rounds to nothing.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8, fused=True)


def warm_up(optimizer: torch.optim.Optimizer, step: int, learning_rate: float, rounds: int) -> None:
    """Set the rate of round `step` (from 0): linear up to learning_rate over `rounds`, then constant; rounds=0: constant.

    Adam's first steps have the full size in every weight, whatever the gradient.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * min(1.0, (step + 1) / max(rounds, 1))


def optimizer_step(network: FluxAudio, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """Clip, step, clear; returns the gradient norm before clipping. A norm that is not finite is an error, not a
    silent skip.
    """
    norm = torch.nn.utils.clip_grad_norm_([p for p in network.parameters() if p.requires_grad], max_grad_norm)
    if not bool(torch.isfinite(norm)):
        raise FloatingPointError(f"gradient norm is {norm.item()}: lower the learning rate, or use precision='float32'")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def frozen_copy(network: FluxAudio) -> FluxAudio:
    """A deep copy that is never trained."""
    import copy

    return copy.deepcopy(network).eval().requires_grad_(False)


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """Column means of equal dicts."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def in_parts(backward, count: int, most: int, *, largest: tuple[str, ...] = ()) -> dict[str, float]:
    """Add up the gradient of a mean over `count` clips, at most `most` of them at a time (0: all).

    backward(part, share): adds the gradient of share times the mean over the slice `part`, and returns its metrics. Returns
    their means over all clips; of the columns `largest` the maximum.
    """
    slices = parts(count, most)
    shares = [(part.stop - part.start) / count for part in slices]
    rows = [backward(part, share) for part, share in zip(slices, shares, strict=True)]
    if len(rows) == 1:
        return rows[0]
    mean = {key: sum(share * row[key] for share, row in zip(shares, rows, strict=True)) for key in rows[0]}
    return mean | {key: max(row[key] for row in rows) for key in largest}


@torch.no_grad()
def follow(old: torch.nn.Module, new: torch.nn.Module, decay: float) -> None:
    """old <- decay*old + (1-decay)*new, parameter by parameter."""
    for kept, trained in zip(old.parameters(), new.parameters(), strict=True):
        if trained.requires_grad:
            kept.lerp_(trained, 1 - decay)


@contextlib.contextmanager
def holding(policy, other) -> Iterator[None]:
    """Within the block `policy` has the weights of `other`, one equal in kind."""
    if other is policy:
        yield
        return
    own = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.load_state_dict(other.state_dict())
    try:
        yield
    finally:
        policy.load_state_dict(own)


def average_in(average: torch.nn.Module, network: torch.nn.Module, step: int, decay: float) -> None:
    """average <- d average + (1-d) network after round `step` (from 0), d = min((1+step)/(10+step), decay).

    Weights of single rounds scatter; their average scatters less, and forgets the first rounds faster than the last.
    The decay is Flow-GRPO's, which averages at every eighth update and not at every round.
    """
    follow(average, network, min((1 + step) / (10 + step), decay))
