"""Weights on disk in 32, 16 and 8 bits: what comes back, how far off it may be, and files that are damaged."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_flux_audio import awake, small

from resonate_lib.models import storage
from resonate_lib.models.codec import MelCodec
from resonate_lib.models.generator import Generator


@pytest.fixture(scope="module")
def generator():
    sizes = {"hidden_dim": 16, "depth": 2, "fused_depth": 1, "num_heads": 2, "text_seq_len": 12}
    made = Generator.new(MelCodec(latent_dim=8), **sizes)
    made.network = awake(made.network)
    made.network.latent_mean.data.copy_(torch.linspace(-30, 30, 8))
    made.network.latent_std.data.copy_(torch.logspace(-2, 2, 8))
    return made


def test_no_weight_is_off_by_more_than_half_a_step_of_its_row(tmp_path):
    state = awake(small()).state_dict() | {"wide": 10 ** torch.linspace(-4, 4, 5)[:, None, None] * torch.randn(5, 7, 3)}
    state["zero"] = torch.zeros(3, 4)
    save_file(storage.packed(state, 8), tmp_path / "w.safetensors")
    stored, back = load_file(tmp_path / "w.safetensors"), storage.read(tmp_path / "w.safetensors")
    assert back.keys() == state.keys() and all(tensor.dtype == torch.float32 for tensor in back.values())
    for name, tensor in state.items():
        if tensor.numel() == max(tensor.shape):
            assert stored[name].dtype == torch.float16 and f"{name}.scale" not in stored
            torch.testing.assert_close(back[name], tensor.half().float(), equal_nan=True)
            continue
        rows, error = tensor.flatten(1), (back[name] - tensor).flatten(1).abs()
        assert stored[name].dtype == torch.int8 and stored[f"{name}.scale"].shape == (len(rows),)
        bound = rows.abs().amax(1, keepdim=True) / 127 / 2
        assert bool((error <= bound * (1 + 1e-5)).all()), name


def test_each_number_of_bits(generator, tmp_path):
    sizes = {}
    for bits in (32, 16, 8, None):
        generator.save(tmp_path / str(bits), bits=bits, note=1)
        again = Generator.load(tmp_path / str(bits))
        sizes[bits] = (tmp_path / str(bits) / "network.safetensors").stat().st_size
        tolerance = {32: 0.0, 16: 1e-3, None: 1e-3, 8: 1e-2}[bits]
        for name, tensor in generator.network.state_dict().items():
            got = again.network.state_dict()[name]
            assert (got - tensor).abs().max() <= tolerance * tensor.abs().max(), (bits, name)
        assert torch.equal(again.codec.components, generator.codec.components)
    assert sizes[8] < 0.6 * sizes[16] and sizes[16] == sizes[None] < 0.6 * sizes[32]
    assert load_file(tmp_path / "8" / "codec.safetensors")["components"].dtype == torch.float16
    with pytest.raises(ValueError, match="bits=4: allowed are 32, 16, 8"):
        generator.save(tmp_path / "4", bits=4)
    assert not (tmp_path / "4").exists()


def test_a_tuning_in_eight_bits_is_taken_too(generator, tmp_path):
    generator.save(tmp_path / "tuned", bits=8)
    again = generator.with_network(tmp_path / "tuned")
    want = Generator.load(tmp_path / "tuned").network.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in again.network.state_dict().items())


def test_files_of_float16_from_before_load(generator, tmp_path):
    generator.save(tmp_path / "old", bits=32)
    path = tmp_path / "old" / "network.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    assert Generator.load(tmp_path / "old").network.final_layer.conv.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("damage", "words"),
    [(lambda s: s.pop("final_layer.conv.weight.scale"), "final_layer.conv.weight has 8 rows of 8 bits, but no scale for each"),
     (lambda s: s.update({"final_layer.conv.weight.scale": torch.ones(3)}), "no scale for each; get it again"),
     (lambda s: s.pop("final_layer.conv.weight"), "does not fit: 1 missing"),
     (lambda s: s.update(stray=torch.ones(3)), "1 unexpected")],
)  # fmt: skip
def test_damaged_files_are_errors_of_one_line(generator, tmp_path, damage, words):
    generator.save(tmp_path / "base", bits=8)
    path = tmp_path / "base" / "network.safetensors"
    stored = load_file(path)
    damage(stored)
    save_file(stored, path)
    with pytest.raises(ValueError, match=words) as caught:
        Generator.load(tmp_path / "base")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_file_cut_off_is_an_error_of_one_line(generator, tmp_path):
    generator.save(tmp_path / "base", bits=8)
    path = tmp_path / "base" / "network.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no whole safetensors file") as caught:
        Generator.load(tmp_path / "base")
    assert "\n" not in str(caught.value)
