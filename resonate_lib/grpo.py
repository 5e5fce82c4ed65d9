"""Flow-GRPO: policy gradients through the stochastic steps of a flow, advantages relative to the clips of one prompt.

Formulas first, then one update, then `train`. Sources: Flow-GRPO (arXiv 2505.05470), the published Resonate code
(arXiv 2603.11661). Differs from the published code: float32 master weights; the KL is exact unless kl="paper"; the
final step is deterministic; a step where every group ties is skipped instead of crashing; latents are un-normalised
before decoding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from resonate_lib import flow, samplers
from resonate_lib.models.flux_audio import Condition, FluxAudio
from resonate_lib.online import (
    Rollouts,
    check_flow,
    collect_round,
    fit_rounds,
    group_advantages,
    in_parts,
    learning,
    mean_of,
    minibatches,
    optimizer_step,
    reference_of,
    reward_metrics,
)
from resonate_lib.training import autocast

__all__ = ["clipped_surrogate", "group_advantages", "kl_penalty", "score_step", "train", "trained_steps", "update"]


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip_range: float, adv_clip: float
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic objective as a loss. All arguments (B,); returns (loss 0-dim, ratio (B,)).

    mean of max(-A ratio, -A clamp(ratio, 1 +- clip_range)), A clamped to +-adv_clip. Because log_prob is a mean over
    thousands of dimensions the ratio stays near 1, hence the published clip_range of 1e-4.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    adv = advantages.to(ratio).clamp(-adv_clip, adv_clip)
    loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()
    return loss, ratio


def kl_penalty(mean: Tensor, mean_ref: Tensor, std_dev_t: Tensor, *, dt, kind: str = "exact") -> Tensor:
    """KL between two Gaussian transitions of one deviation, in nats per dimension, 0-dim.

    mean, mean_ref (B, ...); std_dev_t the SDE's a, broadcastable; dt = t_next - t (its sign does not matter).
    "exact" divides the squared difference by 2 a^2 |dt|, the true variance; "paper" by 2 a^2, as published, which is
    |dt| times as large: at ten steps beta 0.04 with "paper" is 0.004 with "exact". Mean over non-batch dimensions,
    then batch.
    """
    if kind not in ("exact", "paper"):
        raise ValueError(f"kl kind={kind!r}: allowed are 'exact' and 'paper'")
    variance = std_dev_t**2
    if kind == "exact":
        dt = torch.as_tensor(dt, dtype=mean.dtype, device=mean.device).abs()
        variance = variance * (dt.reshape(-1, *[1] * (mean.dim() - 1)) if dt.dim() else dt)
    return ((mean - mean_ref) ** 2 / (2 * variance)).flatten(1).mean(1).mean()


def _transition_kl(new: samplers.Transition, ref: samplers.Transition, kind: str, *, dt: float, sampler: str) -> Tensor:
    """`kl_penalty` for either sampler: the deviation of CPS already is the transition's, so no dt enters."""
    if sampler == "cps":
        return kl_penalty(new.mean, ref.mean, new.std, dt=1.0, kind="exact")
    return kl_penalty(new.mean, ref.mean, new.std_dev_t, dt=dt, kind=kind)


@dataclass(frozen=True)
class Step:
    """Step j of stored trajectories: x (B, N, C) at t, x_next (B, N, C) at t_next."""

    x: Tensor
    x_next: Tensor
    t: Tensor
    t_next: Tensor
    t_max: Tensor
    noise_level: float
    kind: str

    @classmethod
    def of(cls, trajectory: samplers.Trajectory, rows: Tensor, j: int) -> "Step":
        """Step j of the trajectories `rows`."""
        latents, times = trajectory.latents, trajectory.times
        return cls(
            latents[rows, j],
            latents[rows, j + 1],
            times[j],
            times[j + 1],
            times[1],
            trajectory.noise_level,
            trajectory.kind,
        )


def score_step(network: FluxAudio, step: Step, cond: Condition, guidance_scale: float) -> samplers.Transition:
    """Score the stored x_next under `network`, by the same expressions that sampled it; gradients flow through both
    guidance branches.
    """
    v = flow.guided(network, step.x, step.t, cond, guidance_scale)
    return samplers.sde_step(
        step.x,
        v,
        step.t,
        step.t_next,
        noise_level=step.noise_level,
        t_max=step.t_max,
        kind=step.kind,
        x_next=step.x_next,
    )


def trained_steps(trajectory: samplers.Trajectory, timestep_fraction: float) -> list[int]:
    """The stochastic steps among the first int(steps * timestep_fraction): 0.99 of 10 leaves out the last, as
    published.
    """
    limit = int((len(trajectory.times) - 1) * timestep_fraction)
    return [j for j in trajectory.stochastic if j < limit]


def draw_window(config, generator: torch.Generator) -> tuple[int, int] | None:
    """(first, length) of a round's stochastic steps, anywhere among the trained ones; None when all are stochastic.

    Siblings that share everything but a few steps' noise owe their difference in reward to those steps, which are the
    ones trained. Source: Flow-GRPO-Fast, MixGRPO (arXiv 2507.21802).
    """
    if not config.window:
        return None
    places = config.trainable_steps - config.window + 1
    return int(torch.randint(places, (1,), generator=generator)), config.window


def _step_loss(network, reference, rollouts: Rollouts, rows: Tensor, j: int, config) -> tuple[Tensor, dict[str, float]]:
    """Loss of trajectory step j on the clips `rows`, and what to report."""
    trajectory, cond = rollouts.trajectory, rollouts.cond.index(rows)
    step = Step.of(trajectory, rows, j)
    with autocast(config.precision, step.x.device.type):
        new = score_step(network, step, cond, rollouts.guidance_scale)
    old_log_prob, adv = trajectory.log_probs[rows, j], rollouts.advantages[rows]
    loss, ratio = clipped_surrogate(
        new.log_prob, old_log_prob, adv, clip_range=config.clip_range, adv_clip=config.adv_clip
    )
    kl = torch.zeros(())
    if reference is not None:
        with torch.no_grad(), autocast(config.precision, step.x.device.type):
            ref = score_step(reference, step, cond, rollouts.guidance_scale)
        dt = float(step.t_next - step.t)
        kl = _transition_kl(new, ref, config.kl, dt=dt, sampler=step.kind)
        loss = loss + config.beta * kl
    ratio = ratio.detach()
    return loss, {
        "loss": loss.item(),
        "kl": kl.item(),
        "ratio_mean": ratio.mean().item(),
        "ratio_deviation": (ratio - 1).abs().max().item(),
        "clip_fraction": ((ratio - 1).abs() > config.clip_range).float().mean().item(),
        "approx_kl": 0.5 * (new.log_prob - old_log_prob).detach().square().mean().item(),
    }


def _backward_step(network, reference, rollouts: Rollouts, rows: Tensor, j: int, config, steps: int) -> dict[str, float]:
    """Add the gradient of trajectory step j, one of `steps`, on the clips `rows`, config.micro_batch of them at a time."""

    def backward(part: slice, share: float) -> dict[str, float]:
        loss, report = _step_loss(network, reference, rollouts, rows[part], j, config)
        (loss * share / steps).backward()
        return report

    return in_parts(backward, len(rows), config.micro_batch, largest=("ratio_deviation",))


def update(network, optimizer, reference, rollouts: Rollouts, config, generator: torch.Generator) -> dict[str, float]:
    """One pass over the rollouts: `config.minibatches` optimizer steps, each over all trained trajectory steps.

    Clips whose advantage is exactly 0 are dropped. Returns means over all (minibatch, step), `first_ratio_deviation`
    (the first ratio must be 1: it measures nothing but rounding), and skipped = 1 when every clip was dropped and
    nothing was learned.
    """
    steps = trained_steps(rollouts.trajectory, config.timestep_fraction)
    if not steps:
        raise ValueError(
            f"timestep_fraction={config.timestep_fraction}: no stochastic step is trained; raise it or num_steps"
        )
    kept, rows, norms = rollouts.advantages.nonzero().flatten(), [], []
    if not len(kept):
        names = ("loss", "kl", "ratio_deviation", "clip_fraction", "approx_kl", "grad_norm", "first_ratio_deviation")
        return {"ratio_mean": 1.0, **dict.fromkeys(names, 0.0), "trained_clips": 0.0, "skipped": 1.0}
    for part in minibatches(kept, config.minibatches, generator):
        for j in steps:
            rows.append(_backward_step(network, reference, rollouts, part, j, config, len(steps)))
        norms.append(optimizer_step(network, optimizer, config.max_grad_norm))
    return {
        **mean_of(rows),
        "grad_norm": sum(norms) / len(norms),
        "first_ratio_deviation": rows[0]["ratio_deviation"],
        "trained_clips": float(len(kept)),
        "skipped": 0.0,
    }


def train(
    generator, reward, records: list[dict], config, *, seed: int = 0, checkpoint=None, callback=None, watch=None
) -> list[dict]:
    """Flow-GRPO on generator.network, in place; returns one dict of metrics per step.

    records: dicts with prompt_text, config.prompts_per_step different ones a step, config.group_size clips each. The
    KL's reference is the network as it is when this is called (with a checkpoint: call it with the same start).
    The rounds take config.guidance_scales in turn. With config.ema, what remains at the end is the average of the
    weights over the rounds (`online.average_in`). callback(i, metrics) runs after each step. watch(rollouts) -> dict adds to
    the metrics of the rounds it hears (`online.watched_rounds`, by config.watch_every); one with a state_dict is saved and
    restored with the training. Metrics: `online.reward_metrics` and `update`. Source: the published trainer's loop.
    """
    check_flow(generator, "Flow-GRPO")
    sde = {"noise_level": config.noise_level, "kind": config.kind, "last_step_noise": config.last_step_noise}
    with learning(generator.network.train(), config, seed=seed) as policy:
        reference = reference_of(policy) if config.beta > 0 else None

        def one_round(i: int, chosen: list[dict], optimizer, random: torch.Generator):
            rollouts = collect_round(
                generator, policy, reward, chosen, config, i, random, sde={**sde, "window": draw_window(config, random)},
                unnormalise=config.unnormalise,
            )  # fmt: skip
            return reward_metrics(rollouts) | update(policy, optimizer, reference, rollouts, config, random), rollouts

        return fit_rounds(policy, records, config, one_round, label="GRPO", seed=seed, checkpoint=checkpoint, callback=callback,
                          watch=watch)
