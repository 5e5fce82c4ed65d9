"""The flow transformer: names, golden outputs, speed-ups that must not change the result, and its errors."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import fill_flux, recipe, relative

from resonate_lib import flow
from resonate_lib.models import layers
from resonate_lib.models.flux_audio import Condition, FluxAudio, fluxaudio_m_44k


def stored(golden, use_rope=True, frames=20):
    data = golden("flux_tiny_stored")
    network = FluxAudio(
        latent_dim=8, text_dim=16, text_c_dim=16, hidden_dim=64, depth=3, fused_depth=1, num_heads=2,
        latent_seq_len=frames, text_seq_len=11, use_rope=use_rope,
    )  # fmt: skip
    network.load_state_dict({k[2:]: v.float() for k, v in data.items() if k.startswith("w.")}, strict=True)
    return network, data


def small(**overrides):
    config = {
        "latent_dim": 6, "text_dim": 10, "text_c_dim": 12, "hidden_dim": 32, "depth": 3, "fused_depth": 1,
        "num_heads": 2, "latent_seq_len": 9, "text_seq_len": 7,
    }  # fmt: skip
    return FluxAudio(**{**config, **overrides})


def awake(network):
    """Random values in the layers that start at zero, so that everything takes part."""
    generator = torch.Generator().manual_seed(5)
    for p in network.parameters():
        if p.requires_grad and not p.abs().sum():
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return network


@pytest.mark.parametrize("rope", [True, False])
def test_golden_forward_and_guidance(golden, rope):
    network, data = stored(golden, rope)
    tag = "rope" if rope else "norope"
    cond = Condition(data["text_f"], data["text_f_c"])
    with torch.no_grad():
        got = network(data["latent"], *cond, data["t"])
        torch.testing.assert_close(got, data[f"flow.{tag}"], rtol=1e-4, atol=2e-5)
        for scale in (4.5, 0.5, 1.0):
            guided = flow.guided(network, data["latent"], data["t0"], cond, scale)
            torch.testing.assert_close(guided, data[f"ode.{tag}.cfg{scale}"], rtol=1e-4, atol=5e-5)


def test_golden_intermediate_outputs(golden):
    network, data = stored(golden)
    seen = {}
    names = ["text_cond_proj", "text_input_proj", "audio_input_proj", "t_embed", "joint_blocks.0", "joint_blocks.1",
             "fused_blocks.0"]  # fmt: skip
    for name in names:
        module = network.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        network(data["latent"], data["text_f"], data["text_f_c"], data["t"])
    for name, out in seen.items():
        parts = {f"{name}.latent": out[0], f"{name}.text": out[1]} if isinstance(out, tuple) else {name: out}
        for key, tensor in parts.items():
            torch.testing.assert_close(tensor, data[f"inter.{key}"], rtol=1e-4, atol=2e-5)
    assert len(seen) == len(names)


@pytest.mark.parametrize("rope", [True, False])
def test_golden_recipe_weights_and_euler(golden, rope):
    from resonate_lib.samplers import ode_sample

    data = golden("flux_tiny_recipe")
    network = FluxAudio(
        latent_dim=8, text_dim=24, text_c_dim=16, hidden_dim=128, depth=4, fused_depth=2, num_heads=2,
        latent_seq_len=33, use_rope=rope,
    )  # fmt: skip
    fill_flux(network, "tiny2/")
    shapes = {"latent": (3, 33, 8), "text_f": (3, 77, 24), "text_f_c": (3, 16)}
    latent, text_f, text_f_c = (recipe(f"tiny2/input.{name}", shape) for name, shape in shapes.items())
    with torch.no_grad():
        got = network(latent, text_f, text_f_c, data["t"])
    torch.testing.assert_close(got, data["flow_rope" if rope else "flow_norope"], rtol=1e-4, atol=2e-5)
    if rope:
        x0 = ode_sample(network, latent, Condition(text_f, text_f_c), steps=5, guidance_scale=4.5)
        assert relative(x0, data["euler_final"]) < 1e-4
        assert relative(network.unnormalize(x0), data["euler_final_unnormalized"]) < 1e-4


@pytest.mark.slow
def test_golden_full_size(golden):
    """468 million parameters: about 2 GB of memory and a minute, most of it filling in the recipe."""
    data = golden("flux_audio_m_44k_full")
    network = fill_flux(fluxaudio_m_44k(), "full44k/")
    shapes = {"latent": (1, 16, 40), "text_f": (1, 77, 1024), "text_f_c": (1, 1024)}
    latent, text_f, text_f_c = (recipe(f"full44k/input.{name}", shape) for name, shape in shapes.items())
    cond = Condition(0.2 * text_f, 0.2 * text_f_c)
    with torch.no_grad():
        assert relative(network(latent, *cond, data["t"]), data["flow"]) < 1e-3
        assert relative(flow.guided(network, latent, data["t"], cond, 4.5), data["flow_cfg4p5"]) < 1e-3


def test_names_and_shapes_are_the_published_ones(golden_folder):
    path = golden_folder.parent / "flux_audio_m_44k.keys.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    wanted = json.loads(path.read_text())["tensors"]
    with torch.device("meta"):
        network = fluxaudio_m_44k()
    got = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert got == {name: entry["shape"] for name, entry in wanted.items()}
    trainable = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trainable == {name for name, entry in wanted.items() if entry["trainable"]}
    assert sum(p.numel() for p in network.parameters()) == 468_285_432


def test_golden_embeddings(golden):
    data = golden("embeddings")
    torch.testing.assert_close(layers.timestep_sinusoid(data["t"]), data["timestep_sinusoid"], rtol=1e-5, atol=1e-6)
    table = layers.rope_table(9, 32, torch.device("cpu"))
    torch.testing.assert_close(table.real, data["rope_table"][0, :, :, 0, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(table.imag, data["rope_table"][0, :, :, 1, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layers.apply_rope(data["rope_in"], table), data["rope_out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("narrow", [False, True])
def test_channel_last_conv_is_conv1d_with_its_gradients(kernel, frames, narrow):
    torch.manual_seed(0)
    conv = layers.ChannelLastConv(4, 2 if narrow else 6, kernel, bias=not narrow).double()
    x = torch.randn(2, frames, 4, dtype=torch.float64, requires_grad=True)
    want = F.conv1d(x.transpose(1, 2), conv.weight, conv.bias, padding=kernel // 2).transpose(1, 2)
    got = conv(x)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, [x, *conv.parameters()], upstream),
        torch.autograd.grad(want, [x, *conv.parameters()], upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_normalised_heads_have_the_right_gradients():
    torch.manual_seed(0)
    attention = layers.SelfAttention(8, 2)
    table = layers.rope_table(5, 4, torch.device("cpu"))
    x = torch.randn(2, 5, 8, requires_grad=True)

    def reference(x):
        q, k, v = attention.qkv(x).view(2, 5, 2, 4, 3).unbind(-1)
        q = F.rms_norm(q, (4,), attention.q_norm.weight)
        k = F.rms_norm(k, (4,), attention.k_norm.weight)
        return tuple(layers.apply_rope(z.transpose(1, 2), table).transpose(1, 2) for z in (q, k)) + (v,)

    attention.q_norm.weight.data += 0.3 * torch.randn(4)
    inputs = [x, *attention.parameters()]
    got, want = torch.cat(attention.qkv_heads(x, table)), torch.cat(reference(x))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_short_attention_equals_the_fused_kernel():
    q, k, v = torch.randn(3, 2, 9, 2, 4).unbind(0)
    want = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v))).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layers.attend(q, k, v), want)


def test_output_is_zero_at_the_start():
    out = small()(torch.randn(2, 9, 6), torch.randn(2, 7, 10), torch.randn(2, 12), torch.rand(2))
    assert out.shape == (2, 9, 6) and not out.any()


def test_projecting_once_equals_projecting_every_time_and_trains_the_projection():
    network = awake(small())
    cond, x, t = Condition(torch.randn(2, 7, 10), torch.randn(2, 12)), torch.randn(2, 5, 6), torch.rand(2)
    once = network.velocity(x, network.project_text(cond), t)
    assert torch.equal(once, network(x, *cond, t))
    once.square().sum().backward()
    still = {name for name, p in network.named_parameters() if p.requires_grad and not p.grad.any()}
    assert still == {"joint_blocks.1.text_block.attn.q_norm.weight"}  # the last text stream asks nothing


def test_guidance_in_one_batch_equals_two_passes():
    network = awake(small(empty_string_feat=torch.randn(7, 10), empty_string_feat_c=torch.randn(12)))
    cond, x = Condition(torch.randn(3, 7, 10), torch.randn(3, 12)), torch.randn(3, 5, 6)
    t = torch.full((3,), 0.4)
    two = flow.guided_velocity(network(x, *cond, t), network(x, *network.empty_condition(3), t), 3.0)
    torch.testing.assert_close(flow.guided(network, x, 0.4, cond, 3.0), two, rtol=1e-5, atol=1e-5)
    assert torch.equal(flow.guided(network, x, 0.4, cond, 0.7), network(x, *cond, t))


def test_normalise_is_inverted_and_refuses_unset_statistics():
    network = small(latent_mean=torch.arange(6.0), latent_std=torch.full((6,), 2.0))
    z = torch.randn(2, 9, 6)
    torch.testing.assert_close(network.unnormalize(network.normalize(z)), z)
    with pytest.raises(ValueError, match="latent_mean"):
        small().normalize(z)


def test_checkpoints_load_strictly_and_override_the_constructor():
    network = small(latent_mean=torch.ones(6), latent_std=torch.ones(6))
    state = copy.deepcopy(network.state_dict()) | {"t_embed.freqs": torch.zeros(3), "latent_rot": torch.zeros(3)}
    other = small()
    other.load_state_dict(state)
    assert other.latent_mean.eq(1).all()
    with pytest.raises(RuntimeError, match="extra"):
        other.load_state_dict(state | {"extra": torch.zeros(1)})


def test_casting_keeps_the_rotations_exact():
    network = awake(small()).bfloat16()
    assert layers.rope_table(9, 16, torch.device("cpu")).dtype == torch.complex64
    x = torch.randn(2, 9, 6).bfloat16()
    out = network(x, torch.randn(2, 7, 10).bfloat16(), torch.randn(2, 12).bfloat16(), torch.rand(2))
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("shape", "tokens", "words"), [((1, 2049, 6), 7, "2049 latent frames"), ((1, 9, 6), 78, "78 text")]
)
def test_sequences_beyond_the_tables_are_errors(shape, tokens, words):
    with pytest.raises(ValueError, match=words):
        small()(torch.zeros(shape), torch.zeros(1, tokens, 10), torch.zeros(1, 12), torch.zeros(1))


def test_bad_shapes_are_errors():
    with pytest.raises(ValueError, match="fused_depth=3"):
        small(fused_depth=3)
    with pytest.raises(ValueError, match="num_heads"):
        small(num_heads=3)
    a, b = Condition(torch.zeros(1, 7, 2), torch.zeros(1, 2)), Condition(torch.zeros(1, 8, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"\[7, 8\]"):
        Condition.cat([a, b])


def test_condition_keeps_siblings_adjacent():
    cond = Condition(torch.arange(2.0).view(2, 1, 1), torch.arange(2.0).view(2, 1)).repeat(3)
    assert cond.text_f_c.flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert cond.index([5, 0]).text_f.flatten().tolist() == [1, 0]
    assert isinstance(cond, tuple) and cond.batch == 6
