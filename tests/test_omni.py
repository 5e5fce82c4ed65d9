"""The full-size judges as miniature checkpoints of their real classes: what they are fed, that batches change nothing, what a
score is, and what the loader refuses."""

import json
import shutil

import miniature_lalm
import pytest
import torch
from miniature_lalm import CAPTIONS, KINDS
from safetensors import safe_open
from torch.nn.functional import pad

from resonate_lib.rewards import base, omni
from resonate_lib.rewards.lalm import QUESTION, LalmReward, published
from resonate_lib.rewards.omni import FAMILIES, SYSTEM, clip_features, load_judge, open_judge, to_clips

RATE = 16000
LENGTHS = (RATE, 20011, 31234)  # 1 s, and two that are no whole number of frames


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    return {kind: miniature_lalm.write(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def judges(folders):
    return {kind: load_judge(folder, dtype="float32", device="cpu") for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def clips():
    generator = torch.Generator().manual_seed(1)
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(max(LENGTHS)) / RATE)
    noise = [torch.randn(length, generator=generator) for length in LENGTHS]
    return [0.3 * tone[: len(row)] + scale * row for row, scale in zip(noise, (0.01, 0.1, 0.3), strict=True)]


def real_inputs(judge, clip, caption):
    """One clip and caption through the real processor alone, written out here a second time."""
    audio, text = {"type": "audio"}, {"type": "text", "text": QUESTION.format(caption=caption)}
    turns = [{"role": "user", "content": [text, audio]}]
    if judge.family is FAMILIES["qwen2_5_omni"]:
        turns = [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}, *turns]
    if judge.family is FAMILIES["qwen2_audio"]:
        turns[-1]["content"].reverse()
    rendered = judge.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return judge.processor(text=[rendered], audio=[clip.numpy()], sampling_rate=RATE, return_tensors="pt", padding=True)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_equal_the_real_processor_alone(judges, clips, kind):
    judge = judges[kind]
    batch = judge.inputs(clips, published(CAPTIONS))
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"][:, 0].all()  # padded on the left
    for row, (clip, caption) in enumerate(zip(clips, CAPTIONS, strict=True)):
        real = real_inputs(judge, clip, caption)
        assert set(real) == set(batch)
        count = real["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -count:], real["input_ids"][0])
        assert batch["attention_mask"][row].sum() == count
        own = int(real["feature_attention_mask"].sum())
        assert int(batch["feature_attention_mask"][row].sum()) == own
        width = real["input_features"].shape[-1] if kind == "qwen2_audio" else own
        ours, theirs = batch["input_features"][row, :, :width], real["input_features"][0, :, :width]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_scores_as_one_by_one_and_as_the_class_fed_by_its_own_processor(judges, clips, kind):
    judge = judges[kind]
    together = judge(clips, RATE, list(CAPTIONS))
    alone = [judge(clip[None], RATE, [caption]) for clip, caption in zip(clips, CAPTIONS, strict=True)]
    for name, part in {"scores": together.scores, **together.parts}.items():
        single = torch.cat([one.scores if name == "scores" else one.parts[name] for one in alone])
        torch.testing.assert_close(part, single, atol=1e-5, rtol=0, msg=name)
    assert together.parts["logit"].std() > 0.01  # clips and captions are heard
    yes = [judge.processor.tokenizer.encode(word)[0] for word in ("Yes", "yes", " Yes", " yes")]
    no = [judge.processor.tokenizer.encode(word)[0] for word in ("No", "no", " No", " no")]
    for row, (clip, caption) in enumerate(zip(clips, CAPTIONS, strict=True)):
        with torch.no_grad():
            chance = judge.model(**real_inputs(judge, clip, caption)).logits[0, -1].double().softmax(-1)
        said_yes, said_no = chance[yes].sum(), chance[no].sum()
        assert together.scores[row].item() == pytest.approx((said_yes / (said_yes + said_no)).item(), abs=1e-5)
        assert together.parts["p_yes_mass"][row].item() == pytest.approx((said_yes + said_no).item(), abs=1e-5)
    assert ((together.parts["p_yes_mass"] < 0.1).float() == together.parts["rare"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_several_questions_about_a_clip_score_as_if_it_were_heard_for_each(judges, clips, kind, monkeypatch):
    judge, of = judges[kind], [1, 0, 1, 1, 2]
    asked = ["Is it loud?", "Does a dog bark exactly twice?", "Is it a bell?", "Is it rain? Answer {caption}.", "Is it loud?"]
    apart = judge.ask([clips[i] for i in of], RATE, asked)
    made, original = [], omni.clip_features
    monkeypatch.setattr(omni, "clip_features", lambda part, *more: made.append(len(part)) or original(part, *more))
    together = judge.ask(clips, RATE, asked, clips=of)
    assert made == [3]
    for name in ("logit", "p_yes_mass"):
        torch.testing.assert_close(together.parts[name], apart.parts[name], atol=1e-5, rtol=0)
    assert together.parts["logit"][[0, 2, 3]].std() > 1e-4  # the question is read
    monkeypatch.setattr(judge, "batch_size", 2)
    torch.testing.assert_close(judge.ask(clips, RATE, asked, clips=of).scores, together.scores, atol=1e-5, rtol=0)
    published = [QUESTION.format(caption=caption) for caption in CAPTIONS]
    assert torch.equal(judge.ask(clips, RATE, published).scores, judge(clips, RATE, list(CAPTIONS)).scores)
    with pytest.raises(ValueError, match="name one clip for each question"):
        judge.ask(clips, RATE, asked, clips=[0, 1, 2, 3, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_very_short_clips_do_not_depend_on_the_batch(judges, clips, kind):
    judge, short = judges[kind], [clips[0][:1600], clips[1][:5003], clips[2]]
    together = judge(short, RATE, list(CAPTIONS)).parts["logit"]
    alone = [judge(clip[None], RATE, [caption]).parts["logit"] for clip, caption in zip(short, CAPTIONS, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_size_and_the_tensor_form_change_nothing(judges, clips, kind):
    judge, audio = judges[kind], torch.stack([clip[:RATE] for clip in clips])
    whole = judge(audio, RATE, list(CAPTIONS)).scores
    torch.testing.assert_close(judge([*audio], RATE, list(CAPTIONS)).scores, whole, atol=1e-6, rtol=0)
    judge.batch_size = 2
    try:
        torch.testing.assert_close(judge(audio, RATE, list(CAPTIONS)).scores, whole, atol=1e-5, rtol=0)
    finally:
        judge.batch_size = 16


def test_the_question_as_published(judges):
    question = QUESTION.replace("{caption}", "(.*)")
    text = judges["qwen2_5_omni"].text.replace("{question}", QUESTION.replace("{caption}", "(.*)"))
    turn = "<|im_start|>user\n" + question + "<|audio_bos|><|AUDIO|><|audio_eos|><|im_end|>\n<|im_start|>assistant\n"
    assert text == "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n" + turn
    text = judges["qwen3_omni_moe"].text.replace("{question}", QUESTION.replace("{caption}", "(.*)"))
    assert text == turn.replace("<|audio_bos|><|AUDIO|><|audio_eos|>", "<|audio_start|><|audio_pad|><|audio_end|>")


def test_other_rates_are_resampled(judges, clips):
    import torchaudio

    judge, audio = judges["qwen2_5_omni"], torch.stack([clip[:RATE] for clip in clips])
    high = torchaudio.functional.resample(audio, RATE, 44100)
    back = torchaudio.functional.resample(high, 44100, RATE)
    expected = judge(back, RATE, list(CAPTIONS)).scores
    torch.testing.assert_close(judge(high, 44100, list(CAPTIONS)).scores, expected, atol=1e-6, rtol=0)
    # A list of clips goes the same way, clip by clip.
    torch.testing.assert_close(judge([*high], 44100.0, list(CAPTIONS)).scores, expected, atol=1e-5, rtol=0)


def steer(judge, monkeypatch, word):
    """Makes one token the likeliest reply by far, whatever is heard."""
    head = judge.model.lm_head.forward
    at = judge.processor.tokenizer.encode(word)[0]

    def forced(hidden):
        logits = head(hidden)
        logits[:, at] += 50
        return logits

    monkeypatch.setattr(judge.model.lm_head, "forward", forced)
    monkeypatch.setattr(judge, "_rows", None)


@pytest.mark.parametrize("kind, word, counts", [
    ("qwen2_5_omni", "Yes", True), ("qwen2_5_omni", "yes", False), ("qwen2_5_omni", " audio", False),
    ("qwen3_omni_moe", "no", True), ("qwen3_omni_moe", "No", False), ("qwen2_audio", "Yes", True),
])
def test_the_published_fallback_is_zero_where_the_reply_is_neither(judges, clips, monkeypatch, kind, word, counts):
    judge, audio = judges[kind], [clips[0]]
    steer(judge, monkeypatch, word)
    always = judge(audio, RATE, [CAPTIONS[0]])
    monkeypatch.setattr(judge, "fallback", "zero")
    published = judge(audio, RATE, [CAPTIONS[0]])
    assert published.scores.item() == (always.scores.item() if counts else 0.0)
    assert always.scores.item() == always.parts["logit"].sigmoid().item()
    assert always.parts["rare"].item() == (word == " audio")
    base.check_result(published, 1)


def test_answers_keep_float32_where_the_model_has_bf16(folders, clips):
    judge = load_judge(folders["qwen2_5_omni"], device="cpu")
    assert judge.model.dtype == torch.bfloat16
    logits = judge.logits(clips, published(CAPTIONS))
    columns = logits[:, judge.yes + judge.no]
    assert (columns != columns.bfloat16().float()).any()
    full = load_judge(folders["qwen2_5_omni"], dtype="auto", device="cpu")
    assert full.model.dtype == torch.float32  # what the checkpoint has
    other = [*judge.yes, *judge.no]
    assert (logits[:, other] - full.logits(clips, published(CAPTIONS))[:, other]).abs().max() < 0.3


def test_only_the_last_position_goes_through_the_output_layer(judges, clips, monkeypatch):
    judge, seen = judges["qwen3_omni_moe"], []
    monkeypatch.setattr(judge.model.lm_head, "forward", lambda x: seen.append(x.shape) or x @ judge.model.lm_head.weight.T)
    judge(clips, RATE, list(CAPTIONS))
    assert seen == [(3, miniature_lalm.WIDTH)]


def test_silence_is_scored(judges):
    for judge in judges.values():
        assert torch.isfinite(judge(torch.zeros(2, RATE), RATE, list(CAPTIONS[:2])).scores).all()


# Loading


@pytest.mark.parametrize("kind", KINDS[:2])
def test_of_a_full_omni_checkpoint_only_the_thinker_is_read(folders, judges, kind, monkeypatch):
    from transformers import core_model_loading

    read, original = [], core_model_loading._materialize_copy

    def spy(tensor, *more, **options):
        read.append(tuple(tensor.get_shape()) if hasattr(tensor, "get_shape") else tuple(tensor.shape))
        return original(tensor, *more, **options)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", spy)
    load_judge(folders[kind], dtype="float32", device="cpu")
    assert read and (64, 64) not in read  # the talker's only tensor, of NaN
    with safe_open(folders[kind] / "model-00001-of-00002.safetensors", "pt") as file:
        stored = file.get_tensor("thinker.lm_head.weight")
    assert torch.equal(judges[kind].model.lm_head.weight, stored)
    assert type(judges[kind].model).__name__ == FAMILIES[kind].model


def test_a_thinker_saved_alone_loads_too(tmp_path, judges, clips):
    for kind in KINDS[:2]:
        ready = miniature_lalm.processor(kind)
        ready.save_pretrained(tmp_path / kind)
        miniature_lalm.model(kind, ready.tokenizer).save_pretrained(tmp_path / kind)
        alone = load_judge(tmp_path / kind, dtype="float32", device="cpu")
        a, b = (judge(clips, RATE, list(CAPTIONS)).scores for judge in (alone, judges[kind]))
        assert torch.equal(a, b)


def test_the_published_file_layout_loads(tmp_path, folders, judges, clips):
    """Hub folders keep extractor and image settings together in preprocessor_config.json, the template in a JSON file."""
    for kind in KINDS:
        folder = shutil.copytree(folders[kind], tmp_path / kind)
        parts = json.loads((folder / "processor_config.json").read_text())
        merged = parts["feature_extractor"] | parts.get("image_processor", {})
        merged |= {"feature_extractor_type": "WhisperFeatureExtractor", "processor_class": FAMILIES[kind].processor}
        (folder / "preprocessor_config.json").write_text(json.dumps(merged))
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        (folder / "processor_config.json").unlink()
        (folder / "chat_template.jinja").unlink()
        judge = load_judge(folder, dtype="float32", device="cpu")
        a, b = (one(clips, RATE, list(CAPTIONS)).scores for one in (judge, judges[kind]))
        assert torch.equal(a, b)


def test_offload_scores_the_same(folders, judges, clips):
    spread = load_judge(folders["qwen2_audio"], dtype="float32", offload=True)
    a, b = (judge(clips, RATE, list(CAPTIONS)).scores for judge in (spread, judges["qwen2_audio"]))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_open_judge_tells_the_sources_apart(folders, judges):
    assert isinstance(open_judge(base.SHIPPED / "lalm"), LalmReward)
    judge = open_judge(str(folders["qwen2_audio"]), dtype="float32", device="cpu", fallback="zero")
    assert judge.family is FAMILIES["qwen2_audio"] and judge.fallback == "zero"
    remote = open_judge("http://localhost:8000/v1#Qwen/Qwen2.5-Omni-7B")
    assert type(remote).__name__ == "RemoteJudge"
    with pytest.raises(ValueError, match=r"takes no options, got \['dtype'\]"):
        open_judge(base.SHIPPED / "lalm", dtype="bf16")


# Bad input


def broken(tmp_path, source, change):
    folder = shutil.copytree(source, tmp_path / "broken")
    change(folder)
    return folder


def rewrite(name, change):
    def act(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return act


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("language_model.lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change, said", [
    (lambda f: (f / "config.json").unlink(), "no config.json in"),
    (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    (rewrite("config.json", lambda c: c.update(model_type="whisper")), r"model_type 'whisper'.*allowed are qwen2_5_omni"),
    (lambda f: (f / "tokenizer.json").unlink(), "its own tokenizer.json"),
    (lambda f: (f / "processor_config.json").unlink(), "its processor does not load"),
    (lambda f: (f / "model.safetensors").unlink(), "weights do not load"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "weights do not load"),
    (cut_off, "weights do not load"),
    (drop_tensor, "1 tensors are missing, lm_head.weight"),
    (rewrite("config.json", lambda c: c.update(audio_token_index=3)), "audio token and mel bands are"),
])
def test_load_judge_refuses_a_broken_folder_in_one_line(tmp_path, folders, change, said):
    folder = broken(tmp_path, folders["qwen2_audio"], change)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        load_judge(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_load_judge_takes_a_processor_from_elsewhere(tmp_path, folders):
    folder = broken(tmp_path, folders["qwen2_audio"], lambda f: (f / "processor_config.json").unlink())
    assert load_judge(folder, device="cpu", processor=folders["qwen2_audio"]).yes
    with pytest.raises(ValueError, match="chat template"):
        load_judge(folders["qwen2_5_omni"], device="cpu", processor=strip_template(tmp_path, folders["qwen2_5_omni"]))


def strip_template(tmp_path, source):
    folder = shutil.copytree(source, tmp_path / "no_template")
    (folder / "chat_template.jinja").unlink()
    return folder


def test_load_judge_refuses_choices_and_sources(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(omni, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs bitsandbytes"):
        load_judge(folders["qwen2_audio"], quantisation="4bit", device="cpu")
    for options in ({"dtype": "fp8"}, {"fallback": "half"}, {"quantisation": "2bit"}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            load_judge(folders["qwen2_audio"], **options)
    for nowhere in (tmp_path / "none", "./none/here", "tests/none", "onlyaname"):
        with pytest.raises(FileNotFoundError, match="no such folder, and no hub id"):
            load_judge(nowhere)
    assert not omni.is_folder("Qwen/Qwen2.5-Omni-7B")


def test_the_network_is_for_hub_ids_alone(folders, monkeypatch):
    from transformers import PreTrainedConfig

    asked = []

    def offline(source, **options):
        asked.append((source, options["local_files_only"]))
        raise OSError("cannot connect\nto the hub")

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", offline)
    for source in ("Qwen/Qwen2.5-Omni-7B", str(folders["qwen2_audio"])):
        with pytest.raises(ValueError, match=r"cannot be read \(OSError: cannot connect\); check the id"):
            load_judge(source)
    assert asked == [("Qwen/Qwen2.5-Omni-7B", False), (str(folders["qwen2_audio"]), True)]


def test_the_judge_refuses_bad_audio_and_captions(judges):
    judge, audio = judges["qwen2_audio"], torch.zeros(2, RATE)
    for rate in (0, -16000, 44100.5, float("nan")):
        with pytest.raises(ValueError, match="sample_rate="):
            judge(audio, rate, ["a", "b"])
    with pytest.raises(ValueError, match=r"clips \[1\] holds NaN"):
        judge(torch.stack([audio[0], audio[0] + torch.nan]), RATE, ["a", "b"])
    for wrong, prompts in ((audio, ["a"]), (audio[0], ["a"]), (audio[:0], []), ([audio], ["a"])):
        with pytest.raises(ValueError, match="a prompt for each clip"):
            judge(wrong, RATE, prompts)
    for samples in (100, 3 * RATE):
        with pytest.raises(ValueError, match=r"hears 0\.1 to 2 s"):
            judge(torch.zeros(1, samples), RATE, ["a"])
    for caption in ("a <|AUDIO|> b", "rain<|im_end|>", "<|audio_eos|>"):
        with pytest.raises(ValueError, match="control token"):
            judge(audio, RATE, ["a", caption])
    assert judge(audio, RATE, ["{caption}", "a {0} %s"]).scores.shape == (2,)


def test_clip_features_add_a_window_of_silence_and_no_more(clips):
    extractor = miniature_lalm.processor("qwen2_5_omni").feature_extractor
    mel, frames = clip_features(clips, extractor, "silence")
    assert frames.tolist() == [100, 126, 196]
    assert mel.shape[-1] <= 199  # not the 600 frames of 6 s
    whole, _ = clip_features(clips, extractor, "full")
    for row, count in enumerate(frames.tolist()):
        torch.testing.assert_close(mel[row, :, :count], whole[row, :, :count], atol=1e-6, rtol=0)
    loud_end = pad(torch.zeros(1, RATE - 1), (0, 1), value=1.0)  # the peak lies in the last sample
    one, count = clip_features(to_clips(loud_end, RATE, ["a"], RATE, 6.0), extractor, "silence")
    other, _ = clip_features([loud_end[0]], extractor, "full")
    torch.testing.assert_close(one[:, :, : count[0]], other[:, :, : count[0]], atol=1e-6, rtol=0)
