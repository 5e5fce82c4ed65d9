"""What judges are asked about themselves: sounds that hold no event, captions of other clips, other wordings; with planted
judges whose every answer is known."""

import numpy as np
import pytest
import torch

from resonate_lib.data.corpus import Corpus
from resonate_lib.evaluation import agreement, probes
from resonate_lib.evaluation.worlds import open_world
from resonate_lib.rewards import RewardResult
from resonate_lib.rewards.lalm import QUESTION


class Planted:
    """A judge of full questions: says yes to these alone, and to whatever does not hold `words`."""

    def __init__(self, captions: set[str], words: str = ""):
        self.right = {probes.word(wording, caption) for wording in probes.WORDINGS.values() for caption in captions}
        self.words, self.questions = words, []

    def ask(self, audio, sample_rate, questions, clips=None):
        assert len(audio) <= 12 and len(clips) == len(questions)  # a clip is heard once for all of its questions
        self.questions += questions
        yes = [question in self.right or self.words not in question for question in questions]
        return RewardResult(torch.tensor(yes).float(), {"p_yes_mass": torch.full((len(questions),), 0.5)})


@pytest.fixture(scope="module")
def corpus():
    return Corpus.from_scenes(12, split="test", seed=5, workers=1)


@pytest.fixture(scope="module")
def rows(corpus):
    judge = Planted({record["caption"] for record in corpus.records})
    wrong = probes.swapped_between_clips(corpus, open_world("smoke").wrong_records)
    return agreement.score_captions({"planted": judge}, corpus, wrong=wrong)


def test_five_wordings_each_with_its_place():
    assert len(probes.WORDINGS) == 5 and probes.WORDINGS["published"] == QUESTION
    assert len(set(probes.WORDINGS.values())) == 5
    for wording in probes.WORDINGS.values():
        assert "{a dog}" in probes.word(wording, "{a dog}") and "{caption}" not in probes.word(wording, "x")
    with pytest.raises(ValueError, match="0 times; write it once"):
        probes.word("Is it so?", "a dog")


def test_a_judge_that_knows_one_wording(corpus, rows):
    few = agreement.one_wrong_each(rows)
    judge = Planted({record["caption"] for record in corpus.records}, words="explanations")
    worded = probes.ask_wordings({"planted": judge}, few, corpus)
    assert len(worded) == 5 * len(few) == len(judge.questions)
    published = worded[worded["wording"] == "published"]
    assert published["score"].tolist() == published["truth"].tolist() == few["planted"].tolist()
    table = agreement.wording_table(worded).set_index("wording")
    assert table.index.tolist() == list(probes.WORDINGS)
    assert table["auc"].tolist() == [1, 0.5, 0.5, 0.5, 0.5] and table["share_yes"].tolist() == [0.5, 1, 1, 1, 1]
    assert table["balanced_accuracy"].tolist() == [1, 0.5, 0.5, 0.5, 0.5] and (table["yes_mass"] == 0.5).all()
    scores = {wording: part["score"].to_numpy() for wording, part in worded.groupby("wording", sort=False)}
    agreed = agreement.agreement_table(scores, few["clip"], dict.fromkeys(scores, 0.5))
    assert len(agreed) == 10 and agreed["kappa"][:4].tolist() == [0] * 4 and agreed["kappa"][4:].isna().all()


def test_a_judge_that_says_yes_to_silence(corpus):
    def yes(audio, sample_rate, prompts, metadata):
        return RewardResult(torch.full((len(prompts),), 0.7))

    def loud(audio, sample_rate, prompts, metadata):
        return RewardResult(audio.abs().amax(1))

    found = probes.score_sounds({"yes": yes, "loud": loud}, corpus, count=5)
    several = [record["caption"] for record in corpus.records if len(record["groups"]) > 1][:5]
    assert found["caption"].tolist() == several * 3 and (found["truth"] == 0).all()
    table = agreement.yes_table(found, {"yes": 0.5, "loud": 0.2}).set_index(["reward", "kind"])
    assert table["share_yes"].tolist() == [1, 1, 1, 0, 1, 1]
    assert table.loc[("yes", "silence"), "mean_score"] == pytest.approx(0.7)
    assert table.loc[("loud", "silence"), "share_yes_high"] == pytest.approx(1.96**2 / (5 + 1.96**2), abs=1e-4)  # Wilson, 0 of 5


def test_noise_has_its_level_its_slope_and_its_number():
    white, pink = (probes.sound(kind, [4, 7], 1 << 16) for kind in probes.SOUNDS[1:])
    assert not probes.sound("silence", [0], 100).any()
    for noise in (white, pink):
        assert noise.square().mean(1).sqrt().numpy() == pytest.approx([0.1, 0.1], rel=1e-4) and noise.abs().max() < 1
    power = torch.fft.rfft(pink).abs().square().mean(0)
    octaves = [10 * np.log10(power[1 << k : 2 << k].mean()) for k in range(6, 15)]
    assert np.diff(octaves) == pytest.approx([-3.01] * 8, abs=1.0)
    assert abs(np.polyfit(range(9), octaves, 1)[0] + 3.01) < 0.2
    assert torch.equal(probes.sound("pink noise", [7], 1 << 16)[0], pink[1]) and not torch.equal(pink[0], pink[1])
    with pytest.raises(ValueError, match="unknown sound 'brown noise': use one of silence"):
        probes.sound("brown noise", [0], 10)


def test_a_swapped_caption_shares_no_event(corpus, rows):
    swapped = rows[rows["kind"] == agreement.OTHER]
    by_caption = {record["caption"]: record for record in corpus.records}
    assert len(swapped) >= 10
    for row in swapped.itertuples():
        own, other = (dict(map(tuple, r["groups"])) for r in (corpus.records[row.clip], by_caption[row.caption]))
        assert not own.keys() & other.keys()
    recordings = probes.swapped_between_clips(corpus, lambda record, rng: {agreement.OTHER: "a bell"})
    assert recordings(corpus.records[0], np.random.default_rng(0)) == {agreement.OTHER: "a bell"}  # the world knows better
