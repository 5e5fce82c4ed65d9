"""DiffusionNFT: online reinforcement learning on the forward process, without trajectories or log-probabilities.

An old policy samples with any solver; the trained policy is pulled towards good clips and pushed from bad ones by two
flow-matching losses of implicit policies. Source: DiffusionNFT (arXiv 2509.16117) and its public code. Differs from it:
the clips of one prompt are noised alike (see `update`).
"""

import torch
from torch import Tensor

from resonate_lib import flow
from resonate_lib.online import (
    Rollouts,
    check_flow,
    collect_round,
    companion_of,
    fit_rounds,
    follow,
    in_parts,
    learning,
    mean_of,
    minibatches,
    optimizer_step,
    reference_of,
    reward_metrics,
)
from resonate_lib.training import autocast


def optimality(advantages: Tensor, adv_clip: float) -> Tensor:
    """Advantages (n,) -> r (n,) in [0, 1], the probability that a clip is a good one: 1/2 where the advantage is 0."""
    return (advantages.clamp(-adv_clip, adv_clip) / (2 * adv_clip) + 0.5).clamp(0, 1)


def nft_loss(
    v: Tensor, v_old: Tensor, x_t: Tensor, x0: Tensor, t: Tensor, r: Tensor, *, b: float, adv_clip: float
) -> Tensor:
    """The NFT objective, 0-dim. v, v_old, x_t, x0: (B, N, C); t, r: (B,).

    Implicit policies v+ = b v + (1-b) v_old and v- = (1+b) v_old - b v predict x0 = x_t - t v; each squared error is
    divided by its own mean absolute error (detached, at least 1e-5), which evens out the times. loss = mean(r loss+/b
    + (1-r) loss-/b) * adv_clip. At v = v_old the gradient is proportional to 2r - 1, so a tie teaches nothing.
    """
    t = t.reshape(-1, *[1] * (x0.dim() - 1))

    def error(velocity: Tensor) -> Tensor:
        difference = x_t - t * velocity - x0
        weight = difference.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        return difference.square().flatten(1).mean(1) / weight

    positive, negative = error(b * v + (1 - b) * v_old), error((1 + b) * v_old - b * v)
    return ((r * positive + (1 - r) * negative) / b).mean() * adv_clip


def old_policy_decay(step: int, schedule: str) -> float:
    """d in old <- d old + (1-d) new after `step` (from 0): how slowly the sampling policy follows.

    "none": 0, on-policy; "linear": min(0.001 step, 0.5); "late": 0 for 75 steps, then min(0.0075 (step-75), 0.999).
    """
    if schedule == "none":
        return 0.0
    if schedule == "linear":
        return min(0.001 * step, 0.5)
    if schedule == "late":
        return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)
    raise ValueError(f"decay={schedule!r}: allowed are 'none', 'linear' and 'late'")


def draw_times(
    count: int, times_per_sample: int, steps: int, generator: torch.Generator, fraction: float = 1.0
) -> Tensor:
    """(times_per_sample, count) training times: for each prompt different points of the first `fraction` of the sampler's
    grid (1, 1-1/steps, ...).

    ValueError when more are asked than that has.
    """
    grid = flow.time_grid(steps)[: int(steps * fraction)]
    if times_per_sample > len(grid):
        raise ValueError(
            f"times_per_sample={times_per_sample}: {len(grid)} times of the grid are trained; ask for fewer, or raise "
            "num_steps or timestep_fraction"
        )
    order = torch.rand(count, len(grid), generator=generator).argsort(1)[:, :times_per_sample]
    return grid[order].T


def _sample_loss(
    networks, rollouts: Rollouts, rows: Tensor, t: Tensor, noise: Tensor, config
) -> tuple[Tensor, dict[str, float]]:
    """Loss on clips `rows` at times t (B,) with noise (B, N, C). networks: (trained, old, reference or None)."""
    network, old, reference = networks
    x0, cond = rollouts.latents[rows], rollouts.cond.index(rows)
    t, noise = t.to(x0.device), noise.to(x0.device)
    x_t = flow.interpolate(x0, noise, t)
    with autocast(config.precision, x0.device.type):
        v = flow.guided(network, x_t, t, cond, 1.0)
        with torch.no_grad():
            v_old = flow.guided(old, x_t, t, cond, 1.0)
            v_ref = None if reference is None else flow.guided(reference, x_t, t, cond, 1.0)
    r = optimality(rollouts.advantages[rows], config.adv_clip).to(v)
    policy = nft_loss(v, v_old, x_t, x0, t, r, b=config.b, adv_clip=config.adv_clip)
    kl = torch.zeros(()) if v_ref is None else (v - v_ref).square().mean()
    loss = policy + config.beta_kl * kl
    drift = (v - v_old).detach().square().mean().item()
    return loss, {"loss": loss.item(), "kl": kl.item(), "drift": drift}


def _backward_time(networks, rollouts: Rollouts, rows: Tensor, t: Tensor, noise: Tensor, config) -> dict[str, float]:
    """Add the gradient of one time per clip, config.micro_batch clips at a time."""

    def backward(part: slice, share: float) -> dict[str, float]:
        loss, report = _sample_loss(networks, rollouts, rows[part], t[part], noise[part], config)
        (loss * share / config.times_per_sample).backward()
        return report

    return in_parts(backward, len(rows), config.micro_batch)


def update(networks, optimizer, rollouts: Rollouts, config, generator: torch.Generator) -> dict[str, float]:
    """One pass: `config.minibatches` optimizer steps, `times_per_sample` times per clip in each. Clips of advantage
    0 (tied groups) are dropped.

    Clips of one prompt stay in one minibatch and share times and noise. Each of them alone is noised as the method asks,
    so the expected gradient is the same; but advantages of a group sum to zero, so that at v = v_old what the common
    noise gives every sibling alike cancels, and what is left is how the clips differ. kl: mean squared velocity difference to the
    reference; drift: to the old policy. skipped = 1 when nothing was left.
    """
    kept, ids, rows, norms = rollouts.advantages.nonzero().flatten(), rollouts.group_ids, [], []
    if not len(kept):
        return {"loss": 0.0, "kl": 0.0, "drift": 0.0, "grad_norm": 0.0, "trained_clips": 0.0, "skipped": 1.0}
    for groups in minibatches(ids[kept].unique(), config.minibatches, generator):
        part = kept[torch.isin(ids[kept], groups)]
        times = draw_times(
            rollouts.groups, config.times_per_sample, config.num_steps, generator, config.timestep_fraction
        )
        for t in times:
            noise = torch.randn(rollouts.groups, *rollouts.latents.shape[1:], generator=generator)
            rows.append(_backward_time(networks, rollouts, part, t[ids[part]], noise[ids[part]], config))
        norms.append(optimizer_step(networks[0], optimizer, config.max_grad_norm))
    summary = {"grad_norm": sum(norms) / len(norms), "trained_clips": float(len(kept)), "skipped": 0.0}
    return mean_of(rows) | summary


def train(
    generator, reward, records: list[dict], config, *, seed: int = 0, checkpoint=None, callback=None, watch=None
) -> list[dict]:
    """DiffusionNFT on generator.network, in place; returns one dict of metrics per step.

    The old policy, which samples by the deterministic solver, follows the trained one by `config.decay`. The rounds take
    `config.guidance_scales` in turn for sampling; the loss is always that of the conditional branch, as the method has
    it. The reference of the KL is the network as it is when this is called. What remains at the end is the average of
    the weights over the rounds (`online.average_in`, by `config.ema`). callback(i, metrics) runs after each step. watch: as for
    `grpo.train`.
    """
    check_flow(generator, "DiffusionNFT")
    with learning(generator.network.train(), config, seed=seed) as policy:
        reference = reference_of(policy) if config.beta_kl > 0 else None
        old = companion_of(policy, "old")

        def one_round(i: int, chosen: list[dict], optimizer, random: torch.Generator):
            rollouts = collect_round(generator, old, reward, chosen, config, i, random)
            metrics = reward_metrics(rollouts) | update((policy, old, reference), optimizer, rollouts, config, random)
            follow(old, policy, old_policy_decay(i, config.decay))
            return metrics, rollouts

        return fit_rounds(policy, records, config, one_round, label="NFT", seed=seed, checkpoint=checkpoint, callback=callback,
                          watch=watch, old=old)
