"Key offset and paired heads: which half, which token, which heads and angles share a slot, and which layers do it."

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib import gpt
from speedrun_lib.documents import varlen_attention
from speedrun_lib.offset_pairs import PAIRED_LAYERS, in_pairs, offset_keys, rotate_pairs
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.rotary import rotary_frequencies, rotary_table, rotate

WITH_ATTENTION = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
TOKENS, BORDERS = 48, [0, 20, 33, 48]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attend(q, k, v, window, scale=0.3):
    borders = torch.tensor([0, len(q)], dtype=torch.int32)
    return varlen_attention(q, k, v, borders, torch.tensor(len(q)), torch.tensor(window), torch.tensor(scale))


# ---- the offset


@given(b=st.integers(1, 2), t=st.integers(1, 9), h=st.integers(1, 3), quarter=st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_standing_half_of_the_token_before(b, t, h, quarter):
    k = normal(b, t, h, 4 * quarter)
    source = k.clone()
    out = offset_keys(k)
    assert torch.equal(k, source), "the source stays"
    for i in range(t):
        for j in range(4 * quarter):
            expected = k[:, i, :, j] if j < 2 * quarter else k[:, max(i - 1, 0), :, j]
            assert torch.equal(out[:, i, :, j], expected), (i, j)


def test_gradient_reaches_the_token_before():
    k = torch.zeros(1, 5, 1, 4, requires_grad=True)
    offset_keys(k)[0, 3, 0].sum().backward()
    assert k.grad[0, :, 0].tolist() == [[0] * 4, [0] * 4, [0, 0, 1, 1], [1, 1, 0, 0], [0] * 4]


def test_the_standing_half_may_be_offset_before_or_after_the_rotation():
    "So 'shift before rotary' cannot be told from the record; with the turning half it could."
    k, table = normal(1, 40, 2, 32), rotary_table(rotary_frequencies(32, 1024.0), 40)
    assert torch.equal(offset_keys(rotate(k, *table)), rotate(offset_keys(k), *table))
    swapped = k.roll(16, -1)  # offset_keys now moves what turns
    wrong = rotate(offset_keys(swapped).roll(-16, -1), *table)
    late = offset_keys(rotate(k, *table).roll(16, -1)).roll(-16, -1)
    assert not torch.allclose(wrong, late, atol=0.1)


def test_one_layer_answers_with_the_word_that_followed():
    "Queries and keys compare words in the standing half; the value says the word."
    words = torch.tensor([4, 2, 0, 3, 1, 2, 4, 3])  # asks at positions 5, 6, 7
    onehot = torch.eye(5)[words]
    still = torch.cat([torch.zeros_like(onehot), onehot], -1)[:, None]
    copied = {}
    for name, k in (("plain", still), ("offset", offset_keys(still[None])[0])):
        copied[name] = attend(still, k, onehot[:, None].contiguous(), 100, 30.0)[5:, 0].argmax(-1).tolist()
    assert copied == {"plain": [2, 4, 3], "offset": [0, 2, 1]}


# ---- the pairs


def slots_and_positions(h, t=4):
    "Head and rotary position in every row and slot, told by marked tensors."
    number = torch.arange(2.0 * t)[:, None].expand(-1, 2).contiguous()
    positions = rotate_pairs(torch.ones(1, t, h, 2), number, torch.zeros(2 * t, 2))
    heads = torch.arange(h).view(1, 1, h, 1).expand(1, t, h, 2)
    return in_pairs(heads)[0, :, :, 0].tolist(), in_pairs(positions)[0, :, :, 0].tolist()


def test_oracle_rows_of_token_2():
    heads, positions = slots_and_positions(6)
    assert heads[4] == [0, 1, 2] and positions[4] == [4, 5, 4]
    assert heads[5] == [3, 4, 5] and positions[5] == [5, 4, 5]


def test_slots_pair_other_heads_than_the_rotation():
    heads, positions = slots_and_positions(6)
    assert [sorted(pair) for pair in zip(*heads[:2], strict=True)] == [[0, 3], [1, 4], [2, 5]]
    later = [second - first for first, second in zip(*positions[:2], strict=True)]
    assert later == [1, -1, 1], "in slot 1 the order of the angles is reversed"


@given(t=st.integers(1, 7), h=st.sampled_from([2, 4, 6]), shift=st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_each_head_turns_as_at_its_own_position(t, h, shift):
    cos, sin = rotary_table(rotary_frequencies(16, 64.0), 2 * t + shift)  # longer tables do not matter
    x = normal(2, t, h, 16)
    turned = rotate_pairs(x, cos, sin)
    for i in range(t):
        for head in range(h):
            p = 2 * i + head % 2
            alone = rotate(x[:, i : i + 1, head : head + 1], cos[p:], sin[p:])
            assert torch.equal(turned[:, i : i + 1, head : head + 1], alone), (i, head)
    assert torch.equal(turned[..., 8:], x[..., 8:]), "the standing half stands"


def test_pairing_only_reads_memory_in_another_shape():
    x = normal(1, 5, 6, 8)
    assert in_pairs(x).data_ptr() == x.data_ptr() and in_pairs(x).shape == (1, 10, 3, 8)
    assert torch.equal(in_pairs(x).reshape(x.shape), x)


@pytest.mark.parametrize("row", [4, 5])
def test_order_in_the_doubled_sequence_is_causal_and_the_window_counts_rows(row):
    q, k, v = (in_pairs(normal(1, 8, 6, 8, seed=seed))[0].clone() for seed in range(3))
    before = attend(q, k, v, 5)
    k[row] += 1
    v[row] += 1
    moved = (attend(q, k, v, 5) != before).flatten(1).any(1).tolist()
    assert moved == [row <= i <= row + 5 for i in range(16)]


# ---- the real network


def network(rung, heads=4):
    torch.manual_seed(0)
    width = {4: 128, 6: 96}[heads]
    recipe = dataclasses.replace(recipe_for(rung, "nano"), num_heads=heads)
    return gpt.build_model(recipe, dataclasses.replace(SIZES["nano"], model_dim=width))


def watch(monkeypatch, model, identity=False):
    "Logits, and what every layer hands to attention; `identity`: attention returns the values."
    calls = []

    def watched(q, k, v, cu_seqlens, max_len, window, scale, rows):
        calls.append({"q": q, "k": k, "v": v, "borders": (rows * cu_seqlens).tolist(), "max_len": rows * int(max_len),
                      "window": int(window), "scale": float(scale)})
        return v if identity else varlen_attention(q, k, v, cu_seqlens, max_len, window, scale, rows)

    monkeypatch.setattr(gpt, "varlen_attention", watched)
    tokens = torch.randint(0, 257, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = model.logits(tokens, torch.tensor(BORDERS, dtype=torch.int32), torch.tensor(20, dtype=torch.int32))
    assert len(calls) == 10
    return z, dict(zip(WITH_ATTENTION, calls, strict=True))


@pytest.mark.parametrize("rung", ["key_offset", "paired_heads", "sparse_bigram"])
def test_the_right_layers(monkeypatch, rung):
    offset_at, paired_at, seen = [], [], []
    kept = gpt.offset_keys, gpt.in_pairs, gpt.GPT.attention

    def attention(self, a_btd, layer, *args, **kwargs):
        seen.append(layer)
        return kept[2](self, a_btd, layer, *args, **kwargs)

    def watched_offset(k):
        offset_at.append(seen[-1])
        return kept[0](k)

    def watched_pairs(x):
        paired_at.append(seen[-1])
        return kept[1](x)

    monkeypatch.setattr(gpt.GPT, "attention", attention)
    monkeypatch.setattr(gpt, "offset_keys", watched_offset)
    monkeypatch.setattr(gpt, "in_pairs", watched_pairs)
    _, calls = watch(monkeypatch, network(rung))
    paired = set() if rung == "key_offset" else {0, 2, 5, 9}
    assert seen == WITH_ATTENTION and offset_at == [3, 10]
    assert paired_at == sorted(3 * list(paired)), "queries, keys and values"
    assert {layer for layer, call in calls.items() if len(call["q"]) == 2 * TOKENS} == paired
    assert set(PAIRED_LAYERS) == {0, 2, 5, 9}


def test_what_the_offset_does_to_layer_3(monkeypatch):
    "Up to layer 3 the networks of `yarn` and `key_offset` agree; there only the standing half of the keys moves."
    z_plain, plain = watch(monkeypatch, network("yarn"))
    z_offset, offset = watch(monkeypatch, network("key_offset"))
    for layer in (0, 1, 2, 3):
        assert torch.equal(plain[layer]["q"], offset[layer]["q"]) and torch.equal(plain[layer]["v"], offset[layer]["v"])
    assert all(torch.equal(plain[layer]["k"], offset[layer]["k"]) for layer in (0, 1, 2))
    before, after = plain[3]["k"], offset[3]["k"]
    half = before.shape[-1] // 2
    assert torch.equal(after[..., :half], before[..., :half]), "the turning half stays"
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1:, :, half:], before[:-1, :, half:]), "the standing half moves, also across borders"
    assert not torch.equal(after[BORDERS[1], :, half:], before[BORDERS[1], :, half:])
    assert not torch.allclose(z_plain, z_offset)


@pytest.mark.parametrize("heads", [4, 6])
def test_what_pairing_does_to_every_paired_layer(monkeypatch, heads):
    "With attention that returns the values both networks are the same, so that every layer can be compared."
    raw = []
    kept = gpt.norm_queries_keys

    def watched_norm(q, k):
        raw.append(kept(q, k))
        return raw[-1]

    monkeypatch.setattr(gpt, "norm_queries_keys", watched_norm)
    plain_model, paired_model = network("key_offset", heads), network("paired_heads", heads)
    z_plain, plain = watch(monkeypatch, plain_model, identity=True)
    unturned = dict(zip(WITH_ATTENTION, raw, strict=True))
    z_paired, paired = watch(monkeypatch, paired_model, identity=True)
    assert torch.equal(z_plain, z_paired), "rows go back to the heads they came from"
    cos, sin = paired_model.rotary_cos, paired_model.rotary_sin
    assert len(cos) == 2 * len(plain_model.rotary_cos)
    for layer, call in paired.items():
        if layer not in (0, 2, 5, 9):
            assert all(torch.equal(call[x], plain[layer][x]) for x in "qkv") and call["borders"] == BORDERS
            continue
        assert call["borders"] == [2 * b for b in BORDERS] and call["max_len"] == 2 * plain[layer]["max_len"]
        assert call["window"] == plain[layer]["window"] and call["scale"] == plain[layer]["scale"]
        for t in (0, 1, 19, 20, TOKENS - 1):
            for h in range(heads):
                row, slot, p = 2 * t + h // (heads // 2), h % (heads // 2), 2 * t + h % 2
                assert torch.equal(call["v"][row, slot], plain[layer]["v"][t, h])
                for name, x in zip("qk", unturned[layer], strict=True):
                    turned = rotate(x[:, t : t + 1, h : h + 1], cos[p:], sin[p:]).flatten()
                    assert torch.equal(call[name][row, slot], turned), (layer, name, t, h)


def test_pairing_changes_the_network(monkeypatch):
    a, b = (watch(monkeypatch, network(rung))[0] for rung in ("key_offset", "paired_heads"))
    assert not torch.allclose(a, b)
