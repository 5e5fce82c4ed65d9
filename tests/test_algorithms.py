"""Advantages, losses and gradients of GRPO, NFT and DPO against golden numbers; each train() on a toy world."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import recipe, relative
from test_flux_audio import awake, small, stored

from resonate_lib import dpo, flow, grpo, nft, online, samplers
from resonate_lib.config import DPOConfig, GRPOConfig, NFTConfig
from resonate_lib.models.flux_audio import Condition

RECORDS = [{"prompt_text": f"sound {i}", "wanted": i / 6} for i in range(6)]
PLAIN = {"decode_iterations": 1, "precision": "float32"}
GRPO = GRPOConfig(
    steps=2, prompts_per_step=3, group_size=4, num_steps=4, learning_rate=1e-3, guidance_scales=(2.0,), ema=0.5, **PLAIN
)
NFT = NFTConfig(steps=2, prompts_per_step=3, group_size=4, num_steps=4, learning_rate=1e-3, **PLAIN)
DPO = DPOConfig(steps=2, pairs=10, batch_size=4, num_steps=4, learning_rate=1e-3, **PLAIN)


class ToyGenerator:
    """Text is a constant per prompt; audio is the latent laid flat."""

    sample_rate, latent_shape, parts, diffusion = 8, (5, 6), {}, None

    def __init__(self):
        torch.manual_seed(1)
        self.network = awake(small(empty_string_feat=torch.randn(7, 10), empty_string_feat_c=torch.randn(12)))

    def encode_prompts(self, prompts):
        rows = torch.stack(
            [torch.randn(82, generator=torch.Generator().manual_seed(len(p) + ord(p[-1]))) for p in prompts]
        )
        return Condition(rows[:, :70].view(-1, 7, 10), rows[:, 70:])

    def decode(self, latents, *, iterations, normalised=True):
        self.decoded = normalised
        return latents.flatten(1)


def toy_reward(audio, sample_rate, prompts, metadata):
    assert sample_rate == 8 and len(prompts) == len(metadata) == len(audio)
    return SimpleNamespace(scores=audio.mean(1), parts={"power": audio.square().mean(1)})


def tied_reward(audio, *_):
    return SimpleNamespace(scores=torch.full((len(audio),), 0.1), parts={})


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters() if p.requires_grad])


# ---------------------------------------------------------------------------------------- advantages
@pytest.mark.parametrize("case", ["random", "zero_std_prompt0_half", "zero_std_prompt0_tenth", "all_equal"])
@pytest.mark.parametrize("scope", ["global", "group"])
def test_golden_advantages(golden, case, scope):
    d = golden("advantages")
    prompts = ["a dog", "a cat", "a dog", "rain", "a cat", "rain", "a dog", "a cat", "rain", "a dog", "a cat", "rain"]
    ids = torch.tensor([sorted(set(prompts)).index(p) for p in prompts])
    got = grpo.group_advantages(d[f"{case}.rewards"], ids, global_std=scope == "global")
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, d[f"{case}.adv.{scope}"][:, 0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("global_std", [True, False])
def test_equal_rewards_get_exactly_zero(global_std):
    adv = grpo.group_advantages(
        torch.tensor([0.1] * 3 + [0.2, 0.4]), torch.tensor([0, 0, 0, 1, 1]), global_std=global_std
    )
    assert adv[:3].eq(0).all() and adv[3] < 0 < adv[4] and abs(adv.sum()) < 1e-6


def test_a_group_of_one_is_an_error():
    with pytest.raises(ValueError, match="group of one"):
        grpo.group_advantages(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]), global_std=True)


# -------------------------------------------------------------------------------------------- losses
def test_golden_grpo_losses(golden):
    d = golden("losses")
    loss, ratio = grpo.clipped_surrogate(
        d["log_prob"], d["old_log_prob"], d["advantages"], clip_range=1e-4, adv_clip=5.0
    )
    kl = grpo.kl_penalty(d["mean"], d["mean_ref"], d["std_dev_t"], dt=-0.1, kind="paper")
    torch.testing.assert_close(loss, d["policy_loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ratio, d["ratio"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kl, d["kl_loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss + 0.04 * kl, d["loss"], rtol=1e-4, atol=1e-6)


def test_kl_kinds_against_the_normal_distribution():
    mean, ref = torch.randn(2, 3, 4, 5).unbind(0)
    a, dt = 1.3, -0.1
    normal = [torch.distributions.Normal(m, a * math.sqrt(-dt)) for m in (mean, ref)]
    exact = grpo.kl_penalty(mean, ref, torch.tensor(a), dt=dt, kind="exact")
    torch.testing.assert_close(exact, torch.distributions.kl_divergence(*normal).mean())
    paper = grpo.kl_penalty(mean, ref, torch.tensor(a), dt=dt, kind="paper")
    torch.testing.assert_close(paper, exact * 0.1)
    with pytest.raises(ValueError, match="kl kind"):
        grpo.kl_penalty(mean, ref, torch.tensor(a), dt=dt, kind="none")


@pytest.mark.parametrize("beta", [100, 2000])
def test_golden_preference_losses(golden, beta):
    d = golden("losses")
    error, ref = (flow.velocity_error(d[f"dpo_{k}_pred"], d["dpo_target_v"]) for k in ("model", "ref"))
    torch.testing.assert_close(error, d["dpo_model_mse"])
    arguments = (error[:5], ref[:5], error[5:], ref[5:])
    out = dpo.flow_dpo_loss(*arguments, beta=float(beta))
    torch.testing.assert_close(out.loss, d[f"dpo{beta}.loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.inside, d[f"dpo{beta}.inside_term"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(out.accuracy, d[f"dpo{beta}.accuracy"])
    torch.testing.assert_close(
        dpo.crpo_loss(*arguments, beta=float(beta)).loss, d[f"crpo{beta}.loss"], rtol=1e-4, atol=1e-5
    )


def test_dpo_at_the_reference_is_ln_2():
    win, lose = torch.rand(2, 6).unbind(0)
    assert dpo.flow_dpo_loss(win, win, lose, lose, beta=100.0).loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("j", [0, 4, 8])
def test_golden_grpo_gradient(golden, j):
    network, _ = stored(golden, frames=12)
    reference = copy.deepcopy(network)
    for name, p in network.named_parameters():
        if p.requires_grad:
            p.data += 0.05 * p.abs().mean() * recipe(f"perturb/{name}", p.shape)
    path, d = golden("rollout"), golden("grpo_train_step")
    cond = Condition(path["text_f"], path["text_f_c"])
    trajectory = samplers.Trajectory(
        path["all_latents"].transpose(0, 1), path["log_probs"].T, path["noises"].transpose(0, 1), path["timesteps"],
        list(range(10)), 0.7, "sde",
    )  # fmt: skip
    rollouts = SimpleNamespace(trajectory=trajectory, cond=cond, advantages=d["advantages"], guidance_scale=4.5)
    config = dataclasses.replace(GRPO, beta=0.04, kl="paper", num_steps=10)
    step = grpo.Step.of(trajectory, torch.arange(3), j)
    new = grpo.score_step(network, step, cond, 4.5)
    assert relative(new.mean, d[f"step{j}.mean"]) < 1e-3
    torch.testing.assert_close(new.log_prob, d[f"step{j}.log_prob"], rtol=1e-3, atol=1e-4)
    ref = grpo.score_step(reference, step, cond, 4.5)
    torch.testing.assert_close(ref.log_prob, d[f"step{j}.ref_log_prob"], rtol=1e-3, atol=1e-4)
    loss, row = grpo._step_loss(network, reference, rollouts, torch.arange(3), j, config)
    loss.backward()
    torch.testing.assert_close(loss, d[f"step{j}.loss"], rtol=1e-3, atol=1e-4)
    assert row["kl"] == pytest.approx(d[f"step{j}.kl_loss"].item(), rel=1e-3)
    norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
    assert relative(norm, d[f"step{j}.grad_norm"]) < 1e-3
    for name in ("final_layer.conv.bias", "fused_blocks.0.attn.qkv.bias", "text_cond_proj.0.weight"):
        assert relative(network.get_parameter(name).grad, d[f"step{j}.grad.{name}"]) < 2e-3, name


# ------------------------------------------------------------------------------------------------ NFT
def nft_inputs():
    v_old, x0, noise = torch.randn(3, 4, 5, 6, dtype=torch.float64).unbind(0)
    t = torch.tensor([0.9, 0.5, 0.2, 0.7], dtype=torch.float64)
    return v_old, flow.interpolate(x0, noise, t), x0, t


def test_nft_gradient_at_the_old_policy_follows_2r_minus_1():
    v_old, x_t, x0, t = nft_inputs()
    r = torch.tensor([0.5, 1.0, 0.0, 0.75], dtype=torch.float64)
    v = v_old.clone().requires_grad_()
    nft.nft_loss(v, v_old, x_t, x0, t, r, b=0.5, adv_clip=5.0).backward()
    full = torch.autograd.grad(
        nft.nft_loss(v, v_old, x_t, x0, t, torch.ones(4, dtype=torch.float64), b=0.5, adv_clip=5.0), v
    )[0]
    torch.testing.assert_close(v.grad, full * (2 * r - 1).view(-1, 1, 1))
    assert v.grad[0].abs().max() < 1e-15


def test_nft_with_b_1_and_r_1_is_weighted_flow_matching():
    v_old, x_t, x0, t = nft_inputs()
    v = torch.randn_like(v_old)
    got = nft.nft_loss(v, v_old, x_t, x0, t, torch.ones(4, dtype=torch.float64), b=1.0, adv_clip=1.0)
    target = (x_t - x0) / t.view(-1, 1, 1)  # noise - x0
    want = (t**2 * (v - target).square().mean((1, 2))) / (t * (v - target).abs().mean((1, 2)))
    torch.testing.assert_close(got, want.mean())


def test_optimality_and_decay_schedules():
    adv = torch.tensor([-9.0, -5.0, 0.0, 2.5, 7.0])
    assert nft.optimality(adv, 5.0).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]
    assert [nft.old_policy_decay(s, "linear") for s in (0, 100, 900)] == [0.0, 0.1, 0.5]
    assert [nft.old_policy_decay(s, "late") for s in (0, 75, 1000)] == [0.0, 0.0, 0.999]
    assert nft.old_policy_decay(500, "none") == 0.0
    with pytest.raises(ValueError, match="decay"):
        nft.old_policy_decay(0, "fast")


def test_times_come_from_the_grid_without_repetition():
    noisy = nft.draw_times(50, 2, 10, torch.Generator().manual_seed(0), fraction=0.6)
    assert noisy.min() == pytest.approx(0.5) and noisy.max() == 1
    times = nft.draw_times(50, 3, 4, torch.Generator().manual_seed(0))
    assert times.shape == (3, 50) and set(times.flatten().tolist()) == {1.0, 0.75, 0.5, 0.25}
    assert all(len(set(column)) == 3 for column in times.T.tolist())
    with pytest.raises(ValueError, match="times_per_sample=5"):
        nft.draw_times(2, 5, 4, torch.Generator())


# ------------------------------------------------------------------------------------------- rollouts
def collect(world, records, seed=0, **changes):
    options = {"group_size": 3, "steps": 3, "guidance_scale": 2.0, "seed": seed, "decode_iterations": 1,
               "sde": {"noise_level": 0.7, "kind": "sde"}, "precision": "float32"} | changes  # fmt: skip
    return online.collect(world, world.network, toy_reward, records, **options)


def test_the_published_slips_are_options():
    """Its codec got normalised latents, and its last step got noise; neither by default."""
    for config, wanted in ((GRPO, True), (dataclasses.replace(GRPO, unnormalise=False, last_step_noise=True), False)):
        world = ToyGenerator()
        grpo.train(world, toy_reward, RECORDS, dataclasses.replace(config, steps=1))
        assert world.decoded == wanted
    for unnormalise in (True, False):
        world = ToyGenerator()
        dpo.make_pairs(world, world.network, toy_reward, RECORDS, DPOConfig(pairs=4, unnormalise=unnormalise, num_steps=2))
        assert world.decoded == unnormalise


def test_collect_keeps_groups_together_and_repeats_with_its_seed():
    world = ToyGenerator()
    got, again, other = collect(world, RECORDS[:2]), collect(world, RECORDS[:2]), collect(world, RECORDS[:2], seed=1)
    assert got.prompts == ["sound 0"] * 3 + ["sound 1"] * 3 and got.group_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(got.latents, again.latents) and not torch.equal(got.latents, other.latents)
    assert got.rewards.shape == (6,) and set(got.parts) == {"power"} and got.audio.shape == (6, 30)
    shorter = collect(world, RECORDS[:1])
    torch.testing.assert_close(shorter.latents, got.latents[:3], rtol=1e-4, atol=1e-5)


def test_first_ratio_is_one():
    world = ToyGenerator()
    rollouts = collect(world, RECORDS[:3], steps=4)
    rollouts.advantages = online.group_advantages(rollouts.rewards, rollouts.group_ids, global_std=True)
    rows = torch.arange(len(rollouts.rewards))
    assert grpo.trained_steps(rollouts.trajectory, 0.99) == [0, 1, 2]
    for j in range(3):
        _, row = grpo._step_loss(world.network, None, rollouts, rows, j, GRPO)
        assert row["ratio_deviation"] == 0.0


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_grpo_step_raises_the_surrogate(kind):
    """After one update, winners of the same rollouts are more likely than before, losers less."""
    world = ToyGenerator()
    config = dataclasses.replace(GRPO, kind=kind, beta=0.0, minibatches=1, clip_range=1.0, learning_rate=1e-4)
    rollouts = collect(world, RECORDS[:3], steps=4, group_size=4, sde={"noise_level": 0.7, "kind": kind})
    rollouts.advantages = online.group_advantages(rollouts.rewards, rollouts.group_ids, global_std=True)
    optimizer = online.make_optimizer(world.network, config.learning_rate)
    grpo.update(world.network, optimizer, None, rollouts, config, torch.Generator().manual_seed(0))
    gain = 0.0
    for j in grpo.trained_steps(rollouts.trajectory, 0.99):
        step = grpo.Step.of(rollouts.trajectory, torch.arange(12), j)
        with torch.no_grad():
            new = grpo.score_step(world.network, step, rollouts.cond, 2.0).log_prob
        gain += (rollouts.advantages * (new - rollouts.trajectory.log_probs[:, j])).mean().item()
    assert gain > 0


def test_with_a_window_siblings_share_all_but_its_noise():
    world = ToyGenerator()
    config = dataclasses.replace(GRPO, num_steps=6, window=2, timestep_fraction=0.7)
    windows = {grpo.draw_window(config, torch.Generator().manual_seed(k)) for k in range(40)}
    assert windows == {(0, 2), (1, 2), (2, 2)} and grpo.draw_window(GRPO, torch.Generator()) is None
    rollouts = collect(world, RECORDS[:2], steps=6, sde={"noise_level": 0.7, "kind": "sde", "window": (1, 2)})
    latents = rollouts.trajectory.latents
    assert grpo.trained_steps(rollouts.trajectory, 0.7) == [1, 2]
    torch.testing.assert_close(latents[0, 1], latents[2, 1])
    assert not torch.allclose(latents[0, 2], latents[2, 2]) and not torch.allclose(latents[0, 0], latents[3, 0])
    last = dataclasses.replace(config, window=1, timestep_fraction=1.0)  # the last step is deterministic
    assert {grpo.draw_window(last, torch.Generator().manual_seed(k))[0] for k in range(60)} == set(range(5))
    twice = collect(world, [RECORDS[0], RECORDS[0]], steps=3, sde={"noise_level": 0.7, "kind": "sde", "window": (1, 1)})
    torch.testing.assert_close(twice.trajectory.latents[0, 0], twice.trajectory.latents[5, 0])
    with pytest.raises(ValueError, match=r"window=5: .* leaves 4"):
        dataclasses.replace(config, window=5)


def test_nft_learns_nothing_from_siblings_that_are_the_same():
    """Advantages of a group sum to zero and its clips are noised alike, so equal clips must leave no gradient."""
    world = ToyGenerator()
    rollouts = collect(world, RECORDS[:3], group_size=4, sde=None, guidance_scale=1.0)
    config = dataclasses.replace(NFT, beta_kl=0.0, minibatches=1, num_steps=4)
    norms = []
    for equal in (False, True):
        if equal:
            rollouts.latents = rollouts.latents[::4].repeat_interleave(4, 0)
        rollouts.advantages = online.group_advantages(rollouts.rewards, rollouts.group_ids, global_std=True)
        networks = (world.network, online.frozen_copy(world.network), None)
        optimizer = torch.optim.SGD(world.network.parameters(), lr=0.0)
        row = nft.update(networks, optimizer, rollouts, config, torch.Generator().manual_seed(0))
        norms.append(row["grad_norm"])
    assert norms[1] < 1e-5 * norms[0]


@pytest.mark.parametrize(("module", "config"), [(grpo, GRPO), (nft, NFT)], ids=["grpo", "nft"])
def test_the_rate_rises_over_the_warm_up(module, config, monkeypatch):
    rates = []

    def listening(network, optimizer, max_grad_norm):
        rates.append(optimizer.param_groups[0]["lr"])
        return online.optimizer_step(network, optimizer, max_grad_norm)

    monkeypatch.setattr(module, "optimizer_step", listening)
    for rounds in (2, 0):
        config = dataclasses.replace(config, steps=3, minibatches=1, learning_rate=1e-3, warmup_steps=rounds)
        module.train(ToyGenerator(), toy_reward, RECORDS, config, seed=0)
    assert rates == [0.5e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]


def test_gains_compare_whole_turns():
    history = [{"step": i, "reward_mean": 1.0 + (i % 2) + i // 2, "reward_std": 2.0} for i in range(20)]
    rows = online.gains(history, 10, turns=2)
    assert rows[0] == {"clips": 10, "gain": pytest.approx(-0.25)} and rows[1]["gain"] == pytest.approx(0.25)
    assert rows[-1]["clips"] == 200


@pytest.mark.parametrize(("module", "config"), [(grpo, GRPO), (nft, NFT)], ids=["grpo", "nft"])
def test_rounds_take_the_guidances_in_turn(module, config, monkeypatch):
    taken, original = [], online.collect

    def listening(*arguments, guidance_scale, **options):
        taken.append(guidance_scale)
        return original(*arguments, guidance_scale=guidance_scale, **options)

    monkeypatch.setattr(online, "collect", listening)
    config = dataclasses.replace(config, steps=3, guidance_scales=(1.0, 2.0))
    history = module.train(ToyGenerator(), toy_reward, RECORDS, config, seed=0)
    assert all(row.get("first_ratio_deviation", 0.0) < 1e-6 for row in history)
    assert taken == [1.0, 2.0, 1.0]


# -------------------------------------------------------------------------------------- training loops
LOOPS = [(grpo, GRPO), (nft, NFT), (dpo, DPO)]
LOOP_NAMES = ["grpo", "nft", "dpo"]


@pytest.mark.parametrize(("module", "config"), LOOPS, ids=LOOP_NAMES)
def test_train_changes_the_network_and_repeats_with_its_seed(module, config):
    results, seen = [], []
    for seed in (0, 0, 1):
        world = ToyGenerator()
        before = weights(world.network)
        history = module.train(
            world, toy_reward, RECORDS, config, seed=seed, callback=lambda i, m: seen.append((i, m["loss"]))
        )
        assert len(history) == 2 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in history)
        results.append(weights(world.network))
        assert not torch.equal(results[-1], before)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert [i for i, _ in seen] == [0, 1] * 3


@pytest.mark.parametrize(("module", "config"), LOOPS[:2], ids=LOOP_NAMES[:2])
def test_attention_alone_is_trained_when_asked(module, config):
    world = ToyGenerator()
    before = {name: p.detach().clone() for name, p in world.network.named_parameters() if p.requires_grad}
    module.train(world, toy_reward, RECORDS, dataclasses.replace(config, trained="attention", steps=2), seed=0)
    after = {name: p for name, p in world.network.named_parameters() if p.requires_grad}
    assert after.keys() == before.keys()  # what was left out can be trained again
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {"fused_blocks.0.attn.qkv.weight", "joint_blocks.0.text_block.adaLN_modulation.1.weight"} <= moved
    audio = ("audio_input_proj", "fused_blocks.0.ffn", "fused_blocks.0.linear1", "latent_block.ffn", "final_layer.conv")
    assert not [name for name in moved if any(part in name for part in audio)]


def test_an_unknown_part_of_the_weights_is_an_error():
    with pytest.raises(ValueError, match="trained='convs': allowed are all, attention"), online.only(small(), "convs"):
        pass


@pytest.mark.parametrize(("module", "config"), LOOPS[:2], ids=LOOP_NAMES[:2])
def test_online_training_ends_with_the_average_of_its_rounds_and_callbacks_see_it(module, config, monkeypatch):
    world, average_in = ToyGenerator(), online.average_in
    by_hand, moving = [weights(world.network)], [weights(world.network)]

    def spied(average, policy, i, decay):
        assert torch.equal(weights(policy), weights(world.network))
        moving.append(weights(policy))
        decay_now = min((1 + i) / (10 + i), 0.15)
        by_hand.append(decay_now * by_hand[-1] + (1 - decay_now) * moving[-1])
        average_in(average, policy, i, decay)

    def look(i, _):
        torch.testing.assert_close(weights(world.network), by_hand[i + 1])
        assert not torch.equal(weights(world.network), moving[i + 1])

    monkeypatch.setattr(online, "average_in", spied)
    module.train(world, toy_reward, RECORDS, dataclasses.replace(config, steps=4, ema=0.15), seed=0, callback=look)
    torch.testing.assert_close(weights(world.network), by_hand[-1])
    monkeypatch.undo()
    unseen = ToyGenerator()
    module.train(unseen, toy_reward, RECORDS, dataclasses.replace(config, steps=4, ema=0.15), seed=0)
    assert torch.equal(weights(unseen.network), weights(world.network))  # looking changes nothing


ATTENTION = {"trained": "attention", "guidance_scales": (1.0, 2.0)}


@pytest.mark.parametrize(
    ("module", "config"),
    [*LOOPS, (grpo, dataclasses.replace(GRPO, **ATTENTION)), (nft, dataclasses.replace(NFT, **ATTENTION))],
    ids=[*LOOP_NAMES, "grpo attention", "nft attention"],
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(module, config, tmp_path):
    whole = ToyGenerator()
    module.train(whole, toy_reward, RECORDS, config, seed=3)
    for steps in (1, 2):
        part = ToyGenerator()
        history = module.train(
            part,
            toy_reward,
            RECORDS,
            dataclasses.replace(config, steps=steps),
            seed=3,
            checkpoint=tmp_path / "state.pt",
        )
    assert len(history) == 2 and torch.equal(weights(part.network), weights(whole.network))


def test_what_is_left_out_can_be_trained_again_after_an_interrupt():
    network = small()
    before = [p.requires_grad for p in network.parameters()]
    with pytest.raises(KeyboardInterrupt), online.only(network, "attention"):
        assert [p.requires_grad for p in network.parameters()] != before
        raise KeyboardInterrupt
    assert [p.requires_grad for p in network.parameters()] == before


@pytest.mark.parametrize(("module", "config"), LOOPS[:2], ids=LOOP_NAMES[:2])
def test_steps_where_everything_ties_are_skipped(module, config):
    world = ToyGenerator()
    before = weights(world.network)
    history = module.train(world, tied_reward, RECORDS, config, seed=0)
    assert all(row["skipped"] == 1 and row["zero_groups"] == 1 for row in history)
    assert torch.equal(weights(world.network), before)
    learned = module.train(world, toy_reward, RECORDS, config, seed=0)
    assert set(history[0]) | {"part_power"} == set(learned[0])


def test_pairs_are_won_by_reward_and_ties_are_dropped():
    world = ToyGenerator()

    def half_tied(audio, rate, prompts, metadata):
        scores = audio.mean(1) * torch.tensor([m["wanted"] > 0.4 for m in metadata])
        return SimpleNamespace(scores=scores, parts={})

    pairs = dpo.make_pairs(world, world.network, half_tied, RECORDS, dataclasses.replace(DPO, pairs=12), seed=0)
    assert len(pairs) == 6 and pairs.ties == 6 and set(pairs.prompts) == {"sound 3", "sound 4", "sound 5"}
    assert (pairs.rewards[:, 0] > pairs.rewards[:, 1]).all()
    torch.testing.assert_close(pairs.win.flatten(1).mean(1), pairs.rewards[:, 0])
    torch.testing.assert_close(pairs.cond.text_f, world.encode_prompts(pairs.prompts).text_f)
    with pytest.raises(ValueError, match="all 10 pairs tie"):
        dpo.make_pairs(world, world.network, tied_reward, RECORDS, DPO)


def test_dpo_makes_new_pairs_every_round_and_a_resumed_run_repeats_them(tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "SAVE_EVERY", 3)  # the state that is resumed lies inside a round
    config, made = dataclasses.replace(DPO, steps=5, fresh_every=2), []

    def listening_reward(audio, *more):
        made.append(audio.clone())
        return toy_reward(audio, *more)

    whole = dpo.train(ToyGenerator(), listening_reward, RECORDS, config, seed=3)
    assert len(made) == config.rounds == 3 and not torch.equal(made[0], made[1])
    assert whole[0]["reward_win"] == whole[1]["reward_win"] != whole[2]["reward_win"]
    state = tmp_path / "dpo.pt"
    with pytest.raises(KeyboardInterrupt):
        dpo.train(ToyGenerator(), toy_reward, RECORDS, config, seed=3, checkpoint=state, callback=_stop_after(3))
    assert state.is_file()
    resumed = dpo.train(ToyGenerator(), toy_reward, RECORDS, config, seed=3, checkpoint=state)
    assert resumed == whole


def _stop_after(steps: int):
    def stop(i, metrics):
        if i == steps:
            raise KeyboardInterrupt

    return stop


def test_dpo_starts_at_ln_2_and_prefers_winners_after_training():
    world = ToyGenerator()
    config = dataclasses.replace(DPO, steps=30, pairs=16, batch_size=16)
    history = dpo.train(world, toy_reward, RECORDS, config, seed=0)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(row["accuracy"] for row in history[-5:]) / 5 > 0.8


def test_too_few_records_are_an_error():
    with pytest.raises(ValueError, match="3 prompts a step"):
        grpo.train(ToyGenerator(), toy_reward, RECORDS[:2], GRPO)


@pytest.mark.parametrize(("pairs", "size"), [(10, 4), (7, 3), (5, 5), (3, 8), (12, 4)])
def test_every_pair_is_seen_before_any_is_seen_again(pairs, size):
    batches = [dpo.batch_rows(pairs, size, step, seed=5).tolist() for step in range(2 * pairs)]
    assert all(len(batch) == min(size, pairs) for batch in batches)
    seen = [row for batch in batches for row in batch]
    passes = [seen[start : start + pairs] for start in range(0, len(seen) - pairs + 1, pairs)]
    assert all(sorted(part) == list(range(pairs)) for part in passes)
    assert len({tuple(part) for part in passes}) > 1 and batches[0] != dpo.batch_rows(pairs, size, 0, seed=6).tolist()
