"Two speeds and one shared table: when what moves, what the embedding inherits, and the original's numbers."

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import speedrun_lib.optimizer as used
from speedrun_lib.optimizer import Optimizer, adam_update, parameter_rules
from speedrun_lib.recipe import recipe_for
from speedrun_lib.two_speeds import split_step, transposed_state

HEAD_BETAS = (0.5, 0.95)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the split


@pytest.mark.parametrize("steps, step, counter, updates, total",
                         [(1375, 917, 459, 692, 1385), (1270, 847, 424, 642, 1285)])
def test_split_of_the_records(steps, step, counter, updates, total):
    "Numeric oracle: spec 07, section 6."
    assert split_step(steps) == step
    assert sum(s % 2 for s in range(step + 1)) == counter and sum(s % 2 for s in range(total)) == updates


@given(steps=st.integers(3, 10**6))
def test_the_split_is_an_odd_step_near_two_thirds(steps):
    assert split_step(steps) % 2 == 1, "tables step on odd steps only"
    assert abs(split_step(steps) - 2 * steps / 3) <= 1.5


def head_state(updates=3, seed=0):
    state, generator = {}, torch.Generator().manual_seed(seed)
    for _ in range(updates):
        adam_update(torch.randn(4, 6, generator=generator), state, 1.0, HEAD_BETAS)
    return state


def test_the_embedding_goes_on_as_the_head_would():
    state = head_state()
    copy, grad = transposed_state(state), torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    assert set(copy) == set(state) and copy["step"] == 3 and copy["exp_avg"].shape == (6, 4)
    for _ in range(3):
        ours, theirs = adam_update(grad.T, copy, 1.0, HEAD_BETAS), adam_update(grad, state, 1.0, HEAD_BETAS)
        torch.testing.assert_close(ours, theirs.T)


def test_after_the_split_the_states_are_independent():
    state = head_state()
    copy = transposed_state(state)
    before = {key: value.clone() for key, value in copy.items()}
    adam_update(torch.ones(4, 6), state, 1.0, HEAD_BETAS)
    assert all(torch.equal(copy[key], before[key]) for key in copy) and state["step"] == 4


def test_what_is_lost_without_moments_or_counter():
    small = torch.full((4, 6), 1e-3)
    good = adam_update(small.T, transposed_state(head_state(400)), 1.0, HEAD_BETAS)
    empty = adam_update(small.T, {}, 1.0, HEAD_BETAS)
    torch.testing.assert_close(empty, torch.ones(6, 4), atol=1e-4, rtol=0)
    forgotten = transposed_state(head_state(400)) | {"step": torch.zeros(())}
    ratio = adam_update(small.T, forgotten, 1.0, HEAD_BETAS) / good
    torch.testing.assert_close(ratio, torch.full((6, 4), math.sqrt(0.05) / 0.5), atol=1e-4, rtol=0)


# ---- two speeds


def test_betas_of_head_and_embedding():
    rules = parameter_rules(recipe_for("two_speeds"))
    assert rules["lm_head"].betas == rules["embed"].betas == HEAD_BETAS
    assert parameter_rules(recipe_for("cautious"))["embed"].betas == (0.9, 0.95)


def test_adam_does_not_notice_whether_gradients_are_summed_or_averaged():
    grad = torch.randn(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(*(adam_update(scale * grad, {}, 1.0, HEAD_BETAS) for scale in (1, 2)), rtol=1e-5, atol=0)


def shares(beta1, updates=220):
    "Updates of a weight whose gradient is one at update 20 and zero else."
    state = {}
    return [adam_update(torch.tensor([float(t == 20)]), state, 1.0, (beta1, 0.95)).item() for t in range(updates)]


@pytest.mark.parametrize("beta1", [0.5, 0.7, 0.9])
def test_a_short_memory_moves_a_rare_row_at_once(beta1):
    moves = shares(beta1)
    assert sum(moves[:20]) == 0
    assert abs(moves[20] / sum(moves) - (1 - beta1 / math.sqrt(0.95))) < 0.02


def test_adam_with_the_betas_of_the_head():
    "Numeric oracle: spec 07, section 4, row lm_head, without its decay (at most 4.8e-5 of a weight of one)."
    p, state = torch.tensor([1, -1, 0.5, 0]), {}
    for grad, expected in (([0.1, 0.1, -0.2, 1e-9], [0.99195200, -1.00800002, 0.50800002, -0.00552786]),
                           ([-0.3, 0.1, 0.2, 0], [0.99785459, -1.01600003, 0.50530899, -0.00814676]),
                           ([0, 0, 0, 0], [1.00099361, -1.02025449, 0.50386655, -0.00952824])):
        p = p - adam_update(torch.tensor(grad), state, 0.008, HEAD_BETAS)
        torch.testing.assert_close(p, torch.tensor(expected), atol=8e-5, rtol=0)
    assert abs(p[3] + 0.00952824) < 1e-7 and abs(p[1] + 1.02025449) < 1e-6, "no decay here: to the printed digits"


# ---- the original's run, element by element (spec 07, section 17): Adam works on each element alone


def hashed(n, i):
    "The fill of spec 07, section 13: a number in [-1, 1)."
    s = (747796405 * i + 2891336453 * n + 12345) % 2**32
    w = (277803737 * ((s >> ((s >> 28) + 4)) ^ s)) % 2**32
    return 2 * ((w >> 22) ^ w) / 2**32 - 1


PLACES = [(0, 438), (500, 47)]  # rows and columns of the head, which is 768 x 512 there
FACTORS = [1, 1, 1] + [1.52 * (1 - t) + 0.15 * t for t in (0, 1 / 6, 1 / 3)]
FACTORS += [1.73 * (1 - t) + 0.15 * t for t in (1 / 2, 2 / 3, 5 / 6)] + [0.15] * 3
EXPECTED = {  # step: head elements, embedding elements
    0: ([-0.012451172, 0.0050964355], [-0.012451172, 0.0050964355]),
    1: ([-0.020507812, -0.0028991699], [-0.020507812, -0.0028991699]),
    7: ([-0.006072998, -0.028686523], [-0.006072998, -0.028686523]),
    11: ([-0.0056152344, -0.029907227], [-0.0054626465, -0.029907227]),
}


class Tables(nn.Module):
    "Two elements of the head and of the embedding, as parameters of their own."

    def __init__(self):
        super().__init__()
        start = torch.tensor([[0.02 * hashed(1, r * 512 + c) for r, c in PLACES]])
        self.lm_head = nn.Parameter(start.bfloat16())
        self.embed = nn.Parameter(start.bfloat16().T.contiguous())


def original_run():
    "Head and embedding elements after each of twelve steps, of which nine are scheduled."
    recipe = recipe_for("late_split", "full", {"steps": "9"})
    model = Tables()
    optimizer = Optimizer(recipe, model)
    found = []
    for step, factor in enumerate(FACTORS):
        for group in optimizer.param_groups:
            group["lr"] = 0.008 * factor
        number = 1000 + 100 * step
        head = torch.tensor([hashed(number + 1, r * 512 + c) / 64 for r, c in PLACES])
        embed = torch.tensor([hashed(number + 2, c * 768 + r) / 64 for r, c in PLACES])
        for p, grad in ((model.lm_head, head), (model.embed, embed)):
            grad = grad.bfloat16().view(p.shape)
            p.grad = grad if p.grad is None else p.grad + grad
        optimizer.step_number = step
        optimizer.step()
        found.append((model.lm_head.detach().flatten().tolist(), model.embed.detach().flatten().tolist()))
    return found


def agrees(found):
    return {step: all(math.isclose(a, b, rel_tol=1e-6) for ours, theirs in zip(found[step], expected, strict=True)
                      for a, b in zip(ours, theirs, strict=True)) for step, expected in EXPECTED.items()}


def test_elements_of_the_original_run():
    assert abs(FACTORS[6] - 0.94) < 1e-9 and abs(FACTORS[7] - 0.6766667) < 1e-6, "the schedule of section 16"
    assert agrees(original_run()) == {0: True, 1: True, 7: True, 11: True}


@pytest.mark.parametrize("fault", ["state lost", "every step", "tied gradient lost", "split two steps late"])
def test_faults_are_seen(fault, monkeypatch):
    if fault == "state lost":
        monkeypatch.setattr(used, "transposed_state", lambda state: {})
    elif fault == "every step":
        monkeypatch.setattr(Optimizer, "due", lambda self: self.param_groups)
    elif fault == "split two steps late":
        monkeypatch.setattr(used, "split_step", lambda steps: 9)
    else:
        step = Optimizer.step

        def without_lookups(self):
            if self.step_number <= 7:
                self.params["embed"].grad.zero_()
            step(self)

        monkeypatch.setattr(Optimizer, "step", without_lookups)
    assert not all(agrees(original_run()).values())
