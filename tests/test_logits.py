"Logits: two tables that start as one, and the cap: its values, slopes, range, and what it does to the loss."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib.gpt import build_model
from speedrun_lib.lean import rms_norm
from speedrun_lib.logits import softcap
from speedrun_lib.recipe import SIZES, recipe_for

real = st.floats(-200, 200)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def nano(rung, layers=2):
    torch.manual_seed(0)
    return build_model(recipe_for(rung, "nano", {"num_layers": str(layers)}), SIZES["nano"])


def tokens(seed=0, high=200):
    return torch.randint(0, high, (2, 24), generator=torch.Generator().manual_seed(seed))


# ---- the cap


@pytest.mark.parametrize("z, expected", [(-30, 0.792239500), (-10, 7.802603518), (-5, 11.5), (0, 15.197396482),
                                         (5, 18.202003872), (10, 20.258332793), (20, 22.207760500), (30, 22.785732935)])
def test_values(z, expected):
    "Numeric oracle: spec 07, section 9."
    assert abs(softcap(torch.tensor(z, dtype=torch.float64)).item() - expected) < 6e-10


@pytest.mark.parametrize("z, expected", [(-5, 0.766666667), (0, 0.687415996), (10, 0.321980329)])
def test_slopes(z, expected):
    "Numeric oracle: spec 07, section 9."
    x = torch.tensor(float(z), dtype=torch.float64, requires_grad=True)
    softcap(x).backward()
    assert abs(x.grad.item() - expected) < 6e-10


@given(z=st.lists(real, min_size=2, max_size=20))
@settings(deadline=None, max_examples=50)
def test_range_order_and_slope(z):
    x = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    capped = softcap(x)
    assert (capped >= 0).all() and (capped <= 23).all()
    order = x.argsort()
    assert (capped[order].diff() >= -1e-12).all(), "the ranking of tokens is that of the raw logits"
    capped.sum().backward()
    torch.testing.assert_close(x.grad, capped.detach() * (1 - capped.detach() / 23) / 7.5, atol=1e-12, rtol=1e-9)
    assert (x.grad <= 23 / 30 + 1e-12).all(), "never steeper than at -5"


@given(distance=st.floats(0.01, 40))
@settings(deadline=None, max_examples=30)
def test_it_is_odd_around_minus_five_and_only_there(distance):
    up, down = (softcap(torch.tensor(-5 + s * distance, dtype=torch.float64)).item() for s in (1, -1))
    assert math.isclose(up + down, 23, rel_tol=1e-12)
    assert up + down > 0 and softcap(torch.tensor(distance)) + softcap(torch.tensor(-distance)) > 23


def test_records_18_and_19_are_one_function_and_record_54_another():
    raw = 8 * torch.randn(5, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    record_18, record_19 = 15 * torch.tanh(raw / 15), 30 * torch.sigmoid(raw / 7.5)
    torch.testing.assert_close(record_18.softmax(-1), record_19.softmax(-1))
    torch.testing.assert_close(softcap(raw), 11.5 + 11.5 * torch.tanh((raw + 5) / 15))
    assert (softcap(raw).softmax(-1) - record_18.softmax(-1)).abs().max() > 0.01
    assert (softcap(raw).softmax(-1) - softcap(raw + 5).softmax(-1)).abs().max() > 0.01, "a shift of raw logits matters"


def test_certainty_is_bounded_by_where_the_others_stand():
    "One token at +1e4 against 50,303 others: the best probability is 47.7 % at -4 and 95.0 % at -8."
    for crowd, expected in ((-4.0, 0.477), (-8.0, 0.950)):
        z = torch.full((50_304,), crowd, dtype=torch.float64)
        z[7] = 1e4
        assert abs(softcap(z).softmax(-1)[7].item() - expected) < 5e-4


# ---- in the network


def test_head_and_embedding_start_as_one_and_share_nothing():
    model = nano("untied")
    assert torch.equal(model.embed, model.lm_head.T) and model.lm_head.shape == (128, 384)
    assert model.embed.data_ptr() != model.lm_head.data_ptr()
    assert abs(model.lm_head.std().item() / 0.005 - 1) < 0.02
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in nano("open_vo").named_parameters()} | {"lm_head"}


def test_the_untied_head_is_a_transposed_copy_of_a_tied_one():
    "With the embedding normed by hand, the tied network of the rung before computes the same."
    model, tied = nano("untied"), nano("open_vo")
    tied.load_state_dict({k: v for k, v in model.state_dict().items() if k != "lm_head"})
    with torch.no_grad():
        tied.embed.copy_(rms_norm(model.embed))
        model.lm_head.copy_(tied.embed.T)
        torch.testing.assert_close(model.logits(tokens()), tied.logits(tokens()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rung", ["untied", "softcap"])
def test_the_size_of_an_embedding_is_forgotten(rung):
    model = nano(rung)
    with torch.no_grad():
        before = model.logits(tokens())
        model.embed *= 10
        torch.testing.assert_close(model.logits(tokens()), before, atol=2e-3, rtol=1e-3)
        model.lm_head *= 10
        assert (model.logits(tokens()) - before).abs().max() > 0.1


def test_two_gradients_no_longer_meet():
    model, x = nano("untied"), tokens()
    model(x, tokens(1)).backward()
    rows = model.embed.grad.any(1)
    assert rows.nonzero().flatten().tolist() == x.unique().tolist(), "only tokens that were read learn as embeddings"
    assert model.lm_head.grad.any(0).all(), "all columns learn as outputs"


def test_the_network_is_capped_on_its_rung_only():
    capped, plain = nano("softcap"), nano("untied")
    capped.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain.lm_head *= 200
        capped.lm_head *= 200
        z = plain.logits(tokens())
        assert z.max() > 23 and z.min() < 0
        torch.testing.assert_close(capped.logits(tokens()), softcap(z))


def test_first_loss():
    "Numeric oracle: spec 07, sections 9 and 10: 10.8304 for Gaussian logits behind the cap."
    row = torch.full((768,), 0.005)
    assert abs(rms_norm(row).square().mean().sqrt().item() - 0.997624) < 6e-7
    scale = 0.005 * math.sqrt(768) * 0.9976
    z = scale * torch.randn(64, 50_304, generator=torch.Generator().manual_seed(0))
    for form, expected in ((softcap, 10.8304), (torch.clone, 10.8354)):
        loss = form(z).logsumexp(-1).mean() - form(z).mean()  # targets know nothing of the logits
        assert abs(loss.item() - expected) < 1e-4
