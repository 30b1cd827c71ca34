"Skips, factors, late input and backout: the network against a plain reference, and what each wrong wire shows."

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib import gpt
from speedrun_lib.gpt import build_model
from speedrun_lib.lean import rms_norm
from speedrun_lib.logits import softcap
from speedrun_lib.optimizer import parameter_rules
from speedrun_lib.recipe import SIZES, RecipeError, recipe_for
from speedrun_lib.streams import GATE_DIMS, LATE_FROM, SKIP_FROM, SKIP_TO, initial_scalars, skip_strength

RUNGS = ("late_split", "x0_skip", "lambdas", "gated_skip", "late_input", "backout")
WITH_ATTENTION = (0, 1, 2, 3, 4, 5, 7, 8, 9, 10)
A = 1.046875  # sqrt(1.1) in bf16
GATE = 0.18243


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(rung, woken=False):
    "The network of a rung at size nano; `woken` moves every parameter away from its start."
    torch.manual_seed(0)
    model = build_model(recipe_for(rung, "nano"), SIZES["nano"])
    if woken:
        with torch.no_grad():
            for name, p in model.named_parameters():
                size = 0.3 if "lambda" in name or name in ("scalars", "skip_gate") else 0.05
                p += size * torch.randn_like(p)
    return model


def tokens(length=16, seed=0):
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def watch(model, inputs, monkeypatch):
    "Logits, inputs of every attention and MLP (normed), and everything that was normed, in order."
    attended, up, normed = {}, [], []

    def attention(a_btd, layer, *rest):
        attended[layer] = a_btd
        return type(model).attention(model, a_btd, layer, *rest)

    with monkeypatch.context() as patch, torch.no_grad():
        mlp, norm = gpt.relu2_mlp, gpt.rms_norm
        patch.setattr(model, "attention", attention)
        patch.setattr(gpt, "relu2_mlp", lambda x, up_w, down_w: up.append(x) or mlp(x, up_w, down_w))
        patch.setattr(gpt, "rms_norm", lambda x: normed.append(x) or norm(x))
        return model.logits(inputs), attended, up, normed


@torch.no_grad()
def reference(model, inputs, fault=None):
    "The rung written out layer by layer; a fault is one wrong wire."
    r, last, outs = model.recipe, model.recipe.num_layers, []
    x = x0 = rms_norm(model.embed[inputs])

    def lam(name, *index):
        value = getattr(model, name)[index]
        return value if fault == "lambdas in fp32" else value.bfloat16()

    for i in range(last):
        if r.gated_skip and i == (5 if fault == "skip to 5" else 6):
            source = {"skip from 2": 2, "skip from 4": 4}.get(fault, 3)
            reads = x if fault == "gate reads the stream" else x0
            dims = slice(1, 13) if fault == "gate reads dimensions 1 to 12" else slice(0, 12)
            s = torch.sigmoid(model.scalars[22 if fault == "strength of smear" else 23])
            gate = torch.sigmoid((reads[..., dims] * model.skip_gate[0]).sum(-1, keepdim=True))
            x = x + (1 if fault == "gate without factor 2" else 2) * s * gate * outs[source]
            if fault == "layer 6 keeps its attention factor":
                x = lam("resid_lambdas", i, 0) * x
            if fault == "x0 at layer 6":
                x = x + lam("x0_lambdas", i) * x0
        else:
            n = i
            if r.gated_skip and i > 6 and fault != "banks do not close the gap":
                n = i - 1
            if fault == "skip to 5" and i == 6:
                n = 5
            n = min(n, len(model.vo_bank) // 2 - 1)
            q, k = model.qk_bank.view(-1, *model.vo_bank.shape[1:])[2 * n : 2 * n + 2]
            v, o = model.vo_bank[2 * n : 2 * n + 2]
            if r.lambdas:
                scale = model.scalars[2 * n if fault == "scalars by attention number" else 2 * i]
                q, k, v = (w if fault == "no s0" else scale * w for w in (q, k, v))
                if fault != "no s1":
                    o = o * model.scalars[2 * i + 1]
            if fault == "x0 before attention":
                x = x + lam("x0_lambdas", i) * x0
            late = {"late from 6": 6, "late from 5": 5}.get(fault, 7)
            a = outs[late] if r.late_input and i > late else x
            if fault == "late input without a norm" and i > 7:
                y = model.attention(a, i, (q, k, v))
            else:
                y = model.attention(rms_norm(a), i, (q, k, v))
            y = F.linear(y.flatten(2), o)
            if r.lambdas:
                y = y if fault == "no gain of attention" else lam("post_lambdas", i, 0) * y
                x = lam("resid_lambdas", i, 0) * (x + y if fault == "factor on the sum" else x)
                y = torch.zeros_like(y) if fault == "factor on the sum" else y
            x = x + y
            if r.x0_skip and fault not in ("x0 before attention", "x0 after the MLP"):
                x = x + lam("x0_lambdas", i) * x0
        reads = outs[7] if fault == "late MLPs read layer 7 too" and i > 7 else x
        y = F.relu(rms_norm(reads) @ model.mlp_bank[2 * i].T).square() @ model.mlp_bank[2 * i + 1]
        if r.lambdas:
            column = 0 if fault == "MLP takes attention's factors" else 1
            x, y = lam("resid_lambdas", i, column) * x, lam("post_lambdas", i, column) * y
        x = x + y
        if fault == "x0 after the MLP" and i != 6:
            x = x + lam("x0_lambdas", i) * x0
        outs.append(x)
    if r.backout:
        c7 = outs[6 if fault == "backout of layer 6" else 7]
        if fault == "backout of normed states":
            x = rms_norm(x) - model.backout_lambda * rms_norm(c7)
        else:
            x = x + (1 if fault == "backout is added" else -1) * model.backout_lambda * c7
    return softcap(rms_norm(x) @ model.lm_head), outs


# ---- the network against the reference


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("woken", [False, True])
def test_network_is_the_reference(rung, woken):
    model, inputs = network(rung, woken), tokens()
    torch.testing.assert_close(model.logits(inputs), reference(model, inputs)[0], atol=2e-5, rtol=1e-5)


FAULTS = {
    "x0_skip": ("x0 before attention", "x0 after the MLP"),
    "lambdas": ("lambdas in fp32", "no s0", "no s1", "no gain of attention", "factor on the sum", "x0 before attention",
                "MLP takes attention's factors"),
    "gated_skip": ("skip from 2", "skip from 4", "skip to 5", "gate reads the stream", "gate reads dimensions 1 to 12",
                   "strength of smear", "gate without factor 2",
                   "layer 6 keeps its attention factor", "x0 at layer 6", "banks do not close the gap",
                   "scalars by attention number"),
    "late_input": ("late from 6", "late from 5", "late input without a norm", "late MLPs read layer 7 too"),
    "backout": ("backout of layer 6", "backout of normed states", "backout is added"),
}


@pytest.mark.parametrize(("rung", "fault"), [(rung, fault) for rung, faults in FAULTS.items() for fault in faults])
def test_a_wrong_wire_shows(rung, fault):
    model, inputs = network(rung, woken=True), tokens()
    with torch.no_grad():
        gap = (model.logits(inputs) - reference(model, inputs, fault)[0]).abs().max()
    assert gap > 5e-3, f"{fault}: {gap:.1e}"


@pytest.mark.parametrize("rung", ["x0_skip", "lambdas", "late_input", "backout"])
def test_removing_a_rung_shows(rung):
    "The same parameters without the rung; the skip cannot go that way, because layer 6 has no matrices."
    model, inputs = network(rung, woken=True), tokens()
    with torch.no_grad():
        before = model.logits(inputs)
        model.recipe = dataclasses.replace(model.recipe, **{rung: False})
        assert (model.logits(inputs) - before).abs().max() > 1e-2


# ---- x0


@pytest.mark.parametrize("rung", ["x0_skip", "backout"])
@pytest.mark.parametrize("layer", range(11))
def test_x0_enters_between_attention_and_mlp(rung, layer, monkeypatch):
    model, changed, inputs = network(rung, woken=True), network(rung, woken=True), tokens()
    with torch.no_grad():
        changed.x0_lambdas[layer] += 1
    before, after = watch(model, inputs, monkeypatch), watch(changed, inputs, monkeypatch)
    attentions = [i for i in before[1] if not torch.equal(before[1][i], after[1][i])]
    mlps = [i for i in range(11) if not torch.equal(before[2][i], after[2][i])]
    if rung == "backout" and layer == 6:
        assert attentions == mlps == [] and torch.equal(before[0], after[0])
    else:
        late = [] if rung == "backout" and layer > LATE_FROM else [i for i in before[1] if i > layer]
        assert mlps == list(range(layer, 11)) and attentions == late


def test_x0_is_the_normed_embedding_whatever_happened_since(monkeypatch):
    model, changed, inputs = network("x0_skip", woken=True), network("x0_skip", woken=True), tokens()
    with torch.no_grad():
        changed.x0_lambdas[4] = model.x0_lambdas[4].bfloat16() + 0.5
        model.x0_lambdas[4] = changed.x0_lambdas[4] - 0.5
    a, b = watch(model, inputs, monkeypatch)[3], watch(changed, inputs, monkeypatch)[3]
    place = 1 + 2 * 4 + 1  # norms: embedding, then attention and MLP of each layer
    before, after = (m.x0_lambdas.detach()[4].bfloat16() for m in (model, changed))
    torch.testing.assert_close(b[place] - a[place], (after - before) * rms_norm(a[0]), atol=1e-5, rtol=1e-4)


def test_nothing_changes_at_the_start_and_all_lambdas_learn_at_once():
    model = network("x0_skip")
    assert not model.x0_lambdas.any()
    assert torch.equal(model.logits(tokens()), network("late_split").logits(tokens()))
    model(tokens(), tokens(seed=1)).backward()
    assert model.x0_lambdas.grad.all()


# ---- factors


def test_initial_values():
    model = network("backout")
    assert initial_scalars(11).tolist() == 11 * [0.5, 1.0] + [0.0, -1.5] == model.scalars.tolist()
    assert model.resid_lambdas.shape == model.post_lambdas.shape == (11, 2) and model.x0_lambdas.shape == (11,)
    torch.testing.assert_close(model.resid_lambdas, torch.full((11, 2), math.sqrt(1.1)))
    assert (model.post_lambdas == 1).all() and model.backout_lambda.tolist() == [0.5]
    assert model.skip_gate.shape == (1, GATE_DIMS) == (1, 12) and not model.skip_gate.any()


def test_root_of_one_point_one_in_bf16():
    assert (network("lambdas").resid_lambdas.bfloat16() == A).all()


@pytest.mark.parametrize("name", ["resid_lambdas", "post_lambdas", "x0_lambdas"])
def test_factors_are_rounded_in_the_forward_pass(name):
    "Moves below half a step of bf16 are invisible, gradients are rounded; the parameter itself keeps fp32."
    model, moved, inputs = network("lambdas", woken=True), network("lambdas", woken=True), tokens()
    with torch.no_grad():
        for m, shift in ((model, 0.0), (moved, 1e-3)):
            getattr(m, name).copy_(torch.full_like(getattr(m, name), A + shift))
        assert torch.equal(model.logits(inputs), moved.logits(inputs))
        getattr(moved, name).copy_(torch.full_like(getattr(moved, name), A + 5e-3))
        assert not torch.equal(model.logits(inputs), moved.logits(inputs))
    model(inputs, tokens(seed=1)).backward()
    p = getattr(model, name)
    assert p.dtype == torch.float32 and torch.equal(p.grad, p.grad.bfloat16().float())


def test_scalars_are_not_rounded():
    model, moved, inputs = network("lambdas"), network("lambdas"), tokens()
    with torch.no_grad():
        moved.scalars += 1e-4
        assert not torch.equal(model.logits(inputs), moved.logits(inputs))
    model(inputs, tokens(seed=1)).backward()
    assert not torch.equal(model.scalars.grad, model.scalars.grad.bfloat16().float())


def silent(rung):
    "A network whose layers add nothing, so that the stream shows the factors alone."
    model = network(rung)
    with torch.no_grad():
        model.vo_bank.zero_()
        model.mlp_bank.zero_()
    return model


def weight_at_the_head(rung, monkeypatch):
    "The stream before the head, as a multiple of the embedding."
    _, _, _, normed = watch(silent(rung), tokens(), monkeypatch)
    ratio = normed[-1] / rms_norm(normed[0])
    assert ratio.std() < 1e-4
    return float(ratio.mean())


def test_the_embedding_grows_by_almost_a_tenth_per_layer(monkeypatch):
    assert weight_at_the_head("x0_skip", monkeypatch) == pytest.approx(1)
    assert weight_at_the_head("lambdas", monkeypatch) == pytest.approx(A**22, rel=1e-5)
    assert round(A**22, 2) == 2.74 and round(A**20, 2) == 2.50 and round(1.1**10, 2) == 2.59


def test_skip_and_backout_at_the_start(monkeypatch):
    "Layer 6 multiplies once; the skip adds 0.18243 of layer 3; half of layer 7 goes."
    c3 = A**8
    c7 = A**3 * (A**12 + GATE * c3)  # attention of layer 7, MLPs of 6 and 7
    assert weight_at_the_head("gated_skip", monkeypatch) == pytest.approx(A**6 * c7, rel=1e-5)
    assert weight_at_the_head("late_input", monkeypatch) == pytest.approx(A**6 * c7, rel=1e-5)
    assert weight_at_the_head("backout", monkeypatch) == pytest.approx((A**6 - 0.5) * c7, rel=1e-5)


@pytest.mark.parametrize("layer", [0, 3, 5, 7, 10])
def test_s0_acts_on_values_only_so_s1_can_undo_it(layer):
    model, other, inputs = network("backout", woken=True), network("backout", woken=True), tokens()
    with torch.no_grad():
        other.scalars[2 * layer] *= 4
        assert (model.logits(inputs) - other.logits(inputs)).abs().max() > 1e-3
        other.scalars[2 * layer + 1] /= 4
        torch.testing.assert_close(model.logits(inputs), other.logits(inputs), atol=1e-4, rtol=1e-4)


def test_three_numbers_for_one_factor():
    model = network("backout")
    model(tokens(), tokens(seed=1)).backward()
    s, p = model.scalars, model.post_lambdas
    s0, s1, gain = (s * s.grad)[0:22:2], (s * s.grad)[1:22:2], (p * p.grad)[:, 0]
    torch.testing.assert_close(s0, s1, rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(gain, s1, rtol=2e-2, atol=1e-7)


def test_rules_of_the_small_numbers():
    "Rates at size full, before the schedule: 0.04 for scalars and stream factors, 4e-4 for the gate of the skip."
    recipe = recipe_for("backout")
    rules = parameter_rules(recipe)
    got = {name: (round(recipe.adam_lr * rules[name].lr, 9), rules[name].betas, rules[name].decay)
           for name in ("scalars", "resid_lambdas", "post_lambdas", "x0_lambdas", "skip_gate")}
    assert got == {"scalars": (0.04, (0.9, 0.99), 0), "resid_lambdas": (0.04, (0.9, 0.95), 0),
                   "post_lambdas": (0.008, (0.9, 0.95), 0), "x0_lambdas": (0.008, (0.9, 0.95), 0),
                   "skip_gate": (4e-4, (0.9, 0.99), 0)}


# ---- the skip and the missing attention


def test_places():
    assert (SKIP_FROM, SKIP_TO, LATE_FROM, GATE_DIMS) == (3, 6, 7, 12)


def test_initial_gate():
    gate = skip_strength(normal(2, 5, 20), torch.zeros(1, 12), torch.tensor(-1.5))
    torch.testing.assert_close(gate, torch.full((2, 5, 1), GATE), atol=5e-6, rtol=0)
    model = network("gated_skip")
    assert skip_strength(normal(1, 1, 128), model.skip_gate, model.scalars[-1]).item() == pytest.approx(GATE, abs=5e-6)


def test_gate_written_out():
    x0, gate_w = normal(2, 5, 20), normal(1, 12, seed=1)
    gate = skip_strength(x0, gate_w, torch.tensor(0.7))
    for b, t in ((0, 0), (1, 4)):
        logit = sum(float(gate_w[0, i] * x0[b, t, i]) for i in range(12))
        assert float(gate[b, t]) == pytest.approx(2 / (1 + math.exp(-0.7)) / (1 + math.exp(-logit)), rel=1e-5)


@given(strength=st.floats(-5, 5), size=st.floats(0, 5), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=25)
def test_the_gate_lies_between_zero_and_twice_its_strength(strength, size, seed):
    x0, gate_w = normal(1, 6, 16, seed=seed), size * normal(1, 12, seed=seed + 1)
    gate = skip_strength(x0, gate_w, torch.tensor(strength))
    top = 2 / (1 + math.exp(-strength))
    assert (gate >= 0).all() and (gate <= top * (1 + 1e-6)).all()
    # a gate and its opposite add up to the largest one
    torch.testing.assert_close(gate + skip_strength(x0, -gate_w, torch.tensor(strength)), torch.full_like(gate, top))
    other = x0.clone()
    other[..., 12:] += 1
    assert torch.equal(gate, skip_strength(other, gate_w, torch.tensor(strength)))


def test_bf16_stays_bf16():
    x0, gate_w = normal(1, 5, 16).bfloat16(), normal(1, 12).bfloat16()
    assert skip_strength(x0, gate_w, torch.tensor(-1.5)).dtype == torch.bfloat16


def test_shapes_of_the_banks():
    shapes = {}
    for rung in ("lambdas", "gated_skip"):
        with torch.device("meta"):
            full = build_model(recipe_for(rung), SIZES["full"])
        shapes[rung] = [tuple(b.shape) for b in (full.qk_bank, full.vo_bank, full.mlp_bank)]
    assert shapes == {"lambdas": [(66, 256, 768), (22, 768, 768), (22, 3072, 768)],
                      "gated_skip": [(60, 256, 768), (20, 768, 768), (22, 3072, 768)]}


@pytest.mark.parametrize("rung", RUNGS)
def test_layers_that_attend(rung, monkeypatch):
    attended = watch(network(rung), tokens(), monkeypatch)[1]
    assert tuple(attended) == (tuple(range(11)) if rung in RUNGS[:3] else WITH_ATTENTION)


@pytest.mark.parametrize(("layer", "n"), [(i, i if i < 6 else i - 1) for i in WITH_ATTENTION])
def test_each_layer_uses_its_own_matrices(layer, n, monkeypatch):
    "Silencing the n-th pair of value and output matrices silences the attention of one layer."
    model, inputs, gathered = network("backout", woken=True), tokens(), {}

    def attention(a_btd, i, matrices):
        gathered[i] = type(model).attention(model, a_btd, i, matrices)
        return gathered[i]

    model.attention = lambda a_btd, i, matrices, *rest: attention(a_btd, i, matrices)
    with torch.no_grad():
        model.vo_bank[2 * n] = 0
        model.logits(inputs)
    assert [i for i, y in gathered.items() if not y.any()] == [layer]


def test_names_of_layers_need_eleven_of_them():
    with pytest.raises(RecipeError, match="num_layers=11"):
        recipe_for("gated_skip", "nano", {"num_layers": "12"})


def readers_that_move(rung, change, monkeypatch):
    "Attentions and MLPs whose input moves when a network is changed."
    model, changed, inputs = network(rung, woken=True), network(rung, woken=True), tokens()
    with torch.no_grad():
        change(changed)
    before, after = watch(model, inputs, monkeypatch), watch(changed, inputs, monkeypatch)
    return ([i for i in before[1] if not torch.equal(before[1][i], after[1][i])],
            [i for i in range(11) if not torch.equal(before[2][i], after[2][i])])


def test_the_skip_enters_before_the_mlp_of_layer_6(monkeypatch):
    def close(model):
        model.scalars[23] = -50

    assert readers_that_move("gated_skip", close, monkeypatch) == ([7, 8, 9, 10], [6, 7, 8, 9, 10])
    assert readers_that_move("lambdas", close, monkeypatch) == ([], []), "without the rung the number waits"


# ---- late input and backout


def test_late_layers_attend_from_the_output_of_layer_7(monkeypatch):
    model, inputs = network("late_input", woken=True), tokens()
    attended = watch(model, inputs, monkeypatch)[1]
    c7 = rms_norm(reference(model, inputs)[1][7])
    for i in (8, 9, 10):
        torch.testing.assert_close(attended[i], c7, atol=2e-5, rtol=1e-4)
    assert all((attended[i] - c7).abs().max() > 0.1 for i in (0, 1, 2, 3, 4, 5, 7))


@pytest.mark.parametrize(("rung", "readers"), [("gated_skip", [9, 10]), ("late_input", [])])
def test_what_the_mlp_of_layer_8_reaches(rung, readers, monkeypatch):
    def change(model):
        model.mlp_bank[17] += 0.1

    assert readers_that_move(rung, change, monkeypatch) == (readers, [9, 10])


def test_late_mlps_still_read_the_stream(monkeypatch):
    def change(model):
        model.vo_bank[2 * 7 + 1] += 0.1  # output matrix of layer 8

    assert readers_that_move("late_input", change, monkeypatch) == ([], [8, 9, 10])


def test_backout_subtracts_half_of_layer_7(monkeypatch):
    "Before the last norm; everything else stays."
    inputs = tokens()
    without, with_it = (watch(network(rung), inputs, monkeypatch) for rung in ("late_input", "backout"))
    c7 = reference(network("late_input"), inputs)[1][7]
    torch.testing.assert_close(without[3][-1] - with_it[3][-1], 0.5 * c7, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(without[3][:-1], with_it[3][:-1], strict=True))


def test_numbers_that_nothing_reads():
    model = network("backout", woken=True)
    model(tokens(), tokens(seed=1)).backward()
    idle = {name: [tuple(i) for i in (p.grad == 0).nonzero().tolist()] for name, p in model.named_parameters()
            if name in ("scalars", "x0_lambdas", "resid_lambdas", "post_lambdas", "skip_gate", "backout_lambda")}
    assert idle == {"scalars": [(12,), (13,), (22,)], "x0_lambdas": [(6,)], "resid_lambdas": [(6, 0)],
                    "post_lambdas": [(6, 0)], "skip_gate": [], "backout_lambda": []}
