"""LAION-CLAP at full size: the published CLAP reward, and unit vectors of sound and text that evaluation uses too.

The network is the `laion-clap` package's own; its import, its hub access and its way of reading files are not used: it
fetches three tokenizers when imported and unpickles whatever a checkpoint holds. Files are read with weights_only.
Source: LAION-CLAP (arXiv 2211.06687), checkpoint `music_speech_audioset_epoch_15_esc_89.98.pt` of `lukewys/laion_clap`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F

from resonate_lib.models.pretrained import PARTS, locate, read_weights
from resonate_lib.rewards.base import LONGEST_TRIM, RewardResult

SAMPLE_RATE = 48000  # Hz
CLIP_SAMPLES = 480_000  # 10 s: the only length the network hears
MAX_TOKENS = 77


def clap_state(path: Path) -> dict[str, Tensor]:
    """The weights in a LAION-CLAP checkpoint, without the position numbers that older transformers stored."""
    return {name: tensor for name, tensor in read_weights(path).items() if name != "text_branch.embeddings.position_ids"}


def clap_package() -> ModuleType:
    """The package's `clap_module`, imported without `laion_clap` itself, under the name that it uses for it.

    Raises ModuleNotFoundError where laion-clap is not installed.
    """
    if "clap_module" in sys.modules:
        return sys.modules["clap_module"]
    package = importlib.util.find_spec("laion_clap")
    if package is None:
        raise ModuleNotFoundError("no laion-clap: pip install laion-clap==1.1.7 torchvision")
    folder = Path(package.submodule_search_locations[0]) / "clap_module"
    spec = importlib.util.spec_from_file_location(
        "clap_module", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["clap_module"] = module
    cache = os.environ.get("NUMBA_CACHE_DIR")
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for name in [name for name in sys.modules if name.split(".")[0] == "clap_module"]:
            del sys.modules[name]
        raise
    finally:  # it sends Numba's cache, which is code, to a folder that all users share
        os.environ.pop("NUMBA_CACHE_DIR", None)
        os.environ.update({} if cache is None else {"NUMBA_CACHE_DIR": cache})
    return module


def audio_sizes(state: dict[str, Tensor]) -> dict:
    """Width, depths and heads of the HTSAT whose weights these are, as its constructor takes them."""
    blocks = [re.match(r"audio_branch\.layers\.(\d+)\.blocks\.(\d+)\.", name) for name in state]
    places = {(int(block[1]), int(block[2])) for block in blocks if block}
    layers = 1 + max(layer for layer, _ in places)
    table = "audio_branch.layers.{}.blocks.0.attn.relative_position_bias_table"
    return {
        "embed_dim": state["audio_branch.patch_embed.proj.weight"].shape[0],
        "depths": [sum(place[0] == layer for place in places) for layer in range(layers)],
        "num_heads": [state[table.format(layer)].shape[1] for layer in range(layers)],
    }


def build_clap(state: dict[str, Tensor], text_config) -> nn.Module:
    """The package's CLAP (HTSAT and RoBERTa, no fusion) with these weights, every one of them used; float32, frozen.

    The HTSAT is as large as the weights say, the RoBERTa as text_config says (768 wide: the package fixes that).
    Raises ValueError for weights of another kind of model.
    """
    if "audio_branch.patch_embed.mel_conv2d.weight" in state:
        raise ValueError("a fusion checkpoint of LAION-CLAP: use one without fusion, such as " + PARTS["clap"].file)
    if not {"audio_branch.patch_embed.proj.weight", "text_branch.embeddings.word_embeddings.weight"} <= state.keys():
        raise ValueError(f"not a LAION-CLAP checkpoint with HTSAT and RoBERTa: it begins with {list(state)[:2]}")
    package, sizes = clap_package(), audio_sizes(state)
    config = json.loads((Path(package.__file__).parent / "model_configs" / "HTSAT-base.json").read_text())
    from transformers import RobertaModel

    def htsat(audio_cfg, *_):
        return package.htsat.HTSAT_Swin_Transformer(num_classes=audio_cfg.class_num, config=audio_cfg, **sizes)

    roberta = SimpleNamespace(from_pretrained=lambda _: RobertaModel(text_config))  # the weights are all in `state`
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        mock.patch.multiple(package.model, create_htsat_model=htsat, RobertaModel=roberta),
    ):
        warnings.filterwarnings("ignore", message="torch.meshgrid")
        width = sizes["embed_dim"] * 2 ** (len(sizes["depths"]) - 1)
        model = package.model.CLAP(width, config["audio_cfg"], config["text_cfg"] | {"model_type": "roberta"})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the weights do not fit the model ({reason} ...): use the RoBERTa it was trained on") from None
    return model.float().eval().requires_grad_(False)


def load_roberta(source: str | Path):
    """RoBERTa's configuration and tokenizer from a place that `pretrained.locate` takes; its weights are not needed.

    Raises ValueError for a tokenizer that is not whole: transformers builds an empty one where files are missing.
    """
    from transformers import RobertaConfig, RobertaTokenizer

    folder = locate("roberta", source).path
    has = {path.name for path in folder.iterdir()}
    if not ("tokenizer.json" in has or {"vocab.json", "merges.txt"} <= has):
        raise FileNotFoundError(f"{folder}: tokenizer.json of roberta-base is needed, found {sorted(has)}")
    config = RobertaConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = RobertaTokenizer.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has {len(tokenizer)} entries, its config.json {config.vocab_size}: copy roberta-base again"
        )
    return config, tokenizer


def quantise(audio: Tensor) -> Tensor:
    """audio clipped to [-1, 1] and cut to 16 bits (toward zero), as the network heard it in training; float32.

    The gradient passes as if nothing were cut.
    """
    audio = audio.clamp(-1, 1)
    cut = (audio.detach() * 32767.0).to(torch.int16) / 32767.0
    return cut + (audio - audio.detach()) if audio.requires_grad else cut


def fit_clip(audio: Tensor, samples: int = CLIP_SAMPLES) -> Tensor:
    """audio (B, T) as (B, samples): shorter clips are repeated as often as they fit whole, then padded with silence.

    Of longer ones the middle is kept, with a warning where more than 0.1 s is lost. Differs from the package, which cuts
    at a random place: the same sound must get the same score.
    """
    length = audio.shape[-1]
    if length > samples + LONGEST_TRIM * SAMPLE_RATE:
        heard, given = samples / SAMPLE_RATE, length / SAMPLE_RATE
        warnings.warn(f"CLAP hears {heard:g} s: of clips of {given:.2f} s the middle is scored", stacklevel=2)
    if length >= samples:
        start = (length - samples) // 2
        return audio[:, start : start + samples]
    audio = audio.repeat(1, samples // length)
    return F.pad(audio, (0, samples - audio.shape[-1]))


def check_audio(audio: Tensor) -> Tensor:
    """audio as float32; ValueError for another shape than (B, T) with T > 0, and for samples that are not finite."""
    if audio.ndim != 2 or audio.shape[1] == 0:
        raise ValueError(f"audio has shape {tuple(audio.shape)}; (clips, samples) with samples is needed")
    if not torch.isfinite(audio).all():
        raise ValueError("audio holds NaN or infinite samples: look for the step that made them before scoring")
    return audio.detach().float()


@contextlib.contextmanager
def exact_float32(device: torch.device, *, gradients: bool = False) -> Iterator[None]:
    """No autocast, no TF32 in convolutions: this network takes its spectrogram by one. No gradients unless asked for."""
    cudnn = torch.backends.cudnn
    with (
        torch.set_grad_enabled(gradients),
        torch.autocast(device.type, enabled=False),
        cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False),
    ):
        yield


class LaionClapReward:
    """The cosine between a clip and its prompt in LAION-CLAP's space, in [-1, 1]; audio of any sample rate.

    Differs from the published reward in what is cut off clips over 10 s (see `fit_clip`), and by default in the rate:
    the published trainer declared its 44,100 Hz audio as 44,000 Hz, which `published_rate=True` repeats.
    """

    def __init__(self, model: nn.Module, tokenizer, *, batch_size: int = 16, published_rate: bool = False):
        self.model, self.tokenizer, self.batch_size, self.published_rate = model, tokenizer, batch_size, published_rate

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        roberta: str | Path,
        *,
        device: str | None = None,
        batch_size: int = 16,
        published_rate: bool = False,
    ) -> LaionClapReward:
        """Reads the published file, whole or not at all.

        checkpoint: the file, or a directory or hub id ("lukewys/laion_clap") that holds it under its published name; any
        LAION-CLAP of HTSAT and RoBERTa without fusion will do. roberta: a folder with config.json and the tokenizer, or
        a hub id ("roberta-base"). Both as `pretrained.locate` takes them. device: default a GPU if there is one.
        batch_size: clips in one forward.
        Raises FileNotFoundError or ValueError, one line with what to do.
        """
        path = locate("clap", checkpoint).path
        config, tokenizer = load_roberta(roberta)
        try:
            model = build_clap(clap_state(path), config)
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), tokenizer, batch_size=batch_size, published_rate=published_rate)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale_a.device

    def embed_audio(self, audio: Tensor, sample_rate: int) -> Tensor:
        """audio (B, T) in [-1, 1] -> unit vectors (B, 512), float32 on the CPU."""
        audio = check_audio(audio)
        rate = self._rate(sample_rate)
        with exact_float32(self.device):
            parts = [self._embed_clips(part.to(self.device), rate) for part in audio.split(self.batch_size)]
        return torch.cat(parts).cpu()

    def _rate(self, sample_rate: int) -> int:
        return 44000 if self.published_rate and sample_rate == 44100 else sample_rate

    def _embed_clips(self, audio: Tensor, rate: int) -> Tensor:
        audio = torchaudio.functional.resample(audio, int(rate), SAMPLE_RATE)
        clips = {"waveform": fit_clip(quantise(audio))}
        embedding = self.model.encode_audio(clips, device=self.device)["embedding"]
        return F.normalize(self.model.audio_projection(embedding), dim=-1)

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> unit vectors (B, 512), float32 on the CPU; what is beyond 77 tokens is not read."""
        parts = []
        with exact_float32(self.device):
            for start in range(0, len(prompts), self.batch_size):
                part = list(prompts[start : start + self.batch_size])
                tokens = self.tokenizer(
                    part, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
                )
                parts.append(F.normalize(self.model.encode_text(tokens, device=self.device), dim=-1))
        return torch.cat(parts).cpu()

    def __call__(
        self, audio: Tensor, sample_rate: int, prompts: list[str], metadata: list[dict] | None = None
    ) -> RewardResult:
        return RewardResult((self.embed_audio(audio, sample_rate) * self._texts(prompts)).sum(-1).clamp(-1, 1))

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}  # a group shares its prompt
        return self.embed_text(list(row))[[row[prompt] for prompt in prompts]]

    def differentiable(self, audio: Tensor, sample_rate: int, prompts: list[str]) -> Tensor:
        """The cosines (B,) with their gradient to the audio (B, T), on the model's device."""
        check_audio(audio)
        with exact_float32(self.device, gradients=True):
            sounds = self._embed_clips(audio.float().to(self.device), self._rate(sample_rate))
        return (sounds * self._texts(prompts).to(sounds)).sum(-1)
