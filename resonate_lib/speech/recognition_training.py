"""The supervised start of `recognition`: transcripts by teacher forcing, with a CTC head beside them that is thrown away.

From nothing, attention alone takes long to find which sound belongs to which word; connectionist temporal classification
(Graves et al. 2006) on letters shows it the order of sounds from the first steps (joint training: arXiv 1609.06773).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonate_lib.rewards.base import learning_rate_at
from resonate_lib.rewards.lalm import LalmShape, build_model, build_processor, card_of
from resonate_lib.rewards.rules import words
from resonate_lib.speech import token_policy
from resonate_lib.speech.recognition import INSTRUCTION, SHAPE, Recogniser, clips_of, fitting

LETTERS = " abcdefghijklmnopqrstuvwxyz0123456789"  # what CTC writes; its class 0 is the blank
POOL = 8  # batches' worth of clips that are drawn together and cut into batches of like length
RAMP, FIRST = 0.3, 0.15  # share of the steps over which longer clips come in, and of the clips, the shortest, it begins with
MASKS = (2, 8, 2, 12)  # SpecAugment (arXiv 1904.08779): number and most mel bands, number and most frames that are hidden


def draw_batch(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[int]:
    """Positions of one batch of clips of like length; every clip is as likely as any other to be in it.

    POOL * batch_size clips are drawn, sorted by their lengths and cut into POOL parts of equal length in all, of which one is
    taken: short clips come many at a time, long ones few, and all batches cost about the same.
    """
    count = min(POOL * batch_size, len(lengths))
    drawn = sorted(torch.randperm(len(lengths), generator=generator)[:count].tolist(), key=lambda place: (lengths[place], place))
    total, part = 0, [[] for _ in range(min(POOL, count))]
    share = sum(lengths[place] for place in drawn) / len(part)
    for place in drawn:
        part[min(int(total / share), len(part) - 1)].append(place)
        total += lengths[place]
    part = [positions for positions in part if positions]
    return part[int(torch.randint(len(part), (1,), generator=generator))]


def admitted(step: int, steps: int, count: int) -> int:
    """How many of `count` clips, the shortest first, are trained on in a step: all from RAMP of the steps on."""
    return max(1, round(count * min(1.0, FIRST + (1 - FIRST) * step / max(1.0, RAMP * steps))))


def hide(features: Tensor, frames: Tensor, generator: torch.Generator) -> Tensor:
    """Log-mels (B, mels, T) with bands and stretches of frames set to each clip's mean, by MASKS."""
    bands, widest, stretches, longest = MASKS
    uniform = torch.rand(len(features), 2 * (bands + stretches), generator=generator).to(features.device)
    hidden = torch.zeros_like(features, dtype=torch.bool)
    bins, times = (torch.arange(size, device=features.device)[None] for size in features.shape[1:])
    for k in range(bands + stretches):
        start, width = uniform[:, 2 * k, None], uniform[:, 2 * k + 1, None]
        if k < bands:
            first = start * (features.shape[1] - widest)
            hidden |= ((bins >= first) & (bins < first + width * widest))[..., None]
        else:
            first = start * frames[:, None]
            hidden |= ((times >= first) & (times < first + width * longest))[:, None]
    return torch.where(hidden, features.mean((1, 2), keepdim=True), features)


def letters_of(text: str) -> list[int]:
    """CTC classes (from 1) of a transcript's letters; what LETTERS lacks is left out."""
    return [LETTERS.index(letter) + 1 for letter in " ".join(words(text)) if letter in LETTERS]


def ctc_loss(logits: Tensor, lengths: Tensor, texts: Sequence[str]) -> Tensor:
    """Negative log-likelihood of the texts' letters in nats a letter; logits (B, S, 1 + letters), lengths (B,) of them real.

    Texts with more letters than there are places count nothing.
    """
    targets = [letters_of(text) for text in texts]
    flat, sizes = torch.tensor([one for target in targets for one in target]), torch.tensor([len(target) for target in targets])
    log_p = logits.float().log_softmax(-1).transpose(0, 1)
    loss = F.ctc_loss(log_p, flat.to(logits.device), lengths.cpu(), sizes, reduction="sum", zero_infinity=True)
    return loss / sizes.sum().clamp_min(1)


def fit_recogniser(
    corpus,
    *,
    vocabulary: Iterable[str],
    steps: int,
    batch_size: int,
    seed: int,
    shape: LalmShape = SHAPE,
    learning_rate: float = 2e-3,
    ctc_weight: float = 1.0,
    checkpoint: Path | None = None,
    precision: str = "float32",
    device: str = "cpu",
) -> tuple[Recogniser, list[dict]]:
    """Trains a recogniser from nothing; returns it and the history (losses in nats a token and a letter, share of right tokens).

    corpus: `data.speech.SpeechCorpus`, all of its clips that fit. vocabulary: words that become one token each. Only the answer's
    tokens are scored. batch_size: clips of mean length in a batch (`draw_batch`). Short clips come first (`admitted`): in them it
    is soonest found out which sound is which word. From when on all are there, parts of them are hidden (`hide`).
    After 300 steps on 1,500 clips with ever longer ones, 0.69 of validation's words are wrong; after 400 of any length, 0.95.
    """
    from resonate_lib.training import autocast, fit

    kept, left_out = fitting(corpus, shape.seconds)
    kept = sorted(kept, key=lambda place: len(corpus.audio[place]))
    lengths = [len(corpus.audio[place]) for place in kept]
    processor = build_processor([*vocabulary, INSTRUCTION], shape)
    recogniser = Recogniser(build_model(processor, shape, seed=seed).to(device), processor)
    model = recogniser.model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(shape.width, 1 + len(LETTERS)).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def step(i: int, generator: torch.Generator) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(i, steps, learning_rate, warmup=min(200, max(1, steps // 10)))
        count = admitted(i, steps, len(kept))
        positions = [kept[place] for place in draw_batch(lengths[:count], batch_size, generator)]
        texts = [corpus.utterances[place].text for place in positions]
        features, frames = recogniser.features(clips_of(corpus, positions))
        ids, mask = recogniser.encode(texts)
        with autocast(precision, device):
            heard = hide(features, frames, generator) if count == len(kept) else features  # what is new is not hidden yet
            found = recogniser.listen(heard, frames)
            logits = token_policy.token_logits(model, recogniser.prompts(found), ids)[mask].float()
            letters = head(found.states)
        loss = F.cross_entropy(logits, ids[mask])
        ctc = ctc_loss(letters, (frames - 1) // 2 + 1, texts)
        optimizer.zero_grad(set_to_none=True)
        (loss + ctc_weight * ctc).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        right = (logits.argmax(-1) == ids[mask]).float().mean().item()
        return {"loss": loss.item(), "ctc": ctc.item(), "right": right, "clips": len(positions)}

    modules = {"model": model, "head": head, "optimizer": optimizer}
    history = fit(step, steps=steps, modules=modules, label="recogniser", seed=seed, checkpoint=checkpoint)
    recogniser.card = card_of(shape, seed=seed, steps=steps, batch_size=batch_size, learning_rate=learning_rate,
                              clips=len(kept), left_out=left_out)  # fmt: skip
    model.eval()
    return recogniser, history


def open_start(run, config, speech, *, seed: int, cache) -> tuple[Recogniser, list[dict]]:
    """The supervised start of a run: `config.source` where one is named, else `recogniser` of the run or the shipped one, else one
    trained here, on `config.supervised_kinds` of the corpus and a few silences, and saved; it lies on the GPU where there is one.
    Also returns the training history, empty where none was.

    config: a RecognitionConfig, speech: a SpeechConfig. Of recordings it is trained on those that `data_choice.open_pool` leaves.
    """
    from resonate_lib.data.speech import SpeechCorpus, open_speech, vocabulary
    from resonate_lib.speech.data_choice import left_by_the_pool, silences

    if config.source:
        from resonate_lib.models import pretrained

        found = Recogniser.load(config.source, dtype="bf16" if config.precision == "bf16" else "float32")
        run.record("inputs", {"recogniser": pretrained.provenance(config.source)})
        return found, []
    folder, state = run.resolve_input("recogniser", optional=True), run.state("recogniser")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if folder is not None:
        return Recogniser.load(folder, device=device), []
    spoken = open_speech(speech, "train", seed=seed, cache=cache, kinds=config.supervised_kinds)
    if speech.speech_folder:
        spoken = spoken.select(left_by_the_pool(len(spoken), config.probe_utterances))
    quiet = silences(config.supervised_silences, "train", seed=seed)
    corpus = SpeechCorpus([*spoken.audio, *quiet.audio], [*spoken.utterances, *quiet.utterances])
    recogniser, history = fit_recogniser(
        corpus, vocabulary=vocabulary(), steps=config.supervised_steps, batch_size=config.supervised_batch_size, seed=seed,
        learning_rate=config.supervised_learning_rate, checkpoint=state, precision=config.precision, device=device,
    )  # fmt: skip
    recogniser.save(run.checkpoint("recogniser"), bits=8)
    return Recogniser.load(run.resolve_input("recogniser"), device=device), history
