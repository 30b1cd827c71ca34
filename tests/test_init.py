"Where weights start: padding, the uniform draw, which projections are zero on which rung, and what follows from it."

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib.gpt import build_model
from speedrun_lib.init import padded, uniform_weights
from speedrun_lib.lean import rms_norm
from speedrun_lib.recipe import SIZES, recipe_for
from tests.rungs import NAMES, depth

TOKENS = torch.randint(0, 257, (2, 25), generator=torch.Generator().manual_seed(0))
LATER = [name for name in NAMES[NAMES.index("open_vo"):] if depth(name, 2) == 2]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def nano(rung, layers=3, seed=0):
    torch.manual_seed(seed)
    return build_model(recipe_for(rung, "nano", {"num_layers": str(layers)}), SIZES["nano"])


def parts(model):
    "Stacks of one kind of matrix each."
    banks = {"qk": model.qk_bank, "vo": model.vo_bank, "mlp": model.mlp_bank}
    names = {"q": ("qk", 0), "k": ("qk", 1), "v": ("vo", 0), "o": ("vo", 1), "up": ("mlp", 0), "down": ("mlp", 1)}
    return {name: (banks[bank], first) for name, (bank, first) in names.items()}


def zeros(model):
    return {name for name, (bank, first) in parts(model).items() if not bank.detach()[first::2].any()}


def without_gradient(model):
    model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    return {name for name, (bank, first) in parts(model).items() if not bank.grad[first::2].any()}


# ---- the two functions


def test_padded_by_hand():  # spec 01 §1: 50257 -> 50304, 47 padded columns
    assert padded(50_257) == 50_304 == 393 * 128 and padded(257) == 384 and padded(384) == 384 and padded(1) == 128
    assert padded(50_257, 64) == 50_304 and padded(50_257, 1) == 50_257


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 10**6), multiple=st.integers(1, 1024))
def test_padded_is_the_next_multiple(size, multiple):
    assert padded(size, multiple) % multiple == 0 and 0 <= padded(size, multiple) - size < multiple


def test_uniform_weights_at_width_768():  # spec 00 §3: std = 0.5/sqrt(768), bound exactly 1/32
    torch.manual_seed(0)
    w = uniform_weights(4, 256, 768)
    assert w.shape == (4, 256, 768) and w.dtype == torch.float32
    assert 0.999 / 32 < w.abs().max() <= 1 / 32 and w.min() < -0.999 / 32
    assert w.std().item() == pytest.approx(0.5 / math.sqrt(768), rel=2e-3) and abs(w.mean()) < 1e-4
    flat = torch.histc(w, 8, -1 / 32, 1 / 32) / w.numel()
    assert torch.allclose(flat, torch.full((8,), 1 / 8), atol=2e-3), "uniform, not normal"


@pytest.mark.parametrize("columns", [16, 128, 1000])
def test_outputs_have_spread_one_half_at_any_width(columns):
    torch.manual_seed(0)
    out = rms_norm(torch.randn(200, columns)) @ uniform_weights(3, 400, columns).mT
    assert out.std().item() == pytest.approx(0.5, rel=0.02)


def test_uniform_weights_follow_the_global_seed():
    torch.manual_seed(3)
    first = uniform_weights(2, 3, 4)
    second = uniform_weights(2, 3, 4)
    torch.manual_seed(3)
    assert torch.equal(uniform_weights(2, 3, 4), first) and not torch.equal(first, second)


# ---- the rungs


def test_what_is_zero_on_which_rung():
    assert zeros(nano("relu2")) == set()
    assert zeros(nano("zero_init")) == {"o", "down"}
    for rung in LATER:
        assert zeros(nano(rung, layers=2)) == {"down"}, rung


@pytest.mark.parametrize("rung", ["zero_init", "open_vo"])
def test_random_matrices_are_drawn_by_the_rule(rung):
    model = nano(rung)
    for name, (bank, first) in parts(model).items():
        if name not in zeros(model):
            w = bank.detach()[first::2]
            assert w.std().item() == pytest.approx(0.5 / math.sqrt(128), rel=0.02), name
            assert w.abs().max() <= math.sqrt(3) * 0.5 / math.sqrt(128)
            assert not torch.equal(w[0], w[1]), "layers differ"


def test_a_zero_network_is_its_embedding():
    model = nano("zero_init")
    other = TOKENS.clone()
    other[:, 0] = (other[:, 0] + 1) % 257
    with torch.no_grad():
        logits = model.logits(TOKENS)
        assert torch.equal(logits[:, 1:], model.logits(other)[:, 1:]), "no token sees another before the first step"
        assert torch.allclose(logits, rms_norm(model.embed[TOKENS]) @ model.embed.T, atol=1e-5)
        assert not torch.equal(nano("open_vo").logits(TOKENS)[:, 1:], nano("open_vo").logits(other)[:, 1:])


def test_who_gets_a_gradient_at_the_first_step():
    assert without_gradient(nano("relu2")) == set()
    assert without_gradient(nano("zero_init")) == {"q", "k", "v", "up"}
    assert without_gradient(nano("open_vo")) == {"up"}


def test_everyone_gets_a_gradient_at_the_second_step():
    for rung in ("zero_init", "open_vo"):
        model = nano(rung)
        without_gradient(model)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.zero_grad()
        assert without_gradient(model) == set(), rung


def test_gradients_do_not_depend_on_depth_with_zero_projections():
    model = nano("zero_init", layers=11)
    without_gradient(model)
    for first, bank in ((1, model.vo_bank), (1, model.mlp_bank)):
        size = bank.grad[first::2].square().mean((1, 2)).sqrt()
        assert size.max() / size.min() < 1.4


# ---- the padded vocabulary


def test_padding_by_rung():
    assert len(nano("relu2").embed) == 257 and len(nano("zero_init").embed) == 384
    with torch.device("meta"):
        before, after = (build_model(recipe_for(rung), SIZES["full"]) for rung in ("relu2", "zero_init"))
    assert after.embed.shape == (50_304, 768)
    assert sum(p.numel() for p in after.parameters()) - sum(p.numel() for p in before.parameters()) == 47 * 768


def test_padded_columns_are_ordinary_logits():
    model = nano("zero_init")
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    z = model.logits(inputs).double()
    assert z.shape[-1] == 384
    wanted = (torch.logsumexp(z, -1) - z.gather(-1, targets[..., None])[..., 0]).mean()
    assert model(inputs, targets).item() == pytest.approx(wanted.item(), abs=1e-5), "they count in the softmax"


def test_the_first_loss_of_a_tied_zero_network():
    "Own score d * 0.02 = 15.36 at width 768: the untrained network repeats its input."
    torch.manual_seed(0)
    size = dataclasses.replace(SIZES["full"], vocab_size=5000)
    model = build_model(recipe_for("zero_init", "full", {"num_layers": "1", "seq_len": "32"}), size)
    inputs = torch.arange(0, 4000, 125).view(1, 32)
    with torch.no_grad():
        own = model.logits(inputs).gather(-1, inputs[..., None])
        loss = model(inputs, inputs + 1)
    assert own.mean().item() == pytest.approx(768 * 0.02, abs=0.2)
    assert loss.item() == pytest.approx(15.36, abs=0.5)
