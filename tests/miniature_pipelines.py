"""Miniatures of AudioLDM, AudioLDM 2 and Stable Audio: the real classes, tokenizers and folders, random weights.

Each function returns the pipeline of diffusers, whole, and saves it as it is published. Everything is a function of the seeds
written here; weights are large enough for every input to be heard in the output.
"""

import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AudioLDM2Pipeline, AudioLDMPipeline, StableAudioPipeline
from tokenizers.pre_tokenizers import ByteLevel

WORDS = ("a", "dog", "bark", "rain", "fall", "car", "horn", "bird", "and", "followed", "by", "then")
MERGES = [("a", "b"), ("Ġ", "a"), ("i", "n"), ("o", "g")]
CLAP = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=80)
HTSAT = dict(spec_size=32, num_mel_bins=16, window_size=4, patch_size=4, patch_stride=[4, 4], depths=[1, 1], hidden_size=16,
             num_attention_heads=[2, 2], patch_embeds_hidden_size=8)  # fmt: skip
BLOCKS = dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
UNET = dict(sample_size=16, in_channels=8, out_channels=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
DDIM = dict(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
            steps_offset=1)  # fmt: skip
COSINE_DPM = {"_class_name": "CosineDPMSolverMultistepScheduler", "sigma_min": 0.3, "sigma_max": 500, "sigma_data": 1.0,
              "sigma_schedule": "exponential", "prediction_type": "v_prediction", "final_sigmas_type": "zero"}  # fmt: skip
MEL, EMBEDDING, T5_WIDTH, GPT_WIDTH, NEW = 16, 12, 32, 20, 8


def lively(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights of deviation 1 / sqrt(inputs), and biases of 0.1, in place of those a class begins with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" not in name and parameter.requires_grad and parameter.dim():
                scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def roberta() -> transformers.RobertaTokenizer:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in MERGES), "<mask>"]
    return transformers.RobertaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=MERGES, model_max_length=64)


def t5_tokenizer(length: int) -> transformers.T5Tokenizer:
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789,.'-", *(f"▁{word}" for word in WORDS)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *((piece, -20.0 / (1 + len(piece))) for piece in pieces)]
    return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=8, model_max_length=length)


def t5_encoder(tokenizer) -> transformers.T5EncoderModel:
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                   feed_forward_proj="gated-gelu")  # fmt: skip
    return lively(transformers.T5EncoderModel(config), 1)


def mel_parts() -> dict:
    """Autoencoder of log-mels and vocoder, with the published rates: 160 samples a mel frame, 4 frames a latent one."""
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=8, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=0.9227914214134216,
    )  # fmt: skip
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=MEL, sampling_rate=16_000, upsample_initial_channel=32, upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
    )  # fmt: skip
    return {"vae": lively(vae, 2), "vocoder": lively(transformers.SpeechT5HifiGan(vocoder), 3)}


def audioldm(folder: Path) -> AudioLDMPipeline:
    tokenizer = roberta()
    text = transformers.ClapTextConfig(vocab_size=len(tokenizer), projection_dim=EMBEDDING, **CLAP)
    unet = diffusers.UNet2DConditionModel(
        **UNET, **BLOCKS, cross_attention_dim=(16, 32), class_embed_type="simple_projection", class_embeddings_concat=True,
        projection_class_embeddings_input_dim=EMBEDDING,
    )  # fmt: skip
    pipeline = AudioLDMPipeline(
        text_encoder=lively(transformers.ClapTextModelWithProjection(text), 4), tokenizer=tokenizer, unet=lively(unet, 5),
        scheduler=diffusers.DDIMScheduler(**DDIM), **mel_parts(),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


def audioldm2(folder: Path) -> AudioLDM2Pipeline:
    """The language model is saved as it is published, without a head; the pipeline in memory has one, which it needs."""
    tokenizer, tokenizer_2 = roberta(), t5_tokenizer(40)
    text = transformers.ClapTextConfig(vocab_size=len(tokenizer), **CLAP).to_dict()
    clap = transformers.ClapConfig(text_config=text, audio_config=HTSAT, projection_dim=EMBEDDING)
    gpt2 = transformers.GPT2Config(n_embd=GPT_WIDTH, n_layer=2, n_head=2, n_positions=96, vocab_size=11, bos_token_id=0,
                                   eos_token_id=0)  # fmt: skip
    unet = diffusers.AudioLDM2UNet2DConditionModel(**UNET, **BLOCKS, cross_attention_dim=[[None, GPT_WIDTH, T5_WIDTH]] * 2)
    pipeline = AudioLDM2Pipeline(
        text_encoder=lively(transformers.ClapModel(clap), 6), text_encoder_2=t5_encoder(tokenizer_2), tokenizer=tokenizer,
        tokenizer_2=tokenizer_2, unet=lively(unet, 7), scheduler=diffusers.DDIMScheduler(**DDIM),
        projection_model=lively(diffusers.AudioLDM2ProjectionModel(EMBEDDING, T5_WIDTH, GPT_WIDTH), 8),
        language_model=lively(transformers.GPT2LMHeadModel(gpt2), 9), feature_extractor=transformers.ClapFeatureExtractor(),
        **mel_parts(),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    pipeline.language_model.transformer.save_pretrained(folder / "language_model")
    change(folder / "language_model" / "config.json", max_new_tokens=NEW)
    change(folder / "model_index.json", language_model=["transformers", "GPT2Model"])
    return pipeline


def stable_audio(folder: Path) -> StableAudioPipeline:
    """One second at 80 Hz in 10 latent frames. In memory its scheduler is `AngularSolver`, saved is that of the published folder,
    which needs a package that is not installed."""
    tokenizer = t5_tokenizer(24)
    transformer = diffusers.StableAudioDiTModel(
        sample_size=10, in_channels=6, out_channels=6, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        num_key_value_attention_heads=2, cross_attention_dim=16, time_proj_dim=8, global_states_input_dim=32,
        cross_attention_input_dim=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=12, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=4, decoder_input_channels=6,
        audio_channels=2, sampling_rate=80,
    )  # fmt: skip
    pipeline = StableAudioPipeline(
        vae=vae.eval(), text_encoder=t5_encoder(tokenizer), tokenizer=tokenizer, transformer=lively(transformer, 10),
        projection_model=lively(diffusers.StableAudioProjectionModel(T5_WIDTH, 16, min_value=0, max_value=4), 11),
        scheduler=AngularSolver(),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(COSINE_DPM))
    change(folder / "model_index.json", scheduler=["diffusers", "CosineDPMSolverMultistepScheduler"])
    return pipeline


class AngularSolver(diffusers.EDMDPMSolverMultistepScheduler):
    """diffusers' deterministic first-order solver of the exploding process, with Stable Audio's noise levels and its time."""

    def __init__(self):
        super().__init__(sigma_min=0.3, sigma_max=500, sigma_data=1.0, sigma_schedule="exponential", solver_order=1,
                         prediction_type="v_prediction", algorithm_type="dpmsolver++", final_sigmas_type="zero")  # fmt: skip

    def precondition_noise(self, sigma):
        return 2 / torch.pi * torch.as_tensor(sigma).atan()


def change(path: Path, **values) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
