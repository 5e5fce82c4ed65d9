"""The published judges at full size: Qwen2.5-Omni, Qwen3-Omni and Qwen2-Audio, asked the question of `lalm`, clips in batches.

One forward a batch gives the logits of the answer's first token; nothing is generated. Of an Omni checkpoint only the
Thinker is built, so the talker's weights are never read. `open_judge` turns a source into a judge: a folder, a hub id or
a server (`remote`). Question, order and tokens: the published reward and AQAScore.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchaudio
from torch import Tensor, nn

from resonate_lib.rewards.base import LONGEST_TRIM, Reward, RewardResult, clip_of
from resonate_lib.rewards.lalm import LalmReward, answer_ids, mel_frames, published, refuse_control_tokens, yes_or_no

SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and visual "
    "inputs, as well as generating text and speech."
)
SHORTEST = 0.1  # seconds; under it a clip becomes no audio token at all
RARE = 0.1  # share of the probability under which yes and no together count as no answer
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32, "auto": "auto"}  # auto: as the checkpoint has them
FALLBACKS = ("sigmoid", "zero")


def _quarter(frames: Tensor) -> Tensor:
    """Audio tokens of so many mel frames: a convolution of stride 2, then pairs averaged."""
    return ((frames - 1) // 2 - 1) // 2 + 1


def _thirteen_a_second(frames: Tensor) -> Tensor:
    """Audio tokens of so many mel frames: three convolutions of stride 2 over each second of 100 frames by itself."""
    return 13 * (frames // 100) + (frames % 100 + 7) // 8


@dataclass(frozen=True)
class Family:
    """What differs between the judges. padding: how the processor fills a clip up before the log-mel, to its longest clip
    ("full"), likewise but only the clip's own frames are used ("silence"), or not at all ("none")."""

    model: str  # classes of transformers
    processor: str
    replies: tuple[str, str]  # the two tokens that count as an answer under the published rule
    padding: str
    tokens: Callable[[Tensor], Tensor]
    system: str | None = None
    audio_first: bool = False  # published: the question, then the audio


FAMILIES = {
    "qwen2_5_omni": Family(
        "Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniProcessor", ("Yes", "No"), "silence", _quarter, SYSTEM
    ),
    "qwen3_omni_moe": Family(
        "Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3OmniMoeProcessor", ("yes", "no"), "none", _thirteen_a_second
    ),
    # Not among the published judges: the audio stands first, as this model was trained and as the small judge here has it.
    "qwen2_audio": Family(
        "Qwen2AudioForConditionalGeneration", "Qwen2AudioProcessor", ("Yes", "No"), "full", _quarter, audio_first=True
    ),
}


def conversation(family: Family, audio: dict, question: str) -> list[dict]:
    """The published messages: system text where there is one, then one turn of the question and the audio's part."""
    text = {"type": "text", "text": question}
    system = [{"role": "system", "content": [{"type": "text", "text": family.system}]}] if family.system else []
    return [*system, {"role": "user", "content": [audio, text] if family.audio_first else [text, audio]}]


def to_clips(audio: Tensor | Sequence[Tensor], rate: int, prompts: Sequence[str], target: int, longest: float) -> list[Tensor]:
    """audio (B, T), or B waveforms (T,) of their own lengths, at `rate` Hz as B float32 waveforms at `target` Hz.

    Raises ValueError for a wrong shape, number of prompts, rate or length, and for samples that are not finite.
    """
    if not float(rate).is_integer() or not 1000 <= rate <= 768_000:
        raise ValueError(f"sample_rate={rate}: a whole number of Hz from 1000 to 768000 is needed, such as 16000 or 44100")
    parts = [audio] if torch.is_tensor(audio) else [clip[None] for clip in audio]
    shapes = [tuple(part.shape) for part in parts]
    if any(len(shape) != 2 for shape in shapes) or sum(shape[0] for shape in shapes) != len(prompts) or not prompts:
        raise ValueError(f"audio of shape {shapes[:3]} and {len(prompts)} prompts: give (clips, samples), a prompt for each clip")
    bad = torch.cat([~torch.isfinite(part).all(-1).cpu() for part in parts]).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"audio of clips {bad[:8]} holds NaN or infinite samples: mend the decoder or leave them out")
    lengths = [shape[1] / rate for shape in shapes]
    if min(lengths) < SHORTEST or max(lengths) > longest + LONGEST_TRIM:
        raise ValueError(
            f"audio of {min(lengths):.2f} to {max(lengths):.2f} s: this judge hears {SHORTEST:g} to {longest:g} s; cut the clips"
        )
    if rate != target:
        parts = [torchaudio.functional.resample(part.float(), int(rate), target) for part in parts]
    return [clip[: round(longest * target)].float() for part in parts for clip in part]


def clip_features(clips: Sequence[Tensor], extractor, padding: str) -> tuple[Tensor, Tensor]:
    """What the real processor's extractor gives for each waveform alone: log-mel (B, mels, frames), and how many frames (B,) of
    each row are its own. padding: as in Family."""
    hop = extractor.hop_length
    lengths = torch.tensor([len(clip) for clip in clips])
    if padding == "none":
        # Whisper mirrors a clip's end, so every length goes by itself: in a longer batch silence would follow it instead.
        frames = lengths // hop
        mel = clips[0].new_zeros(len(clips), extractor.feature_size, int(frames.max()))
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten().tolist()
            mel[rows, :, : length // hop] = mel_frames(torch.stack([clips[i] for i in rows]), extractor)
        return mel, frames.to(mel.device)
    # Past a window of silence nothing is added: the processor's own 300 s would be the same frames for 30 times the work.
    total = min(extractor.n_samples, int(lengths.max()) + extractor.n_fft)
    total = extractor.n_samples if padding == "full" else -(-total // hop) * hop
    padded = nn.utils.rnn.pad_sequence(list(clips), batch_first=True)
    mel = mel_frames(nn.functional.pad(padded, (0, total - padded.shape[1])), extractor)
    return mel, (-(-lengths // hop)).to(mel.device)


class AudioJudge:
    """sigmoid(logit yes − logit no) of the published question, in (0, 1), from one batched forward of a real judge.

    Logits of several spellings are joined by logsumexp, in float32. Parts: `logit`, the difference; `p_yes_mass`, the share
    of the next token's probability that yes and no hold together; `rare`, 1 where that is under 0.1: the judge answered
    neither. fallback "zero" scores 0 where the likeliest token is neither of the family's two published replies, as the
    published reward does (its code then stops with an error; here it is counted). Differs from the published code: clips go
    in batches, every spelling of yes and no counts, and the two answers' logits are not rounded to bf16.
    """

    def __init__(self, model: nn.Module, processor, family: Family, *, batch_size: int = 16, fallback: str = "sigmoid"):
        self.model, self.processor, self.family = model.eval().requires_grad_(False), processor, family
        self.batch_size, self.fallback = batch_size, fallback
        self.yes, self.no = answer_ids(processor)
        self.replies = torch.tensor([_single_token(processor, reply) for reply in family.replies])
        self.text = self._render()
        self.special = {*processor.tokenizer.all_special_tokens, *processor.tokenizer.get_added_vocab()}
        weight = model.lm_head.weight
        self._rows = None  # an offloaded or quantised output layer has no weights to read here
        if weight.is_floating_point() and not weight.is_meta:
            self._rows = weight[self.yes + self.no].float()

    def _render(self) -> str:
        turns = conversation(self.family, {"type": "audio"}, "{question}")
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if text.count(self.processor.audio_token) != 1 or text.count("{question}") != 1:
            raise ValueError(f"the chat template gives {text!r}: one {self.processor.audio_token} and the question are needed")
        return text

    @property
    def device(self) -> torch.device:
        """Where the inputs go: the first accelerator of an offloaded model, else where the model is."""
        places = [place for place in getattr(self.model, "hf_device_map", {}).values() if place not in ("cpu", "disk")]
        return torch.device(places[0]) if places else self.model.device

    def inputs(self, clips: Sequence[Tensor], questions: Sequence[str], of: Sequence[int] | None = None) -> dict[str, Tensor]:
        """What the real processor gives for each question and its waveform (at 16 kHz) alone, left-padded to a batch. of: the
        clip that each question is about, default its own."""
        extractor, device, token = self.processor.feature_extractor, self.device, self.processor.audio_token
        clips = [clip.to(device) for clip in clips]
        if self.family.padding == "none":
            # This audio tower fills a batch's short windows up, which is heard where a clip is shorter than one window.
            window = 2 * self.model.config.audio_config.n_window * extractor.hop_length
            clips = [nn.functional.pad(clip, (0, max(0, window - len(clip)))) for clip in clips]
        features, frames = clip_features(clips, extractor, self.family.padding)
        if of is not None:
            features, frames = features[list(of)], frames[list(of)]
        texts = []
        for question, count in zip(questions, self.family.tokens(frames).tolist(), strict=True):
            refuse_control_tokens(question, self.special)
            texts.append(self.text.replace(token, token * count).replace("{question}", question))
        tokens = self.processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        own = torch.arange(features.shape[-1], device=device) < frames[:, None]
        words = {key: tokens[key].to(device) for key in ("input_ids", "attention_mask")}
        return words | {"input_features": features, "feature_attention_mask": own.long()}

    @torch.no_grad()
    def logits(self, clips: Sequence[Tensor], questions: Sequence[str], of: Sequence[int] | None = None) -> Tensor:
        """Logits (Q, vocabulary) float32 of the answer's first token; only the last position goes through the output layer."""
        return self._logits(clips, questions, of)

    def _logits(self, clips: Sequence[Tensor], questions: Sequence[str], of: Sequence[int] | None = None) -> Tensor:
        inputs = self.inputs(clips, questions, of)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        hidden = self.model.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state[:, -1]
        logits = self.model.lm_head(hidden).float()
        if self._rows is not None:  # bf16 holds a logit of 20 to 1/8 only: far too coarse for a reward
            logits[:, self.yes + self.no] = hidden.float() @ self._rows.to(hidden.device).T
        return logits

    def question(self, caption: str) -> str:
        """What is asked of a clip, in the chat template, to be read."""
        return self.text.replace("{question}", *published([caption]))

    def answer_logits(self, audio: Tensor, sample_rate: int, prompts: Sequence[str]) -> Tensor:
        """Logits (B, vocabulary) of the answer's first token to a few clips (B, T), in one batch."""
        return self.logits(self._heard(audio, sample_rate, prompts), published(prompts)).cpu()

    def _heard(self, audio, sample_rate, prompts) -> list[Tensor]:
        extractor = self.processor.feature_extractor
        longest = extractor.n_samples / extractor.sampling_rate
        return to_clips(audio, sample_rate, prompts, extractor.sampling_rate, longest)

    def ask(
        self, audio: Tensor, sample_rate: int, questions: Sequence[str], clips: Sequence[int] | None = None
    ) -> RewardResult:
        """Scores (Q,) and parts of Q questions in full. clips: the row of audio that each is about, its log-mel made once a
        batch; None: the i-th question is about the i-th clip."""
        heard = self._heard(audio, sample_rate, questions if clips is None else range(len(audio)))
        of, found = clip_of(questions, len(heard), clips), []
        for start in range(0, len(questions), self.batch_size):
            rows = of[start : start + self.batch_size]
            own = {clip: place for place, clip in enumerate(dict.fromkeys(rows))}
            asked = list(questions[start : start + self.batch_size])
            logits = self.logits([heard[clip] for clip in own], asked, [own[clip] for clip in rows])
            answered = torch.isin(logits.argmax(-1).cpu(), self.replies)
            found.append([*(part.cpu() for part in yes_or_no(logits, self.yes, self.no)), answered])
        return judged(*(torch.cat(part) for part in zip(*found, strict=True)), self.fallback)

    def __call__(
        self, audio: Tensor, sample_rate: int, prompts: list[str], metadata: list[dict] | None = None
    ) -> RewardResult:
        return self.ask(audio, sample_rate, published(prompts))

    def differentiable(self, audio: Tensor, sample_rate: int, prompts: list[str]) -> Tensor:
        """The logarithm of the scores (B,) with its gradient to the audio (B, T), all clips at once, on the model's device; by the
        sigmoid, whatever the fallback."""
        logits = self._logits(self._heard(audio, sample_rate, prompts), published(prompts))
        return nn.functional.logsigmoid(yes_or_no(logits, self.yes, self.no)[0])


def judged(logit: Tensor, mass: Tensor, answered: Tensor, fallback: str) -> RewardResult:
    """Scores and parts of logit, mass and answered (B,): the sigmoid, or 0 under fallback "zero" where not answered."""
    scores = logit.sigmoid()
    if fallback == "zero":
        scores = scores * answered
    return RewardResult(scores, {"logit": logit, "p_yes_mass": mass, "rare": (mass < RARE).float()})


def _single_token(processor, word: str) -> int:
    ids = processor.tokenizer.encode(word)
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens of this vocabulary: the published reward needs a single one")
    return ids[0]


def load_judge(
    source: str | Path,
    *,
    dtype: str = "bf16",
    device: str | None = None,
    quantisation: str | None = None,
    offload: bool = False,
    batch_size: int = 16,
    fallback: str = "sigmoid",
    processor: Any = None,
) -> AudioJudge:
    """The judge in a folder or behind a hub id ("Qwen/Qwen2.5-Omni-7B"); its class is read from config.json.

    dtype: "bf16", "float32" or "auto" (the checkpoint's). device: default the GPU, else the CPU. quantisation: "8bit" or
    "4bit" through bitsandbytes. offload: spread over GPU, CPU and disk by accelerate. processor: a folder or a ready
    processor where the source has none. Safetensors only, no remote code; the network is used for a hub id alone.
    Raises FileNotFoundError, ValueError or ImportError, one line each.
    """
    check_choices(fallback=(fallback, FALLBACKS), dtype=(dtype, DTYPES), quantisation=(quantisation, (None, "8bit", "4bit")))
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: use 1 or more")
    local = is_folder(source)
    family = FAMILIES[_model_type(source, local)]
    ready = processor
    if processor is None or isinstance(processor, (str, Path)):
        ready = _load_processor(source if processor is None else processor, family)
    _check_pair(source, family, local, ready)
    model = _load_model(source, family, local, DTYPES[dtype], device, quantisation, offload)
    return AudioJudge(model, ready, family, batch_size=batch_size, fallback=fallback)


def check_choices(**choices: tuple[Any, Any]) -> None:
    """Raises ValueError for the first name=(value, allowed) whose value is not allowed."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: use one of {', '.join(map(repr, allowed))}")


def is_folder(source: str | Path) -> bool:
    """Whether a source is a folder; False for a hub id, FileNotFoundError for what is neither (nothing is asked of the hub)."""
    if Path(source).is_dir():
        return True
    near = Path(source).parent
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) and not near.is_dir():
        return False
    raise FileNotFoundError(f"{source}: no such folder, and no hub id; name a folder, an id as 'Qwen/Qwen2.5-Omni-7B', or a URL")


def _model_type(source: str | Path, local: bool) -> str:
    from transformers import PreTrainedConfig

    if local and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {source}: name the folder that holds the judge's config.json and weights")
    try:
        config = PreTrainedConfig.get_config_dict(str(source), local_files_only=local)[0]
    except (OSError, json.JSONDecodeError) as error:
        reason = _first_line(error)
        raise ValueError(f"{source}: config.json cannot be read ({reason}); check the id, or download it again") from None
    kind = str(config.get("model_type")).removesuffix("_thinker")
    if kind not in FAMILIES:
        names = config.get("architectures")
        raise ValueError(f"{source}: model_type {kind!r} ({names}) is no judge; allowed are {', '.join(FAMILIES)}")
    return kind


def _load_processor(source: str | Path, family: Family):
    import transformers

    try:
        processor = getattr(transformers, family.processor).from_pretrained(str(source), local_files_only=is_folder(source))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{source}: its processor does not load ({_first_line(error)}); tokenizer.json, tokenizer_config.json, "
            f"preprocessor_config.json and a chat template are needed, or processor= names a folder that has them"
        ) from error
    if not processor.chat_template:
        raise ValueError(f"{source}: the processor has no chat template; add chat_template.jinja or chat_template.json")
    return processor


def _check_pair(source: str | Path, family: Family, local: bool, processor) -> None:
    """Before the weights are read: without its tokenizer.json a tokenizer is built empty, with no word of it."""
    import transformers

    config = getattr(transformers, family.model).config_class.from_pretrained(str(source), local_files_only=local)
    wanted = (config.audio_token_id, config.audio_config.num_mel_bins)
    given = (processor.audio_token_id, processor.feature_extractor.feature_size)
    if wanted != given:
        raise ValueError(
            f"{source}: audio token and mel bands are {wanted} in the model, {given} in the processor; its own tokenizer.json "
            f"and preprocessor_config.json are needed"
        )


def _load_model(source, family: Family, local: bool, dtype, device, quantisation, offload) -> nn.Module:
    import transformers

    options = {"dtype": dtype, "local_files_only": local, "use_safetensors": True, "output_loading_info": True}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if quantisation:
        if find_spec("bitsandbytes") is None:
            raise ImportError(f"quantisation={quantisation!r} needs bitsandbytes: pip install bitsandbytes, or leave it out")
        options["quantization_config"] = transformers.BitsAndBytesConfig(**{f"load_in_{quantisation}": True})
    options["device_map"] = "auto" if offload else {"": device}
    try:
        model, info = getattr(transformers, family.model).from_pretrained(str(source), **options)
    except Exception as error:
        raise ValueError(
            f"{source}: the weights do not load ({_first_line(error)}); download the safetensors again, or where memory is "
            f"short use quantisation or offload"
        ) from error
    lacking = sorted(info["missing_keys"])
    if lacking:  # transformers would draw them at random and only warn
        raise ValueError(f"{source}: {len(lacking)} tensors are missing, {lacking[0]} among them; download it again")
    if hasattr(model.model, "visual"):
        model.model.visual = None  # a judge that only listens: 1.3 GB of Qwen2.5-Omni-7B in bf16
    return model


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def open_judge(source: str | Path, **options: Any) -> Reward:
    """The judge that a line of configuration names: `http://host:port/v1#model` a server, a folder with model_card.json the
    small judge of this package, any other folder or a hub id one of transformers. options go to RemoteJudge or load_judge."""
    if re.match(r"https?://", str(source)):
        from resonate_lib.rewards.remote import RemoteJudge

        return RemoteJudge(str(source), **options)
    if (Path(source) / "model_card.json").is_file():
        if options:
            raise ValueError(f"{source}: the small judge takes no options, got {sorted(options)}; leave them out")
        return LalmReward.load(source)
    return load_judge(source, **options)
