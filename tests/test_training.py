"""The training loop's states: when they are written, on which device they are read, and that neither changes what is trained."""

import pytest
import torch
from torch import nn

from resonate_lib import progress, training


def toy():
    """(step, modules): a fused AdamW on a small regression, its state a function of the steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)

    def step(_, generator):
        x = torch.randn(8, 3, generator=generator)
        loss = (network(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()}

    return step, {"network": network, "optimizer": optimizer}


class Clock:
    """In place of `time`: a step takes `step` seconds, writing the state `cost`."""

    def __init__(self, monkeypatch, step: float, cost: float):
        self.now, self.written, self.step = 0.0, [], step
        original = training.save_state

        def save(path, modules, history, done, seconds):
            original(path, modules, history, done, seconds)
            self.now += cost
            self.written.append(done)

        monkeypatch.setattr(training, "time", self)
        monkeypatch.setattr(training, "save_state", save)

    def monotonic(self) -> float:
        return self.now

    def __call__(self, *_) -> dict:
        self.now += self.step
        return {"loss": 0.0}


@pytest.mark.parametrize(("step", "cost", "written"), [
    (3.0, 0.05, [5, 10, 15, 20, 25, 30, 33]),  # a small state: as asked for
    (0.001, 0.05, [5, 10, 15, 20, 25, 30, 33]),  # also where it takes longer than the steps
    (100.0, 2.0, [5, 10, 15, 20, 25, 30, 33]),  # a large one every 500 s is 0.4 %
    (30.0, 2.0, [5, 15, 25, 33]),  # 150 s are too few for 2 s: 1 % are 200 s
    (40.0, 20.0, [5, 20, 33]),  # 600 s in any case
    (130.0, 9.0, [5, 10, 15, 20, 25, 30, 33]),
    (250.0, 9.0, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33]),  # at any step, so that a kill costs no more
])  # fmt: skip
def test_a_state_is_written_as_often_as_its_size_allows(monkeypatch, tmp_path, step, cost, written):
    clock = Clock(monkeypatch, step, cost)
    training.fit(clock, steps=33, modules={}, label="x", checkpoint=tmp_path / "x.pt", save_every=5)
    assert clock.written == written


def test_the_time_left_is_that_of_the_steps_not_of_what_the_first_prepares(monkeypatch, capsys):
    clock = Clock(monkeypatch, step=10.0, cost=0)

    def step(index, generator):
        clock.now += 1000.0 if index == 0 else 0.0
        return clock()

    training.fit(step, steps=4, modules={}, label="x")
    told = [line.split("loss 0")[1].strip() for line in capsys.readouterr().out.splitlines()]
    assert told == ["", "0:20 left", "0:10 left", "0:00 left"]


@pytest.mark.parametrize("place", ["cpu", "cuda:0"])
def test_a_state_of_another_device_is_read_and_goes_on(monkeypatch, tmp_path, place):
    whole, want = toy()
    rows = training.fit(whole, steps=6, modules=want, label="x")
    first, modules = toy()
    with monkeypatch.context() as patch:  # as a training there would write it
        patch.setattr(torch.serialization, "location_tag", lambda storage: place)
        training.fit(first, steps=3, modules=modules, label="x", checkpoint=tmp_path / "x.pt")
    if place != "cpu" and not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "x.pt", weights_only=True)
    assert training.seconds_done(tmp_path / "x.pt") > 0 and training.history_done(tmp_path / "x.pt") == rows[:3]
    second, again = toy()
    assert training.fit(second, steps=6, modules=again, label="x", checkpoint=tmp_path / "x.pt") == rows
    assert torch.equal(again["network"].weight, want["network"].weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_fused_optimizer_goes_on_on_the_gpu(tmp_path):
    step, modules = toy()
    training.fit(step, steps=3, modules=modules, label="x", checkpoint=tmp_path / "x.pt")
    network = nn.Linear(3, 1).cuda()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
    training.fit(None, steps=3, modules={"network": network, "optimizer": optimizer}, label="x", checkpoint=tmp_path / "x.pt")
    assert all(value.is_cuda for state in optimizer.state.values() for value in state.values())
    network(torch.ones(1, 3, device="cuda")).sum().backward()
    optimizer.step()


def test_what_takes_long_tells_how_far_it_is(monkeypatch, capsys):
    clock = Clock(monkeypatch, step=0, cost=0)
    monkeypatch.setattr(progress, "time", clock)
    seen = []
    for batch in progress.told([[1, 2], [3, 4], [5]], 5, "clips heard", size=len):
        seen += batch
        clock.now += 4
    assert seen == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out == "clips heard: 4/5  0:02 left\n"  # a line at the first moment more than 5 s after the last


def test_counting_nothing_says_nothing(capsys):
    assert list(progress.told([], 0, "clips heard")) == [] and capsys.readouterr().out == ""


def test_an_atomic_folder_can_be_read_by_everybody(tmp_path):
    with training.atomic_folder(tmp_path / "model") as folder:
        (folder / "inner").mkdir()
        for name in ("model.safetensors", "inner/model.safetensors"):
            (folder / name).write_bytes(b"0")
            (folder / name).chmod(0o600)
    files = [file for file in (tmp_path / "model").rglob("*") if file.is_file()]
    assert [file.stat().st_mode & 0o777 for file in files] == [0o644, 0o644]
