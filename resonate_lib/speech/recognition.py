"""An audio language model that writes down what it hears: a Whisper-type encoder and a small decoder, as the judge of `lalm`.

The model is transformers' Qwen2AudioForConditionalGeneration with its processor and chat template, so that the published
Qwen2-Audio loads by name. Clips may be of any length up to the feature extractor's: each has as many audio tokens as it has sound,
and a batch is computed at the length of its longest clip. Supervised training is in `recognition_training`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from resonate_lib.models import storage
from resonate_lib.rewards.lalm import LalmShape, conversation, mel_frames
from resonate_lib.speech import token_policy
from resonate_lib.training import atomic_folder

INSTRUCTION = "Transcribe the speech."
SHAPE = LalmShape(seconds=10, mels=64, n_fft=512, hop=250, width=112, heads=4, audio_layers=3, text_layers=2)
CARD = "Recogniser"
BLOCK = 32  # frames, half a second: a batch's length is a multiple of it, or every length would need kernels of its own
LEAST = 4  # frames that make one audio token; shorter clips are filled up with silence


class Heard(NamedTuple):
    """What was heard in B clips: audio (B, T // 4, text width), of which the first tokens (B,) are real, and the tower's states
    before pooling (B, T // 2, width)."""

    audio: Tensor
    tokens: Tensor
    states: Tensor


def hear(tower, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the audio tower makes of log-mels (B, mels, T) of which the first frames (B,) are real, at any even T.

    Returns tokens (B, T // 4, width), their numbers (B,), and the states before pooling (B, T // 2, width). Equal to the class's
    own forward, which only takes full length, where every clip has 4 frames of silence after it or fills the length (tested).
    """
    hidden = F.gelu(tower.conv1(features.to(tower.conv1.weight.dtype)))
    hidden = F.gelu(tower.conv2(hidden)).transpose(1, 2)
    places = hidden.shape[1]
    hidden = hidden + tower.embed_positions.weight[:places]
    real, tokens = tower._get_feat_extract_output_lengths(frames)
    padding = torch.arange(places, device=hidden.device) >= real[:, None]
    mask = torch.zeros(padding.shape, dtype=hidden.dtype, device=hidden.device)
    mask = mask.masked_fill_(padding, torch.finfo(hidden.dtype).min)[:, None, None]
    for layer in tower.layers:
        hidden = layer(hidden, mask)
    pooled = tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2)
    return tower.layer_norm(pooled), tokens, hidden


def answer_ends(processor: Qwen2AudioProcessor) -> list[int]:
    """The ids that end an answer: the template's <|im_end|>, which is the one that is taught, and the tokenizer's end of text."""
    tokenizer = processor.tokenizer
    found = [tokenizer.get_vocab().get("<|im_end|>"), tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in found if token is not None))


class Recogniser:
    """The model with its processor: clips in, transcripts out.

    batch_size: clips transcribed at once. `seconds` is the longest clip it hears.
    """

    def __init__(
        self,
        model: Qwen2AudioForConditionalGeneration,
        processor: Qwen2AudioProcessor,
        *,
        card: dict | None = None,
        batch_size: int = 32,
    ):
        self.model, self.processor, self.card, self.batch_size = model.eval(), processor, card or {}, batch_size
        text = processor.apply_chat_template(conversation(INSTRUCTION), add_generation_prompt=True, tokenize=False)
        head, _, tail = text.partition(processor.audio_token)
        if processor.audio_token in tail or INSTRUCTION not in tail:
            raise ValueError(f"the chat template gives {text!r}: one {processor.audio_token}, then the instruction are needed")
        self.head, self.tail = (processor.tokenizer.encode(part) for part in (head, tail))
        self.end = answer_ends(processor)
        model.generation_config.eos_token_id = self.end  # where `token_policy` looks

    def fork(self) -> Recogniser:
        """A copy that is trained apart."""
        return Recogniser(copy.deepcopy(self.model), self.processor, card=dict(self.card), batch_size=self.batch_size)

    @property
    def seconds(self) -> float:
        """The longest clip in seconds."""
        return self.processor.feature_extractor.chunk_length

    @property
    def sample_rate(self) -> int:
        return self.processor.feature_extractor.sampling_rate

    def features(self, clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Log-mels (B, mels, T) of clips (T_i,) at 16 kHz and how many frames of each are real (B,); T is that of the longest clip
        and some silence, at most the extractor's. ValueError for a clip that is too long."""
        extractor = self.processor.feature_extractor
        longest = max(len(clip) for clip in clips)
        if longest > extractor.n_samples:
            raise ValueError(f"audio of {longest / self.sample_rate:.2f} s: this recogniser hears {self.seconds:g} s; "
                             "cut it, or leave it out (`fitting`)")
        frames = torch.tensor([max(LEAST, -(-len(clip) // extractor.hop_length)) for clip in clips])
        length = min(-(-(int(frames.max()) + LEAST) // BLOCK) * BLOCK, extractor.nb_max_frames)
        waves = torch.zeros(len(clips), length * extractor.hop_length)
        for wave, clip in zip(waves, clips, strict=True):
            wave[: len(clip)] = clip
        device = self.model.device
        return mel_frames(waves.to(device), extractor), frames.to(device)

    def listen(self, features: Tensor, frames: Tensor) -> Heard:
        """What the audio tower and the projector make of log-mels (B, mels, T) and their real frames; gradients flow."""
        core = self.model.model
        audio, tokens, states = hear(core.audio_tower, features, frames)
        return Heard(core.multi_modal_projector(audio), tokens, states)

    def prompts(self, heard: Heard) -> dict[str, Tensor]:
        """What `token_policy` takes as inputs, filled up on the left: inputs_embeds (B, P, width) and attention_mask; gradients
        flow into what was heard."""
        counts, audio = heard.tokens.tolist(), self.processor.audio_token_id
        rows = [[*self.head, *[audio] * count, *self.tail] for count in counts]
        length, device = max(map(len, rows)), heard.audio.device
        ids = torch.full((len(rows), length), self.end[0])
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, length - len(row) :], mask[place, length - len(row) :] = torch.tensor(row), 1
        ids = ids.to(device)
        embeds = self.model.get_input_embeddings()(ids)
        kept = heard.audio[torch.arange(heard.audio.shape[1], device=device) < heard.tokens[:, None]]
        embeds = embeds.masked_scatter((ids == audio)[..., None], kept.to(embeds.dtype))
        return {"inputs_embeds": embeds, "attention_mask": mask.to(device)}

    def inputs(self, clips: Sequence[Tensor]) -> dict[str, Tensor]:
        """`prompts` of clips (T_i,) at 16 kHz."""
        return self.prompts(self.listen(*self.features(clips)))

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (n, L) of transcripts with the end token, filled up on the right, and their mask (n, L) bool. Any text encodes;
        control tokens written in it are spelled out."""
        tokenizer, end = self.processor.tokenizer, self.end[0]
        rows = [[*tokenizer.encode(text, split_special_tokens=True), end] for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=end)
        device = self.model.get_input_embeddings().weight.device
        return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """The transcripts of sampled ids (n, L); "" where nothing was said."""
        rows = [row[kept].tolist() for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    @torch.no_grad()
    def transcribe(self, audio: Tensor | Sequence[Tensor], sample_rate: int = 16000, *, max_new_tokens: int = 60) -> list[str]:
        """The likeliest transcripts (greedy) of audio (B, T), or of clips (T_i,), a batch of like length at a time; "" where it
        hears nothing. ValueError for a clip that is too long, before anything is computed."""
        if sample_rate != self.sample_rate:
            from resonate_lib.audio import resample

            audio = [resample(clip, sample_rate, self.sample_rate) for clip in audio]
        longest = max((len(clip) for clip in audio), default=0)
        if longest > self.processor.feature_extractor.n_samples:
            self.features([audio[0].new_zeros(longest)])  # which says so
        order, found = sorted(range(len(audio)), key=lambda place: len(audio[place])), [""] * len(audio)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            got = token_policy.sample(self.model, self.inputs([audio[place] for place in part]), group_size=1,
                                      max_new_tokens=max_new_tokens, temperature=0.0)  # fmt: skip
            for place, text in zip(part, self.decode(got.ids, got.mask), strict=True):
                found[place] = text
        return found

    def save(self, directory: str | Path, *, bits: int = 32) -> None:
        """Writes configuration, processor, weights as `models.storage` packs them at 32, 16 or 8 bits, and model_card.json; with
        32 or 16 transformers' from_pretrained reads the folder too."""
        with atomic_folder(directory) as folder:
            self.model.config.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            save_file(storage.packed(self.model.state_dict(), bits), folder / "model.safetensors", metadata={"format": "pt"})
            content = {"class": CARD, "instruction": INSTRUCTION, "bits": bits, "training": self.card}
            (folder / "model_card.json").write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, source: str | Path, *, dtype: str = "float32", device: str | None = None, **options) -> Recogniser:
        """What `save` wrote, or the published model in a folder or behind a hub id ("Qwen/Qwen2-Audio-7B-Instruct").

        dtype: float32 or bf16. device: None is the CPU for what `save` wrote, and for a published one the GPU where there is one
        (`omni.load_judge`). The network is used for a hub id alone. ValueError or FileNotFoundError, one line each.
        """
        folder = Path(source)
        if not (folder / "model_card.json").is_file():
            from resonate_lib.rewards.omni import FAMILIES, load_judge

            found = load_judge(source, dtype=dtype, device=device)
            if found.family is not FAMILIES["qwen2_audio"]:
                raise ValueError(f"{source}: a {type(found.model).__name__}; recognition takes models of the class of Qwen2-Audio")
            return cls(found.model.requires_grad_(True), found.processor, card={"source": str(source)}, **options)
        card = json.loads((folder / "model_card.json").read_text())
        if card["class"] != CARD:
            raise ValueError(f"{source}: holds a {card['class']}, not a recogniser; name a folder that Recogniser.save wrote")
        model = Qwen2AudioForConditionalGeneration(AutoConfig.from_pretrained(folder, local_files_only=True))
        model.load_state_dict(storage.read(folder / "model.safetensors"))
        model.model.audio_tower.embed_positions.requires_grad_(True)
        processor = Qwen2AudioProcessor.from_pretrained(folder, local_files_only=True)
        model = model.to(device, torch.bfloat16 if dtype == "bf16" else torch.float32)
        return cls(model, processor, card=card["training"], **options)


def fitting(corpus, seconds: float) -> tuple[list[int], int]:
    """The positions of a corpus whose clips are at most so long, and how many are longer: those are left out and counted."""
    kept = [place for place, clip in enumerate(corpus.audio) if len(clip) <= seconds * corpus.sample_rate]
    if not kept:
        raise ValueError(f"all {len(corpus.audio)} clips are longer than {seconds:g} s: cut them, or use a model that hears longer")
    return kept, len(corpus.audio) - len(kept)


def clips_of(corpus, positions: Sequence[int]) -> list[Tensor]:
    """The waveforms (T_i,) float32 at these positions, each of its own length."""
    seconds = [len(corpus.audio[place]) / corpus.sample_rate for place in positions]
    batch = corpus.waveforms(positions, max(seconds)) if len(seconds) else []
    return [wave[: len(corpus.audio[place])] for wave, place in zip(batch, positions, strict=True)]
