"""PPO on denoising: estimates by hand, the exact gradient of an enumerated chain, the critic, early stop, resume, a toy run."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from test_algorithms import RECORDS, ToyGenerator, tied_reward, toy_reward, weights
from torch import nn
from torch.distributions import Normal, kl_divergence

from resonate_lib import online, ppo
from resonate_lib.config import PPOConfig, derived
from resonate_lib.diffusion import Diffusion
from resonate_lib.models.flux_audio import Condition, ProjectedText

PPO = PPOConfig(
    steps=2, prompts_per_step=3, group_size=4, num_steps=4, learning_rate=1e-3, guidance_scales=(2.0,), ema=0.5, clip_range=0.01,
    target_kl=0.0, critic_epochs=2, decode_iterations=1, precision="float32",
)  # fmt: skip
PROMPT = dataclasses.replace(PPO, advantage="prompt")


class Toy(ToyGenerator):
    diffusion = Diffusion()


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def collect(world, config=PPO, *, records=RECORDS[:3], reward=toy_reward):
    return online.collect(
        world, world.network, reward, records, group_size=config.group_size, steps=config.num_steps, seed=0,
        guidance_scale=config.guidance_scales[0], decode_iterations=1, precision="float32",
        sde={"eta": config.eta, "kind": config.kind},
    )  # fmt: skip


def moved(world, by=0.02):
    """The world's network after a step anywhere."""
    draws = random(7)
    for p in world.network.parameters():
        if p.requires_grad:
            p.data += by * torch.randn(p.shape, generator=draws)


# ------------------------------------------------------------------------------------------ estimates
def test_gae_by_hand():
    """d = (0.9*0.4 - 0.5, 0.9*0.8 - 0.4, 1 - 0.8) = (-0.14, 0.32, 0.2), each after counts 0.45."""
    got = ppo.gae(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.4, 0.8, 0.0]), gamma=0.9, lam=0.5)
    torch.testing.assert_close(got, torch.tensor([-0.14 + 0.45 * (0.32 + 0.45 * 0.2), 0.32 + 0.45 * 0.2, 0.2]))


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 1.0), (0.95, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    rewards, values = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    want = torch.zeros_like(rewards)
    for j in range(6):
        for k in range(j, 6):
            want[..., j] += (gamma * lam) ** (k - j) * (rewards[..., k] + gamma * values[..., k + 1] - values[..., k])
    torch.testing.assert_close(ppo.gae(rewards, values, gamma=gamma, lam=lam), want)
    if lam == 1:
        to_come = rewards.flip(-1).cumsum(-1).flip(-1) + values[..., -1:]
        torch.testing.assert_close(want, to_come - values[..., :-1])
    with pytest.raises(ValueError, match=r"rewards \(2, 3, 6\), values \(2, 3, 6\)"):
        ppo.gae(rewards, values[..., :-1], gamma=gamma, lam=lam)


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert ppo.explained_variance(returns + 3, returns) == pytest.approx(1)
    assert ppo.explained_variance(torch.full((4,), 0.3), returns) == pytest.approx(0, abs=1e-6)
    assert ppo.explained_variance(-returns, returns) == pytest.approx(-3)
    assert ppo.explained_variance(returns, torch.ones(4)) == 0


def test_the_first_round_of_a_critic_is_the_normalised_reward():
    """Its values are 0, so all there is to estimate from is the reward at the end: lam^(steps left) of it."""
    world, config = Toy(), dataclasses.replace(PPO, lam=0.5)
    rollouts = collect(world)
    critic = ppo.make_critic(world, RECORDS, seed=0)
    advantages, returns, known = ppo.critic_advantages(critic, rollouts, config)
    reward = (rollouts.rewards - rollouts.rewards.mean()) / (rollouts.rewards.std(correction=0) + 1e-4)
    want = reward[:, None] * 0.5 ** torch.arange(3, -1, -1)
    torch.testing.assert_close(returns, want, rtol=1e-4, atol=1e-5)
    trained = want[:, :3]  # the last step is certain
    torch.testing.assert_close(advantages, (want - trained.mean()) / (trained.std(correction=0) + 1e-4), rtol=1e-4, atol=1e-5)
    assert known == pytest.approx(0, abs=1e-6)


def test_advantages_within_a_prompt():
    world = Toy()
    rollouts = collect(world)
    got = ppo.prompt_advantages(rollouts)
    assert got.shape == (12, 4) and torch.equal(got[:, 0], got[:, 3])
    groups = rollouts.rewards.double().view(3, 4)
    want = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-4)
    torch.testing.assert_close(got[:, 1], want.flatten())


# ------------------------------------------------------------------------- the gradient of a toy chain
class Affine(nn.Module):
    """Predicts offset + slope * x, others at every time of the grid."""

    def __init__(self, times):
        super().__init__()
        self.register_buffer("times", times)
        self.register_buffer("latent_mean", torch.zeros(1, 1, 1))
        self.weight = nn.Parameter(torch.tensor([[0.3, -0.4], [-0.2, 0.5], [0.1, 0.2]]))

    def project_text(self, cond):
        return ProjectedText(*cond)

    def velocity(self, x, text, t):
        offset, slope = self.weight[(self.times - t[0]).abs().argmin()]
        return offset + slope * x


def expected_reward(weight, alpha_bars, prediction):
    """E[-(x_S - 0.7)^2], in closed form: the chain is linear and Gaussian, so its mean and variance say all."""
    mean, variance = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for j, (ab, ab_next) in enumerate(zip(alpha_bars[:-1], alpha_bars[1:], strict=True)):
        noise = (1 - ab_next) / (1 - ab) * (1 - ab / ab_next)
        signal, rest = ab.sqrt(), (1 - ab).sqrt()
        if prediction == "v":  # x0 and epsilon as (what x is multiplied with, what is predicted is multiplied with)
            x0, eps = (signal, -rest), (rest, signal)
        else:
            x0, eps = (1 / signal, -rest / signal), (0.0, 1.0)
        of_x, of_output = (ab_next.sqrt() * a + (1 - ab_next - noise).sqrt() * b for a, b in zip(x0, eps, strict=True))
        scale = of_x + of_output * weight[j, 1]
        mean, variance = scale * mean + of_output * weight[j, 0], scale**2 * variance + noise
    return -((mean - 0.7) ** 2 + variance)


@pytest.mark.parametrize("prediction", ["v", "epsilon"])
@pytest.mark.parametrize("advantage", ["reward", "any critic", "true values"])
def test_the_gradient_of_a_two_step_chain_is_exact(prediction, advantage):
    """Noise of -1 or 1 has the first three moments of a Gaussian, and nothing here is of a higher degree in any noise: the mean
    over all eight chains is the exact expectation. The third step is certain and not trained."""
    diffusion = Diffusion(prediction=prediction, schedule="linear", beta_end=0.005)
    network = Affine(diffusion.grid(3).times)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).view(8, 3, 1, 1)
    cond = Condition(torch.zeros(8, 1, 2), torch.randn(1, 4, generator=random()).expand(8, -1))
    noises = torch.cat([signs[:, 1:], torch.zeros(8, 1, 1, 1)], 1)
    chain = diffusion.rollout(network, signs[:, 0], cond, steps=3, guidance_scale=1.0, noises=noises, eta=1.0)
    assert chain.stochastic == [0, 1]
    rollouts = SimpleNamespace(trajectory=chain, cond=cond, guidance_scale=1.0)
    final = -((chain.final[:, 0, 0] - 0.7) ** 2)
    rewards = torch.stack([torch.zeros(8), torch.zeros(8), final], 1)
    if advantage == "reward":
        advantages = final[:, None].expand(-1, 3)
    elif advantage == "any critic":
        torch.manual_seed(3)
        critic = ppo.Critic(1, 4)
        nn.init.normal_(critic.head[2].weight, std=3.0)
        advantages = ppo.gae(rewards, ppo.state_values(critic, rollouts, torch.arange(8)), gamma=1.0, lam=1.0).detach()
    else:  # what is expected of a state is the mean over what may follow
        known = final.view(2, 2, 2)
        values = [known.mean((1, 2), keepdim=True), known.mean(2, keepdim=True), known, torch.zeros(1, 1, 1)]
        values = torch.stack([value.expand(2, 2, 2).flatten() for value in values], 1)
        advantages = ppo.gae(rewards, values, gamma=1.0, lam=0.3)
    config = dataclasses.replace(PPO, beta=0.0, clip_range=1e-4, adv_clip=1e6)
    for j in chain.stochastic:
        loss, row = ppo._step_loss(network, None, rollouts, advantages, torch.arange(8), j, config)
        assert row["ratio_deviation"] == 0
        loss.backward()
    weight = network.weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(expected_reward(weight, chain.alpha_bars.double(), prediction), weight)
    torch.testing.assert_close(-network.weight.grad[:2].double(), exact[:2], rtol=1e-3, atol=1e-4)
    assert exact[:2].abs().min() > 0.02 and not network.weight.grad[2].any()


# -------------------------------------------------------------------------------- ratio, KL, entropy
@pytest.mark.parametrize(("kind", "scale"), [("ddim", 2.0), ("ddim", 1.0), ("ancestral", 1.0)])
def test_before_the_first_update_both_policies_are_one(kind, scale):
    world = Toy()
    config = dataclasses.replace(PPO, kind=kind, guidance_scales=(scale,))
    rollouts = collect(world, config)
    for j in (0, 1, 2):
        _, row = ppo._step_loss(world.network, world.network, rollouts, torch.ones(12, 4), torch.arange(12), j, config)
        assert row["ratio_deviation"] == row["kl"] == row["clip_fraction"] == 0 and row["kl_old"] < 1e-10
        assert row["ratio_mean"] == 1


def test_divergences_and_ratio_are_those_of_the_normal_distribution():
    world = Toy()
    start = online.frozen_copy(world.network)
    moved(world)
    rollouts, sampler = collect(world), online.frozen_copy(world.network)
    moved(world)
    rows, advantages = torch.arange(12), torch.linspace(-1, 1, 12)[:, None].expand(-1, 4)
    config = dataclasses.replace(PPO, beta=0.5, clip_range=1e-3)
    for j in (0, 2):
        loss, row = ppo._step_loss(world.network, start, rollouts, advantages, rows, j, config)
        ab, ab_next = rollouts.trajectory.alpha_bars[j : j + 2].double()
        std = ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)).sqrt().float()
        new, old, base = (
            Normal(ppo.diffusion.score_step(net, rollouts.trajectory, rows, j, rollouts.cond, 2.0).mean.detach(), std)
            for net in (world.network, sampler, start)
        )
        assert row["kl"] == pytest.approx(kl_divergence(new, base).mean().item(), rel=1e-3)
        assert row["kl_old"] == pytest.approx(kl_divergence(old, new).mean().item(), rel=1e-3) and row["kl_old"] > 1e-5
        x_next = rollouts.trajectory.latents[:, j + 1]
        ratio = torch.exp((new.log_prob(x_next) - old.log_prob(x_next)).mean((1, 2)))
        assert row["ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-4)
        assert row["ratio_deviation"] == pytest.approx((ratio - 1).abs().max().item(), rel=1e-2)
        assert row["clip_fraction"] == pytest.approx(((ratio - 1).abs() > 1e-3).float().mean().item())
        surrogate = -torch.minimum(advantages[:, 0] * ratio, advantages[:, 0] * ratio.clamp(1 - 1e-3, 1 + 1e-3)).mean()
        assert loss.item() == pytest.approx((surrogate + 0.5 * kl_divergence(new, base).mean()).item(), rel=1e-3)


def test_entropy_is_that_of_the_schedule():
    rollouts = collect(Toy())
    bars = rollouts.trajectory.alpha_bars.double()
    std = ((1 - bars[1:]) / (1 - bars[:-1]) * (1 - bars[:-1] / bars[1:])).sqrt()
    got = ppo.entropy(rollouts.trajectory, [0, 1, 2])
    assert got == pytest.approx(Normal(0.0, std[:3].float()).entropy().mean().item(), abs=1e-5)


def test_clips_in_parts_have_the_same_gradient():
    world, gradients = Toy(), []
    rollouts = collect(world)
    advantages = ppo.prompt_advantages(rollouts)
    moved(world, 1e-3)
    for micro_batch in (0, 5):
        world.network.zero_grad()
        config = dataclasses.replace(PPO, micro_batch=micro_batch)
        start = online.frozen_copy(world.network)
        row = ppo._backward(world.network, start, rollouts, advantages, torch.arange(12), [0, 1, 2], config)
        gradients.append(torch.cat([p.grad.flatten() for p in world.network.parameters() if p.grad is not None]))
        assert row["ratio_deviation"] > 0 and math.isfinite(row["loss"])
    assert ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item() < 1e-3


# -------------------------------------------------------------------------------------------- updates
def test_passes_end_where_the_policy_has_gone_too_far():
    done = {}
    for target in (0.0, 1e-7, 1e3):
        world = Toy()
        rollouts = collect(world)
        config = dataclasses.replace(PPO, epochs=3, minibatches=2, target_kl=target, learning_rate=1e-2)
        optimizer = online.make_optimizer(world.network, config.learning_rate)
        row = ppo.update(world.network, optimizer, None, rollouts, ppo.prompt_advantages(rollouts), config, random())
        done[target] = row["epochs_done"]
        assert all(p.grad is None for p in world.network.parameters())
        steps = next(iter(optimizer.state.values()))["step"].item()
        assert steps == 2 * row["epochs_done"]
        assert row["first_ratio_deviation"] < 1e-6 < row["kl_old"]
    assert done == {0.0: 3.0, 1e-7: 0.5, 1e3: 3.0}


@pytest.mark.parametrize("config", [PPO, PROMPT], ids=["gae", "prompt"])
def test_an_update_makes_good_actions_likelier(config):
    world = Toy()
    rollouts = collect(world)
    advantages = ppo.prompt_advantages(rollouts)
    if config.advantage == "gae":
        advantages, _, _ = ppo.critic_advantages(ppo.make_critic(world, RECORDS, 0), rollouts, config)
    config = dataclasses.replace(config, learning_rate=1e-4, minibatches=1, epochs=1, clip_range=0.9)
    optimizer = online.make_optimizer(world.network, config.learning_rate)
    ppo.update(world.network, optimizer, None, rollouts, advantages, config, random())
    gain = 0.0
    for j in (0, 1, 2):
        with torch.no_grad():
            new = ppo.diffusion.score_step(world.network, rollouts.trajectory, torch.arange(12), j, rollouts.cond, 2.0)
        gain += (advantages[:, j] * (new.log_prob - rollouts.trajectory.log_probs[:, j])).mean().item()
    assert gain > 0


# --------------------------------------------------------------------------------------------- critic
def test_rewards_are_normalised_by_all_that_were_heard():
    critic, rewards = ppo.Critic(6, 12), 5 + 3 * torch.randn(40, generator=random())
    for part in rewards.split([1, 9, 30]):
        critic.observe(part)
    torch.testing.assert_close(critic.heard[1].float(), rewards.mean())
    want = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
    torch.testing.assert_close(critic.normalised(rewards), want, rtol=1e-4, atol=1e-5)
    other = ppo.Critic(6, 12)
    other.load_state_dict(critic.state_dict())
    assert torch.equal(other.normalised(rewards), critic.normalised(rewards))


def states(count, seed):
    """Random states and what they are worth: a word of the text, and what is heard of the latent once the noise is gone."""
    draws = random(seed)
    latents, text = torch.randn(count, 5, 5, 6, generator=draws), torch.randn(count, 64, generator=draws)
    times = torch.linspace(0.8, 0.0, 5)
    worth = text[:, :1] + 2 * (1 - times[:4] / times[0]) * latents[:, :4, :, 0].mean(2)
    chain = SimpleNamespace(latents=latents, times=times)
    return SimpleNamespace(trajectory=chain, cond=SimpleNamespace(text_f_c=text)), worth


def test_a_critic_learns_values():
    torch.manual_seed(0)
    critic = ppo.Critic(6, 64)
    optimizer = online.make_optimizer(critic, 3e-3)
    rollouts, worth = states(2048, seed=1)
    config = dataclasses.replace(PPO, critic_epochs=15, minibatches=8)
    first = ppo.fit_values(critic, optimizer, rollouts, worth, dataclasses.replace(config, critic_epochs=1), random())
    last = ppo.fit_values(critic, optimizer, rollouts, worth, config, random())
    fresh, worth = states(256, seed=2)
    with torch.no_grad():
        values = ppo.state_values(critic, fresh, torch.arange(256))
    assert not values[:, -1].any() and last < first
    assert ppo.explained_variance(values[:, :-1], worth) > 0.9


def test_a_critic_of_other_frames_and_texts():
    critic = ppo.Critic(6, 12)
    nn.init.normal_(critic.head[2].weight)
    x, text = torch.randn(3, 31, 6), torch.randn(3, 12)
    value = critic(x, torch.rand(3), text)
    assert value.shape == (3,) and critic(x[:, :4], torch.rand(3), text).shape == (3,)
    torch.testing.assert_close(critic(x, torch.ones(3), 100 * text), critic(x, torch.ones(3), text))  # encoders differ in scale


# ---------------------------------------------------------------------------------------------- train
def test_train_changes_the_network_and_repeats_with_its_seed():
    results, seen, heard = [], [], []
    for seed in (0, 0, 1):
        world = Toy()
        before = weights(world.network)
        history = ppo.train(
            world, toy_reward, RECORDS, dataclasses.replace(PPO, watch_every=1), seed=seed,
            callback=lambda i, m: seen.append(i), watch=lambda rollouts: heard.append(rollouts) or {"watched": 1.0},
        )  # fmt: skip
        assert len(history) == 2 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in history)
        assert all(row["first_ratio_deviation"] < 1e-6 and row["watched"] == 1 for row in history)
        assert history[0]["explained_variance"] == pytest.approx(0, abs=1e-6) and history[0]["epochs_done"] == 2
        results.append(weights(world.network))
        assert not torch.equal(results[-1], before)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert seen == [0, 1] * 3 and len(heard) == 6


CASES = {
    "gae": PPO,
    "prompt": PROMPT,
    "attention": dataclasses.replace(PPO, trained="attention", guidance_scales=(1.0, 2.0), beta=0.0),
    "lora": dataclasses.replace(PPO, trained="lora", lora_rank=2, target_kl=1e-3),
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_ends_like_an_uninterrupted_one(name, tmp_path):
    config, whole = CASES[name], Toy()
    history = ppo.train(whole, toy_reward, RECORDS, config, seed=3, checkpoint=tmp_path / "whole.pt")
    for steps in (1, 2):
        part, state = Toy(), tmp_path / "part.pt"
        resumed = ppo.train(part, toy_reward, RECORDS, dataclasses.replace(config, steps=steps), seed=3, checkpoint=state)
    assert resumed == history and torch.equal(weights(part.network), weights(whole.network))
    states = [torch.load(tmp_path / f"{kind}.pt", weights_only=True)["modules"] for kind in ("whole", "part")]
    assert states[0].keys() == states[1].keys()
    assert ("critic" in states[0]) == ("critic_optimizer" in states[0]) == (config.advantage == "gae")
    for name, stored in states[0].items():  # of an optimizer: what it remembers of each weight
        torch.testing.assert_close(states[1][name].get("state", states[1][name]), stored.get("state", stored), rtol=0, atol=0,
                                   equal_nan=True)


@pytest.mark.parametrize("config", [PPO, PROMPT], ids=["gae", "prompt"])
def test_rounds_where_everything_ties_are_skipped(config):
    world = Toy()
    before = weights(world.network)
    history = ppo.train(world, tied_reward, RECORDS, config, seed=0)
    assert all(row["skipped"] == 1 and row["trained_clips"] == row["epochs_done"] == 0 for row in history)
    assert torch.equal(weights(world.network), before)
    learned = ppo.train(world, toy_reward, RECORDS, config, seed=0)
    assert set(history[0]) | {"part_power"} == set(learned[0])
    assert learned[0]["entropy"] == pytest.approx(history[0]["entropy"], abs=1e-5)
    assert ("value_loss" in learned[0]) == ("explained_variance" in learned[0]) == (config.advantage == "gae")


def test_only_what_is_to_be_trained_is():
    audio = ("audio_input_proj", "fused_blocks.0.ffn", "fused_blocks.0.linear1", "latent_block.ffn", "final_layer.conv")
    untouched = {"all": (), "attention": audio, "lora": (*audio[:2], *audio[3:], "adaLN", "_norm", "t_embed", "bias")}
    for trained, left in untouched.items():
        world = Toy()
        before = {name: p.detach().clone() for name, p in world.network.named_parameters() if p.requires_grad}
        ppo.train(world, toy_reward, RECORDS, dataclasses.replace(PPO, trained=trained, lora_rank=2), seed=0)
        after = {name: p for name, p in world.network.named_parameters() if p.requires_grad}
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert after.keys() == before.keys() and "fused_blocks.0.attn.qkv.weight" in changed
        assert not [name for name in changed if any(part in name for part in left)]
        assert trained != "all" or "final_layer.conv.weight" in changed


def test_a_critic_needs_no_groups():
    history = ppo.train(Toy(), toy_reward, RECORDS, dataclasses.replace(PPO, group_size=1, prompts_per_step=6), seed=0)
    assert all(row["skipped"] == 0 and row["trained_clips"] == 6 for row in history)


def test_a_flow_is_refused():
    world = Toy()
    world.diffusion = None
    with pytest.raises(ValueError, match="this generator is a flow"):
        ppo.train(world, toy_reward, RECORDS, PPO)


def quiet(audio, *_):
    """-mean(x0^2): the louder, the worse."""
    return SimpleNamespace(scores=-audio.square().mean(1), parts={})


@pytest.mark.parametrize("advantage", ["gae", "prompt"])
def test_training_raises_a_reward(advantage):
    config = dataclasses.replace(
        PPO, steps=10, group_size=12, advantage=advantage, guidance_scales=(1.0,), ema=0.0, beta=0.0, learning_rate=2e-3
    )
    rewards = [row["reward_mean"] for row in ppo.train(Toy(), quiet, RECORDS, config, seed=0)]
    assert sum(rewards[-3:]) > 0.6 * sum(rewards[:3])  # below 0: two fifths of the power are gone


def test_the_critic_of_a_training_learns_what_prompts_are_worth():
    def easy_and_hard(audio, rate, prompts, metadata):
        return SimpleNamespace(scores=torch.tensor([m["wanted"] for m in metadata]) + 0.02 * audio.mean(1), parts={})

    config = dataclasses.replace(PPO, steps=6, prompts_per_step=6, critic_epochs=10, critic_learning_rate=3e-3, epochs=1)
    history = ppo.train(Toy(), easy_and_hard, RECORDS, config, seed=0)
    assert history[-1]["explained_variance"] > 0.9 and history[-1]["value_loss"] < 0.1


# --------------------------------------------------------------------------------------------- config
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"advantage": "prompt", "group_size": 1}, "group_size=1: advantage=prompt compares clips"),
        ({"kind": "ancestral", "eta": 0.5}, "eta=0.5: ancestral"),
        ({"eta": 0.0}, "eta=0.0: use more than 0"),
        ({"advantage": "vae"}, "did you mean 'gae'"),
        ({"micro_batch": 1}, "micro_batch=1"),
        ({"timestep_fraction": 0.05}, "trains none of 10 steps"),
        ({"prompts_per_step": 1, "group_size": 2, "minibatches": 3}, "minibatches=3"),
        ({"lam": 1.1}, "lam=1.1: use 1 or less"),
        ({"trained": "convs"}, "trained='convs'"),
    ],
)
def test_bad_settings_are_one_line(values, words):
    with pytest.raises(ValueError, match=r".") as caught:
        PPOConfig(**values)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_derived_arithmetic():
    text = derived(PPOConfig(steps=5, prompts_per_step=4, group_size=6, minibatches=2, epochs=3))
    assert "5 x 2 x 3 epochs at most = 30" in text and "9 of 10" in text


@pytest.mark.parametrize("final_alpha_one", [True, False])
def test_the_last_step_of_a_chain_is_never_trained(final_alpha_one):
    """AudioLDM's schedule ends a little before the data, so its last step has a density, and is left out all the same."""
    process = Diffusion(schedule="scaled_linear", final_alpha_one=final_alpha_one)
    toy = ToyGenerator()
    cond, noise = toy.encode_prompts(["a"] * 2), torch.randn(2, *toy.latent_shape, generator=torch.Generator().manual_seed(0))
    chain = process.rollout(toy.network, noise, cond, steps=5, guidance_scale=1.0, generators=torch.Generator().manual_seed(1))
    assert chain.stochastic == list(range(4 if final_alpha_one else 5))
    config = PPOConfig(num_steps=5, timestep_fraction=1.0)
    assert ppo.trained_steps(chain, config) == [0, 1, 2, 3] == list(range(config.trainable_steps))
