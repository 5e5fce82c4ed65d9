"""Where values come from, what is refused, and how the refusal reads."""

import pytest

from resonate_lib import config
from resonate_lib.config import DPOConfig, EvalConfig, GRPOConfig, NFTConfig, PretrainConfig, derived, resolve


@pytest.fixture
def params(tmp_path):
    (tmp_path / "tiny.yaml").write_text("grpo:\n  learning_rate: 3e-4\n  steps: 7\nminutes: {'04': 2}\n")
    (tmp_path / "small.yaml").write_text("{}\n")
    return tmp_path


def test_order_is_override_then_profile_then_default(params):
    assert resolve(GRPOConfig, "small", params_dir=params).steps == GRPOConfig().steps
    assert resolve(GRPOConfig, "tiny", params_dir=params, steps=None).steps == 7
    assert resolve(GRPOConfig, "tiny", params_dir=params, steps=0x9).steps == 9


def test_yaml_exponent_becomes_a_float(params):
    assert resolve(GRPOConfig, "tiny", params_dir=params).learning_rate == pytest.approx(3e-4)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("steps", "1.5", "not a whole number"),
        ("steps", 1.0, "not a whole number"),
        ("steps", True, "not a whole number"),
        ("steps", 0, "use 1 or more"),
        ("group_size", 1, "a group of one has no advantage; use 2 or more"),
        ("learning_rate", "fast", "not a number"),
        ("learning_rate", "nan", "not finite"),
        ("learning_rate", 0, "use more than 0"),
        ("noise_level", 21, "use 2 or less"),
        ("guidance_scales", "1,21", "use 20 or less"),
        ("global_std", "maybe", "not a yes or no"),
        ("kind", "sdee", "did you mean 'sde'?"),
        ("reward", 3, "not a text"),
        ("minibatches", 1000, "more than the 192 clips"),
        ("timestep_fraction", 0.05, "trains none of 10 steps"),
        ("lerning_rate", 1e-3, "did you mean 'learning_rate'?"),
    ],
)
def test_bad_values_say_what_to_do_in_one_line(name, value, words):
    with pytest.raises(ValueError, match=r".") as caught:
        resolve(GRPOConfig, "tiny", **{name: value})
    assert words in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_values_from_a_command_line():
    made = resolve(GRPOConfig, "tiny", steps="12", learning_rate="3e-4", global_std="false", kind="cps")
    assert (made.steps, made.learning_rate, made.global_std, made.kind) == (12, 3e-4, False, "cps")
    assert resolve(EvalConfig, "tiny", guidance_scales="1, 4.5").guidance_scales == (1.0, 4.5)
    assert resolve(EvalConfig, "tiny", guidance_scales=2).guidance_scales == (2.0,)  # plain papermill makes it a number


def test_checked_wherever_it_is_made():
    with pytest.raises(ValueError, match="a group of one"):
        NFTConfig(group_size=1)
    with pytest.raises(ValueError, match="fused_depth=7"):
        PretrainConfig(depth=6, fused_depth=7)


def test_unknown_profile_names_the_nearest(params):
    with pytest.raises(ValueError, match="unknown profile 'tinny'; did you mean 'tiny'"):
        resolve(GRPOConfig, "tinny", params_dir=params)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grppo: {steps: 1}", "did you mean 'grpo'"),
        ("grpo: {stepps: 1}", "did you mean 'steps'"),
        ("grpo: {group_size: 1}", "bad.yaml: grpo: group_size=1"),
        ("grpo: 3", "expected `name: value` lines"),
        ("- a", "expected sections"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_profile_is_checked_whole(tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=r".") as caught:
        resolve(DPOConfig, "bad", params_dir=tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("profile", ["smoke", "tiny", "small", "paper"])
def test_shipped_profiles(profile):
    sections = config.resolve_all(profile)
    assert list(sections) == list(config.SECTIONS)
    assert sections["grpo"]["group_size"] >= 2


def test_paper_profile_has_the_published_numbers():
    grpo = resolve(GRPOConfig, "paper")
    assert (grpo.group_size, grpo.num_steps, grpo.guidance_scales, grpo.noise_level) == (24, 10, (4.5,), 0.7)
    assert (grpo.beta, grpo.kl, grpo.clip_range, grpo.learning_rate) == (0.04, "paper", 1e-4, 1e-4)
    # flux_audio_m_44k: 7 heads of 64, 16 joint blocks of 52
    base = resolve(PretrainConfig, "paper")
    assert (base.hidden_dim, base.num_heads, base.depth - base.fused_depth) == (448, 7, 16)


def test_derived_arithmetic():
    text = derived(GRPOConfig(steps=5, prompts_per_step=4, group_size=6, minibatches=2))
    assert "4 prompts x 6 = 24" in text and "24 / 2 minibatches = about 12" in text and "9 of 10" in text
    assert "2 x 10 pairs = 20" in derived(DPOConfig(pairs=10))
