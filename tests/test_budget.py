"""Before a start with published weights: what each notebook holds, what is refused with which advice, what must be here."""

import json

import huggingface_hub
import miniature
import miniature_clap
import miniature_lalm
import pytest
import test_aesthetics
from test_paper import tta_bench

from resonate_lib import budget, config, memory
from resonate_lib.models.flux_audio import FluxAudio


def little():
    return FluxAudio(latent_dim=8, text_dim=16, text_c_dim=16, hidden_dim=64, depth=2, fused_depth=1, num_heads=1,
                     latent_seq_len=16)  # fmt: skip


SIZE = sum(tensor.nbytes for tensor in little().state_dict().values())


@pytest.fixture
def settings(monkeypatch):
    """paper's settings with a network that is planned in no time, and an empty hub cache."""
    monkeypatch.setattr(budget, "_network", lambda config: little)
    monkeypatch.setattr(memory, "decoding", lambda clips, **_: 10 * clips)
    return config.resolve_all("paper")


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """An empty hub cache, online; nothing is asked of the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "hub"


def parts_of(settings, *numbers, device="cpu", **given):
    plans = budget.plans(settings, list(numbers), given, device)
    return {name: {row.part: row.bytes for row in rows} for name, rows in plans.items()}


# -------------------------------------------------------------------------------------------------- memory
def test_every_notebook_has_a_plan_with_what_it_holds(settings):
    parts = parts_of(settings, "00", "01", "03", "04", "05", "06", "07")
    names = ["00", "03 dpo", "03 pretrain", "04 grpo", "04 nft", "04 own reward", "04 planted hack", "05 grpo", "05 diffro"]
    names += ["06", "07"]
    assert list(parts) == names
    assert parts["03 dpo"]["lalm"] == parts["03 pretrain"]["lalm"] == 22_400_000_000 and "clap" not in parts["03 dpo"]
    assert {"clap", "lalm"} <= parts["05 grpo"].keys() and parts["06"]["lalm_eval"] == 70_500_000_000
    assert parts["06"]["msclap"] == 700_000_000 + budget.PROCESS
    assert parts["06"]["aesthetics"] == 400_000_000 and not {"clap", "lalm"} & parts["07"].keys()
    assert parts["04 nft"]["text encoder"] == round(0.44 * 3_100_000_000)


def test_networks_of_earlier_stages_are_counted(settings):
    parts = parts_of(settings, "02", "03", "04", "05", "06", "07")
    beside = {"02 pretrain": 1, "03 dpo": 1, "03 pretrain": 2, "04 grpo": 1, "04 nft": 2, "04 own reward": 3, "04 planted hack": 3}
    beside |= {"05 grpo": 1, "05 diffro": 2}
    for name, count in beside.items():
        assert parts[name][f"networks held beside: {count}, float32"] == count * SIZE and parts[name]["network, float32"] == SIZE
    assert parts["06"]["networks held: 7, float32"] == 7 * SIZE and parts["07"]["networks held: 6, float32"] == 6 * SIZE


def test_decoding_scoring_and_the_driver_are_counted(settings):
    parts = parts_of(settings, "04", "06", "07", device="cuda")
    clips = settings["eval"]["batch_size"]
    assert parts["04 grpo"]["decoding 24 clips"] == 240 and parts["04 grpo"]["scoring 24 clips"] == budget.SCORING["clap"]
    assert parts["06"][f"decoding {clips} clips"] == 10 * clips
    assert parts["06"][f"scoring {clips} clips"] == budget.SCORING["lalm"] and "scoring 12 clips" not in parts["07"]
    assert parts["06"]["driver and libraries"] == parts["07"]["driver and libraries"] == memory.ALLOWANCE


def test_a_gradient_through_codec_and_reward_is_counted_beside_the_sampling_that_it_goes_on_to(settings):
    rows = budget.plans(settings, ["05"], {"05": {"diffro_last_steps": 4, "diffro_micro_batch": 8}}, "cuda")["05 diffro"]
    found = {row.part: row for row in rows}
    one = budget.plans(settings, ["05"], {"05": {"diffro_micro_batch": 8}}, "cuda")["05 diffro"]
    four, alone = found["activations of 8 clips, 4 steps"], next(row for row in one if "8 clips, 1 steps" in row.part)
    assert four.bytes == 4 * alone.bytes and four.phase == ""
    assert found["decoding 2 clips"].bytes == 20 and found["scoring 2 clips"].bytes == budget.GRAPH * budget.SCORING["lalm"]
    assert {found[f"{name} 2 clips"].phase for name in ("decoding", "scoring")} == {"hearing"}
    assert "05 diffro" not in budget.plans(settings, ["05"], {"05": {"diffro_steps": 0}}, "cuda")


def test_a_judge_elsewhere_or_quantised_takes_less(settings):
    settings["reward"] |= {"lalm_source": "http://localhost:8000/v1#judge", "lalm_quantisation": "4bit"}
    parts = parts_of(settings, "06")["06"]
    assert "lalm" not in parts and parts["lalm_eval"] == 2_500_000_000 + 68_000_000_000 // 4
    settings["reward"]["lalm_source"] = "Qwen/Qwen2.5-Omni-7B"
    assert "lalm" not in parts_of(settings, "06", **{"06": {"reward": "clap"}})["06"]


def test_what_is_given_for_a_notebook_counts(settings):
    few, many = (
        memory.total(budget.plans(settings, ["04"], {"04": {"group_size": size, "nft_steps": 3}}, "cpu")["04 grpo"])[0]
        for size in (2, 400)
    )
    assert many > few
    whole = parts_of(settings, "04", **{"04": {"trained": "all", "nft_group_size": 2}})["04 nft"]
    assert "adapters" not in whole and whole["gradients"] > 0.9 * SIZE
    stages = [budget._stage(settings, "03", section, {"batch_size": 4, "steps": 3}) for section in ("dpo", "pretrain")]
    assert [stage.batch_size for stage in stages] == [4, 128]  # pairs a step, which the comparison is not told
    assert "sampling 7 clips" in parts_of(settings, "07", **{"07": {"prompts": 7}})["07"]


def test_what_cannot_fit_is_refused_with_advice(settings):
    with pytest.raises(ValueError, match=r"notebook 05 grpo does not fit on this machine: needs .* lalm_source=http://") as caught:
        budget.report(settings, ["05"], {}, "cpu", 10_000_000_000)
    assert "\n" not in str(caught.value)
    assert "in all" in budget.report(settings, ["05"], {}, "cpu", 200_000_000_000)


def test_a_damaged_checkpoint_ends_the_plan_with_its_own_words(tmp_path):
    settings = config.resolve_all("paper")
    weights = miniature.build(tmp_path / "weights")
    settings["suite"] |= {"weights": str(weights), "seconds": 1.0}
    network = budget._network(settings)()
    assert (network.hidden_dim, network.latent_seq_len) == (32, 43)
    path = weights / "Resonate_PT.pth"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"Resonate_PT.pth is .*get it again"):
        budget.report(settings, ["07"], {}, "cpu", 10**12)


# -------------------------------------------------------------------------------------------------- parts
@pytest.fixture
def whole(tmp_path):
    """paper's settings with every part a miniature in a directory."""
    settings = config.resolve_all("paper")
    checkpoint, roberta, _ = miniature_clap.make_miniature(tmp_path / "clap")
    judges = {kind: str(miniature_lalm.write(tmp_path / kind, kind)) for kind in ("qwen2_5_omni", "qwen3_omni_moe")}
    settings["suite"]["weights"] = str(miniature.build(tmp_path / "weights"))
    settings["reward"] |= {
        "clap_source": str(checkpoint), "roberta_source": str(roberta), "lalm_source": judges["qwen2_5_omni"],
        "lalm_eval_source": judges["qwen3_omni_moe"], "aesthetics_source": str(test_aesthetics.write(tmp_path / "aesthetics")),
        "msclap_source": "",
    }  # fmt: skip
    settings["eval"]["tta_bench"] = str(tta_bench(tmp_path / "tta"))
    return settings


ALL = ["00", "01", "02", "03", "04", "05", "06", "07"]


def test_parts_are_asked_for_by_the_notebooks_that_use_them(whole, tmp_path):
    assert budget.parts(whole, ALL, {}) == []

    def lacks(place, notebooks, words, **given):
        moved = place.with_name("away")
        place.rename(moved)
        with pytest.raises(ValueError, match=words) as caught:
            budget.parts(whole, notebooks, {}, **given)
        assert "\n" not in str(caught.value)
        others = [number for number in ALL if number not in notebooks]
        try:
            return budget.parts(whole, others, {})
        except ValueError as error:
            return str(error)
        finally:
            moved.rename(place)

    weights = tmp_path / "weights"
    assert "VAE" in lacks(weights / "v1-44.pth", ["07"], "VAE, 44.1 kHz.*v1-44.pth .*get it from https://")
    lacks(weights / "flan-t5-large" / "config.json", ["00"], "FLAN-T5-large")
    lacks(weights / "bigvgan_generator.pt", ["04"], "BigVGAN")
    lacks(weights / "Resonate_PT.pth", ["04"], "pre-trained generator is not in")
    assert lacks(tmp_path / "qwen3_omni_moe" / "config.json", ["02", "05", "06"], "evaluation.* config.json is missing") == []
    assert lacks(tmp_path / "qwen2_5_omni" / "tokenizer.json", ["02", "03", "05", "06"], "a tokenizer") == []
    assert lacks(tmp_path / "tta" / "bias_prompt.json", ["06"], "bias_prompt.json: download") == []
    for name in ("model.safetensors", "config.json"):  # the older file is enough
        (tmp_path / "aesthetics" / name).unlink()
    assert lacks(tmp_path / "aesthetics" / "checkpoint.pt", ["04", "05", "06"], "Aesthetics .* is not in .*model.safetensors") == []
    (tmp_path / "tta" / "bias_prompt.json").write_text("[")
    with pytest.raises(ValueError, match=r"bias_prompt.json is not JSON"):
        budget.parts(whole, ["06"], {})


def test_what_lives_elsewhere_or_is_not_used_is_not_asked_for(whole, tmp_path):
    whole["reward"] |= {"lalm_source": "http://localhost:1/v1#judge", "lalm_eval_source": "", "aesthetics_source": ""}
    assert budget.parts(whole, ALL, {}) == []
    empty = config.resolve_all("paper")
    empty["suite"]["weights"] = str(tmp_path)
    assert budget.parts(empty, ["01"], {}) == []
    (tmp_path / "weights" / "Resonate_PT.pth").unlink()
    base = tmp_path / "base"
    base.mkdir()
    assert budget.parts(whole, ["07"], {}, base=base) == budget.parts(whole, ["02", "07"], {}, trained=True) == []
    saved = {name: {"path": str(tmp_path / "weights" / file), "source": "x"} for name, file in
             (("vae_44k", "v1-44.pth"), ("vocoder_44k", "bigvgan_generator.pt"), ("t5", "flan-t5-large"))}  # fmt: skip
    (base / "generator.json").write_text(json.dumps({"parts": saved}))
    whole["suite"]["weights"] = "AndreasXi/Resonate"
    assert budget.parts(whole, ["07"], {}, base=base) == []


def test_a_hub_id_is_downloaded_online_and_refused_offline(whole, monkeypatch):
    whole["reward"] |= {"lalm_source": "Qwen/Qwen2.5-Omni-7B", "roberta_source": "FacebookAI/roberta-base"}
    lines = budget.parts(whole, ["02", "05"], {})
    assert [line.split(": ")[1].split(",")[0] for line in lines] == ["tokenizer of LAION-CLAP", "LALM judge (reward)"]
    assert "Qwen/Qwen2.5-Omni-7B (about 22.4 GB, Apache-2.0)" in lines[1] and "size is not known" in lines[0]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="LAION-CLAP is not in FacebookAI/roberta-base on this machine"):
        budget.parts(whole, ["02"], {})
    whole["suite"] |= {"weights": "AndreasXi/Resonate"}
    with pytest.raises(ValueError, match="not in the hub's local cache and HF_HUB_OFFLINE is set"):
        budget.parts(whole, ["07"], {})


def test_around_a_hub_id_the_other_parts_must_be_named_or_here(whole):
    whole["suite"] |= {"weights": "AndreasXi/Resonate"}
    with pytest.raises(ValueError, match=r"VAE, 44.1 kHz.*or name the hub id 'hkchengrex/MMAudio' as its source"):
        budget.parts(whole, ["07"], {})


def test_08_looks_for_a_pipeline_and_the_clap_that_trains_it(settings):
    used = dict(budget._used(settings, ["08"], {}, None, False))
    assert {"audioldm", "generator_pt", "clap", "roberta", "aesthetics"} <= used.keys()


def test_08_plans_the_flows_stages_beside_a_pipeline(settings):
    plain = parts_of(settings, "08")
    assert list(plain) == ["08 grpo", "08 nft", "08 dpo"]
    for name, count in {"08 grpo": 1, "08 nft": 2, "08 dpo": 3}.items():
        assert plain[name][f"networks held beside: {count}, float32"] == count * SIZE
        assert plain[name]["diffusion pipeline and its copy, at most"] == 3_400_000_000 and "lalm" not in plain[name]
    assert parts_of(settings, "08", **{"08": {"group_size": 3, "trained": "all"}}) == plain  # knobs of PPO, which is not planned
    assert parts_of(settings, "08", **{"08": {"reward": "lalm"}})["08 nft"]["lalm"] == 22_400_000_000
