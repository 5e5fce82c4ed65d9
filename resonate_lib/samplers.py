"""Sampling: the deterministic solver, single stochastic steps with their log-probabilities, and whole stochastic
rollouts.

Time runs from 1 (noise) to 0 (audio latent), see `flow.py`. Every random number comes from a passed seed or generator,
one per sample, so that a seed fixes a sample whatever batch it is in. Rewards, gradients and training live elsewhere,
schedules and rollouts of diffusion models in `diffusion.py`; their single steps are here. Sources: Flow-GRPO (arXiv
2505.05470) for the SDE, Flow-CPS (arXiv 2509.05952) for CPS, DDPM (arXiv 2006.11239), DDIM (arXiv 2010.02502).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from resonate_lib import flow
from resonate_lib.models.flux_audio import Condition, FluxAudio

KINDS = ("sde", "cps")
PREDICTIONS = ("epsilon", "v")  # of a diffusion network
VARIANCES = ("small", "large")  # of the DDPM step
Generators = torch.Generator | Sequence[torch.Generator] | None


class Transition(NamedTuple):
    """One stochastic step. x_next, mean (B, ...); std, std_dev_t broadcast to them; log_prob (B,) or None without
    noise.

    std is the transition's deviation, std_dev_t the method's own coefficient (they differ by sqrt(t - t_next) for the
    SDE). log_prob is a MEAN over all non-batch dimensions, in nats per dimension.
    """

    x_next: Tensor
    mean: Tensor
    std: Tensor
    std_dev_t: Tensor
    log_prob: Tensor | None


@dataclass
class Trajectory:
    """A rollout. latents (B, S+1, N, C) from noise to x0; log_probs (B, S), NaN on deterministic steps; noises (B, S,
    N, C).

    times (S+1,) is the grid; `stochastic` lists the steps that have a density and can therefore be trained.
    """

    latents: Tensor
    log_probs: Tensor
    noises: Tensor
    times: Tensor
    stochastic: list[int]
    noise_level: float
    kind: str

    @property
    def final(self) -> Tensor:
        """The last latents (B, N, C)."""
        return self.latents[:, -1]


def draw_noise(shape: tuple[int, ...], seeds: Sequence[int]) -> Tensor:
    """Standard normal (len(seeds), *shape) float32 on the CPU; row i is a function of seeds[i] alone."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


def draw_like(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal like x (B, ...) float32, from one generator or from one per sample."""
    if generator is None:
        raise ValueError("a stochastic step got no source of noise: pass generator=, noise= or x_next=")
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)
    if len(generator) != x.shape[0]:
        raise ValueError(f"{len(generator)} generators for {x.shape[0]} samples: give one per sample")
    return torch.stack([torch.randn(x.shape[1:], generator=g, device=g.device) for g in generator]).to(x.device)


def _column(value, x: Tensor) -> Tensor:
    """A number, 0-dim or (B,) tensor as float32 that multiplies x (B, ...)."""
    value = torch.as_tensor(value, dtype=torch.float32, device=x.device)
    return value.reshape(-1, *[1] * (x.dim() - 1))


def _gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normal log-density, mean over non-batch dimensions: (B,)."""
    log_prob = -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(1).mean(1)


def _finish(mean, std, std_dev_t, noise, x_next, generator, log_prob) -> Transition:
    """Take or draw x_next and score it (as data: no gradient flows through x_next, only through the mean)."""
    if x_next is None:
        noise = draw_like(mean, generator) if noise is None else noise.float()
        x_next = mean + std * noise
    x_next = x_next.float().detach()
    return Transition(x_next, mean, std, std_dev_t, log_prob(x_next))


def sde_step(
    x: Tensor, v: Tensor, t, t_next, *, noise_level: float, t_max, kind: str = "sde", noise: Tensor | None = None,
    x_next: Tensor | None = None, generator: Generators = None,
) -> Transition:  # fmt: skip
    """One stochastic step of the flow from t down to t_next, in float32 whatever the precision of x and v.

    x, v: (B, N, C). t, t_next: number, 0-dim or (B,), 0 <= t_next < t <= 1. noise_level >= 0; at 0 this is the Euler
    step, nothing is drawn, and log_prob is None. t_max is the second grid time: it stands for t in 1 - t where t is 1,
    which would divide by zero. Given x_next, that is scored; else it is mean + std*noise with `noise` or a draw from
    `generator` (one, or a list of one per sample).

    kind "sde": a = noise_level*sqrt(t/(1-t)), deviation a*sqrt(t-t_next), marginals kept as the step shrinks.
    kind "cps": a = t_next*sin(noise_level*pi/2) is the deviation, the noise scale of t_next is met exactly, and
    log_prob drops all constants: -mean (x_next - mean)^2. At t_next = 0 it is deterministic.
    Source: Flow-GRPO; Flow-CPS. ValueError for another kind, a negative noise_level, or t_next >= t.
    """
    x, v, t, t_next = x.float(), v.float(), _column(t, x), _column(t_next, x)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: allowed are {KINDS}")
    if noise_level < 0:
        raise ValueError(f"noise_level={noise_level}: must be 0 (deterministic) or more")
    if bool(((t_next >= t) | (t > 1) | (t_next < 0)).any()):
        raise ValueError(
            f"t_next={t_next.flatten().tolist()} and t={t.flatten().tolist()}: need 0 <= t_next < t <= 1"
        )
    if noise_level == 0:
        mean, zero = x + v * (t_next - t), torch.zeros_like(t)
        return Transition(mean if x_next is None else x_next.float(), mean, zero, zero, None)
    step = _sde_moments if kind == "sde" else _cps_moments
    mean, std, std_dev_t = step(x, v, t, t_next, noise_level, t_max)
    if kind == "cps":
        return _finish(mean, std, std_dev_t, noise, x_next, generator, lambda y: -((y - mean) ** 2).flatten(1).mean(1))
    return _finish(mean, std, std_dev_t, noise, x_next, generator, lambda y: _gaussian_log_prob(y, mean, std))


def _sde_moments(x, v, t, t_next, noise_level, t_max):
    """mean, std, a of the reverse SDE discretised by Euler-Maruyama."""
    dt = t_next - t
    a = noise_level * torch.sqrt(t / (1 - torch.where(t == 1, _column(t_max, x), t)))
    mean = x * (1 + a**2 / (2 * t) * dt) + v * (1 + a**2 * (1 - t) / (2 * t)) * dt
    return mean, a * torch.sqrt(-dt), a


def _cps_moments(x, v, t, t_next, noise_level, _t_max):
    """mean, std, a of coefficient-preserving sampling: the predicted data and noise remixed, part of the noise fresh.
    """
    a = t_next * math.sin(noise_level * math.pi / 2)
    mean = (1 - t_next) * (x - t * v) + torch.sqrt(t_next**2 - a**2) * (x + (1 - t) * v)
    return mean, a, a


def ddim_step(
    x: Tensor, model_output: Tensor, alpha_bar, alpha_bar_next, *, eta: float, prediction: str = "epsilon",
    noise: Tensor | None = None, x_next: Tensor | None = None, generator: Generators = None,
) -> Transition:  # fmt: skip
    """One DDIM step of a diffusion model, stochastic for eta > 0 (eta 1: DDPM); the policy step of denoising PPO.

    x, model_output: (B, ...). alpha_bar, alpha_bar_next: cumulative products (not their roots), number, 0-dim or (B,),
    alpha_bar < alpha_bar_next <= 1. prediction: "epsilon" or "v" (v = sqrt(ab) eps - sqrt(1-ab) x0). Nothing is
    clipped. log_prob (B,): mean over dimensions; None where eta is 0 or alpha_bar_next is 1, since nothing is random
    there. Source: DDIM eq. 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: must lie between 0 (deterministic) and 1 (the schedule's whole noise)")
    x, out, ab, ab_next = x.float(), model_output.float(), _column(alpha_bar, x), _column(alpha_bar_next, x)
    x0, eps = _data_and_noise(x, out, ab, prediction)
    std = eta * torch.sqrt((1 - ab_next) / (1 - ab) * (1 - ab / ab_next).clamp(min=0))
    mean = ab_next.sqrt() * x0 + (1 - ab_next - std**2).clamp(min=0).sqrt() * eps
    if not bool((std > 0).all()):
        return Transition(mean if x_next is None else x_next.float(), mean, std, std, None)
    return _finish(mean, std, std, noise, x_next, generator, lambda y: _gaussian_log_prob(y, mean, std))


def ddpm_step(
    x: Tensor, model_output: Tensor, alpha_bar, alpha_bar_next, *, prediction: str = "epsilon", variance: str = "small",
    noise: Tensor | None = None, x_next: Tensor | None = None, generator: Generators = None,
) -> Transition:  # fmt: skip
    """One ancestral step of a diffusion model: a draw from the posterior q(x_next | x, x0) at the predicted x0.

    Arguments as for `ddim_step`; the noise levels may lie any distance apart, with beta = 1 - alpha_bar / alpha_bar_next.
    variance "small": the posterior's own, beta (1 - alpha_bar_next) / (1 - alpha_bar), which makes it the DDIM step of eta 1;
    "large": beta, the upper bound (DDPM section 3.2: right for data of one point, or for data as wide as the noise). Nothing
    is drawn where alpha_bar_next is 1, and log_prob is None there. Source: DDPM eq. 7. Differs from diffusers' DDPMScheduler:
    that adds noise whenever the timestep is above 0, so with few steps of "large" its last one ends in noise.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance={variance!r}: allowed are 'small' and 'large'")
    x, out, ab, ab_next = x.float(), model_output.float(), _column(alpha_bar, x), _column(alpha_bar_next, x)
    x0, _ = _data_and_noise(x, out, ab, prediction)
    alpha = (ab / ab_next).clamp(max=1)  # of this step
    left = (1 - ab_next) / (1 - ab)  # share of the noise variance that stays
    mean = ab_next.sqrt() * (1 - alpha) / (1 - ab) * x0 + alpha.sqrt() * left * x
    std = torch.sqrt((1 - alpha) * (left if variance == "small" else (ab_next < 1)))
    if not bool((std > 0).all()):
        return Transition(mean if x_next is None else x_next.float(), mean, std, std, None)
    return _finish(mean, std, std, noise, x_next, generator, lambda y: _gaussian_log_prob(y, mean, std))


def _data_and_noise(x: Tensor, out: Tensor, ab: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """(x0, epsilon) that a diffusion network's output `out` at x says."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction={prediction!r}: allowed are 'epsilon' and 'v'")
    if prediction == "v":
        return ab.sqrt() * x - (1 - ab).sqrt() * out, ab.sqrt() * out + (1 - ab).sqrt() * x
    return (x - (1 - ab).sqrt() * out) / ab.sqrt(), out


@torch.no_grad()
def ode_sample(
    network: FluxAudio, noise: Tensor, cond: Condition, *, steps: int, guidance_scale: float = 1.0
) -> Tensor:
    """x0 (B, N, C) float32 in network space: Euler steps of the guided velocity from noise (B, N, C) at t=1 down to 0.

    noise may lie on another device than the network, where x0 is.
    """
    times, x = flow.time_grid(steps).tolist(), noise.to(network.latent_mean.device).float()
    text = flow.prepare_text(network, cond, guidance_scale)
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * flow.guided(network, x, t, text, guidance_scale)
    return x


@torch.no_grad()
def rollout(
    network: FluxAudio, noise: Tensor, cond: Condition, *, steps: int, guidance_scale: float, noise_level: float,
    kind: str = "sde", generators: Generators = None, last_step_noise: bool = False,
    window: tuple[int, int] | None = None, noises: Tensor | None = None,
) -> Trajectory:  # fmt: skip
    """A stochastic rollout from noise (B, N, C), every latent and log-probability kept, on the network's device.

    generators: one per sample, drawn from once per stochastic step; or `noises` (B, S, N, C) to replay. They and noise may be
    on another device.
    last_step_noise: the published code also adds noise at the final step, which is heard and never trained; here that
    step is deterministic unless asked. window=(first, length): only these steps are stochastic, the others are Euler
    steps (Flow-GRPO-Fast).
    """
    noise = noise.to(network.latent_mean.device)
    times = flow.time_grid(steps).to(noise.device)
    first, length = window or (0, steps)
    last = steps if last_step_noise and kind == "sde" else steps - 1
    stochastic = [i for i in range(first, min(first + length, last)) if noise_level > 0]
    text = flow.prepare_text(network, cond, guidance_scale)

    def step(i: int, x: Tensor, eps: Tensor) -> Transition:
        v = flow.guided(network, x, times[i], text, guidance_scale)
        level = noise_level if i in stochastic else 0.0
        return sde_step(x, v, times[i], times[i + 1], noise_level=level, t_max=times[1], kind=kind, noise=eps)

    walked = walk(step, noise, steps, stochastic, generators=generators, noises=noises)
    return Trajectory(*walked, times, stochastic, noise_level, kind)


def walk(
    step: Callable[[int, Tensor, Tensor], Transition], noise: Tensor, steps: int, stochastic: Sequence[int], *,
    generators: Generators = None, noises: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The latents, log_probs and noises of a `Trajectory` from noise (B, N, C): step(i, x, eps) for i = 0 .. steps-1.

    eps is drawn from `generators`, or taken from `noises` (B, S, N, C), on the steps in `stochastic`; zeros on the others.
    """
    x, noises = noise.float(), None if noises is None else noises.to(noise.device)
    latents, log_probs, drawn = [x], [], []
    for i in range(steps):
        active = i in stochastic
        eps = torch.zeros_like(x) if not active else noises[:, i] if noises is not None else draw_like(x, generators)
        out = step(i, x, eps)
        x = out.x_next
        latents.append(x)
        drawn.append(eps)
        log_probs.append(x.new_full((x.shape[0],), float("nan")) if out.log_prob is None else out.log_prob)
    return torch.stack(latents, 1), torch.stack(log_probs, 1), torch.stack(drawn, 1)
