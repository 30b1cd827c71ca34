"Windows and YaRN: the specification's numbers, which layer gets which window, and tables that follow the stages."

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib.documents import dense_weights, varlen_attention
from speedrun_lib.gpt import build_model
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.rotary import rotary_frequencies, rotary_table
from speedrun_lib.windows import FINAL_LONG, LONG_LAYERS, WINDOWS, stage_windows, stretched, stretched_scale, yarn

BASE = rotary_frequencies(128, 1024.0)
LONG = [384, 896, 1408, 1664]
ATTENTION_LAYERS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]


def scalar(x):
    return torch.tensor(x, dtype=torch.int32)


def network(rung, noise=0.0):
    torch.manual_seed(0)
    model = build_model(recipe_for(rung, "nano"), SIZES["nano"])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def run(model, tokens=256):
    "Logits of one document, and the calls of its attentions."
    inputs = torch.arange(tokens)[None] % 200 + 3
    inputs[0, 0] = 1  # occurs nowhere else
    with mock.patch("speedrun_lib.gpt.varlen_attention", wraps=varlen_attention) as attention:
        z = model.logits(inputs, scalar([0, tokens]), scalar(tokens))
    return z, [call.args for call in attention.call_args_list]


def windows_of(model):
    return [int(args[5]) for args in run(model, 32)[1]]


# ---- windows: specification 01 section 18, 03 section 5, 07 section 6


@pytest.mark.parametrize(("step", "blocks"), [
    (0, (1, 3)), (1, (1, 3)), (300, (1, 3)), (457, (1, 3)), (458, (3, 7)), (700, (3, 7)), (916, (3, 7)), (917, (5, 11)),
    (1200, (5, 11)), (1374, (5, 11)), (1375, (6, 13)), (1384, (6, 13)), (1385, (6, 13))])
def test_windows_of_each_step(step, blocks):
    windows = stage_windows(step, 1375, 128)
    assert windows[-1] == (128 * blocks[0], 128 * blocks[1])
    assert windows == [(128 * s, 128 * w) for s, w in WINDOWS[: len(windows)]]


def test_record_89_changes_windows_at_its_own_thirds():
    lasts = [stage_windows(step, 1270, 128)[-1][1] // 128 for step in (422, 423, 846, 847, 1269, 1270)]
    assert lasts == [3, 7, 7, 11, 11, 13]


def test_constants():
    assert LONG_LAYERS == (3, 10) and FINAL_LONG == 20 and WINDOWS == ((1, 3), (3, 7), (5, 11), (6, 13))


@settings(max_examples=50, deadline=None)
@given(step=st.integers(0, 3000), steps=st.integers(3, 2000), block=st.integers(1, 256))
def test_windows_only_grow(step, steps, block):
    now, later = stage_windows(step, steps, block), stage_windows(step + 1, steps, block)
    assert later[: len(now)] == now and len(later) - len(now) in (0, 1)
    assert all(0 < short < long and long % block == short % block == 0 for short, long in now)


@settings(max_examples=25, deadline=None)
@given(window=st.integers(0, 12), tokens=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_window_is_itself_and_w_tokens_before(window, tokens, seed):
    q, k = torch.randn(2, tokens, 1, 4, generator=torch.Generator().manual_seed(seed))
    seen = dense_weights(q, k, scalar([0, tokens]), window, 0.1)[0] > 0
    assert seen.sum(1).tolist() == [min(i, window) + 1 for i in range(tokens)]
    assert seen.diagonal().all() and not seen.triu(1).any()


# ---- YaRN: specification 07 section 7


@pytest.mark.parametrize(("stages", "scale"), [(1, "0.1"), (2, "0.116945957208"), (3, "0.127517523796"),
                                               (4, "0.131777988439")])
def test_softmax_scale(stages, scale):
    assert f"{yarn(BASE, 0.1, LONG[:stages])[1]:.{len(scale) - 2}f}" == scale


@pytest.mark.parametrize(("old", "new", "factor"), [(3, 7, "1.169459572077"), (7, 11, "1.090397024749"),
                                                    (11, 13, "1.033410816933")])
def test_multipliers(old, new, factor):
    assert f"{stretched_scale(1.0, 128 * old, 128 * new):.12f}" == factor


FREQUENCIES = {0: ["1"] * 4, 1: ["0.7996382"] * 4, 2: ["0.6394213"] * 4,
               5: ["0.3269398", "0.2545073", "0.2545073", "0.2545073"],
               8: ["0.1671662", "0.1000423", "0.07923148", "0.07363022"],
               12: ["0.06834750", "0.03329448", "0.02265114", "0.01962453"],
               20: ["0.01142539", "0.004896596", "0.003116016", "0.002636629"],
               31: ["9.765625e-4", "4.185268e-4", "2.663352e-4", "2.253606e-4"]}


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("j", FREQUENCIES)
def test_frequencies(j, stages):
    expected = FREQUENCIES[j][stages - 1]
    digits = len(expected.split("e")[0].replace(".", "").lstrip("0"))
    found = float(yarn(BASE, 0.1, LONG[:stages])[0][j])
    assert f"{found:.{digits}g}" == f"{float(expected):.{digits}g}"


def test_sums_of_frequencies_to_the_last_digit():
    sums = [f"{yarn(BASE, 0.1, LONG[:n])[0].double().sum():.8f}" for n in (2, 3, 4)]
    assert sums == ["4.30149749", "4.14763827", "4.11007610"]


def test_table_entries_at_position_one_and_at_the_far_end():
    "Fast pairs keep their entries in every stage; slow ones show the old far end at the new one."
    for stages in (1, 2, 3, 4):
        cos, sin = rotary_table(yarn(BASE, 0.1, LONG[:stages])[0], LONG[stages - 1] + 1)
        assert cos[1, :4].tolist() == [0.5390625, 0.5390625, 0.6953125, 0.6953125]
        assert sin[1, :4].tolist() == [0.83984375, -0.83984375, 0.71875, -0.71875]
        first = rotary_table(BASE, 385)
        assert (cos[-1, 40:] - first[0][384, 40:]).abs().max() < 2**-7
        assert (sin[-1, 40:] - first[1][384, 40:]).abs().max() < 2**-7


@settings(max_examples=60, deadline=None)
@given(old=st.integers(64, 4000), growth=st.integers(1, 4000), pair=st.integers(0, 31))
def test_fast_pairs_stay_slow_ones_keep_the_angle_of_the_far_end(old, growth, pair):
    new, f = old + growth, float(BASE[pair])
    after, turns = float(stretched(BASE, old, new)[pair]), old * float(BASE[pair]) / (2 * math.pi)
    assert f * old / new * (1 - 1e-6) <= after <= f * (1 + 1e-6)
    if turns >= 32:
        assert after == pytest.approx(f, rel=1e-6)
    elif turns <= 1:
        assert new * after == pytest.approx(old * f, rel=1e-5)
    else:
        keep = (turns - 1) / 31
        assert after == pytest.approx(keep * f + (1 - keep) * f * old / new, rel=1e-5)
    assert stretched_scale(0.1, old, new) > 0.1


def test_order_of_the_pairs_and_standing_pairs_survive():
    after = yarn(BASE, 0.1, LONG)[0]
    assert (after[:31] > after[1:32]).all() and after[32:].eq(0).all() and after.dtype == torch.float32
    assert torch.equal(BASE, rotary_frequencies(128, 1024.0)), "the first frequencies are not changed in place"


def test_each_jump_starts_from_the_last_one():
    by_hand = stretched(stretched(stretched(BASE, 384, 896), 896, 1408), 1408, 1664)
    assert torch.equal(yarn(BASE, 0.1, LONG)[0], by_hand)
    assert not torch.allclose(yarn(BASE, 0.1, [384, 1664])[0], by_hand), "one big jump is another rule"
    frequencies, scale = yarn(BASE, 0.1, [384])
    assert torch.equal(frequencies, BASE) and scale == 0.1


# ---- in the network


@pytest.mark.parametrize("rung", ["windows", "yarn"])
@pytest.mark.parametrize(("step", "blocks"), [(0, (1, 3)), (39, (1, 3)), (40, (3, 7)), (80, (5, 11)), (120, (6, 13))])
def test_layers_3_and_10_get_the_long_window(rung, step, blocks):
    model = network(rung)
    model.at_step(step)
    assert windows_of(model) == [16 * blocks[layer in (3, 10)] for layer in ATTENTION_LAYERS]


def test_the_last_validation_widens_the_long_layers_only():
    model = network("yarn")
    model.at_step(120)
    model.long.fill_(FINAL_LONG * model.recipe.window_block)
    assert windows_of(model) == [320 if layer in (3, 10) else 96 for layer in ATTENTION_LAYERS]


def test_without_the_rung_the_longest_document_is_the_limit():
    assert set(windows_of(network("documents"))) == {32}


@pytest.mark.parametrize("layer", [1, 3, 10])
def test_one_layer_sees_its_window_and_not_a_token_more(layer):
    model, window = network("windows"), 48 if layer in (3, 10) else 16
    matrices = torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(1)) / 12
    gate = torch.zeros(4, 12)
    a = torch.randn(1, 128, 128, generator=torch.Generator().manual_seed(2))
    changed = a.clone()
    changed[0, 20] += 1
    with torch.no_grad():
        old, new = (model.attention(x, layer, tuple(matrices), None, gate, scalar([0, 128]), scalar(128))
                    for x in (a, changed))
    differs = (old != new).flatten(2).any(-1)[0].nonzero().flatten().tolist()
    assert differs == list(range(20, 20 + window + 1))


def test_reach_of_the_whole_network():
    "Seven short and two long windows follow each other, and the smear adds a token."
    model, reach = network("windows", noise=0.1).double(), 7 * 16 + 2 * 48 + 1
    z, _ = run(model, 224)

    def heard(position):
        return torch.autograd.grad(z[0, position].sum(), model.embed, retain_graph=True)[0][1].any().item()

    assert heard(reach) and not heard(reach + 1)


def test_stages_set_tables_and_scale():
    model = network("yarn")
    first = rotary_frequencies(32, 1024.0)
    long = [48, 112, 176, 208]
    for stage, step in enumerate((0, 40, 80, 120)):
        model.at_step(step)
        frequencies, scale = yarn(first, 0.4, long[: stage + 1])
        cos, sin = rotary_table(frequencies, len(model.rotary_cos))
        assert torch.equal(model.rotary_cos, cos) and torch.equal(model.rotary_sin, sin)
        assert float(model.softmax_scale) == pytest.approx(scale, rel=1e-6)
        _, calls = run(model, 32)
        assert {round(float(args[6]), 6) for args in calls} == {round(scale, 6)}, "one scale for all layers"


def test_a_stage_is_the_same_whatever_came_before():
    model = network("yarn")
    start = model.rotary_cos.clone(), model.rotary_sin.clone(), model.softmax_scale.clone()
    model.at_step(80)
    once = model.rotary_cos.clone(), model.rotary_sin.clone(), model.softmax_scale.clone()
    for steps in ((80,), (81,), (0, 80), (40, 80), (120, 80)):  # twice, going on, from the start, by stages, back
        for step in steps:
            model.at_step(step)
        now = model.rotary_cos, model.rotary_sin, model.softmax_scale
        assert all(torch.equal(a, b) for a, b in zip(now, once, strict=True))
    assert not torch.equal(once[0], start[0])
    model.at_step(0)
    now = model.rotary_cos, model.rotary_sin, model.softmax_scale
    assert all(torch.equal(a, b) for a, b in zip(now, start, strict=True))
    assert windows_of(model)[3] == 48


def test_the_jump_to_twenty_blocks_changes_neither_tables_nor_scale_and_is_undone():
    model = network("yarn")
    model.at_step(120)
    before = model.rotary_cos.clone(), float(model.softmax_scale)
    model.long.fill_(FINAL_LONG * model.recipe.window_block)
    run(model, 32)
    assert torch.equal(model.rotary_cos, before[0]) and float(model.softmax_scale) == before[1]
    model.at_step(120)
    assert int(model.long) == 13 * 16
    assert torch.equal(model.rotary_cos, before[0]) and float(model.softmax_scale) == before[1]


def test_windows_alone_leave_tables_and_scale():
    model = network("windows")
    before = model.rotary_cos.clone(), float(model.softmax_scale)
    model.at_step(120)
    assert torch.equal(model.rotary_cos, before[0]) and float(model.softmax_scale) == before[1]
    assert before[1] == pytest.approx(0.48)


def test_training_ends_with_twenty_blocks(monkeypatch, tmp_path):
    "The trainer widens the long window for the last validation and nowhere else."
    from speedrun_lib import train as trainer
    from speedrun_lib.data import write_demo

    seen, size = [], SIZES["nano"]
    recipe = recipe_for("yarn", "nano", {"steps": "3"})

    def note(model, *_):
        seen.append((int(model.short), int(model.long), float(model.softmax_scale)))
        return 1.0

    monkeypatch.setattr(trainer, "validate", note)
    monkeypatch.setattr(trainer, "train_step", lambda *_: torch.tensor(1.0))
    run_options = trainer.Run(write_demo(tmp_path / "data", "bytes"), tmp_path / "run", val_every=1)
    trainer.train(recipe, size, run_options, trainer.join_world("cpu"), trainer.RunLog(tmp_path / "run", 0))
    assert [pair[:2] for pair in seen] == [(16, 48), (48, 112), (80, 176), (96, 320)]
    scales = [yarn(BASE, 0.4, LONG[:n])[1] for n in (1, 2, 3, 4)]
    assert [pair[2] for pair in seen] == pytest.approx(scales, rel=1e-6)
