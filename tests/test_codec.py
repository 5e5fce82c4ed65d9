"""The published audio space: mel front end, autoencoder, vocoder and the codec around them, against golden numbers and theory."""

import copy
import json

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from conftest import recipe, relative
from torch import nn

from resonate_lib.models import bigvgan, codec, vae
from resonate_lib.models.codec import BigVGAN, MelVAE, VaeCodec, log_mel

TONES = [(220.0, 0.3, 0.0), (1333.0, 0.2, 1.0), (7900.0, 0.1, 0.5)]  # Hz, amplitude, phase of the golden waveform
TINY_VOCODER = bigvgan.BIGVGAN_16K | dict(upsample_initial_channel=64, resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]])


def tones(mode):
    time = np.arange(22_050) / codec.MELS[mode]["sample_rate"]
    return torch.from_numpy(sum(a * np.sin(2 * np.pi * f * time + phase) for f, a, phase in TONES)).float()


def fill_vae(network, tag):
    """The fixtures' weights for MelVAE, normalised."""
    for name, tensor in network.state_dict().items():
        if not name.startswith("data_"):
            tensor.copy_((0.1 if name.endswith("learnable_gain") else 1.0) * recipe(tag + name, tensor.shape))
    return network.remove_weight_norm().requires_grad_(False)


def fill_bigvgan(network, tag):
    """The fixtures' weights for BigVGAN without weight normalisation."""
    for name, tensor in network.state_dict().items():
        if not name.endswith(".filter"):
            x = recipe(tag + name, tensor.shape)
            scale = 0.1 if ".act." in name else 0.02 if x.dim() < 2 else float(np.prod(x.shape[1:])) ** -0.5
            tensor.copy_(scale * x * (0.02 if name.startswith("conv_post") and x.dim() > 1 else 1.0))
    return network.requires_grad_(False)


def manifest(golden_folder, name):
    path = golden_folder.parent / f"{name}.keys.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return json.loads(path.read_text())


def shapes(state):
    return {name: list(tensor.shape) for name, tensor in state.items()}


def small_codec(seed=0):
    torch.manual_seed(seed)
    return VaeCodec("16k", seconds=0.5, embed_dim=4, hidden_dim=8, vocoder=TINY_VOCODER)


# ---------------------------------------------------------------------- spectrogram
@pytest.mark.parametrize("mode", ["44k", "16k"])
def test_golden_log_mel(golden, mode):
    data = golden(f"mel_{mode}")
    torch.testing.assert_close(log_mel(tones(mode)[None], mode=mode), data["log_mel"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec._front_end(mode, torch.device("cpu"))[0].sum(1), data["mel_basis_rowsum"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["44k", "16k"])
def test_log_mel_in_double_precision_by_numpy(mode):
    mel = codec.MELS[mode]
    n_fft, hop, margin = mel["n_fft"], mel["hop"], (mel["n_fft"] - mel["hop"]) // 2
    audio = 0.5 * torch.randn(2, 5 * hop + 100, generator=torch.Generator().manual_seed(1))  # some samples beyond ±1
    padded = np.pad(audio.double().numpy().clip(-1, 1), ((0, 0), (margin, margin)), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=1)[:, ::hop]
    spectrum = np.fft.rfft(frames * scipy.signal.get_window("hann", n_fft), axis=2)
    filters = codec.mel_basis(mel["sample_rate"], n_fft, mel["bands"], mel["f_max"]).double().numpy()
    bands = np.maximum(np.sqrt(np.abs(spectrum) ** 2 + 1e-9) @ filters.T, 1e-5)
    wanted = (np.log if mode == "44k" else np.log10)(bands).swapaxes(1, 2)
    assert wanted.shape[2] == 5
    torch.testing.assert_close(log_mel(audio, mode).double(), torch.from_numpy(wanted), rtol=0, atol=5e-5)
    silence = torch.full((1, mel["bands"], 4), np.log(1e-5) if mode == "44k" else -5.0)
    torch.testing.assert_close(log_mel(torch.zeros(4 * hop), mode), silence)


@pytest.mark.parametrize(("waveform", "mode", "says"), [
    (torch.zeros(1, 1, 4000), "44k", "shape (1, 1, 4000)"),
    (torch.zeros(768), "44k", "T at least 769"),
    (torch.zeros(384), "16k", "T at least 385"),
    (torch.zeros(4000, dtype=torch.int16), "16k", "torch.int16"),
    (torch.zeros(4000), "48k", "mode='48k'"),
])  # fmt: skip
def test_log_mel_says_what_it_takes(waveform, mode, says):
    with pytest.raises(ValueError) as error:
        log_mel(waveform, mode)
    assert says in str(error.value)


# ---------------------------------------------------------------------- autoencoder
@pytest.mark.parametrize("bands", [80, 128])
def test_golden_small_autoencoder(golden, bands):
    data = golden(f"vae_small_{bands}")
    network = fill_vae(MelVAE(data_dim=bands, embed_dim=8, hidden_dim=32), f"vae{bands}/")
    mean, std = network.encode(data["mel"])
    got = {"mean": mean, "std": std, "decoded_from_mean": network.decode(mean),
           "decoded_from_sample": network.decode(data["sample_z"])}  # fmt: skip
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, data[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "bands"), [("44k", 128), ("16k", 80)])
def test_golden_full_size_autoencoder(golden, mode, bands):
    """305 and 172 million parameters: up to 3 GB of memory and half a minute, most of it filling in the recipe."""
    data = golden(f"vae_full_{mode}")
    with torch.device("meta"):
        network = MelVAE(mode)
    statistics = MelVAE(mode, embed_dim=1, hidden_dim=1).state_dict()
    network.to_empty(device="cpu").load_state_dict({k: v for k, v in statistics.items() if k.startswith("data_")}, strict=False)
    network = fill_vae(network, f"fullvae{mode}/")
    mel = 2 * recipe(f"fullvae{mode}/input.mel", (1, bands, 64)) - 4
    mean, std = network.encode(mel)
    for name, got in (("mean", mean), ("std", std), ("decoded_from_mean", network.decode(mean))):
        torch.testing.assert_close(got, data[name], rtol=1e-3, atol=1e-5, msg=name)


def test_golden_posterior(golden):
    data = golden("diagonal_gaussian")
    mean, std = vae.posterior(data["parameters"])
    torch.testing.assert_close(mean, data["mean"], rtol=0, atol=0)
    torch.testing.assert_close(std, data["std"], rtol=1e-6, atol=0)
    extreme = torch.tensor([0.0, 0.0, -100.0, 100.0]).reshape(1, 4, 1)
    torch.testing.assert_close(vae.posterior(extreme)[1].flatten(), torch.tensor([-15.0, 10.0]).exp())


@pytest.mark.parametrize("mode", ["44k", "16k"])
def test_autoencoder_names_and_shapes_are_the_published_ones(golden_folder, mode):
    wanted = manifest(golden_folder, f"vae_{mode}")
    with torch.device("meta"):
        network = MelVAE(mode)
    assert shapes(network.state_dict()) == {name: entry["shape"] for name, entry in wanted["tensors"].items()}
    assert sum(p.numel() for p in network.parameters()) == wanted["total_parameters"]


def test_weights_are_normalised_once():
    torch.manual_seed(0)
    network = MelVAE("16k", embed_dim=4, hidden_dim=8)
    with pytest.raises(RuntimeError, match="remove_weight_norm"):
        network.encode(torch.zeros(1, 80, 4))
    with pytest.raises(RuntimeError, match="remove_weight_norm"):
        network.decode(torch.zeros(1, 4, 4))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    after = network.remove_weight_norm().state_dict()
    for name, tensor in before.items():
        if tensor.dim() == 3 and "data_" not in name:
            for raw, got in zip(tensor, after[name], strict=True):
                root = raw.numel() ** 0.5
                torch.testing.assert_close(got, raw / (1e-4 + raw.square().sum().sqrt() / root) / root)
        else:
            assert torch.equal(tensor, after[name])
    again = copy.deepcopy(network).remove_weight_norm()
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.state_dict().items())


def test_autoencoder_layers_by_hand():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5)
    attention = vae.Attention(6)
    attention.qkv.normalize()
    attention.proj_out.normalize()
    units = torch.einsum("oc,bcn->bon", attention.qkv.weight[..., 0], x)
    q, k, v = (units[:, j::3] / (1e-4 + units[:, j::3].square().mean(1, keepdim=True).sqrt()) for j in range(3))
    weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / 6**0.5, dim=-1)
    out = torch.einsum("oc,bcm,bnm->bon", attention.proj_out.weight[..., 0], v, weights)
    torch.testing.assert_close(attention(x), (0.7 * x + 0.3 * out) / 0.58**0.5, rtol=1e-4, atol=1e-5)
    noise = torch.randn(4, 100_000)
    assert vae.mp_silu(noise).square().mean().sqrt() == pytest.approx(1.0, abs=0.01)
    assert vae.mp_sum(noise[:2], noise[2:]).std() == pytest.approx(1.0, abs=0.01)
    up, down = vae.Upsample(6), vae.Downsample(6)
    assert torch.equal(up(x), up.conv(F.interpolate(x, scale_factor=2, mode="nearest-exact")))
    assert down(x).shape == (2, 6, 2) and torch.equal(down(x), down(x[..., :4]))


def test_autoencoder_sizes_statistics_and_errors():
    assert MelVAE("44k", data_dim=80, embed_dim=2, hidden_dim=4).data_mean[0, 0] == pytest.approx(-1.6058)
    network = MelVAE("44k", data_dim=7, embed_dim=2, hidden_dim=4).remove_weight_norm()
    assert network.data_mean.eq(0).all() and network.data_std.eq(1).all()
    mean, std = network.encode(torch.randn(3, 7, 9))
    assert mean.shape == std.shape == (3, 2, 4) and network.decode(mean).shape == (3, 7, 8)
    for call in (lambda: network.encode(torch.zeros(1, 8, 4)), lambda: network.encode(torch.zeros(7, 4)),
                 lambda: network.encode(torch.zeros(1, 7, 1)), lambda: network.decode(torch.zeros(1, 3, 4)),
                 lambda: network.decode(torch.zeros(1, 2, 0))):  # fmt: skip
        with pytest.raises(ValueError, match=r"of shape \(.*allowed \(B, [72] "):
            call()
    with pytest.raises(ValueError, match="mode='22k'"):
        MelVAE("22k")
    with pytest.raises(ValueError, match="hidden_dim=0"):
        MelVAE(hidden_dim=0)


# ---------------------------------------------------------------------- vocoder
def test_golden_small_vocoder(golden, golden_folder):
    data = golden("bigvgan_v2_small")
    entry = json.loads((golden_folder / "fixtures.json").read_text())["files"]["bigvgan_v2_small.safetensors"]
    network = BigVGAN(entry["config"])
    assert shapes(network.state_dict()) == entry["state_dict_after_removal"]
    wave = fill_bigvgan(network, "bigvgan/")(data["mel"])
    torch.testing.assert_close(wave, data["wave"], rtol=1e-4, atol=1e-5)
    assert relative(wave, data["wave"]) < 1e-5


def with_weight_norm(network, wrap):
    """A copy whose convolutions have torch's own weight normalisation."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            wrap(module)
    return network


@pytest.mark.parametrize(("name", "config"), [
    ("bigvgan_v2_44khz_128band_512x", bigvgan.BIGVGAN_44K), ("bigvgan_16k", bigvgan.BIGVGAN_16K)])  # fmt: skip
def test_vocoder_names_and_shapes_are_the_published_ones(golden_folder, name, config):
    wanted = manifest(golden_folder, name)
    assert {key: value for key, value in wanted["config"].items() if key in config}.items() <= config.items()
    stored = {key: torch.empty(entry["shape"], device="meta") for key, entry in wanted["tensors"].items()}
    with torch.device("meta"):
        network, from_file = BigVGAN(config), BigVGAN(wanted["config"])
    assert shapes(network.state_dict()) == shapes(from_file.state_dict()) == wanted["after_weight_norm_removal"]
    assert shapes(bigvgan.without_weight_norm(stored)) == wanted["after_weight_norm_removal"]
    normed = with_weight_norm(network, nn.utils.parametrizations.weight_norm)
    assert shapes(normed.state_dict()) == shapes(stored)
    assert sum(p.numel() for p in normed.parameters()) == wanted["total_parameters"]
    network.load_state_dict(stored, strict=True, assign=True)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_every_spelling_of_the_weights_loads_strictly():
    torch.manual_seed(0)
    mel, plain = torch.randn(2, 80, 3), BigVGAN(TINY_VOCODER)
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        normed = with_weight_norm(plain, wrap)
        for name, parameter in normed.named_parameters():
            if name.endswith(("weight_g", "original0")):
                parameter.data *= 1.5  # so that the magnitude matters
        state = normed.state_dict()
        names, loaded = set(state), BigVGAN(TINY_VOCODER)
        loaded.load_state_dict(state, strict=True)
        assert set(state) == names and names != set(loaded.state_dict())
        torch.testing.assert_close(loaded(mel), normed(mel), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(loaded(mel), plain(mel), atol=1e-3)
        whole = small_codec()
        whole.load_state_dict({**{f"vae.{k}": v for k, v in whole.vae.state_dict().items()},
                               **{f"vocoder.{k}": v for k, v in state.items()}}, strict=True)  # fmt: skip
        torch.testing.assert_close(whole.vocoder(mel), normed(mel), rtol=1e-4, atol=1e-6)
        halved = {k: v for k, v in state.items() if k not in ("conv_pre.weight_v", "conv_pre.parametrizations.weight.original1")}
        with pytest.raises(RuntimeError, match="conv_pre"):
            loaded.load_state_dict(halved, strict=True)
    assert bigvgan.without_weight_norm(plain.state_dict()).keys() == plain.state_dict().keys()


def test_filter_and_anti_aliasing_by_scipy():
    taps = bigvgan.kaiser_sinc().flatten().double().numpy()
    beta = scipy.signal.kaiser_beta(2.285 * 5 * np.pi * 1.2 + 7.95)
    np.testing.assert_allclose(taps, scipy.signal.firwin(12, 0.5, window=("kaiser", beta)), atol=1e-7)
    torch.manual_seed(0)
    x, layer = torch.randn(2, 3, 20), bigvgan.AntiAliased(nn.Tanh())
    for row, got in zip(x.flatten(0, 1).double().numpy(), layer(x).flatten(0, 1).double().numpy(), strict=True):
        doubled = scipy.signal.upfirdn(2 * taps, np.pad(row, 5, mode="edge"), up=2)[15 : 15 + 2 * len(row)]
        smoothed = np.convolve(np.pad(np.tanh(doubled), (5, 6), mode="edge"), taps, mode="valid")[::2]
        np.testing.assert_allclose(got, smoothed, atol=1e-6)


@pytest.mark.parametrize("activation", ["snake", "snakebeta"])
@pytest.mark.parametrize("log_scale", [True, False])
def test_snake(activation, log_scale):
    snake = bigvgan.Snake(2, has_beta=activation == "snakebeta", log_scale=log_scale)
    x = torch.linspace(-2, 2, 10).reshape(1, 2, 5)
    torch.testing.assert_close(snake(x), x + torch.sin(x) ** 2)  # both begin at 1
    snake.alpha.data = torch.tensor([0.5, 2.0])
    if activation == "snakebeta":
        snake.beta.data = torch.tensor([0.25, 0.5])
    a = snake.alpha.exp() if log_scale else snake.alpha
    b = a if snake.beta is None else snake.beta.exp() if log_scale else snake.beta
    for channel in range(2):
        wanted = x[:, channel] + torch.sin(a[channel] * x[:, channel]) ** 2 / b[channel]
        torch.testing.assert_close(snake(x)[:, channel], wanted)


def test_vocoder_output_and_errors():
    torch.manual_seed(0)
    mel = torch.randn(2, 80, 3)
    version1 = BigVGAN({k: v for k, v in TINY_VOCODER.items() if not k.startswith("use_")} | {"batch_size": 64})
    assert version1.tanh and version1.conv_post.bias is not None
    assert version1.hop == 256 and version1(mel).shape == (2, 1, 768)
    version2 = BigVGAN(TINY_VOCODER | dict(use_tanh_at_final=False, use_bias_at_final=False))
    assert version2.conv_post.bias is None
    for network in (version1, version2):
        network.conv_post.weight.data *= 1e4
        assert network(mel).abs().max() == 1.0
    for wrong in (mel[:, :79], mel[0], mel[..., :0]):
        with pytest.raises(ValueError, match=r"allowed \(B, 80 bands, frames\)"):
            version1(wrong)
    for change, says in ((dict(resblock="2"), "resblock='2'"), (dict(activation="relu"), "activation='relu'"),
                         (dict(upsample_rates=[4]), "upsample_rates"),
                         (dict(upsample_initial_channel=6), "upsample_initial_channel"),
                         (dict(resblock_kernel_sizes=[3, 7]), "resblock_kernel_sizes")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            BigVGAN(TINY_VOCODER | change)
    with pytest.raises(ValueError, match="without activation, num_mels"):
        BigVGAN({k: v for k, v in TINY_VOCODER.items() if k not in ("num_mels", "activation")})


# ---------------------------------------------------------------------- codec
def test_published_sizes_of_the_codec():
    with torch.device("meta"):
        large, small = VaeCodec("44k"), VaeCodec("16k")
    assert (large.sample_rate, large.latent_len, large.latent_dim, large.samples) == (44_100, 430, 40, 440_320)
    assert (small.sample_rate, small.latent_len, small.latent_dim, small.samples) == (16_000, 312, 20, 159_744)
    assert sum(p.numel() for p in large.parameters()) == 305_479_682 + 122_152_752
    with torch.device("meta"):  # 10 s: 861 frames of mel, the last of which has no partner
        assert large.vae.encoder(torch.empty(1, 128, 861)).shape == (1, 80, 430)
        assert large.vae.decoder(torch.empty(1, 40, 430)).shape == (1, 128, 860)
        assert large.vocoder(torch.empty(1, 128, 860)).shape == (1, 1, 440_320)
        assert small.vocoder(torch.empty(1, 80, 624)).shape == (1, 1, 159_744)


def test_codec_is_its_parts_in_order():
    whole = small_codec()
    audio = 0.3 * torch.randn(5, 8000, generator=torch.Generator().manual_seed(3))
    mean = whole.encode(audio)
    assert mean.shape == (5, whole.latent_len, 4) == (5, 15, 4)
    for i in range(5):  # clips do not touch one another, whatever goes together
        torch.testing.assert_close(mean[i].T, whole.vae.encode(log_mel(audio[i], "16k"))[0][0], rtol=1e-4, atol=1e-5)
    sound = whole.decode(mean, limit=False)
    assert sound.shape == (5, whole.samples) == (5, 15 * 512)
    torch.testing.assert_close(sound[4], whole.vocoder(whole.vae.decode(mean[4:].transpose(1, 2)))[0, 0], rtol=1e-4, atol=1e-6)
    assert torch.equal(sound, whole.decode(mean, iterations=60, limit=False))
    assert whole.decode(mean[:, :7]).shape == (5, 7 * 512)
    assert torch.equal(whole.mel(audio), log_mel(audio, "16k").transpose(1, 2))
    assert not mean.requires_grad and not any(p.requires_grad for p in whole.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole.encode(audio), mean) and torch.equal(whole.decode(mean, limit=False), sound)


def test_codec_draws_from_its_posterior():
    whole = small_codec()
    audio = 0.3 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(3))
    mean, std = whole.posterior(audio)
    draw = whole.encode(audio, torch.Generator().manual_seed(5))
    assert torch.equal(draw, whole.encode(audio, torch.Generator().manual_seed(5)))
    assert not torch.equal(draw, whole.encode(audio, torch.Generator().manual_seed(6)))
    generator = torch.Generator().manual_seed(7)
    standard = torch.stack([(whole.encode(audio, generator) - mean) / std for _ in range(40)])
    assert standard.mean() == pytest.approx(0.0, abs=0.08) and standard.std() == pytest.approx(1.0, abs=0.08)


def test_codec_lengths_limit_and_storage():
    whole = small_codec()
    audio = 0.3 * torch.randn(2, 9000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(whole.encode(audio), whole.encode(audio[:, :8000]))
    assert torch.equal(whole.encode(audio[:, :6000]), whole.encode(F.pad(audio[:, :6000], (0, 2000))))
    latents = whole.encode(audio)
    twin = VaeCodec(**json.loads(json.dumps(whole.config)))
    twin.load_state_dict(whole.state_dict(), strict=True)
    assert torch.equal(twin.encode(audio), latents) and torch.equal(twin.decode(latents), whole.decode(latents))
    whole.vocoder.conv_post.weight.data *= 1e4
    loud, limited = whole.decode(latents, limit=False), whole.decode(latents)
    assert loud.abs().max() == 1.0
    torch.testing.assert_close(limited, 0.99 * loud)


def test_codec_says_what_it_takes():
    whole, sizes = small_codec(), dict(embed_dim=4, hidden_dim=8, vocoder=TINY_VOCODER)
    for call, says in ((lambda: whole.encode(torch.zeros(8000)), r"allowed \(B, T\)"),
                       (lambda: whole.decode(torch.zeros(1, 4, 15)), r"allowed \(B, N, 4\)"),
                       (lambda: VaeCodec("8k"), "mode='8k'"),
                       (lambda: VaeCodec("16k", seconds=0.01, **sizes), "seconds=0.01"),
                       (lambda: VaeCodec("44k", **sizes), "80 bands and hop 256")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            call()
