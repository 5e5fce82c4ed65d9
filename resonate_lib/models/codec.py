"""From waveform to latents and back, two codecs of one interface.

`MelCodec`, of `tiny`: a mel spectrogram with a linear (principal component) latent and Griffin-Lim phases. `VaeCodec`, of
`paper`: the published log-mel, autoencoder (`vae.py`) and vocoder (`bigvgan.py`). Latents here are raw (not normalised): the
network's latent_mean and latent_std whiten them.
"""

import math
from functools import lru_cache

import torch
import torchaudio
from torch import nn

from resonate_lib.models.bigvgan import BIGVGAN_16K, BIGVGAN_44K, BigVGAN
from resonate_lib.models.vae import MelVAE

__all__ = ["BigVGAN", "MelCodec", "MelVAE", "VaeCodec", "log_mel", "mel_basis", "within_full_scale"]

AT_A_TIME = 4  # clips encoded or decoded together
MELS = {  # the published front ends; `log` is the compression
    "44k": dict(sample_rate=44_100, n_fft=2048, hop=512, bands=128, f_max=22_050.0, log=torch.log),
    "16k": dict(sample_rate=16_000, n_fft=1024, hop=256, bands=80, f_max=8_000.0, log=torch.log10),
}
VOCODERS = {"44k": BIGVGAN_44K, "16k": BIGVGAN_16K}


def mel_basis(sample_rate: int, n_fft: int, bands: int, f_max: float | None = None) -> torch.Tensor:
    """Slaney mel filters (bands, n_fft // 2 + 1), unit peak-area norm as librosa gives them."""
    return torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, f_max or sample_rate / 2, bands, sample_rate,
                                                 norm="slaney", mel_scale="slaney").T.contiguous()


@lru_cache(maxsize=8)
def _front_end(mode: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mel filters (bands, bins) and Hann window of a published front end.

    The filters are `mel_basis` in double precision, rounded once: in single precision a band of few bins is up to 2e-5 off,
    which would show in the logarithm.
    """
    mel = MELS[mode]
    corner, log_step = 15.0, math.log(6.4) / 27  # Slaney's scale: 200/3 Hz a mel up to 15 mel = 1 kHz, logarithmic above
    highest = corner + math.log(mel["f_max"] / 1000) / log_step
    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        points = torch.linspace(0.0, highest, mel["bands"] + 2, dtype=torch.float64)
        edges = torch.where(points < corner, points * 200 / 3, 1000 * torch.exp((points - corner) * log_step))
        bins = torch.linspace(0.0, mel["sample_rate"] / 2, mel["n_fft"] // 2 + 1, dtype=torch.float64)
        low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
        triangles = torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0.0)
        return (triangles * 2 / (high - low)).float().to(device), torch.hann_window(mel["n_fft"], device=device)


def log_mel(waveform: torch.Tensor, mode: str = "44k") -> torch.Tensor:
    """The published spectrogram: waveform (B, T) or (T,) in ±1 -> (B, bands, T // hop) float32; a single clip has B = 1.

    "44k": 44,100 Hz, 128 bands, natural logarithm, hop 512; "16k": 16,000 Hz, 80 bands, decimal logarithm, hop 256. Samples beyond
    ±1 are clamped. Magnitudes are sqrt(re² + im² + 1e-9); their mel is at least 1e-5.
    ValueError for another mode, dtype or shape; T must exceed the reflected margin of 768 (44k) or 384 samples (16k).
    """
    if mode not in MELS:
        raise ValueError(f"mode={mode!r}: allowed {sorted(MELS)}; it names the sample rate of the spectrogram")
    mel = MELS[mode]
    margin = (mel["n_fft"] - mel["hop"]) // 2
    if not (waveform.dim() in (1, 2) and waveform.is_floating_point() and waveform.shape[-1] > margin):
        raise ValueError(f"waveform of shape {tuple(waveform.shape)}, {waveform.dtype}: allowed (B, T) or (T,) of floats in ±1, "
                         f"T at least {margin + 1}; pad the clip or average its channels")
    basis, window = _front_end(mode, waveform.device)
    clips = nn.functional.pad(waveform.float().reshape(-1, waveform.shape[-1]).clamp(-1.0, 1.0), (margin, margin), mode="reflect")
    with torch.autocast(waveform.device.type, enabled=False):  # a product in bf16 would blur the spectrum
        spectrum = torch.stft(clips, mel["n_fft"], mel["hop"], window=window, center=False, return_complex=True)
        magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
        return mel["log"]((basis @ magnitude).clamp(min=1e-5))


def within_full_scale(audio: torch.Tensor) -> torch.Tensor:
    """(B, T) with every clip whose peak exceeds 0.99 brought down to it by one gain."""
    return audio / (audio.abs().amax(dim=1, keepdim=True) / 0.99).clamp(min=1.0)


class MelCodec(nn.Module):
    """Log-compressed mel spectrogram, `frames_per_token` frames a token, projected on principal components.

    16 kHz, 4 s: 31 tokens of 96 numbers. compress(m) = log(1 + gain·m): how loud and quiet are weighed decides what the
    ear recognises, more than the number of components. Fit once on training audio; 3,000 clips are plenty.
    """

    def __init__(self, *, sample_rate=16_000, seconds=4.0, n_fft=1024, hop=256, bands=128, gain=100.0,
                 frames_per_token=8, latent_dim=96):
        super().__init__()
        self.config = dict(sample_rate=sample_rate, seconds=seconds, n_fft=n_fft, hop=hop, bands=bands, gain=gain,
                           frames_per_token=frames_per_token, latent_dim=latent_dim)
        self.sample_rate, self.n_fft, self.hop, self.gain = sample_rate, n_fft, hop, gain
        self.frames_per_token, self.latent_dim = frames_per_token, latent_dim
        self.samples = round(sample_rate * seconds)
        self.latent_len = self.samples // hop // frames_per_token
        basis = mel_basis(sample_rate, n_fft, bands)
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("inverse", torch.linalg.pinv(basis), persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("mean", torch.zeros(bands * frames_per_token))
        self.register_buffer("components", torch.zeros(latent_dim, bands * frames_per_token))

    def mel(self, audio: torch.Tensor) -> torch.Tensor:
        """(B, T) -> compressed mel (B, frames, bands), a whole number of tokens long."""
        audio = nn.functional.pad(audio[:, : self.samples], (0, max(0, self.samples - audio.shape[1])))
        spectrum = torch.stft(audio, self.n_fft, self.hop, window=self.window, return_complex=True).abs()
        frames = self.latent_len * self.frames_per_token
        return torch.log1p(self.gain * (self.basis @ spectrum[..., :frames])).transpose(1, 2)

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        """Waveforms (B, T) -> raw latents (B, N, C)."""
        mel = self.mel(audio)
        tokens = mel.reshape(len(mel), self.latent_len, -1)
        return (tokens - self.mean) @ self.components.T

    def to_mel(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, N, C) -> mel magnitudes (B, bands, frames), not compressed, at least 0."""
        tokens = latents @ self.components + self.mean
        mel = tokens.reshape(len(tokens), self.latent_len * self.frames_per_token, -1)
        return (torch.expm1(mel.clamp(0, 12)) / self.gain).transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, *, iterations: int = 60, limit: bool = True) -> torch.Tensor:
        """Raw latents (B, N, C) -> waveforms (B, T) within ±0.99. `iterations` of fast Griffin-Lim: fewer are cheaper, rougher.

        A clip that would exceed full scale is brought down by one gain, so nothing is clipped and quiet clips keep their
        level; limit=False leaves it as it is, for counting such clips. A few clips at a time: larger spectra than the
        allocator keeps cost more in page faults than in arithmetic (64 at once take 2.5 times as long on a CPU).
        """
        return torch.cat([self._decode(part, iterations, limit) for part in latents.split(AT_A_TIME)])

    def _decode(self, latents, iterations, limit):
        return self._whole(self._invert(self.linear_spectrum(self.to_mel(latents.float())), iterations), limit)

    def _invert(self, spectrum, iterations):
        """Griffin-Lim's waveform (B, T) of magnitudes (B, bins, frames)."""
        return torchaudio.functional.griffinlim(
            spectrum, self.window, self.n_fft, self.hop, self.n_fft, power=1.0, n_iter=iterations, momentum=0.99,
            length=None, rand_init=False)

    def _whole(self, audio, limit):
        """A waveform of the clip's length, within full scale if `limit`."""
        audio = nn.functional.pad(audio, (0, max(0, self.samples - audio.shape[1])))[:, : self.samples]
        return within_full_scale(audio) if limit else audio

    def decode_with_gradient(self, latents: torch.Tensor, *, iterations: int = 60, limit: bool = True) -> torch.Tensor:
        """The very waveforms of `decode`, with a gradient to the latents: that of the magnitudes, at the phases of the result.

        Griffin-Lim can be differentiated, but its phases turn abruptly where a magnitude is small, so that its gradient tells of
        no neighbourhood. Against differences of the rewards along 64 directions (steps of 0.02 of a latent's deviation, 6 clips of
        the shipped base, 2 rounds) this gradient has cosine 0.96 (CLAP) and 0.94 (LALM; 8 rounds: 0.94 and 0.86), the exact one of
        all rounds 0.77 and 0.67 at 0.01.
        """
        return torch.cat([self._decode_with_gradient(part, iterations, limit) for part in latents.split(AT_A_TIME)])

    def _decode_with_gradient(self, latents, iterations, limit):
        spectrum = self.linear_spectrum(self.to_mel(latents.float()))
        with torch.no_grad():
            audio = self._invert(spectrum, iterations)
            heard = torch.stft(audio, self.n_fft, self.hop, window=self.window, return_complex=True)
        magnitudes = torch.polar(spectrum, heard.angle())
        estimate = torch.istft(magnitudes, self.n_fft, self.hop, window=self.window)
        return self._whole(audio + (estimate - estimate.detach()), limit)

    def linear_spectrum(self, mel: torch.Tensor, rounds: int = 4) -> torch.Tensor:
        """Non-negative magnitudes (B, bins, frames) whose mel is close to `mel`: pseudo-inverse, then multiplicative updates."""
        spectrum = (self.inverse @ mel).clamp(min=1e-6)
        target = self.basis.T @ mel
        for _ in range(rounds):
            spectrum = spectrum * target / (self.basis.T @ (self.basis @ spectrum) + 1e-9)
        return spectrum

    @torch.no_grad()
    def fit(self, audio_batches) -> float:
        """Principal components of the tokens of `audio_batches` (an iterable of (B, T)); returns the share of variance kept."""
        total = square = None
        count = 0
        for audio in audio_batches:
            tokens = self.mel(audio).reshape(-1, self.mean.numel()).double()
            total = tokens.sum(0) if total is None else total + tokens.sum(0)
            square = tokens.T @ tokens if square is None else square + tokens.T @ tokens
            count += len(tokens)
        mean = total / count
        values, vectors = torch.linalg.eigh(square / count - torch.outer(mean, mean))
        self.mean.copy_(mean)
        self.components.copy_(vectors[:, -self.latent_dim:].flip(1).T)
        return float(values[-self.latent_dim:].sum() / values.sum())


class VaeCodec(nn.Module):
    """The published codec: log-mel, variational autoencoder and vocoder, frozen, on whatever device its weights are.

    mode "44k": 44,100 Hz, 10 s, 430 latents of 40; "16k": 16,000 Hz, 312 of 20. embed_dim and hidden_dim size the autoencoder,
    vocoder is a BigVGAN configuration: other values than the published make miniatures. Weights begin random; `vae` and `vocoder`
    take the published ones (`vae.remove_weight_norm()` after loading). A state dict of the whole holds normalised weights.
    samples: the length of a decoded clip, at most one latent frame shorter than `seconds`.
    """

    def __init__(self, mode="44k", *, seconds=10.0, embed_dim=None, hidden_dim=None, vocoder=None):
        super().__init__()
        self.vae = MelVAE(mode, embed_dim=embed_dim, hidden_dim=hidden_dim).remove_weight_norm()
        self.vocoder = BigVGAN(VOCODERS[mode] if vocoder is None else vocoder)
        self.requires_grad_(False)
        mel = MELS[mode]
        if (self.vocoder.num_mels, self.vocoder.hop) != (mel["bands"], mel["hop"]):
            raise ValueError(f"vocoder of {self.vocoder.num_mels} bands and hop {self.vocoder.hop}: mode {mode} allows "
                             f"{mel['bands']} and {mel['hop']}; change num_mels and upsample_rates")
        self.config = dict(mode=mode, seconds=seconds, embed_dim=self.vae.embed_dim, hidden_dim=self.vae.hidden_dim,
                           vocoder=dict(VOCODERS[mode] if vocoder is None else vocoder))
        self.mode, self.sample_rate, self.latent_dim = mode, mel["sample_rate"], self.vae.embed_dim
        self.clip_samples = round(self.sample_rate * seconds)
        self.latent_len = self.clip_samples // mel["hop"] // 2
        self.samples = self.latent_len * 2 * mel["hop"]
        if not self.latent_len:
            raise ValueError(f"seconds={seconds}: allowed at least {2 * mel['hop'] / self.sample_rate:.3f}, one latent frame")

    @property
    def device(self) -> torch.device:
        return self.vae.data_mean.device

    def mel(self, audio: torch.Tensor) -> torch.Tensor:
        """(B, T) -> log-mel (B, frames, bands) of `seconds`, cut or padded with zeros."""
        audio = audio.to(self.device)[:, : self.clip_samples]
        return log_mel(nn.functional.pad(audio, (0, self.clip_samples - audio.shape[1])), self.mode).transpose(1, 2)

    def posterior(self, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Waveforms (B, T) -> mean and standard deviation of their raw latents, each (B, N, C); float32 even under autocast."""
        if audio.dim() != 2:
            raise ValueError(f"audio of shape {tuple(audio.shape)}: allowed (B, T); add a dimension to a single clip")
        with torch.autocast(self.device.type, enabled=False):
            parts = [self.vae.encode(self.mel(part).transpose(1, 2)) for part in audio.split(AT_A_TIME)]
        mean, std = (torch.cat(tensors).transpose(1, 2) for tensors in zip(*parts, strict=True))
        return mean, std

    def encode(self, audio: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Waveforms (B, T) -> raw latents (B, N, C): the posterior's mean or, given a generator, a draw mean + std·eps.

        Training draws; the mean is for measuring. Clips are cut to `seconds` or padded with zeros.
        """
        mean, std = self.posterior(audio)
        if generator is None:
            return mean
        return mean + std * torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, *, iterations: int = 0, limit: bool = True) -> torch.Tensor:
        """Raw latents (B, N, C), any N -> waveforms (B, 2·hop·N) within ±0.99, in float32 even under autocast.

        iterations: none here, a vocoder takes one pass; accepted because `MelCodec` trades by it. The published vocoders keep
        within ±1 by themselves (44k: by clamping); limit=True brings a clip above 0.99 down to it by one gain, as `MelCodec` does,
        limit=False is the published output. A few clips at a time bound the memory. ValueError for another shape.
        """
        if latents.dim() != 3 or latents.shape[2] != self.latent_dim:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: allowed (B, N, {self.latent_dim}); transpose them, or use "
                             "the codec they were made with")
        return self.decode_with_gradient(latents, limit=limit)

    def decode_with_gradient(self, latents: torch.Tensor, *, iterations: int = 0, limit: bool = True) -> torch.Tensor:
        """What `decode` gives, with its gradient to the latents, exact: autoencoder and vocoder are smooth."""
        with torch.autocast(self.device.type, enabled=False):
            mels = (self.vae.decode(part.to(self.device).float().transpose(1, 2)) for part in latents.split(AT_A_TIME))
            audio = torch.cat([self.vocoder(mel).squeeze(1) for mel in mels])
        return within_full_scale(audio) if limit else audio
