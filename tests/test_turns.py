"""Taking turns: what lies on the device, counted beside the library by parts that write down where they are sent."""

import pytest
import torch
from torch import nn

from resonate_lib.turns import Timeline, Turns, aside, memory_curve, resident_bytes

SIZES = {"encoder": 3000, "rollout": 5000, "reward": 4000, "policy": 6000}  # weights of four bytes


class Listed(nn.Module):
    """A part that notes every device it is sent to."""

    def __init__(self, count):
        super().__init__()
        self.weight, self.places = nn.Parameter(torch.zeros(count)), []
        self.register_buffer("table", torch.zeros(10, dtype=torch.float64))

    def to(self, device):
        self.places.append(str(device))
        return self  # the accelerator is not there: only the order is looked at


def parts():
    return {name: Listed(count) for name, count in SIZES.items()}


def test_turns_keep_the_peak_under_60_percent_of_everything():
    made = parts()
    turns, on_device, peak = Turns(made, "cuda" if torch.cuda.is_available() else "meta"), set(), 0
    for name in (*SIZES, *SIZES):
        with turns.take(name) as part:
            assert part is made[name]
            on_device = {key for key, one in made.items() if one.places[-1] != "cpu"}
            peak = max(peak, sum(4 * SIZES[key] + 80 for key in on_device))
            assert on_device == {name}
    everything = sum(4 * count + 80 for count in SIZES.values())
    assert (turns.peak, turns.everything) == (peak, everything)
    assert turns.peak <= 0.6 * everything and turns.peak == 4 * 6000 + 80
    print(f"peak {turns.peak} of {everything} bytes: {turns.peak / everything:.0%}")
    assert [row["action"] for row in turns.timeline] == ["load"] + ["release", "load"] * 7
    assert turns.timeline[1]["resident"] == 0 and turns.resident == 24_080
    turns.release()
    assert turns.resident == 0 and all(one.places[-1] == "cpu" for one in made.values())


def test_a_part_that_has_the_turn_stays_until_another_one_comes():
    made = parts()
    turns = Turns(made, "meta")
    for _ in range(3):
        with turns.take("policy"):
            pass
    assert made["policy"].places == ["cpu", "meta"] and len(turns.timeline) == 1
    with turns.take("reward", "policy") as (reward, policy):
        assert (reward, policy) == (made["reward"], made["policy"])
    assert turns.peak == 4 * 10_000 + 160 and made["policy"].places == ["cpu", "meta"]


def test_a_function_loads_its_part_for_the_turn_and_it_is_forgotten():
    loaded = []
    turns = Turns({"reward": lambda: loaded.append(Listed(7)) or loaded[-1], "policy": nn.Linear(3, 2)}, "cpu")
    assert turns.everything == 4 * 8
    for name in ("reward", "policy", "reward"):
        with turns.take(name) as part:
            assert name != "reward" or part is loaded[-1]
    assert len(loaded) == 2 and turns.everything == 4 * 8 + 4 * 7 + 80
    assert turns.resident == 4 * 7 + 80


def test_gradients_moments_and_shared_memory_are_counted_as_they_lie():
    layer = nn.Linear(10, 10, bias=False)
    twin = nn.Sequential(layer, nn.Linear(10, 10, bias=False))
    twin[1].weight = layer.weight
    assert resident_bytes(twin) == resident_bytes([layer, twin]) == 400
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    turns = Turns({"policy": [layer, optimizer], "engine": lambda: object()}, "cpu")
    with turns.take("policy"):
        layer(torch.ones(1, 10)).sum().backward()
        optimizer.step()
    assert turns.resident == turns.peak == 4 * 400 + 4  # weights, gradient, two moments, the count of steps
    with turns.take("engine"):
        assert turns.resident == 0


def test_moments_follow_their_weights_and_learning_goes_on():
    lone, shared = nn.Linear(4, 1), nn.Linear(4, 1)
    shared.load_state_dict(lone.state_dict())
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.1) for one in (lone, shared)]
    turns = Turns({"policy": (shared, optimizers[1]), "reward": nn.Linear(4, 1)}, "cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(3):
        with turns.take("policy"):
            for one, optimizer in zip((lone, shared), optimizers, strict=True):
                optimizer.zero_grad()
                one(torch.ones(1, 4, device=one.weight.device)).square().sum().backward()
                optimizer.step()
        with turns.take("reward"):
            assert shared.weight.device.type == "cpu"
    torch.testing.assert_close(lone.weight, shared.weight)


@pytest.mark.parametrize("fused", [True, False])
def test_moments_of_a_resumed_optimizer_lie_where_its_kernels_want_them(fused):
    """A state is read while all lies on the CPU; on the device fused Adam counts its steps beside the moments."""
    first, again = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.1, fused=fused) for one in (first, again)]
    first(torch.ones(1, 3)).sum().backward()
    optimizers[0].step()
    turns = Turns({"policy": again, "optimizer": optimizers[1]}, "meta")
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    with turns.take("policy", "optimizer"):
        for state in optimizers[1].state.values():
            assert {name: value.device.type for name, value in state.items()} == {
                "step": "meta" if fused else "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"
            }  # fmt: skip


def test_the_end_moves_parts_without_a_row_and_a_timeline_goes_into_a_state():
    made, timeline = parts(), Timeline()
    turns = Turns(made, "meta", timeline)
    with turns.take("encoder", "policy"):
        pass
    rows = list(timeline)
    turns.end("policy", "reward")
    assert {name: one.places[-1] for name, one in made.items()} == {
        "encoder": "cpu", "rollout": "cpu", "reward": "meta", "policy": "meta"
    }  # fmt: skip
    resumed = Timeline([{"part": "other"}])
    resumed.load_state_dict(timeline.state_dict())
    assert timeline == rows == resumed and len(rows) == 2 and turns.resident == 0


def test_what_steps_aside_comes_back_to_where_it_was():
    there, here = Listed(3), Listed(4)
    with pytest.raises(KeyboardInterrupt), aside(there, here):
        assert there.places == here.places == ["cpu"]
        raise KeyboardInterrupt
    assert there.places == here.places == ["cpu", str(there.weight.device)]


class Judge:
    """An object that holds a model and can be called, as rewards are."""

    def __init__(self):
        self.model, self.rate = Listed(5), 16_000

    def __call__(self):
        raise AssertionError("a reward is no loader")


def test_an_object_moves_by_the_modules_it_holds():
    judge = Judge()
    turns = Turns({"reward": judge, "server": object(), "policy": [nn.Linear(2, 2), Judge()]}, "cpu")
    assert turns.everything == 2 * (20 + 80) + 24
    with turns.take("reward") as part:
        assert part is judge and judge.model.places == ["cpu", "cpu"]


def test_wrong_names_nested_turns_and_no_parts_are_clear_errors():
    turns = Turns(parts(), "meta")
    with pytest.raises(ValueError, match="no part 'critic': allowed are encoder, rollout, reward, policy"), turns.take("critic"):
        pass
    with pytest.raises(ValueError, match="no part ''"), turns.take():
        pass
    with turns.take("policy"), pytest.raises(RuntimeError, match="policy has the turn: end it first"), turns.take("reward"):
        pass
    with pytest.raises(KeyboardInterrupt), turns.take("reward"):
        raise KeyboardInterrupt
    with turns.take("policy"):
        pass
    with pytest.raises(ValueError, match="no parts"):
        Turns({}, "cpu")


def test_the_curve_shows_every_move_and_the_sum():
    turns = Turns(parts(), "meta")
    for name in SIZES:
        with turns.take(name):
            pass
    ax = memory_curve(turns.timeline, title="one round").axes[0]
    assert ax.lines[0].get_ydata().max() == pytest.approx(turns.peak / 1024)
    assert ax.lines[1].get_ydata()[0] == pytest.approx(turns.everything / 1024)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["everything resident", *SIZES]
