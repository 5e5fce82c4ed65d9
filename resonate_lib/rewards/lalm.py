"""An audio language model as a judge: it hears a clip, is asked whether the caption's events are in it, and the reward is
how much more likely it is to say yes than no.

The model is transformers' Qwen2AudioForConditionalGeneration with its processor and chat template, at a size that
trains from nothing on a laptop (`lalm_training`). Question and score: AQAScore, as in the published reward; the audio
stands before the question here, so that one clip can be shared among several questions (`packing`; `fine` asks them).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)

from resonate_lib.rewards.base import RewardResult, clip_of, to_clip
from resonate_lib.rewards.packing import Tree, hidden_states, pack
from resonate_lib.training import atomic_folder

QUESTION = (
    "Does this audio contain the sound events described by the text: {caption}? "
    "Please only answer yes or no, without other explanations."
)
DESCRIBE = "Describe the sounds in this audio."
YES, NO = ("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no")
SPECIAL = ["<|im_start|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]


@dataclass(frozen=True)
class LalmShape:
    """The size of a small judge; stored beside its weights. Audio becomes one token every 4·hop samples."""

    seconds: int = 4  # the feature extractor pads to whole seconds
    mels: int = 64
    n_fft: int = 512
    hop: int = 256
    width: int = 128  # of the audio tower and the language model
    heads: int = 4
    audio_layers: int = 3
    text_layers: int = 4


DEFAULT_SHAPE = LalmShape()


def published(captions: Iterable[str]) -> list[str]:
    """The published question about each caption."""
    return [QUESTION.replace("{caption}", caption) for caption in captions]


def conversation(question: str) -> list[dict]:
    """One clip and a question about it, as the chat template reads it."""
    return [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": question}]}]


def learn_vocabulary(texts: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and merges of a byte-level BPE in which every word of `texts`, of the question and of its answers becomes
    one token; any other text still encodes, in smaller pieces."""
    texts = sorted(set(texts))
    if not texts:
        raise ValueError("no texts to build a vocabulary from: pass the captions the judge will be asked about")
    backend = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer, learner.normalizer = backend.pre_tokenizer, backend.normalizer
    frame = "system\nYou are a helpful assistant.\nuser\nAudio 1: \nassistant\n"
    lines = [frame, DESCRIBE, *YES, *NO, *texts, *published(texts)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=8000, min_frequency=1, show_progress=False, initial_alphabet=alphabet)
    learner.train_from_iterator(lines, trainer)
    learned = json.loads(learner.to_str())["model"]
    return learned["vocab"], [tuple(merge) for merge in learned["merges"]]


def build_processor(texts: Iterable[str], shape: LalmShape = DEFAULT_SHAPE) -> Qwen2AudioProcessor:
    """The real processor with a vocabulary learnt from `texts`. 16 kHz, left padding, <|im_end|> ends an answer."""
    vocabulary, merges = learn_vocabulary(texts)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=SPECIAL,
        padding_side="left",
    )
    extractor = WhisperFeatureExtractor(
        feature_size=shape.mels,
        sampling_rate=16000,
        hop_length=shape.hop,
        chunk_length=shape.seconds,
        n_fft=shape.n_fft,
    )
    return Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer)


def build_model(
    processor: Qwen2AudioProcessor, shape: LalmShape = DEFAULT_SHAPE, *, seed: int
) -> Qwen2AudioForConditionalGeneration:
    """An untrained judge for this processor, drawn from `seed`.

    The audio positions start as sinusoids (Whisper's) and are trained; the class alone leaves them frozen at random.
    """
    tokenizer = processor.tokenizer
    positions = processor.feature_extractor.nb_max_frames // 2
    layer = {"num_attention_heads": shape.heads, "intermediate_size": 3 * shape.width, "initializer_range": 0.05}
    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": shape.width,
        "num_hidden_layers": shape.text_layers,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **layer,
    }
    audio = {
        "model_type": "qwen2_audio_encoder",
        "d_model": shape.width,
        "encoder_layers": shape.audio_layers,
        "encoder_attention_heads": shape.heads,
        "encoder_ffn_dim": 3 * shape.width,
        "num_mel_bins": shape.mels,
        "max_source_positions": positions,
        "initializer_range": 0.05,
    }
    config = Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=processor.audio_token_id, initializer_range=0.05
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2AudioForConditionalGeneration(config)
    frequency = torch.exp(-math.log(10000) * torch.arange(shape.width // 2) / (shape.width // 2 - 1))
    angle = torch.arange(positions)[:, None] * frequency
    table = model.model.audio_tower.embed_positions
    table.weight.data.copy_(torch.cat([angle.sin(), angle.cos()], dim=1))
    table.requires_grad_(True)
    return model


def log_mel(audio: Tensor, extractor: WhisperFeatureExtractor) -> Tensor:
    """The feature extractor's log-mel of audio (B, T) in one batch, on the audio's device: (B, mels, frames).

    T is a whole clip (chunk_length seconds). Equal to the extractor itself, which goes clip by clip through numpy.
    """
    if audio.shape[-1] != extractor.n_samples:
        raise ValueError(f"audio of {audio.shape[-1]} samples; the feature extractor takes {extractor.n_samples}")
    return mel_frames(audio, extractor)


def mel_frames(audio: Tensor, extractor: WhisperFeatureExtractor) -> Tensor:
    """The log-mel of audio (B, T) of any length, (B, mels, T // hop_length): Whisper's, with a floor 8 decades under each
    row's own peak."""
    window = torch.hann_window(extractor.n_fft, device=audio.device)
    spectrum = torch.stft(audio.float(), extractor.n_fft, extractor.hop_length, window=window, return_complex=True)
    power = spectrum[..., :-1].abs().square().contiguous()
    filters = torch.from_numpy(extractor.mel_filters).to(audio.device, torch.float32)
    mel = (filters.T @ power).clamp_min(1e-10).log10()
    floor = mel.amax(dim=(1, 2), keepdim=True) - 8.0
    return (torch.maximum(mel, floor) + 4.0) / 4.0


def refuse_control_tokens(question: str, special: Iterable[str]) -> None:
    """Raises ValueError when a question holds one of the tokenizer's control tokens: it could end early."""
    found = next((token for token in special if token in question), None)
    if found:
        raise ValueError(f"question {question!r} holds the control token {found}; remove it from the caption or event")


class PromptFrame:
    """The chat template with the audio token already repeated once per audio embedding, rendered once and reused.

    `prefix` is everything up to the audio's end, `suffix(question)` the rest up to the point where the answer starts.
    """

    def __init__(self, processor: Qwen2AudioProcessor):
        rendered = processor.apply_chat_template(conversation("{question}"), add_generation_prompt=True, tokenize=False)
        frames = processor.feature_extractor.nb_max_frames
        tokens = (((frames - 1) // 2 + 1) - 2) // 2 + 1  # the processor's own count for a full clip
        head, _, tail = rendered.partition(processor.audio_token)
        end = processor.audio_eos_token + "\n"
        if not tail.startswith(end):
            raise ValueError(f"the chat template puts {tail[:20]!r} after the audio; {end!r} is needed there")
        self.prefix = head + processor.audio_token * tokens + end
        self.tail = tail.removeprefix(end)
        self.special = processor.tokenizer.all_special_tokens

    def suffix(self, question: str) -> str:
        """What stands after the audio, with the question in it. ValueError for control tokens of the tokenizer in it."""
        refuse_control_tokens(question, self.special)
        return self.tail.replace("{question}", question)


def answer_ids(processor: Qwen2AudioProcessor) -> tuple[list[int], list[int]]:
    """The token ids that count as yes and as no: every spelling that is a single token of this vocabulary."""
    encode = processor.tokenizer.encode
    yes, no = (sorted({encode(word)[0] for word in words if len(encode(word)) == 1}) for words in (YES, NO))
    if not yes or not no:
        raise ValueError(f"the vocabulary has no single token for {YES if not yes else NO}: use another tokenizer")
    return yes, no


def yes_or_no(logits: Tensor, yes: Sequence[int], no: Sequence[int]) -> tuple[Tensor, Tensor]:
    """From logits (B, vocabulary) of the answer's first token: how much yes leads no (B,), spellings joined by logsumexp, and
    the share of the probability (B,) that both hold together."""
    said_yes, said_no = logits[:, yes].logsumexp(-1), logits[:, no].logsumexp(-1)
    return said_yes - said_no, (torch.logaddexp(said_yes, said_no) - logits.logsumexp(-1)).exp()


class LalmReward:
    """sigmoid(logit yes − logit no) of the published question, in (0, 1), from one batched forward.

    Logits of several spellings are joined by logsumexp. Parts: `p_yes_mass`, the share of the next token's
    probability that yes and no hold together (near 1: the score means what it says); `logit`, the difference itself.
    """

    def __init__(
        self,
        model: Qwen2AudioForConditionalGeneration,
        processor: Qwen2AudioProcessor,
        *,
        card: dict | None = None,
        batch_size: int = 64,
    ):
        self.model, self.processor, self.card, self.batch_size = model.eval(), processor, card or {}, batch_size
        self.frame, (self.yes, self.no) = PromptFrame(processor), answer_ids(processor)

    def inputs(self, clips: Tensor, questions: Sequence[str]) -> dict[str, Tensor]:
        """What the real processor gives for these clips (B, samples at 16 kHz) and questions, left-padded."""
        features = log_mel(clips.to(self.model.device), self.processor.feature_extractor)
        texts = [self.frame.prefix + self.frame.suffix(question) for question in questions]
        tokens = self.processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        mask = torch.ones(len(clips), features.shape[-1], dtype=torch.long, device=features.device)
        tokens = {key: tokens[key].to(features.device) for key in ("input_ids", "attention_mask")}
        return tokens | {"input_features": features, "feature_attention_mask": mask}

    @torch.no_grad()
    def logits(self, clips: Tensor, questions: Sequence[str]) -> Tensor:
        """Logits (B, vocabulary) of the answer's first token; only the last position goes through the output layer."""
        return self._logits(clips, questions)

    def _logits(self, clips: Tensor, questions: Sequence[str]) -> Tensor:
        inputs = self.inputs(clips, questions)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        hidden = self.model.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden[:, -1]).float()

    @torch.no_grad()
    def shared_logits(self, clips: Tensor, questions: Sequence[str], of: Sequence[int]) -> Tensor:
        """As `logits`, for questions (Q) of which the i-th is about clips[of[i]]: each clip is heard once."""
        tokenizer, audio = self.processor.tokenizer, self.processor.audio_token_id
        trunk = tokenizer.encode(self.frame.prefix)
        trees, ids = [Tree(trunk) for _ in clips], {text: tokenizer.encode(self.frame.suffix(text)) for text in set(questions)}
        places = [(row, trees[row].add(ids[question])[-1]) for row, question in zip(of, questions, strict=True)]
        packed = pack(trees, tokenizer.pad_token_id, places)
        features = log_mel(clips.to(self.model.device), self.processor.feature_extractor)
        heard = self.model.model.audio_tower(features).last_hidden_state
        return self.model.lm_head(hidden_states(self.model, packed, heard, trunk.index(audio))).float()

    def question(self, caption: str) -> str:
        """What is asked of a clip, in the chat template, to be read: the audio's tokens counted instead of repeated."""
        token = self.processor.audio_token
        count = self.frame.prefix.count(token)
        return self.frame.prefix.replace(token * count, f"{token} (x {count})") + self.frame.suffix(*published([caption]))

    def answer_logits(self, audio: Tensor, sample_rate: int, prompts: Sequence[str]) -> Tensor:
        """Logits (B, vocabulary) of the answer's first token to audio (B, T) and the published question about each prompt."""
        return self._answers(audio, sample_rate, published(prompts), None)

    def _answers(self, audio: Tensor, sample_rate: int, questions: Sequence[str], clips: Sequence[int] | None) -> Tensor:
        of = clip_of(questions, len(audio), clips)
        extractor = self.processor.feature_extractor
        heard = to_clip(audio.float(), sample_rate, extractor.sampling_rate, extractor.chunk_length)
        rows = range(0, len(heard), self.batch_size)
        if clips is None:
            return torch.cat([self.logits(heard[i : i + self.batch_size], questions[i : i + self.batch_size]) for i in rows])
        logits = torch.empty(len(questions), self.model.config.text_config.vocab_size, device=self.model.device)
        for start in rows:
            asked = [k for k, clip in enumerate(of) if start <= clip < start + self.batch_size]
            if asked:
                part = heard[start : start + self.batch_size]
                logits[asked] = self.shared_logits(part, [questions[k] for k in asked], [of[k] - start for k in asked])
        return logits

    def ask(
        self, audio: Tensor, sample_rate: int, questions: Sequence[str], clips: Sequence[int] | None = None
    ) -> RewardResult:
        """Scores (Q,) and parts of Q questions in full. clips: the row of audio that each is about, heard once for all of its
        questions; None: the i-th question is about the i-th clip."""
        logit, mass = yes_or_no(self._answers(audio, sample_rate, list(questions), clips), self.yes, self.no)
        return RewardResult(logit.sigmoid().cpu(), {"p_yes_mass": mass.cpu(), "logit": logit.cpu()})

    def __call__(
        self, audio: Tensor, sample_rate: int, prompts: list[str], metadata: list[dict] | None = None
    ) -> RewardResult:
        return self.ask(audio, sample_rate, published(prompts))

    def differentiable(self, audio: Tensor, sample_rate: int, prompts: list[str]) -> Tensor:
        """The logarithm of the scores (B,) with its gradient to the audio (B, T), all clips at once, on the model's device.

        The scores themselves are flat where the answer is a sure no, so that the clips which need a gradient most would have none.
        """
        extractor = self.processor.feature_extractor
        clips = to_clip(audio.float(), sample_rate, extractor.sampling_rate, extractor.chunk_length)
        return logsigmoid(yes_or_no(self._logits(clips, published(prompts)), self.yes, self.no)[0])

    def save(self, directory: str | Path) -> None:
        """Writes the model (safetensors) and processor as transformers does, and model_card.json beside them."""
        with atomic_folder(directory) as folder:
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            content = {"class": "Qwen2AudioForConditionalGeneration", "question": QUESTION, "training": self.card}
            (folder / "model_card.json").write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> LalmReward:
        """Reads what `save` wrote, without the network."""
        folder = Path(directory)
        if not (folder / "model_card.json").is_file():
            raise FileNotFoundError(f"no model_card.json in {folder}: name the folder that LalmReward.save wrote")
        card = json.loads((folder / "model_card.json").read_text())["training"]
        model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        return cls(model, Qwen2AudioProcessor.from_pretrained(folder, local_files_only=True), card=card)


def card_of(shape: LalmShape, **training) -> dict:
    """The training record that goes into model_card.json."""
    return {"shape": dataclasses.asdict(shape), **training}
