"QK-norm: length, cosine, independence of the weights' size, and the bound on every score."

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import speedrun_lib.gpt as gpt
from speedrun_lib.gpt import GPT
from speedrun_lib.qk_norm import norm_queries_keys
from speedrun_lib.recipe import LADDER, SIZES, recipe_for
from speedrun_lib.rotary import rotary_frequencies, rotary_table, rotate
from tests.rungs import depth

NORMED = [r.name for r in LADDER if recipe_for(r.name).qk_norm]
ROWS = [name for name in NORMED if depth(name, 2) == 2]  # networks of two layers that read rows


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(rung, **overrides):
    torch.manual_seed(0)
    return GPT(recipe_for(rung, "nano", {"num_layers": "2", "seq_len": "32"} | overrides), SIZES["nano"])


def tokens(seed=0):
    return torch.randint(0, 257, (2, 33), generator=torch.Generator().manual_seed(seed))


def loss_of(model):
    batch = tokens()
    return model(batch[:, :-1], batch[:, 1:])


# ---- numeric oracle (specification 07, section 10: RMS of a constant row)


def test_rms_of_a_constant_row():
    "The epsilon is that of fp32; without one, or with a larger one, the small row would come out differently."
    small, ones = norm_queries_keys(torch.full((1, 1, 1, 128), 0.005), torch.ones(1, 1, 1, 128))
    assert {f"{v:.6f}" for v in small.flatten().tolist()} == {"0.997624"}
    assert (ones - 1).abs().max() < 1.2e-7  # 0.99999994 or 1, by torch release


# ---- the function


@settings(max_examples=40, deadline=None)
@given(head_dim=st.sampled_from([4, 32, 128]), size=st.floats(0.1, 1e4), seed=st.integers(0, 99))
def test_length_is_fixed_and_a_product_is_k_times_the_cosine(head_dim, size, seed):
    q, k = vectors(2, 2, 5, 3, head_dim, seed=seed)
    normed_q, normed_k = norm_queries_keys(size * q, k)
    assert torch.allclose(normed_q.norm(dim=-1), torch.tensor(head_dim**0.5), rtol=1e-3)
    assert torch.allclose(normed_k.norm(dim=-1), torch.tensor(head_dim**0.5), rtol=1e-3)
    cosine = F.cosine_similarity(q, k, dim=-1)
    assert torch.allclose((normed_q * normed_k).sum(-1), head_dim * cosine, atol=2e-3 * head_dim)


def test_every_head_and_every_token_has_its_own_norm():
    q, k = vectors(2, 2, 5, 3, 32)
    louder = q.clone()
    louder[0, 2, 1] *= 7
    assert torch.allclose(norm_queries_keys(louder, k)[0], norm_queries_keys(q, k)[0], atol=1e-5)


def test_queries_come_first_and_a_zero_vector_stays_zero():
    q, k = vectors(2, 1, 4, 2, 32)
    q[:, 0] = 0
    normed_q, normed_k = norm_queries_keys(q, k)
    assert not normed_q[:, 0].any() and normed_k[:, 0].any()
    assert torch.allclose(F.cosine_similarity(normed_k, k, dim=-1), torch.ones(1, 4, 2))


def test_norm_and_rotation_commute():
    q, k = vectors(2, 1, 20, 4, 32)
    tables = rotary_table(rotary_frequencies(32, 1024.0), 20)
    first = [rotate(y, *tables) for y in norm_queries_keys(q, k)]
    later = norm_queries_keys(*(rotate(y, *tables) for y in (q, k)))
    assert all(torch.allclose(a, b, atol=0.03) for a, b in zip(first, later, strict=True))


# ---- in the network


def test_the_size_of_query_and_key_matrices_does_not_matter():
    "Separately for queries and keys, and unlike on the rung before."
    for half in (slice(0, None, 2), slice(1, None, 2)):
        for rung, same in (("rotary", False), ("qk_norm", True)):
            model = net(rung)
            with torch.no_grad():
                before = loss_of(model)
                model.qk_bank[half] *= 10
                assert (abs(loss_of(model) - before).item() < 2e-5) == same, rung


def test_the_gradient_of_a_head_is_orthogonal_to_it():
    model = net("qk_norm")
    loss_of(model).backward()
    for w, grad in zip(model.qk_bank.detach(), model.qk_bank.grad, strict=True):
        w, grad = (m.unflatten(0, (4, -1)).flatten(1) for m in (w, grad))
        assert grad.norm(dim=1).min() > 0 and F.cosine_similarity(w, grad).abs().max() < 1e-3


@pytest.mark.parametrize("rung", ROWS)
def test_no_score_passes_the_bound(rung, monkeypatch):
    "Whatever the weights are; rotation and scale are what the softmax really gets."
    largest = []

    def spy(q, k, v, softmax_scale=None):
        assert softmax_scale == 0.48
        largest.append(softmax_scale * torch.einsum("bthk,bshk->bhts", q, k).abs().max())
        return torch.zeros_like(v)

    monkeypatch.setattr(gpt, "causal_attention", spy)
    model = net(rung)
    with torch.no_grad():
        model.qk_bank *= 1000
        bank = model.qk_bank.view(-1, 128, 128)
        bank[1::2] = bank[::2]  # keys equal to queries: each token matches itself perfectly
        model.logits(tokens()[:, :-1])
    assert len(largest) == 2
    for score in largest:
        assert 15.2 < score < 15.36 * 1.01  # bf16 tables change lengths by less than a percent


def test_without_norm_the_scale_is_one_over_root_k(monkeypatch):
    seen = []
    monkeypatch.setattr(gpt, "causal_attention", lambda q, k, v, scale=None: seen.append(scale) or v)
    net("rotary").logits(tokens()[:, :-1])
    assert seen == [None, None]


@pytest.mark.parametrize("size", list(SIZES))
def test_the_largest_score_is_the_same_at_every_size(size):
    for rung in NORMED:
        recipe = recipe_for(rung, size)
        head_dim = SIZES[size].model_dim / recipe.num_heads
        assert math.isclose(recipe.softmax_scale * head_dim, 12.8 if recipe.yarn else 15.36), rung
    assert recipe_for("rotary", "full").num_heads == 12 and recipe_for("qk_norm", "full").num_heads == 6


def test_wide_heads_and_norms_add_no_weights():
    with torch.device("meta"):
        models = [GPT(recipe_for(rung), SIZES["full"]) for rung in ("rotary", "qk_norm")]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [116_454_144] * 2
