"""Pipelines of diffusers as generators, against the pipelines themselves on miniatures in the real file format."""

import itertools
import json
import re
import shutil
import warnings

import miniature_pipelines as miniature
import pytest
import test_paper
import torch
from safetensors.torch import load_file, save_file

from resonate_lib import budget, diffusion, doctor, ppo, samplers, versions
from resonate_lib.config import DiffusionConfig, DPOConfig, GRPOConfig, NFTConfig, PPOConfig, resolve
from resonate_lib.evaluation import efficiency
from resonate_lib.models import lora, pretrained
from resonate_lib.models.flux_audio import Condition
from resonate_lib.models.generator import Generator
from resonate_lib.models.pipeline_parts import to_frames, to_planes
from resonate_lib.models.pipelines import load_pipeline, read_process
from resonate_lib.rewards.base import RewardResult
from resonate_lib.runs import open_run

warnings.filterwarnings("ignore", message=".*weight_norm.*")
KINDS = ("audioldm", "audioldm2", "stable_audio")
PROMPTS = ["a dog bark followed by rain", "car horn"]
STEPS, SCALE = 4, 2.5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{kind: (diffusers' pipeline, folder, our generator)}."""
    top = tmp_path_factory.mktemp("pipelines")
    found = {}
    for kind in KINDS:
        pipeline = getattr(miniature, kind)(top / kind)
        pipeline.set_progress_bar_config(disable=True)
        found[kind] = pipeline, top / kind, load_pipeline(top / kind, device="cpu")
    return found


def noise_for(generator: Generator) -> torch.Tensor:
    return samplers.draw_noise(generator.latent_shape, [11, 12])


def sampled(generator: Generator) -> torch.Tensor:
    cond = generator.encode_prompts(PROMPTS)
    return generator.diffusion.ode_sample(generator.network, noise_for(generator), cond, steps=STEPS, guidance_scale=SCALE)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Equal to `tolerance` of the largest number, and not because both are nothing."""
    assert got.shape == want.shape and want.abs().max() > 0.01
    assert (got - want).abs().max() <= tolerance * want.abs().max()


# ---- the same numbers as the pipelines ---------------------------------------
def of_audioldm(pipeline, noise):
    latents = []
    pipeline(PROMPTS, audio_length_in_s=0.64, num_inference_steps=STEPS, guidance_scale=SCALE, latents=noise,
             callback=lambda step, t, x: latents.append(x))  # fmt: skip
    return latents[-1]


def of_audioldm2(pipeline, noise):
    """One prompt at a time and each text encoded by itself; what the pipeline says of the empty one, filled up to the prompt's."""
    latents, (nothing, _, said_nothing) = [], pipeline.encode_prompt("", "cpu", 1, False, max_new_tokens=miniature.NEW)
    for row, prompt in enumerate(PROMPTS):
        states, mask, said = pipeline.encode_prompt(prompt, "cpu", 1, False, max_new_tokens=miniature.NEW)
        filled = torch.nn.functional.pad(nothing, (0, 0, 0, states.shape[1] - nothing.shape[1]))
        masked = (torch.arange(states.shape[1]) < nothing.shape[1]).long()[None]
        latents.append(pipeline(
            prompt_embeds=states, attention_mask=mask, generated_prompt_embeds=said, negative_prompt_embeds=filled,
            negative_attention_mask=masked, negative_generated_prompt_embeds=said_nothing, num_inference_steps=STEPS,
            guidance_scale=SCALE, latents=noise[row : row + 1], output_type="latent", audio_length_in_s=0.64,
        ).audios)  # fmt: skip
    return torch.cat(latents)


def of_stable_audio(pipeline, noise):
    return pipeline(PROMPTS, audio_end_in_s=1.0, num_inference_steps=STEPS, guidance_scale=SCALE, latents=noise,
                    output_type="latent").audios  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_gives_the_pipelines_latents(made, kind):
    """Guidance, text and schedule together: prompts in, latents out. Stable Audio by diffusers' deterministic solver."""
    pipeline, _, generator = made[kind]
    noise = noise_for(generator)
    if kind == "stable_audio":
        want = of_stable_audio(pipeline, noise.transpose(1, 2)).transpose(1, 2)
    else:
        want = to_frames({"audioldm": of_audioldm, "audioldm2": of_audioldm2}[kind](pipeline, to_planes(noise, 8)))
    close(sampled(generator), want, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_become_the_pipelines_sound(made, kind):
    pipeline, folder, generator = made[kind]
    latents = noise_for(generator)
    if kind == "stable_audio":
        want = pipeline.vae.decode(latents.transpose(1, 2)).sample.mean(1)
    else:
        mel = pipeline.vae.decode(to_planes(latents, 8) / pipeline.vae.config.scaling_factor).sample
        want = pipeline.mel_spectrogram_to_waveform(mel)[:, : round(0.64 * 16_000)]
    close(generator.decode(latents, limit=False), want.detach(), 1e-5)
    assert generator.decode(latents).abs().max() <= 0.99 + 1e-6
    raw = generator.network.unnormalize(latents)
    close(generator.network.normalize(raw), latents, 1e-6)
    shorter = load_pipeline(folder, seconds=0.3, device="cpu")
    assert shorter.decode(shorter.generate(["rain"], steps=1, seeds=[0])).shape == (1, round(0.3 * generator.sample_rate))


def test_a_whole_call_gives_the_same_sound(made):
    """0.3 s is no whole number of latent frames: the pipeline rounds up and cuts."""
    pipeline, folder, _ = made["audioldm"]
    generator = load_pipeline(folder, seconds=0.3, device="cpu")
    want = pipeline(PROMPTS, audio_length_in_s=0.3, num_inference_steps=STEPS, guidance_scale=SCALE,
                    latents=to_planes(noise_for(generator), 8), output_type="pt").audios  # fmt: skip
    close(generator.decode(sampled(generator), limit=False), want, 1e-4)


def test_stable_audio_hears_and_says_what_its_scheduler_means(made):
    """One evaluation at every noise level: what diffusers scales and tells, and what it makes of the answer."""
    pipeline, _, generator = made["stable_audio"]
    scheduler, noise = pipeline.scheduler, noise_for(generator)
    scheduler.set_timesteps(STEPS)
    grid = generator.diffusion.grid(STEPS)
    assert torch.allclose(grid.times, scheduler.timesteps.float(), atol=1e-6)
    assert torch.allclose(grid.alpha_bars, 1 / (1 + scheduler.sigmas.double().square()), rtol=1e-4)
    for level, bar in zip(scheduler.sigmas[:-1], grid.alpha_bars[:-1].float(), strict=True):
        x, output = 3 * noise * (1 + level**2).sqrt(), noise.flip(0)
        heard = scheduler.precondition_inputs(x, level)
        close(heard, 3 * noise, 1e-5)
        x0 = samplers.ddim_step(heard, output, bar, 1.0, eta=0.0, prediction="v").x_next
        close(x0, scheduler.precondition_outputs(x, output, level), 1e-4)


def test_stable_audio_encodes_what_it_decodes(made):
    pipeline, _, generator = made["stable_audio"]
    audio = torch.randn(2, 90, generator=torch.Generator().manual_seed(0))
    want = pipeline.vae.encode(audio[:, None, :80].expand(-1, 2, -1)).latent_dist.mean.transpose(1, 2)
    close(generator.encode_audio(audio), want.detach(), 1e-5)
    assert generator.encode_audio(audio[:, :50]).shape == (2, 10, 6)


def test_angular_diffusion_trains_at_even_angles():
    process = diffusion.AngularDiffusion()
    t = torch.tensor([0.001, 0.3, 0.5, 0.9])  # flow times: noise t, data 1 - t
    chosen = process.nearest(t)
    angle = torch.atan(t / (1 - t)) * 2 / torch.pi
    assert (process._times(chosen) - angle).abs().max() < 0.51 / process.train_steps + 1e-6
    assert torch.allclose(process.alpha_bars[chosen], torch.cos(process._times(chosen).double() * torch.pi / 2) ** 2, atol=1e-6)
    with pytest.raises(ValueError, match="at least 1 step"):
        process.grid(0)


# ---- text -----------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_and_a_clip_do_not_depend_on_their_batch(made, kind):
    _, _, generator = made[kind]
    both, alone = generator.text(PROMPTS), generator.text(PROMPTS[1:])
    assert torch.equal(both.text_f[1], alone.text_f[0]) and torch.equal(both.text_f_c[1], alone.text_f_c[0])
    assert not torch.allclose(both.text_f_c[0], both.text_f_c[1])
    kept = generator.encode_prompts(PROMPTS)  # through the memory of prompts, which leaves out rows of zeros
    assert torch.equal(kept.text_f, both.text_f) and torch.equal(kept.text_f_c, both.text_f_c)
    latents = generator.diffusion.ode_sample(generator.network, noise_for(generator)[1:], kept.index(slice(1, 2)), steps=STEPS,
                                             guidance_scale=SCALE)  # fmt: skip
    close(latents, sampled(generator)[1:], 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_empty_prompt_is_the_unconditional_branch(made, kind):
    """Stable Audio was trained to hear nothing at all instead."""
    _, _, generator = made[kind]
    empty, text = generator.network.empty_condition(3), generator.text([""])
    assert empty.batch == 3 and empty.text_f.shape[1:] == (generator.text.length, generator.text.text_dim)
    if kind == "stable_audio":
        assert not empty.text_f.any()
    else:
        assert torch.equal(empty.text_f[2], text.text_f[0]) and torch.equal(empty.text_f_c[2], text.text_f_c[0])


def test_audioldm2_continues_as_a_language_model_with_its_cache(made):
    """Against transformers' own memory of past states, and the pipeline's function on the class it takes."""
    pipeline, _, generator = made["audioldm2"]
    start = torch.randn(1, 7, miniature.GPT_WIDTH, generator=torch.Generator().manual_seed(3))
    state, past, want = start, None, []
    for _ in range(miniature.NEW):
        out = pipeline.language_model.transformer(inputs_embeds=state, past_key_values=past, use_cache=True)
        state, past = out.last_hidden_state[:, -1:], out.past_key_values
        want.append(state)
    _, _, said = pipeline.encode_prompt(PROMPTS[0], "cpu", 1, False, max_new_tokens=miniature.NEW)
    close(generator.text(PROMPTS[:1]).text_f[:, : miniature.NEW, : miniature.GPT_WIDTH], said.detach(), 1e-5)
    close(pipeline.generate_language_model(start, max_new_tokens=miniature.NEW).detach(), torch.cat(want, 1).detach(), 1e-5)


def test_a_long_prompt_is_cut_and_said_once(made, capsys):
    _, _, generator = made["stable_audio"]
    long = generator.text(["rain " * 60, "rain " * 70])
    assert long.text_f.shape == (2, 26, 16) and torch.equal(long.text_f[0], long.text_f[1])
    assert capsys.readouterr().out.count("over 24 tokens") == 1


# ---- training -------------------------------------------------------------------
def loudness(audio, sample_rate, prompts, metadata=None):
    return RewardResult(audio.square().mean(1).sqrt().cpu(), {})


def ppo_config(**changes) -> PPOConfig:
    small = dict(steps=1, prompts_per_step=2, group_size=3, num_steps=3, guidance_scales=(SCALE,), epochs=1, minibatches=1, ema=0.0,
                 critic_epochs=1, precision="float32", learning_rate=1e-3, lora_rank=2, lora_alpha=4.0)  # fmt: skip
    return PPOConfig(**(small | changes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", ["all", "attention", "lora"])
def test_a_round_of_ppo_trains_a_pipeline(made, kind, trained):
    generator = made[kind][2].fork()
    before = {name: tensor.clone() for name, tensor in generator.network.state_dict().items()}
    records = [{"prompt_text": prompt} for prompt in PROMPTS]
    row = ppo.train(generator, loudness, records, ppo_config(trained=trained, checkpointing=trained != "attention"))[0]
    assert row["first_ratio_deviation"] == 0 and row["grad_norm"] > 0 and not generator.network.checkpointing
    after = generator.network.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert after.keys() == before.keys() and moved
    if trained == "all":
        assert any("conv" in name for name in moved)
    else:
        assert not any("conv" in name for name in moved if "norm" not in name)
        assert any("to_q" in name for name in moved)
    if trained == "lora":
        assert all(name.removesuffix(".weight").endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in moved)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(made, kind):
    generator, gradients = made[kind][2].fork(), []
    cond, latents = generator.encode_prompts(PROMPTS), noise_for(generator)
    for value in (False, True):
        network = generator.network
        network.checkpointing = value
        assert network.checkpointing is value
        network.zero_grad()
        network.velocity(latents, network.project_text(cond), torch.tensor([0.4, 0.7])).square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_the_loss_takes_a_pipeline(made):
    """The empty condition where captions are dropped, time in the network's unit."""
    for kind in KINDS:
        generator = made[kind][2]
        cond, latents, drop = generator.encode_prompts(PROMPTS), noise_for(generator), torch.tensor([True, False])
        draws = torch.tensor([0.3, 0.8]), noise_for(generator).flip(0), drop
        loss = generator.diffusion.noised_loss(generator.network, latents, cond, *draws)
        empty = generator.network.empty_condition(2)
        mixed = Condition(torch.stack([empty.text_f[0], cond.text_f[1]]), torch.stack([empty.text_f_c[0], cond.text_f_c[1]]))
        want = generator.diffusion.noised_loss(generator.network, latents, mixed, *draws[:2], torch.tensor([False, False]))
        assert torch.isfinite(loss) and torch.allclose(loss, want)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_a_pipeline(made, kind, tmp_path):
    generator = made[kind][2].fork()
    network, cond, latents, t = generator.network, generator.encode_prompts(PROMPTS), noise_for(generator), torch.tensor([0.4, 0.7])

    def answer(net):
        return net.velocity(latents, net.project_text(cond), t).detach()

    names, base = list(network.state_dict()), answer(network)
    adapted = lora.attach(network, rank=2, alpha=4.0)
    frozen = answer(adapted.reference())
    close(answer(adapted), base, 1e-5)  # a frozen weight may be computed with by another kernel
    layers = {name.rsplit(".lora_", 1)[0].split(".", 1)[1] for name, _ in adapted.named_parameters()}
    assert layers and all(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in layers)
    with torch.no_grad():
        for i, tensor in enumerate(adapted.parameters()):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)))
    changed = answer(adapted)
    assert (changed - base).abs().max() > 1e-2 and torch.equal(answer(adapted.reference()), frozen)
    merged = lora.merge(adapted)
    assert merged is network and list(merged.state_dict()) == names
    close(answer(merged), changed, 1e-5)
    lora.save(network.adapter, tmp_path / "adapter.safetensors")
    again = made[kind][2].fork().network
    assert torch.equal(answer(lora.load(again, tmp_path / "adapter.safetensors")), changed)


# ---- saving and loading ---------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_pipeline_comes_back(made, kind, tmp_path):
    """Around the pipeline where it lay, in a directory of weights, or as a tuning of one that is loaded; FileNotFoundError where
    it has gone."""
    _, folder, base = made[kind]
    tuned = base.fork()
    with torch.no_grad():
        next(p for name, p in tuned.network.named_parameters() if "to_v" in name).add_(0.3)
    tuned.save(tmp_path / "ppo", seed=5)
    want = sampled(tuned)
    assert not torch.allclose(want, sampled(base)) and Generator.facts(tmp_path / "ppo") == {"seed": 5}
    assert {path.name for path in (tmp_path / "ppo").iterdir()} == {"network.safetensors", "generator.json"}
    for found in (Generator.load(tmp_path / "ppo", device="cpu"), base.with_network(tmp_path / "ppo")):
        assert torch.equal(sampled(found), want) and found.diffusion == base.diffusion and found.latent_shape == base.latent_shape
    part = pretrained.PARTS[kind]
    moved = tmp_path / "weights" / part.folder
    shutil.copytree(folder, moved)
    change = json.loads((tmp_path / "ppo" / "generator.json").read_text())
    change["parts"][kind] |= {"path": str(tmp_path / "gone"), "source": str(tmp_path / "gone")}
    (tmp_path / "ppo" / "generator.json").write_text(json.dumps(change))
    found = Generator.load(tmp_path / "ppo", tmp_path / "weights", device="cpu")
    assert torch.equal(sampled(found), want) and found.parts[kind].path == moved
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        Generator.load(tmp_path / "ppo")


def test_only_a_tuning_of_the_same_pipeline_is_taken(made, tmp_path):
    made["audioldm"][2].save(tmp_path / "one")
    with pytest.raises(ValueError, match="name a tuning of the same base"):
        made["audioldm2"][2].with_network(tmp_path / "one")


def test_a_run_takes_the_pipeline_that_the_profile_names(made, tmp_path, monkeypatch):
    _, folder, base = made["audioldm"]
    suite = "suite: {world: folder, sample_rate: 44100, seconds: 0.64}"
    (tmp_path / "paper.yaml").write_text(f"{suite}\ndiffusion: {{source: {folder}}}\n")
    monkeypatch.setenv("RESONATE_PARAMS", str(tmp_path))
    run = open_run(tmp_path / "run", profile="paper")
    found = run.generator("diffusion")
    assert torch.equal(sampled(found).cpu(), sampled(base)) and found.sample_rate == 16_000
    noted = json.loads((next((tmp_path / "run" / "notes").glob("*.json"))).read_text())["inputs"]["audioldm"]
    assert noted["source"] == str(folder) and len(noted["sha256"]["unet/diffusion_pytorch_model.safetensors"]) == 64
    found.save(run.checkpoint("ppo"))
    assert torch.equal(sampled(run.generator("ppo")).cpu(), sampled(base))


def test_doctor_and_the_check_before_a_run_see_the_pipeline(made, tmp_path, monkeypatch):
    """A directory is found, a hub id would be downloaded, and neither is silently left out."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(pretrained, "offline", lambda: False)
    monkeypatch.setenv("RESONATE_PARAMS", str(tmp_path))
    (tmp_path / "paper.yaml").write_text(f"diffusion: {{source: {made['audioldm2'][1]}}}\n")
    rows = {row.name: row for row in doctor.published("paper")}
    assert rows["audioldm2"].state == "ok" and rows["audioldm"].state == rows["stable_audio"].state == "note"
    assert "CC-BY-NC-SA-4.0" in rows["audioldm"].found and "cvssp/audioldm-s-full-v2 -> " in rows["audioldm"].remedy
    config = {"suite": {"weights": "tiny"}, "reward": {}, "eval": {"tta_bench": ""}}
    asked = []
    for source in (str(made["audioldm2"][1]), "cvssp/audioldm-s-full-v2", ""):
        used = budget._used(config | {"diffusion": {"source": source}}, ["08"], {}, None, False)
        asked.append([part for part, _ in itertools.islice(used, 1) if part in KINDS])
    assert asked == [["audioldm2"], ["audioldm"], []]


@pytest.mark.parametrize("profile", ["paper", "small"])
def test_the_profiles_train_a_pipeline_on_equal_clips(profile):
    ppo_section, process = resolve(PPOConfig, profile), resolve(DiffusionConfig, profile)
    assert pretrained.pipeline_part(process.source) == "audioldm" and ppo_section.trained == "lora" and ppo_section.reward == "clap"
    assert ppo_section.sample_batch == ppo_section.micro_batch  # in one size of batch the first ratio is exactly 1
    clips = efficiency.clips_made(ppo_section)
    for cls in (GRPOConfig, NFTConfig, DPOConfig):
        assert efficiency.clips_made(efficiency.at_clips(resolve(cls, profile), clips)) == clips


@pytest.mark.slow
def test_notebook_08_runs_at_paper_shape_on_a_pipeline(tmp_path, monkeypatch):
    """The profile as it is but for counts: AudioLDM tuned by PPO with LoRA and the CLAP reward, flow models beside it."""
    whole = test_paper.small_disk
    counts = {"num_steps": 2, "group_size": 3, "prompts_per_step": 2, "pairs": 6, "prompts": 2, "batch_size": 4, "minibatches": 1,
              "sample_batch": 6, "micro_batch": 6, "watch_every": 2}  # fmt: skip

    def smaller(folder):
        path = whole(folder) / "paper.yaml"
        text = path.read_text(encoding="utf-8").replace("eval:\n", "eval:\n  validation_prompts: 2\n  bootstrap: 100\n")
        for name, count in counts.items():
            text = re.sub(rf"\b{name}: \d+", f"{name}: {count}", text)
        path.write_text(text, encoding="utf-8")
        return folder

    monkeypatch.setattr(test_paper, "small_disk", smaller)
    miniature.audioldm(tmp_path / "audioldm")
    given = test_paper.paper_world(tmp_path / "world") | {"diffusion.source": tmp_path / "audioldm", "steps": 2, "seconds": "1.0"}
    version = test_paper.run_suite(tmp_path, "paper", given | {"eval_prompts": 4, "listen_prompts": 1}, "--only", "08")
    run = versions.read(version)
    assert run["status"] == "DONE" and "audioldm" in run["notebooks"]["08_clap_ppo"]["notes"]["inputs"]
    tuned, folder = Generator.load(version / "checkpoints" / "ppo", device="cpu"), version / "checkpoints" / "ppo"
    assert tuned.network_config["pipeline"] == "audioldm" and tuned.diffusion == load_pipeline(tmp_path / "audioldm").diffusion
    assert lora.load(tuned.network, folder / "adapter.safetensors").form.targets == tuned.network.lora_targets
    systems = set(versions.read_table(version / "metrics" / "ppo_table.csv")["system"])
    assert systems == {"diffusion base", "PPO", "flow base", "GRPO", "NFT", "DPO"}


# ---- what is refused --------------------------------------------------------------
def copied(made, kind, tmp_path):
    return shutil.copytree(made[kind][1], tmp_path / "copy")


@pytest.mark.parametrize(("kind", "gone", "words"), [
    ("audioldm", "unet/diffusion_pytorch_model.safetensors", "unet/*.safetensors (no other format is read) is missing"),
    ("audioldm2", "language_model/config.json", "language_model/config.json is missing"),
    ("audioldm2", "tokenizer_2/tokenizer.json", "tokenizer_2/tokenizer.json or"),
    ("stable_audio", "scheduler/scheduler_config.json", "scheduler/scheduler_config.json is missing"),
])  # fmt: skip
def test_a_missing_file_is_named(made, tmp_path, kind, gone, words):
    folder = copied(made, kind, tmp_path)
    (folder / gone).rename(folder / "away.bin")
    with pytest.raises(FileNotFoundError) as caught:
        load_pipeline(folder)
    part, text = pretrained.PARTS[kind], str(caught.value)
    assert words in text and part.url in text and part.licence in text and "\n" not in text


def test_damaged_files_and_other_classes_are_refused_in_one_line(made, tmp_path):
    folder = copied(made, "audioldm", tmp_path)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(unet)
    for content, words in ((dict(list(whole.items())[3:]), "3 tensors are missing"), (None, "is no UNet2DConditionModel")):
        if content is None:
            unet.write_bytes(unet.read_bytes()[:1000])
        else:
            save_file(content, unet, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words) as caught:
            load_pipeline(folder)
        assert "\n" not in str(caught.value)
    for named in ("MusicLDMPipeline", ["code", "AudioLDMPipeline"]):
        miniature.change(folder / "model_index.json", _class_name=named)
        with pytest.raises(ValueError, match="allowed are AudioLDMPipeline, AudioLDM2Pipeline, StableAudioPipeline"):
            load_pipeline(folder)


@pytest.mark.parametrize(("kind", "change"), [
    ("audioldm", {"prediction_type": "sample"}), ("audioldm", {"clip_sample": True}), ("audioldm", {"beta_schedule": "sigmoid"}),
    ("stable_audio", {"sigma_schedule": "karras"}), ("stable_audio", {"prediction_type": "epsilon"}),
])  # fmt: skip
def test_a_scheduler_that_cannot_be_followed(made, tmp_path, kind, change):
    folder = copied(made, kind, tmp_path)
    miniature.change(folder / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*known are"):
        read_process(folder)


def test_a_length_that_cannot_be_made(made):
    with pytest.raises(ValueError, match="at most 1, what the network was trained on"):
        load_pipeline(made["stable_audio"][1], seconds=1.5)
    with pytest.raises(ValueError, match="shorter than one latent frame"):
        load_pipeline(made["audioldm"][1], seconds=0.0)
    with pytest.raises(ValueError, match=r"allowed \(B, N, 32\)"):
        made["audioldm"][2].codec.decode(torch.zeros(1, 8, 16))


def test_a_pipeline_that_is_not_here_says_what_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for source, words in (("stabilityai/stable-audio-open-1.0", "5.3 GB, Stability AI Community License"),
                          ("someone/audioldm-of-mine", "unknown size and licence")):  # fmt: skip
        with pytest.raises(FileNotFoundError) as caught:
            load_pipeline(source)
        assert words in str(caught.value) and source in str(caught.value) and "HF_HUB_OFFLINE" in str(caught.value)


def test_a_policy_of_a_pipeline_has_a_first_ratio_of_one(made):
    """Rollout and scoring by the same expressions, with guidance, for every kind; the density by torch's own Normal."""
    for kind in KINDS:
        generator = made[kind][2]
        cond = generator.encode_prompts(PROMPTS)
        chain = generator.diffusion.rollout(generator.network, noise_for(generator), cond, steps=STEPS, guidance_scale=SCALE,
                                            generators=torch.Generator().manual_seed(0))  # fmt: skip
        rows = torch.arange(2)
        for j in chain.stochastic:
            new = diffusion.score_step(generator.network, chain, rows, j, cond, SCALE)
            assert torch.equal(new.log_prob.detach(), chain.log_probs[:, j])
            normal = torch.distributions.Normal(new.mean, new.std.expand_as(new.mean)).log_prob(chain.latents[:, j + 1])
            assert torch.allclose(normal.mean((1, 2)), chain.log_probs[:, j], atol=1e-4)
