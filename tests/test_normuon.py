"NorMuon: the specification's numbers, what `equalise` keeps and changes, and how the optimizer uses it."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib.gpt import build_model
from speedrun_lib.muon import nesterov
from speedrun_lib.normuon import equalise
from speedrun_lib.optimizer import Optimizer
from speedrun_lib.polar import polar_express
from speedrun_lib.recipe import SIZES, recipe_for

SHAPES = pytest.mark.parametrize("shape", [(3, 12, 4), (3, 4, 12), (3, 6, 6)], ids=["tall", "wide", "square"])
RATES = {"muon_lr": "0.023", "adam_lr": "0.004"}  # of the ladder or not: a new tuning must not matter here


def spec_matrix(r, c):
    "The matrix of the specification's oracles, (1, r, c)."
    i, j = torch.arange(r)[:, None].double(), torch.arange(c)[None].double()
    return (torch.sin(1.3 * i + 0.7 * j) + 0.5 * torch.cos(0.11 * i * j)).float()[None]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def long_side(shape):
    "Axis over which the mean of the squares is taken."
    return -1 if shape[-2] >= shape[-1] else -2


def close(a, b, digits):
    torch.testing.assert_close(a, torch.tensor(b), atol=0.51 * 10**-digits, rtol=1e-6)


# ---- the specification's numbers, section 2


def test_oracle_tall():
    v, state = spec_matrix(6, 4), {}
    first = equalise(v, state, 0.9)
    close(first[0, 0], [0.3673020, 0.8405470, 1.0912174, 1.0014192], 7)
    close(state["second_moment"][0, :4, 0], [0.1406034, 0.1251184, 0.0399722, 0.0124396], 7)
    assert round(v.norm().item(), 5) == round(first.norm().item(), 5) == 4.26734
    second = equalise(2 * v, state, 0.9)
    close(second[0, 0], [0.7346041, 1.6810942, 2.1824348, 2.0028384], 7)
    close(state["second_moment"][0, :4, 0], [0.6889565, 0.6130804, 0.1958640, 0.0609542], 7)


def test_oracle_wide():
    v, state = spec_matrix(4, 6), {}
    close(equalise(v, state, 0.9)[0, 0, :4], [0.4269384, 0.9488419, 1.2929685, 1.4362692], 7)
    close(state["second_moment"][0, 0, :4], [0.0864625, 0.0916744, 0.0832067, 0.0567900], 7)
    close(equalise(2 * v, state, 0.9)[0, 0, :4], [0.8538769, 1.8976841, 2.5859375, 2.8725390], 7)


# ---- properties


@SHAPES
@given(seed=st.integers(0, 1000), beta2=st.floats(0, 0.99), size=st.floats(1e-2, 1e2))
@settings(deadline=None, max_examples=15)
def test_each_matrix_keeps_its_norm_at_every_call(shape, seed, beta2, size):
    state = {}
    for call in range(4):
        v = size * normal(*shape, seed=seed + call) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
        even = equalise(v, state, beta2)
        torch.testing.assert_close(even.norm(dim=(-2, -1)), v.norm(dim=(-2, -1)), rtol=1e-4, atol=0)
        ratio = even / v  # one positive factor per row (wide: per column)
        assert ratio.min() > 0
        torch.testing.assert_close(ratio, ratio.mean(long_side(shape), keepdim=True).expand_as(v), rtol=1e-3, atol=0)


@SHAPES
def test_lengths_are_equal_at_the_first_call_and_without_memory(shape):
    state = {}
    for call in range(3):
        even = equalise(normal(*shape, seed=call), {} if call == 0 else state, 0.9 if call == 0 else 0.0)
        lengths = even.norm(dim=long_side(shape))
        torch.testing.assert_close(lengths, lengths.mean(-1, keepdim=True).expand_as(lengths), rtol=1e-4, atol=0)


@SHAPES
def test_one_number_per_row_or_column_in_fp32(shape):
    state = {}
    even = equalise(normal(*shape).bfloat16(), state, 0.9)
    assert even.dtype == torch.bfloat16 and even.shape == shape
    assert state["second_moment"].dtype == torch.float32
    assert state["second_moment"].shape == ((3, shape[1], 1) if shape[1] >= shape[2] else (3, 1, shape[2]))


def test_the_moment_is_updated_before_it_is_used_and_remembers():
    v, state = normal(1, 8, 4), {}
    equalise(v, state, 0.9)
    torch.testing.assert_close(state["second_moment"], 0.1 * v.square().mean(-1, keepdim=True))
    loud = v.clone()
    loud[0, 3] *= 5
    even = equalise(loud, state, 0.9).norm(dim=-1)[0] / loud.norm()
    # memory of row 3: 0.9*0.1*m + 0.1*25*m against 0.19*m of the others
    expected = 5 * math.sqrt(0.19 / (0.09 + 2.5))
    torch.testing.assert_close(even[3] / even[0], torch.tensor(expected), rtol=1e-4, atol=0)


def test_matrices_of_a_bank_do_not_mix():
    v = normal(4, 12, 4)
    together, alone = {}, [{} for _ in range(4)]
    for scale in (1.0, 0.3):
        even = equalise(scale * v, together, 0.9)
        one_by_one = torch.cat([equalise(scale * v[i : i + 1], alone[i], 0.9) for i in range(4)])
        torch.testing.assert_close(even, one_by_one)


def test_zero_matrices_and_zero_rows_stay_zero():
    v = normal(2, 12, 4)
    v[0] = 0
    v[1, 5] = 0
    even = equalise(v, {}, 0.9)
    assert even.isfinite().all() and not even[0].any() and not even[1, 5].any() and even[1].any()


def test_after_orthogonalising_only_the_long_side_is_uneven():
    m = torch.logspace(-1, 1, 64)[:, None] * normal(1, 64, 16)
    v = polar_express(m)
    spread = [float(v.norm(dim=axis).std() / v.norm(dim=axis).mean()) for axis in (-1, -2)]
    assert spread[0] > 0.5 and spread[1] < 0.05
    assert float(equalise(v, {}, 0.9).norm(dim=-1).std()) < 1e-5


# ---- in the optimizer


def stepped(rung, steps=1, **overrides):
    "Optimizer of a shallow network after steps with prescribed gradients, and what the last step moved."
    torch.manual_seed(0)
    recipe = recipe_for(rung, "nano", {"num_layers": "2"} | RATES | overrides)
    model = build_model(recipe, SIZES["nano"])
    optimizer = Optimizer(recipe, model)
    for step in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for k, p in enumerate(model.parameters()):
            p.grad = gradient(p.shape, 100 * step + k)
        optimizer.step()
    return optimizer, {name: before[name] - p.detach() for name, p in model.named_parameters()}


def gradient(shape, seed):
    return normal(*shape, seed=seed) * torch.logspace(-1, 1, shape[-2])[:, None]


def by_hand(optimizer, bank, group_rows, steps):
    "Updates of a bank written out: momentum, orthogonalise in groups of rows, even out."
    k = list(optimizer.params).index(bank)
    p = optimizer.params[bank]
    buffer, state = torch.zeros_like(p), {}
    for step in range(steps):
        u = nesterov(buffer, gradient(p.shape, 100 * step + k), optimizer.recipe.muon_momentum)
        update = equalise(polar_express(u.view(-1, group_rows, p.shape[-1])), state, 0.9).view_as(p)
    return update, state["second_moment"]


@pytest.mark.parametrize(("bank", "factors"), [("qk_bank", (1, 1)), ("vo_bank", (1, 1)), ("mlp_bank", (2, 4))])
@pytest.mark.parametrize("rung", ["normuon", "head_pairs"])
def test_order_shape_factor_and_factor_of_the_down_matrices(rung, bank, factors):
    optimizer, moved = stepped(rung, steps=2)
    rows = 64 if (rung, bank) == ("head_pairs", "qk_bank") else optimizer.params[bank].shape[1]
    update, second_moment = by_hand(optimizer, bank, rows, steps=2)
    for odd in (0, 1):
        expected = 0.023 * factors[odd] * update[odd::2]
        torch.testing.assert_close(moved[bank][odd::2], expected, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(optimizer.state[optimizer.params[bank]]["second_moment"], second_moment)


def test_the_rung_changes_the_step():
    changed = {a: {b: not torch.allclose(stepped(a)[1][b].flatten(), stepped(z)[1][b].flatten(), rtol=1e-3, atol=1e-6)
                   for b in ("qk_bank", "vo_bank", "mlp_bank", "embed")}
               for a, z in (("normuon", "polar"), ("head_pairs", "normuon"))}
    assert changed["normuon"] == {"qk_bank": True, "vo_bank": True, "mlp_bank": True, "embed": False}
    assert changed["head_pairs"] == {"qk_bank": True, "vo_bank": False, "mlp_bank": False, "embed": False}


def test_rows_of_the_mlp_move_evenly_and_the_norm_is_that_of_muon():
    even, uneven = stepped("normuon")[1]["mlp_bank"], stepped("polar")[1]["mlp_bank"]
    spread = [float((m.norm(dim=-1).std(-1) / m.norm(dim=-1).mean(-1)).mean()) for m in (even, uneven)]
    assert spread[0] < 1e-3 and spread[1] > 0.5
    factor = torch.tensor([1.0, 2.0, 1.0, 2.0])
    torch.testing.assert_close(even.norm(dim=(-2, -1)), factor * uneven.norm(dim=(-2, -1)), rtol=1e-4, atol=0)


def test_a_pair_of_heads_hears_only_its_own_gradient():
    "Doubling one group's gradient moves nothing; turning it moves only that group."
    torch.manual_seed(0)
    recipe = recipe_for("head_pairs", "nano", {"num_layers": "1"} | RATES)
    results = []
    for change in (False, True):
        torch.manual_seed(0)
        model = build_model(recipe, SIZES["nano"])
        before = model.qk_bank.detach().clone()
        for p in model.parameters():
            p.grad = normal(*p.shape, seed=1)
        if change:
            model.qk_bank.grad[1] = normal(64, 128, seed=2)  # heads 2 and 3 of the queries
        Optimizer(recipe, model).step()
        results.append((before - model.qk_bank.detach()).view(4, 64, 128))
    same = [torch.equal(a, b) for a, b in zip(*results, strict=True)]
    assert same == [True, False, True, True]
    # Polar Express ends between 0.86 and 1.14; evening out moves them a little further
    singular = torch.linalg.svdvals(results[0]) / 0.023
    assert singular.max() < 1.4 and singular.min() > 0.6
