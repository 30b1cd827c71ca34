"The two halves of a weight: nothing is lost to the bit, the original's numbers, and what the optimizer does with them."

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import speedrun_lib.optimizer as used
from speedrun_lib.cautious import cautious_decay
from speedrun_lib.gpt import build_model
from speedrun_lib.mantissa import halves, joined
from speedrun_lib.optimizer import Optimizer, parameter_rules
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.train import World, forward, load_checkpoint, save_checkpoint

BANKS = ("qk_bank", "vo_bank", "mlp_bank")
FP32 = {"scalars", "resid_lambdas", "post_lambdas", "x0_lambdas", "bigram_lambdas", "xsa_alphas"}


def from_bits(bits):
    return torch.as_tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def same_bits(x, y):
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


# ---- to the bit


@pytest.mark.parametrize("low", [0, 1, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_every_high_half_comes_back(low):
    "All signs, exponents and upper mantissas: normal, subnormal, zeros, infinities, NaNs."
    x = from_bits((torch.arange(65_536) << 16) | low)
    high, rest = halves(x)
    assert high.dtype == torch.bfloat16 and rest.dtype == torch.uint16
    assert same_bits(joined(high, rest), x)
    assert torch.equal(high.view(torch.uint16).to(torch.int64), torch.arange(65_536))
    assert (rest.to(torch.int64) == low).all()


@given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40))
@settings(deadline=None, max_examples=100)
def test_any_number_comes_back(bits):
    x = from_bits(bits)
    assert same_bits(joined(*halves(x)), x)
    high, low = halves(x)
    again = halves(joined(high, low))
    assert torch.equal(again[0].view(torch.int16), high.view(torch.int16)) and torch.equal(again[1], low)


@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
@settings(deadline=None, max_examples=100)
def test_the_high_half_is_cut_towards_zero(values):
    x = torch.tensor(values)
    high = halves(x)[0].float()
    assert high.isfinite().all(), "rounding could overflow, cutting cannot"
    assert (high.abs() <= x.abs()).all() and torch.equal(high.signbit(), x.signbit())
    normal = x.abs() >= 2.0**-126
    assert ((x - high).abs() < 2.0**-7 * x.abs())[normal].all(), "less than one unit"


def test_shapes_and_empty_low_half():
    x = torch.randn(3, 4, 5)
    high, low = halves(x)
    assert high.shape == low.shape == x.shape
    bf16 = x.bfloat16()
    assert torch.equal(joined(bf16, torch.zeros_like(low)), bf16.float()), "a master starts as the weight itself"


def test_cutting_is_half_a_unit_too_small_on_average():
    x = 1 + torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert abs(((x - halves(x)[0].float()) * 128).mean() - 0.5) < 0.01
    assert abs(((x - x.bfloat16().float()) * 128).mean()) < 0.01


# ---- the original's numbers (spec 07, section 3)


def close(a, b):
    torch.testing.assert_close(a, torch.tensor(b), atol=0.51e-8, rtol=1.2e-7)


def test_three_updates_of_the_original():
    high = torch.tensor([1, -1, 0.5, 0.0078125, 0]).bfloat16()
    low, update = torch.zeros(5, dtype=torch.uint16), torch.tensor([1, 1, -1, 0.003, -2])
    seen = []
    for _ in range(3):
        p = joined(high, low)
        high, low = halves(p - cautious_decay(p, update, strict=False) * (0.0276 * 0.046) - update * 0.046)
        seen.append((high, low))
    assert seen[0][0].tolist() == [0.94921875, -1.0390625, 0.54296875, 0.007659912109375, 0.091796875]
    stored = seen[0][1].to(torch.int64) - torch.tensor([58916, 58196, 50856, 10027, 27263])
    assert (stored.abs() <= 2).all(), "the last bit of fp32 may differ"
    for (high, low), expected in zip(seen, ([0.952730417, -1.046, 0.546, 0.007664581, 0.092],
                                            [0.905520856, -1.092, 0.592, 0.007516850, 0.184],
                                            [0.858371198, -1.138, 0.638, 0.007369307, 0.276]), strict=True):
        close(joined(high, low), expected)


# ---- the optimizer on the original's run (spec 07, section 17): two weights that never get a gradient only decay

FACTORS = [1, 1, 1] + [1.52 * (1 - t) + 0.15 * t for t in (0, 1 / 6, 1 / 3)]
FACTORS += [1.73 * (1 - t) + 0.15 * t for t in (1 / 2, 2 / 3, 5 / 6)] + [0.15] * 3
PADDING = {0: (0.030722663, -0.004839974), 1: (0.030683657, -0.0048276843), 7: (0.030394489, -0.0047370312),
           11: (0.030385293, -0.0047341646)}


class Padding(nn.Module):
    "One element of the unused up and down matrix of the original's bank, in matrices of its shape's proportions."

    def __init__(self):
        super().__init__()
        self.lm_head, self.embed = (nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16)) for _ in range(2))
        bank = torch.tensor([0.030761719, -0.0048522949]).bfloat16()
        self.mlp_bank = nn.Parameter(bank.view(2, 1, 1).expand(2, 4, 1).contiguous())


def padding_run():
    "High half, low half of both elements after each step."
    model = Padding()
    optimizer, found = Optimizer(recipe_for("bf16_weights", "full", {"steps": "9"}), model), []
    for step, factor in enumerate(FACTORS):
        for group in optimizer.param_groups:
            group["lr"] = 0.023 * factor
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step_number = step
        optimizer.step()
        low = optimizer.state[model.mlp_bank]["mantissa"]
        found.append((model.mlp_bank.detach()[:, 0, 0].clone(), low[:, 0, 0].clone()))
    return found


def test_unused_weights_of_the_original_decay():
    found = padding_run()
    for step, expected in PADDING.items():
        torch.testing.assert_close(joined(*found[step]), torch.tensor(expected), atol=0, rtol=3e-7)
    high, low = found[0]
    assert high.tolist() == [0.0306396484375, -0.00482177734375]
    assert ((low.to(torch.int64) - torch.tensor([44568, 39077])).abs() <= 2).all()


def rounded(x):
    return x.bfloat16(), torch.zeros_like(x, dtype=torch.uint16)


FAULTS = {
    "no low half, rounded": {"halves": rounded},
    "no low half, cut": {"halves": lambda x: (halves(x)[0], torch.zeros_like(x, dtype=torch.uint16))},
    "rounded, and joined": {"halves": lambda x: (x.bfloat16(), halves(x)[1])},
    "low half forgotten": {"joined": lambda high, low: high.float()},
    "low half with a sign": {"joined": lambda high, low: from_bits(
        (high.view(torch.int16).to(torch.int64) << 16) | low.view(torch.int16).to(torch.int64))},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen_on_the_original_run(fault, monkeypatch):
    for name, function in FAULTS[fault].items():
        monkeypatch.setattr(used, name, function)
    off = [(joined(*halves_) - torch.tensor(PADDING[step])).abs().max().item()
           for step, halves_ in enumerate(padding_run()) if step in PADDING]
    assert not all(x < 1e-5 for x in off)  # not even NaN is


# ---- the optimizer on the real network: both halves are the previous rung's fp32 weights


def pair():
    "The network of this rung and that of the one before, from the same bf16 start; optimizers with the same rates."
    torch.manual_seed(0)
    recipes = [recipe_for(rung, "nano") for rung in ("bf16_weights", "staged")]
    model, wide = (build_model(recipe, SIZES["nano"]) for recipe in recipes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("mlp_bank"):
                p[1::2] = 0.03 * torch.randn(p[1::2].shape)  # away from zero, where any step survives
            wide.get_parameter(name).copy_(p)
    return [(m, Optimizer(recipe, m)) for m, recipe in zip((model, wide), recipes, strict=True)]


def run_both(steps=3, factor=0.15):
    "Steps with the same gradients for the banks, at the rate of the schedule's end."
    both, generator = pair(), torch.Generator().manual_seed(1)
    start = {name: both[1][0].get_parameter(name).detach().clone() for name in BANKS}
    for _, optimizer in both:
        for group in optimizer.param_groups:
            group["lr"] *= factor
    for step in range(0, 2 * steps, 2):  # even ones: Adam rests
        for name in BANKS:
            grad = torch.randn(both[0][0].get_parameter(name).shape, generator=generator).bfloat16()
            for model, _ in both:
                p = model.get_parameter(name)
                p.grad = grad.to(p.dtype)
        for _, optimizer in both:
            optimizer.step_number = step
            optimizer.step()
    (model, optimizer), (wide, _) = both
    off = {}
    for name in BANKS:
        p, q = model.get_parameter(name).detach(), wide.get_parameter(name).detach()
        master = joined(p, optimizer.state[model.get_parameter(name)]["mantissa"])
        off[name] = float((master - q).norm() / (q - start[name]).norm())
        assert torch.equal(p.view(torch.int16), halves(master)[0].view(torch.int16))
    return off


def test_both_halves_follow_the_fp32_optimizer():
    assert max(run_both().values()) < 1e-5


@pytest.mark.parametrize("fault", list(FAULTS)[:3])
def test_without_the_low_half_the_weights_go_another_way(fault, monkeypatch):
    for name, function in FAULTS[fault].items():
        monkeypatch.setattr(used, name, function)
    assert min(run_both(steps=1).values()) > 0.05


def one_pass():
    "Gradients of one forward and backward of this rung, on the CPU."
    (model, optimizer), _ = pair()
    tokens = torch.randint(0, 256, (1, 65), generator=torch.Generator().manual_seed(0))
    borders = torch.tensor([0, 20, 64, 64], dtype=torch.int32)
    loss = model(tokens[:, :-1], tokens[:, 1:], borders, torch.tensor(64, dtype=torch.int32))
    loss.backward()
    return model, optimizer, loss


def test_who_is_bf16_and_who_has_a_low_half(tmp_path):
    model, optimizer, loss = one_pass()
    assert loss.isfinite()
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == FP32 and sum(model.get_parameter(name).numel() for name in wide) < 200
    assert all(p.dtype == torch.bfloat16 for name, p in model.named_parameters() if name not in FP32)
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)
    optimizer.step_number = 1
    optimizer.step()
    rules = parameter_rules(optimizer.recipe)
    for name, p in model.named_parameters():
        assert ("mantissa" in optimizer.state[p]) == (rules[name].rule == "muon") == (name in BANKS)
        moments = [v for key, v in optimizer.state[p].items() if key != "mantissa"]
        assert all(v.dtype == torch.float32 for v in moments), "what grows by small additions stays fp32"

    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, {"step": 1}, optimizer.recipe,
                    World(0, 1, torch.device("cpu")))
    twin = copy.deepcopy(model)
    other = Optimizer(optimizer.recipe, twin)
    with torch.no_grad():
        twin.mlp_bank.zero_()
    load_checkpoint(tmp_path / "c.safetensors", twin, other, {}, optimizer.recipe)
    for name in BANKS:
        p, q = model.get_parameter(name), twin.get_parameter(name)
        assert torch.equal(p, q) and other.state[q]["mantissa"].dtype == torch.uint16
        assert torch.equal(optimizer.state[p]["mantissa"], other.state[q]["mantissa"])
        assert optimizer.state[p]["mantissa"].any()


def test_large_biases_stand_still_in_bf16():
    "Adam's bf16 parameters have no low half: half a unit at 5 is more than any step of theirs."
    found = {}
    for rung in ("staged", "bf16_weights"):
        recipe = recipe_for(rung, "nano", {"adam_lr": "0.008"})
        model = build_model(recipe, SIZES["nano"])
        optimizer, p = Optimizer(recipe, model), model.mudd_b2
        group = next(group for group in optimizer.param_groups if group["name"] == "mudd_b2")
        start = p.detach().clone()
        for _ in range(3):
            p.grad = torch.ones_like(p)
            with torch.no_grad():
                optimizer.step_adam(p, p.grad, optimizer.state[p], group)
        found[rung] = start, p.detach() != start
    start, moved = found["bf16_weights"]
    assert not moved[start.abs() >= 5].any() and moved[start.abs() < 0.1].all()
    assert found["staged"][1].all()


@pytest.mark.parametrize("rung, on", [("staged", True), ("bf16_weights", False)])
def test_autocast_ends_with_this_rung(rung, on, monkeypatch):
    seen = []

    def recorder(device, dtype, enabled):
        seen.append((device, dtype, enabled))
        return contextlib.nullcontext()

    monkeypatch.setattr(torch, "autocast", recorder)
    world = World(0, 1, torch.device("cuda"))
    forward(lambda x: x, (torch.tensor(1.0),), recipe_for(rung, "nano"), world)  # scalars stay on the CPU
    assert seen == ([("cuda", torch.bfloat16, True)] if on else [])
