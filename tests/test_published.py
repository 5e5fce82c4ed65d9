"""A generator around published parts, at miniature size in the real file formats: the same sound as its parts put together by
hand, saving and finding them again, training from nothing, and files that do not fit."""

import copy
import json
import shutil

import miniature
import pytest
import torch
from conftest import relative

from resonate_lib import samplers
from resonate_lib.models import generator as module
from resonate_lib.models.bigvgan import BigVGAN
from resonate_lib.models.codec import VaeCodec
from resonate_lib.models.flux_audio import Condition, FluxAudio
from resonate_lib.models.generator import Generator
from resonate_lib.models.text import T5Encoder
from resonate_lib.models.vae import MelVAE

SECONDS = 0.5
PROMPTS = ["a dog barks", "rain falls, followed by a car horn"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return miniature.build(tmp_path_factory.mktemp("published") / "weights")


@pytest.fixture(scope="module")
def loaded(weights):
    return Generator.load_published(weights, seconds=SECONDS, device="cpu")


def sound(generator, **kwargs):
    latents = generator.generate(PROMPTS, steps=3, guidance_scale=4.5, seeds=[1, 2], precision="float32", **kwargs)
    return latents, generator.decode(latents)


def test_it_is_the_sum_of_its_parts(weights, loaded, tmp_path):
    """The original modules, whose tensors the files hold, put together without the loader."""
    network, vae, vocoder = miniature.flux(tmp_path / "x"), miniature.vae(tmp_path / "y"), miniature.vocoder(tmp_path)
    latents, audio = sound(loaded)
    assert latents.shape == (2, *loaded.latent_shape) == (2, 21, miniature.LATENT)
    condition = T5Encoder(weights / "flan-t5-large")(PROMPTS)
    noise = samplers.draw_noise(loaded.latent_shape, [1, 2])
    want = samplers.ode_sample(network, noise, condition, steps=3, guidance_scale=4.5)
    torch.testing.assert_close(latents, want, rtol=1e-4, atol=1e-5)
    vae.remove_weight_norm()
    with torch.no_grad():
        raw = want * torch.linspace(1.5, 3, miniature.LATENT) + torch.linspace(-1, 1, miniature.LATENT)
        wave = vocoder(vae.decode(raw.transpose(1, 2)))[:, 0]
        wrong = vocoder(vae.decode(want.transpose(1, 2)))[:, 0]
    assert audio.shape == (2, 21 * 1024) and audio.std() > 1e-4
    assert relative(loaded.decode(latents, limit=False), wave) < 1e-4
    assert relative(loaded.decode(latents, limit=False, normalised=False), wrong) < 1e-4 < relative(wave, wrong)


def test_text_states_are_kept_exactly_and_forgotten_oldest_first(weights, loaded, monkeypatch):
    generator = Generator(loaded.text, loaded.network, loaded.codec, loaded.network_config, loaded.parts)
    got, want = generator.encode_prompts(["dog", "rain", "dog"]), loaded.text(["dog", "rain", "dog"])
    assert torch.equal(got.text_f[0], got.text_f[2])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert got.text_f.any(-1).all()  # all 77 states, padding included
    one = 77 * miniature.TEXT * 4
    monkeypatch.setattr(module, "KEPT_BYTES", 2 * one)
    again = generator.encode_prompts(["a", "bird", "horn"])
    assert again.text_f.shape == (3, 77, miniature.TEXT) and list(generator._known) == ["bird", "horn"]
    torch.testing.assert_close(generator.encode_prompts(["dog"]).text_f[0], want.text_f[0], rtol=1e-5, atol=1e-6)


def test_long_prompts_are_cut_as_the_published_code_does(weights, loaded, monkeypatch, capsys):
    monkeypatch.setattr(T5Encoder, "said", False)
    got = loaded.encode_prompts([" ".join(["dog"] * 100), " ".join(["dog"] * 77)])
    torch.testing.assert_close(got.text_f[0], got.text_f[1])
    assert "note: 2 of 2 prompts have over 77 tokens" in capsys.readouterr().out


def test_the_codec_goes_by_the_sample_rate():
    assert module.codec_mode(16000) == "16k" and module.codec_mode(44100) == "44k"
    with pytest.raises(ValueError, match="sample_rate=22050: published codecs are for 16000 or 44100 Hz"):
        module.codec_mode(22050)


def test_the_stored_empty_string_stands_for_no_prompt(weights, tmp_path):
    """A checkpoint's own features override what the encoder gives."""
    miniature.flux(tmp_path / "x.pth", empty_string_feat=torch.full((77, miniature.TEXT), 0.25))
    places = dict(vae=weights, vocoder=weights, text=weights, seconds=SECONDS, device="cpu")
    generator = Generator.load_published(tmp_path / "x.pth", **places)
    assert generator.network.empty_condition(1).text_f.eq(0.25).all()
    assert generator.parts["generator_pt"].path == tmp_path / "x.pth"


def test_saving_keeps_the_network_alone_and_loading_finds_the_rest(weights, loaded, tmp_path):
    student = loaded.fork()
    with torch.no_grad():
        student.network.final_layer.conv.bias.add_(1e-4)  # lost if it were rounded to half
    student.save(tmp_path / "grpo", steps=7)
    assert sorted(path.name for path in (tmp_path / "grpo").iterdir()) == ["generator.json", "network.safetensors"]
    assert Generator.facts(tmp_path / "grpo") == {"steps": 7}
    again = Generator.load(tmp_path / "grpo", device="cpu")
    for (name, got), want in zip(again.network.state_dict().items(), student.network.state_dict().values(), strict=True):
        assert torch.equal(got, want), name
    for got, want in zip(sound(again), sound(student), strict=True):
        torch.testing.assert_close(got, want)
    assert again.provenance() == {name: facts for name, facts in loaded.provenance().items() if name != "generator_pt"}


def test_parts_that_moved_are_named_anew(weights, loaded, tmp_path):
    here = shutil.copytree(weights, tmp_path / "here")
    Generator.load_published(here, seconds=SECONDS, device="cpu").save(tmp_path / "base")
    here.rename(tmp_path / "there")
    with pytest.raises(FileNotFoundError, match="VAE, 44"):
        Generator.load(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Generator.load(tmp_path / "base", tmp_path / "nothing")
    again = Generator.load(tmp_path / "base", tmp_path / "there", device="cpu")
    torch.testing.assert_close(sound(again), sound(loaded))
    assert all(str(tmp_path / "there") == found.source for found in again.parts.values())


def test_half_precision_on_request(loaded, tmp_path):
    loaded.save(tmp_path / "half", bits=16)
    again = Generator.load(tmp_path / "half", device="cpu")
    assert relative(again.network.final_layer.conv.weight, loaded.network.final_layer.conv.weight) < 1e-3
    assert again.network.final_layer.conv.weight.dtype == torch.float32


def test_exported_checkpoints_are_official_ones(weights, loaded, tmp_path):
    loaded.export(tmp_path / "model_1000.pth")
    exported = torch.load(tmp_path / "model_1000.pth", weights_only=True)
    official = torch.load(weights / "Resonate_PT.pth", weights_only=True)
    assert set(exported) == set(official) - {"t_embed.freqs", "latent_rot", "text_rot"}
    assert all(torch.equal(tensor, official[name]) for name, tensor in exported.items())
    places = dict(vae=weights, vocoder=weights, text=weights, seconds=SECONDS, device="cpu")
    again = Generator.load_published(tmp_path / "model_1000.pth", part="generator_grpo", **places)
    torch.testing.assert_close(sound(again), sound(loaded))
    assert not list(tmp_path.glob(".*"))


def test_an_untrained_network_around_published_parts(weights, loaded, tmp_path):
    sizes = dict(hidden_dim=32, depth=2, fused_depth=1, num_heads=2, seconds=SECONDS, device="cpu")
    new = Generator.new_published(weights, seed=3, **sizes)
    torch.testing.assert_close(Condition(*new.network.empty_condition(1)), loaded.text([""]))
    again = Generator.new_published(weights, seed=3, **sizes)
    assert torch.equal(new.network.t_embed.mlp[0].weight, again.network.t_embed.mlp[0].weight)
    with pytest.raises(ValueError, match="latent_mean"):
        new.decode(torch.zeros(1, *new.latent_shape))
    raw = new.codec.encode(torch.randn(2, 22050))
    with torch.no_grad():
        new.network.latent_mean.copy_(raw.mean((0, 1)).view(1, 1, -1))
        new.network.latent_std.copy_(raw.std((0, 1)).view(1, 1, -1))
    assert new.encode_audio(torch.randn(1, 22050)).shape == (1, *new.latent_shape)
    new.save(tmp_path / "new")
    torch.testing.assert_close(sound(Generator.load(tmp_path / "new", device="cpu")), sound(new))


def test_published_statistics_are_used_at_the_published_width(weights, tmp_path, golden_folder, monkeypatch):
    want = json.loads((golden_folder.parent / "latent_stats.json").read_text())
    kept = json.loads((module.Path(module.__file__).with_name("latent_statistics.json")).read_text())
    for mode in ("44k", "16k"):
        assert all(kept[mode][name] == want[mode][name] for name in ("latent_mean", "latent_std"))
    folder = shutil.copytree(weights, tmp_path / "wide")
    torch.save(MelVAE("44k", hidden_dim=16).state_dict(), folder / "v1-44.pth")
    new = Generator.new_published(folder, hidden_dim=32, depth=2, fused_depth=1, num_heads=2, seconds=SECONDS, device="cpu")
    assert new.network.latent_std.flatten().tolist() == want["44k"]["latent_std"]


def rewrite(path, change):
    content = torch.load(path, weights_only=True)
    torch.save(change(content), path)


def bigger(state):
    with torch.device("meta"):
        network = FluxAudio(**miniature.FLUX | dict(text_dim=64, text_c_dim=64))
    return {name: torch.zeros(tensor.shape) for name, tensor in network.state_dict().items()}


BROKEN = {
    "renamed": ("Resonate_PT.pth", lambda s: {k.replace("fused_blocks.0.ffn", "fused_blocks.0.mlp"): v for k, v in s.items()},
                "does not fit: 3 missing .* 3 unexpected"),
    "other text encoder": ("Resonate_PT.pth", bigger, "text of 64 numbers"),
    "something else": ("Resonate_PT.pth", lambda s: {"a": torch.ones(1)}, "not the tensors of a FluxAudio"),
    "autoencoder renamed": ("v1-44.pth", lambda s: {k.replace("conv_in", "in"): v for k, v in s.items()}, "published autoencoder"),
    "autoencoder of other width": ("v1-44.pth", lambda s: MelVAE("44k", embed_dim=4, hidden_dim=16).state_dict(), "latents of 4:"),
    "autoencoder of 16 kHz": ("v1-44.pth", lambda s: MelVAE("16k", embed_dim=6, hidden_dim=16).state_dict(), "of another shape"),
    "vocoder of other size": ("bigvgan_generator.pt", lambda s: {"generator": BigVGAN(miniature.VOCODER | {
        "upsample_initial_channel": 128}).state_dict()}, "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_do_not_fit(weights, tmp_path, kind):
    name, change, words = BROKEN[kind]
    folder = shutil.copytree(weights, tmp_path / "weights")
    rewrite(folder / name, change)
    with pytest.raises(ValueError, match=words) as caught:
        Generator.load_published(folder, seconds=SECONDS, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "words"), [("Resonate_PT.pth", "Resonate_PT.pth is missing"), ("v1-44.pth", "VAE, 44.1 kHz"),
                                             ("bigvgan_generator.pt", "BigVGAN v2"), ("flan-t5-large", "FLAN-T5-large")])
def test_a_part_that_is_absent(weights, tmp_path, monkeypatch, name, words):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(weights, tmp_path / "weights")
    (folder / name).rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=words):
        Generator.load_published(folder, device="cpu")


def test_the_vocoder_without_its_configuration_is_the_published_one(weights, tmp_path):
    folder = shutil.copytree(weights, tmp_path / "weights")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="does not fit"):  # the published one is larger
        Generator.load_published(folder, seconds=SECONDS, device="cpu")


def test_both_codecs_can_lie_in_one_directory(weights, loaded, tmp_path):
    folder = shutil.copytree(weights, tmp_path / "weights")
    (folder / "MMAudio").mkdir()
    miniature.vae(folder / "MMAudio" / "v1-16.pth", "16k")
    miniature.vocoder(folder / "MMAudio", "best_netG.pt", **miniature.VOCODER_16K)
    low = Generator.load_published(folder / "Resonate_PT.pth", mode="16k", seconds=SECONDS, device="cpu")
    assert low.sample_rate == 16_000 and low.latent_shape == (15, miniature.LATENT) and sound(low)[1].shape == (2, 15 * 512)
    low.save(tmp_path / "low")
    torch.testing.assert_close(sound(Generator.load(tmp_path / "low", device="cpu")), sound(low))
    (folder / "MMAudio" / "best_netG.pt").rename(folder / "best_netG.pt")  # beside the configuration of the other vocoder
    with pytest.raises(ValueError, match="does not fit"):  # so it is taken for the published one, which is larger
        Generator.load_published(folder, mode="16k", seconds=SECONDS, device="cpu")


def test_the_codec_of_the_loader_is_the_codec_of_its_configuration(loaded):
    """generator.json's codec entry rebuilds it: every tensor fits, and both give the same sound."""
    codec = VaeCodec(**loaded.codec.config)
    codec.load_state_dict(copy.deepcopy(loaded.codec.state_dict()))
    latents = torch.randn(1, 3, miniature.LATENT)
    torch.testing.assert_close(codec.decode(latents), loaded.codec.decode(latents))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_latents(weights, loaded):
    other = Generator.load_published(weights, seconds=SECONDS)
    assert other.device.type == "cuda" and other.encode_prompts(PROMPTS).text_f.device.type == "cuda"
    latents, audio = sound(other)
    assert audio.device.type == "cpu" and relative(latents.cpu(), sound(loaded)[0]) < 1e-3
