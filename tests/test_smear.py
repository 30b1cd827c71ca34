"Smear and the attention gate: the formulas, their place in the network, and what each miswiring would show."

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib import gpt
from speedrun_lib.gpt import build_model
from speedrun_lib.lean import rms_norm
from speedrun_lib.optimizer import Optimizer, parameter_rules
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.smear import gated_heads, smear
from speedrun_lib.xsa import exclude_self

STRENGTH = 22  # place in `scalars`
WITH_ATTENTION = (0, 1, 2, 3, 4, 5, 7, 8, 9, 10)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(rung, strength=None):
    "The network of a rung at size nano with fresh weights, and smear's strength set where asked."
    torch.manual_seed(0)
    model = build_model(recipe_for(rung, "nano"), SIZES["nano"])
    if strength is not None:
        with torch.no_grad():
            model.scalars[STRENGTH] = strength
    return model


def tokens(length=24, rows=1, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- smear


def test_smear_written_out():
    x, gate_w = normal(2, 7, 20), normal(1, 12, seed=1)
    y = smear(x, gate_w, torch.tensor(0.3))
    for b in range(2):
        torch.testing.assert_close(y[b, 0], x[b, 0], rtol=0, atol=0)
        for t in range(1, 7):
            logit = sum(float(gate_w[0, i] * x[b, t, i]) for i in range(12))
            share = 0.3 / (1 + math.exp(-logit))
            torch.testing.assert_close(y[b, t], x[b, t] + share * x[b, t - 1])


def test_specification_with_round_numbers():
    "A gate of zeros is one half; the neighbour counts as it was before."
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 4, 1)
    y = smear(x, torch.zeros(1, 1), torch.tensor(0.2))
    torch.testing.assert_close(y.flatten(), torch.tensor([1.0, 10.1, 101.0, 1010.0]))


@given(t=st.integers(1, 9), d=st.integers(12, 20), at=st.integers(0, 8), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=25)
def test_a_token_reaches_itself_and_the_next_one_only(t, d, at, seed):
    x, gate_w = normal(1, t, d, seed=seed), normal(1, 12, seed=seed + 1)
    at = min(at, t - 1)
    changed = x.clone()
    changed[:, at] += 1
    moved = (smear(x, gate_w, torch.tensor(0.5)) != smear(changed, gate_w, torch.tensor(0.5))).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [i for i in (at, at + 1) if i < t]


def test_the_gate_reads_twelve_dimensions_of_the_receiving_token():
    x, gate_w = normal(1, 2, 16).requires_grad_(), normal(1, 12, seed=1)
    share = smear(x, gate_w, torch.tensor(1.0))[0, 1] - x[0, 1]
    share = (share / x[0, 0].detach())[15]  # the gate times x[0, 0, 15] / constant
    grad = torch.autograd.grad(share, x)[0][0]
    assert grad[1, :12].all() and not grad[1, 12:15].any(), "dimensions 0..11 of the token itself"
    assert not grad[0, :12].any(), "and none of its neighbour"


@given(strength=st.floats(-2, 2))
@settings(deadline=None, max_examples=10)
def test_linear_in_the_strength(strength):
    x, gate_w = normal(2, 5, 16), normal(1, 12, seed=1)
    unit = smear(x, gate_w, torch.tensor(1.0)) - x
    torch.testing.assert_close(smear(x, gate_w, torch.tensor(strength)) - x, strength * unit, atol=1e-5, rtol=1e-4)


def test_bf16_stays_bf16():
    x, gate_w = normal(1, 5, 16).bfloat16(), normal(1, 12).bfloat16()
    assert smear(x, gate_w, torch.tensor(0.1)).dtype == torch.bfloat16
    assert gated_heads(normal(1, 5, 3, 4).bfloat16(), x, normal(3, 12).bfloat16()).dtype == torch.bfloat16


# ---- smear in the network


def test_parameters_of_the_rung_and_their_start():
    model = network("smear")
    assert model.smear_gate.shape == (1, 12) and not model.smear_gate.any()
    assert model.scalars[STRENGTH] == 0 and len(model.scalars) == 24
    new = dict(model.named_parameters()).keys() - dict(network("ve_gates").named_parameters()).keys()
    assert new == {"smear_gate"}
    rule = parameter_rules(model.recipe)["smear_gate"]
    assert (rule.rule, rule.lr, rule.decay, rule.betas) == ("adam", 0.01, 0, (0.9, 0.99))


def test_nothing_changes_at_strength_zero_and_something_does_at_another():
    inputs = tokens()
    with torch.no_grad():
        before = network("ve_gates").logits(inputs)
        assert torch.equal(network("smear", 0.0).logits(inputs), before)
        moved = (network("smear", 0.2).logits(inputs) != before).any(-1)[0]
    assert not moved[0] and moved[1:].all(), "the first position of a row has no neighbour"


@pytest.mark.parametrize("index", [i for i in range(24) if i != STRENGTH][-3:])
def test_only_scalar_22_is_the_strength(index):
    "A change of another scalar leaves the smeared embedding, seen as what enters the first norm."
    model = network("smear", 0.3)
    with torch.no_grad():
        model.scalars[index] += 1
    x = entering(model, tokens())
    smeared = smear(model.embed[tokens()], model.smear_gate, torch.tensor(0.3))
    torch.testing.assert_close(x, rms_norm(rms_norm(smeared)))


def entering(model, inputs):
    "The input of the first attention: the embedding, smeared and normed, and normed once more."
    seen = {}

    def watched(a_btd, layer, *rest):
        seen.setdefault(layer, a_btd)
        return type(model).attention(model, a_btd, layer, *rest)

    model.attention = watched
    with torch.no_grad():
        model.logits(inputs)
    del model.attention
    return seen[0]


def test_smear_comes_before_the_norm_and_reads_raw_embeddings():
    model = network("smear", 0.5)
    inputs = tokens()
    with torch.no_grad():
        model.embed *= torch.linspace(0.5, 20, len(model.embed))[:, None]
        model.smear_gate += normal(1, 12)
        raw = model.embed[inputs]
        right = rms_norm(rms_norm(smear(raw, model.smear_gate, torch.tensor(0.5))))
        late = smear(rms_norm(raw), model.smear_gate, torch.tensor(0.5))
    x = entering(model, inputs)
    torch.testing.assert_close(x, right, atol=1e-4, rtol=1e-4)
    assert (x - rms_norm(late)).abs().max() > 0.1, "smearing normed embeddings is another network"


def test_rows_of_a_batch_do_not_smear_into_each_other():
    model, batch = network("smear", 0.5), tokens(rows=3)
    with torch.no_grad():
        alone = torch.cat([model.logits(row[None]) for row in batch])
        torch.testing.assert_close(model.logits(batch), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.14])
def test_borders_of_documents_are_not_masked(strength):
    model = network("windows", strength)  # bigram rows, which cross borders too, start at zero
    inputs = tokens(40)
    changed = inputs.clone()
    changed[0, 19] = (changed[0, 19] + 1) % 256
    borders, longest = torch.tensor([0, 20, 40, 40], dtype=torch.int32), torch.tensor(20, dtype=torch.int32)
    with torch.no_grad():
        moved = (model.logits(inputs, borders, longest) != model.logits(changed, borders, longest)).any(-1)[0]
    assert moved[19] and not moved[:19].any()
    assert bool(moved[20]) == (strength != 0)


def test_the_strength_learns_first_and_the_gate_follows():
    model = network("smear")
    model(tokens(), tokens(seed=1)).backward()
    assert model.scalars.grad[STRENGTH] != 0 and not model.smear_gate.grad.any()
    optimizer = Optimizer(model.recipe, model)
    optimizer.step()
    assert model.scalars[STRENGTH] != 0
    model(tokens(), tokens(seed=1)).backward()
    assert model.smear_gate.grad.any()


# ---- the gate


def test_gate_written_out():
    y, x, gate_w = normal(2, 5, 3, 4), normal(2, 5, 20, seed=1), normal(3, 12, seed=2)
    out = gated_heads(y, x, gate_w)
    for b, t, h in ((0, 0, 0), (1, 4, 2), (0, 3, 1)):
        logit = sum(float(gate_w[h, i] * x[b, t, i]) for i in range(12))
        torch.testing.assert_close(out[b, t, h], y[b, t, h] / (1 + math.exp(-logit)))


def test_the_gate_reads_dimensions_0_to_11_only():
    y, x, gate_w = normal(1, 5, 3, 4), normal(1, 5, 20), normal(3, 12, seed=2)
    for i in range(20):
        other = x.clone()
        other[..., i] += 1
        assert torch.equal(gated_heads(y, x, gate_w), gated_heads(y, other, gate_w)) == (i >= 12)


@given(seed=st.integers(0, 1000), size=st.floats(0, 20))
@settings(deadline=None, max_examples=20)
def test_a_gate_only_shortens(seed, size):
    y, x, gate_w = normal(2, 5, 3, 4, seed=seed), normal(2, 5, 16, seed=seed + 1), size * normal(3, 12, seed=seed + 2)
    out = gated_heads(y, x, gate_w)
    assert (out.norm(dim=-1) <= y.norm(dim=-1)).all() and (out * y >= 0).all()
    half = gated_heads(y, x, 0 * gate_w)
    assert torch.equal(half, y / 2)
    # a gate and its opposite share everything
    torch.testing.assert_close(out + gated_heads(y, x, -gate_w), y, atol=1e-5, rtol=1e-5)


def test_gate_and_xsa_commute():
    y, v, x = normal(1, 5, 3, 8), normal(1, 5, 3, 8, seed=1), normal(1, 5, 16, seed=2)
    gate_w, alpha = normal(3, 12, seed=3), normal(3, seed=4)
    torch.testing.assert_close(gated_heads(exclude_self(y, v, alpha), x, gate_w),
                               exclude_self(gated_heads(y, x, gate_w), v, alpha), atol=1e-5, rtol=1e-5)


def test_a_shut_gate_is_the_same_as_no_head():
    y, x, gate_w = normal(1, 5, 3, 4), torch.ones(1, 5, 16), torch.zeros(3, 12)
    gate_w[1] = -10
    out = gated_heads(y, x, gate_w)
    assert out[:, :, 1].abs().max() < 1e-6 and torch.equal(out[:, :, [0, 2]], y[:, :, [0, 2]] / 2)


# ---- the gate in the network


def test_bank_start_and_rule():
    model = network("attn_gate")
    assert model.attn_gate_bank.shape == (10, 4, 12) and not model.attn_gate_bank.any()
    rule = parameter_rules(model.recipe)["attn_gate_bank"]
    assert (rule.rule, rule.lr, rule.decay, rule.betas) == ("adam", 1, 1, (0.9, 0.99))
    with torch.device("meta"):
        full = build_model(recipe_for("attn_gate"), SIZES["full"])
    assert full.attn_gate_bank.numel() == 720 and full.smear_gate.numel() == 12


def test_at_the_start_all_heads_are_halved():
    model, before, inputs = network("attn_gate"), network("smear"), tokens()
    with torch.no_grad():
        assert not torch.allclose(model.logits(inputs), before.logits(inputs), atol=1e-3)
        before.vo_bank[1::2] *= 0.5
        torch.testing.assert_close(model.logits(inputs), before.logits(inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layer", "row"), [(i, i if i < 6 else i - 1) for i in WITH_ATTENTION])
def test_a_row_shuts_its_layer_and_no_other(layer, row):
    "Shutting the gates of a row is the same as deleting the output matrix of its layer."
    gated, cut, inputs = network("attn_gate"), network("attn_gate"), tokens()
    with torch.no_grad():
        normed_ones(gated)
        normed_ones(cut)
        gated.attn_gate_bank[row] = -10
        cut.vo_bank[2 * row + 1] = 0
        with_gates = attention_outputs(gated, inputs)
        torch.testing.assert_close(gated.logits(inputs), cut.logits(inputs), atol=1e-4, rtol=1e-4)
    quiet = [i for i, y in with_gates.items() if y.abs().max() < 1e-3]
    assert quiet == [layer]


def normed_ones(model):
    "Make twelve dimensions of every embedding large and positive, and nothing in the blocks write there."
    model.embed[:, :12] = 0.1
    model.vo_bank[1::2, :12] = 0
    model.mlp_bank[1::2, :, :12] = 0


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


def test_each_gate_reads_the_input_of_its_own_attention(monkeypatch):
    "From layer 8 on that is the output of layer 7."
    seen, calls = [], []
    monkeypatch.setattr(gpt, "gated_heads", lambda y, x, w: calls.append((x, w)) or gated_heads(y, x, w))
    model = network("attn_gate")

    def watched(a_btd, layer, *rest):
        seen.append((layer, a_btd))
        return type(model).attention(model, a_btd, layer, *rest)

    model.attention = watched
    with torch.no_grad():
        model.logits(tokens())
    assert [layer for layer, _ in seen] == list(WITH_ATTENTION)
    assert all(x is a for (x, _), (_, a) in zip(calls, seen, strict=True))
    assert [w.storage_offset() // w.numel() for _, w in calls] == list(range(10))
    late = [layer for layer, a in seen if torch.equal(a, seen[-1][1])]
    assert late == [8, 9, 10]
    for x, _ in calls:
        torch.testing.assert_close(x.square().mean(-1), torch.ones(1, 24), atol=0.01, rtol=0)


def test_the_gate_belongs_to_the_token_that_looks():
    "Gates of the tokens that are looked at would let a later layer's logits of position 0 differ."
    model, inputs = network("attn_gate"), tokens()
    with torch.no_grad():
        model.attn_gate_bank += normal(*model.attn_gate_bank.shape)
        outputs = attention_outputs(model, inputs)
        ungated = attention_outputs_without_gates(model, inputs)
        a = rms_norm(rms_norm(model.embed[inputs]))
        gate = torch.sigmoid(F.linear(a[..., :12], model.attn_gate_bank[0]))
    torch.testing.assert_close(outputs[0], ungated[0] * gate[..., None], atol=1e-5, rtol=1e-4)


def attention_outputs_without_gates(model, inputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "gated_heads", lambda y, x, w: y)
        return attention_outputs(model, inputs)


def test_every_gate_learns_from_the_first_step():
    model = network("attn_gate")
    model(tokens(), tokens(seed=1)).backward()
    assert model.attn_gate_bank.grad.abs().amax((1, 2)).min() > 0
