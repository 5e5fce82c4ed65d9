"""THE time convention and the flow-matching formulas: t = 1 is noise, t = 0 is data, and sampling runs from 1 down to
0.

x_t = (1-t) x0 + t noise, and the network learns v = dx_t/dt = noise - x0. Everything that touches t imports from here.
Source: flow matching with straight paths as in the published Resonate code (arXiv 2603.11661).
"""

import torch
from torch import Tensor

from resonate_lib.models.flux_audio import Condition, FluxAudio, ProjectedText


def _as_time(t, x: Tensor) -> Tensor:
    """t as a number, 0-dim or (B,), shaped to multiply x (B, ...)."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.reshape(-1, *[1] * (x.dim() - 1)) if t.dim() else t


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t (B, N, C) on the straight path between x0 (t=0) and noise (t=1); t in [0, 1], a number, 0-dim or (B,)."""
    t = _as_time(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the network should answer anywhere on the path: noise - x0, same shape."""
    return noise - x0


def time_grid(steps: int) -> Tensor:
    """(steps+1,) float32 from 1 to 0, evenly spaced. ValueError when steps < 1."""
    if steps < 1:
        raise ValueError(f"steps={steps}: sampling needs at least 1 step")
    return torch.linspace(1.0, 0.0, steps + 1)


def guided_velocity(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance scale*v_cond + (1-scale)*v_uncond; a scale below 1 means v_cond alone, as published."""
    return v_cond if scale < 1 else scale * v_cond + (1 - scale) * v_uncond


def prepare_text(network: FluxAudio, cond: Condition, guidance_scale: float) -> ProjectedText:
    """Project the texts of a run once: (B, ...) without guidance, (2B, ...) = [empty ; prompt] with it.

    The empty string is projected once and shared by the batch. Gradients flow through both.
    """
    text = network.project_text(cond)
    if guidance_scale <= 1:
        return text
    empty, batch = network.project_text(network.empty_condition(1)), cond.batch
    empty = ProjectedText(empty.text_f.expand(batch, -1, -1), empty.text_f_c.expand(batch, -1))
    return ProjectedText.cat([empty, text])


def guided(network: FluxAudio, x: Tensor, t, cond: Condition, guidance_scale: float) -> Tensor:
    """Guided velocity (B, N, C) float32 at x (B, N, C) and t (number, 0-dim or (B,)).

    `cond` is a Condition, or `prepare_text`'s result for this guidance_scale, which saves projecting again at every
    step. At guidance_scale <= 1 only the conditional branch runs (at 1 the other would have weight 0); above it ONE
    doubled batch [empty ; prompt]. Rollouts and updates both call this, so they agree to the last bit on equal inputs.
    """
    text = cond if isinstance(cond, ProjectedText) else prepare_text(network, cond, guidance_scale)
    t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(x.shape[0])
    if guidance_scale <= 1:
        return network.velocity(x, text, t).float()
    v_uncond, v_cond = network.velocity(torch.cat([x, x]), text, torch.cat([t, t])).float().chunk(2)
    return guided_velocity(v_cond, v_uncond, guidance_scale)


def velocity_error(velocity: Tensor, target: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Per-sample squared error (B,) float32: mean over C, then over the N frames, or over those where mask (B, N) is 1.

    weight (C,): how much each channel counts (mean 1); it moves capacity between channels, not the optimum.
    """
    error = (velocity.float() - target.float()).square()
    error = (error if weight is None else error * weight).mean(-1)
    if mask is None:
        return error.mean(-1)
    mask = mask.to(error.dtype)
    return (error * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def dropped_condition(network: FluxAudio, cond: Condition, drop: Tensor) -> Condition:
    """Replace both text tensors by the empty string's where drop (B,) is true."""
    empty = network.empty_condition(cond.batch)
    return Condition(
        torch.where(drop[:, None, None], empty.text_f, cond.text_f),
        torch.where(drop[:, None], empty.text_f_c, cond.text_f_c),
    )


def draw_noising(
    latents: Tensor, *, generator: torch.Generator, caption_dropout: float = 0.1, time_mean: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """What flow matching draws for latents (B, N, C): times t (B,), noise (B, N, C), and drop (B,) bool, whose captions are left
    out. Times are logit-normal, t = sigmoid(N(time_mean, 1)) per sample (published mean 0; above it, more of the noisy times
    where events are decided). All draws come from `generator`, on its device.
    """
    batch, device = latents.shape[0], generator.device
    t = (torch.randn(batch, generator=generator, device=device) + time_mean).sigmoid()
    noise = torch.randn(latents.shape, generator=generator, device=device)
    return t, noise, torch.rand(batch, generator=generator, device=device) < caption_dropout


def noised_loss(
    network: FluxAudio, latents: Tensor, cond: Condition, t: Tensor, noise: Tensor, drop: Tensor, *,
    mask: Tensor | None = None, weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Flow-matching loss, 0-dim, at given draws (`draw_noising`), which move to the latents' device."""
    t, noise, drop = (tensor.to(latents.device) for tensor in (t, noise, drop))
    velocity = guided(network, interpolate(latents, noise, t), t, dropped_condition(network, cond, drop), 1.0)
    return velocity_error(velocity, velocity_target(latents, noise), mask, weight).mean()


def flow_loss(
    network: FluxAudio, latents: Tensor, cond: Condition, *, generator: torch.Generator, caption_dropout: float = 0.1,
    time_mean: float = 0.0, mask: Tensor | None = None, weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Flow-matching loss, 0-dim: mean squared velocity error over the batch, at times and noises that `draw_noising` draws.

    latents (B, N, C) in network space (`network.normalize`); mask (B, N) is 1 on frames that count; ONE
    Bernoulli(caption_dropout) per sample replaces both text tensors by the empty string's. Source: the published
    pre-training recipe.
    """
    draws = draw_noising(latents, generator=generator, caption_dropout=caption_dropout, time_mean=time_mean)
    return noised_loss(network, latents, cond, *draws, mask=mask, weight=weight)
