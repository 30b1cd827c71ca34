"Value embeddings and their gates: the formulas, their place in the network, and what each miswiring would show."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib import gpt
from speedrun_lib.gpt import build_model
from speedrun_lib.lean import split_heads
from speedrun_lib.offset_pairs import PAIRED_LAYERS, in_pairs
from speedrun_lib.optimizer import Optimizer, parameter_rules
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.value_embeds import VALUE_LAYERS, gated_values, value_rows
from speedrun_lib.xsa import XSA_LAYERS

TABLE = {1: 0, 2: 1, 8: 2, 9: 3, 10: 4}  # layer -> table (specification, section 18)
WITH_ATTENTION = (0, 1, 2, 3, 4, 5, 7, 8, 9, 10)
RUNGS = pytest.mark.parametrize("rung", ["value_embeds", "ve_gates"])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(rung):
    torch.manual_seed(0)
    return build_model(recipe_for(rung, "nano"), SIZES["nano"])


def tokens(length=24, rows=1, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def packed(model, inputs):
    "What `logits` takes besides the tokens: one document, from the rung `documents` on."
    if not model.recipe.documents:
        return ()
    length = inputs.shape[1]
    return torch.tensor([0, length], dtype=torch.int32), torch.tensor(length, dtype=torch.int32)


def watch(model, inputs):
    "For every layer with attention: the arguments of its attention, and what it returns."
    seen = {}

    def watched(a_btd, layer, matrices, extra_v=None, *rest):
        y = type(model).attention(model, a_btd, layer, matrices, extra_v, *rest)
        seen[layer] = {"a": a_btd, "v_w": matrices[2], "extra_v": extra_v, "y": y}
        return y

    model.attention = watched
    with torch.no_grad():
        model.logits(inputs, *packed(model, inputs))
    del model.attention
    return seen


def numbered(model):
    "Every row of table j holds the number j + 1, and the matrices of values hold zero."
    with torch.no_grad():
        model.value_embeds.view(5, -1).copy_(torch.arange(1.0, 6)[:, None])
        model.vo_bank[0::2] = 0
    return model


# ---- the rows


@given(v=st.integers(1, 9), d=st.integers(1, 4), b=st.integers(1, 3), t=st.integers(1, 6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_the_row_of_table_j_and_token_t_is_j_v_plus_t(v, d, b, t, seed):
    tables = normal(5 * v, d, seed=seed)
    ids = torch.randint(0, v, (b, t), generator=torch.Generator().manual_seed(seed))
    rows = value_rows(tables, ids)
    assert rows.shape == (5, b, t, d)
    for j in range(5):
        assert torch.equal(rows[j], tables[j * v + ids])


def test_rows_carry_gradients_back_once_for_every_visit():
    tables = normal(5 * 4, 3).requires_grad_()
    value_rows(tables, torch.tensor([[1, 3, 1]])).sum().backward()
    assert tables.grad.view(5, 4, 3).tolist() == [[[0] * 3, [2] * 3, [0] * 3, [1] * 3]] * 5


# ---- the gate


def test_gate_written_out():
    ve, x, gate_w = normal(2, 5, 24), normal(2, 5, 24, seed=1), normal(3, 12, seed=2)
    out = gated_values(ve, x, gate_w)
    assert out.shape == (2, 5, 3, 8)
    for b, t, h in ((0, 0, 0), (1, 4, 2), (0, 3, 1)):
        logit = sum(float(gate_w[h, i] * x[b, t, i] + gate_w[h, 6 + i] * ve[b, t, i]) for i in range(6))
        torch.testing.assert_close(out[b, t, h], 2 / (1 + math.exp(-logit)) * ve[b, t, 8 * h : 8 * h + 8])


@pytest.mark.parametrize("i", range(24))
def test_the_gate_reads_dimensions_0_to_5_of_both(i):
    ve, x, gate_w = normal(1, 5, 24), normal(1, 5, 24, seed=1), normal(3, 12, seed=2)
    bump = torch.zeros(24)
    bump[i] = 0.5

    def gate(ve, x):
        return gated_values(ve, x, gate_w)[..., -1] / ve.unflatten(-1, (3, -1))[..., -1]

    assert torch.allclose(gate(ve, x + bump), gate(ve, x), atol=1e-6) == (i >= 6)
    assert torch.allclose(gate(ve + bump, x), gate(ve, x), atol=1e-6) == (i >= 6)


@given(seed=st.integers(0, 999), size=st.floats(0, 20))
@settings(deadline=None, max_examples=20)
def test_a_gate_and_its_opposite_share_two_rows(seed, size):
    ve, x, gate_w = normal(2, 3, 16, seed=seed), normal(2, 3, 16, seed=seed + 1), size * normal(2, 12, seed=seed + 2)
    heads = ve.unflatten(-1, (2, -1))
    out = gated_values(ve, x, gate_w)
    assert (out * heads >= 0).all() and (out.abs() <= 2 * heads.abs()).all()
    torch.testing.assert_close(out + gated_values(ve, x, -gate_w), 2 * heads, atol=1e-5, rtol=1e-5)
    assert torch.equal(gated_values(ve, x, 0 * gate_w), heads), "gates start at exactly one"


def test_bf16_stays_bf16():
    assert gated_values(*(normal(*s).bfloat16() for s in ((1, 5, 16), (1, 5, 16), (2, 12)))).dtype == torch.bfloat16


# ---- parameters


def test_start_rules_and_size():
    before, plain, gated = (network(rung) for rung in ("backout", "value_embeds", "ve_gates"))
    names = [dict(m.named_parameters()) for m in (before, plain, gated)]
    assert names[1].keys() - names[0].keys() == {"value_embeds"}
    assert names[2].keys() - names[1].keys() == {"ve_gate_bank"}
    assert plain.value_embeds.shape == (5 * 384, 128), "five tables of the padded vocabulary"
    assert abs(plain.value_embeds.std().item() - 0.01) < 2e-4 and abs(plain.value_embeds.mean().item()) < 1e-4
    assert abs((plain.value_embeds.abs() > 0.02).float().mean().item() - 0.0455) < 0.003, "normal, not uniform"
    assert gated.ve_gate_bank.shape == (5, 4, 12) and not gated.ve_gate_bank.any()
    rules = parameter_rules(gated.recipe)
    table, bank = rules["value_embeds"], rules["ve_gate_bank"]
    assert (table.rule, table.lr, table.decay, table.betas) == ("adam", 75, 5, (0.75, 0.95))
    assert (bank.rule, bank.lr, bank.decay, bank.betas) == ("adam", 1, 1, (0.9, 0.99))
    with torch.device("meta"):
        full = build_model(recipe_for("ve_gates"), SIZES["full"])
    assert full.value_embeds.numel() == 193_167_360 and full.ve_gate_bank.numel() == 360


def test_gates_at_their_start_change_nothing_and_tables_do():
    inputs = tokens()
    with torch.no_grad():
        plain = network("value_embeds").logits(inputs)
        assert torch.equal(network("ve_gates").logits(inputs), plain)
        assert not torch.allclose(network("backout").logits(inputs), plain, atol=1e-4)
        empty = network("value_embeds")
        empty.value_embeds.zero_()
        torch.testing.assert_close(empty.logits(inputs), without_tables(inputs), atol=1e-5, rtol=1e-5)


def without_tables(inputs):
    "The rung below with the same weights elsewhere."
    model, source = network("backout"), dict(network("value_embeds").named_parameters())
    for name, p in model.named_parameters():
        p.copy_(source[name])
    return model.logits(inputs)


# ---- which layer, and where in it


@RUNGS
def test_each_layer_gathers_its_own_table_and_others_nothing(rung):
    "Attention weights add up to one, so equal values pass unchanged; nothing is multiplied by the value matrix."
    seen = watch(numbered(network(rung)), tokens())
    assert tuple(seen) == WITH_ATTENTION and tuple(TABLE) == VALUE_LAYERS
    for layer, facts in seen.items():
        number = TABLE[layer] + 1.0 if layer in TABLE else 0.0
        torch.testing.assert_close(facts["y"], torch.full_like(facts["y"], number), atol=1e-5, rtol=1e-5)


@RUNGS
def test_what_is_added_are_the_rows_of_the_own_token_head_by_head(rung):
    model, inputs = network(rung), tokens()
    seen = watch(model, inputs)
    for layer, facts in seen.items():
        if layer not in TABLE:
            assert facts["extra_v"] is None
            continue
        rows = model.value_embeds[TABLE[layer] * 384 + inputs]
        for h in range(4):
            assert torch.equal(facts["extra_v"][:, :, h], rows[..., 32 * h : 32 * h + 32])


def test_position_zero_gathers_its_projected_value_plus_its_row():
    "The first position sees itself only: the sum comes after the projection, and the value is not gated."
    model, inputs = network("ve_gates"), tokens()
    with torch.no_grad():
        model.value_embeds *= 100
        model.ve_gate_bank += normal(5, 4, 12)
    for layer, facts in watch(model, inputs).items():
        right = split_heads(facts["a"], facts["v_w"], 4)
        if layer in TABLE:
            rows = model.value_embeds[TABLE[layer] * 384 + inputs]
            right = right + gated_values(rows, facts["a"], model.ve_gate_bank[TABLE[layer]])
        torch.testing.assert_close(facts["y"][:, 0], right[:, 0], atol=1e-5, rtol=1e-5)


def test_each_gate_reads_the_input_of_its_own_attention_and_its_own_rows(monkeypatch):
    calls = []
    monkeypatch.setattr(gpt, "gated_values", lambda ve, x, w: calls.append((ve, x, w)) or gated_values(ve, x, w))
    model, inputs = network("ve_gates"), tokens()
    seen = watch(model, inputs)
    assert len(calls) == 5
    for (layer, table), (ve, x, w) in zip(TABLE.items(), calls, strict=True):
        assert x is seen[layer]["a"] and torch.equal(ve, model.value_embeds[table * 384 + inputs])
        assert w.storage_offset() == table * w.numel()
        torch.testing.assert_close(x.square().mean(-1), torch.ones(1, 24), atol=0.01, rtol=0)
    assert torch.equal(calls[2][1], calls[4][1]), "layers 8 to 10 read the output of layer 7"
    assert not torch.equal(calls[1][1], calls[2][1])


@pytest.mark.parametrize(("layer", "row"), TABLE.items())
def test_a_row_of_the_gate_bank_reaches_its_layer_and_no_other(layer, row):
    "Closing the gates of a row is the same as an empty table for that layer."
    model = numbered(network("ve_gates"))
    with torch.no_grad():
        model.ve_gate_bank[row, :, 6:] = -10  # the rows are positive
    quiet = [i for i, facts in watch(model, tokens()).items() if i in TABLE and facts["y"].abs().max() < 1e-3]
    assert quiet == [layer]


def test_heads_have_gates_of_their_own():
    model = numbered(network("ve_gates"))
    with torch.no_grad():
        model.ve_gate_bank[0, 2, 6:] = -10
    y = watch(model, tokens())[1]["y"]
    assert y[:, :, 2].abs().max() < 1e-3 and torch.allclose(y[:, :, [0, 1, 3]], torch.ones(()))


# ---- with the techniques of later rungs


def values_of(monkeypatch, model, inputs):
    "What every call of the attention operator gets as values, with the layer that calls."
    found, real = {}, gpt.varlen_attention
    monkeypatch.setattr(gpt, "varlen_attention", lambda q, k, v, *rest: found.setdefault(len(found), v) is None
                        or real(q, k, v, *rest))
    seen = watch(model, inputs)
    return seen, {layer: found[n] for n, layer in enumerate(seen)}


def test_paired_layers_read_sum_and_table_in_the_same_order_of_heads(monkeypatch):
    model, inputs = network("paired_heads"), tokens()
    with torch.no_grad():
        model.value_embeds *= 100
        model.ve_gate_bank += normal(5, 4, 12)
    seen, values = values_of(monkeypatch, model, inputs)
    assert set(PAIRED_LAYERS) & set(TABLE) == {2, 9}
    for layer in TABLE:
        projected, extra = split_heads(seen[layer]["a"], seen[layer]["v_w"], 4), seen[layer]["extra_v"]
        if layer in PAIRED_LAYERS:
            right = in_pairs(projected) + in_pairs(extra)  # rows 2t: heads 0 and 1; rows 2t + 1: heads 2 and 3
            assert torch.equal(in_pairs(extra)[0, 0::2], extra[0, :, :2])
            assert torch.equal(in_pairs(extra)[0, 1::2], extra[0, :, 2:])
        else:
            right = projected + extra
        torch.testing.assert_close(values[layer], right[0])


def test_xsa_takes_the_sum_for_the_own_value(monkeypatch):
    calls, real = [], gpt.exclude_self
    monkeypatch.setattr(gpt, "exclude_self", lambda y, v, alpha: calls.append(v) or real(y, v, alpha))
    model, inputs = network("xsa"), tokens()
    with torch.no_grad():
        model.value_embeds *= 100
    seen = watch(model, inputs)
    for layer, v in zip(XSA_LAYERS, calls, strict=True):
        right = split_heads(seen[layer]["a"], seen[layer]["v_w"], 4)
        extra = seen[layer]["extra_v"]
        torch.testing.assert_close(v, right if extra is None else right + extra)
        assert (extra is not None) == (layer in TABLE)


def test_from_mudd_on_the_last_gate_of_the_bank_is_unused():
    model, inputs = network("mudd"), tokens()
    model(inputs, tokens(seed=1)).backward()
    reach = model.ve_gate_bank.grad.abs().amax((1, 2))
    assert reach[:4].min() > 0 and reach[4] == 0
    with torch.no_grad():
        model.mudd_w2.zero_()
        extra = watch(model, inputs)[10]["extra_v"]
        rows = model.value_embeds[4 * 384 + inputs].unflatten(-1, (4, -1))
    torch.testing.assert_close(extra, 2 * rows)  # the generated gate starts at two


# ---- learning


@RUNGS
def test_only_rows_of_tokens_seen_get_gradients(rung):
    model, inputs = network(rung), tokens()
    model(inputs, tokens(seed=1)).backward()
    reached = (model.value_embeds.grad.view(5, 384, 128) != 0).any(-1)
    for row in reached:
        assert row.nonzero().flatten().tolist() == sorted(set(inputs.flatten().tolist()))


def test_rows_without_a_visit_stay_to_the_bit():
    "Cautious decay must not touch what has no update."
    model, inputs = network("ve_gates"), tokens()
    start, optimizer = model.value_embeds.detach().clone(), Optimizer(model.recipe, model)
    for step in (1, 3):
        optimizer.step_number = step
        model(inputs, tokens(seed=1)).backward()
        optimizer.step()
    moved = (model.value_embeds != start).any(-1).view(5, 384)
    assert moved.sum() == 5 * len(set(inputs.flatten().tolist()))
    assert torch.equal(moved[0].nonzero().flatten(), inputs.unique())


def test_every_gate_learns_from_the_first_step():
    model = network("ve_gates")
    model(tokens(), tokens(seed=1)).backward()
    assert model.ve_gate_bank.grad.abs().amin((1, 2)).min() > 0
