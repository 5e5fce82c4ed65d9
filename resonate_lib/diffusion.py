"""Diffusion beside the flow: noise schedules, the grid a sampler walks, rollouts with log-probabilities, the training loss.

The forward process is q(x_t | x0) = N(sqrt(ab_t) x0, (1 - ab_t) I), where ab_t = (1 - beta_0) ... (1 - beta_t) falls over
the timesteps t = 0 .. T-1. A network predicts epsilon, the noise in x_t, or v = sqrt(ab_t) epsilon - sqrt(1 - ab_t) x0;
each gives x0 and epsilon back. In x / sqrt(ab) over sigma = sqrt((1 - ab) / ab) the probability-flow ODE has the slope
epsilon, and its Euler step is DDIM with eta 0; eta 1 is the ancestral sampler. Single steps and their densities are in
`samplers.py`, guidance is in `flow.py`. Sources: DDPM (arXiv 2006.11239), the cosine schedule (arXiv 2102.09672), DDIM
(arXiv 2010.02502), v (arXiv 2202.00512).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resonate_lib import flow, samplers
from resonate_lib.models.flux_audio import Condition, FluxAudio

SCHEDULES = ("linear", "scaled_linear", "cosine")
SPACINGS = ("leading", "trailing", "linspace")
KINDS = ("ddim", "ancestral")


def alphas_cumprod(
    schedule: str, *, train_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Tensor:
    """ab_t of every timestep, (train_steps,) float64, falling from nearly 1 to nearly 0.

    "linear": betas from beta_start to beta_end (DDPM); "scaled_linear": their roots evenly spaced (latent diffusion,
    AudioLDM); "cosine": ab_t proportional to cos^2((t/T + 0.008) / 1.008 * pi/2), betas at most 0.999, and the two bounds do
    not enter (improved DDPM eq. 17; diffusers' squaredcos_cap_v2). ValueError for another name.
    """
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, train_steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, train_steps, dtype=torch.float64).square()
    elif schedule == "cosine":
        share = torch.arange(train_steps + 1, dtype=torch.float64) / train_steps
        curve = torch.cos((share + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"schedule={schedule!r}: allowed are {', '.join(SCHEDULES)}")
    return torch.cumprod(1 - betas, 0)


def _column(alpha_bar, x: Tensor) -> Tensor:
    """alpha_bar (a number, 0-dim or (B,)) as float64 that multiplies x (B, ...)."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64, device=x.device)
    return alpha_bar.reshape(-1, *[1] * (x.dim() - 1))


def noised(x0: Tensor, noise: Tensor, alpha_bar) -> Tensor:
    """x_t (B, N, C) of the forward process, from x0 and standard normal noise; alpha_bar a number, 0-dim or (B,)."""
    alpha_bar = _column(alpha_bar, x0)
    return alpha_bar.sqrt().to(x0.dtype) * x0 + (1 - alpha_bar).sqrt().to(x0.dtype) * noise


def prediction_target(x0: Tensor, noise: Tensor, alpha_bar, prediction: str) -> Tensor:
    """What the network should answer at `noised(x0, noise, alpha_bar)`: the noise, or v. ValueError for another prediction."""
    if prediction not in samplers.PREDICTIONS:
        raise ValueError(f"prediction={prediction!r}: allowed are {', '.join(samplers.PREDICTIONS)}")
    if prediction == "epsilon":
        return noise
    alpha_bar = _column(alpha_bar, x0)
    return alpha_bar.sqrt().to(x0.dtype) * noise - (1 - alpha_bar).sqrt().to(x0.dtype) * x0


class Grid(NamedTuple):
    """Where a sampler of S steps stops. times (S,) float32: what the network is given; alpha_bars (S+1,) float64 on the CPU, rising
    from noise to data: step j goes from alpha_bars[j] to alpha_bars[j + 1]."""

    times: Tensor
    alpha_bars: Tensor


@dataclass
class Chain(samplers.Trajectory):
    """A rollout of a diffusion model: `Trajectory` with times (S+1,) as the network got them and 0 at the end, noise_level = eta,
    kind "ddim" or "ancestral"; alpha_bars (S+1,) float64 on the CPU."""

    alpha_bars: Tensor
    prediction: str
    variance: str


@dataclass(frozen=True)
class Diffusion:
    """A diffusion process: how it noises, what its network predicts, and which timesteps its samplers visit.

    schedule, train_steps, beta_start, beta_end: see `alphas_cumprod`. spacing: of the timesteps, named as in diffusers:
    "trailing" (from the last one), "leading" (from the first one, shifted by steps_offset), "linspace" (both ends);
    final_alpha_one: the last step ends in data, not at the noise of timestep 0 (set_alpha_to_one). The network is given
    timestep / time_unit. It is also a sampler and a loss: `ode_sample`, `rollout` and `noised_loss` stand for those of
    `samplers` and `flow`. With epsilon the cosine schedule's first steps divide by sqrt(ab) = 5e-5, which v does not.
    Differs from diffusers: its DDIMScheduler leaves timestep t for t - T // S, which with "linspace", and with "trailing" where
    S does not divide T, is not the timestep that the network is told next; here each step ends where the next begins, as in its
    DDPMScheduler.
    """

    schedule: str = "cosine"
    prediction: str = "v"
    train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    spacing: str = "trailing"
    steps_offset: int = 0
    final_alpha_one: bool = True
    time_unit: float = 1000.0

    def __post_init__(self) -> None:
        allowed = {"schedule": SCHEDULES, "prediction": samplers.PREDICTIONS, "spacing": SPACINGS}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed are {', '.join(values)}")

    @cached_property
    def alpha_bars(self) -> Tensor:
        """ab_t of every timestep, (train_steps,) float64."""
        return alphas_cumprod(
            self.schedule, train_steps=self.train_steps, beta_start=self.beta_start, beta_end=self.beta_end
        )

    # ------------------------------------------------------------------------------------------------- the grid
    def timesteps(self, steps: int) -> Tensor:
        """(S,) int64, falling: the timesteps at which the network is asked. ValueError when there are not so many."""
        total = self.train_steps
        if not 1 <= steps <= total:
            raise ValueError(f"steps={steps}: use 1 to {total}, the timesteps of the process")
        if self.spacing == "linspace":
            chosen = np.linspace(0, total - 1, steps).round()[::-1]
        elif self.spacing == "leading":
            chosen = np.arange(steps)[::-1] * (total // steps) + self.steps_offset
        else:  # a step that is no whole number can leave one too many
            chosen = np.arange(total, 0, -total / steps)[:steps].round() - 1
        if chosen[0] >= total:
            raise ValueError(f"steps={steps}, steps_offset={self.steps_offset}: timestep {chosen[0]} of {total}; use fewer steps")
        return torch.from_numpy(np.ascontiguousarray(chosen.astype(np.int64)))

    def grid(self, steps: int) -> Grid:
        """The `Grid` of a sampler of so many steps."""
        timesteps = self.timesteps(steps)
        end = torch.ones(1, dtype=torch.float64) if self.final_alpha_one else self.alpha_bars[:1]
        return Grid(self._times(timesteps), torch.cat([self.alpha_bars[timesteps], end]))

    def _times(self, timesteps: Tensor) -> Tensor:
        return (timesteps / self.time_unit).float()

    # ------------------------------------------------------------------------------------------------- sampling
    @torch.no_grad()
    def ode_sample(
        self, network: FluxAudio, noise: Tensor, cond: Condition, *, steps: int, guidance_scale: float = 1.0
    ) -> Tensor:
        """x0 (B, N, C) float32 in network space: DDIM steps of eta 0 from noise (B, N, C), as `samplers.ode_sample`."""
        x, grid = noise.to(network.latent_mean.device).float(), self.grid(steps)
        text = flow.prepare_text(network, cond, guidance_scale)
        for j, t in enumerate(grid.times.tolist()):
            output = flow.guided(network, x, t, text, guidance_scale)
            x = _step(x, output, grid.alpha_bars, j, prediction=self.prediction).x_next
        return x

    @torch.no_grad()
    def rollout(
        self, network: FluxAudio, noise: Tensor, cond: Condition, *, steps: int, guidance_scale: float,
        generators: samplers.Generators = None, noises: Tensor | None = None, eta: float = 1.0, kind: str = "ddim",
        variance: str = "small", window: tuple[int, int] | None = None,
    ) -> Chain:  # fmt: skip
        """A stochastic rollout from noise (B, N, C), every latent and log-probability kept, on the network's device.

        kind "ddim": the share eta of the ancestral deviation, 0 deterministic; "ancestral": `samplers.ddpm_step` with that
        variance. generators, noises and window=(first, length) as in `samplers.rollout`; steps outside the window are DDIM
        with eta 0. A step that ends in data draws nothing and has no density. ValueError for another kind, an eta outside 0 to
        1, or an eta beside 1 of the ancestral sampler.
        """
        if kind not in KINDS or not 0 <= eta <= 1 or (kind == "ancestral" and eta != 1):
            raise ValueError(f"kind={kind!r}, eta={eta}: allowed are kind='ddim' with eta from 0 to 1, and kind='ancestral'")
        noise, grid = noise.to(network.latent_mean.device), self.grid(steps)
        times, bars = grid.times.to(noise.device), grid.alpha_bars
        first, length = window or (0, steps)
        stochastic = [j for j in range(first, min(first + length, steps)) if eta > 0 and bars[j] < bars[j + 1] < 1]
        text = flow.prepare_text(network, cond, guidance_scale)

        def step(j: int, x: Tensor, eps: Tensor) -> samplers.Transition:
            output = flow.guided(network, x, times[j], text, guidance_scale)
            how = {"kind": kind, "eta": eta, "variance": variance} if j in stochastic else {}
            return _step(x, output, bars, j, prediction=self.prediction, noise=eps, **how)

        walked = samplers.walk(step, noise, steps, stochastic, generators=generators, noises=noises)
        times = torch.cat([times, times.new_zeros(1)])
        return Chain(*walked, times, stochastic, eta, kind, bars, self.prediction, variance)

    # ------------------------------------------------------------------------------------------------- training
    def nearest(self, t: Tensor) -> Tensor:
        """(B,) int64: the timesteps whose ratio of noise to data, sqrt((1 - ab) / ab), is nearest to t / (1 - t) of flow times
        t (B,) in [0, 1]; nearest in flow time, where sigma / (alpha + sigma) is the timestep's place."""
        alpha, sigma = self.alpha_bars.sqrt(), (1 - self.alpha_bars).sqrt()
        places = (sigma / (alpha + sigma)).to(t.device)
        return torch.bucketize(t.double(), (places[1:] + places[:-1]) / 2)

    def noised_loss(
        self, network: FluxAudio, latents: Tensor, cond: Condition, t: Tensor, noise: Tensor, drop: Tensor, *,
        mask: Tensor | None = None, weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean squared error of the network's prediction, 0-dim, at the draws of `flow.draw_noising`, as `flow.noised_loss`.

        t (B,) are flow times: each picks the `nearest` timestep, so a model trained here meets the ratios of noise to data that a
        flow does.
        """
        t, noise, drop = (tensor.to(latents.device) for tensor in (t, noise, drop))
        timesteps = self.nearest(t)
        bars = self.alpha_bars.to(latents.device)[timesteps]
        heard = flow.dropped_condition(network, cond, drop)
        output = flow.guided(network, noised(latents, noise, bars), self._times(timesteps), heard, 1.0)
        return flow.velocity_error(output, prediction_target(latents, noise, bars, self.prediction), mask, weight).mean()


@dataclass(frozen=True)
class AngularDiffusion(Diffusion):
    """Diffusion in continuous time t in (0, 1), which is an angle: sqrt(ab) = cos(pi t / 2). Stable Audio's.

    Its scheduler says it in noise levels s of an exploding process, x = x0 + s noise: the network hears x / sqrt(1 + s^2) and is
    told 2 atan(s) / pi, and from its output F follows x0 = x / (1 + s^2) - s F / sqrt(1 + s^2). Put s = tan(pi t / 2): what it is
    told is t; with cos = 1 / sqrt(1 + s^2) and sin = s / sqrt(1 + s^2) it hears z = cos x0 + sin noise, so ab = 1 / (1 + s^2); and
    x0 = cos z - sin F, so F is v. The scheduler's first x, noise times sqrt(1 + sigma_max^2), is z = noise.
    A sampler visits noise levels with evenly spaced logarithms from sigma_max down to sigma_min, then the data; training
    visits train_steps even times. schedule, betas, spacing and time_unit do not enter. Source: stable-audio-tools' sampler
    as in diffusers' CosineDPMSolverMultistepScheduler, whose solver (second order, stochastic) is another.
    """

    sigma_min: float = 0.3
    sigma_max: float = 500.0

    @cached_property
    def alpha_bars(self) -> Tensor:
        """cos^2 of every timestep's angle, (train_steps,) float64."""
        times = (torch.arange(self.train_steps, dtype=torch.float64) + 0.5) / self.train_steps
        return torch.cos(times * math.pi / 2).square()

    def grid(self, steps: int) -> Grid:
        """The `Grid` of a sampler of so many steps. ValueError when steps < 1."""
        if steps < 1:
            raise ValueError(f"steps={steps}: sampling needs at least 1 step")
        levels = torch.linspace(math.log(self.sigma_max), math.log(self.sigma_min), steps, dtype=torch.float64).exp()
        bars = torch.cat([1 / (1 + levels.square()), torch.ones(1, dtype=torch.float64)])
        return Grid((levels.atan() * 2 / math.pi).float(), bars)

    def _times(self, timesteps: Tensor) -> Tensor:
        return ((timesteps + 0.5) / self.train_steps).float()


def _step(
    x: Tensor, output: Tensor, bars: Tensor, j: int, *, prediction: str, kind: str = "ddim", eta: float = 0.0,
    variance: str = "small", noise: Tensor | None = None, x_next: Tensor | None = None,
) -> samplers.Transition:  # fmt: skip
    """Step j of a grid with alpha_bars `bars`, drawn with `noise` or scored at x_next; DDIM with eta 0 unless told."""
    given = {"prediction": prediction, "noise": noise, "x_next": x_next}
    if kind == "ancestral":
        return samplers.ddpm_step(x, output, bars[j], bars[j + 1], variance=variance, **given)
    return samplers.ddim_step(x, output, bars[j], bars[j + 1], eta=eta, **given)


def score_step(
    network: FluxAudio, chain: Chain, rows: Tensor, j: int, cond: Condition, guidance_scale: float
) -> samplers.Transition:
    """Score the stored x_next of step j, clips `rows`, under `network`, by the same expressions that sampled it.

    cond: of these rows. Gradients flow through the mean, in both guidance branches. ValueError for a step without a density.
    """
    if j not in chain.stochastic:
        raise ValueError(f"step {j} is deterministic and has no density; those that have are {chain.stochastic}")
    output = flow.guided(network, chain.latents[rows, j], chain.times[j], cond, guidance_scale)
    return _step(
        chain.latents[rows, j], output, chain.alpha_bars, j, prediction=chain.prediction, kind=chain.kind,
        eta=chain.noise_level, variance=chain.variance, x_next=chain.latents[rows, j + 1],
    )  # fmt: skip
