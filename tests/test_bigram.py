"The table of token pairs: the original's row numbers, a reference in plain integers, and where the network adds it."

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import speedrun_lib.gpt as used
from speedrun_lib.bigram import bigram_rows
from speedrun_lib.gpt import build_model
from speedrun_lib.lean import rms_norm
from speedrun_lib.logits import softcap
from speedrun_lib.optimizer import Optimizer, parameter_rules
from speedrun_lib.recipe import SIZES, recipe_for
from tests.oracle import tokens_of

R82, R89 = 251_520, 377_280
PAIRS = [  # previous token, token, row at record 82, row at record 89: spec 07, section 8
    (50256, 464, 19030, 143001), (464, 50256, 200709, 324067), (0, 0, 0, 0), (1, 0, 27191, 27191),
    (0, 1, 36313, 36313), (262, 11, 199860, 199851), (11, 262, 3826, 3813), (50255, 50256, 244156, 368544),
    (12345, 6789, 57974, 308900), (198, 198, 142188, 16423), (50256, 50256, 35060, 33688), (13, 198, 78264, 78255),
]
SEQUENCES = [
    ([50256, 464, 2068, 7586, 21831], R82, [251519, 204580, 28927, 57630, 129154]),
    ([50256, 464, 2068, 7586, 21831], R89, [377279, 86771, 28822, 182963, 128375]),
    ([0, 0, 0, 0], R82, [251519, 193815, 0, 0]),
    ([0, 0, 0, 0], R89, [377279, 330959, 0, 0]),
]


def rows_of(tokens, rows):
    return bigram_rows(torch.tensor([tokens]), rows)[0].tolist()


def wrap(n):
    "What a signed 32-bit integer keeps of n."
    n &= 0xFFFFFFFF
    return n - (1 << 32) if n >> 31 else n


def reference(tokens, rows):
    "The record's loader in plain integers: element 0 is overwritten before the pairs are hashed."
    buffer, modulus = list(tokens), rows - 1
    buffer[0] = modulus
    hashed = [modulus]
    for before, now in zip(buffer, buffer[1:], strict=False):
        value = wrap(wrap(36313 * now) ^ wrap(27191 * before))
        hashed.append(value - modulus * (value // modulus))
    return hashed


# ---- the original's numbers (spec 07, sections 8, 13 and 16)


@pytest.mark.parametrize("previous, token, r82, r89", PAIRS)
def test_rows_of_single_pairs(previous, token, r82, r89):
    for first in (0, 7, 50256):
        assert rows_of([first, previous, token], R82)[2] == r82
        assert rows_of([first, previous, token], R89)[2] == r89


@pytest.mark.parametrize("tokens, rows, expected", SEQUENCES)
def test_rows_of_whole_sequences(tokens, rows, expected):
    assert rows_of(tokens, rows) == expected == reference(tokens, rows)


@pytest.mark.parametrize("rows, total, first", [(R82, 901_162_790, [251519, 224243, 85984, 191058, 220864]),
                                                (R89, 1_356_361_789, [377279, 372140, 337503, 191057, 95104])])
def test_rows_of_every_seventh_token(rows, total, first):
    found = rows_of(list(range(0, 50_257, 7)), rows)
    assert len(found) == 7180 and sum(found) == total and found[:5] == first


@pytest.mark.parametrize("stream, first", [(200, [1023, 450, 206, 1021, 983, 406]), (300, [1023, 796, 270, 76, 689])])
def test_rows_of_the_reduced_network(stream, first):
    assert bigram_rows(tokens_of(stream, 65)[None], 1024)[0, : len(first)].tolist() == first


# ---- properties

ids = st.integers(0, 50_256)
heights = st.integers(2, 2**22)


@given(tokens=st.lists(ids, min_size=1, max_size=40), rows=heights)
@settings(deadline=None, max_examples=200)
def test_the_hash_is_the_reference(tokens, rows):
    assert rows_of(tokens, rows) == reference(tokens, rows)


@given(tokens=st.lists(ids, min_size=1, max_size=40), rows=heights)
@settings(deadline=None, max_examples=100)
def test_rows_are_in_the_table_and_the_last_one_is_for_the_first_token(tokens, rows):
    found = rows_of(tokens, rows)
    assert found[0] == rows - 1 and all(0 <= row < rows - 1 for row in found[1:])


@given(tokens=st.lists(ids, min_size=4, max_size=12), at=st.integers(0, 11), other=ids)
@settings(deadline=None, max_examples=100)
def test_a_row_depends_on_its_own_pair_only(tokens, at, other):
    at %= len(tokens)
    changed = tokens.copy()
    changed[at] = other
    moved = [i for i, (a, b) in enumerate(zip(rows_of(tokens, R82), rows_of(changed, R82), strict=True)) if a != b]
    assert set(moved) <= ({at, at + 1} if at else set()), "token 0 is in no pair: the quirk of position 1"


@given(batch=st.lists(st.lists(ids, min_size=6, max_size=6), min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_batch_rows_do_not_mix_and_integer_types_do_not_matter(batch):
    wide = bigram_rows(torch.tensor(batch), R82)
    assert wide.dtype == torch.int32 and wide.tolist() == [rows_of(row, R82) for row in batch]
    assert torch.equal(bigram_rows(torch.tensor(batch, dtype=torch.int32), R82), wide)


def test_the_hash_collides_as_often_as_chance():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(0, 50_257, (100_000, 2), generator=generator).unique(dim=0)
    pairs = torch.cat([torch.zeros_like(pairs[:, :1]), pairs], dim=1)  # the pair stands at positions 1 and 2
    for rows in (4096, 65_536, R82):
        row = bigram_rows(pairs, rows)[:, 2].long()
        shared = (torch.bincount(row, minlength=rows)[row] > 1).float().mean().item()
        assert abs(shared - (1 - (1 - 1 / rows) ** (len(pairs) - 1))) < 0.01


# ---- in the network


def nano(rung="bigram", seed=0):
    torch.manual_seed(seed)
    return build_model(recipe_for(rung, "nano"), SIZES["nano"])


def batch(rows=2, length=24, seed=0):
    return torch.randint(0, 257, (rows, length), generator=torch.Generator().manual_seed(seed))


def fill(model, seed=1):
    with torch.no_grad():
        model.bigram_embed.copy_(torch.randn(model.bigram_embed.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def test_a_table_of_zeros_changes_nothing():
    plain, model = nano("attn_gate", seed=3), nano(seed=4)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(missing) == ["bigram_embed", "bigram_lambdas"] and unexpected == []
    assert not model.bigram_embed.any() and torch.equal(model.bigram_lambdas, torch.full((11,), 0.05))
    with torch.no_grad():
        expected = plain.logits(batch())
        assert torch.equal(model.logits(batch()), expected)
        assert not torch.equal(fill(model).logits(batch()), expected)
        model.bigram_lambdas.zero_()
        assert torch.equal(model.logits(batch()), expected), "the factors close every entrance"


def readings(model, layer):
    "Inputs of the attentions, and the logits, when only one layer's factor is open (None: no factor)."
    seen = {}

    def spy(a_btd, i, *args, **kwargs):
        seen[i] = a_btd
        return type(model).attention(model, a_btd, i, *args, **kwargs)

    model.attention = spy
    with torch.no_grad():
        model.bigram_lambdas.copy_(torch.tensor([float(i == layer) for i in range(11)]))
        seen["logits"] = model.logits(batch())
    del model.attention
    return seen


@pytest.mark.parametrize("layer", range(11))
def test_which_layer_gets_the_table_and_when(layer):
    model = fill(nano())
    closed, opened = readings(model, None), readings(model, layer)
    assert 6 not in opened, "layer 6 has no attention"
    moved = {reader for reader in opened if not torch.equal(opened[reader], closed[reader])}
    # layer 0's vector is there before its attention, the others come with what attention adds; from layer 8 on
    # attention reads the output of layer 7
    first = 0 if layer == 0 else layer + 1
    expected = {i for i in range(first, 11) if i != 6} if layer <= 7 else set()
    assert moved == (set() if layer == 6 else expected | {"logits"})


def bare(seed=0):
    "A network whose attention and MLPs add nothing, whose stream does not grow, without skip and backout."
    model = fill(nano(seed=seed))
    with torch.no_grad():
        model.vo_bank[1::2] = 0
        model.mlp_bank[1::2] = 0
        model.resid_lambdas.fill_(1)
        model.backout_lambda.zero_()
        model.scalars[-1] = -1e4  # closes the skip from layer 3 to layer 6
        model.bigram_lambdas.copy_(2.0 ** -torch.arange(11.0))  # exact in bf16, all different
    return model


def agrees(model):
    "Whether the logits are those of the token's embedding plus all injections, with rows from plain integers."
    rows = torch.tensor([reference(row, model.recipe.bigram_size) for row in batch().tolist()])
    share = sum(2.0**-i for i in range(11) if i != 6)
    with torch.no_grad():
        x = rms_norm(model.embed[batch()]) + share * model.bigram_embed[rows]
        return torch.allclose(model.logits(batch()), softcap(rms_norm(x) @ model.lm_head), atol=1e-4)


def test_the_stream_in_closed_form():
    assert agrees(bare())


@pytest.mark.parametrize("fault", ["order", "quirk", "reserved", "modulus", "shift", "no wrap"])
def test_faults_of_the_hash_are_seen(fault, monkeypatch):
    def faulty(tokens, rows):
        now, before = tokens[:, 1:], torch.cat([torch.full_like(tokens[:, :1], rows - 1), tokens[:, 1:-1]], 1)
        modulus, first = rows - 1, torch.full_like(tokens[:, :1], rows - 1)
        if fault == "order":
            now, before = before, now
        elif fault == "quirk":
            before = tokens[:, :-1]
        elif fault == "reserved":
            first = 0 * first
        elif fault == "modulus":
            modulus = rows
        elif fault == "shift":  # the pair of this token and the next one: looks ahead
            now, before = tokens.roll(-1, 1)[:, 1:], now
        rows_bt = torch.cat([first, (36313 * now ^ 27191 * before) % modulus], 1)
        return rows_bt if fault != "no wrap" else torch.cat([first, 36313 * now + 27191 * before], 1) % modulus

    monkeypatch.setattr(used, "bigram_rows", faulty)
    assert not agrees(bare())


def test_only_visited_rows_get_a_gradient_and_only_through_the_factors():
    model, inputs = nano(), batch()
    model(inputs, batch(seed=1)).backward()
    touched = model.bigram_embed.grad.any(1).nonzero().flatten()
    assert torch.equal(touched, bigram_rows(inputs, 8192).unique().long())
    assert not model.bigram_lambdas.grad.any(), "the table is zero"
    model.zero_grad()
    with torch.no_grad():
        model.bigram_lambdas.zero_()
    model(inputs, batch(seed=1)).backward()
    assert not model.bigram_embed.grad.any(), "zero table and zero factors would never learn"


def test_rules_of_the_optimizer():
    rules = parameter_rules(recipe_for("bigram"))
    table, factors = rules["bigram_embed"], rules["bigram_lambdas"]
    assert (table.rule, table.lr, table.decay, table.betas) == ("adam", 75, 5, (0.75, 0.95))
    assert (factors.rule, factors.lr, factors.decay, factors.betas) == ("adam", 1, 0, (0.9, 0.95))
    assert "bigram_embed" not in parameter_rules(recipe_for("attn_gate"))


def test_one_update_moves_visited_rows_by_the_rate():
    model, recipe = nano(), recipe_for("bigram", "nano")
    optimizer = Optimizer(recipe, model)
    model(batch(), batch(seed=1)).backward()
    grad = model.bigram_embed.grad.abs()
    optimizer.step()
    moved = model.bigram_embed.detach().abs()
    large = moved[grad > 1e-7]  # the others feel Adam's epsilon
    assert not moved[grad == 0].any() and len(large) > 5000
    torch.testing.assert_close(large, torch.full_like(large, 75 * recipe.adam_lr), rtol=1e-2, atol=0)


@pytest.mark.parametrize("size, rows", [("nano", 8192), ("mini", R82), ("full", R82)])
def test_weights_of_the_table(size, rows):
    with torch.device("meta"):
        plain, model = (build_model(recipe_for(rung, size), SIZES[size]) for rung in ("attn_gate", "bigram"))
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == rows * SIZES[size].model_dim + 11 and model.bigram_embed.shape[0] == rows


def test_the_size_of_the_table_is_a_setting():
    recipe = dataclasses.replace(recipe_for("bigram", "nano"), bigram_size=50)
    assert build_model(recipe, SIZES["nano"]).logits(batch()).isfinite().all()
