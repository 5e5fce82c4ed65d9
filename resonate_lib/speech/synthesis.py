"""A language model that speaks: attributes and letters in, speech tokens out, a codec that makes them sound.

One vocabulary holds it all: `<pitch> <rate> letters <speech> tokens <end>`. The model is a real transformers causal LM (Qwen2), so
`token_policy` samples from it and trains it; `synthesis_rl` reinforces it. The tokens are those of `tokenizer`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from resonate_lib.models import storage
from resonate_lib.rewards.base import learning_rate_at
from resonate_lib.rewards.rules import words
from resonate_lib.speech import token_policy
from resonate_lib.speech.lines import PITCH, RATE, Line
from resonate_lib.speech.tokenizer import SpeechTokenizer, TokenizerShape
from resonate_lib.training import atomic_folder, autocast, fit

PAD, END, SPEECH = 0, 1, 2  # control tokens
ATTRIBUTES = {name: 3 + place for place, name in enumerate([f"pitch:{k}" for k in PITCH] + [f"rate:{k}" for k in RATE])}
LETTERS = " abcdefghijklmnopqrstuvwxyz0123456789"
FIRST_LETTER = 3 + len(ATTRIBUTES)
FIRST_TOKEN = FIRST_LETTER + len(LETTERS)  # the first speech token
POOL = 8  # batches that are drawn together and sorted by length, of which one is taken
TIED = "lm_head.weight"  # the output layer, which is the embedding and is not saved


@dataclass(frozen=True)
class SpeakerShape:
    """The size of the language model."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 384  # of the feed-forward layers


def letters(text: str) -> str:
    """What the speaker reads of a text: lower case, accents off, blanks joined; whatever else it has no letter for is left out."""
    plain = unicodedata.normalize("NFKD", text)
    return "".join(c for c in " ".join(words(plain)) if c in LETTERS)


class Speaker:
    """The language model with its tokenizer: lines in, tokens or clips out. card: what is known of its training; `limits` in it are
    those of `lines.class_of`."""

    def __init__(self, model: Qwen2ForCausalLM, tokenizer: SpeechTokenizer, *, card: dict | None = None):
        self.model, self.tokenizer, self.card = model.eval(), tokenizer, card or {}
        self.codes, self.sample_rate = tokenizer.shape.codes, tokenizer.sample_rate

    @classmethod
    def new(cls, tokenizer: SpeechTokenizer, shape: SpeakerShape = SpeakerShape(), *, seed: int) -> Speaker:
        """An untrained speaker."""
        config = Qwen2Config(
            vocab_size=FIRST_TOKEN + tokenizer.shape.codes, hidden_size=shape.width, intermediate_size=shape.hidden,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
            max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.05, pad_token_id=PAD, eos_token_id=END,
            bos_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(Qwen2ForCausalLM(config), tokenizer, card={"shape": dataclasses.asdict(shape)})

    def fork(self) -> Speaker:
        """A copy with a model of its own and the same tokenizer."""
        return Speaker(copy.deepcopy(self.model), self.tokenizer, card=dict(self.card))

    def prompts(self, lines: Sequence[Line], *, device: str | torch.device | None = None) -> dict[str, Tensor]:
        """input_ids and attention_mask (B, P), filled up on the left, as `token_policy` takes them; device: None for the model's.

        A text without a letter is a prompt without letters: whatever comes of it, nothing breaks.
        """
        rows = [
            [ATTRIBUTES[f"pitch:{line.pitch}"], ATTRIBUTES[f"rate:{line.rate}"]]
            + [FIRST_LETTER + LETTERS.index(c) for c in letters(line.text)] + [SPEECH]
            for line in lines
        ]  # fmt: skip
        longest, device = max(map(len, rows)), device or self.model.device
        ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        return {"input_ids": ids, "attention_mask": mask}

    def targets(self, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """ids (n, L) in the model's vocabulary with the end token, and their mask, of rows of speech tokens (n_i,)."""
        rows = [torch.cat([row + FIRST_TOKEN, torch.tensor([END])]) for row in tokens]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return ids.to(self.model.device), mask.to(self.model.device)

    def tokens(self, sampled: token_policy.Sampled) -> tuple[list[Tensor], Tensor]:
        """Rows of speech tokens (n_i,) of sampled sequences, and which decodes failed (n,): no end within the limit, nothing said,
        or anything but speech tokens before the end (which is left out of the row)."""
        rows, failed = [], []
        for ids, mask in zip(sampled.ids.cpu(), sampled.mask.cpu(), strict=True):
            said = ids[mask]
            ended = len(said) > 0 and int(said[-1]) == END
            body = said[:-1] if ended else said
            rows.append(body[body >= FIRST_TOKEN] - FIRST_TOKEN)
            failed.append(not ended or len(rows[-1]) == 0 or len(rows[-1]) < len(body))
        return rows, torch.tensor(failed)

    def sample(self, lines: Sequence[Line], *, group_size: int = 1, temperature: float, top_p: float = 1.0, max_tokens: int,
               generator: torch.Generator | None = None) -> token_policy.Sampled:  # fmt: skip
        """`token_policy.sample` of the lines, group_size sequences each, siblings adjacent."""
        return token_policy.sample(self.model, self.prompts(lines), group_size=group_size, max_new_tokens=max_tokens,
                                   temperature=temperature, top_p=top_p, generator=generator)

    def say(self, lines: Sequence[Line], *, temperature: float, top_p: float = 1.0, max_tokens: int, seed: int = 0,
            iterations: int = 32, batch_size: int = 64) -> list[Tensor]:  # fmt: skip
        """A clip (T_i,) for each line, empty where the model says nothing."""
        clips = []
        for start in range(0, len(lines), batch_size):
            random = torch.Generator().manual_seed(seed * 1_000_003 + start)
            sampled = self.sample(lines[start : start + batch_size], temperature=temperature, top_p=top_p, max_tokens=max_tokens,
                                  generator=random)
            clips += self.tokenizer.decode(self.tokens(sampled)[0], iterations=iterations)
        return clips

    def save(self, directory: str | Path, **made) -> None:
        """Writes model and tokenizer in 8 bits as safetensors, and config.json (sizes and training) beside them."""
        with atomic_folder(directory) as folder:
            save_file(storage.packed(_untied(self.model), 8), folder / "model.safetensors")
            save_file(storage.packed(self.tokenizer.state_dict(), 8), folder / "tokenizer.safetensors")
            shapes = {"speaker": self.card["shape"], "tokenizer": dataclasses.asdict(self.tokenizer.shape)}
            training = {key: value for key, value in self.card.items() if key != "shape"} | made
            content = {"class": "Qwen2ForCausalLM", **shapes, "training": training}
            (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> Speaker:
        """What `save` wrote. FileNotFoundError or ValueError in one line where it is not there or damaged."""
        folder = Path(directory)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {folder}: name the folder that Speaker.save wrote")
        content = json.loads((folder / "config.json").read_text())
        tokenizer = SpeechTokenizer(TokenizerShape(**content["tokenizer"]))
        tokenizer.load_state_dict(storage.read(folder / "tokenizer.safetensors"))
        speaker = cls.new(tokenizer.eval().requires_grad_(False), SpeakerShape(**content["speaker"]), seed=0)
        told = speaker.model.load_state_dict(storage.read(folder / "model.safetensors"), strict=False)
        lacks, more = [name for name in told.missing_keys if name != TIED], told.unexpected_keys
        if lacks or more:
            raise ValueError(f"{folder}: model.safetensors lacks {len(lacks)} tensors and holds {len(more)} others "
                             f"({[*lacks, *more][0]}): a damaged folder; copy it again, or train it anew")
        speaker.card |= content["training"]
        return speaker


def _untied(model: Qwen2ForCausalLM) -> Mapping[str, Tensor]:
    """The weights without the output layer, which is the embedding."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != TIED}


def like_lengths(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[int]:
    """Positions of a batch of like length: POOL batches are drawn and sorted by length, and one of them is taken."""
    drawn = torch.randperm(len(lengths), generator=generator)[: POOL * batch_size].tolist()
    drawn.sort(key=lambda place: (lengths[place], place))
    first = int(torch.randint(-(-len(drawn) // batch_size), (1,), generator=generator)) * batch_size
    return drawn[first : first + batch_size]


def blurred(ids: Tensor, codes: int, share: float, generator: torch.Generator) -> Tensor:
    """ids (n, L) with a random share of the speech tokens replaced by any of `codes`; letters, attributes and the end stay."""
    hit = (torch.rand(ids.shape, generator=generator) < share).to(ids.device) & (ids >= FIRST_TOKEN)
    other = torch.randint(codes, ids.shape, generator=generator).to(ids.device) + FIRST_TOKEN
    return torch.where(hit, other, ids)


def fit_speaker(
    tokenizer: SpeechTokenizer, lines: Sequence[Line], tokens: Sequence[Tensor], *, steps: int, batch_size: int, seed: int,
    shape: SpeakerShape = SpeakerShape(), learning_rate: float = 2e-3, history_noise: float = 0.0, checkpoint=None,
    precision: str = "auto", device: str = "cpu",
) -> tuple[Speaker, list[dict]]:  # fmt: skip
    """The supervised start: cross-entropy of the tokens (n_i,) of natural speech of the lines; returns speaker and history.

    history_noise: share of the tokens before that are `blurred`, so that it meets wrong ones as it will when it speaks. Only 0.1
    was tried with full training; what it is worth against 0 is not known.
    History: loss in nats a token, right, the share of tokens that were the likeliest.
    """
    speaker = Speaker.new(tokenizer, shape, seed=seed)
    model, lengths = speaker.model.to(device).train(), [len(row) for row in tokens]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def step(i: int, generator: torch.Generator) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(i, steps, learning_rate, warmup=min(200, max(1, steps // 10)))
        batch = like_lengths(lengths, batch_size, generator)
        ids, mask = speaker.targets([tokens[k] for k in batch])
        with autocast(precision, device):
            before = blurred(ids, speaker.codes, history_noise, generator) if history_noise else ids
            logits = token_policy.token_logits(model, speaker.prompts([lines[k] for k in batch]), before)[mask].float()
        loss = F.cross_entropy(logits, ids[mask])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.item(), "right": (logits.argmax(-1) == ids[mask]).float().mean().item()}

    history = fit(step, steps=steps, modules={"model": model, "optimizer": optimizer}, label="speaker", seed=seed,
                  checkpoint=checkpoint)
    speaker.card |= {"seed": seed, "steps": steps, "batch_size": batch_size, "lines": len(lines), "learning_rate": learning_rate}
    model.eval()
    return speaker, history
