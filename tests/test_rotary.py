"Rotary positions: the specification's layout and digits, and what every turn must keep."

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib.gpt import GPT
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.rotary import rotary_frequencies, rotary_table, rotate

FREQUENCIES = rotary_frequencies(128, 1024.0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_turn(x, position, head_dim, base):
    "The specification's formula for one vector, pair by pair, in fp64."
    out, x = x.double().clone(), x.double()
    quarter = head_dim // 4
    for j in range(quarter):
        angle = position * base ** (-j / (quarter - 1))
        a, b = x[2 * j], x[2 * j + 1]
        out[2 * j] = a * math.cos(angle) + b * math.sin(angle)
        out[2 * j + 1] = b * math.cos(angle) - a * math.sin(angle)
    return out


# ---- numeric oracles (specification 07, section 7)


@pytest.mark.parametrize(("j", "expected"), [(0, "1"), (1, "0.7996382"), (2, "0.6394213"), (5, "0.3269398"),
                                             (8, "0.1671662"), (12, "0.06834750"), (20, "0.01142539"),
                                             (31, "9.765625e-4")])
def test_base_frequencies(j, expected):
    digits = len(expected.split("e")[0].replace(".", "").lstrip("0"))
    assert f"{float(FREQUENCIES[j]):.{digits}g}" == f"{float(expected):.{digits}g}"


def test_half_of_the_pairs_stand_still():
    assert FREQUENCIES.dtype == torch.float32 and len(FREQUENCIES) == 64
    assert len(FREQUENCIES[:32].unique()) == 32 and FREQUENCIES[32:].eq(0).all()
    assert FREQUENCIES.repeat_interleave(2).count_nonzero() == 64


def test_table_entries_at_position_one():
    cos, sin = rotary_table(FREQUENCIES, 2)
    assert cos.dtype == sin.dtype == torch.bfloat16 and cos.shape == sin.shape == (2, 128)
    assert cos[1, :4].tolist() == [0.5390625, 0.5390625, 0.6953125, 0.6953125]
    assert sin[1, :4].tolist() == [0.83984375, -0.83984375, 0.71875, -0.71875]
    assert cos[0].eq(1).all() and sin[0].eq(0).all()


def test_angles_are_not_rounded_before_their_cosine():
    "With bf16 angles, or fp32 frequencies rounded to bf16, late rows are off by far more than a bf16 unit."
    cos, sin = rotary_table(FREQUENCIES, 1024)
    angles = torch.arange(1024).double()[:, None] * FREQUENCIES.double()
    assert (cos[:, ::2].double() - angles.cos()).abs().max() < 2**-8
    assert (sin[:, ::2].double() - angles.sin()).abs().max() < 2**-8
    assert torch.equal(sin[:, ::2], -sin[:, 1::2])


# ---- the turn


@settings(max_examples=40, deadline=None)
@given(head_dim=st.sampled_from([8, 32, 64, 128]), position=st.integers(0, 255), base=st.sampled_from([16.0, 1024.0]),
       seed=st.integers(0, 99))
def test_a_turn_is_the_written_formula(head_dim, position, base, seed):
    cos, sin = rotary_table(rotary_frequencies(head_dim, base), 256)
    x = vectors(1, 1, 1, head_dim, seed=seed)
    turned = rotate(x, cos[position:], sin[position:])[0, 0, 0]
    assert torch.allclose(turned.double(), exact_turn(x[0, 0, 0], position, head_dim, base), atol=0.03)


def test_every_position_has_its_own_angle_and_every_head_the_same():
    cos, sin = rotary_table(rotary_frequencies(32, 1024.0), 300)
    x = vectors(2, 20, 3, 32)
    turned = rotate(x, cos, sin)
    assert turned.shape == x.shape and torch.equal(turned[:, 0], x[:, 0])
    for t in (1, 7, 19):
        alone = rotate(x[:, t : t + 1, 1:2], cos[t:], sin[t:])
        assert torch.equal(turned[:, t, 1], alone[:, 0, 0])
        assert not torch.allclose(turned[:, t], x[:, t], atol=0.1)
    assert torch.equal(turned[..., 16:], x[..., 16:]), "the second half stands still"


@settings(max_examples=40, deadline=None)
@given(shift=st.integers(0, 900), distance=st.integers(-60, 60), seed=st.integers(0, 99))
def test_a_score_depends_on_the_distance_only(shift, distance, seed):
    cos, sin = rotary_table(rotary_frequencies(64, 1024.0), 1024)
    q, k = vectors(2, 1, 1, 1, 64, seed=seed)
    size = float(q.norm() * k.norm())

    def score(m, n):
        return float((rotate(q, cos[m:], sin[m:]) * rotate(k, cos[n:], sin[n:])).sum()) / size

    assert abs(score(61 + shift + distance, 61 + shift) - score(61 + distance, 61)) < 0.006
    assert abs(float(rotate(q, cos[shift:], sin[shift:]).norm() / q.norm()) - 1) < 4e-3


def test_the_sign_of_the_distance_counts():
    cos, sin = rotary_table(rotary_frequencies(64, 1024.0), 16)
    q, k = vectors(2, 1, 1, 1, 64)
    after, before = ((rotate(q, cos[m:], sin[m:]) * rotate(k, cos[n:], sin[n:])).sum() for m, n in ((9, 0), (0, 9)))
    assert abs(after - before) > 1


def test_low_precision_inputs_stay_low_precision():
    cos, sin = rotary_table(rotary_frequencies(32, 1024.0), 8)
    assert rotate(vectors(1, 8, 2, 32).bfloat16(), cos, sin).dtype == torch.bfloat16
    assert rotate(vectors(1, 8, 2, 32), cos, sin).dtype == torch.float32


# ---- in the network


def rotary_net(layers="1"):
    torch.manual_seed(0)
    return GPT(recipe_for("rotary", "nano", {"num_layers": layers}), SIZES["nano"])


def test_the_network_holds_tables_and_no_position_weights():
    model = rotary_net()
    assert not hasattr(model, "position") and not any("rotary" in name for name in model.state_dict())
    cos, sin = rotary_table(rotary_frequencies(32, 1024.0), 256)
    assert torch.equal(model.rotary_cos, cos) and torch.equal(model.rotary_sin, sin)


def test_attention_sees_order_and_only_distances():
    "Without positions the last output ignores the order of the past; with absolute ones it changes when all moves."
    model = rotary_net()
    q, k, v, o = (w for bank in (model.qk_bank, model.vo_bank) for w in bank.detach() * 6)

    def last_output(x):
        return F.linear(model.attention(x, 0, (q, k, v)).flatten(2), o)[:, -1]

    x = vectors(1, 12, 128)
    reversed_past = x[:, [*range(10, -1, -1), 11]]
    with torch.no_grad():
        last = last_output(x)
        other_order = last_output(reversed_past)
        model.rotary_cos, model.rotary_sin = model.rotary_cos[100:], model.rotary_sin[100:]
        moved = last_output(x)
    assert (other_order - last).abs().max() > 0.2 * last.abs().max()
    assert (moved - last).abs().max() < 0.02 * last.abs().max()
