"""Shared by the tests: where the golden numbers lie, and how the deterministic weights of the fixtures are made."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SALT = "resonate-public/"


def fixture_folder() -> Path:
    """RESONATE_FIXTURES, default ../shared/spec/fixtures beside the checkout; skips the test when it is absent."""
    folder = Path(os.environ.get("RESONATE_FIXTURES", ROOT / ".." / "shared" / "spec" / "fixtures")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no golden numbers in {folder}: set RESONATE_FIXTURES")
    return folder


@pytest.fixture
def golden():
    """golden(name) -> dict of tensors of that fixture file."""

    def load(name: str) -> dict[str, torch.Tensor]:
        path = fixture_folder() / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"no {path}")
        return load_file(path)

    return load


@pytest.fixture
def golden_folder() -> Path:
    return fixture_folder()


def recipe(key: str, shape) -> torch.Tensor:
    """The fixtures' pseudo-random tensor of a name: float32 of the given shape."""
    random = np.random.RandomState(zlib.crc32((SALT + key).encode()))
    return torch.from_numpy(np.asarray(random.standard_normal(tuple(shape)), dtype=np.float32))


def fill_flux(network: torch.nn.Module, tag: str) -> torch.nn.Module:
    """Overwrite every stored tensor by the fixtures' recipe for FluxAudio."""
    for name, tensor in network.state_dict().items():
        x = recipe(tag + name, tensor.shape)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            x = 1 + 0.1 * x
        elif name == "latent_std":
            x = 1 + 0.1 * x.abs()
        elif name in ("latent_mean", "empty_string_feat", "empty_string_feat_c"):
            x = 0.5 * x
        elif x.dim() >= 2:
            x = x / float(np.prod(x.shape[1:])) ** 0.5
        else:
            x = 0.02 * x
        tensor.copy_(x)
    return network


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Error norm over the wanted norm."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12)).item()
