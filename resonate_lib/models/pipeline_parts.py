"""Text encoders, networks and codecs of `diffusers` pipelines with the interface of the suite's own.

What a pipeline's call does between its models is done here, in the suite's terms. Latents are (B, N, C), N along time:
AudioLDM's (B, 8, T, F) becomes (B, T, 8 F), Stable Audio's (B, 64, L) becomes (B, L, 64). Text encoders and codecs compute in
float32 whatever the caller's precision. Sources: AudioLDM (arXiv 2301.12503), AudioLDM 2 (2308.05734), Stable Audio Open
(2407.14358), and diffusers 0.42, with whose pipelines the tests compare.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AudioLDM2ProjectionModel, AutoencoderKL, AutoencoderOobleck, StableAudioProjectionModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoTokenizer,
    ClapModel,
    ClapTextModelWithProjection,
    GPT2Model,
    SpeechT5HifiGan,
    T5EncoderModel,
    logging,
)

from resonate_lib.models.codec import AT_A_TIME, within_full_scale
from resonate_lib.models.flux_audio import Condition, ProjectedText

MOST_TOKENS = 128  # of T5 in AudioLDM 2 as in Stable Audio; the pipeline's 512 would only make every step slower
COUNTS = ("position_ids", "token_type_ids")  # tensors that hold 0, 1, 2, … or zeros, and that older files may lack
AGAIN = "get the pipeline again"


# -------------------------------------------------------------------------------------------------- reading
def read_model(kind: type, folder: Path) -> nn.Module:
    """A model of diffusers or transformers from its folder, by safetensors alone, float32, not in training. ValueError in one line
    where it is damaged or not whole."""
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, output_loading_info=True)
    except Exception as error:  # of diffusers, transformers or safetensors: long, and of many kinds
        raise ValueError(f"{folder} is no {kind.__name__} ({_line(error)}); {AGAIN}") from None
    missing = sorted(name for name in report["missing_keys"] if not name.endswith(COUNTS))
    if missing:  # they would be drawn at random
        raise ValueError(f"{folder} is no whole {kind.__name__}: {len(missing)} tensors are missing, {missing[0]} first; {AGAIN}")
    return model.float().eval()


def _frozen(kind: type, folder: Path) -> nn.Module:
    return read_model(kind, folder).requires_grad_(False)


def _tokenizer(folder: Path):
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise ValueError(f"{folder} is no tokenizer ({_line(error)}); {AGAIN}") from None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


# -------------------------------------------------------------------------------------------------- text
class Tower(nn.Module):
    """A text model and its tokenizer, one prompt at a time, so that what a prompt gives depends on no other. Prompts of more than
    `most` tokens are cut, as in the pipelines (there AudioLDM 2 takes 512), which is said the first time in a process."""

    said = False

    def __init__(self, tokenizer: Path, most: int):
        super().__init__()
        self.tokenizer = _tokenizer(tokenizer)
        self.most = min(most, self.tokenizer.model_max_length)

    def tokens(self, prompt: str) -> Tensor:
        """Ids (1, n) with the end token, n at most `most`, without padding."""
        if len(self.tokenizer(prompt)["input_ids"]) > self.most and not Tower.said:
            Tower.said = True
            print(f"note: a prompt has over {self.most} tokens and is cut there; of later ones nothing is said", flush=True)
        ids = self.tokenizer(prompt, truncation=True, max_length=self.most, return_tensors="pt")["input_ids"]
        return ids.to(next(self.parameters()).device)


class Clap(Tower):
    """CLAP's text tower, of a model (`kind`) with or without its audio tower: prompt -> embedding (1, D) of length 1."""

    def __init__(self, kind: type, folder: Path):
        super().__init__(folder / "tokenizer", 512)
        clap = _frozen(kind, folder / "text_encoder")
        self.model, self.projection = clap.text_model, clap.text_projection

    def forward(self, prompt: str) -> Tensor:
        return F.normalize(self.projection(self.model(self.tokens(prompt)).pooler_output), dim=-1)


class T5(Tower):
    """T5's encoder: prompt -> last states (1, n, D)."""

    def __init__(self, folder: Path, number: str = ""):
        super().__init__(folder / f"tokenizer{number}", MOST_TOKENS)
        self.model = _frozen(T5EncoderModel, folder / f"text_encoder{number}")

    def forward(self, prompt: str) -> Tensor:
        return self.model(self.tokens(prompt)).last_hidden_state


class PromptEncoder(nn.Module):
    """Prompts -> Condition of `length` rows of `text_dim` numbers; `encode` makes that of one prompt."""

    kept_dtype = torch.float32
    length: int
    text_dim: int

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> Condition:
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return Condition.cat([self.encode(prompt) for prompt in prompts])


class AudioLDMText(PromptEncoder):
    """CLAP's embedding, as the only state and as the pooled one: text_f (B, 1, D), text_f_c (B, D)."""

    def __init__(self, folder: Path):
        super().__init__()
        self.clap = Clap(ClapTextModelWithProjection, folder)
        self.tokenizer = self.clap.tokenizer
        self.length, self.text_dim = 1, self.clap.projection.linear2.out_features

    def encode(self, prompt: str) -> Condition:
        """One prompt -> its Condition of one row."""
        embedding = self.clap(prompt)
        return Condition(embedding[:, None], embedding)


class AudioLDM2Text(PromptEncoder):
    """The `new` states with which GPT-2 goes on after CLAP's embedding and T5's states, then T5's: text_f (B, new + most, D), the
    narrower of the two filled up with zeros, and rows of zeros where a prompt has ended; text_f_c (B, D) CLAP's embedding.

    Differs from the pipeline, which pads the prompts of a batch, and the empty prompt beside each, to one length in tokens: the
    token that ends them for GPT-2 then stands further from the last word, and what a prompt gives depends on its batch. GPT-2 goes
    on here and not in the pipeline's function, which fails for the class that the published folders hold (GPT2Model).
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.clap, self.t5 = Clap(ClapModel, folder), T5(folder, "_2")
        self.tokenizer = self.t5.tokenizer
        self.projection = _frozen(AudioLDM2ProjectionModel, folder / "projection_model")
        self.gpt2 = _frozen(GPT2Model, folder / "language_model")
        self.new = json.loads((folder / "language_model" / "config.json").read_text(encoding="utf-8")).get("max_new_tokens", 8)
        self.widths = self.gpt2.config.n_embd, self.t5.model.config.d_model
        self.length, self.text_dim = self.new + self.t5.most, max(self.widths)

    def encode(self, prompt: str) -> Condition:
        """One prompt -> its Condition of one row."""
        embedding, states = self.clap(prompt), self.t5(prompt)
        said = self.projection(hidden_states=embedding[:, None], hidden_states_1=states).hidden_states
        for _ in range(self.new):  # each state that it ends with is the next that it hears
            said = torch.cat([said, self.gpt2(inputs_embeds=said, use_cache=False).last_hidden_state[:, -1:]], 1)
        text = states.new_zeros(1, self.length, self.text_dim)
        text[:, : self.new, : self.widths[0]] = said[:, -self.new :]
        text[:, self.new : self.new + states.shape[1], : self.widths[1]] = states
        return Condition(text, embedding)


class StableAudioText(PromptEncoder):
    """T5's states, projected, rows of zeros where a prompt has ended, and two rows that say in seconds where the clip begins and
    ends: text_f (B, most + 2, D); text_f_c (B, D) the mean of the projected states."""

    def __init__(self, folder: Path, seconds: float):
        super().__init__()
        self.t5 = T5(folder)
        self.tokenizer = self.t5.tokenizer
        self.projection = _frozen(StableAudioProjectionModel, folder / "projection_model")
        span = self.projection(start_seconds=torch.zeros(1), end_seconds=torch.tensor([float(seconds)]))
        rows = torch.cat([span.seconds_start_hidden_states, span.seconds_end_hidden_states], 1)
        self.register_buffer("span", rows, persistent=False)
        self.length, self.text_dim = self.t5.most + 2, rows.shape[2]

    def encode(self, prompt: str) -> Condition:
        """One prompt -> its Condition of one row."""
        states = self.projection(text_hidden_states=self.t5(prompt)).text_hidden_states
        return Condition(torch.cat([F.pad(states, (0, 0, 0, self.t5.most - states.shape[1])), self.span], 1), states.mean(1))


# -------------------------------------------------------------------------------------------------- network
def _again(block: nn.Module, x: Tensor, *inputs):
    """The block's output, of which only the inputs are kept for the backward pass. Transformers, whose own blocks come here too,
    are run as they are: diffusers 0.42 hands those of AudioLDM 2 their masks one place too early, so they are named."""
    if not isinstance(block, Transformer2DModel):
        return checkpoint(block, x, *inputs, use_reentrant=False, preserve_rng_state=False)
    states, _, _, _, mask, states_mask = inputs
    return block(x, states, attention_mask=mask, encoder_attention_mask=states_mask, return_dict=False)


def to_frames(x: Tensor) -> Tensor:
    """(B, K, T, F) -> (B, T, K F)."""
    return x.transpose(1, 2).flatten(2)


def to_planes(x: Tensor, planes: int) -> Tensor:
    """(B, T, K F) -> (B, K, T, F) with K planes: the inverse of `to_frames`."""
    return x.unflatten(2, (planes, -1)).transpose(1, 2).contiguous()


class Denoiser(nn.Module):
    """A pipeline's network as the suite asks it: `velocity` is what it predicts, epsilon or v, of latents (B, N, C).

    model: the network of diffusers, whose names the parameters keep behind "model."; empty: the unconditional branch, a Condition
    of one; scale: the network's latents are the codec's raw ones times this. checkpointing and adapter: see `FluxAudio`.
    """

    adapter = None
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # of `lora.attach`

    def __init__(self, model: nn.Module, *, latent_dim: int, empty: Condition, scale: float = 1.0):
        super().__init__()
        self.model = model
        self.keep(latent_mean=torch.zeros(1, 1, latent_dim), latent_std=torch.full((1, 1, latent_dim), 1 / scale),
                  empty_f=empty.text_f, empty_f_c=empty.text_f_c)  # fmt: skip

    def keep(self, **tensors: Tensor) -> None:
        """Tensors that go where the network goes and are not stored with it: they come from the pipeline."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return self.model.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        if value:
            self.model.enable_gradient_checkpointing(_again)
        else:
            self.model.disable_gradient_checkpointing()

    def empty_condition(self, batch: int) -> Condition:
        """The empty prompt, `batch` times, which guidance is against."""
        return Condition(self.empty_f.expand(batch, -1, -1), self.empty_f_c.expand(batch, -1))

    def project_text(self, condition: Condition) -> ProjectedText:
        """The condition as it is: these networks project it at every step."""
        return ProjectedText(*condition)

    def normalize(self, latent: Tensor) -> Tensor:
        """Codec latent (B, N, C) -> network space."""
        return (latent - self.latent_mean) / self.latent_std

    def unnormalize(self, latent: Tensor) -> Tensor:
        """Network space (B, N, C) -> codec latent."""
        return latent * self.latent_std + self.latent_mean

    def velocity(self, latent: Tensor, text: ProjectedText, t: Tensor) -> Tensor:
        """The prediction (B, N, C) at latent (B, N, C) and t (B,) or 0-dim, in the network's own unit of time."""
        return self.predict(latent, text, torch.as_tensor(t, device=latent.device).expand(latent.shape[0]))


class AudioLDMNetwork(Denoiser):
    """AudioLDM's U-Net, which hears CLAP's embedding as a class."""

    def predict(self, latent: Tensor, text: ProjectedText, t: Tensor) -> Tensor:
        """As `velocity`, of t (B,)."""
        x = to_planes(latent, self.model.config.in_channels)
        return to_frames(self.model(x, t, encoder_hidden_states=None, class_labels=text.text_f_c).sample)


class AudioLDM2Network(Denoiser):
    """new: how many rows of the text are GPT-2's; widths: of its rows and of T5's."""

    def __init__(self, model: nn.Module, *, new: int, widths: tuple[int, int], **shared):
        super().__init__(model, **shared)
        self.new, self.widths = new, widths

    def predict(self, latent: Tensor, text: ProjectedText, t: Tensor) -> Tensor:
        """As `velocity`, of t (B,)."""
        x = to_planes(latent, self.model.config.in_channels)
        said, states = text.text_f[:, : self.new, : self.widths[0]], text.text_f[:, self.new :, : self.widths[1]]
        return to_frames(self.model(x, t, encoder_hidden_states=said, encoder_hidden_states_1=states,
                                    encoder_attention_mask_1=states.any(-1)).sample)  # fmt: skip


class StableAudioNetwork(Denoiser):
    """span (1, 2, D): where a clip begins and ends, which every frame hears; frames: how many latents have a rotary position."""

    def __init__(self, model: nn.Module, *, span: Tensor, frames: int, **shared):
        super().__init__(model, **shared)
        width = model.config.attention_head_dim // 2
        cos, sin = get_1d_rotary_pos_embed(width, frames + 1, use_real=True, repeat_interleave_real=False)
        self.keep(span=span.flatten(1)[:, None], cos=cos, sin=sin)

    def predict(self, latent: Tensor, text: ProjectedText, t: Tensor) -> Tensor:
        """As `velocity`, of t (B,)."""
        positions, span = latent.shape[1] + 1, self.span.expand(len(latent), -1, -1)  # the first position is time's and span's
        rotations = self.cos[:positions], self.sin[:positions]
        return self.model(latent.transpose(1, 2), t, encoder_hidden_states=text.text_f, global_hidden_states=span,
                          rotary_embedding=rotations, return_dict=False)[0].transpose(1, 2)  # fmt: skip


# -------------------------------------------------------------------------------------------------- codec
class Decoder(nn.Module):
    """Raw latents (B, N, C) -> waveforms. config, sample_rate, samples, latent_len and latent_dim as of the suite's codecs;
    `sound` makes a few clips, of at least `samples`."""

    def describe(self, *, seconds: float, sample_rate: int, samples: int, latent_len: int, latent_dim: int) -> None:
        """Set what the suite asks of a codec. ValueError where a clip would be empty."""
        if samples < 1 or latent_len < 1:
            raise ValueError(f"seconds={seconds}: shorter than one latent frame; ask for more")
        self.config, self.sample_rate, self.samples = {"seconds": seconds}, sample_rate, samples
        self.latent_len, self.latent_dim = latent_len, latent_dim

    @torch.no_grad()
    def decode(self, latents: Tensor, *, iterations: int = 0, limit: bool = True) -> Tensor:
        """Raw latents (B, N, C) -> waveforms (B, samples) within ±0.99, in float32 even under autocast.

        iterations: none here, accepted because `MelCodec` trades by it. limit=False is the pipeline's output as it is. A few
        clips at a time bound the memory. ValueError for another shape.
        """
        if latents.dim() != 3 or latents.shape[2] != self.latent_dim:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: allowed (B, N, {self.latent_dim}); transpose them, or use "
                             "the codec they were made with")
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            audio = torch.cat([self.sound(part.to(device).float()) for part in latents.split(AT_A_TIME)])[:, : self.samples]
        return within_full_scale(audio) if limit else audio


class MelVocoder(Decoder):
    """AudioLDM's: an image autoencoder of log-mels and a HiFi-GAN. frames: how many latents the network was trained on; scale: the
    network's latents are the raw ones times this."""

    def __init__(self, folder: Path, seconds: float | None, frames: int):
        super().__init__()
        self.vae, self.vocoder = _frozen(AutoencoderKL, folder / "vae"), _frozen(SpeechT5HifiGan, folder / "vocoder")
        config, shrink = self.vocoder.config, 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.scale, self.planes = self.vae.config.scaling_factor, self.vae.config.latent_channels
        hop, rate = math.prod(config.upsample_rates), config.sampling_rate
        seconds = frames * shrink * hop / rate if seconds is None else seconds
        latent_len = math.ceil(int(seconds / (hop / rate)) / shrink)  # rounded as in the pipelines
        self.describe(seconds=seconds, sample_rate=rate, samples=min(int(seconds * rate), latent_len * shrink * hop),
                      latent_len=latent_len, latent_dim=self.planes * (config.model_in_dim // shrink))  # fmt: skip

    def sound(self, latents: Tensor) -> Tensor:
        """Latents (B, N, C) in the codec's own scale -> waveforms (B, T), unlimited."""
        return self.vocoder(self.vae.decode(to_planes(latents, self.planes)).sample[:, 0])


class Oobleck(Decoder):
    """Stable Audio's autoencoder of waveforms; stereo there, the mean of both channels here. Latents always have the `frames` that
    the network was trained on and the sound is cut, as in the pipeline."""

    def __init__(self, folder: Path, seconds: float | None, frames: int):
        super().__init__()
        self.vae = _frozen(AutoencoderOobleck, folder / "vae")
        rate, longest = self.vae.config.sampling_rate, frames * self.vae.hop_length / self.vae.config.sampling_rate
        seconds = longest if seconds is None else seconds
        if seconds > longest:
            raise ValueError(f"seconds={seconds}: at most {longest:g}, what the network was trained on")
        self.describe(seconds=seconds, sample_rate=rate, samples=int(seconds * rate), latent_len=frames,
                      latent_dim=self.vae.config.decoder_input_channels)  # fmt: skip

    def sound(self, latents: Tensor) -> Tensor:
        """Latents (B, N, C) in the codec's own scale -> waveforms (B, T), unlimited."""
        return self.vae.decode(latents.transpose(1, 2)).sample.mean(1)

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Waveforms (B, T) -> raw latents (B, N, C), the posterior's mean; clips are cut or filled up with zeros."""
        whole = self.latent_len * self.vae.hop_length
        audio = F.pad(audio[:, :whole], (0, max(0, whole - audio.shape[1]))).to(next(self.parameters()).device)
        channels = audio[:, None].expand(-1, self.vae.config.audio_channels, -1)
        with torch.autocast(audio.device.type, enabled=False):
            return torch.cat([self.vae.encode(part).latent_dist.mean for part in channels.split(AT_A_TIME)]).transpose(1, 2)
