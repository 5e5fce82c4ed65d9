"""LAION-CLAP against the package's own classes at miniature size, on files in the real format."""

import copy
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from miniature_clap import make_clap, make_miniature, make_roberta, training_checkpoint
from transformers import RobertaConfig, RobertaTokenizer

from resonate_lib.models.pretrained import PARTS
from resonate_lib.rewards import laion
from resonate_lib.rewards.base import check_result
from resonate_lib.rewards.laion import LaionClapReward

PROMPTS = ["a dog barks", "rain on a roof, then a bell", "a dog barks"]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """(checkpoint, roberta folder, the package's model, the reward read from the files)."""
    checkpoint, roberta, model = make_miniature(tmp_path_factory.mktemp("clap"))
    return checkpoint, roberta, model, LaionClapReward.load(checkpoint, roberta, device="cpu", batch_size=2)


def clips(samples: int, rate: int = 48000) -> torch.Tensor:
    """Three different sounds (3, samples), one of them beyond ±1."""
    t = torch.arange(samples) / rate
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(1))
    return torch.stack([0.3 * torch.sin(2 * torch.pi * 440 * t), 0.1 * noise, 1.3 * torch.sin(2 * torch.pi * 3000 * t**2)])


def package_audio(model: torch.nn.Module, audio: torch.Tensor) -> torch.Tensor:
    """The package's own path on (B, T) of 480,000 samples or less: NumPy quantisation, repeat-pad, its embedding call."""
    rows = []
    for row in audio.numpy():
        row = (np.clip(row, -1.0, 1.0) * 32767.0).astype(np.int16).astype(np.float32) / np.float32(32767.0)
        row = np.tile(row, int(480000 / len(row)))
        rows.append({"waveform": torch.from_numpy(np.pad(row, (0, 480000 - len(row)))), "longer": torch.tensor([False])})
    with torch.no_grad():
        return torch.cat([model.get_audio_embedding([row]) for row in rows])


@pytest.mark.parametrize("samples", [480000, 479260, 130000])
def test_audio_equals_the_package(miniature, samples):
    _, _, model, reward = miniature
    audio = clips(samples)
    got = reward.embed_audio(audio, 48000)
    assert got.shape == (3, 512) and torch.allclose(got.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert torch.allclose(got, package_audio(model, audio), atol=1e-5)
    assert (got @ got.T).fill_diagonal_(0).max() < 0.99  # else the equality would say little


def test_text_and_scores_equal_the_package(miniature):
    _, roberta, model, reward = miniature
    tokenizer = RobertaTokenizer.from_pretrained(roberta)
    options = dict(padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    long = "a bell rings " * 60
    with torch.no_grad():
        texts = torch.cat([model.get_text_embedding(tokenizer([text], **options)) for text in [*PROMPTS, long]])
    got = reward.embed_text([*PROMPTS, long])
    assert torch.allclose(got, texts, atol=1e-5) and not torch.allclose(got[0], got[1], atol=0.01)
    audio = clips(48000 * 2)
    result = check_result(reward(audio, 48000, PROMPTS), 3)
    assert torch.allclose(result.scores, (package_audio(model, audio) * texts[:3]).sum(-1), atol=1e-5)


def test_batch_equals_one_by_one_and_other_rates_are_resampled(miniature):
    reward = miniature[3]
    audio = clips(44100 * 3, 44100)
    scores = reward(audio, 44100, PROMPTS).scores
    alone = torch.cat([reward(audio[i : i + 1], 44100, PROMPTS[i : i + 1]).scores for i in range(3)])
    assert torch.allclose(scores, alone, atol=1e-5)
    at_48 = torchaudio.functional.resample(audio, 44100, 48000)
    assert torch.allclose(scores, reward(at_48, 48000, PROMPTS).scores, atol=1e-5)


def test_published_rate_takes_44100_for_44000(miniature):
    _, _, model, reward = miniature
    slip = LaionClapReward(reward.model, reward.tokenizer, published_rate=True)
    audio = clips(44100 * 3, 44100)
    want = package_audio(model, torchaudio.functional.resample(audio, 44000, 48000))
    assert torch.allclose(slip.embed_audio(audio, 44100), want, atol=1e-5)
    assert not torch.allclose(slip.embed_audio(audio, 44100), reward.embed_audio(audio, 44100), atol=1e-4)
    assert torch.allclose(slip.embed_audio(audio, 48000), reward.embed_audio(audio, 48000), atol=1e-5)


def test_quantisation_matches_the_stored_cases(golden_folder):
    case = json.loads((golden_folder / "misc.json").read_text())["int16_quantise"]
    got = laion.quantise(torch.tensor(case["inputs"]))
    assert torch.equal(got, torch.tensor(case["outputs"]))
    assert torch.equal((got * 32767).round().int(), torch.tensor(case["int16"], dtype=torch.int32))


def test_lengths_are_repeated_padded_and_cut_in_the_middle():
    ramp = torch.arange(1.0, 4.0)[None]
    assert laion.fit_clip(ramp, 8)[0].tolist() == [1, 2, 3, 1, 2, 3, 0, 0]
    assert laion.fit_clip(ramp, 3)[0].tolist() == [1, 2, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 350 samples too many is what the published rate makes of 10 s
        assert laion.fit_clip(torch.arange(480350.0)[None])[0, [0, -1]].tolist() == [175, 480174]
    with pytest.warns(UserWarning, match=r"hears 10 s.*12.00 s"):
        assert laion.fit_clip(torch.arange(576000.0)[None])[0, 0] == 48000


def test_refuses_audio_that_would_get_a_meaningless_score(miniature):
    reward = miniature[3]
    audio = clips(4800)
    audio[1, 7] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        reward(audio, 48000, PROMPTS)
    with pytest.raises(ValueError, match=r"\(clips, samples\)"):
        reward.embed_audio(torch.zeros(2, 0), 48000)


def test_loading_is_strict_and_leaves_nothing_behind(miniature, tmp_path):
    checkpoint, roberta, model, reward = miniature
    before, state = torch.get_rng_state(), model.state_dict()
    again = LaionClapReward.load(checkpoint, roberta, device="cpu")
    assert torch.equal(before, torch.get_rng_state()) and os.environ.get("NUMBA_CACHE_DIR") is None
    assert again.model.state_dict().keys() == state.keys() and not again.model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())
    folder = tmp_path / "folder"  # the published name in a folder, bare weights, tokenizer.json alone
    folder.mkdir()
    torch.save(dict(state), folder / PARTS["clap"].file)
    reward.tokenizer.save_pretrained(folder)
    RobertaConfig.from_pretrained(roberta).save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").exists()
    other = LaionClapReward.load(folder, folder, device="cpu")
    assert torch.allclose(other.embed_text(PROMPTS), reward.embed_text(PROMPTS), atol=1e-6)


def test_sizes_of_the_published_model_are_read_from_its_weights(tmp_path):
    package = laion.clap_package()
    audio_cfg = json.loads((Path(package.__file__).parent / "model_configs" / "HTSAT-base.json").read_text())["audio_cfg"]
    real = package.htsat.create_htsat_model(package.model.CLAPAudioCfp(**audio_cfg))
    state = {f"audio_branch.{name}": tensor for name, tensor in real.state_dict().items()}
    assert laion.audio_sizes(state) == {"embed_dim": 128, "depths": [2, 2, 12, 2], "num_heads": [4, 8, 16, 32]}


class Code:
    """Unpickled unsafely, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_bad_checkpoints_are_refused_in_one_line(miniature, tmp_path):
    checkpoint, roberta, model, _ = miniature
    bad, mark = tmp_path / "bad.pt", tmp_path / "mark"

    def refused(kind=ValueError, folder=roberta) -> str:
        with pytest.raises(kind) as caught:
            LaionClapReward.load(bad, folder, device="cpu")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        return str(caught.value)

    assert "bad.pt" in refused(FileNotFoundError)
    torch.save(training_checkpoint(model) | {"hook": Code(mark)}, bad)
    assert "holds code" in refused() and not mark.exists()
    bad.write_bytes(checkpoint.read_bytes()[:100_000])
    assert "cut off or damaged" in refused()
    bad.write_bytes(b"")
    assert "is empty" in refused()
    bad.write_text("<html>404</html>")
    assert "is a web page" in refused()
    content = training_checkpoint(model)
    content["state_dict"]["module.audio_branch.patch_embed.mel_conv2d.weight"] = torch.zeros(1)
    torch.save(content, bad)
    assert "fusion" in refused()
    content = training_checkpoint(model)
    del content["state_dict"]["module.text_projection.2.bias"]
    torch.save(content, bad)
    assert "text_projection.2.bias" in refused()
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, bad)
    assert "not a LAION-CLAP" in refused()
    torch.save(training_checkpoint(model), bad)
    config = RobertaConfig.from_pretrained(roberta)
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path / "deeper")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "deeper" / name).write_bytes((roberta / name).read_bytes())
    assert "encoder.layer.1" in refused(folder=tmp_path / "deeper")


def test_a_tokenizer_that_is_not_whole_is_refused(miniature, tmp_path):
    checkpoint, roberta, *_ = miniature
    config = RobertaConfig.from_pretrained(roberta)
    config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        LaionClapReward.load(checkpoint, tmp_path, device="cpu")
    (tmp_path / "vocab.json").write_text('{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="5 entries"):
        LaionClapReward.load(checkpoint, tmp_path, device="cpu")


def without_network(code: str, folder: Path, limit: int) -> str:
    """What a fresh Python prints that runs code in folder while every connection is refused at once and recorded."""
    guard = """
        import socket, sys
        def refuse(*args, **keys):
            raise SystemExit(f"asked the network: {args}")
        socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(guard) + textwrap.dedent(code)],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "HF_HOME": str(folder / "hub")},
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_fresh_process_loads_without_asking_the_network(miniature, tmp_path):
    checkpoint, roberta, _, reward = miniature
    printed = without_network(
        f"""
        import sys, torch
        from resonate_lib.rewards.laion import LaionClapReward
        assert "clap_module" not in sys.modules and "transformers" not in sys.modules  # imported when needed
        reward = LaionClapReward.load({str(checkpoint)!r}, {str(roberta)!r}, device="cpu")
        assert "laion_clap" not in sys.modules
        print(reward.embed_text(["a dog barks"])[0, :4].tolist())
        """,
        tmp_path,
        limit=120,
    )
    assert json.loads(printed) == pytest.approx(reward.embed_text(["a dog barks"])[0, :4].tolist(), abs=1e-5)


@pytest.mark.slow
def test_equals_the_whole_package_in_its_own_process(tmp_path):
    """The package's CLAP_Module, import and all, at the smallest size it offers, against ours on the same files."""
    sizes = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [4, 8, 16, 32]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_clap(make_roberta(tmp_path / "roberta-base"), sizes)
    torch.save(training_checkpoint(model), tmp_path / "clap.pt")
    copy.deepcopy(model.text_branch).save_pretrained(tmp_path / "roberta-base")
    audio = clips(130000)
    np.save(tmp_path / "audio.npy", audio.numpy())
    without_network(
        f"""
        import os
        os.environ["HF_HUB_OFFLINE"] = "1"
        import laion_clap, numpy
        clap = laion_clap.CLAP_Module(enable_fusion=False, amodel="HTSAT-tiny", device="cpu")
        clap.load_ckpt("clap.pt", verbose=False)
        numpy.save("sounds.npy", clap.get_audio_embedding_from_data(numpy.load("audio.npy")))
        numpy.save("texts.npy", clap.get_text_embedding({PROMPTS!r}))
        """,
        tmp_path,
        limit=300,
    )
    reward = LaionClapReward.load(tmp_path / "clap.pt", tmp_path / "roberta-base", device="cpu")
    sounds, texts = (torch.from_numpy(np.load(tmp_path / f"{name}.npy")) for name in ("sounds", "texts"))
    assert torch.allclose(reward.embed_audio(audio, 48000), sounds, atol=1e-5)
    assert torch.allclose(reward.embed_text(PROMPTS), texts, atol=1e-5)
