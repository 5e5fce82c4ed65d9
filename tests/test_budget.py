"""The memory plans of whole notebooks: what each holds, what is refused before a start, and with which advice."""

import pytest

from resonate_lib import budget, config, memory


@pytest.fixture
def settings(monkeypatch):
    """paper's settings with a network that is planned in no time."""
    from resonate_lib.models.flux_audio import FluxAudio

    def small(_):
        return FluxAudio(latent_dim=8, text_dim=16, text_c_dim=16, hidden_dim=64, depth=2, fused_depth=1, num_heads=1,
                         latent_seq_len=16)  # fmt: skip

    monkeypatch.setattr(budget, "_network", small)
    return config.resolve_all("paper")


def test_every_stage_of_a_notebook_has_a_plan_with_what_it_holds(settings):
    plans = budget.plans(settings, ["01", "03", "04", "05", "06"], {}, "cpu")
    assert list(plans) == ["03 dpo", "03 pretrain", "04 grpo", "04 nft", "05 grpo", "06"]
    parts = {name: {row.part: row.bytes for row in rows} for name, rows in plans.items()}
    assert parts["03 dpo"]["lalm"] == 22_400_000_000 and "clap" not in parts["03 dpo"]
    assert {"clap", "lalm"} <= parts["05 grpo"].keys() and parts["06"]["lalm_eval"] == 70_500_000_000
    assert "6 networks, float32" in parts["06"] and parts["04 nft"]["text encoder"] == 3_100_000_000


def test_a_judge_elsewhere_or_quantised_takes_less(settings):
    settings["reward"] |= {"lalm_source": "http://localhost:8000/v1#judge", "lalm_quantisation": "4bit"}
    (rows,) = budget.plans(settings, ["06"], {}, "cpu").values()
    parts = {row.part: row.bytes for row in rows}
    assert "lalm" not in parts and parts["lalm_eval"] == 70_500_000_000 // 4


def test_what_is_given_for_a_notebook_counts(settings):
    few, many = (
        memory.total(budget.plans(settings, ["04"], {"04": {"group_size": size, "nft_steps": 3}}, "cpu")["04 grpo"])[0]
        for size in (2, 400)
    )
    assert many > few


def test_what_cannot_fit_is_refused_with_advice(settings):
    with pytest.raises(ValueError, match=r"notebook 05 grpo does not fit on this machine: needs .* lalm_source=http://") as caught:
        budget.report(settings, ["05"], {}, "cpu", 10_000_000_000)
    assert "\n" not in str(caught.value)
    assert "in all" in budget.report(settings, ["05"], {}, "cpu", 200_000_000_000)
