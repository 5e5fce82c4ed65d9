"""How good the checkpoints in the package are, as notebook 02 measures them: fixed seeds, bars a little under what was measured
(README). `python -m pytest -m slow -s tests/test_shipped.py` prints the figures; about three minutes."""

import pytest

from resonate_lib import runs
from resonate_lib.config import DataConfig, EvalConfig, GRPOConfig, resolve
from resonate_lib.evaluation import accuracy, agreement, metrics, ttabench
from resonate_lib.evaluation.worlds import EmbeddedWorld
from resonate_lib.models.generator import Generator
from resonate_lib.rewards import load_reward

pytestmark = pytest.mark.slow
CLIPS, PROMPTS, DRAWS, N = 300, 100, 600, 400
WORLD = EmbeddedWorld(resolve(DataConfig, "tiny"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Finds the shipped checkpoints as a notebook's run does."""
    return runs.open_run(tmp_path_factory.mktemp("run"), profile="tiny")


@pytest.fixture(scope="module")
def judge(run):
    return WORLD.judge(run)["judge"]


@pytest.fixture(scope="module")
def base(run):
    return Generator.load(run.resolve_input("base"))


@pytest.fixture(scope="module")
def scenes():
    return WORLD.clips("test", CLIPS, seed=0)


def told(name: str, value: float) -> float:
    print(f"\n{name}: {value:.3f}", end="")
    return value


def test_the_judge_on_originals(judge, scenes):
    rows = accuracy.judge_rows(judge, scenes.waveforms(range(CLIPS)), scenes.records)
    found = {name: told(f"judge, {name}", metrics.measure(rows, name, n=N).mean) for name in ("event_f1", "exact")}
    assert found["event_f1"] >= 0.96 and found["exact"] >= 0.88


@pytest.mark.parametrize("name", ["lalm", "lalm_eval"])
def test_the_lalms_against_hard_negatives(run, scenes, name):
    lalm = load_reward("lalm", lalm=run.resolve_input(name)).reward
    answers = agreement.score_captions({name: lalm}, scenes, wrong=WORLD.wrong_captions)
    table = agreement.accuracy_table(answers, {name: 0.5}, n=N).set_index("kind")["balanced_accuracy"]
    found = {kind: told(f"{name}, {kind}", value) for kind, value in table.items()}
    assert found.pop(agreement.ALL) >= 0.90 and len(found) >= 4 and min(found.values()) >= 0.80


def test_the_clap_finds_the_caption_among_ten(run, base, scenes):
    clap = load_reward("clap", clap=run.resolve_input("clap"), text=base.text).reward
    table = accuracy.recall_table({"clap": clap}, scenes, DRAWS, wrong=WORLD.wrong_captions)
    assert told("clap, recall@1 among 10", table["recall_at_1"].item()) >= 0.60


def test_the_codec_keeps_what_the_judge_hears(judge, base, scenes):
    rounds = sorted({resolve(cls, "tiny").decode_iterations for cls in (GRPOConfig, EvalConfig)})
    table = accuracy.codec_table(base.codec, judge, scenes, range(CLIPS), rounds, n=N).set_index("iterations")
    for iterations in rounds:
        assert told(f"codec, {iterations} rounds, share of exact kept", table.loc[iterations, "exact_kept"]) >= 0.97


def test_the_base_model_does_what_it_is_asked(judge, base):
    evaluation = resolve(EvalConfig, "tiny")
    rows = ttabench.evaluate(
        base, WORLD.bench(count=PROMPTS), {"judge": judge}, num_steps=evaluation.num_steps,
        decode_iterations=evaluation.decode_iterations, batch_size=evaluation.batch_size,
    )  # fmt: skip
    assert rows["guidance"].eq(1).all() and len(rows) == PROMPTS and rows["heldout"].all()
    told("base, exact", metrics.measure(rows, "exact", n=N).mean)
    assert told("base, event_f1", metrics.measure(rows, "event_f1", n=N).mean) >= 0.75
    assert not rows["silent"].any() and not rows["clipping"].any()
