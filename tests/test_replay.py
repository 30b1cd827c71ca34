"Replayed passes compute what launched ones do; on a CPU a tape stands in for CUDA graphs."

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from speedrun_lib import train as trainer
from speedrun_lib.data import find_shards, write_demo
from speedrun_lib.gpt import build_model
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.replay import GraphRecorder, Replay, TapeRecorder, replays
from tests.kernels import GPU

RECORDERS = [TapeRecorder, pytest.param(GraphRecorder, marks=GPU)]


class Pairs(nn.Module):
    "A loss of a few tokens; `scale` is read on the CPU, as windows are."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.w = nn.Parameter(torch.randn(20, 8)), nn.Parameter(torch.randn(8, 8))
        self.scale = torch.tensor(2.0)

    def forward(self, inputs_t, targets_t, power):
        x_td = (self.embed[inputs_t] @ self.w).relu() ** power.item()
        return F.cross_entropy(x_td @ self.embed.T * self.scale.item(), targets_t)


@pytest.fixture(params=RECORDERS)
def pairs(request):
    "A network, the same one with recordings, and a source of parts."
    device = "cuda" if request.param is GraphRecorder else "cpu"
    model = Pairs().to(device)
    generator = torch.Generator().manual_seed(1)

    def part(tokens=5, power=1):
        inputs_t, targets_t = torch.randint(0, 20, (2, tokens), generator=generator).to(device)
        return inputs_t.clone(), targets_t.clone(), torch.tensor(power)

    return model, Replay(model, model, request.param()), part


def compare(model, replay, batch, factor=1.0):
    "One pass launched, one replayed; both from the gradients that are there."
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    loss = replay(*(x.clone() for x in batch))
    (factor * loss).backward()
    expected = model(*batch)
    grads = torch.autograd.grad(factor * expected, list(model.parameters()))
    torch.testing.assert_close(loss.detach(), expected.detach())
    for p, old, new in zip(model.parameters(), before, grads, strict=True):
        torch.testing.assert_close(p.grad, new if old is None else old + new, atol=1e-5, rtol=1e-5)


def test_new_inputs_and_weights_are_seen(pairs):
    model, replay, part = pairs
    for _ in range(3):
        model.zero_grad()
        compare(model, replay, part())
        with torch.no_grad():
            model.w.mul_(0.9)
    assert len(replay.recordings) == 1


def test_gradients_add_up_and_follow_the_factor(pairs):
    model, replay, part = pairs
    for factor in (1.0, 0.125, -2.0):
        compare(model, replay, part(), factor)


@pytest.mark.parametrize("lost", [None, "other memory"])
def test_gradients_that_the_optimizer_dropped_or_a_checkpoint_brought(pairs, lost):
    model, replay, part = pairs
    compare(model, replay, part())
    model.embed.grad = None if lost is None else torch.ones_like(model.embed)
    compare(model, replay, part())
    assert model.embed.grad is replay.grads[model.embed]


def test_every_kind_of_part_has_a_recording(pairs):
    model, replay, part = pairs
    for tokens, power, scale, count in ((5, 1, 2.0, 1), (7, 1, 2.0, 2), (5, 2, 2.0, 3), (5, 1, 3.0, 4), (7, 1, 2.0, 4)):
        model.zero_grad()
        model.scale.fill_(scale)
        compare(model, replay, part(tokens, power))
        assert len(replay.recordings) == count, (tokens, power, scale)


def test_a_scalar_that_nobody_watches_stays_as_it_was_recorded(pairs):
    model, replay, part = pairs
    replay.scalars, batch = [], part()
    first = replay(*batch).item()
    model.scale.fill_(5.0)
    assert replay(*batch).item() == pytest.approx(first)
    assert model(*batch).item() != pytest.approx(first), "why `scalars` belong to the kind"


def test_validation_is_not_recorded(pairs):
    model, replay, part = pairs
    replay.eval()
    assert not model.training
    with torch.no_grad():
        replay(*part())
    assert not replay.recordings and model.w.grad is None


def test_the_trial_leaves_no_trace_in_the_gradients(pairs):
    model, replay, part = pairs
    replay.hold_gradients()
    replay.record([*part()])
    assert all(not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("device, wish, expected", [
    ("cuda", None, True), ("cuda", "1", True), ("cuda", "0", False), ("cpu", None, False), ("cpu", "1", False)])
def test_gpus_replay_unless_told_otherwise(device, wish, expected, monkeypatch):
    monkeypatch.delenv("SPEEDRUN_REPLAY", raising=False)
    if wish:
        monkeypatch.setenv("SPEEDRUN_REPLAY", wish)
    assert replays(device) == expected


def test_another_wish_is_refused(monkeypatch):
    monkeypatch.setenv("SPEEDRUN_REPLAY", "yes")
    with pytest.raises(ValueError, match="SPEEDRUN_REPLAY=yes is neither 0 .* nor 1"):
        replays("cpu")


def test_the_network_trains_alike_through_all_stages(tmp_path, monkeypatch):
    "The loop of the course with and without recordings, to the bit; windows, lengths and target weights change."
    recipe = recipe_for("replayed", "nano", {"steps": "3", "extension": "1", "seq_len": "32", "first_max_len": "16",
                                             "max_len": "32", "bf16_weights": "false", "bigram_size": "256"})
    shards, world, seen = write_demo(tmp_path / "data", "bytes"), trainer.World(0, 1, torch.device("cpu")), []

    def losses():
        torch.manual_seed(0)
        model = build_model(recipe, SIZES["nano"])
        optimizer, loader = trainer.build_optimizer(recipe, model), trainer.training_loader(
            find_shards(shards, "train"), recipe, SIZES["nano"])
        network = Replay(model, model, TapeRecorder()) if seen else model
        seen.append(network)
        for step in range(4):
            trainer.set_step(step, model, optimizer, loader, recipe)
            yield trainer.train_step(network, optimizer, loader.next_step(world.parts), recipe, world).item()

    assert list(losses()) == list(losses())
    windows = {kind[-3:] for kind in seen[1].recordings}
    assert len(windows) == 4, "softmax scale and windows of the four stages"
