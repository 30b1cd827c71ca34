"MUDD: the formulas, the start, and each of the nineteen coefficients on its own wire of the real network."

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib import gpt
from speedrun_lib.bigram import bigram_rows
from speedrun_lib.gpt import build_model
from speedrun_lib.lean import rms_norm
from speedrun_lib.logits import softcap
from speedrun_lib.mudd import MUDD_SCALE, initial_mudd_bias, last_layer_inputs, mudd_coefficients
from speedrun_lib.optimizer import Optimizer, parameter_rules
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.relu2 import relu2_mlp
from speedrun_lib.value_embeds import value_rows

WIRES = [(0, i) for i in range(14)] + [(1, i) for i in range(5)]  # block and place of every coefficient
EVERY_WIRE = pytest.mark.parametrize(("block", "place"), WIRES, ids=[f"{'mn'[b]}{i}" for b, i in WIRES])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(length=16, rows=1, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def network(rung="mudd"):
    "The network of a rung at size nano with fresh weights."
    torch.manual_seed(0)
    return build_model(recipe_for(rung, "nano"), SIZES["nano"])


def woken():
    "The network in fp64, with everything that starts at zero or equal moved away, lambdas included."
    model = network().double()
    with torch.no_grad():
        for seed, (name, p) in enumerate(model.named_parameters()):
            noise = normal(*p.shape, seed=seed)
            p += {"mudd_w2": 0.5, "mudd_b2": 3.0, "bigram_embed": 1.0, "value_embeds": 0.5}.get(name, 0.05) * noise
    return model


def watched(model, inputs):
    "Calls of the functions around the last layer: arguments and results by name; and the logits."
    seen = {name: [] for name in ("rms_norm", "mudd_coefficients")}

    def attention(*args):
        seen["attention"] = args  # the last call is layer 10
        return type(model).attention(model, *args)

    def watch(name, function):
        def inner(*args):
            out = function(*args)
            seen[name].append((args, out))
            return out
        return inner

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name in list(seen):
            patch.setattr(gpt, name, watch(name, getattr(gpt, name)))
        model.attention = attention
        seen["logits"] = model.logits(inputs)
        del model.attention
    # the norm sees: embedding, then the inputs of attention and MLP of layers 0 to 5, MLP 6, both of 7 to 10, head
    streams = [args[0] for args, _ in seen["rms_norm"]]
    assert len(streams) == 23
    seen |= {"x0": seen["rms_norm"][0][1], "c0": streams[1], "c3": streams[9], "c7": streams[16],
             "c9": seen["mudd_coefficients"][0][0][0], "c10": seen["mudd_coefficients"][1][0][0]}
    return seen


def hand(w1, w2, bias, x):
    "Coefficients (b, t, n) with the exact GELU, from the specification."
    h = x @ w1.T
    h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    return (h @ w2.T + bias) * 0.1


@torch.no_grad()
def by_hand(model, inputs, seen, mixed_from_new=False, injected="c0"):
    "Layer 10 and the head, from the specification and the states that the network went through before."
    c0, c3, c7, x = (seen[name] for name in ("c0", "c3", "c7", "c9"))
    c9, heads = x, model.recipe.num_heads
    pairs = model.bigram_embed[bigram_rows(inputs, model.recipe.bigram_size)]
    tables = value_rows(model.value_embeds, inputs)
    m = [c[..., None] for c in hand(model.mudd_w1[0], model.mudd_w2[0], model.mudd_b2[0], x).unbind(-1)]
    new = (1 + m[5]) * x + m[3] * c0 + m[4] * c7
    v_mudd = m[0] * c0 + m[1] * c7 + m[2] * (new if mixed_from_new else x)
    half = x.shape[-1] // 2
    table = torch.cat([m[6] * tables[4][..., :half], m[7] * tables[4][..., half:]], -1)
    extra_v = (table + v_mudd).unflatten(-1, (heads, -1))
    qk, vo, s = model.qk_bank.view(-1, *model.vo_bank.shape[1:]), model.vo_bank, model.scalars
    matrices = tuple(s[20] * w for w in (qk[18], qk[19], vo[18]))
    y = model.attention(rms_norm(c7), 10, matrices, extra_v, model.attn_gate_bank[9])
    x = m[8] * new + m[9] * F.linear(y.flatten(2), s[21] * vo[19]) + m[10] * seen[injected] + m[11] * pairs
    x = m[12] * x + m[13] * relu2_mlp(rms_norm(x), up_w=model.mlp_bank[20], down_w=model.mlp_bank[21])
    n = [c[..., None] for c in hand(model.mudd_w1[1], model.mudd_w2[1, :5], model.mudd_b2[1, :5], x).unbind(-1)]
    x = x + n[0] * c0 + n[1] * c7 + n[2] * c9 + n[3] * tables[0] + n[4] * c3
    return softcap(rms_norm(x) @ model.lm_head)


# ---- formulas


def test_biases_of_the_specification():
    bias = initial_mudd_bias()
    assert bias.shape == (2, 14)
    root = 1.1**0.5 / 0.1
    torch.testing.assert_close(bias[0], torch.tensor([0.0] * 6 + [20, 20, root, 10, 0, 0.5, root, 10]))
    torch.testing.assert_close(bias[1], torch.tensor([0.0, -5] + [0.0] * 12))


def test_bf16_biases_give_the_bf16_factors():
    bias = initial_mudd_bias().bfloat16()
    assert bias[0, 8] == 10.5 and (bias * MUDD_SCALE)[0, 8] == torch.tensor(1.1**0.5).bfloat16() == 1.046875
    assert (bias * MUDD_SCALE)[0, 6] == 2 and (bias * MUDD_SCALE)[1, 1] == -0.5
    x, w1, w2 = normal(1, 3, 8).bfloat16(), normal(64, 8).bfloat16(), torch.zeros(14, 64).bfloat16()
    m = mudd_coefficients(x, w1, w2, bias[0])
    assert all(c.dtype == torch.bfloat16 and c.shape == (1, 3, 1) for c in m) and m[8].unique().tolist() == [1.046875]


def test_coefficients_written_out():
    x, w1, w2, bias = normal(2, 3, 8), normal(5, 8, seed=1), normal(4, 5, seed=2), normal(4, seed=3)
    m = mudd_coefficients(x, w1, w2, bias)
    assert len(m) == 4
    for b, t, n in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        total = float(bias[n])
        for k in range(5):
            h = float(w1[k] @ x[b, t])
            total += float(w2[n, k]) * h * 0.5 * (1 + math.erf(h / math.sqrt(2)))
        assert m[n][b, t].item() == pytest.approx(0.1 * total, abs=1e-5)


@given(seed=st.integers(0, 1000), at=st.integers(0, 5))
@settings(deadline=None, max_examples=20)
def test_a_coefficient_reads_its_own_token_only(seed, at):
    x, w1, w2, bias = normal(1, 6, 8, seed=seed), normal(5, 8, seed=1), normal(4, 5, seed=2), normal(4, seed=3)
    changed = x.clone()
    changed[0, at] += 1
    old, new = (torch.cat(mudd_coefficients(states, w1, w2, bias), -1) for states in (x, changed))
    assert (old != new).any(-1)[0].nonzero().flatten().tolist() == [at]


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_an_output_matrix_of_zeros_leaves_the_biases(seed):
    m = mudd_coefficients(10 * normal(2, 5, 8, seed=seed), normal(5, 8), torch.zeros(14, 5), initial_mudd_bias()[0])
    torch.testing.assert_close(torch.cat(m, -1), (0.1 * initial_mudd_bias()[0]).expand(2, 5, 14))


def test_last_layer_with_round_numbers():
    one = torch.ones(1, 1, 4)
    m = [torch.full((1, 1, 1), float(c)) for c in (3, 2, 4, 5, 6, 7, 1, 8)]
    values, stream = last_layer_inputs(m, one, 10 * one, 100 * one, 1000 * one, num_heads=4)
    assert values.shape == (1, 1, 4, 1) and values.flatten().tolist() == [1234, 1234, 8234, 8234]
    assert stream.flatten().tolist() == [658] * 4


@given(heads=st.sampled_from([2, 4, 6]), k=st.integers(1, 4), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=15)
def test_the_first_gate_serves_the_first_half_of_the_heads(heads, k, seed):
    zero, ve = torch.zeros(1, 3, heads * k), normal(1, 3, heads * k, seed=seed)
    m = [torch.zeros(1, 3, 1)] * 6 + [normal(1, 3, 1, seed=seed + 1), normal(1, 3, 1, seed=seed + 2)]
    values, stream = last_layer_inputs(m, zero, zero, zero, ve, heads)
    for h in range(heads):
        gate = m[6] if h < heads // 2 else m[7]
        torch.testing.assert_close(values[:, :, h], gate * ve[..., h * k : (h + 1) * k])
    assert not stream.any()


# ---- parameters


def test_parameters_their_start_and_their_rules():
    model, before = network(), dict(network("mtp").named_parameters())
    new = {name: p for name, p in model.named_parameters() if name not in before}
    assert {name: tuple(p.shape) for name, p in new.items()} == {
        "mudd_w1": (2, 64, 128), "mudd_w2": (2, 14, 64), "mudd_b2": (2, 14)}
    assert before.keys() - dict(model.named_parameters()).keys() == {"backout_lambda"}
    bound = 128**-0.5
    assert 0.98 * bound < model.mudd_w1.abs().max() <= bound
    assert abs(model.mudd_w1.std() - bound / 3**0.5) < 0.02 * bound, "uniform"
    assert not model.mudd_w2.any() and torch.equal(model.mudd_b2, initial_mudd_bias())
    rules = parameter_rules(model.recipe)
    for name, decay in (("mudd_w1", 1), ("mudd_w2", 1), ("mudd_b2", 0)):
        rule = rules[name]
        assert (rule.rule, rule.lr, rule.betas, rule.decay) == ("adam", 0.25, (0.9, 0.99), decay)
    full = recipe_for("mudd")
    assert full.adam_lr * rules["mudd_w1"].lr == 0.002
    with torch.device("meta"):
        sizes = dict(build_model(full, SIZES["full"]).named_parameters())
    assert [sizes[name].numel() for name in new] == [98_304, 1_792, 28]


# ---- start


def pair_at_the_start():
    "The networks before and with MUDD, their tables and MLPs moved away from zero alike."
    pair = network("mtp"), network()
    with torch.no_grad():
        for model in pair:
            for seed, name in enumerate(("mlp_bank", "bigram_embed", "value_embeds", "attn_gate_bank")):
                p = model.get_parameter(name)
                p += 0.05 * normal(*p.shape, seed=seed)
    return pair


@torch.no_grad()
def test_the_start_is_the_network_without_mudd_up_to_the_value_gate_and_bf16_factors():
    before, model = pair_at_the_start()
    old = before.logits(tokens())
    assert 1e-4 < (model.logits(tokens()) - old).abs().max() < 1e-2, "the gates of two show, but little"
    model.mudd_b2[0, 6:8] = 10  # gates of one, like 2 * sigmoid(0)
    assert (model.logits(tokens()) - old).abs().max() > 2e-5, "rounding of static factors to bf16 still shows"
    factor, share = torch.tensor([1.1**0.5, 0.05]).bfloat16().float() / MUDD_SCALE
    model.mudd_b2[0, 8], model.mudd_b2[0, 12], model.mudd_b2[0, 11] = factor, factor, share
    torch.testing.assert_close(model.logits(tokens()), old, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("place", range(6, 14))
def test_each_bias_of_the_start_matters(place):
    "With any of them at zero the start is another network; place 10 starts at zero."
    _, model = pair_at_the_start()
    old = model.logits(tokens())
    model.mudd_b2[0, place] = 1.0 if place == 10 else 0.0
    assert (model.logits(tokens()) - old).abs().max() > 1e-4


@torch.no_grad()
def test_the_backout_became_a_bias():
    before, model = pair_at_the_start()
    model.mudd_b2[0, 6:8] = 10
    before.backout_lambda.fill_(0.2)
    assert (model.logits(tokens()) - before.logits(tokens())).abs().max() > 1e-3
    model.mudd_b2[1, 1] = -2
    torch.testing.assert_close(model.logits(tokens()), before.logits(tokens()), atol=1e-3, rtol=0)


# ---- wires


def test_the_last_layer_and_the_head_are_the_specification():
    model, inputs = woken(), tokens(rows=2)
    seen = watched(model, inputs)
    m, n = (torch.cat(out, -1).flatten(0, 1) for _, out in seen["mudd_coefficients"])
    assert m.shape[1] == 14 and n.shape[1] == 5 and m.std(0).min() > 0.01 and n.std(0).min() > 0.01
    torch.testing.assert_close(by_hand(model, inputs, seen), seen["logits"], atol=1e-9, rtol=1e-9)


@EVERY_WIRE
def test_each_bias_acts_where_the_specification_says(block, place):
    model, inputs = woken(), tokens()
    old = watched(model, inputs)
    with torch.no_grad():
        model.mudd_b2[block, place] += 4
        new = model.logits(inputs)
        moved = (new - old["logits"]).abs().max()
        assert moved > 1e-3, "the coefficient must reach the logits"
        torch.testing.assert_close(by_hand(model, inputs, old), new, atol=1e-9, rtol=1e-9)
        # another coefficient of the block moved instead gives another network
        model.mudd_b2[block, place] -= 4
        other = (place + 1) % (14 if block == 0 else 5)
        model.mudd_b2[block, other] += 4
        assert (by_hand(model, inputs, old) - new).abs().max() > 1e-3


@EVERY_WIRE
def test_each_row_of_the_output_matrix_belongs_to_its_bias(block, place):
    "A change of row n of w2 changes coefficient n of its block and no other."
    model, inputs = woken(), tokens()
    old = watched(model, inputs)
    with torch.no_grad():
        model.mudd_w2[block, place] += 1
    new = watched(model, inputs)
    for b in range(block + 1):
        for i, (c, d) in enumerate(zip(old["mudd_coefficients"][b][1], new["mudd_coefficients"][b][1], strict=True)):
            assert torch.equal(c, d) != ((b, i) == (block, place)), f"block {b}, coefficient {i}"


def test_coefficients_read_raw_streams():
    model, inputs = woken(), tokens()
    seen = watched(model, inputs)
    (x, *_), _ = seen["mudd_coefficients"][0]
    assert not torch.allclose(x, rms_norm(x), atol=0.1), "not normed"
    assert not torch.equal(x, seen["c7"]), "the stream itself, not what attention of the last layers reads"
    # the first eight layers and layer 9 do not depend on the coefficients
    with torch.no_grad():
        model.mudd_b2.zero_()
    torch.testing.assert_close(watched(model, inputs)["c9"], seen["c9"], rtol=0, atol=0)


def test_values_are_mixed_before_the_stream_is_recombined():
    model, inputs = woken(), tokens()
    with torch.no_grad():
        model.mudd_b2[0, 2:6] += 5
    seen = watched(model, inputs)
    torch.testing.assert_close(by_hand(model, inputs, seen), seen["logits"], atol=1e-9, rtol=1e-9)
    assert (by_hand(model, inputs, seen, mixed_from_new=True) - seen["logits"]).abs().max() > 1e-3


def test_attention_receives_the_mixed_values_and_still_reads_layer_7():
    model, inputs = woken(), tokens()
    seen = watched(model, inputs)
    a, layer, _, extra_v, *_ = seen["attention"]
    assert layer == 10
    torch.testing.assert_close(a, rms_norm(seen["c7"]), rtol=0, atol=0)
    m, x = seen["mudd_coefficients"][0][1], seen["c9"]
    table = model.value_embeds.view(5, -1, 128)[4][inputs].view(1, 16, 4, 32)
    mix = (m[0] * seen["c0"] + m[1] * seen["c7"] + m[2] * x).view(1, 16, 4, 32)
    for h in range(4):
        torch.testing.assert_close(extra_v[:, :, h], m[6 + h // 2] * table[:, :, h] + mix[:, :, h])


def test_layer_10_takes_the_start_and_not_the_bare_embedding():
    model, inputs = woken(), tokens()
    with torch.no_grad():
        model.bigram_lambdas[0], model.mudd_b2[0, 10] = 1.0, 10.0
    seen = watched(model, inputs)
    pairs = model.bigram_embed[bigram_rows(inputs, model.recipe.bigram_size)]
    torch.testing.assert_close(seen["c0"] - seen["x0"], pairs, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(by_hand(model, inputs, seen), seen["logits"], atol=1e-9, rtol=1e-9)
    assert (by_hand(model, inputs, seen, injected="x0") - seen["logits"]).abs().max() > 1e-3


def test_later_rungs_keep_the_wires():
    "Packed documents do not change where coefficients act: the value gate still splits the heads in the middle."
    model = network("documents")
    borders, longest = torch.tensor([0, 16, 16], dtype=torch.int32), torch.tensor(16, dtype=torch.int32)
    with torch.no_grad():
        model.mudd_b2[0, 7] = 0
        taken = []
        model.attention = lambda *args: taken.append(args) or type(model).attention(model, *args)
        model.logits(tokens(), borders, longest)
    extra_v = taken[-1][3]
    assert not extra_v[:, :, 2:].any() and extra_v[:, :, :2].all()


# ---- what learns


def test_unused_outputs_and_replaced_factors_are_out_of_the_network():
    model = woken()
    F.cross_entropy(model.logits(tokens())[0], tokens(seed=1)[0]).backward()
    idle = {"mudd_w2": (1, slice(5, 14)), "mudd_b2": (1, slice(5, 14)), "resid_lambdas": 10, "post_lambdas": 10,
            "x0_lambdas": 10, "bigram_lambdas": 10, "ve_gate_bank": 4}
    for name, place in idle.items():
        grad = model.get_parameter(name).grad
        assert not grad[place].any() and grad.any(), name
    assert model.mudd_w2.grad[0].abs().amax(-1).min() > 0 and model.mudd_w2.grad[1, :5].abs().amax(-1).min() > 0
    with torch.no_grad():
        old = model.logits(tokens())
        for name, place in idle.items():
            model.get_parameter(name)[place] += 1
        assert torch.equal(model.logits(tokens()), old)


def test_the_output_matrix_learns_first_and_the_input_matrix_follows():
    model = network()
    optimizer = Optimizer(model.recipe, model)
    model(tokens(), tokens(seed=1)).backward()
    assert not model.mudd_w1.grad.any() and model.mudd_w2.grad[1, :5].any()
    optimizer.step()
    idle = model.mudd_w2.detach()[1, 5:]
    assert not idle.any() and torch.equal(model.mudd_b2[1, 5:], initial_mudd_bias()[1, 5:])
    model(tokens(), tokens(seed=1)).backward()
    assert model.mudd_w1.grad.flatten(1).any(-1).all()
