"""The benchmark over everything the suite has trained: which systems there are, original scenes of the same prompts, all rows
of all settings. One system at a time is scored in `ttabench.py`; tables and words are made in `report.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from resonate_lib import audio, versions
from resonate_lib.data import scenes
from resonate_lib.evaluation import metrics, parts, report, ttabench
from resonate_lib.models.generator import Generator

FOLDERS = {
    "base": "base",
    "base trained on": "base_on",
    "DPO": "dpo",
    "GRPO (CLAP)": "grpo_clap",
    "GRPO (LALM)": "grpo_lalm",
    "GRPO (LALM, fine)": "grpo_fine",
    "GRPO (NFT's reward)": "grpo_same",
    "DiffRO": "diffro",
    "NFT": "nft",
}
REWARDS = {"GRPO (CLAP)": "clap", "GRPO (LALM)": "lalm", "GRPO (LALM, fine)": "lalm_fine", "DiffRO": "lalm"}  # as rows are called
BEST = "best guidance"
EVENTS = ("exact", "event_f1")  # what the independent judge gives where events are known; else `worlds.measured`


def load_systems(run, names: Sequence[str] = tuple(FOLDERS)) -> tuple[dict[str, Generator], list[str]]:
    """Every system of `names` that this run (or --from, or the shipped weights) has, and the names of those it has not.

    run: a runs.Run. The base is needed (ValueError says where to get it). All share the base's text encoder and codec. One that
    learned from another reward than its name says is told.
    """
    systems, missing = {report.BASE: run.generator("base")}, []
    for name in names:
        if name == report.BASE:
            continue
        folder = run.resolve_input(FOLDERS[name], optional=True)
        if folder is None:
            missing.append(name)
            continue
        systems[name] = systems[report.BASE].with_network(folder)
        reward = Generator.facts(folder).get("reward")
        if name in REWARDS and reward not in (None, REWARDS[name]):
            print(f"note: {name} learned from the reward {reward}, not from {REWARDS[name]}")
    return systems, missing


def original_scenes(records: Sequence[dict], *, seed: int = 0) -> torch.Tensor:
    """One original scene (B, T) at 16 kHz of each prompt's spec, from the test takes: what a perfect generator could give."""
    waves = []
    for index, record in enumerate(records):
        rng = np.random.default_rng([seed, index, 79])
        waves.append(scenes.render(scenes.Spec.of(record), rng, "test")[0])
    return torch.from_numpy(np.stack(waves))


def pick_guidance(
    systems: Mapping[str, Generator],
    records: Sequence[dict],
    scorers: Mapping,
    scales: Sequence[float],
    *,
    names: Sequence[str] = EVENTS,
    **settings,
) -> tuple[dict[str, float], pd.DataFrame]:
    """Each system's guidance with the highest names[0] on validation prompts, and the table of all that was tried.

    Table: system, guidance, metric (of names), mean, low, high, n, prompts, seeds. settings: as for `ttabench.evaluate`.
    """
    best, tables = {}, []
    for name, generator in systems.items():
        best[name], rows = ttabench.best_guidance(generator, records, scorers, scales, metric=names[0], label=name, **settings)
        tables.append(rows)
        print(f"{name}: best guidance {best[name]:g}", flush=True)
    return best, metrics.summarise(pd.concat(tables), ["system", "guidance"], metrics=names, n=400)


def evaluate_all(
    systems: Mapping[str, Generator],
    records: Sequence[dict],
    scorers: Mapping,
    *,
    guidance: Sequence[float] = (1.0,),
    best: Mapping[str, float] | None = None,
    best_of: int = 0,
    metric: str = EVENTS[0],
    say: Callable[[str], None] = print,
    **settings,
) -> pd.DataFrame:
    """Rows of every system at each of `guidance` (settings such as "guidance 1"), and again at its own `best` guidance as the
    setting "best guidance".

    metric: what the lines of progress tell. best_of >= 2 adds the base's best of that many by `reward`. A system whose best
    guidance is one of `guidance` is not generated twice.
    settings: as for `ttabench.evaluate` (num_steps, seed, samples_per_prompt, batch_size, decode_iterations, store).
    """
    tasks = [(name, generator, 1) for name, generator in systems.items()]
    if best_of >= 2:
        tasks.insert(1, (f"best of {best_of}", systems[report.BASE], best_of))
    tables = []
    for name, generator, candidates in tasks:
        scales = {f"guidance {scale:g}": float(scale) for scale in guidance}
        if best is not None:
            scales[BEST] = best[name if name in best else report.BASE]
        done: dict[float, pd.DataFrame] = {}
        for setting, scale in scales.items():
            if scale not in done:
                done[scale] = ttabench.evaluate(
                    generator, records, scorers, guidance_scale=scale, label=name, best_of=candidates, **settings
                )
            tables.append(done[scale].assign(setting=setting))
            say(f"{name}, {setting} ({scale:g}): {metric} {metrics.measure(tables[-1], metric, n=2).mean:.3f}")
    rows = pd.concat(tables, ignore_index=True)
    order = [f"guidance {scale:g}" for scale in guidance] + [BEST]
    return rows.sort_values("setting", key=lambda column: column.map(order.index), kind="stable", ignore_index=True)


def save_clips(
    systems: Mapping[str, Generator],
    records: Sequence[dict],
    folder,
    *,
    num_steps: int,
    seed: int,
    guidance_scale: float = 1.0,
    iterations: int = 60,
) -> list[dict]:
    """FLAC files `<system>_<prompt id>.flac` in `folder`, from the benchmark's noise; returns rows system, id, prompt, file.

    iterations: phase-reconstruction rounds of the decode.
    """
    rows = []
    seeds = [ttabench.noise_seed(seed, record["id"], 0) for record in records]
    texts = [record["prompt_text"] for record in records]
    for name, generator in systems.items():
        latents = generator.generate(texts, steps=num_steps, guidance_scale=guidance_scale, seeds=seeds)
        for record, clip in zip(records, generator.decode(latents, iterations=iterations), strict=True):
            file = f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}_{audio.file_stem(record['id'])}.flac"
            audio.write(Path(folder) / file, clip, generator.sample_rate)
            rows.append({"system": name, "id": record["id"], "prompt": record["prompt_text"], "file": file})
    return rows


def real_and_procedural(rows: pd.DataFrame, *, n: int = 2000) -> pd.DataFrame:
    """`metrics.summarise` of event F1 over recorded and over synthesised events, per setting and system."""
    return metrics.summarise(rows, ["setting", "system"], metrics=("event_f1_real", "event_f1_procedural"), n=n)


def over_seeds(version, *, n: int = 2000) -> tuple[dict[str, pd.DataFrame], str, str]:
    """Notebook 06's tables with intervals, by name, its words, and the metric that these rest on, over all seeds of a version: the
    rows of `seed*/metrics/tta_rows.csv` and `tta_parts_rows.csv`, prompts and seeds resampled.

    A version of one seed gives that one's. The headline says what each system learned from (clips_made), where `tta_systems` knows
    it. The words end with the power of these prompts. FileNotFoundError when notebook 06 has not run in it.
    """
    rows = versions.read_rows(version)
    names = [name for name in (*metrics.HEADLINE, *metrics.FURTHER) if measured(rows, name)]
    short = [name for name in (*EVENTS, "aqa", "ms_clap", "clap") if name in names]
    tables = {
        "tta_headline": report.headline_table(rows, names=names, n=n),
        "tta_by_count_and_relation": report.by_count_and_relation(rows, names=[n for n in (*short[:2], "order") if n in names]),
    }
    if EVENTS[0] in names:
        tables |= {"tta_by_kind": report.by_kind(rows, names=EVENTS), "tta_real_procedural": real_and_procedural(rows, n=n)}
    if any(Path(version).glob("**/metrics/tta_parts_rows.csv")):
        others = versions.read_rows(version, "tta_parts_rows")
        same = rows["setting"].isin(others["setting"]) & rows["system"].isin(others["system"])
        found = parts.tables(pd.concat([rows[same], others], ignore_index=True), names=short[:3], n=n)
        tables |= {f"tta_{name}": table for name, table in found.items()}
    main = short[0] if short else names[0]
    made = {}
    for path in Path(version).glob("**/metrics/tta_systems.csv"):
        made |= clips_made(versions.read_table(path))
    tables["tta_headline"]["clips_made"] = tables["tta_headline"]["system"].map(made).astype("Int64")
    said = report.words(rows, metric=main, clips_made=made, n=n)
    return tables, f"{said}\n\n{report.power_note(rows, main)}", main


def clips_made(systems: pd.DataFrame) -> dict[str, int]:
    """How many clips each system learned from, of notebook 06's table `tta_systems`; without those that learned from none."""
    known = pd.to_numeric(systems.get("clips_made", pd.Series(dtype=float)), errors="coerce").dropna().astype(int)
    return dict(zip(systems.loc[known.index, "system"], known.tolist(), strict=True))


def measured(rows: pd.DataFrame, metric: str) -> bool:
    """Whether the rows hold values of this metric."""
    return (metric in rows.columns and rows[metric].notna().any()) or (metric in metrics.RATIOS and rows["tp"].notna().any())
