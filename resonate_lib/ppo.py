"""PPO on a diffusion generator: denoising is a Markov decision process, and what it ends in is heard by a reward.

The state is (x_j, t_j, text), the action the next latent, drawn from the Gaussian of the stochastic sampler, p(x_{j+1} | x_j) =
N(mean_theta(x_j, t_j, text), std_j^2); the transition to (x_{j+1}, t_{j+1}, text) is then certain, and the reward is 0 after
every step but the last, where it is the clip's. Only the mean depends on the weights, and

    grad E[r(x_S)] = E[ sum_j A_j grad log p(x_{j+1} | x_j) ],    A_j = r(x_S) less anything that does not know x_{j+1}.

What is subtracted is what a critic expects of x_j ("gae", which may also take its later opinions for part of the reward), or the
mean of the clips of one prompt ("prompt"). Several updates are made from one batch, so what is differentiated is the ratio of
the new density to the one that sampled, clipped. The last step is not trained.

Formulas and critic first, then one round's estimates and updates, then `train`. Sources: PPO (arXiv 1707.06347), GAE
(1506.02438), DDPO (2305.13301) for the decision process and the prompts' means, DPOK (2305.16381) for the KL to the start. As
in DDPO's code and everywhere here log-probabilities are means over dimensions, hence the small clip range. Differs from it:
a prompt's mean and deviation are those of one round's clips, not of a buffer of earlier ones.
"""

import torch
from torch import Tensor, nn

from resonate_lib import diffusion, grpo
from resonate_lib.grpo import clipped_surrogate, draw_window, kl_penalty
from resonate_lib.models.layers import timestep_sinusoid
from resonate_lib.online import (
    Rollouts,
    collect,
    draw_seed,
    fit_rounds,
    group_advantages,
    in_parts,
    learning,
    make_optimizer,
    mean_of,
    minibatches,
    optimizer_step,
    reference_of,
    reward_metrics,
)
from resonate_lib.training import autocast

EPS = 1e-4  # added to deviations that something is divided by, as in `online.group_advantages`
SINUSOIDS = 32  # that tell the critic the time


def gae(rewards: Tensor, values: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (..., T): A_j = sum_l (gamma lam)^l d_{j+l}, with d_j = r_j + gamma V_{j+1} - V_j.

    rewards (..., T) of the steps; values (..., T+1) of the states, with the one after the last step (0 where nothing comes
    after it). gamma, lam in [0, 1]: lam 1 takes the rewards that came, less V_j; smaller ones trust the values instead.
    Source: arXiv 1506.02438 eq. 16. ValueError where values is not one longer than rewards.
    """
    if values.shape != (*rewards.shape[:-1], rewards.shape[-1] + 1):
        raise ValueError(
            f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)}: values need one more than the rewards in the last "
            "dimension, the state after the last step"
        )
    deltas = rewards + gamma * values[..., 1:] - values[..., :-1]
    advantages, following = torch.zeros_like(deltas), 0.0
    for j in reversed(range(deltas.shape[-1])):
        following = deltas[..., j] + gamma * lam * following
        advantages[..., j] = following
    return advantages


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over all elements: 1 for a perfect critic, 0 for a constant, below 0 for a
    harmful one; 0 where the returns do not vary.
    """
    spread = returns.var(correction=0)
    return 0.0 if spread == 0 else (1 - (returns - values).var(correction=0) / spread).item()


class Critic(nn.Module):
    """The normalised reward that is to come from a latent at a time under a text.

    Each frame goes through one layer; the frames' mean and maximum, the time and the projected text go through two more. The
    last one starts at zero, so the first values are 0, the mean of normalised rewards. Rewards are normalised by the mean and
    deviation of all that were heard so far; their count, mean and squared deviations are stored with the weights.
    """

    def __init__(self, latent_dim: int, text_dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.frame = nn.Sequential(nn.Linear(latent_dim, hidden), nn.SiLU())
        self.text = nn.Sequential(nn.LayerNorm(text_dim, elementwise_affine=False), nn.Linear(text_dim, hidden))
        self.head = nn.Sequential(nn.Linear(3 * hidden + SINUSOIDS, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        nn.init.zeros_(self.head[2].weight)
        nn.init.zeros_(self.head[2].bias)
        self.register_buffer("heard", torch.zeros(3, dtype=torch.float64))  # count, mean, sum of squared deviations

    def forward(self, x: Tensor, t: Tensor, text_f_c: Tensor) -> Tensor:
        """x (B, N, C), t (B,) in [0, 1] from data to noise, text_f_c (B, text_dim) pooled text -> values (B,)."""
        frames = self.frame(x)
        parts = (frames.mean(1), frames.amax(1), timestep_sinusoid(1000 * t, SINUSOIDS), self.text(text_f_c))
        return self.head(torch.cat(parts, -1))[:, 0]

    def observe(self, rewards: Tensor) -> None:
        """Count rewards (n,) in. Source: the parallel form of Welford's update."""
        rewards, (count, mean, squares) = rewards.to(self.heard), self.heard
        total, shift = count + len(rewards), rewards.mean() - mean
        squares = squares + (rewards - rewards.mean()).square().sum() + shift**2 * count * len(rewards) / total
        self.heard.copy_(torch.stack([total, mean + shift * len(rewards) / total, squares]))

    def normalised(self, rewards: Tensor) -> Tensor:
        """(rewards - mean) / (deviation + 1e-4), (n,) float32, by what was observed so far."""
        count, mean, squares = self.heard
        return ((rewards.to(self.heard) - mean) / ((squares / count).sqrt() + EPS)).float()


def state_values(critic: Critic, rollouts: Rollouts, rows: Tensor) -> Tensor:
    """Values (len(rows), S+1) of the states that the clips `rows` went through; 0 at the end, after which nothing comes."""
    chain, text = rollouts.trajectory, rollouts.cond.text_f_c[rows]
    times = chain.times / chain.times[0]
    values = [critic(chain.latents[rows, j], times[j].expand(len(rows)), text) for j in range(len(times) - 1)]
    return torch.stack([*values, torch.zeros_like(values[0])], 1)


@torch.no_grad()
def critic_advantages(critic: Critic, rollouts: Rollouts, config) -> tuple[Tensor, Tensor, float]:
    """What a critic makes of a round, whose rewards it observes: advantages (n, S), returns (n, S), and how much it had known.

    Advantages: `gae` in normalised rewards, brought to mean 0 and deviation 1 over all clips and trained steps; all 0 where all
    rewards of the round are equal. Returns: what the critic should have said (advantage before that + value). The last:
    `explained_variance` of the discounted reward to come, by the critic as it was before it learns from this round.
    """
    values = state_values(critic, rollouts, torch.arange(len(rollouts.rewards)))
    critic.observe(rollouts.rewards)
    rewards = torch.zeros_like(values[:, 1:])
    rewards[:, -1] = critic.normalised(rollouts.rewards)
    advantages = gae(rewards, values, gamma=config.gamma, lam=config.lam)
    to_come = gae(rewards, torch.zeros_like(values), gamma=config.gamma, lam=1.0)
    known, returns = explained_variance(values[:, :-1], to_come), advantages + values[:, :-1]
    trained = advantages[:, trained_steps(rollouts.trajectory, config)]
    tied = bool((rollouts.rewards == rollouts.rewards[0]).all())
    advantages = (advantages - trained.mean()) / (trained.std(correction=0) + EPS)
    return (torch.zeros_like(advantages) if tied else advantages).cpu(), returns, known


def prompt_advantages(rollouts: Rollouts) -> Tensor:
    """Advantages (n, S) without a critic: a clip's reward less the mean of its prompt's clips, over their deviation, the same at
    every step; exactly 0 for a prompt whose clips all tie. Source: DDPO's per-prompt normalisation.
    """
    advantages = group_advantages(rollouts.rewards, rollouts.group_ids, global_std=False)
    return advantages[:, None].expand(-1, len(rollouts.trajectory.times) - 1)


def fit_values(critic: Critic, optimizer, rollouts: Rollouts, returns: Tensor, config, generator: torch.Generator) -> float:
    """config.critic_epochs passes of the critic over the states of a round, towards returns (n, S); returns the mean squared
    error, over the passes, each minibatch before its step.
    """
    errors, every = [], torch.arange(len(returns))
    for _ in range(config.critic_epochs):
        for rows in minibatches(every, config.minibatches, generator):
            error = (state_values(critic, rollouts, rows)[:, :-1] - returns[rows]).square().mean()
            error.backward()
            optimizer_step(critic, optimizer, config.max_grad_norm)
            errors.append(error.item())
    return sum(errors) / len(errors)


def trained_steps(chain: diffusion.Chain, config) -> list[int]:
    """`grpo.trained_steps`, never the last: it has no density, or, in schedules that stop a little before the data (AudioLDM's), so
    little noise that its ratios and divergences would outweigh those of all others."""
    return [j for j in grpo.trained_steps(chain, config.timestep_fraction) if j < config.num_steps - 1]


def entropy(chain: diffusion.Chain, steps: list[int]) -> float:
    """Mean of 0.5 log(2 pi e std^2) over `steps`, nats per dimension: the noise of the schedule, which no training changes.

    From the stored densities: -log p + (1 - mean noise^2) / 2 is that number, whatever the noise was.
    """
    return ((1 - chain.noises.square().mean((2, 3))) / 2 - chain.log_probs)[:, steps].mean().item()


def _step_loss(
    network, reference, rollouts: Rollouts, advantages: Tensor, rows: Tensor, j: int, config
) -> tuple[Tensor, dict[str, float]]:
    """Loss of step j of the chains on the clips `rows`, and what to report."""
    chain, cond, scale = rollouts.trajectory, rollouts.cond.index(rows), rollouts.guidance_scale
    device = chain.latents.device.type
    with autocast(config.precision, device):
        new = diffusion.score_step(network, chain, rows, j, cond, scale)
    loss, ratio = clipped_surrogate(
        new.log_prob, chain.log_probs[rows, j], advantages[rows, j], clip_range=config.clip_range, adv_clip=config.adv_clip
    )
    kl = torch.zeros(())
    if reference is not None:
        with torch.no_grad(), autocast(config.precision, device):
            ref = diffusion.score_step(reference, chain, rows, j, cond, scale)
        kl = kl_penalty(new.mean, ref.mean, new.std, dt=1.0)
        loss = loss + config.beta * kl
    old_mean = chain.latents[rows, j + 1] - new.std * chain.noises[rows, j]
    ratio = ratio.detach()
    return loss, {
        "loss": loss.item(),
        "kl": kl.item(),
        "kl_old": kl_penalty(new.mean.detach(), old_mean, new.std, dt=1.0).item(),
        "ratio_mean": ratio.mean().item(),
        "ratio_deviation": (ratio - 1).abs().max().item(),
        "clip_fraction": ((ratio - 1).abs() > config.clip_range).float().mean().item(),
    }


def _backward(
    network, reference, rollouts: Rollouts, advantages: Tensor, rows: Tensor, steps: list[int], config
) -> dict[str, float]:
    """Add the gradient of the mean over `steps` on the clips `rows`, config.micro_batch of them at a time; returns their means,
    and of ratio_deviation the largest.
    """

    def backward(part: slice, share: float) -> dict[str, float]:
        reports = []
        for j in steps:
            loss, report = _step_loss(network, reference, rollouts, advantages, rows[part], j, config)
            (loss * share / len(steps)).backward()
            reports.append(report)
        return mean_of(reports) | {"ratio_deviation": max(report["ratio_deviation"] for report in reports)}

    return in_parts(backward, len(rows), config.micro_batch, largest=("ratio_deviation",))


def update(
    network, optimizer, reference, rollouts: Rollouts, advantages: Tensor, config, generator: torch.Generator
) -> dict[str, float]:
    """config.epochs passes of the policy over a round, config.minibatches optimizer steps each, every one over all trained steps.

    advantages (n, S). Clips whose advantages are exactly 0 are dropped. With each gradient comes how far the policy has gone from
    the one that sampled (kl_old, exact); the passes end, before the step, at the first minibatch where that is above
    config.target_kl (0: never). At the first minibatch of a round the two policies are one. Metrics: see `train`.
    """
    steps = trained_steps(rollouts.trajectory, config)
    kept, rows, norms = advantages.any(1).nonzero().flatten(), [], []
    noise = {"entropy": entropy(rollouts.trajectory, steps)}
    if not len(kept):
        names = ("loss", "kl", "kl_old", "ratio_deviation", "clip_fraction", "epochs_done", "grad_norm", "first_ratio_deviation")
        return {**noise, "ratio_mean": 1.0, **dict.fromkeys(names, 0.0), "trained_clips": 0.0, "skipped": 1.0}
    parts = [part for _ in range(config.epochs) for part in minibatches(kept, config.minibatches, generator)]
    for part in parts:
        rows.append(_backward(network, reference, rollouts, advantages, part, steps, config))
        if norms and config.target_kl and rows[-1]["kl_old"] > config.target_kl:
            optimizer.zero_grad(set_to_none=True)
            break
        norms.append(optimizer_step(network, optimizer, config.max_grad_norm))
    return {
        **noise,
        **mean_of(rows),
        "epochs_done": config.epochs * len(norms) / len(parts),
        "grad_norm": sum(norms) / len(norms),
        "first_ratio_deviation": rows[0]["ratio_deviation"],
        "trained_clips": float(len(kept)),
        "skipped": 0.0,
    }


def make_critic(generator, records: list[dict], seed: int) -> Critic:
    """An untrained critic of the generator's latents and pooled texts, on its network's device, a function of the seed."""
    text_dim = generator.encode_prompts([records[0]["prompt_text"]]).text_f_c.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = Critic(generator.latent_shape[1], text_dim)
    return critic.to(generator.network.latent_mean.device)


def train(
    generator, reward, records: list[dict], config, *, seed: int = 0, checkpoint=None, callback=None, watch=None
) -> list[dict]:
    """PPO on generator.network, in place; returns one dict of metrics per step. generator.diffusion must be set.

    records: dicts with prompt_text, config.prompts_per_step different ones a step, config.group_size clips each. The reference
    of the KL is the network as it is when this is called (with a checkpoint: call it with the same start). The rounds take
    config.guidance_scales in turn. With config.ema, what remains at the end is the average of the weights over the rounds.
    callback(i, metrics) runs after each step. watch: as for `grpo.train`. ValueError for a flow.

    Metrics of a round, beside `online.reward_metrics`; means are over the minibatches and trained steps whose gradient was
    taken, divergences in nats per dimension. loss: clipped surrogate + beta kl. kl: to the network at the start, 0 where it is
    not measured (beta 0). kl_old: to the policy that sampled. ratio_mean; ratio_deviation: the largest |ratio - 1| of a
    minibatch; clip_fraction: share of ratios outside 1 +- clip_range. entropy: of the policy's Gaussians (`entropy`).
    epochs_done: passes, fewer than config.epochs where kl_old ended them. grad_norm: before clipping. first_ratio_deviation: of
    the first minibatch, where both policies are one: rounding alone. trained_clips. skipped: 1 where all advantages were 0 and
    the policy learned nothing. With a critic: value_loss (`fit_values`) and explained_variance (`critic_advantages`).
    """
    if generator.diffusion is None:
        raise ValueError("this generator is a flow, and PPO is for a diffusion model; use one with a schedule, or grpo.train")
    with learning(generator.network.train(), config, seed=seed) as policy:
        reference = reference_of(policy) if config.beta > 0 else None
        critic = make_critic(generator, records, seed) if config.advantage == "gae" else None
        critic_optimizer = None if critic is None else make_optimizer(critic, config.critic_learning_rate)
        critics = {} if critic is None else {"critic": critic, "critic_optimizer": critic_optimizer}

        def one_round(i: int, chosen: list[dict], optimizer, random: torch.Generator):
            rollouts = collect(
                generator, policy, reward, chosen, group_size=config.group_size,
                steps=config.num_steps, guidance_scale=config.guidance_scales[i % len(config.guidance_scales)],
                seed=draw_seed(random), decode_iterations=config.decode_iterations, precision=config.precision,
                sample_batch=config.sample_batch,
                sde={"eta": config.eta, "kind": config.kind, "window": draw_window(config, random)},
            )  # fmt: skip
            metrics, values = reward_metrics(rollouts), {}
            if critic is None:
                advantages = prompt_advantages(rollouts)
            else:
                advantages, returns, known = critic_advantages(critic, rollouts, config)
                loss = fit_values(critic, critic_optimizer, rollouts, returns, config, random)
                values = {"value_loss": loss, "explained_variance": known}
            metrics |= update(policy, optimizer, reference, rollouts, advantages, config, random) | values
            return metrics, rollouts

        return fit_rounds(policy, records, config, one_round, label="PPO", seed=seed, checkpoint=checkpoint, callback=callback,
                          watch=watch, **critics)
