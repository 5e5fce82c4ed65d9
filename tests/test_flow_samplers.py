"""The time convention, flow matching, and the samplers, against golden numbers and independent mathematics."""

import math

import pytest
import torch
from conftest import relative
from test_flux_audio import awake, small, stored

from resonate_lib import flow, samplers
from resonate_lib.models.flux_audio import Condition


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def world(batch=3):
    network = awake(small(empty_string_feat=torch.randn(7, 10), empty_string_feat_c=torch.randn(12)))
    return network, Condition(torch.randn(batch, 7, 10), torch.randn(batch, 12)), torch.randn(batch, 5, 6)


def test_golden_flow_matching(golden):
    d = golden("flow_matching")
    torch.testing.assert_close(flow.interpolate(d["data"], d["noise"], d["t"]), d["xt"])
    target = flow.velocity_target(d["data"], d["noise"])
    torch.testing.assert_close(flow.velocity_error(d["pred_v"], target), d["loss_per_sample"])
    torch.testing.assert_close(flow.velocity_error(d["pred_v"], target, d["mask"]), d["masked_loss_per_sample"])


def test_path_ends_and_slope():
    x0, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.equal(flow.interpolate(x0, noise, 0.0), x0) and torch.equal(flow.interpolate(x0, noise, 1.0), noise)
    slope = (flow.interpolate(x0, noise, 0.6) - flow.interpolate(x0, noise, 0.5)) / 0.1
    torch.testing.assert_close(slope, flow.velocity_target(x0, noise))


def test_guidance_formula_and_grid(golden):
    c, u = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(flow.guided_velocity(c, u, 0.9), c)
    torch.testing.assert_close(flow.guided_velocity(c, u, 4.5), u + 4.5 * (c - u))
    assert torch.equal(flow.time_grid(10), golden("sde_step")["timesteps"])
    with pytest.raises(ValueError, match="steps=0"):
        flow.time_grid(0)


def test_flow_loss_at_a_network_of_zeros_is_the_power_of_the_target():
    """With v = 0 and no data the loss is the mean squared noise, 1."""
    network = small()
    cond = Condition(torch.randn(64, 7, 10), torch.randn(64, 12))
    loss = flow.flow_loss(network, torch.zeros(64, 9, 6), cond, generator=torch.Generator().manual_seed(0))
    assert loss.dim() == 0 and abs(loss.item() - 1) < 0.1


def test_caption_dropout_is_one_coin_for_both_tensors():
    network = small(empty_string_feat=torch.full((7, 10), 7.0), empty_string_feat_c=torch.full((12,), 9.0))
    cond = Condition(torch.zeros(4, 7, 10), torch.zeros(4, 12))
    out = flow.dropped_condition(network, cond, torch.tensor([True, False, True, False]))
    assert out.text_f[:, 0, 0].tolist() == [7, 0, 7, 0] and out.text_f_c[:, 0].tolist() == [9, 0, 9, 0]


def test_flow_loss_repeats_with_its_generator_and_reads_the_mask():
    network, cond, x0 = world()
    one, two = (flow.flow_loss(network, x0, cond, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    mask = torch.ones(3, 5)
    masked = flow.flow_loss(network, x0, cond, generator=torch.Generator().manual_seed(3), mask=mask)
    torch.testing.assert_close(masked, one)


@pytest.mark.parametrize("tag", ["sde0.7", "sde0.3", "cps0.7", "cps0.9"])
def test_golden_steps(golden, tag):
    d = golden("sde_step")
    kind, level = tag[:3], float(tag[3:])
    times = d["timesteps"]
    for i in range(10):
        args = (d["sample"][i], d["model_output"][i], times[i], times[i + 1])
        options = {"noise_level": level, "t_max": times[1], "kind": kind}
        out = samplers.sde_step(*args, **options, noise=d["noise"][i])
        tolerance = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(out.x_next, d[f"{tag}.prev_sample"][i], **tolerance)
        torch.testing.assert_close(out.mean, d[f"{tag}.mean"][i], **tolerance)
        torch.testing.assert_close(out.log_prob, d[f"{tag}.log_prob"][i], **tolerance)
        torch.testing.assert_close(out.std_dev_t.expand(3, 1, 1).flatten(), d[f"{tag}.std_dev_t"][i], **tolerance)
        scored = samplers.sde_step(*args, **options, x_next=0.9 * d["sample"][i])
        torch.testing.assert_close(scored.log_prob, d[f"{tag}.log_prob_of_0p9sample"][i], **tolerance)


def test_log_prob_is_the_mean_of_the_normal_density():
    x, v = torch.randn(2, 3, 5, 4).unbind(0)
    out = samplers.sde_step(x, v, 0.6, 0.5, noise_level=0.7, t_max=0.9, generator=torch.Generator().manual_seed(0))
    a = 0.7 * math.sqrt(0.6 / 0.4)
    normal = torch.distributions.Normal(out.mean, a * math.sqrt(0.1))
    torch.testing.assert_close(out.log_prob, normal.log_prob(out.x_next).mean((1, 2)), rtol=1e-5, atol=1e-5)


def test_times_may_differ_within_a_batch():
    x, v, noise = torch.randn(3, 2, 5, 4).unbind(0)
    both = samplers.sde_step(
        x, v, torch.tensor([1.0, 0.5]), torch.tensor([0.9, 0.4]), noise_level=0.7, t_max=0.9, noise=noise
    )
    for i, (t, t_next) in enumerate([(1.0, 0.9), (0.5, 0.4)]):
        s = slice(i, i + 1)
        one = samplers.sde_step(x[s], v[s], t, t_next, noise_level=0.7, t_max=0.9, noise=noise[s])
        torch.testing.assert_close(both.x_next[s], one.x_next)
        torch.testing.assert_close(both.log_prob[s], one.log_prob)


def test_gradient_flows_through_the_mean_alone():
    x, v = torch.randn(2, 2, 5, 4).unbind(0)
    v = v.requires_grad_()
    out = samplers.sde_step(x, v, 0.6, 0.5, noise_level=0.7, t_max=0.9, generator=torch.Generator().manual_seed(0))
    assert not out.x_next.requires_grad
    out.log_prob.sum().backward()
    assert v.grad.any()


def test_noise_zero_is_euler_and_has_no_density():
    x, v = torch.randn(2, 2, 5, 4).unbind(0)
    out = samplers.sde_step(x, v, 0.6, 0.5, noise_level=0.0, t_max=0.9)
    torch.testing.assert_close(out.x_next, x - 0.1 * v)
    assert out.log_prob is None


@pytest.mark.parametrize(
    ("change", "words"),
    [({"t_next": 0.6}, "t_next"), ({"t": 1.2}, "t_next"), ({"noise_level": -1.0}, "noise_level"),
     ({"kind": "ode"}, "kind"), ({}, "source of noise"), ({"generator": []}, "one per sample")],
)  # fmt: skip
def test_bad_steps_are_errors(change, words):
    x, v = torch.randn(2, 2, 5, 4).unbind(0)
    arguments = {"t": 0.6, "t_next": 0.5, "noise_level": 0.7, "t_max": 0.9} | change
    with pytest.raises(ValueError, match=words):
        samplers.sde_step(x, v, **arguments)


def test_golden_rollout(golden):
    network, _ = stored(golden, frames=12)
    d = golden("rollout")
    got = samplers.rollout(
        network, d["all_latents"][0], Condition(d["text_f"], d["text_f_c"]), steps=10, guidance_scale=4.5,
        noise_level=0.7, last_step_noise=True, noises=d["noises"].transpose(0, 1),
    )  # fmt: skip
    for i in range(11):
        assert relative(got.latents[:, i], d["all_latents"][i]) < 1e-3
    torch.testing.assert_close(got.log_probs.T, d["log_probs"], rtol=1e-3, atol=1e-4)
    assert got.stochastic == list(range(10))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_rollout_without_noise_is_the_ode(scale):
    network, cond, noise = world()
    ode = samplers.ode_sample(network, noise, cond, steps=6, guidance_scale=scale)
    got = samplers.rollout(network, noise, cond, steps=6, guidance_scale=scale, noise_level=0.0)
    assert torch.equal(got.final, ode) and got.stochastic == [] and got.log_probs.isnan().all()


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_last_step_is_deterministic_unless_asked(kind):
    network, cond, noise = world()
    options = {"steps": 4, "guidance_scale": 1.0, "noise_level": 0.7, "kind": kind}
    got = samplers.rollout(network, noise, cond, generators=generators(range(3)), **options)
    assert got.stochastic == [0, 1, 2] and got.log_probs[:, 3].isnan().all() and got.log_probs[:, :3].isfinite().all()
    loud = samplers.rollout(network, noise, cond, generators=generators(range(3)), last_step_noise=True, **options)
    assert loud.stochastic == ([0, 1, 2, 3] if kind == "sde" else [0, 1, 2])
    assert torch.equal(loud.latents[:, :4], got.latents[:, :4])


def test_window_confines_the_noise():
    network, cond, noise = world()
    got = samplers.rollout(
        network,
        noise,
        cond,
        steps=6,
        guidance_scale=1.0,
        noise_level=0.7,
        generators=generators(range(3)),
        window=(2, 2),
    )
    assert got.stochastic == [2, 3]
    calm = samplers.rollout(network, noise, cond, steps=6, guidance_scale=1.0, noise_level=0.0)
    assert torch.equal(got.latents[:, :3], calm.latents[:, :3])
    assert not got.noises[:, [0, 1, 4, 5]].any()


def test_a_seed_fixes_a_sample_whatever_its_batch():
    assert torch.equal(samplers.draw_noise((5, 6), [3, 4, 5])[1], samplers.draw_noise((5, 6), [4])[0])
    assert not torch.equal(*samplers.draw_noise((5, 6), [3, 4]))
    network, cond, _ = world()
    noise = samplers.draw_noise((5, 6), [7, 8, 9])
    options = {"steps": 4, "guidance_scale": 2.0, "noise_level": 0.7}
    many = samplers.rollout(network, noise, cond, generators=generators([7, 8, 9]), **options)
    alone = samplers.rollout(network, noise[1:2], cond.index([1]), generators=generators([8]), **options)
    assert torch.equal(many.noises[1], alone.noises[0])
    torch.testing.assert_close(many.latents[1], alone.latents[0], rtol=1e-4, atol=1e-5)


def test_sde_keeps_the_marginal_of_a_known_velocity():
    """Data N(0, s^2): the exact velocity is linear in x, so every marginal variance is known: ((1-t) s)^2 + t^2."""
    s, steps = 0.5, 200
    times = flow.time_grid(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, 1, generator=generator)
    for i in range(steps):
        t = times[i].item()
        v = x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)
        level = 0.7 if i < steps - 1 else 0.0
        out = samplers.sde_step(x, v, t, times[i + 1], noise_level=level, t_max=times[1], generator=generator)
        x = out.x_next
    assert abs(x.std().item() - s) < 0.03


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddim_step_recovers_and_scores(prediction):
    x0, eps = torch.randn(2, 3, 4, 2).unbind(0)
    ab, ab_next = 0.3, 0.6
    x = math.sqrt(ab) * x0 + math.sqrt(1 - ab) * eps
    out = eps if prediction == "epsilon" else math.sqrt(ab) * eps - math.sqrt(1 - ab) * x0
    ode = samplers.ddim_step(x, out, ab, ab_next, eta=0.0, prediction=prediction)
    torch.testing.assert_close(ode.x_next, math.sqrt(ab_next) * x0 + math.sqrt(1 - ab_next) * eps)
    assert ode.log_prob is None
    drawn = samplers.ddim_step(
        x, out, ab, ab_next, eta=1.0, prediction=prediction, generator=torch.Generator().manual_seed(0)
    )
    sigma = math.sqrt((1 - ab_next) / (1 - ab) * (1 - ab / ab_next))
    normal = torch.distributions.Normal(drawn.mean, sigma)
    torch.testing.assert_close(drawn.log_prob, normal.log_prob(drawn.x_next).mean((1, 2)))
    again = samplers.ddim_step(x, out, ab, ab_next, eta=1.0, prediction=prediction, x_next=drawn.x_next)
    assert torch.equal(again.log_prob, drawn.log_prob)
