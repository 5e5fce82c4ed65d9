"""The independent judge of the embedded world: a convolutional event detector that hears waveforms.

Another architecture than the rewards, trained on original scenes they never saw, never on codec or generated audio. It says
which events occur, how often and in which order; its activity threshold is frozen on validation scenes.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from resonate_lib import training
from resonate_lib.data import events, scenes
from resonate_lib.models import storage
from resonate_lib.models.codec import mel_basis

REAL = torch.tensor([events.EVENTS[name].source == "real" for name in scenes.CLASSES])
COUNTABLE = torch.tensor([name in scenes.COUNTABLE for name in scenes.CLASSES])
MAX_COUNT = 4
THRESHOLDS = tuple(np.arange(0.2, 0.75, 0.05).round(2).tolist())  # of activity, tried on validation
MIN_FRAMES = 3  # 0.12 s: the shortest event lasts 0.15 s
SAME_FRAMES = 6  # 0.24 s: onsets of one class are 0.27 s apart or more, so nearer ones are one bark with two edges


class Residual(nn.Module):
    """Two dilated convolutions over time beside an identity."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation),
            nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, width, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Judge(nn.Module):
    """Dilated convolutions over a 64-band mel, and at 25 Hz the activity and the onsets of every class.

    A class is present when it is active for at least 3 frames. Counted classes occur as often as their onsets rise above one
    half, where onsets within a quarter of a second are one; the others count once, however often they swell.
    """

    def __init__(self, width: int = 128, threshold: float = 0.5):
        super().__init__()
        self.config = {"width": width, "threshold": threshold}
        self.register_buffer("window", torch.hann_window(800), persistent=False)
        self.register_buffer("basis", mel_basis(scenes.SAMPLE_RATE, 800, 64), persistent=False)
        self.stem = nn.Sequential(nn.BatchNorm1d(64), nn.Conv1d(64, width, 5, padding=2), nn.ReLU(),
                                  nn.Conv1d(width, width, 4, stride=2, padding=1))
        self.blocks = nn.Sequential(*[Residual(width, dilation) for dilation in (1, 2, 4, 8, 1, 2)])
        self.head = nn.Sequential(nn.Conv1d(3 * width, width, 1), nn.ReLU(), nn.Conv1d(width, 2 * len(scenes.CLASSES), 1))

    @property
    def threshold(self) -> float:
        """Probability from which a class counts as heard; frozen on validation scenes."""
        return self.config["threshold"]

    def mel(self, audio: torch.Tensor) -> torch.Tensor:
        """(B, 64000) -> mel magnitudes (B, 200, 64) at 50 Hz."""
        spectrum = torch.stft(audio, 800, 320, window=self.window, return_complex=True).abs()[..., :200]
        return (self.basis @ spectrum).transpose(1, 2)

    def forward(self, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mel magnitudes (B, 200, 64) -> logits of activity and of onsets, each (B, 100, classes)."""
        return self._decide(self._frames(mel))

    def _frames(self, mel: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.stem(torch.log(mel + 1e-3).transpose(1, 2)))

    def _decide(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.cat([x.mean(2, keepdim=True), x.amax(2, keepdim=True)], dim=1).expand(-1, -1, x.shape[2])
        return self.head(torch.cat([x, whole], dim=1)).float().transpose(1, 2).chunk(2, dim=-1)

    @torch.no_grad()
    def detect(self, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Waveforms (B, 64000) -> counts (B, classes) long, active (B, 100, classes) bool at 25 Hz."""
        counts, active = zip(*(self.read(self.mel(part)) for part in audio.split(64)), strict=True)
        return torch.cat(counts), torch.cat(active)

    @torch.no_grad()
    def read(self, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`detect` for mel magnitudes (B, 200, 64)."""
        activity, onsets = self.eval()(mel)
        on = activity.sigmoid() > self.threshold
        number = torch.where(COUNTABLE, _distinct(onsets.sigmoid() > 0.5).clamp(1, MAX_COUNT), 1)
        return torch.where(on.sum(1) >= MIN_FRAMES, number, 0), on

    @torch.no_grad()
    def hear(self, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Waveforms (B, 64000) -> features averaged over time (B, width), and one logit a class (B, classes).

        The logit is that of the class's third most active frame: its sigmoid is over the threshold just where `detect` hears it.
        """
        features, logits = [], []
        for part in audio.split(64):
            x = self.eval()._frames(self.mel(part))
            features.append(x.mean(2).float())
            logits.append(self._decide(x)[0].topk(MIN_FRAMES, dim=1).values[:, -1])
        return torch.cat(features), torch.cat(logits)

    def score(self, audio: torch.Tensor, metadata: list[dict]) -> dict[str, torch.Tensor]:
        """What was asked against what is heard, each (B,) float32.

        tp, fp, fn: asked and heard occurrences matched within class and count (tp_real … over recorded classes alone).
        exact: the heard multiset is the asked one and the relation is right. order: of clips that ask a sequence and
        contain its events, whether they come in the asked order; nan elsewhere.
        """
        return score_detections(*self.detect(audio), metadata)

    def save(self, folder, **facts):
        """judge.safetensors (8 bits a weight, see `storage`) and judge.json (configuration, threshold, and the facts given: seed,
        scores)."""
        with training.atomic_folder(folder) as temporary:
            save_file(storage.packed(self.state_dict(), 8), temporary / "judge.safetensors")
            (temporary / "judge.json").write_text(json.dumps({"config": self.config, **facts}, indent=1) + "\n")

    @classmethod
    def load(cls, folder) -> "Judge":
        """The judge that `save` wrote. FileNotFoundError where there is none."""
        folder = Path(folder)
        if not (folder / "judge.safetensors").is_file():
            raise FileNotFoundError(f"no judge in {folder}: train it with `python -m resonate_lib run --from-scratch`")
        judge = cls(**json.loads((folder / "judge.json").read_text())["config"])
        judge.load_state_dict(storage.read(folder / "judge.safetensors"))
        return judge.eval()


def _distinct(rising: torch.Tensor) -> torch.Tensor:
    """(B, frames, classes) bool -> (B, classes) long: rising edges that do not follow a counted one within SAME_FRAMES."""
    edges = rising & ~nn.functional.pad(rising, (0, 0, 1, 0))[:, :-1]
    count, last = torch.zeros_like(edges[:, 0], dtype=torch.long), torch.full(edges[:, 0].shape, -SAME_FRAMES)
    for frame in range(edges.shape[1]):
        new = edges[:, frame] & (frame - last >= SAME_FRAMES)
        count, last = count + new, torch.where(new, frame, last)
    return count


def asked_counts(metadata: list[dict]) -> torch.Tensor:
    """(B, classes) long: how often each event is asked."""
    asked = torch.zeros(len(metadata), len(scenes.CLASSES), dtype=torch.long)
    for row, record in zip(asked, metadata, strict=True):
        for name, count in record["groups"]:
            row[scenes.CLASSES.index(name)] += int(count)
    return asked


def score_detections(counts: torch.Tensor, active: torch.Tensor, metadata: list[dict]) -> dict[str, torch.Tensor]:
    """`Judge.score` for what `Judge.detect` gave."""
    asked = asked_counts(metadata)
    tp, fp, fn = torch.minimum(counts, asked), (counts - asked).clamp(min=0), (asked - counts).clamp(min=0)
    order, relation = relation_scores(active, metadata)
    scores = {"tp": tp.sum(1), "fp": fp.sum(1), "fn": fn.sum(1),
              "exact": (counts == asked).all(1) & relation,
              "tp_real": tp[:, REAL].sum(1), "fp_real": fp[:, REAL].sum(1), "fn_real": fn[:, REAL].sum(1)}
    return {name: value.float() for name, value in scores.items()} | {"order": order}


def relation_scores(active: torch.Tensor, metadata: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """(order (B,) float with nan, relation right (B,) bool) from frame activity (B, frames, classes).

    A sequence is right when each group's mean active frame lies before the next one's and they overlap in less than half of
    the shorter; "while" is right when the two overlap in at least a third of the shorter.
    """
    order = torch.full((len(metadata),), float("nan"))
    right = torch.ones(len(metadata), dtype=torch.bool)
    for index, record in enumerate(metadata):
        names = [name for name, _ in record["groups"]]
        if len(names) == 1:
            continue
        tracks = [active[index, :, scenes.CLASSES.index(name)] for name in names]
        if not all(bool(track.any()) for track in tracks):
            right[index] = False
            continue
        pairs = list(itertools.pairwise(tracks))
        shared = [float((a & b).sum() / min(a.sum(), b.sum())) for a, b in pairs]
        if record["relation"] == "while":
            right[index] = shared[0] >= 1 / 3
            continue
        centres = [float(track.nonzero().float().mean()) for track in tracks]
        in_order = all(a < b for a, b in itertools.pairwise(centres))
        order[index] = float(in_order)
        right[index] = in_order and max(shared) < 0.5
    return order, right


def fit_judge(corpus, *, steps: int = 2500, batch_size: int = 48, learning_rate: float = 2e-3, seed: int = 7,
              checkpoint=None, precision: str = "auto") -> tuple[Judge, list[dict]]:
    """Train a judge on original scenes: binary cross-entropy of activity and (three times as heavy) of onsets, at 25 Hz."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    positions = torch.arange(len(corpus))
    with torch.no_grad():
        mels = torch.cat([judge.mel(corpus.waveforms(part)).half() for part in positions.split(256)])
    activity = torch.cat([corpus.activity(part.tolist()).bool() for part in positions.split(1024)])
    onsets = torch.cat([corpus.onsets(part.tolist()).bool() for part in positions.split(1024)])

    def step(index, generator):
        judge.train()
        chosen = torch.randint(len(corpus), (batch_size,), generator=generator)
        with training.autocast(precision):
            active, rising = judge(_augment(mels[chosen].float(), generator))
        cross_entropy = nn.functional.binary_cross_entropy_with_logits
        activity_loss = cross_entropy(active, activity[chosen].float())
        onset_loss = cross_entropy(rising, onsets[chosen].float())
        loss = activity_loss + 3 * onset_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return {"loss": loss.item(), "activity_loss": activity_loss.item(), "onset_loss": onset_loss.item()}

    history = training.fit(step, steps=steps, label="judge", seed=seed, checkpoint=checkpoint, save_every=200,
                           modules={"judge": judge, "optimizer": optimizer, "schedule": schedule})
    return judge.eval(), history


def _augment(mel, generator):
    """Mel magnitudes (B, frames, bands) of originals as another microphone, room or a poor reproduction would give them.

    Random gain (±6 dB), tilt (±4 dB from end to end), pitch (±1 band) and two masked bands: a judge of two takes an animal
    must not mind the microphone, nor lean on one partial. Half of the clips also get slow random swells (up to 5 dB deviation), a
    blur over neighbouring frames and a noise floor 30 to 70 dB under the peak: a tone whose level wavers is one tone.
    """
    uniform = lambda *shape: torch.rand(len(mel), *shape, generator=generator)  # noqa: E731
    decibels = uniform(2, 1, 1) * 2 - 1
    tilt = torch.linspace(-1, 1, mel.shape[-1])
    mel = mel * 10 ** ((6 * decibels[:, 0] + 4 * decibels[:, 1] * tilt) / 20)
    bands = torch.arange(mel.shape[-1])
    shift = torch.randint(-1, 2, (len(mel), 1), generator=generator)
    mel = mel.gather(2, (bands + shift).clamp(0, len(bands) - 1)[:, None].expand_as(mel))
    masked = torch.randint(len(bands), (len(mel), 2), generator=generator)
    near = ((bands - masked[:, :, None]).abs() <= 1).any(1)
    mel = mel * (1 - 0.9 * near[:, None].float())
    poor = (uniform(1, 1) < 0.5).float()
    swell = torch.randn(len(mel), 1, mel.shape[1] // 5, mel.shape[2] // 4, generator=generator)
    swell = nn.functional.interpolate(swell, size=mel.shape[1:], mode="bilinear")[:, 0]
    mel = mel * 10 ** (5 * poor * uniform(1, 1) * swell / 20)
    share = 0.3 * poor * uniform(1, 1)
    padded = nn.functional.pad(mel, (0, 0, 1, 1))
    mel = (1 - 2 * share) * mel + share * (padded[:, :-2] + padded[:, 2:])
    floor = mel.amax((1, 2), keepdim=True) * 10 ** (-(30 + 40 * uniform(1, 1)) / 20)
    return mel + poor * floor * torch.randn(mel.shape, generator=generator).abs()


@torch.no_grad()
def freeze_threshold(judge: Judge, corpus, thresholds=THRESHOLDS, *, seed: int = 0) -> float:
    """Set the activity threshold by exact match on (validation) scenes, as they are and augmented, and return it.

    The middle of all that are within one standard error of the best: between those validation cannot choose.
    """
    generator, exact = torch.Generator().manual_seed(seed), []
    mels = [judge.mel(corpus.waveforms(part)) for part in torch.arange(len(corpus)).split(64)]
    mels += [_augment(mel, generator) for mel in mels]
    records = list(corpus.records) * 2
    for threshold in thresholds:
        judge.config["threshold"] = round(float(threshold), 3)
        counts, active = zip(*map(judge.read, mels), strict=True)
        exact.append(float(score_detections(torch.cat(counts), torch.cat(active), records)["exact"].mean()))
    best = max(exact)
    error = (best * (1 - best) / len(corpus)) ** 0.5  # a scene heard twice is one scene
    good = [threshold for threshold, share in zip(thresholds, exact, strict=True) if share >= best - error]
    judge.config["threshold"] = round(float(good[len(good) // 2]), 3)
    return judge.threshold
