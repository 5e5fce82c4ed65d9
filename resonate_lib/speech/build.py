"""Training everything that notebook 10 starts from: the tokenizer, the speaker and the reward model that reads its tokens.

All three learn from the same natural speech; none of it is of the validation or test split.
"""

from __future__ import annotations

from pathlib import Path

from resonate_lib import training
from resonate_lib.config_speech import SpeakerConfig
from resonate_lib.knobs import field_types
from resonate_lib.speech.lines import draw_lines, learn_limits, natural
from resonate_lib.speech.synthesis import SpeakerShape, fit_speaker
from resonate_lib.speech.token_reward import ReaderShape, fit_reader
from resonate_lib.speech.tokenizer import TokenizerShape, fit_tokenizer

NAMES = ("speaker", "speech_reward")


def to_build(run) -> list[str]:
    """What notebook 10 trains first: nothing where both of NAMES are found, else both: they share their tokens. What this very
    run has made counts as not found: `build` gives its histories back."""
    found = {name: run.resolve_input(name, optional=True) for name in NAMES}
    return [] if all(place not in (None, run.checkpoint(name)) for name, place in found.items()) else list(NAMES)


def build(config: SpeakerConfig, folders: dict[str, Path], *, seed: int, states: dict[str, Path | None],
          device: str = "cpu") -> dict[str, list[dict]]:
    """Train tokenizer, speaker and token reward from nothing and save the last two in `folders` (by NAMES; the tokenizer goes with
    the speaker); returns {name: history}, "tokenizer" among them.

    states: the files (tokenizer, speaker, speech_reward) that a killed training goes on from, None for none.
    """
    before = {name: training.history_done(state) for name, state in states.items()}
    if all(folder.is_dir() for folder in folders.values()) and all(before.values()):  # done, by the run that is resumed
        return before
    lines = draw_lines(config.train_lines, split="train", seed=seed)
    print(f"speaking {len(lines)} lines", flush=True)
    clips = natural(lines)
    shape = TokenizerShape(codes=config.codes)
    histories = {}
    tokenizer, histories["tokenizer"] = fit_tokenizer(clips, steps=config.tokenizer_steps, batch_size=config.tokenizer_batch_size,
                                                      seed=seed, shape=shape, checkpoint=states.get("tokenizer"))
    tokens = tokenizer.encode(clips)
    sizes = SpeakerShape(width=config.width, layers=config.layers, heads=config.heads, hidden=3 * config.width)
    speaker, histories["speaker"] = fit_speaker(tokenizer, lines, tokens, steps=config.steps, batch_size=config.batch_size,
                                                seed=seed, shape=sizes, learning_rate=config.learning_rate,
                                                history_noise=config.history_noise,
                                                checkpoint=states.get("speaker"), precision=config.precision, device=device)
    speaker.card["limits"] = learn_limits(lines[:600], clips[:600], tokenizer.sample_rate)
    reader, histories["speech_reward"] = fit_reader(lines, tokens, steps=config.reader_steps, batch_size=config.reader_batch_size,
                                                    seed=seed, shape=ReaderShape(codes=config.codes), precision=config.precision,
                                                    checkpoint=states.get("speech_reward"), device=device)
    made = {name: getattr(config, name) for name in field_types(SpeakerConfig)}
    speaker.save(folders["speaker"], **made)
    reader.save(folders["speech_reward"], seed=seed, **made)
    return histories

