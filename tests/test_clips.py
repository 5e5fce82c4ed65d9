"""The clip store: what is found again is what was made, nothing is made twice, and a damaged file is as good as none."""

import errno
import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import miniature
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from torch import nn

from resonate_lib import audio, doctor
from resonate_lib.config import EvalConfig, resolve
from resonate_lib.diffusion import Diffusion
from resonate_lib.evaluation import clips, suite, ttabench
from resonate_lib.models import generator as published

RATE = 16000
RECORDS = [{"id": f"prompt_{i:04}", "prompt_text": f"text {i}", "event_relation": None} for i in range(10)]


class Text(nn.Module):
    def __init__(self, words=("a", "b")):
        super().__init__()
        self.length, self.tokenizer = 7, SimpleNamespace(get_vocab=lambda: {word: i for i, word in enumerate(words)})


class Codec(nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.config, self.samples = {"hop": 256, **config}, RATE // 2


class Generator:
    """Sound is a sine whose amplitude is a uniform number of the seed, times the network's one weight."""

    sample_rate, device, diffusion = RATE, torch.device("cpu"), None

    def __init__(self, weight=1.5):
        self.text, self.codec, self.network = Text(), Codec(), nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.network.weight, weight)
        self.network_config = {"depth": 1}
        self.made, self.encoded, self.stop_after = [], [], math.inf

    def encode_prompts(self, prompts):
        self.encoded += prompts

    def generate(self, prompts, *, steps, guidance_scale, seeds):
        if len(self.made) >= self.stop_after:
            raise KeyboardInterrupt
        self.made += dict.fromkeys(seeds)  # a small batch is filled up
        return torch.cat([torch.rand(1, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def decode(self, latents, *, iterations, limit):
        assert not limit
        return self.network.weight.item() * latents[:, None] * torch.sin(torch.arange(RATE // 2) * 0.3)


def loud(audio, sample_rate, prompts, metadata=None):
    return SimpleNamespace(scores=audio.square().mean(1))


SCORERS = {"reward": loud}


def run(generator, folder, records=RECORDS, **options):
    return ttabench.evaluate(generator, records, SCORERS, **{"batch_size": 4, "store": clips.Store(folder), **options})


def same(a, b):
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_clips_found_again_give_the_rows_of_clips_just_made(tmp_path):
    first, second = Generator(), Generator()
    store = clips.Store(tmp_path)
    fresh = run(first, tmp_path, store=store, samples_per_prompt=2)
    assert len(first.made) == 20 == len(set(first.made)) and (store.made, store.found) == (20, 0)
    before = contents(tmp_path)
    store = clips.Store(tmp_path)
    same(run(second, tmp_path, store=store, samples_per_prompt=2, batch_size=7), fresh)
    assert not second.made and not second.encoded and (store.made, store.found) == (0, 20) and contents(tmp_path) == before
    plain = ttabench.evaluate(Generator(), RECORDS, SCORERS, samples_per_prompt=2)
    for name in ("peak_dbfs", "clipping", "silent", "noise_seed"):  # what was true before the gain is kept exactly
        assert plain[name].equals(fresh[name])
    assert 2 < plain["clipping"].sum() < 18
    assert np.allclose(plain["loudness"], fresh["loudness"], atol=1e-2) and np.allclose(plain["reward"], fresh["reward"], rtol=1e-3)


def test_a_file_says_what_it_is(tmp_path):
    rows = run(Generator(), tmp_path, guidance_scale=4.5, num_steps=25)
    files = sorted(tmp_path.glob("*/*.flac"))
    row = rows.iloc[0]
    digest = hashlib.sha256(f'["text 0",{row["noise_seed"]}]'.encode()).hexdigest()[:8]
    assert len(files) == 10 and files[0].name == f"prompt_0000_0-{digest}.flac"
    with soundfile.SoundFile(files[0]) as file:
        facts, samples = json.loads(file.comment), file.read(dtype="int16")
        assert (file.samplerate, file.channels, file.format, file.subtype) == (RATE, 1, "FLAC", "PCM_16")
    told = {"id": "prompt_0000", "sample": 0, "prompt": "text 0", "seed": row["noise_seed"], "guidance": 4.5, "steps": 25}
    assert facts.items() >= told.items()
    amplitude = 1.5 * torch.rand(1, generator=torch.Generator().manual_seed(facts["seed"])).item()
    sine = amplitude * torch.sin(torch.arange(RATE // 2) * 0.3).numpy()
    assert facts["peak_dbfs"] == pytest.approx(20 * math.log10(amplitude), abs=1e-3) and facts["clipping"] == (amplitude > 1.02)
    gain = min(1, 0.99 / np.abs(sine).max())
    assert facts["gain"] == pytest.approx(gain, rel=1e-4) and np.abs(samples - 32768 * gain * sine).max() < 1
    settings = json.loads((files[0].parent / "settings.json").read_text())
    assert settings["guidance_scale"] == 4.5 and settings["num_steps"] == 25 and settings["solver"] == "euler"


def test_a_folder_stands_for_weights_and_settings(tmp_path):
    def name(change=lambda generator: None, **settings):
        generator = Generator()
        change(generator)
        settings = {"num_steps": 25, "guidance_scale": 1.0, "decode_iterations": 8} | settings
        return clips.Store(tmp_path).shelf(generator, **settings).folder.name

    def heavier(generator):
        generator.network.weight.data += 1e-6

    assert name() == name(guidance_scale=1) and re.fullmatch("[0-9a-f]{16}", name())  # another object of equal weights
    others = [
        name(num_steps=24), name(guidance_scale=4.5), name(decode_iterations=60), name(heavier),
        name(lambda g: setattr(g, "codec", Codec(gain=2))), name(lambda g: setattr(g, "text", Text(("b", "a")))),
        name(lambda g: setattr(g, "network_config", {"depth": 2})), name(lambda g: g.network.double()),
        name(lambda g: setattr(g, "diffusion", Diffusion())), name(lambda g: setattr(g, "diffusion", Diffusion(schedule="linear"))),
    ]  # fmt: skip
    assert len({name(), *others}) == 11


def test_a_network_trained_on_is_another_model_to_the_same_store(tmp_path):
    store, generator = clips.Store(tmp_path), Generator()
    run(generator, tmp_path, store=store)
    other = nn.Linear(1, 1, bias=False)
    nn.init.constant_(other.weight, 0.25)
    tuned = run(generator, tmp_path, store=store, network=other)
    generator.network.weight.data.fill_(0.25)
    same(run(generator, tmp_path, store=store), tuned)
    assert (store.made, store.found) == (20, 10)


def test_prompt_text_and_noise_are_part_of_the_name(tmp_path):
    store, generator = clips.Store(tmp_path), Generator()
    reworded = [{**record, "prompt_text": record["prompt_text"].upper()} for record in RECORDS]
    for records, seed in ((RECORDS, 0), (reworded, 0), (RECORDS, 1)):
        run(generator, tmp_path, records, store=store, seed=seed)
    assert store.made == 30 and len(list(tmp_path.glob("*/*.flac"))) == 30
    strange = [{"id": "../../a/b c", "prompt_text": "é\n\0" + 3000 * "x"}]
    fresh = run(generator, tmp_path, strange, store=store)
    same(run(generator, tmp_path, strange, store=store), fresh)
    assert store.made == 31 and store.found == 1 and len(list(tmp_path.glob("*/*.flac"))) == 31


def test_clips_to_listen_to_stay_in_their_folder_whatever_the_ids(tmp_path):
    records = [{"id": name, "prompt_text": "x"} for name in ("../x", "a/b", "a-b")]
    system = SimpleNamespace(sample_rate=RATE, generate=lambda texts, **_: torch.zeros(len(texts), 800),
                             decode=lambda latents, iterations: latents)  # fmt: skip
    rows = suite.save_clips({"base": system}, records, tmp_path / "audio", num_steps=1, seed=0)
    assert [row["id"] for row in rows] == ["../x", "a/b", "a-b"] and rows[2]["file"] == "base_a-b.flac"
    assert {f"audio/{row['file']}" for row in rows} == set(contents(tmp_path)) and len(contents(tmp_path)) == 3


def test_candidates_of_best_of_are_kept_and_the_plain_clip_is_one_of_them(tmp_path):
    store, generator = clips.Store(tmp_path), Generator()
    plain = run(generator, tmp_path, store=store, samples_per_prompt=2)
    best = run(generator, tmp_path, store=store, samples_per_prompt=2, best_of=3, batch_size=6)
    assert store.made == 60 == len(set(generator.made)) and (best["reward"] >= plain["reward"]).all()
    alone = ttabench.evaluate(Generator(), RECORDS, SCORERS, samples_per_prompt=2, best_of=3)
    assert alone["noise_seed"].equals(best["noise_seed"]) and alone["peak_dbfs"].equals(best["peak_dbfs"])
    assert alone["clipping"].equals(best["clipping"]) and np.allclose(alone["loudness"], best["loudness"], atol=1e-2)


@pytest.mark.parametrize("stop", (1, 4, 5, 13, 16))
def test_an_interrupted_call_goes_on_where_it_stopped(tmp_path, stop):
    whole = run(Generator(), tmp_path / "whole", samples_per_prompt=2)
    first, second = Generator(), Generator()
    first.stop_after = stop
    with pytest.raises(KeyboardInterrupt):
        run(first, tmp_path / "parts", samples_per_prompt=2)
    same(run(second, tmp_path / "parts", samples_per_prompt=2), whole)
    assert sorted(first.made + second.made) == sorted(set(whole["noise_seed"])) and first.made
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert second.encoded == [record["prompt_text"] for record in RECORDS]  # all, as the uninterrupted call did


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:200],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
        lambda data: data.replace(b'"prompt": "text', b'"prompt": "next'),
        lambda data: data.replace(b'"gain"', b'"main"'),
        lambda data: b"fLaC" + os.urandom(500),
        lambda data: audio.encode(torch.zeros(8000), RATE, ".flac"),
    ],
)
def test_a_damaged_file_is_made_again(tmp_path, damage):
    fresh, before = run(Generator(), tmp_path), contents(tmp_path)
    victim = sorted(tmp_path.glob("*/*.flac"))[3]
    victim.write_bytes(damage(victim.read_bytes()))
    generator = Generator()
    same(run(generator, tmp_path), fresh)
    assert generator.made == [fresh["noise_seed"][3]] and contents(tmp_path) == before


def test_a_clip_under_another_name_is_not_taken_for_it(tmp_path):
    fresh, before = run(Generator(), tmp_path), contents(tmp_path)
    one, other = sorted(tmp_path.glob("*/*.flac"))[3:5]
    one.write_bytes(other.read_bytes())
    same(run(Generator(), tmp_path), fresh)
    assert contents(tmp_path) == before


def test_silence_and_what_is_no_sound(tmp_path):
    generator = Generator(weight=0.0)
    fresh = run(generator, tmp_path)
    assert (fresh["peak_dbfs"] == -np.inf).all() and fresh["silent"].all() and fresh["loudness"].isna().all()
    same(run(generator, tmp_path), fresh)
    with pytest.raises(ValueError, match="NaN"):
        run(Generator(weight=math.nan), tmp_path)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    replace, written = os.replace, []

    def full(source, target):
        written.append(target)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(audio.os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device.*free space.*RESONATE_CACHE.*made again") as error:
        run(Generator(), tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*/.*"))
    monkeypatch.setattr(audio.os, "replace", replace)
    generator = Generator()
    run(generator, tmp_path)
    assert len(generator.made) == 8  # settings.json and two clips had been written


def test_what_a_killed_process_left_is_cleared_away_once_it_is_old(tmp_path):
    run(Generator(), tmp_path)
    shelf = next(tmp_path.iterdir())
    for name, age in ((".a.flac.x.part", 7200), (".b.flac.y.part", 0)):
        (shelf / name).write_bytes(b"half")
        os.utime(shelf / name, (time.time() - age,) * 2)
    run(Generator(), tmp_path)
    assert [path.name for path in shelf.glob(".*")] == [".b.flac.y.part"]


def test_how_much_there_is_and_will_be(tmp_path, monkeypatch):
    monkeypatch.setenv("RESONATE_CACHE", str(tmp_path))
    store = clips.Store(tmp_path / "clips")
    assert "at most 250000 clips of 0.02 MB or less, 4.00 GB" in store.note(250_000, Generator())  # 8,000 samples of 2 bytes
    run(Generator(), tmp_path, store=store)
    found = doctor._clips()
    assert found.state == "ok" and found.found.startswith("10 of the benchmark kept, 0.00 GB; delete ")


def test_all_systems_at_the_published_guidance_and_at_their_best(tmp_path):
    systems = {"base": Generator(1.0), "NFT": Generator(0.5)}
    options = {"store": clips.Store(tmp_path), "metric": "reward", "say": lambda line: None}
    best = {"base": 4.5, "NFT": 2.0}
    rows = suite.evaluate_all(systems, RECORDS, SCORERS, guidance=(1.0, 4.5), best=best, best_of=2, **options)
    assert rows["setting"].drop_duplicates().tolist() == ["guidance 1", "guidance 4.5", "best guidance"]
    counts = rows.groupby(["setting", "system"], sort=False).agg(clips=("id", "size"), guidance=("guidance", "first"))
    assert (counts["clips"] == 10).all() and len(counts) == 9
    assert counts["guidance"]["best guidance", "NFT"] == 2 and counts["guidance"]["guidance 4.5", "NFT"] == 4.5
    assert len(systems["NFT"].made) == 30 and len(systems["base"].made) == 40  # two settings of two candidates each
    assert resolve(EvalConfig, "paper").guidance == (1.0, 4.5) == resolve(EvalConfig, "small").guidance
    with pytest.raises(ValueError, match=r"guidance=.*begin with 1"):
        resolve(EvalConfig, "tiny", guidance="4.5")


def test_a_comment_survives_in_the_file():
    wave = torch.linspace(-1, 1, 4001)
    data = audio.encode(wave, RATE, ".flac", comment="é " * 3000)
    back, rate, comment = audio.decode(data)
    assert rate == RATE and comment == "é " * 3000 and (back - wave).abs().max() < 1.5 / 32768
    assert audio.decode(audio.encode(wave, RATE, ".flac"))[2] == ""
    with pytest.raises(ValueError, match="not readable"):
        audio.decode(b"nothing")


def test_clips_of_published_parts(tmp_path):
    """VAE, vocoder and FLAN-T5 in miniature: 44.1 kHz, at the published guidance, and the same weights read again are the same."""
    weights = miniature.build(tmp_path / "weights")
    load = lambda: published.Generator.load_published(weights, seconds=0.5, device="cpu")  # noqa: E731
    store, options = clips.Store(tmp_path / "clips"), {"num_steps": 2, "guidance_scale": 4.5, "batch_size": 2}
    fresh = run(load(), tmp_path, RECORDS[:3], store=store, **options)
    same(run(load(), tmp_path, RECORDS[:3], store=store, **options), fresh)
    assert (store.made, store.found) == (3, 3)
    rate = soundfile.info(str(next((tmp_path / "clips").glob("*/*.flac")))).samplerate
    assert rate == 44100 and fresh["peak_dbfs"].max() < 0.1


WORKER = """
import sys
from types import SimpleNamespace
from resonate_lib.data import prompts
from resonate_lib.evaluation import clips, ttabench
from resonate_lib.models.generator import Generator
from resonate_lib.rewards.base import SHIPPED

generator, log = Generator.load(SHIPPED / "base"), open(sys.argv[2], "a")
generate = generator.generate

def counted(texts, *, seeds, **settings):
    print(*dict.fromkeys(seeds), sep="\\n", file=log, flush=True)
    return generate(texts, seeds=seeds, **settings)

generator.generate = counted
records = prompts.embedded_bench(count=40)
scorers = {"reward": lambda audio, *_: SimpleNamespace(scores=audio.square().mean(1))}
settings = dict(num_steps=4, batch_size=4, decode_iterations=4, store=clips.Store(sys.argv[1]))
for scale, count in ((1.0, 1), (3.0, 1), (1.0, 2)):
    rows = ttabench.evaluate(generator, records, scorers, guidance_scale=scale, best_of=count, **settings)
    rows.to_csv(f"{sys.argv[2]}-{scale}-{count}.csv")
"""


def worker(folder, log):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(log)], env=environment)


def on_disk(folder):
    """{seed: (file, inode)}: a file made again has another inode."""
    found = {}
    for path in folder.glob("*/*.flac"):
        facts = json.loads(audio.decode(path.read_bytes())[2])
        found[facts["seed"], facts["guidance"]] = (path, path.stat().st_ino)
    return found


@pytest.mark.slow
def test_killed_five_times_and_resumed_ends_with_the_same_files(tmp_path):
    """The shipped base, 120 clips in three calls; the process is killed with SIGKILL at random points of its work."""
    assert worker(tmp_path / "whole", tmp_path / "whole.log").wait(600) == 0
    draw, parts, log = random.Random(5), tmp_path / "parts", tmp_path / "parts.log"
    for point in sorted(draw.sample(range(1, 116), 5)):
        before = on_disk(parts)
        process = worker(parts, tmp_path / "now.log")
        while len(list(parts.glob("*/*.flac"))) < point and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        after = on_disk(parts)
        assert all(after[key] == place for key, place in before.items())  # not one was made again
        with open(log, "a") as file:
            file.write((tmp_path / "now.log").read_text() if (tmp_path / "now.log").is_file() else "")
        (tmp_path / "now.log").unlink(missing_ok=True)
    assert worker(parts, log).wait(600) == 0
    whole = contents(tmp_path / "whole")
    found = {key: data for key, data in contents(parts).items() if not key.endswith(".part")}
    assert found.keys() == whole.keys() and found == whole
    for name in ("1.0-1", "3.0-1", "1.0-2"):
        assert (tmp_path / f"parts.log-{name}.csv").read_bytes() == (tmp_path / f"whole.log-{name}.csv").read_bytes()
    assert len((tmp_path / "whole.log").read_text().split()) == 120
    assert len(log.read_text().split()) <= 120 + 5 * 4  # at most the batch that was being made is lost with each kill
