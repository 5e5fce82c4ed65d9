"""LoRA: what it adds, what it leaves alone, merging, files, and the three algorithms training through it."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from test_algorithms import DPO, GRPO, LOOP_NAMES, LOOPS, NFT, RECORDS, ToyGenerator, collect, toy_reward, weights
from test_flux_audio import awake, small

from resonate_lib import dpo, flow, grpo, nft, online
from resonate_lib.models import lora
from resonate_lib.models.flux_audio import Condition

QKV, CONV, TEXT = "fused_blocks.0.attn.qkv", "fused_blocks.0.linear1", "joint_blocks.0.text_block.linear1"


def network():
    torch.manual_seed(2)
    return awake(small(empty_string_feat=torch.randn(7, 10), empty_string_feat_c=torch.randn(12))).train()


def inputs(batch=3):
    random = torch.Generator().manual_seed(4)
    shapes = ((batch, 5, 6), (batch, 7, 10), (batch, 12))
    x, text_f, text_f_c = (torch.randn(shape, generator=random) for shape in shapes)
    return x, 0.6, Condition(text_f, text_f_c), 2.0


def filled(adapted, seed=0):
    """Random values in B, which starts at zero."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    return adapted


def test_attaching_changes_nothing_and_freezes_the_network():
    net = network()
    before = flow.guided(net, *inputs())
    names = list(net.state_dict())
    adapted = lora.attach(net, 4, 8.0)
    assert torch.equal(flow.guided(adapted, *inputs()), before)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {
        n for n, _ in net.named_parameters() if ".lora_" in n
    }
    layers = {name.rsplit(".lora_", 1)[0] for name, _ in adapted.named_parameters()}
    assert {QKV, CONV, TEXT, "text_cond_proj.0", "joint_blocks.1.text_block.attn.qkv"} <= layers
    assert not [name for name in layers if "ffn" in name or "adaLN" in name]
    assert list(lora.merge(adapted).state_dict()) == names


def test_what_is_added_is_b_a_in_weights_of_every_kind():
    plain, net = network(), network()
    adapted = filled(lora.attach(net, 4, 8.0))
    tensors = adapted.state_dict()
    with torch.no_grad():
        for name in {name.rsplit(".lora_", 1)[0] for name in tensors}:
            weight = plain.get_parameter(f"{name}.weight")
            a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            weight += 2.0 * torch.einsum("or,ri->oi", b, a).view_as(weight)
    want, got = flow.guided(plain, *inputs()), flow.guided(adapted, *inputs())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, flow.guided(network(), *inputs()), atol=1e-2)
    x, base = torch.randn(2, 9, 32), net.get_submodule(CONV)  # a convolution: A over the neighbours, then B per frame
    a, b = (tensors[f"{CONV}.lora_{part}.weight"] for part in "AB")
    low = F.conv1d(x.transpose(1, 2), a.view(4, 32, 3), padding=1)
    beside = base.get_base_layer()(x) + 2.0 * F.conv1d(low, b[:, :, None]).transpose(1, 2)
    torch.testing.assert_close(base(x), beside, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    silent = [name for name, p in adapted.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent and all(p.grad is None for name, p in net.named_parameters() if ".lora_" not in name)


def test_peft_alone_would_pass_the_attention_over_and_refuse_convolutions():
    """Why the adapters are put into the weights: without that, this is what happens."""
    from peft import LoraConfig, get_peft_model

    net = network()
    before = flow.guided(net, *inputs())
    get_peft_model(net, LoraConfig(r=4, target_modules=r".*attn\.qkv"))
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    assert torch.equal(flow.guided(net, *inputs()), before)
    with pytest.raises(TypeError):
        get_peft_model(network(), LoraConfig(r=4, target_modules=r".*latent_block\.linear1"))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_merged_weights_give_the_same_numbers_under_the_old_names(precision):
    net = network()
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    trainable = [name for name, p in net.named_parameters() if p.requires_grad]
    adapted = filled(lora.attach(net, 4, 8.0))
    with torch.no_grad(), online.autocast(precision):
        before = flow.guided(adapted, *inputs())
        merged = lora.merge(adapted)
        assert merged is net and torch.equal(flow.guided(net, *inputs()), before)
    assert {name: tensor.shape for name, tensor in net.state_dict().items()} == shapes
    assert [name for name, p in net.named_parameters() if p.requires_grad] == trainable
    other = network()
    other.load_state_dict(copy.deepcopy(net.state_dict()), strict=True)


def test_the_adapter_file_turns_the_start_into_the_end(tmp_path):
    end = lora.merge(filled(lora.attach(network(), 4, 8.0)))
    lora.save(end.adapter, tmp_path / "adapter.safetensors")
    again = lora.merge(lora.load(network(), tmp_path / "adapter.safetensors"))
    assert torch.equal(weights(again), weights(end)) and not torch.equal(weights(end), weights(network()))
    with pytest.raises(ValueError, match="another lora_rank"):
        lora.attach(network(), 2).load_state_dict(end.adapter.tensors)
    with pytest.raises(ValueError, match=r"'attn\.kqv' names no layer"):
        lora.attach(network(), targets=("attn.kqv",))


def test_references_and_companions_are_the_same_network():
    net = network()
    start = flow.guided(net, *inputs())
    adapted = filled(lora.attach(net, 4, 8.0))
    now = flow.guided(adapted, *inputs())
    old, reference = adapted.companion("old"), adapted.reference()
    filled(adapted, seed=1)
    assert torch.equal(flow.guided(old, *inputs()), now) and torch.equal(flow.guided(reference, *inputs()), start)
    assert not torch.equal(flow.guided(adapted, *inputs()), now)
    online.follow(old, adapted, 0.25)
    want = 0.25 * filled(adapted, seed=0).state_dict()[f"{QKV}.lora_B.weight"]
    want = want + 0.75 * filled(adapted, seed=1).state_dict()[f"{QKV}.lora_B.weight"]
    torch.testing.assert_close(old.state_dict()[f"{QKV}.lora_B.weight"], want)
    assert sum(1 for p in net.parameters() if p.requires_grad) == len(adapted.state_dict())


def test_blocks_computed_again_are_those_of_the_adapter_that_learns():
    """The backward pass recomputes after the reference has run: it must find the trained adapter switched on."""
    gradients = []
    for checkpointing in (False, True):
        net = network()
        net.checkpointing = checkpointing
        adapted = filled(lora.attach(net, 4, 8.0))
        reference = adapted.reference()
        v = flow.guided(adapted, *inputs())
        with torch.no_grad():
            v_ref = flow.guided(reference, *inputs())
        (v - v_ref).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapted.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------- algorithms
def adapting(config, **changes):
    return dataclasses.replace(config, trained="lora", lora_rank=4, lora_alpha=8.0, **changes)


@pytest.mark.parametrize(("module", "config"), LOOPS, ids=LOOP_NAMES)
def test_training_through_adapters(module, config, monkeypatch):
    """No second copy of the network; only the targets change; the start plus the adapter is the end."""
    monkeypatch.setattr(online, "frozen_copy", None)
    world = ToyGenerator()
    start = copy.deepcopy(world.network)
    history = module.train(world, toy_reward, RECORDS, adapting(config), seed=0)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in history)
    assert list(world.network.state_dict()) == list(start.state_dict())
    before, after = ({n: p for n, p in net.named_parameters() if p.requires_grad} for net in (start, world.network))
    moved = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and {QKV, CONV} <= moved and all(name.endswith(lora.TARGETS) for name in moved)
    adapted = lora.attach(start, *world.network.adapter.form)
    adapted.load_state_dict(world.network.adapter.tensors)
    assert torch.equal(weights(lora.merge(adapted)), weights(world.network))


def test_the_start_is_exactly_the_reference():
    dpo_rows = dpo.train(ToyGenerator(), toy_reward, RECORDS, adapting(DPO, steps=1), seed=0)
    assert dpo_rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and dpo_rows[0]["margin"] == 0.0
    nft_rows = nft.train(ToyGenerator(), toy_reward, RECORDS, adapting(NFT, steps=1, minibatches=1, times_per_sample=1))
    assert nft_rows[0]["kl"] == 0.0 and nft_rows[0]["drift"] == 0.0
    world = ToyGenerator()
    policy = lora.attach(world.network, 4, 8.0)
    rollouts = collect(world, RECORDS[:3], steps=4)
    rollouts.advantages = online.group_advantages(rollouts.rewards, rollouts.group_ids, global_std=True)
    for j in range(3):
        _, row = grpo._step_loss(policy, policy.reference(), rollouts, torch.arange(9), j, GRPO)
        assert row["ratio_deviation"] == 0.0 and row["kl"] == 0.0


@pytest.mark.parametrize(("module", "config"), LOOPS, ids=LOOP_NAMES)
def test_a_resumed_run_ends_like_an_uninterrupted_one(module, config, tmp_path):
    whole, part = ToyGenerator(), ToyGenerator()
    module.train(whole, toy_reward, RECORDS, adapting(config), seed=3)
    module.train(ToyGenerator(), toy_reward, RECORDS, adapting(config, steps=1), seed=3, checkpoint=tmp_path / "state.pt")
    module.train(part, toy_reward, RECORDS, adapting(config), seed=3, checkpoint=tmp_path / "state.pt")
    assert torch.equal(weights(part.network), weights(whole.network))
    kept = torch.load(tmp_path / "state.pt", weights_only=True)["modules"]["network"]
    assert all(".lora_" in name for name in kept)  # adapters only
