"Multi-token prediction: the specification's numbers, what the loss keeps and drops, and where the network uses it."

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib.gpt import build_model
from speedrun_lib.logits import softcap
from speedrun_lib.mtp import mtp_losses, mtp_weights, stage_at, stage_bounds
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.train import World, forward, set_step, train_step

CPU = World(0, 1, torch.device("cpu"))
SHOWN = torch.tensor([1, 0.5, 0.25], dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(rows, length, high, seed=0):
    return torch.randint(0, high, (rows, length), generator=torch.Generator().manual_seed(seed))


def by_hand(z, targets, weights):
    "Values of the loss, position by position."
    rows, length = targets.shape
    out = torch.zeros(rows, length, dtype=z.dtype)
    for b in range(rows):
        for t in range(length):
            for k, weight in enumerate(weights):
                if t + k < length:
                    out[b, t] += weight * -z[b, t].log_softmax(-1)[targets[b, t + k]]
    return out


def toy():
    "The specification's toy: raw scores (4, 8) that carry a gradient, targets."
    j, i = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(8.0, dtype=torch.float64)
    return (0.5 * i - 0.3 * j + 0.1 * i * j).requires_grad_(), torch.tensor([[3, 1, 1, 6]])


def close(a, b, digits):
    torch.testing.assert_close(a, torch.tensor(b, dtype=a.dtype), atol=0.51 * 10**-digits, rtol=0)


# ---- the specification's numbers


def test_oracle_toy_losses_and_gradients():
    "Section 9: the cap comes first; rows 0 and 1 are the exact derivative, rows 2 and 3 are not."
    raw, targets = toy()
    losses = mtp_losses(softcap(raw)[None], targets, SHOWN)[0]
    close(losses, [4.793929207, 5.420445831, 4.348059977, 1.405153623], 9)
    close(losses.sum(), 15.967588638, 9)
    grad = torch.autograd.grad(losses.sum(), raw)[0]
    close(grad[0], [0.0380331, -0.4518837, 0.0710709, -0.5432834, 0.1275033, 0.1680548, 0.2190735, 0.2824031], 7)
    close(grad[3], [0.0144215, 0.0245040, 0.0406613, 0.0657725, 0.1035615, 0.1585570, -0.3135543, 0.3409121], 7)
    exact = torch.autograd.grad(by_hand(softcap(raw)[None], targets, SHOWN).sum(), raw)[0]
    torch.testing.assert_close(grad[:2], exact[:2])
    assert (grad[2:] - exact[2:]).abs().amax(1).min() > 1e-2


@pytest.mark.parametrize(("step", "expected"), [
    (0, [1, 0.5, 0.25]), (1, [1, 0.5, 0.249454]), (100, [1, 0.5, 0.195415]), (300, [1, 0.5, 0.086245]),
    (457, [1, 0.5, 0.000546]), (458, [1, 0.5]), (549, [1, 0.400871]), (550, [1, 0.399782]), (551, [1, 0.398693]),
    (700, [1, 0.236383]), (916, [1, 0.001089]), (917, [1]), (1000, [1]), (1374, [1]), (1375, [1]), (1384, [1])])
def test_oracle_weights_of_record_82(step, expected):
    assert [round(w, 6) for w in mtp_weights(step, 1375)] == expected


@pytest.mark.parametrize(("step", "expected"), [(549, 0.351415), (700, 0.173349), (846, 0.001179)])
def test_oracle_weights_of_record_89(step, expected):
    assert [round(w, 6) for w in mtp_weights(step, 1270)] == [1, expected]


def test_oracle_borders():
    "Section 6; the middle border is the split step, made odd."
    assert stage_bounds(1375) == (458, 917, 1375) and stage_bounds(1270) == (423, 847, 1270)


# ---- stages

lengths = st.integers(3, 20_000)


@given(steps=lengths, at=st.floats(0, 1.2))
def test_stages_are_thirds_and_follow_each_other(steps, at):
    step = int(at * steps)
    stage, done = stage_at(step, steps)
    assert 0 <= done < 1 and stage == sum(step >= border for border in stage_bounds(steps))
    assert abs(stage_bounds(steps)[0] - steps / 3) <= 0.5 and abs(stage_bounds(steps)[1] - 2 * steps / 3) <= 0.5
    if step:
        before = stage_at(step - 1, steps)
        assert before < (stage, done) or stage == 3, "time moves on"


@given(steps=lengths, at=st.floats(0, 1.2))
def test_weights_fade_and_the_next_token_keeps_its_own(steps, at):
    step = int(at * steps)
    now, later = mtp_weights(step, steps), mtp_weights(step + 1, steps)
    assert now[0] == 1 and all(a > b > 0 for a, b in zip(now, now[1:], strict=False))
    assert len(now) == max(1, 3 - stage_at(step, steps)[0])
    assert all(b <= a for a, b in zip(now, later + [0, 0], strict=False)), "no weight ever grows"
    assert sum(now) - sum(later) <= 0.5 / max(1, steps // 3) + 1e-9, "and none jumps"


# ---- the loss


@given(rows=st.integers(1, 3), length=st.integers(3, 9), seed=st.integers(0, 500),
       weights=st.lists(st.floats(0.01, 2), min_size=1, max_size=3))
@settings(deadline=None, max_examples=25)
def test_values_position_by_position(rows, length, seed, weights):
    z, targets = 3 * normal(rows, length, 11, seed=seed), tokens(rows, length, 11, seed)
    w = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(mtp_losses(z, targets, w), by_hand(z, targets, weights))


@given(length=st.integers(3, 9), seed=st.integers(0, 500), weights=st.lists(st.floats(0.01, 2), min_size=1, max_size=3))
@settings(deadline=None, max_examples=25)
def test_gradients_are_full_weight_softmax_minus_the_targets_that_exist(length, seed, weights):
    z, targets = normal(2, length, 7, seed=seed).requires_grad_(), tokens(2, length, 7, seed)
    grad = torch.autograd.grad(mtp_losses(z, targets, torch.tensor(weights, dtype=torch.float64)).sum(), z)[0]
    expected = sum(weights) * z.detach().softmax(-1)
    for k, weight in enumerate(weights):
        expected[:, : length - k] -= weight * F.one_hot(targets[:, k:], 7)
    torch.testing.assert_close(grad, expected)


def test_one_weight_is_the_plain_loss_and_zero_weights_change_nothing():
    z, targets = normal(2, 8, 11).requires_grad_(), tokens(2, 8, 11)
    plain = F.cross_entropy(z.mT, targets, reduction="none")
    for weights in ([1.0], [1.0, 0.0], [1.0, 0.0, 0.0]):
        losses = mtp_losses(z, targets, torch.tensor(weights, dtype=torch.float64))
        torch.testing.assert_close(losses, plain)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), z, retain_graph=True)[0] for x in (losses, plain)))


def test_rows_of_a_batch_do_not_lend_each_other_targets():
    z, targets = normal(2, 6, 11), tokens(2, 6, 11)
    changed = targets.clone()
    changed[1] = (changed[1] + 1) % 11
    assert torch.equal(mtp_losses(z, targets, SHOWN)[0], mtp_losses(z, changed, SHOWN)[0])
    changed = targets.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 11
    same = mtp_losses(z, targets, SHOWN)[0] == mtp_losses(z, changed, SHOWN)[0]
    assert same.tolist() == [False, *[True] * 5], "the first token of a row is asked for once, not again at its end"


@given(p=st.lists(st.lists(st.floats(0.01, 1), min_size=5, max_size=5), min_size=3, max_size=3))
@settings(deadline=None, max_examples=25)
def test_the_best_answer_is_the_mixture_and_costs_at_most_ln_of_the_weights(p):
    p = torch.tensor(p, dtype=torch.float64)
    p /= p.sum(1, keepdim=True)
    z = (SHOWN @ p / SHOWN.sum()).log().requires_grad_()
    loss = sum(w * F.cross_entropy(z, row) for w, row in zip(SHOWN, p, strict=True))
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-12
    cost = (p[0] * (p[0].log() - z.detach())).sum()
    assert -1e-12 <= cost <= math.log(1.75) + 1e-12


# ---- in the network


def nano(rung="mtp"):
    torch.manual_seed(0)
    return build_model(recipe_for(rung, "nano"), SIZES["nano"])


@pytest.mark.parametrize(("step", "weights"), [(0, [1, 0.5, 0.25]), (20, [1, 0.5, 0.125]), (60, [1, 0.25]), (80, [1])])
def test_training_is_the_weighted_sum_of_its_step_and_validation_the_plain_mean(step, weights):
    model, x, y = nano(), tokens(2, 24, 257), tokens(2, 24, 257, seed=1)
    model.at_step(step)
    assert model.mtp_weights.tolist() == [*weights, 0, 0][:3]
    with torch.no_grad():
        z = model.logits(x)
        plain = F.cross_entropy(z.flatten(0, 1), y.flatten())
        trained = model.train()(x, y)
        torch.testing.assert_close(trained, by_hand(z, y, weights).sum(), atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(model.eval()(x, y), plain)
        assert (trained - 48 * plain).abs() < 1e-2 if step == 80 else trained > 1.2 * 48 * plain


def test_only_the_loss_changes():
    "The rung before has the same parameters and logits, and the mean in training."
    model, before, x, y = nano(), nano("bigram"), tokens(2, 24, 257), tokens(2, 24, 257, seed=1)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in before.named_parameters()}
    with torch.no_grad():
        assert torch.equal(model.logits(x), before.logits(x))
        torch.testing.assert_close(before(x, y), model.eval()(x, y))


def test_the_network_has_the_records_gradient_in_the_last_rows():
    model, x, y = nano(), tokens(1, 6, 257), tokens(1, 6, 257, seed=1)
    seen = []
    logits = model.logits

    def watched(*args):
        z = logits(*args)
        z.register_hook(seen.append)
        return z

    model.logits = watched
    model(x, y).backward()
    torch.testing.assert_close(seen[0][0].sum(-1), torch.tensor([0, 0, 0, 0, 0.25, 0.75]), atol=1e-4, rtol=0)


def test_the_loop_sets_the_weights_and_averages_parts():
    recipe = recipe_for("mtp", "nano")
    model, x, y = nano(), tokens(2, 24, 257), tokens(2, 24, 257, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    set_step(60, model, optimizer, None, recipe)
    assert model.mtp_weights.tolist() == [1, 0.5 * 0.5, 0]
    per_token = forward(model, (x, y), recipe, CPU).item() / 48
    optimizer.due, optimizer.step = list, lambda: None
    assert math.isclose(train_step(model, optimizer, [(x, y)], recipe, CPU).item(), per_token, rel_tol=1e-6)
    one = model.lm_head.grad.clone()
    model.zero_grad()
    logged = train_step(model, optimizer, [(x, y), (x, y)], recipe, CPU).item()
    torch.testing.assert_close(model.lm_head.grad, one)
    assert math.isclose(logged, per_token, rel_tol=1e-6), "the log shows the weighted loss of a token"
    torch.testing.assert_close(one, torch.autograd.grad(model(x, y), model.lm_head)[0])
