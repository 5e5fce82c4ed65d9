"""A reward that reads speech tokens: what text they say, with which pitch and rate, and what share of them is right.

It takes one-hot rows as well as whole numbers, so that Gumbel-Softmax draws carry its gradient to whoever made the tokens. Text is
read by connectionist temporal classification (Graves et al. 2006). Source: DiffRO's token-to-text reward (arXiv 2507.05911), with
its multi-task reward as further heads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from resonate_lib.models import storage
from resonate_lib.rewards.base import learning_rate_at
from resonate_lib.speech.lines import PITCH, RATE, Line
from resonate_lib.speech.synthesis import LETTERS, letters, like_lengths
from resonate_lib.training import atomic_folder, autocast, fit

PARTS = ("text", "pitch", "rate", "quality")
WORST = -6.0  # nats a letter, where a row has too few tokens for its text: what is read in noise is about as likely
UP = 2  # places that read letters for every token: fast speech has more letters than tokens


@dataclass(frozen=True)
class ReaderShape:
    """The size of the reward model."""

    codes: int = 1024
    width: int = 96
    layers: int = 4


class Block(nn.Module):
    """A gated residual convolution over 5 tokens."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, 2 * width, 5, padding=2 * dilation, dilation=dilation)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x (B, L, width), real (B, L, 1): what lies beyond a row's end is 0 before every convolution, whatever the batch."""
        return x + F.glu(self.conv((self.norm(x) * real).transpose(1, 2)), dim=1).transpose(1, 2)


class TokenReader(nn.Module):
    """Speech tokens to letters (CTC), pitch class, rate class and quality."""

    def __init__(self, shape: ReaderShape = ReaderShape()):
        super().__init__()
        self.shape = shape
        self.embed = nn.Linear(shape.codes, shape.width, bias=False)  # of one-hot rows: a table whose rows can be mixed
        self.blocks = nn.ModuleList(Block(shape.width, 1 + place % 2) for place in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.letters = nn.Linear(shape.width, UP * (1 + len(LETTERS)))
        self.classes = nn.Linear(2 * shape.width, len(PITCH) + len(RATE) + 1)

    def forward(self, weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """weights (B, L, codes), one-hot or soft, mask (B, L) bool: log-probabilities of letters (B, 2 L, 1 + letters), class 0 the
        blank, and logits (B, 7): pitch, rate, quality."""
        real = mask[..., None].to(weights.dtype)
        x = self.embed(weights) * real
        for block in self.blocks:
            x = block(x, real)
        x = self.norm(x) * real
        read = self.letters(x).unflatten(-1, (UP, -1)).flatten(1, 2)
        mean = x.sum(1) / real.sum(1).clamp_min(1)
        spread = ((x - mean[:, None]).square() * real).sum(1) / real.sum(1).clamp_min(1)
        return read.float().log_softmax(-1), self.classes(torch.cat([mean, (spread + 1e-6).sqrt()], -1)).float()

    def one_hot(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Weights (B, L, codes) and mask (B, L) of rows of tokens (n_i,); L is at least 1."""
        device = self.embed.weight.device
        ids = nn.utils.rnn.pad_sequence([F.pad(row, (0, int(len(row) == 0))) for row in rows], batch_first=True).to(device)
        mask = torch.arange(ids.shape[1], device=device) < torch.tensor([len(row) for row in rows], device=device)[:, None]
        return F.one_hot(ids, self.shape.codes).float() * mask[..., None], mask

    def parts(self, weights: Tensor, mask: Tensor, lines: Sequence[Line]) -> dict[str, Tensor]:
        """What each row (B,) is worth, with gradients to `weights`.

        text: log-likelihood of the line's letters in nats a letter (CTC), WORST without a gradient where there are too few tokens
        for them, 0 for a line without letters; pitch, rate: log-probability of the class
        asked for; quality: the share of tokens that are right, as estimated of rows of which some were made wrong (`corrupt`).
        """
        read, logits = self(weights, mask)
        wanted, sizes = (column.to(weights.device) for column in _targets(lines))
        nats = F.ctc_loss(read.transpose(0, 1), wanted, UP * mask.sum(1), sizes, reduction="none", zero_infinity=True)
        sizes = sizes.to(nats)
        text = torch.where((nats == 0) & (sizes > 0), WORST, -nats / sizes.clamp_min(1)) * (sizes > 0)
        pitch, rate, quality = logits.split([len(PITCH), len(RATE), 1], dim=-1)
        asked = _ways(lines).to(weights.device)
        return {
            "text": text,
            "pitch": pitch.log_softmax(-1).gather(1, asked[:, :1]).flatten(),
            "rate": rate.log_softmax(-1).gather(1, asked[:, 1:]).flatten(),
            "quality": quality.flatten().sigmoid(),
        }

    @torch.no_grad()
    def read(self, rows: Sequence[Tensor]) -> list[str]:
        """The letters of each row of tokens (n_i,): the likeliest at every place, repeats and blanks left out."""
        weights, mask = self.one_hot(rows)
        best = self(weights, mask)[0].argmax(-1)
        texts = []
        for row, length in zip(best, (UP * mask.sum(1)).tolist(), strict=True):
            merged = torch.unique_consecutive(row[:length])
            texts.append(" ".join("".join(LETTERS[k - 1] for k in merged.tolist() if k).split()))
        return texts

    def save(self, directory: str | Path, **made) -> None:
        """Writes the weights in 8 bits as safetensors, and config.json beside them."""
        with atomic_folder(directory) as folder:
            save_file(storage.packed(self.state_dict(), 8), folder / "model.safetensors")
            content = {"class": "TokenReader", "shape": dataclasses.asdict(self.shape), "training": made}
            (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> TokenReader:
        """What `save` wrote, frozen. FileNotFoundError or ValueError in one line where it is not there or damaged."""
        folder = Path(directory)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {folder}: name the folder that TokenReader.save wrote")
        reader = cls(ReaderShape(**json.loads((folder / "config.json").read_text())["shape"]))
        reader.load_state_dict(storage.read(folder / "model.safetensors"))
        return reader.eval().requires_grad_(False)


def mixed(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum (B,) of the parts by their weights; a part without a weight counts nothing. ValueError for an unknown name."""
    if unknown := set(weights) - set(PARTS):
        raise ValueError(f"weights of {sorted(unknown)}: the parts of a token reward are {', '.join(PARTS)}")
    return sum(weight * parts[name] for name, weight in weights.items())


def _targets(lines: Sequence[Line]) -> tuple[Tensor, Tensor]:
    """Letters of all lines end to end as CTC classes from 1, and how many each has."""
    classes = [[LETTERS.index(c) + 1 for c in letters(line.text)] for line in lines]
    return torch.tensor([k for row in classes for k in row], dtype=torch.long), torch.tensor([len(row) for row in classes])


def _ways(lines: Sequence[Line]) -> Tensor:
    """Pitch and rate classes (B, 2) asked for."""
    return torch.tensor([[list(PITCH).index(line.pitch), list(RATE).index(line.rate)] for line in lines])


def corrupt(rows: Sequence[Tensor], codes: int, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """Half of the rows with a share of their tokens replaced, repeated or dropped, and the share that is right (B,), 1 of the rest.

    The share is drawn uniformly up to a half; each of the three ways is as likely as the others.
    """
    share = torch.rand(len(rows), generator=generator) * 0.5 * (torch.rand(len(rows), generator=generator) < 0.5)
    made = []
    for row, part in zip(rows, share.tolist(), strict=True):
        hit = torch.rand(len(row), generator=generator) < part
        way = int(torch.randint(3, (1,), generator=generator))
        if way == 0:
            made.append(torch.where(hit, torch.randint(codes, row.shape, generator=generator), row))
        elif way == 1:
            made.append(row.repeat_interleave(1 + 2 * hit.long()))
        else:
            made.append(row[~hit] if not hit.all() else row)
    return made, 1 - share


def fit_reader(
    lines: Sequence[Line], tokens: Sequence[Tensor], *, steps: int, batch_size: int, seed: int, shape: ReaderShape = ReaderShape(),
    learning_rate: float = 2e-3, checkpoint=None, precision: str = "auto",
    device: str = "cpu",
) -> tuple[TokenReader, list[dict]]:  # fmt: skip
    """The reward model trained on tokens (n_i,) of natural speech of the lines, half of them corrupted; returns it and the history.

    A row's text counts as far as it is right, so that what is hard to read gets no confident reading; pitch, rate and quality are
    always asked. History: losses in nats a letter and a row, right: how often pitch and rate are told.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = TokenReader(shape).to(device).train()
    lengths = [len(row) for row in tokens]
    optimizer = torch.optim.AdamW(reader.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def step(i: int, generator: torch.Generator) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(i, steps, learning_rate)
        batch = like_lengths(lengths, batch_size, generator)
        asked = [lines[k] for k in batch]
        rows, right = corrupt([tokens[k] for k in batch], shape.codes, generator)
        weights, mask = reader.one_hot(rows)
        with autocast(precision, device):
            read, logits = reader(weights, mask)
        right, (wanted, sizes) = right.to(device), (column.to(device) for column in _targets(asked))
        nats = F.ctc_loss(read.transpose(0, 1), wanted, UP * mask.sum(1), sizes, reduction="none", zero_infinity=True)
        text = (right * nats / sizes.clamp_min(1)).mean()
        pitch, rate, quality = logits.split([len(PITCH), len(RATE), 1], dim=-1)
        truth = _ways(asked).to(device)
        ways = F.cross_entropy(pitch, truth[:, 0]), F.cross_entropy(rate, truth[:, 1])
        natural = F.binary_cross_entropy_with_logits(quality.flatten(), right)
        optimizer.zero_grad(set_to_none=True)
        (text + 0.2 * sum(ways) + 0.2 * natural).backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        told = torch.stack([pitch.argmax(-1), rate.argmax(-1)], 1) == truth
        return {"text": text.item(), "ways": sum(ways).item(), "quality": natural.item(), "right": told.float().mean().item()}

    history = fit(step, steps=steps, modules={"reader": reader, "optimizer": optimizer}, label="token reward", seed=seed,
                  checkpoint=checkpoint)
    return reader.eval().requires_grad_(False), history
