"XSA: the formula, its algebra, its place in the network, and what each miswiring would show."

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib import gpt
from speedrun_lib.gpt import build_model
from speedrun_lib.lean import split_heads
from speedrun_lib.offset_pairs import PAIRED_LAYERS
from speedrun_lib.optimizer import Optimizer, parameter_rules
from speedrun_lib.recipe import LADDER, SIZES, recipe_for
from speedrun_lib.smear import gated_heads
from speedrun_lib.xsa import XSA_LAYERS, exclude_self

WITH_ATTENTION = (0, 1, 2, 3, 4, 5, 7, 8, 9, 10)
WITH_TABLES = (1, 8, 10)  # XSA layers with a value embedding


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens(length=24, rows=1, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def network(rung="xsa"):
    "A fresh network at size nano."
    torch.manual_seed(0)
    return build_model(recipe_for(rung, "nano"), SIZES["nano"])


def spread(model):
    "Different strengths for all rows and heads, none of them zero; the rows of unused layers included."
    with torch.no_grad():
        model.xsa_alphas.copy_(torch.linspace(0.2, 1.5, model.xsa_alphas.numel()).view_as(model.xsa_alphas))
    return model


def one(y, v, alpha):
    "`exclude_self` for one head of one token, in fp64."
    y, v = (torch.tensor(x, dtype=torch.float64).view(1, 1, 1, -1) for x in (y, v))
    return exclude_self(y, v, torch.tensor([alpha], dtype=torch.float64)).flatten()


# ---- the formula


def test_oracle():
    wanted = torch.tensor([1.069915027, 1.860169946, -0.720339892, 0.639830054], dtype=torch.float64)
    torch.testing.assert_close(one([1, 2, -1, 0.5], [0.5, -1, 2, 1], 0.3), wanted, atol=5e-10, rtol=0)
    assert torch.tanh(torch.tensor(0.3, dtype=torch.float64)).item() == pytest.approx(0.2913126, abs=5e-8)


def test_written_out_for_each_token_and_head():
    y, v, alpha = normal(2, 5, 3, 4), normal(2, 5, 3, 4, seed=1), torch.tensor([0.5, -0.2, 3.0])
    out = exclude_self(y, v, alpha)
    for b in range(2):
        for t in range(5):
            for h in range(3):
                a, own = y[b, t, h], v[b, t, h]
                dot, squared = sum(a * own), sum(own * own)
                torch.testing.assert_close(out[b, t, h], a - torch.tanh(alpha[h]) * dot / squared * own)


@given(pair=st.integers(2, 9).flatmap(lambda k: st.tuples(*[st.lists(st.floats(-10, 10), min_size=k, max_size=k)] * 2)),
       alpha=st.floats(-5, 5))
@settings(deadline=None, max_examples=60)
def test_the_part_along_v_shrinks_and_the_rest_stays(pair, alpha):
    y, v = (torch.tensor(x, dtype=torch.float64) for x in pair)
    if v.norm() < 1e-3:
        return
    unit, out = v / v.norm(), one(*pair, alpha)
    left = 1 - torch.tanh(torch.tensor(alpha, dtype=torch.float64))
    torch.testing.assert_close(out @ unit, left * (y @ unit), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(out - (out @ unit) * unit, y - (y @ unit) * unit, atol=1e-9, rtol=1e-9)
    length = (y @ y - (1 - left**2) * (y @ unit) ** 2).clamp_min(0).sqrt()
    torch.testing.assert_close(out.norm(), length, atol=1e-6, rtol=1e-6)


@given(seed=st.integers(0, 10_000), alpha=st.floats(0, 20))
@settings(deadline=None, max_examples=30)
def test_nothing_grows_or_turns_over_for_positive_strengths(seed, alpha):
    y, v = normal(1, 4, 2, 8, seed=seed, dtype=torch.float64), normal(1, 4, 2, 8, seed=seed + 1, dtype=torch.float64)
    out = exclude_self(y, v, torch.full((2,), alpha, dtype=torch.float64))
    assert (out.norm(dim=-1) <= y.norm(dim=-1) + 1e-9).all()
    assert ((out * v).sum(-1) * (y * v).sum(-1) >= -1e-9).all(), "tanh stays below one: no overshoot"


def test_negative_strengths_add_and_at_most_double():
    for alpha in (-0.1, -1.0, -20.0):
        out = one([3.0, 4.0], [2.0, 0.0], alpha)
        assert 3 < out[0] <= 6 and out[1] == 4


@given(seed=st.integers(0, 10_000), factor=st.floats(0.01, 100))
@settings(deadline=None, max_examples=30)
def test_only_the_direction_of_v_counts(seed, factor):
    y, v, alpha = normal(1, 4, 2, 8, seed=seed), normal(1, 4, 2, 8, seed=seed + 1), normal(2, seed=seed + 2)
    out = exclude_self(y, v, alpha)
    torch.testing.assert_close(exclude_self(y, factor * v, alpha), out, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(exclude_self(y, -v, alpha), out, atol=1e-5, rtol=1e-5)


@given(seed=st.integers(0, 10_000), size=st.floats(-8, 3))
@settings(deadline=None, max_examples=40)
def test_the_algebra_of_record_86_is_the_same(seed, size):
    "Also where the clamp is active: 1e-8 on the square is 1e-4 on the length."
    y, v = normal(1, 4, 2, 8, seed=seed, dtype=torch.float64), normal(1, 4, 2, 8, seed=seed + 1, dtype=torch.float64)
    v, alpha = 10**size * v, normal(2, seed=seed + 2, dtype=torch.float64)
    removed = torch.tanh(alpha)[:, None] * (y * v).sum(-1, keepdim=True)
    rewritten = y - removed / v.square().sum(-1, keepdim=True).clamp_min(1e-8) * v
    torch.testing.assert_close(exclude_self(y, v, alpha), rewritten, atol=1e-12, rtol=1e-10)


def test_the_clamp_is_at_a_length_of_1e_4():
    for length, left in ((1e-3, 0.5), (2e-4, 0.5), (5e-5, 1 - 0.5 / 4), (1e-5, 1 - 0.5 / 100), (0.0, 1.0)):
        out = one([1.0, 1.0], [length, 0.0], 0.5493061443340549)  # tanh is one half
        torch.testing.assert_close(out, torch.tensor([left, 1.0], dtype=torch.float64))


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=20)
def test_it_commutes_with_the_gate_and_is_linear_in_y(seed):
    y, v, x = normal(1, 5, 3, 8, seed=seed), normal(1, 5, 3, 8, seed=seed + 1), normal(1, 5, 16, seed=seed + 2)
    gate_w, alpha = normal(3, 12, seed=seed + 3), normal(3, seed=seed + 4)
    torch.testing.assert_close(gated_heads(exclude_self(y, v, alpha), x, gate_w),
                               exclude_self(gated_heads(y, x, gate_w), v, alpha), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(exclude_self(2 * y + v, v, alpha),
                               2 * exclude_self(y, v, alpha) + exclude_self(v, v, alpha), atol=1e-5, rtol=1e-4)


def test_a_head_that_looks_at_itself_abstains():
    v = normal(1, 5, 2, 8)
    assert exclude_self(v, v, torch.full((2,), 20.0)).abs().max() < 1e-6
    other = normal(1, 5, 2, 8, seed=1)
    mixed = exclude_self(0.3 * other + 0.7 * v, v, torch.full((2,), 20.0))
    torch.testing.assert_close(mixed, 0.3 * exclude_self(other, v, torch.full((2,), 20.0)), atol=1e-6, rtol=1e-5)


def test_heads_and_tokens_do_not_mix():
    y, v, alpha = normal(1, 4, 3, 8), normal(1, 4, 3, 8, seed=1), torch.full((3,), 0.5)
    before = exclude_self(y, v, alpha)
    v2, alpha2 = v.clone(), alpha.clone()
    v2[0, 1, 2] = 1.0
    moved = (exclude_self(y, v2, alpha) != before).any(-1)[0].nonzero().tolist()
    alpha2[1] = 1.0
    assert moved == [[1, 2]]
    assert (exclude_self(y, v, alpha2) != before).any(-1).any((0, 1)).tolist() == [False, True, False]


def test_the_output_has_the_type_of_y_and_tanh_that_of_alpha():
    y, v, alpha = normal(1, 4, 3, 8).bfloat16(), normal(1, 4, 3, 8, seed=1).bfloat16(), normal(3, seed=2)
    out = exclude_self(y, v, alpha)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exclude_self(y.float(), v.float(), alpha), atol=0.05, rtol=0.05)
    alpha, ones = torch.linspace(-2, 2, 101), torch.ones(1, 1, 101, 1).bfloat16()  # bf16 would round alpha itself
    assert torch.equal(exclude_self(ones, ones, alpha).flatten(), 1 - torch.tanh(alpha).bfloat16())



def test_gradients():
    y, v = (normal(1, 3, 2, 4, seed=s, dtype=torch.float64).requires_grad_() for s in (0, 1))
    alpha = normal(2, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(exclude_self, (y, v, alpha))


# ---- in the network


def test_the_layers():
    "All with attention of their own heads: no attention in layer 6, pairs in 0, 2, 5 and 9."
    assert XSA_LAYERS == (1, 3, 4, 7, 8, 10)
    assert sorted((*XSA_LAYERS, *PAIRED_LAYERS, 6)) == list(range(11))


def test_parameters_and_rule():
    model = network()
    assert model.xsa_alphas.shape == (11, 4) and not model.xsa_alphas.any()
    new = dict(model.named_parameters()).keys() - dict(network("mudd").named_parameters()).keys()
    assert new == {"xsa_alphas"}
    rule = parameter_rules(model.recipe)["xsa_alphas"]
    assert (rule.rule, rule.lr, rule.decay, rule.betas) == ("adam", 1, 0, (0.9, 0.95))
    with torch.device("meta"):
        assert build_model(recipe_for("xsa"), SIZES["full"]).xsa_alphas.numel() == 66
    rung = next(rung for rung in LADDER if rung.name == "xsa")
    assert rung.changes == {"xsa": True} and rung.records == ("82",)


def test_nothing_changes_at_zero_and_something_does_at_another_strength():
    inputs = tokens()
    with torch.no_grad():
        before = network("mudd").logits(inputs)
        assert torch.equal(network().logits(inputs), before)
        assert not torch.allclose(spread(network()).logits(inputs), before, atol=1e-4)


def test_the_recipe_switches_it():
    model = spread(network())
    with torch.no_grad():
        changed = model.logits(tokens())
        model.recipe = dataclasses.replace(model.recipe, xsa=False)
        assert torch.equal(model.logits(tokens()), network("mudd").logits(tokens()))
        assert not torch.equal(model.logits(tokens()), changed)


@pytest.mark.parametrize("layer", range(11))
def test_a_row_moves_the_attention_of_its_layer_only(layer):
    inputs = tokens()
    with torch.no_grad():
        before, model = attention_outputs(network(), inputs), network()
        model.xsa_alphas[layer] = 0.7
        after = attention_outputs(model, inputs)
    first = [i for i in WITH_ATTENTION if not torch.equal(before[i], after[i])][:1]
    assert first == ([layer] if layer in XSA_LAYERS else [])


def attention_outputs(model, inputs):
    "What each layer's attention returns."
    seen = {}

    def watched(a_btd, layer, *rest):
        seen[layer] = type(model).attention(model, a_btd, layer, *rest)
        return seen[layer]

    model.attention = watched
    model.logits(inputs)
    del model.attention
    return seen


def test_only_six_rows_learn_and_from_the_first_step():
    model = network()
    model(tokens(), tokens(seed=1)).backward()
    moved = model.xsa_alphas.grad.abs()
    assert moved.amax(1).nonzero().flatten().tolist() == list(XSA_LAYERS)
    assert moved[list(XSA_LAYERS)].min() > 0, "every head"
    optimizer = Optimizer(model.recipe, model)
    optimizer.step_number = 1  # Adam steps every second time
    optimizer.step()
    assert model.xsa_alphas.detach().abs().amax(1).nonzero().flatten().tolist() == list(XSA_LAYERS)


def calls_of(model, inputs, monkeypatch, *documents):
    "Arguments of every call, and of the attention around it."
    calls, layers, current = [], [], []

    def recorded(y, v, alpha):
        calls.append((current[-1], y, v, alpha))
        return exclude_self(y, v, alpha)

    def watched(a_btd, layer, matrices, extra_v=None, gate_w=None, *rest):
        current.append(layer)
        bare = split_heads(a_btd, matrices[2], model.recipe.num_heads)
        out = type(model).attention(model, a_btd, layer, matrices, extra_v, gate_w, *rest)
        layers.append((layer, a_btd, bare, extra_v, gate_w, out))
        return out

    monkeypatch.setattr(gpt, "exclude_self", recorded)
    model.attention = watched
    with torch.no_grad():
        model.logits(inputs, *documents)
    del model.attention
    return calls, {layer: rest for layer, *rest in layers}


def test_own_values_are_those_that_attention_used(monkeypatch):
    "After the value embeddings of layers 1, 8 and 10 were added, in layer 10 with MUDD's part."
    model = spread(network())
    with torch.no_grad():
        model.mudd_b2[0, :3] = 2.0
    calls, layers = calls_of(model, tokens(), monkeypatch)
    assert [layer for layer, *_ in calls] == list(XSA_LAYERS)
    for layer, _, v, _ in calls:
        _, bare, extra_v, *_ = layers[layer]
        if layer in WITH_TABLES:
            torch.testing.assert_close(v, bare + extra_v)
            assert not torch.allclose(v, bare, atol=1e-3), "the table must count"
        else:
            assert extra_v is None
            torch.testing.assert_close(v, bare)


def test_y_is_what_attention_gathered_and_the_gate_comes_after(monkeypatch):
    model = spread(network())
    with torch.no_grad():
        model.attn_gate_bank.copy_(normal(*model.attn_gate_bank.shape))
    calls, layers = calls_of(model, tokens(), monkeypatch)
    for layer, y, v, alpha in calls:
        a, *_, gate_w, out = layers[layer]
        gate = torch.sigmoid(F.linear(a[..., :12], gate_w))[..., None]
        torch.testing.assert_close(out, exclude_self(y, v, alpha) * gate, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(y[:, 0], v[:, 0])  # the first token has nothing but itself to look at


def test_each_layer_has_its_own_row(monkeypatch):
    model = spread(network())
    for layer, _, _, alpha in calls_of(model, tokens(), monkeypatch)[0]:
        assert torch.equal(alpha, model.xsa_alphas[layer])


def test_the_first_token_is_shrunk_by_one_minus_tanh(monkeypatch):
    "At the first token y is v, so that the result is known without attention."
    model = spread(network())
    calls, layers = calls_of(model, tokens(), monkeypatch)
    for layer, _, v, alpha in calls:
        gate = 0.5  # gates of zeros
        torch.testing.assert_close(layers[layer][-1][0, 0], gate * (1 - torch.tanh(alpha))[:, None] * v[0, 0],
                                   atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rung", ["documents", "key_offset", "paired_heads"])
def test_wiring_holds_on_later_rungs(rung, monkeypatch):
    "Packed documents and paired heads: the same layers, and each token keeps its own values."
    model = spread(network(rung))
    borders, longest = torch.tensor([0, 10, 24, 24], dtype=torch.int32), torch.tensor(14, dtype=torch.int32)
    calls, layers = calls_of(model, tokens(), monkeypatch, borders, longest)
    assert [layer for layer, *_ in calls] == list(XSA_LAYERS)
    for layer, y, v, _ in calls:
        assert y.shape == v.shape == (1, 24, 4, 32)
        _, bare, extra_v, *_ = layers[layer]
        torch.testing.assert_close(v, bare if extra_v is None else bare + extra_v)
        torch.testing.assert_close(y[:, [0, 10]], v[:, [0, 10]])  # first tokens of documents
