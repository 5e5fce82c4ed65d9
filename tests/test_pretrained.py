"""Where published weights come from: places, the hub's cache, downloads only when asked for; reading and strict loading."""

import hashlib
import json
import os
import socket
import time
from pathlib import Path

import huggingface_hub.constants
import miniature
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from resonate_lib import doctor
from resonate_lib.models import pretrained
from resonate_lib.models.flux_audio import FluxAudio, fluxaudio_m_44k
from resonate_lib.models.pretrained import PARTS, flux_config, load_strict, locate, read_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def hub(tmp_path_factory, monkeypatch):
    """An empty hub cache and a network that must not be asked; returns the cache's folder."""
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked for {args}")

    cache = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("get_hf_file_metadata", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    return cache


def cached(cache: Path, hub: str, *files: str) -> Path:
    """Files of a repository as huggingface_hub keeps them; returns the snapshot's folder."""
    repository = cache / f"models--{hub.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in files:
        path = repository / "snapshots" / COMMIT / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return repository / "snapshots" / COMMIT


def model_folder(folder: Path, *, without: str = "") -> Path:
    folder.mkdir(parents=True)
    for name in {"config.json", "model.safetensors", "tokenizer.json"} - {without}:
        (folder / name).write_text("{}")
    return folder


# ---- places ---------------------------------------------------------------
def test_the_parts_are_those_of_the_published_system():
    ids = {name: (part.hub, part.file) for name, part in PARTS.items()}
    assert ids["generator_pt"] == ("AndreasXi/Resonate", "Resonate_PT.pth")
    assert ids["generator_grpo"] == ("AndreasXi/Resonate", "Resonate_GRPO.pth")
    assert ids["vae_44k"] == ("hkchengrex/MMAudio", "ext_weights/v1-44.pth")
    assert ids["vae_16k"] == ("hkchengrex/MMAudio", "ext_weights/v1-16.pth")
    assert ids["vocoder_44k"] == ("nvidia/bigvgan_v2_44khz_128band_512x", "bigvgan_generator.pt")
    assert ids["t5"] == ("google/flan-t5-large", "") and ids["roberta"] == ("roberta-base", "")
    assert ids["clap"] == ("lukewys/laion_clap", "music_speech_audioset_epoch_15_esc_89.98.pt")
    judges = {"Qwen/Qwen2.5-Omni-7B", "Qwen/Qwen2-Audio-7B-Instruct", "Qwen/Qwen3-Omni-30B-A3B-Instruct"}
    assert judges <= {part.hub for part in PARTS.values()}
    assert all(part.gigabytes > 0 and part.licence and part.url.startswith("https://") for part in PARTS.values())


@pytest.mark.parametrize("place", ["v1-44.pth", "ext_weights/v1-44.pth", "MMAudio/v1-44.pth", "MMAudio/ext_weights/v1-44.pth"])
def test_a_file_is_found_in_a_directory(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    (tmp_path / "model.pth").write_bytes(b"another")
    for found in (locate("vae_44k", tmp_path), locate("vae_44k", str(path)), locate("vae_44k", beside=tmp_path),
                  locate("vae_44k", beside=tmp_path / "model.pth")):
        assert found.path == path and found.files == [path]
        assert found.sha256 == {"v1-44.pth": hashlib.sha256(b"weights").hexdigest()}


def test_a_file_may_have_any_name_and_brings_what_lies_beside_it(tmp_path):
    (tmp_path / "mine.bin").write_text("x")
    (tmp_path / "config.json").write_text("{}")
    assert set(locate("vocoder_44k", tmp_path / "mine.bin").sha256) == {"mine.bin", "config.json"}


@pytest.mark.parametrize("name", ["flan-t5-large", "."])
def test_a_model_folder_is_found_in_a_directory_or_is_it(tmp_path, name):
    folder = model_folder(tmp_path / "weights" / name if name != "." else tmp_path / "weights")
    found = locate("t5", tmp_path / "weights")
    assert found.path == folder.resolve() and set(found.sha256) == {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_model_folder_that_is_not_whole_is_not_taken(tmp_path):
    for missing, words in (("tokenizer.json", "a tokenizer"), ("model.safetensors", "pytorch_model"), ("config.json", "config")):
        folder = model_folder(tmp_path / missing / "flan-t5-large", without=missing)
        assert words in pretrained.lacking(folder)
        with pytest.raises(FileNotFoundError, match=words):
            locate("t5", folder.parent)
    folder = model_folder(tmp_path / "shards" / "Qwen2.5-Omni-7B", without="model.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors \(1 of 2 shards\)"):
        locate("qwen25_omni", folder.parent)


def test_a_missing_part_says_what_it_is_and_where_to_put_it(tmp_path):
    for source in (None, tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            locate("vae_44k", source)
        text = str(caught.value)
        for words in ("VAE", "v1-44.pth", "1.2 GB", "MIT", "https://huggingface.co/hkchengrex/MMAudio", "put it "):
            assert words in text
        assert "\n" not in text and (source is None or str(tmp_path) in text)


@pytest.mark.parametrize(("part", "source", "words"), [
    ("vae_44k", "./nowhere/v1-44.pth", "no such file or folder"), ("vae_44k", "nowhere", "no hub id"), ("vaes", None, "allowed"),
    ("clap", "weights/clap.pt", "no such file or folder"), ("t5", "here/flan", "no such file or folder")])
def test_a_source_that_is_nothing(tmp_path, monkeypatch, part, source, words):
    """The hub, which refuses to be asked here, is not: also not for what could be an id, but is a path."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        locate(part, source)


def test_a_file_cannot_stand_for_a_model_folder(tmp_path):
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(FileNotFoundError, match="is a folder with config"):
        locate("t5", tmp_path / "model.safetensors")


def test_a_file_of_a_general_name_has_its_own_folder(tmp_path):
    """AudioBox-Aesthetics' model.safetensors, beside others; RoBERTa's tokenizer needs no weights."""
    assert PARTS["aesthetics"].place == "audiobox-aesthetics/model.safetensors"
    path = tmp_path / PARTS["aesthetics"].place
    path.parent.mkdir()
    for file in (path, path.with_name("config.json"), tmp_path / "config.json"):
        file.write_text("{}")
    for found in (locate("aesthetics", tmp_path), locate("aesthetics", path.parent), locate("aesthetics", beside=tmp_path)):
        assert found.path == path and set(found.sha256) == {"model.safetensors", "config.json"}
    assert pretrained.beside("facebook/audiobox-aesthetics", tmp_path) == str(path)
    assert locate("roberta", model_folder(tmp_path / "roberta", without="model.safetensors")).path.name == "roberta"
    with pytest.raises(FileNotFoundError, match="a tokenizer"):
        locate("roberta", model_folder(tmp_path / "untold", without="tokenizer.json"))


# ---- the hub --------------------------------------------------------------
def test_the_cache_is_enough_and_names_its_commit(hub):
    snapshot = cached(hub, "hkchengrex/MMAudio", "ext_weights/v1-44.pth", "other.pth")
    for source in (None, "hkchengrex/MMAudio"):
        found = locate("vae_44k", source)
        assert found.path == snapshot / "ext_weights/v1-44.pth" and found.source == f"hkchengrex/MMAudio@{COMMIT}"
    assert locate("vae_44k", "hkchengrex/MMAudio/other.pth").path == snapshot / "other.pth"
    snapshot = cached(hub, "google/flan-t5-large", "config.json", "model.safetensors", "tokenizer.json")
    found = locate("t5")
    assert found.path == snapshot and found.source == f"google/flan-t5-large@{COMMIT}"


def test_nothing_is_downloaded_unless_the_user_names_the_hub_id(monkeypatch):
    with pytest.raises(FileNotFoundError, match="or name the hub id 'google/flan-t5-large'"):
        locate("t5")
    with pytest.raises(FileNotFoundError, match="local cache"):
        locate("t5", "google/flan-t5-large", download=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        locate("t5", "google/flan-t5-large")


def test_a_named_hub_id_is_downloaded(hub, monkeypatch, capsys):
    asked = []

    def fetch(repository, name, **_):
        asked.append(name)
        return str(cached(hub, repository, name) / name)

    def fetch_all(repository, *, allow_patterns, **_):
        asked.append(tuple(allow_patterns))
        return str(cached(hub, repository, "config.json", "model.safetensors", "spiece.model"))

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch_all)
    assert locate("vocoder_44k", "me/vocoder/g.pt").source == f"me/vocoder@{COMMIT}"
    assert locate("t5", "me/t5").path.name == COMMIT
    assert asked[:2] == ["config.json", "g.pt"] and "*.safetensors" in asked[2]
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked[2])
    assert "downloading text encoder FLAN-T5-large from me/t5: about 3.1 GB, Apache-2.0" in capsys.readouterr().out


def test_a_silent_network_is_given_up_quickly(monkeypatch):
    """The server accepts and never answers; huggingface_hub by itself would try again for minutes."""
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pretrained, "TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/file"
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *_: url)
        began = time.monotonic()
        with pytest.raises(FileNotFoundError, match="could not be downloaded") as caught:
            locate("vae_44k", "me/nothing-of-this-name")
    assert time.monotonic() - began < 20 and "\n" not in str(caught.value)


def test_a_checksum_is_computed_once_and_again_when_the_file_changes(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"one")
    before = pretrained._sha256.cache_info().misses
    assert pretrained.sha256(path) == pretrained.sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert pretrained._sha256.cache_info().misses == before + 1
    path.write_bytes(b"another")
    assert pretrained.sha256(path) == hashlib.sha256(b"another").hexdigest()


# ---- for the run record ---------------------------------------------------
def test_what_a_loaded_source_was_read_from(hub, tmp_path, monkeypatch):
    """A part in a directory, or in the hub's cache under its own id or another; a model that is no part; a server."""
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.file_download.constants, "HF_HUB_OFFLINE", True)
    empty = hashlib.sha256(b"{}").hexdigest()
    cached(hub, "facebook/audiobox-aesthetics", "model.safetensors", "config.json", "checkpoint.pt")
    cached(hub, "me/clap", "mine.pt")
    cached(hub, "me/judge", "config.json", "model.safetensors", "modeling.py")
    model_folder(tmp_path / "weights" / "roberta-base")
    assert pretrained.provenance("facebook/audiobox-aesthetics", "aesthetics") == {
        "source": f"facebook/audiobox-aesthetics@{COMMIT}", "sha256": {"model.safetensors": empty, "config.json": empty}}
    assert pretrained.provenance("me/clap/mine.pt", "clap") == {"source": f"me/clap@{COMMIT}", "sha256": {"mine.pt": empty}}
    assert pretrained.provenance(str(tmp_path / "weights"), "roberta") == {
        "source": str(tmp_path / "weights"), "sha256": {"config.json": empty, "tokenizer.json": empty}}
    files = {"config.json": empty, "model.safetensors": empty}
    snapshot = str(hub / "models--me--judge" / "snapshots" / COMMIT)
    assert pretrained.provenance("me/judge") == {"source": f"me/judge@{COMMIT}", "sha256": files}
    assert pretrained.provenance(snapshot) == {"source": snapshot, "sha256": files}
    assert pretrained.provenance("http://host:8000/v1#judge") == {"source": "http://host:8000/v1#judge", "sha256": {}}


# ---- reading --------------------------------------------------------------
class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-200])
    return path


def saved(path: Path, content, **kwargs) -> Path:
    torch.save(content, path, **kwargs)
    return path


def written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def safe(path: Path) -> Path:
    save_file({"a": torch.ones(400)}, path)
    return path


OLD = {"_use_new_zipfile_serialization": False}
BAD = {
    "code": (lambda d: saved(d / "x.pth", {"a": Code()}), r"holds code \(\w+\.system\)"),
    "code beside tensors": (lambda d: saved(d / "x.pt", {"state_dict": {"a": torch.ones(2)}, "args": Code()}), "holds code"),
    "old format with code": (lambda d: saved(d / "x.pth", {"a": Code()}, **OLD), "holds code"),
    "cut off": (lambda d: cut(saved(d / "x.pth", {"a": torch.ones(400)})), "cut off or damaged"),
    "old format, cut off": (lambda d: cut(saved(d / "x.pth", {"a": torch.ones(400)}, **OLD)), "cut off"),
    "safetensors, cut off": (lambda d: cut(safe(d / "x.safetensors")), "no whole safetensors file"),
    "web page": (lambda d: written(d / "x.pth", "\n<!DOCTYPE html><html>404</html>"), "web page"),
    "pointer": (lambda d: written(d / "x.pth", "version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git-lfs"),
    "text": (lambda d: written(d / "x.pth", "hello, this is text"), "not a weight file|damaged"),
    "empty": (lambda d: written(d / "x.pth", ""), "is empty"),
    "folder": (lambda d: d, "is a folder"),
    "no tensors": (lambda d: saved(d / "x.pth", {"epoch": 3, "state_dict": {}}), "holds no tensors by name"),
    "a tensor": (lambda d: saved(d / "x.pth", torch.ones(2)), "holds a Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_weight_file_is_one_clear_line(tmp_path, monkeypatch, kind):
    make, words = BAD[kind]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        read_weights(make(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"generator": s}, lambda s: {"model": s, "optimizer": {}}, lambda s: {"it": 5, "weights": s},
    lambda s: {"epoch": 1, "best": np.float64(0.3), "state_dict": {f"module.{k}": v for k, v in s.items()}},
    lambda s: {"state_dict": {"model": s}}])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_taken_out_of_what_real_files_wrap_them_in(tmp_path, wrap, zipped):
    state = {"a.weight": torch.randn(2, 3), "module_b": torch.arange(3).half()}
    read = read_weights(saved(tmp_path / "x.pt", wrap(state), _use_new_zipfile_serialization=zipped))
    assert list(read) == list(state) and all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in state.items())


def test_safetensors_are_read(tmp_path):
    assert torch.equal(read_weights(safe(tmp_path / "x.safetensors"))["a"], torch.ones(400))


# ---- strict loading -------------------------------------------------------
def test_every_difference_is_counted_and_the_first_named():
    state = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(4), "extra": torch.ones(1), "more": torch.ones(1)}
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_strict(module, state, "x.pth")
    assert str(caught.value) == ("x.pth does not fit: 2 missing (1.weight, …); 2 unexpected (extra, …); 1 of another shape "
                                 "(0.bias); 0.bias is (4,) in the file and (3,) here")
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())


def test_a_network_of_another_size_is_said_in_its_own_terms(tmp_path):
    miniature.flux(tmp_path / "x.pth")
    with torch.device("meta"):
        network = FluxAudio(**miniature.FLUX | dict(hidden_dim=64, depth=4))
    with pytest.raises(ValueError, match=r"the file has hidden 32, depth 3 \(1 fused\), .* this network hidden 64, depth 4"):
        load_strict(network, read_weights(tmp_path / "x.pth"), "x.pth")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_published_checkpoint_loads_in_float32_whatever_it_is_stored_in(tmp_path, device):
    original = miniature.flux(tmp_path / "x.pth")
    state = {key: tensor.bfloat16() for key, tensor in read_weights(tmp_path / "x.pth").items()}
    assert "latent_rot" in state and "t_embed.freqs" in state  # dropped by the loader
    with torch.device(device):
        network = FluxAudio(**miniature.FLUX)
    assert load_strict(network, state, "x.pth") is network
    for (name, got), want in zip(network.named_parameters(), original.parameters(), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want.bfloat16().float()), name
        assert got.requires_grad == want.requires_grad


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    miniature.flux(tmp_path / "x.pth")
    with torch.device("meta"):
        network = FluxAudio(**miniature.FLUX)
    load_strict(network, read_weights(tmp_path / "x.pth"), "x.pth")
    before = network.final_layer.conv.weight.clone()
    with open(tmp_path / "x.pth", "r+b") as file:
        file.write(b"\0" * (tmp_path / "x.pth").stat().st_size)
    assert torch.equal(network.final_layer.conv.weight, before)


# ---- sizes ----------------------------------------------------------------
@pytest.mark.parametrize("overrides", [{}, dict(hidden_dim=48, num_heads=3, depth=5, fused_depth=0, mlp_ratio=4.0),
                                       dict(hidden_dim=96, num_heads=2, mlp_ratio=9.5, text_seq_len=40)])
def test_sizes_are_read_from_the_tensors(tmp_path, overrides):
    network = miniature.flux(tmp_path / "x.pth", **overrides)
    config = flux_config(read_weights(tmp_path / "x.pth"))
    with torch.device("meta"):
        again = FluxAudio(**config, latent_seq_len=430)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    expected = {**miniature.FLUX, **overrides}
    assert all(config[key] == expected[key] for key in ("depth", "fused_depth", "num_heads", "hidden_dim", "text_seq_len"))


def test_tensors_of_something_else_have_no_sizes(tmp_path):
    miniature.vae(tmp_path / "v1-44.pth")
    with pytest.raises(ValueError, match="not the tensors of a FluxAudio: 'audio_input_proj"):
        flux_config(read_weights(tmp_path / "v1-44.pth"))


def test_the_published_network_is_recognised_at_full_size(golden_folder):
    path = golden_folder.parent / "flux_audio_m_44k.keys.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with torch.device("meta"):
        state = {name: torch.empty(entry["shape"]) for name, entry in json.loads(path.read_text())["tensors"].items()}
        network, own = FluxAudio(**flux_config(state), latent_seq_len=430), fluxaudio_m_44k()
    assert len(state) == 770 and sum(tensor.numel() for tensor in state.values()) == 468_285_432
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert load_strict(own, state, "Resonate_PT.pth") is own


# ---- doctor ---------------------------------------------------------------
def test_doctor_has_a_line_for_every_part(hub):
    cached(hub, "lukewys/laion_clap", PARTS["clap"].file)
    rows = {row.name: row for row in doctor.published()}
    assert list(rows) == list(PARTS) and all("\n" not in row.found + row.remedy for row in rows.values())
    assert rows["clap"].state == "ok" and COMMIT in rows["clap"].found
    assert rows["vae_44k"].state == "note" and "1.2 GB, MIT" in rows["vae_44k"].found and "v1-44.pth" in rows["vae_44k"].remedy


def test_doctor_looks_where_the_profile_says(tmp_path, monkeypatch, capsys):
    weights = tmp_path / "weights"
    model_folder(weights / "flan-t5-large")
    (weights / "Resonate_GRPO.pth").write_text("x")
    (tmp_path / "paper.yaml").write_text(f"suite: {{weights: {weights}}}\nreward: {{lalm_source: {tmp_path}/Qwen2.5-Omni-7B}}\n")
    model_folder(tmp_path / "Qwen2.5-Omni-7B")
    monkeypatch.setenv("RESONATE_PARAMS", str(tmp_path))
    rows = {row.name: row for row in doctor.published()}
    assert {name for name, row in rows.items() if row.state == "ok"} == {"t5", "generator_grpo", "qwen25_omni"}
    assert rows["vae_44k"].remedy.endswith(f"MMAudio/resolve/main/ext_weights/v1-44.pth -> {weights}/v1-44.pth")
    doctor.main()
    assert "3 of 18 published parts are here" in capsys.readouterr().out
