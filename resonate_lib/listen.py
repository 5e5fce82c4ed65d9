"""Hearing the difference: players side by side, a page that plays anywhere, and a blind test with its preference rate.

An item is a dict: prompt (str), clips (label -> mono waveform (T,), the same prompt and noise for each), and if
wanted id, note. Within an item all clips share one gain, which is shown, so that differences in loudness stay
audible. The template of the page is `listen.html` beside this file; sound is embedded as mp3, pictures as PNG, so
nothing else is needed to open it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import ipywidgets
import matplotlib
import numpy as np
import pandas as pd
import torch
from IPython.display import HTML
from PIL import Image

from resonate_lib import audio as audio_io
from resonate_lib import plots
from resonate_lib.evaluation import stats

BASE = "base"
PREFERENCE = "preference"
QUESTIONS = {  # what a blind test asks, by the name that its answers carry
    PREFERENCE: "Which clip matches the text better?",
    "consistency": "Which clip agrees better with the text (semantic consistency)? How clean it sounds does not count.",
}
MUTE = (
    "No sound, or no player? The notebook is not trusted yet: run <code>jupyter trust</code> on this file and open it "
    "again, or open <code>listen.html</code> (notebook 08: <code>listen_ppo.html</code>) in the run's folder."
)
TEMPLATE = Path(__file__).with_name("listen.html")
PICTURE = (96, 32)  # rows of the spectrogram picture, shades: small enough to embed hundreds


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _array(waveform) -> np.ndarray:
    samples = torch.as_tensor(waveform).detach().float().cpu().numpy()
    if not np.isfinite(samples).all():
        raise ValueError("a clip holds NaN or infinite samples; leave it out or look for the step that made them")
    return samples


def _sound(waveform, sample_rate: int, gain: float) -> str:
    return _uri(audio_io.encode(_array(waveform) * gain, sample_rate, ".mp3"), "audio/mpeg")


def _picture(decibels: np.ndarray, top: float) -> str:
    """A spectrogram (bins, frames) as a small palette PNG, 80 dB down from `top`; of pooled bins the highest."""
    rows, shades = PICTURE
    edges = np.linspace(0, len(decibels), rows + 1).astype(int)[:-1]
    pooled = np.maximum.reduceat(decibels, edges, axis=0)[::-1]
    scaled = np.clip((pooled - top) / -plots.FLOOR_DB + 1, 0, 1)
    image = Image.fromarray((scaled * (shades - 1)).round().astype(np.uint8), mode="P")
    colors = matplotlib.colormaps["magma"](np.linspace(0, 1, shades))[:, :3]
    image.putpalette((colors * 255).round().astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, bits=5)
    return _uri(buffer.getvalue(), "image/png")


def _loudness_match(clips: Mapping[str, object], sample_rate: int) -> dict[str, float]:
    """Per clip the factor (at most 1) that makes it as loud as the quietest (BS.1770); silence: 1."""
    levels = {}
    for label, clip in clips.items():
        levels[label] = audio_io.loudness(clip, sample_rate) if len(clip) >= 0.4 * sample_rate else math.nan
    quietest = min((v for v in levels.values() if math.isfinite(v)), default=math.nan)
    return {label: 10 ** ((quietest - v) / 20) if math.isfinite(v) else 1.0 for label, v in levels.items()}


def _figures(
    item: Mapping, sample_rate: int, *, match: bool = False, prefix: str = "", foot: str = ""
) -> tuple[str, float]:
    """The players of one item as HTML, and their common gain; match: apply the loudness match to the sound."""
    clips = _checked(item)["clips"]
    clips = {label: _array(clip) for label, clip in clips.items()}
    factors = _loudness_match(clips, sample_rate)
    heard = {label: clip * (factors[label] if match else 1.0) for label, clip in clips.items()}
    gain = audio_io.common_gain(list(heard.values()))
    decibels = {label: plots.spectrogram_db(clip * gain, sample_rate) for label, clip in heard.items()}
    top = max(float(values.max()) for values in decibels.values())
    parts = []
    for index, (label, clip) in enumerate(heard.items()):
        name, prompt = html.escape(label), html.escape(item["prompt"])
        identity = f' id="{prefix}-{index}" data-match="{factors[label]:.6g}"' if prefix else ""
        parts.append(
            f"<figure style='margin:0'><figcaption>{name}</figcaption>"
            f'<img alt="Spectrogram of {name}: {prompt}" style="width:100%;height:7rem" '
            f'src="{_picture(decibels[label], top)}">'
            f'<audio controls{identity} aria-label="{name}: {prompt}" style="width:100%" '
            f'src="{_sound(clip, sample_rate, gain)}"></audio>{foot}</figure>'
        )
    return "\n".join(parts), gain


def _checked(item: Mapping) -> Mapping:
    if not item.get("clips") or "prompt" not in item:
        raise ValueError(f"item with {sorted(item)}: it needs prompt and clips (label -> waveform), at least one clip")
    return item


def _meta(item: Mapping, clips: Mapping, sample_rate: int, gain: float) -> str:
    seconds = max(len(clip) for clip in clips.values()) / sample_rate
    note = f"{html.escape(str(item['note']))}. " if item.get("note") else ""
    return (
        f"{note}Common gain {20 * math.log10(gain):+.1f} dB. Spectrograms: 0–{seconds:.1f} s, "
        f"0–{sample_rate / 2000:g} kHz, one scale of {-plots.FLOOR_DB:g} dB for all."
    )


def side_by_side(
    prompt: str, clips: Mapping[str, object], sample_rate: int, *, match_loudness: bool = False, note: str = ""
) -> HTML:
    """Players and spectrograms of the clips of one prompt, beside each other, for a notebook.

    clips: label -> waveform (T,). One common gain and one dB scale for all; match_loudness makes all as loud as the
    quietest (ITU-R BS.1770) before that gain. Under each player stands what to do when it is mute.
    """
    item = {"prompt": prompt, "clips": clips, "note": note}
    figures, gain = _figures(item, sample_rate, match=match_loudness, foot=f"<small>{MUTE}</small>")
    matched = " Loudness matched to the quietest clip." if match_loudness else ""
    return HTML(
        f"<div><p><b>{html.escape(prompt)}</b><br><small>{_meta(item, clips, sample_rate, gain)}{matched}</small></p>"
        '<div style="display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:1rem">'
        f"{figures}</div></div>"
    )


def listen_page(
    path: str | os.PathLike,
    items: Sequence[Mapping],
    title: str,
    *,
    sample_rate: int,
    note: str = "",
    base: str = BASE,
    seed: int = 0,
    question: str = PREFERENCE,
    models: str = "",
) -> Path:
    """Write one self-contained page: a section per prompt, a player per system, and a blind test without a server.

    items: see the module's text. The blind test holds every other system against `base`, in an order drawn from
    `seed`, and asks the `question` of that name in QUESTIONS; it is hidden when no item has both. No clip is embedded twice: the
    page decodes the two of a trial and scales their samples to equal loudness. models: see `make_trials`. The same input gives the
    same bytes. Raises ValueError for no items, a broken item or another question.
    """
    asked = _asked(question)
    if not items:
        raise ValueError("no items to listen to: pass at least one dict with prompt and clips")
    sections = []
    for index, item in enumerate(items):
        figures, gain = _figures(item, sample_rate, prefix=f"clip-{index}")
        sections.append(
            f'<section class="item"><h3>{html.escape(item["prompt"])}</h3>'
            f'<p class="meta">{_meta(item, item["clips"], sample_rate, gain)}</p>'
            f'<div class="clips">{figures}</div></section>'
        )
    body, trials = "\n".join(sections), make_trials(items, seed, base=base, models=models)
    data = {  # page: under which name a browser keeps the answers to these trials
        "page": hashlib.sha256(f"{question}\n{trials}\n{body}".encode()).hexdigest()[:12],
        "question": question,
        "base": base,
        "rate": sample_rate,
        "items": [list(item["clips"]) for item in items],
        "trials": trials,
    }
    fields = {
        "TITLE": html.escape(title),
        "NOTE": f"<p>{html.escape(note)}</p>" if note else "",
        "QUESTION": html.escape(asked),
        "BASE": html.escape(base),
        "ITEMS": body,
        # inside <script> only "<" can end the element or start a comment
        "DATA": json.dumps(data, ensure_ascii=True).replace("<", "\\u003c"),
    }
    page = re.sub("%%([A-Z]+)%%", lambda match: fields[match[1]], TEMPLATE.read_text(encoding="utf-8"))
    audio_io.write_bytes(path, page.encode())
    return Path(path)


# ---- blind test -------------------------------------------------------------------------------------------------


def _asked(question: str) -> str:
    if question not in QUESTIONS:
        raise ValueError(f"question={question!r}: allowed are {', '.join(map(repr, QUESTIONS))}")
    return QUESTIONS[question]


def make_trials(
    items: Sequence[Mapping], seed: int, *, base: str = BASE, models: str = "", count: int | None = None
) -> list[dict]:
    """Trials of `base` against every other system of each item, order and sides drawn from the seed; of them the first `count`.

    Each is a dict: trial (number), item (index), id, prompt, a, b (labels), models. Of a system's trials half have it as A (of an
    odd number one more or one less, by the seed), so that a liking for a side favours nobody. Items without `base` give none.
    models: what tells the weights that made the clips from others (`Run.fingerprint`); the answers carry it, and those about other
    weights do not count as answers to these trials.
    """
    rng = random.Random(seed)
    with_base = [(index, item) for index, item in enumerate(items) if base in _checked(item)["clips"]]
    pairs = [(index, other) for index, item in with_base for other in item["clips"] if other != base]
    rng.shuffle(pairs)
    pairs = pairs[:count]
    first = {}  # per system, for each of its trials whether it is A
    for system in sorted({other for _, other in pairs}):
        number, start = sum(other == system for _, other in pairs), rng.randrange(2)
        first[system] = [(start + i) % 2 for i in range(number)]
        rng.shuffle(first[system])
    trials = []
    for number, (index, other) in enumerate(pairs):
        a, b = (other, base) if first[other].pop() else (base, other)
        item = {"item": index, "id": str(items[index].get("id", index)), "prompt": items[index]["prompt"]}
        trials.append({"trial": number, **item, "a": a, "b": b, "models": models})
    return trials


class BlindTest:
    """The blind test in a notebook, all clips equally loud (BS.1770): `.widget` to show.

    Every answer is appended to `<folder>/<listener>.jsonl` at once. items, sample_rate: as in `listen_page`; trials: from
    `make_trials`; question: a name in QUESTIONS, which the answers carry. A listener who comes back goes on at the first trial
    without an answer in that file, so use one folder per run version.
    """

    def __init__(
        self, items: Sequence[Mapping], trials: Sequence[dict], folder, *, sample_rate: int, listener: str = "listener",
        question: str = PREFERENCE,
    ):  # fmt: skip
        self.items, self.trials, self.sample_rate = items, list(trials), sample_rate
        self.question, self.asked = question, _asked(question)
        self.listener = listener
        self.path = Path(folder) / f"{re.sub(r'[^A-Za-z0-9_-]', '_', listener) or 'listener'}.jsonl"
        answered = {_asked_of(answer) for answer in (_read_answers(self.path) if self.path.exists() else ())}
        who = {"listener": listener, "question": question}
        self.open = [trial for trial in self.trials if _asked_of(trial | who) not in answered]
        self._text, self._players = ipywidgets.HTML(), ipywidgets.HTML()
        choices = (("A", "A"), ("B", "B"), ("tie", "No difference"))
        self._buttons = [ipywidgets.Button(description=text) for _, text in choices]
        for button, (choice, _) in zip(self._buttons, choices, strict=True):
            button.on_click(self._handler(choice))
        self.widget = ipywidgets.VBox([self._text, self._players, ipywidgets.HBox(self._buttons)])
        self._show()

    def _handler(self, choice: str) -> Callable:
        return lambda _: self.choose(choice)

    def choose(self, choice: str) -> None:
        """Answer the trial shown with "A", "B" or "tie", write the answer, and show the next trial."""
        if choice not in ("A", "B", "tie"):
            raise ValueError(f"choice={choice!r}: allowed are 'A', 'B' and 'tie'")
        if not self.open:
            raise ValueError("all trials are answered: make some of other prompts to go on")
        trial = self.open[0]
        preferred = {"A": trial["a"], "B": trial["b"], "tie": "tie"}[choice]
        answer = {key: trial[key] for key in ("trial", "id", "prompt", "a", "b", "models") if key in trial}
        answer |= {"choice": choice, "preferred": preferred, "question": self.question, "listener": self.listener}
        append_answer(self.path, answer | {"time": datetime.now(UTC).isoformat(timespec="seconds")})
        self.open.pop(0)
        self._show()

    def _show(self) -> None:
        for button in self._buttons:
            button.disabled = not self.open
        if not self.open:
            self._text.value = f"<b>Done:</b> {len(self.trials)} answers in {html.escape(str(self.path))}"
            self._players.value = ""
            return
        trial = self.open[0]
        clips = self.items[trial["item"]]["clips"]
        factors = _loudness_match(clips, self.sample_rate)  # over the whole item: no level tells which system it is
        pair = {side: _array(clips[trial[side.lower()]]) * factors[trial[side.lower()]] for side in ("A", "B")}
        gain = audio_io.common_gain([_array(clip) * factors[label] for label, clip in clips.items()])
        number = len(self.trials) - len(self.open) + 1
        self._text.value = (
            f"Trial {number} of {len(self.trials)}: <b>{html.escape(trial['prompt'])}</b><br>{html.escape(self.asked)}"
        )
        self._players.value = "".join(
            f'<p>{name} <audio controls aria-label="Clip {name}" src="{_sound(clip, self.sample_rate, gain)}"></audio>'
            f"<br><small>{MUTE}</small></p>"
            for name, clip in pair.items()
        )


def append_answer(path: str | os.PathLike, answer: Mapping) -> None:
    """Append one answer as a JSON line; what stands in the file is never changed. OSError names the fix."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(dict(answer), ensure_ascii=False) + "\n")
    except OSError as error:
        raise OSError(
            f"{path}: the answer cannot be written ({error.strerror}); free space or choose another folder"
        ) from None


def load_answers(folder: str | os.PathLike, *, models: str | None = None) -> list[dict]:
    """The answers of the *.jsonl files of a folder, from notebooks or downloaded, in order of time. models: only those about these
    (`make_trials`); None: all.

    Who answers twice (on the page and in the notebook, or after "Forget answers") has heard the clips before: of the answers of
    one listener to one question about one pair of clips (id, both labels, models) only the first by time is taken; the files keep
    all. So every listener needs a name of their own. An answer without a time counts as earlier than any with one.
    """
    found = [answer for path in sorted(Path(folder).glob("*.jsonl")) for answer in _read_answers(path)]
    answers: dict[tuple, dict] = {}
    for answer in sorted(found, key=_time):
        if models is None or answer.get("models", "") == models:
            answers.setdefault(_asked_of(answer), answer)
    return list(answers.values())


def _asked_of(answer: Mapping) -> tuple:
    """Who was asked what about which two clips, whatever their sides and the trial's number."""
    pair = frozenset((answer["a"], answer["b"]))
    who = answer.get("listener", ""), answer.get("question", PREFERENCE)
    return *who, str(answer.get("id", answer["trial"])), pair, answer.get("models", "")


def _time(answer: Mapping) -> float:
    return datetime.fromisoformat(answer["time"]).timestamp() if "time" in answer else -math.inf


def _read_answers(path: Path) -> list[dict]:
    answers = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            answer = json.loads(line)
            complete = {"trial", "a", "b", "preferred"} <= set(answer) and _time(answer) is not None
            complete &= answer["preferred"] in (answer["a"], answer["b"], "tie") and isinstance(answer["a"] + answer["b"], str)
        except (ValueError, TypeError, KeyError):  # no JSON, no dict, no time, something missing
            complete = False
        if not complete:
            raise ValueError(f"{path}, line {number}: not an answer with trial, a, b, preferred (and an ISO time); remove the line")
        answers.append(answer)
    return answers


def preference_rate(answers: Sequence[Mapping], *, base: str = BASE) -> pd.DataFrame:
    """How often each system was preferred over `base`: question, system, wins, losses, ties, listeners, rate, low, high.

    rate = wins / (wins + losses); ties are counted apart; nan where nobody preferred either. One line for each question and
    system; answers without a question are to "preference".

    The 95 % interval is Wilson's, widened where the answers about one prompt, or those of one listener, are more alike than chance
    makes them (`stats.clustered_rate`). One listener who hears every prompt once shows none of that: then it is Wilson's, and says
    nothing about other listeners. Coverage with 10 prompts (`pytest -m slow -s tests/test_listen_panel.py`, 500 to 1,000 panels;
    deviations of the prompts' and of the listeners' own rates; 3 or 8 listeners) beside plain Wilson's:

        rate  prompts  listeners   8: this  Wilson   3: this  Wilson
        0.7   0        0             0.977   0.964     0.977   0.946
        0.7   0.2      0             0.940   0.816     0.964   0.917
        0.7   0        0.1           0.963   0.912     0.950   0.904
        0.7   0        0.15          0.946   0.860     0.939   0.846
        0.7   0.2      0.1           0.932   0.771     0.948   0.865
        0.5   0.2      0.1           0.941   0.808     0.945   0.874
        0.9   0.1      0.1           0.918   0.831     0.975   0.915

    A bootstrap of prompts and listeners (product of multiplicities) covered 0.997 to 0.999 of independent panels, at nearly twice
    the width: it counts the chance of a single answer three times.
    """
    lines: dict[tuple, list] = {}
    for answer in answers:
        if base not in (answer["a"], answer["b"]):
            continue
        system = answer["b"] if answer["a"] == base else answer["a"]
        key = (answer.get("question", PREFERENCE), system)
        won = {system: 1, base: 0}.get(answer["preferred"])  # None: a tie
        lines.setdefault(key, []).append((won, answer.get("listener", ""), str(answer.get("id", answer["trial"]))))
    rows = []
    for key, given in lines.items():
        decided = [line for line in given if line[0] is not None]
        won, listeners, prompts = zip(*decided, strict=True) if decided else ((), (), ())
        rate = stats.clustered_rate(won, listeners, prompts)
        rows.append((*key, sum(won), len(won) - sum(won), len(given) - len(won), len({line[1] for line in given}), *rate))
    columns = ["question", "system", "wins", "losses", "ties", "listeners", "rate", "low", "high"]
    return pd.DataFrame(rows, columns=columns)
