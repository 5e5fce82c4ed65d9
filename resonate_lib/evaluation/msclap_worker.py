"""MS-CLAP's side of `msclap.py`: a program that the other environment's Python runs. Imports nothing of this suite.

    python -I msclap_worker.py --check                      # imports the package and prints versions
    python -I msclap_worker.py WEIGHTS TOKENIZER DEVICE     # one JSON line out when ready, then one for each line in

A request names a float32 .npy file of clips (B, T), their sample rate and B prompts; the answer is {"scores": B numbers} or
{"error": one line}. It ends with its input. The networks are the package's own, built without its downloads and without its
way of reading files, which would run code in them: weights come as safetensors, GPT-2 as configuration and tokenizer.
"""

from __future__ import annotations

import json
import math
import os
import sys
from importlib import metadata
from types import SimpleNamespace
from unittest import mock

# Of other transformers than the one that wrote the file: which positions GPT-2 may see, which are constants, no weights.
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".embeddings.position_ids")
LONGEST = 1024  # tokens that GPT-2 has positions for


def versions() -> dict[str, str]:
    """Of what the scores depend on; importing it all is the check that the environment is whole."""
    import msclap
    import torch
    import transformers

    return {"msclap": metadata.version(msclap.__name__), "torch": torch.__version__, "transformers": transformers.__version__}


def build(weights: str, tokenizer_folder: str, device: str):
    """The package's wrapper with these weights, every one of them used. ValueError in one line where they do not fit."""
    import torch
    from msclap import CLAPWrapper as package
    from msclap.models import clap as networks
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.from_pretrained(tokenizer_folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"{tokenizer_folder}: its tokenizer has {len(tokenizer)} entries, its config.json {config.vocab_size}: "
                         "copy GPT-2's files again")
    state = load_file(weights)
    with (  # GPT-2's own weights are not fetched: those trained with MS-CLAP are all in `state`
        mock.patch.object(networks, "AutoModel", SimpleNamespace(from_pretrained=lambda _: AutoModel.from_config(config))),
        mock.patch.object(package, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda _: tokenizer)),
        mock.patch.object(torch, "load", lambda *_, **__: {"model": state}),
    ):
        try:
            wrapper = package.CLAPWrapper(weights, version="2023", use_cuda=device == "cuda")
        except RuntimeError as error:  # of another shape
            raise ValueError(f"the weights do not fit MS-CLAP 2023 ({' '.join(str(error).split())[:200]} ...)") from None
    own = wrapper.clap.state_dict()
    missing = [name for name in own if name not in state]  # the package loads what it can and says nothing
    extra = [name for name in state if name not in own and not name.endswith(CONSTANTS)]
    if missing or extra:
        raise ValueError(f"the weights are not those of MS-CLAP 2023: {len(missing)} missing {missing[:1]}, "
                         f"{len(extra)} unexpected {extra[:1]}")
    torch.backends.cudnn.allow_tf32 = False  # the network takes its spectrogram by a convolution
    wrapper.clap.float().requires_grad_(False)
    return wrapper


def windows(audio, samples: int):
    """audio (B, T) as (B, W, samples): one repeated up to its length, as published; of a longer one the fewest windows that,
    evenly spaced from its first sample to its last, hold all of it."""
    import torch

    length = audio.shape[1]
    if length <= samples:
        return audio.repeat(1, -(-samples // length))[:, None, :samples]
    count = -(-length // samples)
    starts = [round(i * (length - samples) / (count - 1)) for i in range(count)]
    return torch.stack([audio[:, start : start + samples] for start in starts], dim=1)


def embed_texts(wrapper, prompts: list[str], known: dict) -> None:
    """Adds the embeddings of new prompts to `known`. The package fills up to 77 tokens and cuts nothing, so a prompt of more
    goes alone, as in TTA-Bench's tool."""
    limit, short = wrapper.args.text_len, []
    for prompt in dict.fromkeys(prompts):
        if prompt in known:
            continue
        tokens = len(wrapper.tokenizer(prompt + " <|endoftext|>")["input_ids"])
        if tokens > LONGEST:
            raise ValueError(f"a prompt of {tokens} tokens: MS-CLAP reads at most {LONGEST}; shorten {prompt[:40]!r} ...")
        if tokens > limit:
            known[prompt] = wrapper.get_text_embeddings([prompt])[0]
        else:
            short.append(prompt)
    if short:
        known.update(zip(short, wrapper.get_text_embeddings(short), strict=True))


def score(wrapper, audio, sample_rate: int, prompts: list[str], known: dict) -> list[float]:
    """Cosines between clips (B, T) and B prompts, each the mean over the clip's windows."""
    import torch
    import torchaudio

    rate = wrapper.args.sampling_rate
    if sample_rate != rate:
        audio = torchaudio.transforms.Resample(sample_rate, rate)(audio)
    parts = windows(audio, wrapper.args.duration * rate)
    clips, count, samples = parts.shape
    parts = parts.reshape(clips * count, 1, samples)
    parts = parts.cuda() if wrapper.use_cuda else parts
    embed_texts(wrapper, prompts, known)
    sounds = torch.cat([wrapper._get_audio_embeddings(part) for part in parts.split(16)]).view(clips, count, -1)
    texts = torch.stack([known[prompt] for prompt in prompts])[:, None]
    return torch.nn.functional.cosine_similarity(sounds, texts, dim=-1).mean(1).tolist()


def serve(weights: str, tokenizer_folder: str, device: str) -> int:
    """Answers requests until the input ends."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what libraries print is no answer

        def say(**answer) -> None:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

        try:
            wrapper = build(weights, tokenizer_folder, device)
            say(versions=versions())
        except Exception as error:
            say(error=line(error))
            return 1
        import numpy
        import torch

        known: dict[str, torch.Tensor] = {}
        for request in map(json.loads, sys.stdin):
            try:
                audio = torch.from_numpy(numpy.load(request["audio"], allow_pickle=False))
                scores = score(wrapper, audio, request["sample_rate"], request["prompts"], known)
                odd = [i for i, value in enumerate(scores) if not math.isfinite(value)]
                say(**({"error": f"clip {odd[0]} has no finite score"} if odd else {"scores": scores}))
            except Exception as error:
                say(error=line(error))
    return 0


def line(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        print(json.dumps(versions()))
        sys.exit(0)
    sys.exit(serve(*sys.argv[1:]))
