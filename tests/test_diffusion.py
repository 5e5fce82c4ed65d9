"""Schedules, grids, DDIM and DDPM steps and whole chains against diffusers, densities against torch.distributions, the training
loss, and a diffusion generator in every place where a flow stands."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_algorithms import LOOP_NAMES, LOOPS, RECORDS, ToyGenerator, collect, toy_reward
from test_flow_samplers import generators, world

from resonate_lib import config, diffusion, flow, online, pretrain, samplers, training
from resonate_lib.diffusion import Chain, Diffusion
from resonate_lib.models.codec import MelCodec
from resonate_lib.models.flux_audio import Condition
from resonate_lib.models.generator import Generator

PUBLISHED = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
NAMES = {"epsilon": "epsilon", "v": "v_prediction"}
SHAPE = (2, 5, 3)


class Toy:
    """A network whose answer is a function of x and t alone."""

    latent_mean = torch.zeros(1)

    def __init__(self, answer=lambda x, t: torch.tanh(0.4 * x + t[:, None, None])):
        self.answer = answer

    def project_text(self, cond):
        return cond

    def empty_condition(self, batch):
        return Condition(torch.zeros(batch, 1, 1), torch.zeros(batch, 1))

    def velocity(self, x, text, t):
        return self.answer(x, t)


TEXT = Condition(torch.zeros(2, 1, 1), torch.zeros(2, 1))


def published(kind, process, **options):
    """diffusers' scheduler of a process."""
    import diffusers

    return getattr(diffusers, f"{kind}Scheduler")(
        num_train_timesteps=process.train_steps, beta_start=process.beta_start, beta_end=process.beta_end,
        beta_schedule=PUBLISHED[process.schedule], prediction_type=NAMES[process.prediction], clip_sample=False,
        timestep_spacing=process.spacing, steps_offset=process.steps_offset, **options,
    )  # fmt: skip


def close(got, want, tolerance=1e-5):
    """Equal to 1e-5 of the largest value: with epsilon the first steps divide by as little as 5e-5, and latents are that large."""
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max().item()
    assert error <= tolerance * max(1.0, want.abs().max().item()), error


# ------------------------------------------------------------------------------------------------ schedules and grids
def test_schedules_by_hand():
    bars = diffusion.alphas_cumprod("linear", train_steps=3, beta_start=0.1, beta_end=0.3)
    torch.testing.assert_close(bars, torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64))
    scaled = diffusion.alphas_cumprod("scaled_linear", train_steps=2, beta_start=0.04, beta_end=0.25)
    torch.testing.assert_close(scaled, torch.tensor([0.96, 0.96 * 0.75], dtype=torch.float64))
    cosine = diffusion.alphas_cumprod("cosine")
    curve = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 500, 1000)]
    assert cosine[499].item() == pytest.approx(curve[1] / curve[0], rel=1e-9)
    assert cosine[-1] == pytest.approx(cosine[-2] * 0.001)  # the cap, else it would be 0
    with pytest.raises(ValueError, match="allowed are linear, scaled_linear, cosine"):
        diffusion.alphas_cumprod("sigmoid")


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_schedules_are_diffusers(schedule):
    process = Diffusion(schedule=schedule, beta_start=0.0015, beta_end=0.0195)
    found, want = process.alpha_bars, published("DDIM", process).alphas_cumprod
    assert found.dtype == torch.float64 and bool((found[1:] < found[:-1]).all())
    torch.testing.assert_close(found.float(), want, rtol=1e-4, atol=1e-6)  # theirs is a float32 product of a thousand


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_timesteps_are_diffusers(spacing, offset):
    process = Diffusion(spacing=spacing, steps_offset=offset)
    for kind in ("DDIM", "DDPM"):
        scheduler = published(kind, process)
        for steps in (1, 2, 7, 10, 25, 30, 48, 50, 333, 1000 - 500 * offset):
            scheduler.set_timesteps(steps)
            assert process.timesteps(steps).tolist() == scheduler.timesteps.tolist(), (kind, steps)


def test_no_spacing_gives_too_many_or_negative_timesteps():
    for steps in range(1, 400):
        for spacing in diffusion.SPACINGS:
            chosen = Diffusion(spacing=spacing).timesteps(steps)
            assert len(chosen) == steps and chosen.min() >= 0 and chosen.max() < 1000
            assert bool((chosen[1:] < chosen[:-1]).all())


def test_a_grid_rises_from_noise_to_data():
    process = Diffusion(schedule="linear")
    times, bars = process.grid(4)
    assert times.tolist() == pytest.approx([0.999, 0.749, 0.499, 0.249]) and times.dtype == torch.float32
    assert bars.dtype == torch.float64 and torch.equal(bars[:4], process.alpha_bars[[999, 749, 499, 249]]) and bars[4] == 1
    kept = dataclasses.replace(process, final_alpha_one=False, time_unit=1.0).grid(4)
    assert kept.alpha_bars[4] == process.alpha_bars[0] and kept.times[0] == 999


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda: Diffusion(schedule="cos"), "schedule='cos': allowed are linear"),
     (lambda: Diffusion(prediction="x0"), "prediction='x0': allowed are epsilon, v"),
     (lambda: Diffusion(spacing="even"), "allowed are leading, trailing, linspace"),
     (lambda: Diffusion().grid(0), "steps=0: use 1 to 1000"), (lambda: Diffusion().grid(1001), "steps=1001"),
     (lambda: Diffusion(spacing="leading", steps_offset=1).grid(1000), "steps_offset=1: timestep 1000 of 1000"),
     (lambda: diffusion.prediction_target(TEXT.text_f, TEXT.text_f, 0.5, "x0"), "allowed are epsilon, v")],
)  # fmt: skip
def test_what_is_not_allowed_is_said(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ------------------------------------------------------------------------------------------------ steps
def ddim_pairs(process, scheduler, steps):
    """(timestep, ab, ab of the timestep that diffusers' DDIM goes to) of every step."""
    scheduler.set_timesteps(steps)
    end = 1.0 if process.final_alpha_one else process.alpha_bars[0].item()
    for t in scheduler.timesteps.tolist():
        before = t - process.train_steps // steps
        yield t, process.alpha_bars[t].item(), process.alpha_bars[before].item() if before >= 0 else end


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("spacing", diffusion.SPACINGS)
@pytest.mark.parametrize("prediction", samplers.PREDICTIONS)
@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_ddim_steps_are_diffusers_over_whole_trajectories(schedule, prediction, spacing, final):
    process = Diffusion(schedule=schedule, prediction=prediction, spacing=spacing, final_alpha_one=final)
    scheduler = published("DDIM", process, set_alpha_to_one=final)
    noise = torch.randn(21, *SHAPE, generator=torch.Generator().manual_seed(1))
    for eta in (0.0, 0.5, 1.0):
        x = want = noise[20]
        for j, (t, ab, ab_next) in enumerate(ddim_pairs(process, scheduler, 20)):
            answers = [Toy().velocity(z, None, torch.full((2,), t / 1000)) for z in (x, want)]
            step = samplers.ddim_step(x, answers[0], ab, ab_next, eta=eta, prediction=prediction, noise=noise[j])
            variance = scheduler._get_variance(t, t - 50)
            close(step.std.square().flatten(), (eta**2 * variance).flatten())
            mean = scheduler.step(answers[1], t, want, eta=eta, variance_noise=torch.zeros(SHAPE)).prev_sample
            want = scheduler.step(answers[1], t, want, eta=eta, variance_noise=noise[j]).prev_sample
            close(step.mean, mean)
            close(step.x_next, want)
            x = step.x_next


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", samplers.PREDICTIONS)
@pytest.mark.parametrize(
    ("spacing", "offset", "final", "train_steps"),
    [("leading", 0, True, 1000), ("leading", 1, False, 1000), ("trailing", 0, True, 1000), ("linspace", 0, False, 20)],
)  # fmt: skip
def test_rollouts_are_diffusers_ddim(spacing, offset, final, train_steps, prediction, eta):
    """Where the timestep that its DDIM goes to is the one it asks the network about next."""
    process = Diffusion(spacing=spacing, steps_offset=offset, final_alpha_one=final, train_steps=train_steps,
                        prediction=prediction, schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)  # fmt: skip
    scheduler = published("DDIM", process, set_alpha_to_one=final)
    noise, noises = torch.randn(*SHAPE), torch.randn(2, 20, *SHAPE[1:])
    options = {"steps": 20, "guidance_scale": 1.0}
    chain = process.rollout(Toy(), noise, TEXT, noises=noises, eta=eta, **options)
    scheduler.set_timesteps(20)
    x = noise
    for j, t in enumerate(scheduler.timesteps.tolist()):
        answer = Toy().velocity(x, None, torch.full((2,), t / 1000))
        x = scheduler.step(answer, t, x, eta=eta, variance_noise=noises[:, j]).prev_sample
        close(chain.latents[:, j + 1], x)
    if eta == 0:
        assert torch.equal(process.ode_sample(Toy(), noise, TEXT, **options), chain.final)
        assert chain.stochastic == [] and chain.log_probs.isnan().all() and not chain.noises.any()


def test_a_step_ends_where_the_next_begins_which_diffusers_ddim_misses():
    """With linspace it goes from 999 to 899 and then tells the network 888; its DDPM goes to 888."""
    process = Diffusion(spacing="linspace", schedule="linear")
    pairs = list(ddim_pairs(process, published("DDIM", process), 10))
    assert [pairs[0][0], pairs[1][0]] == [999, 888] and pairs[0][2] == process.alpha_bars[899]
    scheduler = published("DDPM", process)
    scheduler.set_timesteps(10)
    assert int(scheduler.previous_timestep(999)) == 888
    torch.testing.assert_close(process.grid(10).alpha_bars[1], process.alpha_bars[888])


@pytest.mark.parametrize("variance", samplers.VARIANCES)
@pytest.mark.parametrize("spacing", diffusion.SPACINGS)
@pytest.mark.parametrize("prediction", samplers.PREDICTIONS)
@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_ancestral_rollouts_are_diffusers_ddpm(schedule, prediction, spacing, variance):
    """One generator for both. Its last step adds noise of the full deviation where it ends above timestep 0, ours does not."""
    process = Diffusion(schedule=schedule, prediction=prediction, spacing=spacing)
    scheduler = published("DDPM", process, variance_type=f"fixed_{variance}")
    noise = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(1))
    ours, theirs = generators([7, 7])
    options = {"generators": ours, "kind": "ancestral", "variance": variance, "guidance_scale": 1.0}
    chain = process.rollout(Toy(), noise, TEXT, steps=20, **options)
    assert chain.stochastic == list(range(19)) and chain.kind == "ancestral"
    scheduler.set_timesteps(20)
    x, timesteps = noise, scheduler.timesteps.tolist()
    for j, t in enumerate(timesteps):
        answer = Toy().velocity(x, None, torch.full((2,), t / 1000))
        state = theirs.get_state()
        found = scheduler.step(answer, t, x, generator=theirs)
        if t == timesteps[-1] > 0 and variance == "large":
            close(chain.final, found.pred_original_sample)
            theirs.set_state(state)
            spread = (1 - process.alpha_bars[t]).sqrt().float() * torch.randn(SHAPE, generator=theirs)
            close(chain.final, found.prev_sample - spread)
            continue
        if j < 19:
            step = samplers.ddpm_step(x, answer, *process.grid(20).alpha_bars[j : j + 2], prediction=prediction, variance=variance,
                                      noise=chain.noises[:, j])  # fmt: skip
            close(step.std.square().flatten(), scheduler._get_variance(t).flatten())
        x = found.prev_sample
        close(chain.latents[:, j + 1], x)


@given(
    bars=st.lists(st.floats(1e-3, 0.999), min_size=2, max_size=2, unique=True).map(sorted),
    prediction=st.sampled_from(samplers.PREDICTIONS), seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_ancestral_posterior_is_ddim_with_eta_1(bars, prediction, seed):
    x, out, noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(seed)).unbind(0)
    ddpm = samplers.ddpm_step(x, out, *bars, prediction=prediction, noise=noise)
    ddim = samplers.ddim_step(x, out, *bars, eta=1.0, prediction=prediction, noise=noise)
    if bars[1] - bars[0] > 1e-4:  # nearer ones differ by float32's rounding of 1 - ab / ab_next
        close(ddpm.mean, ddim.mean, 1e-4)
        close(ddpm.std, ddim.std, 1e-4)


def test_the_large_variance_is_beta_and_nothing_is_drawn_at_the_end():
    x, out, noise = torch.randn(3, *SHAPE).unbind(0)
    step = samplers.ddpm_step(x, out, 0.3, 0.6, variance="large", noise=noise)
    assert step.std.item() == pytest.approx(math.sqrt(1 - 0.3 / 0.6))
    for variance in samplers.VARIANCES:
        end = samplers.ddpm_step(x, out, 0.3, 1.0, variance=variance, noise=noise)
        torch.testing.assert_close(end.x_next, (x - math.sqrt(0.7) * out) / math.sqrt(0.3))
        assert end.log_prob is None
    with pytest.raises(ValueError, match="allowed are 'small' and 'large'"):
        samplers.ddpm_step(x, out, 0.3, 0.6, variance="learned", noise=noise)


@pytest.mark.parametrize(
    "how", [{"eta": 1.0}, {"eta": 0.4}, {"kind": "ancestral"}, {"kind": "ancestral", "variance": "large"}], ids=str
)
@pytest.mark.parametrize("prediction", samplers.PREDICTIONS)
def test_log_probs_are_those_of_the_normal_distribution(how, prediction):
    """Means and deviations from the textbook formulas in float64."""
    process = Diffusion(schedule="linear", prediction=prediction)
    chain = process.rollout(Toy(), torch.randn(*SHAPE), TEXT, steps=6, guidance_scale=1.0, generators=generators([3, 4]), **how)
    bars = chain.alpha_bars.tolist()
    for j in chain.stochastic:
        x, x_next = chain.latents[:, j].double(), chain.latents[:, j + 1].double()
        answer = Toy().velocity(chain.latents[:, j], None, chain.times[j].expand(2)).double()
        ab, ab_next = bars[j], bars[j + 1]
        x0 = (x - math.sqrt(1 - ab) * answer) / math.sqrt(ab)
        if prediction == "v":
            x0 = math.sqrt(ab) * x - math.sqrt(1 - ab) * answer
        beta = 1 - ab / ab_next
        posterior = beta * (1 - ab_next) / (1 - ab)
        if how.get("kind") == "ancestral":
            mean = (math.sqrt(ab_next) * beta * x0 + math.sqrt(1 - beta) * (1 - ab_next) * x) / (1 - ab)
            std = math.sqrt(beta if how.get("variance") == "large" else posterior)
        else:
            std = how["eta"] * math.sqrt(posterior)
            noise = (x - math.sqrt(ab) * x0) / math.sqrt(1 - ab)
            mean = math.sqrt(ab_next) * x0 + math.sqrt(1 - ab_next - std**2) * noise
        want = torch.distributions.Normal(mean, std).log_prob(x_next).mean((1, 2))
        torch.testing.assert_close(chain.log_probs[:, j].double(), want, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ chains
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("how", [{"eta": 1.0}, {"eta": 0.3}, {"kind": "ancestral", "variance": "large"}], ids=str)
def test_the_first_ratio_is_exactly_1_and_gradients_flow(how, scale):
    network, cond, noise = world()
    process = Diffusion()
    chain = process.rollout(network, noise, cond, steps=5, guidance_scale=scale, generators=generators(range(3)), **how)
    assert isinstance(chain, Chain) and chain.stochastic == [0, 1, 2, 3] and chain.log_probs[:, 4].isnan().all()
    assert chain.latents.shape == (3, 6, 5, 6) and chain.times.shape == chain.alpha_bars.shape == (6,) and chain.times[5] == 0
    rows = torch.arange(3)
    for j in chain.stochastic:
        scored = diffusion.score_step(network, chain, rows, j, cond, scale)
        assert torch.equal(scored.log_prob, chain.log_probs[:, j]) and torch.equal(scored.x_next, chain.latents[:, j + 1])
    scored.log_prob.sum().backward()
    assert network.final_layer.conv.weight.grad.any()
    with pytest.raises(ValueError, match=r"step 4 is deterministic .* \[0, 1, 2, 3\]"):
        diffusion.score_step(network, chain, rows, 4, cond, scale)


def test_a_window_confines_the_noise():
    network, cond, noise = world()
    options = {"steps": 6, "guidance_scale": 1.0}
    for how in ({}, {"kind": "ancestral"}):
        got = Diffusion().rollout(network, noise, cond, generators=generators(range(3)), window=(2, 2), **options, **how)
        calm = Diffusion().rollout(network, noise, cond, eta=0.0, **options)
        assert got.stochastic == [2, 3] and torch.equal(got.latents[:, :3], calm.latents[:, :3])
        assert not got.noises[:, [0, 1, 4, 5]].any() and got.noises[:, [2, 3]].any()
        end = samplers.ddim_step(got.latents[:, 5], flow.guided(network, got.latents[:, 5], got.times[5], cond, 1.0),
                                 *got.alpha_bars[4:6], eta=0.0, prediction="v")  # fmt: skip
        assert end.log_prob is None


def test_chains_that_cannot_be_are_refused():
    network, cond, noise = world()
    for how in ({"kind": "ddpm"}, {"kind": "ancestral", "eta": 0.5}, {"eta": -1.0}):
        with pytest.raises(ValueError, match="allowed are kind='ddim' with eta"):
            Diffusion().rollout(network, noise, cond, steps=3, guidance_scale=1.0, **how)
    with pytest.raises(ValueError, match="source of noise"):
        Diffusion().rollout(network, noise, cond, steps=3, guidance_scale=1.0)


def exact(prediction, mean, spread, process):
    """The network that knows data N(mean, spread^2): E[noise | x] of a joint normal."""

    def answer(x, t):
        ab = process.alpha_bars[(t[0] * process.time_unit).round().long()].item()
        centred = x - math.sqrt(ab) * mean
        noise = math.sqrt(1 - ab) * centred / (ab * spread**2 + 1 - ab)
        x0 = mean + math.sqrt(ab) * spread**2 * centred / (ab * spread**2 + 1 - ab)
        return noise if prediction == "epsilon" else math.sqrt(ab) * noise - math.sqrt(1 - ab) * x0

    return Toy(answer)


@pytest.mark.parametrize("prediction", samplers.PREDICTIONS)
def test_samplers_arrive_at_known_data(prediction):
    process, mean, spread = Diffusion(schedule="linear", prediction=prediction), 2.0, 0.5
    noise = torch.randn(2, 4000, 1, generator=torch.Generator().manual_seed(0))
    network, options = exact(prediction, mean, spread, process), {"steps": 200, "guidance_scale": 1.0}
    solved = process.ode_sample(network, noise, TEXT, **options)
    torch.testing.assert_close(solved, mean + spread * noise, rtol=0.02, atol=0.05)  # the ODE keeps each sample's rank
    for how in ({}, {"kind": "ancestral"}, {"kind": "ancestral", "variance": "large"}):
        final = process.rollout(network, noise, TEXT, generators=generators([5, 6]), **options, **how).final
        assert abs(final.mean() - mean) < 0.03 and abs(final.std() - spread) < 0.03
        assert abs(((final - mean) * noise).mean()) < 0.2 * spread  # and the stochastic ones forget it


def test_ddim_is_eulers_step_of_the_probability_flow_ode():
    """In x / sqrt(ab) over sigma = sqrt((1 - ab) / ab) the slope is epsilon."""
    x, eps = torch.randn(2, *SHAPE).unbind(0)
    ab, ab_next = 0.2, 0.5
    sigma, sigma_next = (math.sqrt((1 - a) / a) for a in (ab, ab_next))
    want = (x / math.sqrt(ab) + (sigma_next - sigma) * eps) * math.sqrt(ab_next)
    torch.testing.assert_close(samplers.ddim_step(x, eps, ab, ab_next, eta=0.0).x_next, want)


# ------------------------------------------------------------------------------------------------ training
def test_forward_process_and_targets():
    x0, noise = torch.randn(2, *SHAPE).unbind(0)
    for bars in (0.3, torch.tensor([0.3, 0.3])):
        x = diffusion.noised(x0, noise, bars)
        torch.testing.assert_close(x, math.sqrt(0.3) * x0 + math.sqrt(0.7) * noise)
        for prediction in samplers.PREDICTIONS:
            target = diffusion.prediction_target(x0, noise, bars, prediction)
            end = samplers.ddim_step(x, target, 0.3, 1.0, eta=0.0, prediction=prediction)
            torch.testing.assert_close(end.x_next, x0)


def test_nearest_timesteps_by_brute_force():
    for process in (Diffusion(), Diffusion(schedule="linear")):
        t = torch.linspace(0, 1, 57)
        ratio = ((1 - process.alpha_bars) / process.alpha_bars).sqrt()
        places = (ratio / (1 + ratio)).numpy()
        assert process.nearest(t).tolist() == [int(np.abs(places - float(one)).argmin()) for one in t]


@pytest.mark.parametrize("prediction", samplers.PREDICTIONS)
def test_the_loss_is_zero_for_who_knows_and_by_hand_for_who_does_not(prediction):
    process = Diffusion(prediction=prediction)
    x0 = torch.randn(*SHAPE)
    t, noise, drop = flow.draw_noising(x0, generator=torch.Generator().manual_seed(0), caption_dropout=0.5)
    bars = process.alpha_bars[process.nearest(t)]
    target = diffusion.prediction_target(x0, noise, bars, prediction)
    asked = []
    knows = Toy(lambda x, time: asked.append((x, time)) or target)
    assert process.noised_loss(knows, x0, TEXT, t, noise, drop).item() == 0
    torch.testing.assert_close(asked[0][0], diffusion.noised(x0, noise, bars))
    torch.testing.assert_close(asked[0][1] * 1000, process.nearest(t).float())
    torch.testing.assert_close((1 - bars).sqrt() / bars.sqrt(), (t / (1 - t)).double(), rtol=0.02, atol=0.02)
    weight, mask = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[1.0, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    nothing = Toy(lambda x, _: torch.zeros_like(x))
    got = process.noised_loss(nothing, x0, TEXT, t, noise, drop, mask=mask, weight=weight)
    power = (target.square() * weight).mean(2)
    torch.testing.assert_close(got, (power[0, :2].mean() + power[1, :1].mean()) / 2)


def toy_latents():
    captions = lambda positions, _: [f"sound {i % 6}" for i in positions]  # noqa: E731
    return torch.randn(20, 5, 6, generator=torch.Generator().manual_seed(0)), captions


def test_pretraining_learns_the_process_that_the_generator_has():
    """The loss of its first step, at the same draws, by hand; a flow's own stays what it was."""
    latents, captions = toy_latents()
    for process in (None, Diffusion(), Diffusion(prediction="epsilon")):
        toy = ToyGenerator()
        toy.diffusion = process
        toy.network.latent_std.data.fill_(1.0)
        rng = training.step_generator(0, 0)
        positions = torch.randint(20, (8,), generator=rng).tolist()
        torch.randint(2**31, (1,), generator=rng)
        draws = flow.draw_noising(latents[positions], generator=rng)
        cond = toy.encode_prompts(captions(positions, None))
        want = (process or flow).noised_loss(toy.network, latents[positions], cond, *draws).item()
        row = pretrain.train(toy, latents, captions, steps=1, batch_size=8, precision="float32")[0]
        assert row["loss"] == pytest.approx(want, rel=1e-5)
        toy.device = torch.device("cpu")
        found = pretrain.validation_loss(toy, latents, captions(range(20), None), seed=4, precision="float32")
        draws = flow.draw_noising(latents, generator=torch.Generator().manual_seed(4), caption_dropout=0.0)
        cond = toy.encode_prompts(captions(range(20), None))
        assert found == pytest.approx((process or flow).noised_loss(toy.network, latents, cond, *draws).item(), rel=1e-5)


def test_the_loss_of_held_out_clips_is_followed():
    """Twelve times in a training, at the same draws; it changes nothing of what is learned."""
    latents, captions = toy_latents()
    rows, toys = {}, {}
    for held in (None, (latents[:10], captions(range(10), None))):
        toy = toys[held is None] = ToyGenerator()
        toy.diffusion, toy.device = None, torch.device("cpu")
        toy.network.latent_std.data.fill_(1.0)
        rows[held is None] = pretrain.train(toy, latents, captions, steps=30, batch_size=8, time_mean=1.0, held=held,
                                            precision="float32")
    assert [row["loss"] for row in rows[True]] == [row["loss"] for row in rows[False]]
    found = {row["step"] + 1: row["validation_loss"] for row in rows[False] if "validation_loss" in row}
    assert len(found) == 12 and max(found) == 30 and not any("validation_loss" in row for row in rows[True])
    after = pretrain.validation_loss(toys[False], latents[:10], captions(range(10), None), time_mean=1.0, precision="float32")
    assert found[30] == after


def test_training_lowers_the_loss():
    latents, captions = toy_latents()
    toy = ToyGenerator()
    toy.diffusion = Diffusion()
    toy.network.latent_std.data.fill_(1.0)
    rows = pretrain.train(toy, 0.1 * latents, captions, steps=60, batch_size=16, learning_rate=3e-3, warmup=5, precision="float32")
    first, last = (sum(row["loss"] for row in part) / 10 for part in (rows[:10], rows[-10:]))
    assert last < 0.7 * first


# ------------------------------------------------------------------------------------------------ generators
@pytest.fixture(scope="module")
def made():
    sizes = {"hidden_dim": 16, "depth": 2, "fused_depth": 1, "num_heads": 2, "text_seq_len": 12}
    generator = Generator.new(MelCodec(latent_dim=8), diffusion=Diffusion(prediction="epsilon", schedule="linear"), **sizes)
    with torch.no_grad():
        generator.network.final_layer.conv.weight.normal_(generator=torch.Generator().manual_seed(0))
    return generator


def test_a_generator_samples_by_its_process_and_keeps_it(made, tmp_path):
    options = {"steps": 3, "guidance_scale": 2.0}
    latents = made.generate(["a dog barks"], seeds=[4], precision="float32", **options)
    noise, cond = samplers.draw_noise(made.latent_shape, [4]), made.encode_prompts(["a dog barks"])
    assert torch.equal(latents, made.diffusion.ode_sample(made.network, noise, cond, **options))
    assert not torch.allclose(latents, samplers.ode_sample(made.network, noise, cond, **options), atol=1e-2)
    made.save(tmp_path / "ppo", bits=32, steps=7)
    told = json.loads((tmp_path / "ppo" / "generator.json").read_text())["diffusion"]
    assert told["schedule"] == "linear" and Generator.facts(tmp_path / "ppo") == {"steps": 7}
    for other in (made.fork(), Generator.load(tmp_path / "ppo"), made.with_network(tmp_path / "ppo")):
        assert other.diffusion == made.diffusion
        again = other.generate(["a dog barks"], seeds=[4], precision="float32", **options)
        torch.testing.assert_close(again, latents, rtol=1e-3, atol=1e-3)  # token states are kept as float16


def test_a_tuning_of_another_process_is_refused(made, tmp_path):
    flowing = made.fork()
    flowing.diffusion = None
    flowing.save(tmp_path / "grpo")
    assert "diffusion" not in json.loads((tmp_path / "grpo" / "generator.json").read_text())
    assert Generator.load(tmp_path / "grpo").diffusion is None
    with pytest.raises(ValueError, match=r"is of a flow, this one of Diffusion\(schedule='linear'.*name a tuning of the same base"):
        made.with_network(tmp_path / "grpo")


def test_collect_rolls_out_chains():
    toy = ToyGenerator()
    toy.diffusion = Diffusion()
    whole = collect(toy, RECORDS[:2], sde={"eta": 0.8})
    assert isinstance(whole.trajectory, Chain) and whole.trajectory.noise_level == 0.8
    assert torch.equal(whole.trajectory.final, whole.latents)
    parted = collect(toy, RECORDS[:2], sde={"eta": 0.8}, sample_batch=4)
    assert isinstance(parted.trajectory, Chain) and parted.trajectory.stochastic == [0, 1]
    torch.testing.assert_close(parted.trajectory.latents, whole.trajectory.latents, rtol=1e-4, atol=1e-4)
    alike = collect(toy, RECORDS[:2], sde={"window": (1, 1)}).trajectory.latents
    torch.testing.assert_close(alike[0, :2], alike[1, :2])  # siblings before the window, in other rows of the batch
    assert not torch.allclose(alike[0, 2], alike[1, 2], atol=0.1)
    calm = collect(toy, RECORDS[:2], sde=None)
    assert calm.trajectory is None
    torch.testing.assert_close(calm.latents, collect(toy, RECORDS[:2], sde={"eta": 0.0}).latents)


@pytest.mark.parametrize(("module", "made"), LOOPS, ids=LOOP_NAMES)
def test_what_learns_from_velocities_refuses_a_diffusion(module, made):
    toy = ToyGenerator()
    toy.diffusion = Diffusion()
    with pytest.raises(ValueError, match="needs a flow, and this generator is a Diffusion"):
        module.train(toy, toy_reward, RECORDS, made)


@pytest.mark.parametrize("name", ["diffusion", "base"])
def test_both_base_models_are_built_on_the_same_scenes(name, tmp_path):
    from resonate_lib.evaluation import instruments

    classes = {"suite": config.SuiteConfig, "pretrain": config.PretrainConfig, "reward": config.RewardConfig,
               "data": config.DataConfig, "diffusion": config.DiffusionConfig}  # fmt: skip
    configs = {key: config.resolve(cls, "smoke") for key, cls in classes.items()}
    configs["diffusion"] = dataclasses.replace(configs["diffusion"], steps=3, prediction="epsilon")
    if name == "base":
        del configs["diffusion"]  # other notebooks do not have it
    one = {"seed": 1, "folder": tmp_path / name, "state": tmp_path / "state.pt", "cache": tmp_path / "cache"}
    rows = instruments.build(name, configs, **one)
    assert len(rows) == (3 if name == "diffusion" else 4) and instruments.build(name, configs, **one) == rows
    built, facts = Generator.load(tmp_path / name), Generator.facts(tmp_path / name)
    assert built.diffusion == (Diffusion(prediction="epsilon") if name == "diffusion" else None)
    assert facts["seed"] == 1 and facts["steps"] == len(rows) and facts["clips"] == 48


def test_bases_are_trained_where_none_is_there_and_the_flow_of_another_seed(tmp_path):
    from resonate_lib.evaluation import instruments

    world, none = SimpleNamespace(knows_events=True), SimpleNamespace(knows_events=False)

    def run(found, seed=0, scratch=False):
        return SimpleNamespace(from_scratch=scratch, seed=seed, checkpoint=lambda name: tmp_path / "own",
                               resolve_input=lambda name, optional: found)  # fmt: skip

    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "generator.json").write_text('{"seed": 0}')
    for seed in (0, 1):
        assert instruments.to_build_diffusion(run(shipped, seed), world) == []
    for case in (run(None), run(tmp_path / "own"), run(shipped, scratch=True)):
        assert instruments.to_build_diffusion(case, world) == ["diffusion"]
        assert instruments.to_build_diffusion(case, none) == []
    assert [instruments.to_build(run(shipped, seed), world) for seed in (0, 1)] == [[], ["base"]]  # each seed has its own flow base
    assert instruments.to_build(run(tmp_path / "own"), world) == ["base"]  # interrupted, and gone on with
    assert len(instruments.to_build(run(None, scratch=True), world)) == 6
    assert instruments.to_build(run(None, scratch=True), none) == ["base"]
    assert instruments.to_build(run(None), none) == instruments.to_build(run(shipped, 1), none) == []


def test_joined_parts_keep_what_a_chain_is():
    toy = ToyGenerator()
    toy.diffusion = Diffusion()
    chain = collect(toy, RECORDS[:2], sde={"kind": "ancestral", "variance": "large"}).trajectory
    joined = online._join_trajectories((chain, chain))
    assert len(joined.latents) == 2 * len(chain.latents) and (joined.kind, joined.variance) == ("ancestral", "large")
    assert torch.equal(joined.alpha_bars, chain.alpha_bars)
