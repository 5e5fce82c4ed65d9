"""Audio language models of the real transformers classes at miniature size, with their real processors, written in the
layout of the published checkpoints. Random weights; nothing here needs the network.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from resonate_lib.rewards.lalm import learn_vocabulary

KINDS = ("qwen2_5_omni", "qwen3_omni_moe", "qwen2_audio")
MELS, WIDTH = 16, 32
CAPTIONS = ("a low hum", "rain, followed by a bell", "a dog barks twice while a car passes by and someone whistles")
# The names that each family gives to its marks around image, video and audio.
MARKS = {
    "qwen2_5_omni": ("<|IMAGE|>", "<|VIDEO|>", "<|AUDIO|>", "<|vision_bos|>", "<|vision_eos|>", "<|audio_bos|>", "<|audio_eos|>"),
    "qwen3_omni_moe": (
        *("<|image_pad|>", "<|video_pad|>", "<|audio_pad|>", "<|vision_start|>", "<|vision_end|>"),
        *("<|audio_start|>", "<|audio_end|>"),
    ),
}
ROLES = ("image_token", "video_token", "audio_token", "vision_bos_token", "vision_eos_token", "audio_bos_token", "audio_eos_token")
# Without a system message Qwen2.5-Omni's template puts its own; Qwen3-Omni's puts none.
OWN_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'audio' %}AUDIO{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(kind: str) -> Qwen2Tokenizer:
    """A vocabulary of the question's and the captions' words, with the family's control tokens."""
    vocabulary, merges = learn_vocabulary([*CAPTIONS, "Capable of perceiving auditory and visual inputs."])
    if kind == "qwen2_audio":
        extra = {"extra_special_tokens": ["<|im_start|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]}
    else:
        names = dict(zip(ROLES, MARKS[kind], strict=True))
        extra = {"extra_special_tokens": names | {"turn_token": "<|im_start|>"}}
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>", padding_side="left", **extra)


def processor(kind: str):
    """The family's real processor; an Omni one needs image and video processors even for audio alone."""
    tokens = tokenizer(kind)
    seconds = 2 if kind == "qwen2_audio" else 6  # published: 30 and 300; what is longer is cut off without a word
    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=seconds, return_attention_mask=True)
    if kind == "qwen2_audio":
        return Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokens)
    audio = tokens.audio_bos_token + tokens.audio_token + tokens.audio_eos_token
    template = (OWN_SYSTEM if kind == "qwen2_5_omni" else "") + TURNS.replace("AUDIO", audio)
    build = Qwen2_5OmniProcessor if kind == "qwen2_5_omni" else Qwen3OmniMoeProcessor
    pictures = {"image_processor": Qwen2VLImageProcessor(), "video_processor": Qwen2VLVideoProcessor()}
    return build(**pictures, feature_extractor=extractor, tokenizer=tokens, chat_template=template)


def model(kind: str, tokens: Qwen2Tokenizer, seed: int = 0) -> torch.nn.Module:
    """The family's real class with random weights, large enough that clip and caption move the answer."""
    text = {
        "vocab_size": len(tokens),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    sound = {
        "num_mel_bins": MELS,
        "d_model": WIDTH,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * WIDTH,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "qwen2_audio":
            return _qwen2_audio(tokens, text, sound)
        return (_qwen2_5_omni if kind == "qwen2_5_omni" else _qwen3_omni)(tokens, text, sound)


def _qwen2_audio(tokens, text, sound):
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(
            audio_config={"model_type": "qwen2_audio_encoder", "max_source_positions": 100, **sound},
            text_config={"model_type": "qwen2", **text},
            audio_token_index=tokens.convert_tokens_to_ids("<|AUDIO|>"),
            initializer_range=0.2,
        )
    )


def _qwen2_5_omni(tokens, text, sound):
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5OmniThinkerConfig(
        audio_config={"n_window": 25, "output_dim": WIDTH, "max_source_positions": 300, **sound},  # windows of half a second
        vision_config=vision | {"fullatt_block_indexes": [0]},
        text_config=text,
        **{name + "_index": tokens.convert_tokens_to_ids(getattr(tokens, name)) for name in ROLES[:3]},
        audio_start_token_id=tokens.convert_tokens_to_ids(tokens.audio_bos_token),
        vision_start_token_id=tokens.convert_tokens_to_ids(tokens.vision_bos_token),
        initializer_range=0.2,
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


def _qwen3_omni(tokens, text, sound):
    text |= {
        "head_dim": 16,  # as published, wider than hidden_size / heads
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen3OmniMoeThinkerConfig(
        audio_config={"output_dim": WIDTH, "n_window_infer": 200, "downsample_hidden_size": 8, **sound},  # windows of 2 s
        vision_config=vision | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        text_config=text,
        **{name + "_id": tokens.convert_tokens_to_ids(getattr(tokens, name)) for name in ROLES[:3]},
        audio_start_token_id=tokens.convert_tokens_to_ids(tokens.audio_bos_token),
        vision_start_token_id=tokens.convert_tokens_to_ids(tokens.vision_bos_token),
        initializer_range=0.2,
    )
    return Qwen3OmniMoeThinkerForConditionalGeneration(config)


def write(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """A checkpoint folder as the hub has it: Qwen2-Audio alone; an Omni model whole, with a talker in a shard of its own."""
    ready = processor(kind)
    network = model(kind, ready.tokenizer, seed)
    ready.save_pretrained(folder)
    network.save_pretrained(folder)
    return folder if kind == "qwen2_audio" else _as_full_omni(folder, kind)


def _as_full_omni(folder: Path, kind: str) -> Path:
    thinker = {f"thinker.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    talker = {"talker.model.layers.0.mlp.gate_proj.weight": torch.full((64, 64), float("nan"))}
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name, tensors in zip(names, (thinker, talker), strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    shard_of = dict.fromkeys(thinker, names[0]) | dict.fromkeys(talker, names[1])
    index = {"metadata": {"total_size": 0}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["Qwen2_5OmniModel" if kind == "qwen2_5_omni" else "Qwen3OmniMoeForConditionalGeneration"],
        "model_type": kind,
        "enable_audio_output": True,
        "thinker_config": json.loads((folder / "config.json").read_text()),
        "talker_config": {"model_type": "qwen2_5_omni_talker" if kind == "qwen2_5_omni" else "qwen3_omni_moe_talker"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
