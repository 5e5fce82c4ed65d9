"""Pre-training of a generator on captioned audio: codec fit, latent statistics, regression of the velocity or of a diffusion
network's prediction."""

from functools import partial

import numpy as np
import torch

from resonate_lib import flow, online, training
from resonate_lib.data.corpus import LazyCorpus
from resonate_lib.diffusion import Diffusion
from resonate_lib.models.codec import MelCodec
from resonate_lib.models.generator import Generator

VALIDATIONS = 12  # times in a training that the loss on held-out clips is measured; the last time after its last step


def fit_codec(corpus, *, clips: int = 3000, **config) -> tuple[MelCodec, float]:
    """A mel codec fitted on the corpus's first clips; returns it and the share of variance its components keep."""
    codec = MelCodec(sample_rate=corpus.sample_rate, **config)
    count = min(clips, len(corpus))
    kept = codec.fit(corpus.waveforms(range(start, min(start + 128, count))) for start in range(0, count, 128))
    return codec, kept


def encode_corpus(generator: Generator, corpus) -> torch.Tensor:
    """Normalised latents (n, N, C) of the whole corpus; sets latent_mean and latent_std of the network from them first."""
    raw = torch.cat([generator.codec.encode(corpus.waveforms(range(start, min(start + 64, len(corpus)))))
                     for start in range(0, len(corpus), 64)])
    _set_statistics(generator.network, raw)
    return generator.network.normalize(raw)


@torch.no_grad()
def _set_statistics(network, raw: torch.Tensor) -> None:
    network.latent_mean.copy_(raw.mean((0, 1)).view_as(network.latent_mean))
    network.latent_std.copy_(raw.std((0, 1)).view_as(network.latent_std))


def measure_statistics(generator: Generator, corpus, *, clips: int = 512) -> None:
    """Set latent_mean and latent_std of the network from the corpus's first clips, where they are not known (not the published
    codec's width)."""
    if bool(generator.network.latent_mean.isnan().any()):
        count = min(clips, len(corpus))
        parts = (corpus.waveforms(range(start, min(start + 16, count))) for start in range(0, count, 16))
        _set_statistics(generator.network, torch.cat([generator.codec.encode(part) for part in parts]))


def encode_only(generator: Generator, corpus) -> "torch.Tensor | OnlineLatents":
    """Normalised latents (n, N, C) of a corpus under the statistics the network already has: for training a model on. Of
    recordings that are read from disk (`LazyCorpus`) each is encoded when it is asked for."""
    if isinstance(corpus, LazyCorpus):
        return OnlineLatents(generator, corpus)
    return torch.cat([generator.encode_audio(corpus.waveforms(range(start, min(start + 256, len(corpus)))))
                      for start in range(0, len(corpus), 256)])


def held_out(generator: Generator, corpus) -> tuple:
    """(latents, captions) of a corpus as `validation_loss` takes them: the first caption of every clip."""
    return encode_only(generator, corpus), [record["caption"] for record in corpus.records]


class OnlineLatents:
    """Latents of a `LazyCorpus`, encoded when asked for, as the published training does; the codec stays frozen."""

    def __init__(self, generator: Generator, corpus: LazyCorpus):
        self.generator, self.corpus = generator, corpus

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, positions) -> torch.Tensor:
        """Normalised latents (B, N, C) of the positions (a list or a slice): the posterior's mean."""
        positions = range(len(self))[positions] if isinstance(positions, slice) else positions
        return self.generator.encode_audio(self.corpus.waveforms(positions)).cpu()

    def draw(self, positions, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws of the posterior, normalised (B, N, C), and the mask (B, N) of the frames that a recording reaches."""
        waves, samples = self.corpus.with_lengths(positions)
        codec, network = self.generator.codec, self.generator.network
        latents = network.normalize(codec.encode(waves, rng)).cpu()
        frames = (samples / (codec.samples / codec.latent_len)).ceil().clamp(1, codec.latent_len)
        return latents, (torch.arange(codec.latent_len) < frames[:, None]).float()


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then ×0.1 at 80 % and at 90 % of the steps counted from the end of warm-up (the published schedule)."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    after = step - warmup
    return 0.1 ** ((after >= 0.8 * steps) + (after >= 0.9 * steps))


def channel_weight(generator: Generator) -> torch.Tensor | None:
    """(C,) with mean 1: the square root of each raw latent channel's deviation; None for the published codec, all alike."""
    if generator.parts:
        return None
    root = generator.network.latent_std.detach().flatten().sqrt()
    return root / root.mean()


def train(generator: Generator, latents: torch.Tensor, captions, *, steps: int, batch_size: int = 64,
          learning_rate: float = 1e-3, caption_dropout: float = 0.1, time_mean: float = 0.0,
          warmup: int = 100, weight_decay: float = 1e-6, eps: float = 1e-8,
          precision: str = "auto", seed: int = 0, checkpoint=None, held=None,
          label: str = "base", micro_batch: int = 0, checkpointing: bool = False) -> list[dict]:
    """Train generator.network in place on normalised latents (n, N, C); captions(positions, rng) -> list[str].

    held: (latents, captions) of held-out clips: VALIDATIONS of the returned rows then have `validation_loss`, the same loss there
    at the same draws each time, so that its curve shows whether more steps would still help.

    Channels count by the square root of their deviation in the raw latent: whitened principal components are equally loud to
    the network, but the first carry the events and the last only texture. AdamW (0.9, 0.95; eps), gradient norm at most 1,
    published schedule, which ends at a hundredth of the rate. micro_batch: clips per forward and backward (0: all);
    checkpointing: see `FluxAudio`. The loss is flow matching, or generator.diffusion's own at the same draws.
    """
    network, process = generator.network.train(), generator.diffusion or flow
    network.checkpointing, network.adapter = checkpointing, None
    weight = channel_weight(generator)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.95), eps=eps, weight_decay=weight_decay,
                                  fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate_factor, steps=steps, warmup=warmup))

    def positions_of(rng):
        return torch.randint(len(latents), (batch_size,), generator=rng).tolist()

    def step(index, rng):
        positions = positions_of(rng)
        words = np.random.default_rng(int(torch.randint(2**31, (1,), generator=rng)))
        condition = generator.encode_prompts(captions(positions, words))
        drawn, mask = latents.draw(positions, rng) if isinstance(latents, OnlineLatents) else (latents[positions], None)
        if isinstance(latents, OnlineLatents) and index + 1 < steps:  # read while this step is computed
            latents.corpus.prefetch(positions_of(training.step_generator(seed, index + 1)))
        noising = flow.draw_noising(drawn, generator=rng, caption_dropout=caption_dropout, time_mean=time_mean)
        draws = (drawn, mask, *noising)
        optimizer.zero_grad()
        metrics = online.in_parts(partial(_backward, process, network, draws, condition, weight, precision), batch_size,
                                  micro_batch)
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        metrics |= {"grad_norm": norm.item()}
        if held and _validation_is_due(index + 1, steps):
            metrics["validation_loss"] = validation_loss(generator, *held, time_mean=time_mean, precision=precision)
        return metrics

    history = training.fit(step, steps=steps, label=label, seed=seed, checkpoint=checkpoint, save_every=500,
                           modules={"network": network, "optimizer": optimizer, "schedule": schedule})
    network.eval().checkpointing = False
    return history


def _validation_is_due(done: int, steps: int) -> bool:
    return done * VALIDATIONS // steps > (done - 1) * VALIDATIONS // steps


def _backward(process, network, draws, condition, weight, precision, part: slice, share: float) -> dict[str, float]:
    """Add `share` times the gradient of the loss on a part of the batch, whose draws are made. process: `flow`, or a Diffusion."""
    device = network.latent_mean.device
    latents, mask, t, noise, drop = (None if tensor is None else tensor[part].to(device) for tensor in draws)
    with training.autocast(precision, device.type):
        loss = process.noised_loss(network, latents, condition.index(part).to(device), t, noise, drop, mask=mask, weight=weight)
    (loss * share).backward()
    return {"loss": loss.item()}


def train_by(generator: Generator, latents, captions, config, *, steps: int | None = None, learning_rate: float | None = None,
             seed: int = 0, checkpoint=None, held=None, label: str = "base") -> list[dict]:
    """`train` by a `PretrainConfig`; steps and learning_rate stand in for the config's."""
    steps = steps or config.steps
    same = {name: getattr(config, name) for name in ("batch_size", "caption_dropout", "time_mean", "weight_decay", "eps",
                                                     "precision", "micro_batch", "checkpointing")}  # fmt: skip
    return train(generator, latents, captions, steps=steps, learning_rate=learning_rate or config.learning_rate,
                 warmup=min(config.warmup_steps, steps // 4), seed=seed, checkpoint=checkpoint, held=held, label=label, **same)


@torch.no_grad()
def validation_loss(generator: Generator, latents: torch.Tensor, captions: list[str], *, time_mean: float = 0.0, seed: int = 0,
                    precision: str = "auto") -> float:
    """The loss of `train` on held-out latents (n, N, C), every caption kept, at times and noises that the seed fixes."""
    rng, process, weight = torch.Generator().manual_seed(seed), generator.diffusion or flow, channel_weight(generator)
    total = 0.0
    for start in range(0, len(latents), 128):
        part = latents[start : start + 128].to(generator.device)
        condition = generator.encode_prompts(captions[start : start + 128])
        draws = flow.draw_noising(part, generator=rng, caption_dropout=0.0, time_mean=time_mean)
        with training.autocast(precision, generator.device.type):
            loss = process.noised_loss(generator.network, part, condition, *draws, weight=weight)
        total += loss.item() * len(part)
    return total / len(latents)


def build_base(corpus, config, *, validation=None, seed: int = 0, steps: int | None = None, checkpoint=None,
               diffusion: Diffusion | None = None) -> tuple[Generator, list[dict], float]:
    """A generator trained from nothing on a corpus: codec fit, latents, flow matching by a `PretrainConfig`, or with `diffusion`
    a model of that process.

    validation: a corpus of held-out clips whose loss is followed. steps: other than config.steps (a demonstration).
    The latents of the whole corpus are held in memory: at 12,000 scenes 0.14 GB. Returns the generator, the history, and the
    share of variance the codec keeps.
    """
    codec, kept = fit_codec(corpus)
    generator = Generator.new(codec, hidden_dim=config.hidden_dim, depth=config.depth, fused_depth=config.fused_depth,
                              num_heads=config.num_heads, mlp_ratio=config.mlp_ratio,
                              text_seq_len=config.text_seq_len, seed=seed, diffusion=diffusion)
    latents = encode_corpus(generator, corpus)
    held = None if validation is None else held_out(generator, validation)
    history = train_by(generator, latents, corpus.captions, config, steps=steps, seed=seed, checkpoint=checkpoint, held=held,
                       label="diffusion base" if diffusion else "base")
    return generator, history, kept
