"""The text encoders against transformers' own T5, their length limits, and folders that are not what they should be."""

import os
import shutil

import miniature
import pytest
import torch
from safetensors.torch import load_file, save_file

from resonate_lib.models.text import MiniLMEncoder, T5Encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5") / "flan-t5-large"
    miniature.t5(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return T5Encoder(folder)


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "t5")


def test_states_are_those_of_the_whole_model_and_the_mean_counts_padding(folder, encoder):
    """The encoder half of the encoder-decoder model that the folder holds, with the mask made by hand."""
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    model, tokenizer = T5ForConditionalGeneration.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompts = ["a dog barks", "", "rain falls, followed by a car horn"]
    text_f, text_f_c = encoder(prompts)
    assert text_f.shape == (3, 77, miniature.TEXT) and text_f_c.shape == (3, miniature.TEXT)
    assert text_f.dtype == text_f_c.dtype == torch.float32 and not text_f.requires_grad
    for row, pooled, prompt in zip(text_f, text_f_c, prompts, strict=True):
        ids = tokenizer(prompt)["input_ids"]  # no padding: the real tokens must not see any
        with torch.no_grad():
            alone = model.encoder(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(row[: len(ids)], alone, rtol=1e-5, atol=1e-6)
        assert row[len(ids) :].abs().mean() > 0.1  # padding has states of its own, and they are part of the condition
        torch.testing.assert_close(pooled, row.double().mean(0).float())
    assert tokenizer("")["input_ids"] == [1]


def test_a_prompt_is_encoded_alike_whatever_its_batch_and_the_callers_precision(encoder):
    prompts = [f"a dog barks {i}" for i in range(70)]
    together = encoder(prompts)
    with torch.autocast("cpu", torch.bfloat16):
        alone = encoder([prompts[68]])
    torch.testing.assert_close(alone.text_f[0], together.text_f[68], rtol=1e-5, atol=1e-6)
    assert alone.text_f.dtype == torch.float32


def test_long_prompts_are_errors_unless_they_may_be_cut(folder, encoder):
    fits, longer = " ".join(["dog"] * 76), " ".join(["dog"] * 77)  # and the end-of-text token
    assert encoder([fits]).text_f.shape == (1, 77, miniature.TEXT)
    with pytest.raises(ValueError, match="has 78 tokens; at most 77 fit"):
        encoder(["rain", longer])
    cut = T5Encoder(folder, truncate=True)([fits, longer])
    torch.testing.assert_close(cut.text_f[0], cut.text_f[1])  # cut before the end-of-text token is set
    assert T5Encoder(folder, 5)(["dog rain"]).text_f.shape == (1, 5, miniature.TEXT)


def test_that_prompts_are_cut_is_said_once_a_process(folder, monkeypatch, capsys):
    monkeypatch.setattr(T5Encoder, "said", False)
    long = " ".join(["dog"] * 100)
    one, other = (T5Encoder(folder, truncate=True) for _ in range(2))
    one(["rain"])
    assert capsys.readouterr().out == ""
    one(["rain", long, *["dog"] * 70, long])
    assert capsys.readouterr().out.startswith("note: 2 of 73 prompts have over 77 tokens and are cut there")
    other([long])
    assert capsys.readouterr().out == ""


def test_the_embedded_encoder_has_the_same_limits_and_interface():
    encoder = MiniLMEncoder(8)
    text_f, text_f_c = encoder(["a dog barks", ""])
    assert text_f.shape == (2, 8, encoder.text_dim) and text_f_c.shape == (2, encoder.text_dim)
    with pytest.raises(ValueError, match="tokens; at most 8 fit: shorten it"):
        encoder(["a dog barks, followed by rain, followed by a siren"])


def test_weights_of_torch_save_are_read_without_running_code(folder, encoder, tmp_path):
    class Code:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    old = copy(folder, tmp_path)
    state = load_file(old / "model.safetensors")
    (old / "model.safetensors").unlink()
    torch.save(state, old / "pytorch_model.bin")
    torch.testing.assert_close(T5Encoder(old)(["a dog"]), encoder(["a dog"]))
    torch.save({**state, "more": Code()}, old / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is no T5 model"):
        T5Encoder(old)
    assert not (tmp_path / "executed").exists()


def test_a_missing_tensor_is_an_error_not_a_random_one(folder, tmp_path):
    less = copy(folder, tmp_path)
    state = load_file(less / "model.safetensors")
    del state["encoder.block.1.layer.0.SelfAttention.k.weight"]
    save_file(state, less / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors of the encoder are missing, the first encoder"):
        T5Encoder(less)


@pytest.mark.parametrize(("change", "words"), [
    (lambda d: (d / "tokenizer.json").unlink(), "a tokenizer"),
    (lambda d: (d / "model.safetensors").unlink(), "pytorch_model.bin"),
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:500]), "is no T5 model"),
    (lambda d: (d / "tokenizer.json").write_text("{"), "is no T5 model"),
    (lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace("32", "48")), "is no T5 model"),
])  # fmt: skip
def test_a_folder_that_is_not_whole(folder, tmp_path, change, words):
    broken = copy(folder, tmp_path)
    change(broken)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        T5Encoder(broken)
    assert "\n" not in str(caught.value)
