"""Differentiable rewards: the Gumbel-Softmax gradient against enumeration and REINFORCE, sample filtering by hand."""

import copy
import dataclasses
import itertools
import math

import miniature
import miniature_lalm
import pytest
import torch
from miniature_clap import make_miniature
from test_algorithms import RECORDS, ToyGenerator
from test_rewards import clap, lalm, scene  # noqa: F401  (fixtures)
from torch.nn.functional import one_hot

from resonate_lib import diffro, samplers
from resonate_lib.config import DiffROConfig
from resonate_lib.models.codec import MelCodec, VaeCodec
from resonate_lib.rewards import load_reward
from resonate_lib.rewards.base import RewardResult
from resonate_lib.rewards.laion import LaionClapReward
from resonate_lib.rewards.omni import load_judge

# ------------------------------------------------------------------------------------- Gumbel-Softmax
LENGTH, WORDS = 3, 4


def toy():
    """Logits of three tokens out of four, and a reward of their one-hot rows with pairs that go well together."""
    draw = torch.Generator().manual_seed(5)
    logits, single = torch.randn(LENGTH, WORDS, generator=draw), torch.randn(LENGTH, WORDS, generator=draw)
    pair = 0.3 * torch.randn(LENGTH - 1, WORDS, WORDS, generator=draw)

    def reward(rows):  # (n, LENGTH, WORDS) -> (n,)
        alone = (rows * single).sum((1, 2))
        together = torch.einsum("nlv,lvw,nlw->n", rows[:, :-1], pair, rows[:, 1:])
        return torch.sigmoid(alone + together)

    return logits, reward


def exact_gradient(logits, reward):
    logits = logits.clone().requires_grad_(True)
    every = torch.tensor(list(itertools.product(range(WORDS), repeat=LENGTH)))
    log_p = logits.log_softmax(-1)[range(LENGTH), every].sum(1)
    return torch.autograd.grad((log_p.exp() * reward(one_hot(every, WORDS).float())).sum(), logits)[0]


def gumbel_gradients(logits, reward, n, temperature):
    copies = logits.expand(n, -1, -1).clone().requires_grad_(True)
    rows = diffro.gumbel_softmax(copies, temperature=temperature, generator=torch.Generator().manual_seed(0))
    return torch.autograd.grad(reward(rows).sum(), copies)[0]


def reinforce_gradients(logits, reward, n):
    ids = torch.multinomial(logits.softmax(-1), n, replacement=True, generator=torch.Generator().manual_seed(1)).T
    scores = reward(one_hot(ids, WORDS).float())
    return (scores - scores.mean())[:, None, None] * (one_hot(ids, WORDS) - logits.softmax(-1))


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_the_gradient_points_where_enumeration_and_reinforce_point_and_scatters_less():
    logits, reward = toy()
    exact, n = exact_gradient(logits, reward), 100_000
    reinforce, straight = reinforce_gradients(logits, reward, n), gumbel_gradients(logits, reward, n, 1.0)
    assert cosine(reinforce.mean(0), exact) > 0.999  # so many samples are as good as the truth
    to_exact, to_reinforce = cosine(straight.mean(0), exact), cosine(straight.mean(0), reinforce.mean(0))
    spread, of_reinforce = straight.var(0).sum().item(), reinforce.var(0).sum().item()
    print(f"cosine {to_exact:.3f} to enumeration, {to_reinforce:.3f} to REINFORCE; variance {spread:.4f}, {of_reinforce:.4f}")
    assert min(to_exact, to_reinforce) >= 0.9 and spread < of_reinforce


def test_draws_follow_the_softmax_exactly_and_come_from_the_generator():
    logits, _ = toy()
    many = logits.expand(40_000, -1, -1)
    rows = diffro.gumbel_softmax(many, temperature=0.3, generator=torch.Generator().manual_seed(2))
    assert ((rows == 0) | (rows == 1)).all() and (rows.sum(-1) == 1).all()
    torch.testing.assert_close(rows.mean(0), logits.softmax(-1), atol=0.01, rtol=0)
    again = diffro.gumbel_softmax(many, temperature=2.0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(rows, again)  # the same noise: the temperature is the gradient's alone
    other = diffro.gumbel_softmax(many, temperature=0.3, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(rows, other)


def test_soft_weights_are_the_formula_and_carry_the_gradient_of_the_hard_ones():
    logits = toy()[0].double().requires_grad_(True)
    draws = [torch.Generator().manual_seed(4) for _ in range(3)]
    noise = -torch.empty(LENGTH, WORDS).exponential_(generator=draws[0]).log()
    soft = diffro.gumbel_softmax(logits, temperature=0.5, hard=False, generator=draws[1])
    torch.testing.assert_close(soft, ((logits + noise) * 2).softmax(-1))
    hard, weight = diffro.gumbel_softmax(logits, temperature=0.5, generator=draws[2]), torch.arange(4.0).double()
    gradients = [torch.autograd.grad((rows * weight).sum(), logits, retain_graph=True)[0] for rows in (soft, hard)]
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="temperature=0: must be above 0"):
        diffro.gumbel_softmax(logits, temperature=0, generator=draws[0])


def test_the_temperature_falls_by_equal_ratios():
    assert [diffro.temperature_at(i, 3, 2.0, 0.5) for i in range(4)] == pytest.approx([2.0, 1.0, 0.5, 0.5])
    assert diffro.temperature_at(0, 1, 2.0, 0.5) == 2.0


# ------------------------------------------------------------------------------------------ filtering
def keep(rewards, groups, **options):
    options = {"min_spread": 0.0, "length_deviations": 3.0} | options
    mask, reasons = diffro.keep_groups(torch.tensor(rewards), torch.tensor(groups), **options)
    return mask.long().tolist(), reasons


def test_groups_that_tie_or_hold_one_alone_are_left_out():
    mask, reasons = keep([0.1, 0.1, 0.2, 0.4, 0.9], [3, 3, 7, 7, 9])
    assert mask == [0, 0, 1, 1, 0] and reasons == {"failed": 0, "length": 0, "spread": 3}
    assert keep([0.25, 0.75], [0, 0], min_spread=0.25) == ([0, 0], {"failed": 0, "length": 0, "spread": 2})  # deviation 0.25
    assert keep([0.25, 0.75], [0, 0], min_spread=0.24)[0] == [1, 1]


def test_outlier_lengths_are_those_far_from_the_median_of_their_own_group():
    # group 0: median 11, distances 1 1 0 2 29, median distance 1, deviation 1.4826: beyond 3 deviations lies 40 alone
    lengths = torch.tensor([10, 12, 11, 13, 40, 40, 40, 41])
    mask, reasons = keep([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], [0, 0, 0, 0, 0, 1, 1, 1], lengths=lengths)
    assert mask == [1, 1, 1, 1, 0, 1, 1, 1] and reasons == {"failed": 0, "length": 1, "spread": 0}
    # equal siblings: a deviation is 5 % of the median, 1 token of 20; 23 is three of them, 24 too many
    for last, kept in ((23, 1), (24, 0)):
        assert keep([0.1, 0.2, 0.3, 0.4], [0] * 4, lengths=torch.tensor([20, 20, 20, last]))[0] == [1, 1, 1, kept]


def test_failed_decodes_go_first_and_do_not_count_in_the_median_or_the_spread():
    failed = torch.tensor([False, True, False, False, False, False])
    lengths = torch.tensor([10, 900, 10, 10, 10, 10])
    mask, reasons = keep([0.5, 0.0, 0.5, 0.1, 0.3, float("nan")], [0, 0, 0, 1, 1, 1], lengths=lengths, failed=failed)
    assert mask == [0, 0, 0, 1, 1, 0] and reasons == {"failed": 2, "length": 0, "spread": 2}
    assert keep([float("nan")] * 2, [0, 0], lengths=torch.tensor([1, 2])) == ([0, 0], {"failed": 2, "length": 0, "spread": 0})


# ------------------------------------------------------------------------- the flow: last steps of sampling
class ToyWorld(ToyGenerator):
    """Audio is the latent laid flat and bent, with a gradient."""

    def decode_with_gradient(self, latents, *, iterations):
        return torch.tanh(latents.flatten(1))

    def decode(self, latents, *, iterations, normalised=True):
        return self.decode_with_gradient(latents, iterations=iterations)


class ToyReward:
    """Best where the audio's mean is 0.3."""

    def __call__(self, audio, sample_rate, prompts, metadata=None):
        assert [record["prompt_text"] for record in metadata] == prompts and not audio.requires_grad
        scores = self.differentiable(audio, sample_rate, prompts)
        return RewardResult(scores, {"power": audio.square().mean(1)})

    def differentiable(self, audio, sample_rate, prompts):
        assert sample_rate == 8 and len(prompts) == len(audio)
        return 1 - (audio.mean(1) - 0.3).square()


PLAIN = {"num_steps": 4, "last_steps": 2, "prompts_per_step": 4, "precision": "float32", "slope_limit": 0.0}
CONFIG = DiffROConfig(steps=3, learning_rate=1e-3, guidance_scales=(1.0, 2.0), beta=0.1, ema=0.5, **PLAIN)


def objective(world, network, config, noise, cond, scale, reference):
    """-mean reward + beta * mean KL by other means: every step by hand, no pieces, nothing detached but where a KL says so."""
    x, kl, times = noise, [], [1 - k / config.num_steps for k in range(config.num_steps + 1)]
    for k in range(config.num_steps):
        def velocity(net, at, k=k):
            t = torch.full((len(at),), times[k], dtype=at.dtype)
            v = net(at, cond.text_f, cond.text_f_c, t)
            if scale <= 1:
                return v
            empty = net.empty_condition(len(at))
            return scale * v + (1 - scale) * net(at, empty.text_f, empty.text_f_c, t)

        if k >= config.num_steps - config.last_steps:
            kl.append((velocity(network, x.detach()) - velocity(reference, x.detach()).detach()).square().mean())
        x = x - velocity(network, x) / config.num_steps
        if k < config.num_steps - config.last_steps:
            x = x.detach()
    scores = ToyReward().differentiable(world.decode_with_gradient(x, iterations=1), 8, [""] * len(x))
    return -scores.mean() + config.beta * torch.stack(kl).mean()


@pytest.mark.parametrize("last", [1, 3, 4])
@pytest.mark.parametrize("pieces", [{}, {"micro_batch": 3, "sample_batch": 2}], ids=["whole", "pieces"])
def test_the_gradient_is_that_of_the_whole_chain(last, pieces, monkeypatch):
    config, world, found = dataclasses.replace(CONFIG, last_steps=last, **pieces), ToyWorld(), {}
    reference = copy.deepcopy(world.network)
    with torch.no_grad():
        reference.final_layer.conv.weight.add_(0.05)

    def note(network, *_):
        found.update({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
        return 0.0

    monkeypatch.setattr(diffro, "optimizer_step", note)
    draws = [torch.Generator().manual_seed(9) for _ in range(2)]
    diffro.update(world, world.network, None, reference, ToyReward(), RECORDS[:4], config, 1, draws[0])
    noise = torch.randn(4, *world.latent_shape, generator=draws[1])
    cond = world.encode_prompts([record["prompt_text"] for record in RECORDS[:4]])
    loss = objective(world, world.network, config, noise, cond, 2.0, reference)
    named = {name: p for name, p in world.network.named_parameters() if p.requires_grad}
    whole = dict(zip(named, torch.autograd.grad(loss, named.values(), allow_unused=True), strict=True))
    assert found.keys() == {name for name, gradient in whole.items() if gradient is not None}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, whole[name], rtol=2e-4, atol=2e-6)


def test_weights_cast_for_the_steps_without_a_gradient_still_get_one(monkeypatch):
    world, missing = ToyWorld(), []

    def look(network, *_):
        missing.extend(p for p in network.parameters() if p.requires_grad and p.grad is None)

    monkeypatch.setattr(diffro, "optimizer_step", look)
    config = dataclasses.replace(CONFIG, precision="bf16", beta=0.0)
    diffro.update(world, world.network, None, None, ToyReward(), RECORDS[:4], config, 1, torch.Generator().manual_seed(0))
    assert not missing


def test_all_steps_agree_with_finite_differences_in_the_weights():
    world = ToyWorld()
    network, cond = world.network, world.encode_prompts(["rain", "dog"])
    noise = torch.randn(2, *world.latent_shape, generator=torch.Generator().manual_seed(3))
    weight = network.final_layer.conv.weight

    def reward():
        x0, _ = diffro.sample_last(network, noise, cond, steps=4, last=4, guidance_scale=2.0)
        return diffro.reward_slope(world, ToyReward(), x0, RECORDS[:2], iterations=1), x0

    (slope, audio, told), x0 = reward()
    exact = torch.autograd.grad((slope * x0).sum(), weight)[0]
    ode = samplers.ode_sample(network, noise, cond, steps=4, guidance_scale=2.0)
    torch.testing.assert_close(x0, ode, rtol=0, atol=0)
    torch.testing.assert_close(audio, torch.tanh(ode).flatten(1))
    torch.testing.assert_close(told.scores, ToyReward().differentiable(audio, 8, ["", ""]))
    draw, step = torch.Generator().manual_seed(4), 1e-3
    for _ in range(3):
        direction, sides = torch.randn(weight.shape, generator=draw), []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * step * direction)
            sides.append(reward()[0][2].scores.sum().item())
            with torch.no_grad():
                weight.sub_(sign * step * direction)
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx((exact * direction).sum().item(), rel=0.03, abs=3e-4)


def test_earlier_steps_carry_no_gradient_and_a_wrong_number_is_an_error():
    world = ToyWorld()
    cond, noise = world.encode_prompts(["rain"]), torch.ones(1, *world.latent_shape)
    runs = {k: diffro.sample_last(world.network, noise, cond, steps=4, last=k, guidance_scale=1.0)[0] for k in (1, 4)}
    assert torch.equal(runs[1], runs[4])
    weight = world.network.final_layer.conv.weight
    gradients = [torch.autograd.grad(x0.sum(), weight)[0] for x0 in runs.values()]
    assert not torch.allclose(*gradients)
    with pytest.raises(ValueError, match="last_steps=5: allowed are 1 to the 4 steps"):
        diffro.sample_last(world.network, noise, cond, steps=4, last=5, guidance_scale=1.0)
    with pytest.raises(ValueError, match="last_steps=5: the sampler takes 4 steps"):
        dataclasses.replace(CONFIG, last_steps=5)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters() if p.requires_grad])


def test_the_reward_rises_in_a_few_rounds_and_the_kl_holds_it_back():
    rises, kl = {}, {}
    for beta in (1e-9, 10.0):
        config = dataclasses.replace(CONFIG, steps=12, learning_rate=1e-3, ema=0.0, beta=beta, guidance_scales=(1.0,))
        history = diffro.train(ToyWorld(), ToyReward(), RECORDS, config, seed=0)
        assert all(math.isfinite(value) for row in history for value in row.values())
        rises[beta], kl[beta] = history[-1]["reward_mean"] - history[0]["reward_mean"], history[-1]["kl"]
        assert history[0]["kl"] == 0
    assert rises[1e-9] > 0.02 and kl[10.0] < 0.5 * kl[1e-9], (rises, kl)


def test_a_seed_repeats_and_a_resumed_run_ends_alike(tmp_path):
    results = []
    for seed in (3, 3, 4):
        world = ToyWorld()
        diffro.train(world, ToyReward(), RECORDS, CONFIG, seed=seed)
        results.append(weights(world.network))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    for steps in (1, 3):
        part = ToyWorld()
        config = dataclasses.replace(CONFIG, steps=steps)
        history = diffro.train(part, ToyReward(), RECORDS, config, seed=3, checkpoint=tmp_path / "state.pt")
    assert len(history) == 3 and torch.equal(weights(part.network), results[0])


def test_adapters_and_attention_learn_like_elsewhere():
    for trained in ("lora", "attention"):
        world = ToyWorld()
        before = {name: p.clone() for name, p in world.network.named_parameters()}
        config = dataclasses.replace(CONFIG, trained=trained, lora_rank=2, checkpointing=True)
        diffro.train(world, ToyReward(), RECORDS, config, seed=0)
        moved = {name for name, p in world.network.named_parameters() if not torch.equal(p, before[name])}
        assert moved and (trained == "lora") == (world.network.adapter is not None)
        assert "audio_input_proj.0.weight" not in moved


def test_the_watch_hears_the_clips_of_the_round():
    heard = []

    def watch(rollouts):
        heard.append(rollouts)
        return {"heard": len(rollouts.audio)}

    config = dataclasses.replace(CONFIG, steps=3, watch_every=1, micro_batch=3)
    history = diffro.train(ToyWorld(), ToyReward(), RECORDS, config, seed=0, watch=watch)
    assert [row.get("heard") for row in history] == [4, None, 4]  # at the first guidance alone
    one = heard[0]
    assert one.groups == 4 and one.audio.shape == (4, 30) and one.metadata[0]["prompt_text"] == one.prompts[0]
    told = ToyReward().differentiable(one.audio, 8, one.prompts)
    torch.testing.assert_close(one.rewards, told)
    torch.testing.assert_close(one.audio, torch.tanh(one.latents.flatten(1)))
    assert history[0]["reward_mean"] == pytest.approx(told.mean().item())
    assert history[0]["part_power"] == pytest.approx(one.audio.square().mean().item()) and "zero_groups" not in history[0]


def test_steep_clips_are_held_to_a_multiple_of_the_median():
    world, latents = ToyWorld(), torch.arange(-3.0, 3.0)[:, None, None] * torch.ones(1, 5, 6) / 4
    free, held = (
        diffro.reward_slope(world, ToyReward(), latents, RECORDS, iterations=1, limit=limit)[0] for limit in (0.0, 1.2)
    )
    norms = free.flatten(1).norm(dim=1)
    most = 1.2 * norms.median()
    assert 0 < int((norms > most).sum()) < 6
    torch.testing.assert_close(held.flatten(1).norm(dim=1), norms.clamp(max=most))
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(held.flatten(1), free.flatten(1)), torch.ones(6))


# ------------------------------------------------------------------------------- rewards and codecs with a gradient
def check_slopes(reward, audio, rate, *, step, rel, climbed=torch.exp):
    """`climbed` makes the call's scores of what is climbed, and halfway to a random direction that rises as its gradient says."""
    prompts, leaf = ["A dog barks", "Rain falls"], audio.clone().requires_grad_(True)
    scores = reward.differentiable(leaf, rate, prompts)
    torch.testing.assert_close(climbed(scores.detach()), reward(audio, rate, prompts).scores, rtol=1e-4, atol=1e-5)
    gradient = torch.autograd.grad(scores.sum(), leaf)[0]
    other = torch.randn(audio.shape, generator=torch.Generator().manual_seed(1))
    direction = sum(one / one.norm(dim=1, keepdim=True) for one in (gradient, other))
    told = (gradient * direction).sum(1).tolist()
    with torch.no_grad():
        up, down = (reward.differentiable(audio + sign * step * direction, rate, prompts).double() for sign in (1, -1))
    around = ((up - down) / (2 * step)).tolist()
    assert told == pytest.approx(around, rel=rel)


def noise_clips(samples):
    return 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(0))


def test_the_small_rewards_and_their_sum_have_their_gradient(clap, lalm):  # noqa: F811
    audio = noise_clips(64_000)
    rewards = {spec: load_reward(spec, clap=clap, lalm=lalm) for spec in ("clap", "lalm", "0.5*lalm+2*clap")}
    check_slopes(rewards["clap"], audio, 16_000, step=0.03, rel=0.02, climbed=lambda cosines: cosines)
    check_slopes(rewards["lalm"], audio, 16_000, step=0.03, rel=0.02)
    one, other, both = (reward.differentiable(audio, 16_000, ["Rain", "A dog"]) for reward in rewards.values())
    torch.testing.assert_close(both, 0.5 * other + 2 * one)
    parameter = next(clap.model.audio_tower.parameters())
    assert parameter.grad is None  # the reward itself learns nothing


@pytest.mark.parametrize(
    ("kind", "step"),
    [("qwen2_5_omni", 0.03), ("qwen3_omni_moe", 1e-3), ("qwen2_audio", 0.03)],  # experts are chosen anew after larger steps
)
def test_judges_of_transformers_have_their_gradient(kind, step, tmp_path):
    judge = load_judge(miniature_lalm.write(tmp_path / kind, kind), dtype="float32", device="cpu")
    check_slopes(judge, noise_clips(16_000), 16_000, step=step, rel=0.02)


def test_laion_clap_has_its_gradient(tmp_path):
    checkpoint, roberta, _ = make_miniature(tmp_path)
    reward = LaionClapReward.load(checkpoint, roberta, device="cpu")
    check_slopes(reward, noise_clips(480_000), 48_000, step=0.1, rel=0.05, climbed=lambda cosines: cosines)


def test_a_reward_without_a_gradient_is_one_clear_line(clap):  # noqa: F811
    for spec in ("test_rewards:loud", "clap+test_rewards:loud"):
        reward = load_reward(spec, clap=clap)
        with pytest.raises(ValueError, match="reward 'test_rewards:loud' has no gradient: DiffRO needs clap, lalm or a") as caught:
            reward.differentiable(noise_clips(64_000), 16_000, ["a", "b"])
        assert "\n" not in str(caught.value)


def test_the_mel_codec_gives_the_waveform_of_decode_and_a_gradient_of_its_neighbourhood():
    codec, draw = MelCodec(seconds=1.0, latent_dim=16), torch.Generator().manual_seed(2)
    times = torch.arange(16_000) / 16_000
    tones = torch.sin(2 * torch.pi * times * torch.randint(200, 4000, (24, 1), generator=draw)) * torch.rand(24, 1, generator=draw)
    sounds = tones * (times > torch.rand(24, 1, generator=draw)) + 0.02 * torch.randn(24, 16_000, generator=draw)
    codec.fit([sounds])
    latents = codec.encode(sounds[:3]).requires_grad_(True)
    audio = codec.decode_with_gradient(latents, iterations=2)
    torch.testing.assert_close(audio, codec.decode(latents, iterations=2), rtol=0, atol=1e-6)
    target, deviation = codec.mel(sounds[3:6]), latents.detach().std()

    def reward(sound):  # how far the clips are from others, heard as a reward hears
        return -(codec.mel(sound) - target).square().mean((1, 2))

    gradient = torch.autograd.grad(reward(audio).sum(), latents)[0]
    directions = deviation * torch.randn(32, *latents.shape, generator=draw)
    told = torch.einsum("dntc,ntc->dn", directions, gradient)
    with torch.no_grad():
        sides = [[reward(codec.decode(latents + step * d, iterations=2)) for d in directions] for step in (0.02, -0.02)]
    cosine = torch.nn.functional.cosine_similarity(told, (torch.stack(sides[0]) - torch.stack(sides[1])) / 0.04, dim=0)
    assert cosine.mean() > 0.9


def test_the_published_codec_has_its_exact_gradient():
    whole = VaeCodec("44k", seconds=0.1, embed_dim=4, hidden_dim=16, vocoder=miniature.VOCODER)
    miniature.noise(whole, 1)
    whole.vae.remove_weight_norm()
    draw = torch.Generator().manual_seed(4)
    latents = torch.randn(2, whole.latent_len, 4, generator=draw)
    weight = torch.randn(2, whole.samples, generator=draw)
    leaf = latents.clone().requires_grad_(True)
    audio = whole.decode_with_gradient(leaf)
    assert torch.equal(audio.detach(), whole.decode(latents))
    gradient = torch.autograd.grad((audio * weight).sum(), leaf)[0]
    direction = torch.randn(latents.shape, generator=draw)
    up, down = ((whole.decode(latents + sign * 3e-3 * direction).double() * weight).sum() for sign in (1, -1))
    assert ((up - down) / 6e-3).item() == pytest.approx((gradient * direction).sum().item(), rel=0.02)
