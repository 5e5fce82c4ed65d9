"""From waveform to latents and back. `tiny`: a mel codec with a linear (principal component) latent and Griffin-Lim phases.

Latents here are raw (not normalised): the network's latent_mean and latent_std whiten them.
"""

import torch
import torchaudio
from torch import nn

AT_A_TIME = 4  # clips decoded together


def mel_basis(sample_rate: int, n_fft: int, bands: int, f_max: float | None = None) -> torch.Tensor:
    """Slaney mel filters (bands, n_fft // 2 + 1), unit peak-area norm as librosa gives them."""
    return torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, f_max or sample_rate / 2, bands, sample_rate,
                                                 norm="slaney", mel_scale="slaney").T.contiguous()


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
        spectrum = self.linear_spectrum(self.to_mel(latents.float()))
        audio = torchaudio.functional.griffinlim(
            spectrum, self.window, self.n_fft, self.hop, self.n_fft, power=1.0, n_iter=iterations, momentum=0.99,
            length=None, rand_init=False)
        audio = nn.functional.pad(audio, (0, max(0, self.samples - audio.shape[1])))[:, : self.samples]
        return within_full_scale(audio) if limit else audio

    def linear_spectrum(self, mel: torch.Tensor, rounds: int = 4) -> torch.Tensor:
        """Non-negative magnitudes (B, bins, frames) whose mel is close to `mel`: pseudo-inverse, then multiplicative updates."""
        spectrum = (self.inverse @ mel).clamp(min=1e-6)
        target = self.basis.T @ mel
        gram = self.basis.T @ self.basis
        for _ in range(rounds):
            spectrum = spectrum * target / (gram @ spectrum + 1e-9)
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
