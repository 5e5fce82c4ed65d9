"""The run folder as a notebook sees it: where to write, what to read, and how numbers reach the disk.

    run = runs.open_run(run, profile=profile, seed=seed)
    config = run.show(resolve(GRPOConfig, profile, steps=steps))     # printed and recorded
    base = Generator.load(run.resolve_input("base"))                 # this run's, --from's, or the shipped one
    ... train(..., checkpoint=run.state("grpo_clap"))                # a resumed run goes on here
    base.save(run.checkpoint("grpo_clap"))
    run.write_metrics("grpo_clap", history)                          # metrics/grpo_clap.csv and .json

Under the runner the folder is given by RESONATE_RUN. A notebook opened by itself (Jupyter, plain papermill) writes into
`results/scratch-<profile>-seed<seed>/`, so that notebooks opened one after another find each other's results; running
it again overwrites, and trains anew. `run.json` is the runner's; a notebook leaves notes, which the runner copies into
it.
"""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from resonate_lib import record, reward_spec
from resonate_lib.config import CHECKOUT, DiffusionConfig, RewardConfig, SuiteConfig, derived, plain, resolve
from resonate_lib.knobs import Config
from resonate_lib.versions import allocate, compare, find, results_dir, summarise, verify

__all__ = [
    "Run",
    "allocate",
    "cache_dir",
    "compare",
    "find",
    "open_run",
    "results_dir",
    "summarise",
    "verify",
    "write_table",
]

# Same seed twice must give the same bytes, so a clock may not reach the metrics.
TIMING_NAMES = {"elapsed", "minutes", "seconds", "time", "time_s", "wall", "wall_s", "seconds_per_step"}
MADE_BY = {
    "base": "02",
    "clap": "02",
    "lalm": "02",
    "judge": "02",
    "clap_eval": "02",
    "lalm_eval": "02",
    "dpo": "03",
    "base_on": "03",
    "grpo_clap": "04",
    "nft": "04",
    "grpo_same": "04",
    "grpo_lalm": "05",
    "grpo_fine": "05",
    "diffro": "05",
    "diffusion": "08",
    "ppo": "08",
    "ppo_grpo": "08",
    "ppo_nft": "08",
    "ppo_dpo": "08",
    "recogniser": "09",
    "recogniser_rl": "09",
    "speaker": "10",
    "speech_reward": "10",
    "speaker_rl": "10",
}


def cache_dir() -> Path:
    """The one place for corpora, features and downloads: RESONATE_CACHE, else `.cache/` in the checkout (made if
    absent). Raises ValueError where it cannot be made."""
    path = Path(os.environ.get("RESONATE_CACHE") or CHECKOUT / ".cache").resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(record.explain(error, path).replace("RESONATE_RESULTS", "RESONATE_CACHE")) from None
    return path


@dataclass(frozen=True)
class Run:
    """One seed's folder of a run. Folders are made when first asked for."""

    path: Path  # the version itself, or its seed<k>/ when there are several seeds
    profile: str
    seed: int
    notebook: str  # whose notes these are
    scratch: bool = False  # opened without the runner
    from_version: Path | None = None
    from_scratch: bool = False  # nothing shipped may be used
    loaded: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # reward models, see `scorer`

    @property
    def metrics(self) -> Path:
        """Folder of tables (csv, json); made when asked for, as the three below."""
        return self._folder("metrics")

    @property
    def figures(self) -> Path:
        """Folder of pictures."""
        return self._folder("figures")

    @property
    def audio(self) -> Path:
        """Folder of clips."""
        return self._folder("audio")

    @property
    def checkpoints(self) -> Path:
        """Folder of trained models."""
        return self._folder("checkpoints")

    @property
    def answers(self) -> Path:
        """Listeners' answers: append-only, outside the checksums."""
        return self._folder("answers")

    @property
    def version(self) -> Path:
        """The version's top folder, which holds run.json (the run folder itself with one seed)."""
        return self.path if not self.path.name.startswith("seed") or self.scratch else self.path.parent

    def _folder(self, name: str) -> Path:
        (self.path / name).mkdir(parents=True, exist_ok=True)
        return self.path / name

    def checkpoint(self, name: str) -> Path:
        """Where to save the model `name`: `checkpoints/<name>` (not made)."""
        return self.checkpoints / name

    def state(self, name: str) -> Path | None:
        """The file a training loop saves its state in and resumes from; None in a scratch folder, which always trains
        anew."""
        return None if self.scratch else self._folder(".state") / f"{name}.pt"

    def resolve_input(self, name: str, *, kind: str = "checkpoints", optional: bool = False) -> Path | None:
        """The file or folder `<kind>/<name>` of an earlier stage, and a note of where it came from and its sha256.

        Looked for in this run, then in `--from VERSION` (its seed's folder, else its top), then (checkpoints only, not
        with --from-scratch) among the shipped weights of the profile. A shipped base model of another seed is said and
        noted (`base_seed`). Raises ValueError when it is nowhere; None if `optional`.
        """
        places = [("this run", self.path / kind / name)]
        if self.from_version is not None:
            places += [
                (self.from_version.name, self.from_version / inner / kind / name) for inner in (f"seed{self.seed}", "")
            ]
        if kind == "checkpoints" and not self.from_scratch:
            places.append(("shipped", shipped_weights(self.profile) / name))
        for source, path in places:
            if path.exists():
                self.record("inputs", {name: {"source": source, "sha256": record.sha256_tree(path)}})
                if name == "base" and source == "shipped":
                    self._say_base_seed(path)
                return path
        if optional:
            return None
        makers = MADE_BY.get(name, "")
        first = (
            f"run notebook {makers} first (--only {makers},...)" if makers else "run the notebook that makes it first"
        )
        looked = ", ".join(dict.fromkeys(source for source, _ in places))
        raise ValueError(f"no {name!r} in {looked}: {first}, or give --from VERSION")

    def fingerprint(self, *names: str) -> str:
        """Eight hex digits that tell the weights of these checkpoints, of those that are there, from all others."""
        found = {name: self.resolve_input(name, optional=True) for name in names}
        return record.hash8({name: record.sha256_tree(path) for name, path in found.items() if path is not None})

    def _say_base_seed(self, folder: Path) -> None:
        """Say and note that the shipped base model is of another seed; not in the notebook that trains the seed's own."""
        facts = folder / "generator.json"
        seed = json.loads(facts.read_text(encoding="utf-8")).get("seed") if facts.is_file() else None
        if seed not in (None, self.seed) and not self.notebook.startswith(MADE_BY["base"]):
            print(f"note: the shipped base model is that of seed {seed}; run notebook {MADE_BY['base']} with this seed for one of "
                  "its own")
            self.record("base_seed", seed)

    def generator(self, name: str = "base"):
        """The `Generator` called `name`, from where `resolve_input` finds it.

        Where the profile's weights are published ones, the base is theirs unless this run (or --from) trained one; the files
        that it is made of are noted with their sha256. ValueError where the profile states another sample rate than theirs.
        "diffusion" is the pipeline that `diffusion.source` names, where it names one; that has a sample rate of its own.
        """
        from resonate_lib.models.generator import Generator, codec_mode

        suite = resolve(SuiteConfig, self.profile)
        source = resolve(DiffusionConfig, self.profile).source
        if name == "diffusion" and source:
            return self._pipeline(source, suite)
        places = {key: getattr(suite, key) or None for key in ("vae", "vocoder", "text")}
        published = suite.world == "folder"
        folder = self.resolve_input(name, optional=published and name == "base")
        if folder is None:
            mode = codec_mode(suite.sample_rate)
            made = Generator.load_published(suite.weights, mode=mode, seconds=suite.seconds, **places)
        else:
            made = Generator.load(folder, suite.weights if Path(suite.weights).is_dir() else None, **places)
        if made.parts:
            if made.sample_rate != suite.sample_rate and "pipeline" not in made.network_config:
                raise ValueError(f"profile {self.profile}: sample_rate={suite.sample_rate}, but the codec makes sound at "
                                 f"{made.sample_rate} Hz; set suite.sample_rate to that")
            self.record("inputs", made.provenance())
        return made

    def _pipeline(self, source: str, suite: SuiteConfig):
        """The generator around a diffusers pipeline, its files noted."""
        from resonate_lib.models import pretrained
        from resonate_lib.models.pipelines import load_pipeline

        made = load_pipeline(pretrained.beside(source, suite.weights), seconds=suite.seconds)
        self.record("inputs", made.provenance())
        return made

    def scorer(self, name: str, *, text=None):
        """The reward model `name`: clap, lalm, or clap_eval, lalm_eval, which no training hears; made once a run.

        A shipped (or here trained) one, or what `reward.<name>_source` names. text: the text encoder of a shipped CLAP. None where
        the source is empty.
        """
        if name not in self.loaded:
            self.loaded[name] = self._load_scorer(name, resolve(RewardConfig, self.profile), text)
        return self.loaded[name]

    def _load_scorer(self, name: str, config: RewardConfig, text):
        source = getattr(config, f"{name}_source")
        if source == "shipped":
            from resonate_lib.rewards import load_reward

            kind = name.removesuffix("_eval")
            return load_reward(kind, text=text, **{kind: self.resolve_input(name)}).reward
        if not source:
            return None
        if name.startswith("clap"):
            from resonate_lib.rewards.laion import LaionClapReward

            with self._published(name, source) as place, self._published("roberta", config.roberta_source) as roberta:
                return LaionClapReward.load(place, roberta, published_rate=name == "clap" and config.clap_published_rate)
        from resonate_lib.rewards.omni import open_judge

        with self._published(name, source) as place:
            if (Path(place) / "model_card.json").is_file():
                return open_judge(place)  # the small judge of this package
            here = {"quantisation": config.lalm_quantisation or None, "offload": config.lalm_offload}
            return open_judge(place, fallback=config.lalm_fallback, **({} if place.startswith("http") else here))

    def aesthetics(self):
        """AudioBox-Aesthetics where `reward.aesthetics_source` names it, else None; made once a run."""
        source = resolve(RewardConfig, self.profile).aesthetics_source
        if source and "aesthetics" not in self.loaded:
            from resonate_lib.evaluation.aesthetics import Aesthetics

            with self._published("aesthetics", source) as place:
                self.loaded["aesthetics"] = Aesthetics.load(place)
        return self.loaded.get("aesthetics")

    def ms_clap(self):
        """MS-CLAP 2023, run by an environment of its own, where `reward.msclap_source` names it, else None; made once a run."""
        config = resolve(RewardConfig, self.profile)
        if config.msclap_source and "msclap" not in self.loaded:
            from resonate_lib.evaluation.msclap import MsClap

            with self._published("msclap", config.msclap_source) as place, self._published("gpt2", config.gpt2_source) as gpt2:
                self.loaded["msclap"] = MsClap.load(place, gpt2)
            self.record("msclap_packages", self.loaded["msclap"].versions)
        return self.loaded.get("msclap")

    @contextlib.contextmanager
    def _published(self, name: str, source: str) -> Iterator[str]:
        """Where the published model `source` is read from: its place in the directory `suite.weights` if it lies there.

        Noted with the sha256 of its files when the block, which loads it, is done: before, a hub id's may not be here.
        """
        from resonate_lib.models import pretrained

        place = pretrained.beside(source, resolve(SuiteConfig, self.profile).weights)
        yield place
        part = name.removesuffix("_eval")
        self.record("inputs", {name: pretrained.provenance(place, part if part in pretrained.PARTS else "")})

    def reward(self, spec: str, *, text=None):
        """The reward that a line of configuration names (`rewards.load_reward`), of this run's models. ValueError where a source
        is empty."""
        from resonate_lib.rewards import load_reward

        named = reward_spec.judges(spec)
        places = {"clap": "file, directory or hub id", "lalm": "directory, hub id or server"}
        models = {name: self.scorer(name, text=text) for name in places if name in named}
        for name, model in models.items():
            if model is None:
                raise ValueError(f"reward {name!r}: {name}_source is empty; name a {places[name]} (-p {name}_source ...), "
                                 "or use another reward")
        return load_reward(spec, **models)

    def show(self, config: Config) -> Any:
        """Print the resolved values and the arithmetic that follows from them, note them, and return `config`."""
        values = plain(config)
        width = max(map(len, values))
        print(f"{type(config).__name__} (profile {self.profile}, seed {self.seed})")
        print("\n".join(f"  {name:<{width}} = {value}" for name, value in values.items()))
        if derived(config):
            print(derived(config))
        self.record("config", {type(config).section: values})
        return config

    def record(self, key: str, value: Any) -> None:
        """Note `value` (JSON) under `key`; two dicts are merged. Timings belong here, never in metrics."""
        path = self._folder("notes") / f"{self.notebook}.json"
        notes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        merge = isinstance(value, dict) and isinstance(notes.get(key), dict)
        notes[key] = {**notes[key], **value} if merge else value
        record.write_json(path, notes)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note the seconds of the block under `wall_s`, with those of the steps that `state(name)` holds from before an
        interruption.
        """
        from resonate_lib import training  # imports torch, which listing and checking runs does without

        before, began = training.seconds_done(self.state(name)), time.monotonic()
        yield
        self.record("wall_s", {name: round(before + time.monotonic() - began, 1)})

    def write_metrics(self, name: str, content: Any) -> pd.DataFrame:
        """Write a table (DataFrame or list of dicts) or a dict to `metrics/<name>.csv` and `.json`; returns it as
        written."""
        return write_table(self.metrics, name, content)

    def write_text(self, name: str, text: str) -> Path:
        """Write text to `metrics/<name>` (such as a table as Markdown, `tta_headline.md`); returns its path."""
        return record.atomic_write(self.metrics / name, text)


def open_run(run: str | os.PathLike | None = None, *, profile: str = "tiny", seed: int = 0) -> Run:
    """The folder this notebook writes to: `run` (a path), else RESONATE_RUN, else the scratch folder.

    Raises ValueError for a version that is DONE, and where the folder cannot be written.
    """
    given = run or os.environ.get("RESONATE_RUN")
    batch = os.environ.get("RESONATE_BATCH") == "1"
    path = Path(given) if given else results_dir() / f"scratch-{profile}-seed{seed}"
    path = path.resolve()
    for top in (path, path.parent):
        if (top / "run.json").is_file() and json.loads((top / "run.json").read_text(encoding="utf-8")).get(
            "status"
        ) == "DONE":
            raise ValueError(
                f"{top.name} is DONE and is never edited: start a new run, or leave `run` out for a scratch folder"
            )
    source = os.environ.get("RESONATE_FROM")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(record.explain(error, path)) from None
    session = Path(os.environ.get("JPY_SESSION_NAME") or "notebook").stem
    opened = Run(
        path=path,
        profile=profile,
        seed=seed,
        notebook=os.environ.get("RESONATE_NOTEBOOK") or session,
        scratch=not batch,
        from_version=find(source) if source else None,
        from_scratch=os.environ.get("RESONATE_FROM_SCRATCH") == "1",
    )
    (path / "notes" / f"{opened.notebook}.json").unlink(missing_ok=True)
    opened.record("opened", time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    return opened


def shipped_weights(profile: str) -> Path:
    """The folder the profile's untrained parts come from: `suite.weights` as a local directory, or in
    resonate_lib/weights."""
    weights = resolve(SuiteConfig, profile).weights
    local = Path(weights).expanduser()
    return local if local.is_absolute() else Path(__file__).parent / "weights" / weights


def write_table(folder: Path, name: str, content: Any) -> pd.DataFrame:
    """Write `<name>.csv` and `<name>.json` into `folder`, byte for byte the same for the same numbers.

    content: DataFrame, list of dicts (columns in order of first appearance), or a dict (CSV columns name, value; nested
    keys joined by dots). Floats keep six significant digits; nan and inf are empty in CSV and null in JSON. Raises
    ValueError for an empty table, a bad name, or a column that holds times (those belong in `run.record`).
    """
    if not name or set(name) & set("/\\. "):
        raise ValueError(f"metrics name {name!r}: use letters, digits, - and _")
    if isinstance(content, dict):
        tidy: Any = _tidy(content)
        rows = [{"name": key, "value": value} for key, value in _flat(tidy)]
        names = [key.split(".")[-1] for key, _ in _flat(tidy)]
    else:
        rows = content.to_dict("records") if isinstance(content, pd.DataFrame) else list(content)
        rows = [{str(key): _tidy(value) for key, value in row.items()} for row in rows]
        tidy = rows
        names = list(dict.fromkeys(key for row in rows for key in row))
    if not rows:
        raise ValueError(f"metrics {name!r}: the table is empty; write it once it has rows")
    clocks = sorted(set(names) & TIMING_NAMES)
    if clocks:
        raise ValueError(
            f"metrics {name!r}: {clocks[0]!r} holds a time, which differs between equal runs; use run.record"
        )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [",".join(_cell(column) for column in columns)]
    lines += [",".join(_cell(row.get(column)) for column in columns) for row in rows]
    record.atomic_write(folder / f"{name}.csv", "\n".join(lines) + "\n")
    record.write_json(folder / f"{name}.json", tidy)
    return pd.DataFrame(rows, columns=columns)


def _tidy(value: Any) -> Any:
    """Plain Python with six significant digits; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): _tidy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tidy(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _tidy(value.tolist())
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, numbers.Real):
        return float(format(float(value), ".6g")) + 0.0 if math.isfinite(value) else None
    raise ValueError(f"metrics hold {type(value).__name__}: use numbers, text, lists and dicts")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = format(value, ".6g") if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n\r') else text


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, item in value.items():
        pairs += _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else [(f"{prefix}{key}", item)]
    return pairs
