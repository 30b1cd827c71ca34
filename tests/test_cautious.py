"Cautious weight decay: the specification's sign tests and Adam tables, and what a mask of signs must guarantee."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib.cautious import cautious_decay
from speedrun_lib.gpt import build_model
from speedrun_lib.optimizer import Optimizer, adam_update
from speedrun_lib.recipe import SIZES, recipe_for

BOTH = pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
HEAD, TABLE = (0.008, (0.5, 0.95), 0.005 * 150), (0.6, (0.75, 0.95), 0.005 * 5)  # lr, betas, decay of record 82
RATES = {"muon_lr": "0.023", "adam_lr": "0.008"}  # pinned: a new tuning of the ladder must not matter here


def adam(p, grads, row, dtype=torch.float32, strict=True):
    "Parameters after each of the updates of record 82's Adam."
    lr, betas, decay = row
    p, state, seen = torch.tensor(p, dtype=dtype), {}, []
    for grad in grads:
        update = adam_update(torch.tensor(grad), state, lr, betas)
        update += cautious_decay(p.float(), update, strict) * (lr**2 * decay)
        p = (p.float() - update).to(dtype)
        seen.append(p)
    return seen


def muon(p, v, steps=1, strict=False):
    "Parameter after steps of Muon's update with decay, at the specification's rates."
    for _ in range(steps):
        p = p - cautious_decay(p, v, strict) * (0.0276 * 0.046) - v * 0.046
    return p


def close(a, b, digits=8):
    torch.testing.assert_close(a.float(), torch.tensor(b), atol=0.51 * 10**-digits, rtol=3e-7)


# ---- the specification's numbers, sections 3, 4 and 15


@pytest.mark.parametrize(("row", "after"), [
    (HEAD, {1: [0.99195200, -1.00800002, 0.50800002, -0.00552786],
            2: [0.99785459, -1.01600003, 0.50530899, -0.00814676],
            3: [1.00099361, -1.02025449, 0.50386655, -0.00952824]}),
    (TABLE, {1: [0.39099997, -1.60000002, 1.10000002, -0.41458979],
             3: [0.97302926, -2.62257385, 0.93497854, -0.84354430]}),
    ((0.04, (0.9, 0.99), 0.0), {1: [0.95999998, -1.03999996, 0.54000002, -0.02000000],
                               3: [0.99501944, -1.11099041, 0.53626370, -0.04375186]}),
], ids=["head", "tables", "scalars"])
def test_adam_tables(row, after):
    grads = [[0.1, 0.1, -0.2, 1e-9], [-0.3, 0.1, 0.2, 0.0], [0.0] * 4]
    seen = adam([1.0, -1.0, 0.5, 0.0], grads, row)
    for update, expected in after.items():
        close(seen[update - 1], expected, 7)


def test_adam_is_strict():
    for row, shrunk in ((HEAD, 0.999952), (TABLE, 0.991)):
        assert [p.item() for p in adam([1.0], [[0.0]] * 20, row)] == [1.0] * 20
        assert abs(adam([1.0], [[0.0]], row, strict=False)[0].item() - shrunk) < 1e-6
    head, table = (adam([1.0, -1.0], [[0.1, 0.1]] * 2, row) for row in (HEAD, TABLE))
    close(torch.stack(head), [[0.991952002, -1.00800002], [0.983904362, -1.01600003]], 7)
    close(torch.stack(table), [[0.390999973, -1.60000002], [-0.21251905, -2.20000005]], 7)
    stored = adam([1.0, -1.0], [[0.1, 0.1]] * 2, TABLE, torch.bfloat16)
    assert torch.stack(stored).tolist() == [[0.390625, -1.6015625], [-0.212890625, -2.203125]]


def test_muon_is_not_strict():
    one = torch.ones(())
    for v, expected in ((0.0, 0.998730421), (0.5, 0.975730419), (-0.5, 1.023)):
        assert abs(muon(one, torch.tensor(v)).item() - expected) < 1e-7
    assert muon(one, torch.tensor(0.0), strict=True) == 1
    assert abs(muon(torch.tensor(0.0), torch.tensor(0.7)).item() + 0.046 * 0.7) < 1e-8


def test_three_steps_of_muon():
    p, v = torch.tensor([1, -1, 0.5, 0.0078125, 0]), torch.tensor([1, 1, -1, 0.003, -2])
    for steps, expected in {1: [0.952730417, -1.046, 0.546, 0.007664581, 0.092],
                            2: [0.905520856, -1.092, 0.592, 0.007516850, 0.184],
                            3: [0.858371198, -1.138, 0.638, 0.007369307, 0.276]}.items():
        close(muon(p, v, steps), expected, 7)


# ---- properties

finite = st.floats(-1e3, 1e3, width=32)
weights = st.lists(st.tuples(finite, finite), min_size=1, max_size=12)


@BOTH
@given(pairs=weights, strength=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_decay_never_pushes_a_weight_away_from_zero_nor_past_it(strict, pairs, strength):
    p, update = torch.tensor(pairs).unbind(1)
    after = p - strength * cautious_decay(p, update, strict)
    assert (after.abs() <= p.abs()).all() and (after * p >= 0).all()


@BOTH
@given(pairs=weights)
@settings(deadline=None, max_examples=60)
def test_decay_never_works_against_the_update(strict, pairs):
    p, update = torch.tensor(pairs).unbind(1)
    pull = cautious_decay(p, update, strict)
    assert (pull * update >= 0).all()
    assert ((pull == p) | (pull == 0)).all(), "all of a weight or nothing"
    same_sign = torch.sign(p) * torch.sign(update) > 0
    big = (p * update).abs() > 1e-30  # below, the product may underflow
    assert torch.equal((pull != 0)[same_sign & big], torch.ones_like(pull, dtype=torch.bool)[same_sign & big])


@given(pairs=weights, scale=st.floats(0.125, 8))
@settings(deadline=None, max_examples=30)
def test_only_signs_of_the_update_count(pairs, scale):
    p, update = torch.tensor(pairs).unbind(1)
    update = torch.where(update.abs() < 1e-3, 0, update)
    p = torch.where(p.abs() < 1e-3, 0, p)
    for strict in (True, False):
        assert torch.equal(cautious_decay(p, update, strict), cautious_decay(p, scale * update, strict))
        assert torch.equal(cautious_decay(-p, -update, strict), -cautious_decay(p, update, strict))


def test_the_two_tests_differ_only_where_the_update_is_zero():
    p, update = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -2.0]), torch.tensor([0.1, -0.1, -0.1, 0.1, 0.0, 0.0])
    assert cautious_decay(p, update, strict=True).tolist() == [1, -1, 0, 0, 0, 0]
    assert cautious_decay(p, update, strict=False).tolist() == [1, -1, 0, 0, 1, -2]


def test_points_without_gradient_stay_points_of_rest():
    "Plain decay settles off the floor of a valley, cautious decay on it."
    slope, ends = torch.tensor([1.0, 2.0]), {}
    for kind in ("plain", "cautious"):
        w = torch.tensor([2.8, 1.6])
        for _ in range(500):
            update = (w @ slope - 3) * slope
            w = w - 0.02 * (update + 0.5 * (w if kind == "plain" else cautious_decay(w, update, strict=True)))
        ends[kind] = w
    assert abs(ends["plain"] @ slope - 3) > 0.2 and abs(ends["cautious"] @ slope - 3) < 1e-4
    undecayed = torch.tensor([2.2, 0.4])  # where descent without decay arrives
    assert ends["cautious"].norm() < undecayed.norm() - 0.1


# ---- in the optimizer


def stepped(rung, lr_factor=1.0, gradient=1.0, **overrides):
    "A shallow network of a rung before and after one step with prescribed gradients."
    torch.manual_seed(0)
    model = build_model(recipe := recipe_for(rung, "nano", {"num_layers": "1"} | RATES | overrides), SIZES["nano"])
    torch.nn.init.normal_(model.mlp_bank, generator=torch.Generator().manual_seed(1))
    optimizer = Optimizer(recipe, model)
    for k, p in enumerate(model.parameters()):
        p.grad = gradient * torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
    for group in optimizer.param_groups:
        group["lr"] *= lr_factor
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    return before, {name: p.detach() for name, p in model.named_parameters()}


MUON = pytest.mark.parametrize(("bank", "factors"), [("qk_bank", (1, 1)), ("vo_bank", (1, 1)), ("mlp_bank", (2, 4))])


@MUON
@pytest.mark.parametrize("schedule", [1.0, 0.5])
def test_muon_decays_where_the_update_agrees_by_the_rate_twice(bank, factors, schedule):
    before, free = stepped("head_pairs", schedule)
    _, decayed = stepped("cautious", schedule)
    p, update = before[bank], before[bank] - free[bank]
    lr = 0.023 * schedule
    for odd in (0, 1):
        pull = free[bank][odd::2] - decayed[bank][odd::2]
        expected = torch.where(update * p > 0, p, 0)[odd::2] * (1.2 * lr) * (lr * factors[odd])
        clear = update[odd::2].abs() > 1e-6  # the sign of a smaller move is lost in rounding
        assert clear.float().mean() > 0.95 and expected.abs().max() > 1e-5
        torch.testing.assert_close(pull[clear], expected[clear], atol=6e-7, rtol=1e-3)


@MUON
def test_muon_decays_without_gradient(bank, factors):
    before, after = stepped("cautious", gradient=0.0)
    for odd in (0, 1):
        expected = before[bank][odd::2] * (1 - 1.2 * 0.023 * 0.023 * factors[odd])
        torch.testing.assert_close(after[bank][odd::2], expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("name", ["embed", "lm_head"])
def test_adam_decays_by_the_square_of_the_rate_and_leaves_unseen_rows(name):
    big = {"adam_lr": "0.05"}  # larger than the ladder's, so that the decay stands out of rounding
    before, free = stepped("head_pairs", **big)
    _, decayed = stepped("cautious", **big)
    p, update = before[name], before[name] - free[name]
    expected = torch.where(update * p > 0, p, 0) * (0.05**2 * 0.005 * 150)
    torch.testing.assert_close(free[name] - decayed[name], expected, atol=2e-8, rtol=1e-4)
    before, after = stepped("cautious", gradient=0.0)
    assert torch.equal(before[name], after[name])


def test_decay_falls_with_the_square_of_the_schedule():
    pulls = []
    for schedule in (1.0, 0.5):
        before, after = stepped("cautious", schedule, gradient=0.0)
        pulls.append(float((before["mlp_bank"] - after["mlp_bank"]).norm()))
    assert math.isclose(pulls[0] / pulls[1], 4, rel_tol=1e-3)
