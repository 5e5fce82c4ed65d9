"""The memory plan: counted storages against real ones, its bounds against a real backward pass, the arithmetic of its rows."""

import gc
import time

import pytest
import torch
from miniature import VOCODER
from test_flux_audio import small

from resonate_lib import flow, memory
from resonate_lib.config import DPOConfig, GRPOConfig, NFTConfig, PretrainConfig
from resonate_lib.models import layers
from resonate_lib.models.flux_audio import Condition, FluxAudio, fluxaudio_m_44k

P = 468_285_432


def middle():
    return FluxAudio(latent_dim=8, text_dim=24, text_c_dim=24, hidden_dim=64, depth=6, fused_depth=4, num_heads=2,
                     latent_seq_len=300, text_seq_len=20)  # fmt: skip


def real_step(clips, guidance_scale, precision, checkpointing):
    """(kept by the forward, at most in forward and backward, at most without gradients) of a real step on this machine."""
    with memory.Live() as live:
        network = middle().train()
        network.checkpointing = checkpointing
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        layers.rope_table(2048, 32, torch.device("cpu"))  # of the network and not of the step
        cond = Condition(torch.randn(clips, 20, 24), torch.randn(clips, 24))
        x, before = torch.randn(clips, 300, 8), live.start()
        with memory._autocast(precision, "cpu"):
            velocity = flow.guided(network, x, 0.5, cond, guidance_scale)
        kept = live.now - before
        velocity.square().mean().backward()
        most = live.peak - before
        del velocity
        gc.collect()
        before = live.start()
        with torch.no_grad(), memory._autocast(precision, "cpu"):
            flow.guided(network, x, 0.5, cond, guidance_scale)
        return kept, most, live.peak - before


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_what_is_measured_without_memory_is_what_a_real_step_takes(precision, checkpointing, guidance_scale):
    layers.rope_table.cache_clear()
    kept, most, sampling = real_step(3, guidance_scale, precision, checkpointing)
    use = memory.measure(
        middle, clips=3, guidance_scale=guidance_scale, sample_clips=3, sample_guidance=guidance_scale, precision=precision,
        device="cpu", checkpointing=checkpointing,
    )  # fmt: skip
    assert use.kept == pytest.approx(kept, abs=2**19) and use.sampling == sampling  # 2**18 are rotary tables, made once
    assert most <= use.update < 1.15 * most


def test_tables_of_shapes_do_not_leak_into_real_networks():
    memory.measure(small, clips=2)
    assert torch.isfinite(small()(torch.randn(2, 9, 6), torch.randn(2, 7, 10), torch.randn(2, 12), torch.rand(2))).all()
    attend = layers.attend
    with pytest.raises(RuntimeError), memory._shapes_only("cuda"):
        assert layers.attend is not attend
        raise RuntimeError
    assert layers.attend is attend


def test_the_published_network_on_a_gpu_that_is_not_here():
    """Parameters are exact; activations grow with the clips; checkpointing and LoRA take what they should, in seconds."""
    began = time.process_time()
    use = memory.measure(
        fluxaudio_m_44k, clips=24, guidance_scale=4.5, sample_clips=24, sample_guidance=4.5, precision="bf16", device="cuda"
    )
    assert time.process_time() - began < 20
    assert use.weights == 4 * P and use.trained == 4 * 468_205_480
    assert (use.latent, use.text) == (4 * 430 * 40, 4 * 77 * 1024)
    lean = memory.measure(
        fluxaudio_m_44k, clips=24, guidance_scale=4.5, precision="bf16", device="cuda", trained="lora", checkpointing=True
    )
    assert lean.update < use.update / 8 and lean.trained == 4 * 32 * lora_rows() and lean.sampling == 0


def lora_rows():
    """in + out over the adapted layers: qkv of 52 latent and 16 text blocks, 52 convolutions, 15 text outputs, 2 projections."""
    return 68 * (448 + 3 * 448) + 52 * (3 * 448 + 448) + 15 * (448 + 448) + 2 * (1024 + 448)


def rows_of(config, **options):
    return {row.part: row.bytes for row in memory.plan(small, config, device="cpu", **options)}


def test_rows_of_each_stage():
    size = sum(p.numel() for p in small().parameters()) * 4
    learned = sum(p.numel() for p in small().parameters() if p.requires_grad) * 4
    grpo = rows_of(GRPOConfig(prompts_per_step=4, group_size=6, num_steps=5, ema=0.9, beta=0.1, micro_batch=5, sample_batch=10))
    assert grpo["network, float32"] == grpo["reference"] == grpo["averaged weights"] == size
    assert grpo["gradients"] == learned and grpo["optimizer state"] == 2 * learned
    assert grpo["stored clips"] == 24 * (12 * 4 * 9 * 6 + 4 * 7 * 10)
    assert {"activations of 4 clips", "sampling 8 clips"} <= grpo.keys()  # 12 clips as 4+4+4, 24 as 8+8+8
    free = rows_of(GRPOConfig(beta=0.0))
    assert "reference" not in free and "averaged weights" not in free
    assert {"reference", "old policy", "averaged weights"} <= rows_of(NFTConfig(prompts_per_step=3, minibatches=2)).keys()
    dpo = rows_of(DPOConfig(pairs=10, batch_size=4, micro_batch=4), held={"codec": 7}, decoding=5, scoring=6)
    assert dpo["codec"] == 7 and dpo["decoding 20 clips"] == 5 and dpo["scoring 20 clips"] == 6
    assert "activations of 4 clips" in dpo and "reference" in dpo
    base = rows_of(PretrainConfig(batch_size=9, micro_batch=4))
    assert set(base) == {"network, float32", "optimizer state", "gradients", "activations of 3 clips"}


def test_lora_needs_no_second_network():
    rows = rows_of(NFTConfig(trained="lora", lora_rank=2, prompts_per_step=2, group_size=2))
    assert "reference" not in rows and rows["old policy"] == rows["averaged weights"] == rows["adapters"] == rows["gradients"]
    assert rows["adapters"] < rows["network, float32"] / 10


def test_decoding_is_what_a_real_decode_takes(monkeypatch):
    """Of a miniature, on this machine; the published one is measured by shapes alone, in seconds."""
    kind = memory.codec.VaeCodec
    little = dict(embed_dim=4, hidden_dim=8, vocoder=VOCODER)
    monkeypatch.setattr(memory.codec, "VaeCodec", lambda mode, seconds: kind(mode, seconds=seconds, **little))
    memory.decoding.cache_clear()
    with memory.Live() as live, torch.no_grad():
        real = kind("44k", seconds=0.5, **little)
        latents = torch.randn(6, real.latent_len, 4)
        before = live.start()
        real.decode(latents)
        most = live.peak - before
    counted = memory.decoding(6, seconds=0.5)
    memory.decoding.cache_clear()
    assert most <= counted < most + 2 * 6 * 4 * 22050
    assert memory.decoding(0) == 0


def test_total_table_and_refusal():
    rows = [
        memory.Row("network", 500_000_000),
        memory.Row("optimizer state", 1_500_000_000, "", ("trained=lora",)),
        memory.Row("activations of 8 clips", 3_000_000_000, "update", ("micro_batch below 8", "checkpointing=true")),
        memory.Row("gradients", 1_000_000_000, "update", ("trained=lora",)),
        memory.Row("sampling 8 clips", 3_500_000_000, "sampling", ("sample_batch below 8",)),
    ]
    assert memory.total(rows) == (6_000_000_000, "update")
    lines = memory.table(rows, 24_000_000_000).splitlines()
    assert lines[0].split() == ["network", "0.50", "GB", "always"] and lines[-2].split()[:4] == ["in", "all", "6.00", "GB"]
    assert lines[-1].split() == ["there", "is", "24.00", "GB"]
    memory.check(rows, 6_000_000_000)
    with pytest.raises(MemoryError) as caught:
        memory.check(rows, 5_000_000_000)
    text = str(caught.value)
    assert text == (
        "needs 6.0 GB, there are 5.0 GB: try micro_batch below 8 or checkpointing=true (activations of 8 clips: 3.0 GB), "
        "trained=lora (optimizer state, gradients: 2.5 GB)"
    )
    with pytest.raises(MemoryError, match="try a larger device"):
        memory.check(rows[:1], 5)


def test_sizes_of_weights_files(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    (tmp_path / "b.pth").write_bytes(b"123")
    (tmp_path / "notes.txt").write_bytes(b"1")
    assert memory.file_bytes(tmp_path) == 5 and memory.file_bytes(tmp_path / "b.pth") == 3  # the other: the same weights again
    (tmp_path / "a.safetensors").unlink()
    assert memory.file_bytes(tmp_path) == 3
    with pytest.raises(FileNotFoundError, match="no weights in"):
        memory.file_bytes(tmp_path / "absent")
    assert memory.available("cpu") > 0
