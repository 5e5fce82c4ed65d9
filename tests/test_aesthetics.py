"""AudioBox-Aesthetics at miniature size on the official file formats, against numbers of the official package."""

import json

import pytest
import torch
import torchaudio
from conftest import recipe
from safetensors.torch import save_file

from resonate_lib.evaluation import aesthetics
from resonate_lib.evaluation.aesthetics import AXES, Aesthetics

WIDTH, INNER, HEADS, LAYERS, CHANNELS, KERNEL, GROUPS = 32, 48, 4, 2, 8, 16, 4
TRANSFORM = {axis: {"mean": 5.0 + 0.5 * i, "std": 1.0 + 0.25 * i} for i, axis in enumerate(AXES)}
SETTINGS = {
    "proj_num_layer": 2,
    "proj_ln": True,
    "proj_act_fn": "gelu",
    "proj_dropout": 0.1,
    "nth_layer": LAYERS + 1,
    "use_weighted_layer_sum": True,
    "precision": "bf16",
    "normalize_embed": True,
    "output_dim": 1,
}
# The official package (0.0.4) on these weights and `clips(16000 * 13)`: its numbers, each axis for the two clips.
OFFICIAL = {
    "CE": [5.754550457, 5.891232967],
    "CU": [6.074430466, 5.924309254],
    "PC": [6.036701679, 5.736421585],
    "PQ": [6.589656353, 6.534771919],
}


def official_tensors() -> dict[str, torch.Tensor]:
    """A state dict under the official names, filled by the recipe."""
    shapes = {"mask_emb": (WIDTH,), "layer_norm.weight": (CHANNELS,), "layer_norm.bias": (CHANNELS,)}
    for i, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        shapes[f"feature_extractor.conv_layers.{i}.0.weight"] = (CHANNELS, CHANNELS if i else 1, kernel)
    norms = ["feature_extractor.conv_layers.0.2", "encoder.layer_norm"]
    linears = {"post_extract_proj": (WIDTH, CHANNELS)}
    shapes["encoder.pos_conv.0.bias"] = (WIDTH,)
    shapes["encoder.pos_conv.0.weight_g"] = (1, 1, KERNEL)
    shapes["encoder.pos_conv.0.weight_v"] = (WIDTH, WIDTH // GROUPS, KERNEL)
    shapes["encoder.layers.0.self_attn.relative_attention_bias.weight"] = (320, HEADS)
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}."
        shapes[layer + "self_attn.grep_a"] = (1, HEADS, 1, 1)
        linears |= {f"{layer}self_attn.{name}_proj": (WIDTH, WIDTH) for name in ("k", "v", "q", "out")}
        linears |= {layer + "self_attn.grep_linear": (8, WIDTH // HEADS)}
        linears |= {layer + "fc1": (INNER, WIDTH), layer + "fc2": (WIDTH, INNER)}
        norms += [layer + "self_attn_layer_norm", layer + "final_layer_norm"]
    for name in norms:
        size = CHANNELS if "conv_layers" in name else WIDTH
        shapes |= {name + ".weight": (size,), name + ".bias": (size,)}
    for name, shape in linears.items():
        shapes |= {name + ".weight": shape, name + ".bias": shape[:1]}
    shapes = {f"wavlm_model.{name}": shape for name, shape in shapes.items()}
    for axis in AXES:
        shapes[f"layer_weights.{axis}"] = (LAYERS + 1,)
        for place, out in ((0, WIDTH), (4, 1)):  # linear, norm, GELU, dropout, linear
            shapes[f"proj_layer.{axis}.{place}.weight"] = (out, WIDTH)
            shapes[f"proj_layer.{axis}.{place}.bias"] = (out,)
        shapes |= {f"proj_layer.{axis}.1.weight": (WIDTH,), f"proj_layer.{axis}.1.bias": (WIDTH,)}
    return {name: _fill(name, shape) for name, shape in shapes.items()}


def _fill(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    x = recipe("aesthetics/" + name, shape)
    if name.endswith(("weight_g", "grep_a")):
        return 1 + 0.1 * x
    if len(shape) == 1:
        return 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
    return x if "layer_weights" in name else 1.5 * x / x[0].numel() ** 0.5


def clips(samples: int) -> torch.Tensor:
    """Two sounds (2, samples) at 16 kHz: a warbling tone and noise that swells."""
    t = torch.arange(samples, dtype=torch.float64) / 16000
    tone = 0.5 * torch.sin(2 * torch.pi * (300 * t + 20 * torch.sin(3 * t)))
    return torch.stack([tone.float(), (0.05 * t).float() * recipe("aesthetics/noise", (samples,))])


def write(folder):
    """config.json with model.safetensors, as the hub holds them, and the older checkpoint.pt."""
    folder.mkdir(exist_ok=True)
    state = official_tensors()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS | {"target_transform": TRANSFORM, "freeze_encoder": True}))
    older = {"state_dict": {f"model.{name}": x for name, x in state.items()}, "target_transform": TRANSFORM}
    torch.save(older | {"model_cfg": SETTINGS}, folder / "checkpoint.pt")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("aesthetics"))


def stacked(scores: dict[str, torch.Tensor]) -> torch.Tensor:
    assert list(scores) == list(AXES) and all(x.dtype == torch.float32 for x in scores.values())
    return torch.stack(list(scores.values()))


def test_equals_stored_numbers_of_the_official_package(folder):
    got = stacked(Aesthetics.load(folder, device="cpu").scores(clips(16000 * 13), 16000))
    assert torch.allclose(got, torch.tensor(list(OFFICIAL.values())), atol=2e-5)


@pytest.mark.parametrize("samples", [16000 * 25, 160000, 160001, 16000 * 4, 30000])
def test_equals_the_official_package(folder, samples, monkeypatch):
    aes = pytest.importorskip("audiobox_aesthetics.model.aes")
    infer = pytest.importorskip("audiobox_aesthetics.infer")
    sizes = {
        "encoder_layers": LAYERS,
        "encoder_embed_dim": WIDTH,
        "encoder_ffn_embed_dim": INNER,
        "encoder_attention_heads": HEADS,
        "conv_feature_layers": f"[({CHANNELS},10,5)] + [({CHANNELS},3,2)] * 4 + [({CHANNELS},2,2)] * 2",
        "conv_pos": KERNEL,
        "conv_pos_groups": GROUPS,
    }
    monkeypatch.setattr(aes, "DEFAULT_AUDIO_CFG", aes.WavLMConfig(aes.DEFAULT_AUDIO_CFG.__dict__ | sizes))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    audio = clips(samples)
    predictor = infer.AesPredictor(str(folder / "checkpoint.pt"))
    rows = predictor.forward([{"path": clip[None], "sample_rate": 16000} for clip in audio])
    want = torch.tensor([[row[axis] for row in rows] for axis in AXES])
    got = stacked(Aesthetics.load(folder, device="cpu").scores(audio, 16000))
    assert torch.allclose(got, want, atol=2e-5)


def test_both_official_files_give_the_same_scores(folder):
    audio, load = clips(16000 * 2), lambda source: Aesthetics.load(source, device="cpu").scores(audio, 16000)
    first = stacked(load(folder))
    assert torch.equal(stacked(load(folder / "checkpoint.pt")), first)
    assert torch.equal(stacked(load(folder / "model.safetensors")), first)


def test_batch_equals_one_by_one_whatever_the_batch_size(folder):
    audio = torch.cat([clips(16000 * 11), clips(16000 * 11).flip(1)])
    together = stacked(Aesthetics.load(folder, device="cpu").scores(audio, 16000))
    split = Aesthetics.load(folder, device="cpu", batch_size=3)
    alone = torch.cat([stacked(split.scores(clip[None], 16000)) for clip in audio], dim=1)
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, stacked(split.scores(audio, 16000)), atol=1e-5)
    assert together.std(dim=1).min() > 0.01  # the clips differ, or equality would say little


def test_windows_are_averaged_by_their_length(folder):
    model = Aesthetics.load(folder, device="cpu")
    audio = clips(16000 * 14)
    parts = [stacked(model.scores(part, 16000)) for part in audio.split(160000, dim=1)]
    assert torch.allclose(stacked(model.scores(audio, 16000)), (10 * parts[0] + 4 * parts[1]) / 14, atol=1e-5)


def test_other_rates_are_resampled(folder):
    model, audio = Aesthetics.load(folder, device="cpu"), clips(44100 * 3)
    want = stacked(model.scores(torchaudio.functional.resample(audio, 44100, 16000), 16000))
    assert torch.allclose(stacked(model.scores(audio, 44100)), want, atol=1e-5)


def test_every_official_name_has_its_place():
    """The published size: 12 layers of 768, and no name left over or made twice."""
    names = [f"wavlm_model.encoder.layers.{i}.self_attn.{part}" for i in range(12) for part in ("grep_a", "q_proj.weight")]
    assert len({aesthetics.rename(name) for name in names}) == 24
    state = {aesthetics.rename(f"model.{name}"): tensor for name, tensor in official_tensors().items()}
    config = aesthetics.wavlm_config(state)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (WIDTH, LAYERS, HEADS)
    assert (config.intermediate_size, config.num_conv_pos_embedding_groups) == (INNER, GROUPS)
    assert aesthetics.build_predictor(state, SETTINGS).state_dict().keys() == state.keys()


def test_wrong_files_are_refused_in_one_line(folder, tmp_path):
    def refused(source, kind=ValueError) -> str:
        with pytest.raises(kind) as caught:
            Aesthetics.load(source, device="cpu")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "model.safetensors is missing" in refused(tmp_path, FileNotFoundError)
    state, config = official_tensors(), json.loads((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors")
    assert "config.json" in refused(tmp_path, FileNotFoundError)
    (tmp_path / "config.json").write_text(json.dumps(config | {"proj_num_layer": 1}))
    assert "proj_layer" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_weighted_layer_sum": False}))
    assert "use_weighted_layer_sum" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    assert "target_transform" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: x for name, x in state.items() if "grep_a" not in name}, tmp_path / "model.safetensors")
    assert "gru_rel_pos_const" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    assert "no whole safetensors file" in refused(tmp_path)
    torch.save({"state_dict": state, "model_cfg": print, "target_transform": TRANSFORM}, tmp_path / "checkpoint.pt")
    assert "holds code" in refused(tmp_path / "checkpoint.pt")


def test_audio_that_is_not_finite_is_refused(folder):
    audio = clips(16000)
    audio[0, 5] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        Aesthetics.load(folder, device="cpu").scores(audio, 16000)
