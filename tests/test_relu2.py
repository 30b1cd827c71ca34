"Squared ReLU: each test fails when the square, the rectifier or the place in the network is wrong."

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib.gpt import build_model
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.relu2 import relu2_mlp


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_values_by_hand():
    x = torch.tensor([[[1.0, -2.0]], [[3.0, 1.0]]])
    up_w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])
    down_w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [10.0, 0.5]])
    assert relu2_mlp(x, up_w, down_w).tolist() == [[[1.0, 0.0]], [[9.0, 1.0]]]


def test_formula_of_the_specification():  # spec 01 §13: relu(x W1^T)^2 W2, both 4d x d
    x, up_w, down_w = random(2, 3, 8), random(32, 8, seed=1), random(32, 8, seed=2)
    z = torch.einsum("btd,hd->bth", x, up_w)
    wanted = torch.einsum("bth,hd->btd", torch.where(z > 0, z * z, torch.zeros_like(z)), down_w)
    assert torch.allclose(relu2_mlp(x, up_w, down_w), wanted, rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(a=st.floats(-50, 50), b=st.floats(-50, 50))
def test_four_neurons_multiply(a, b):
    up_w = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    down_w = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)[:, None] / 4
    product = relu2_mlp(torch.tensor([[a, b]], dtype=torch.float64), up_w, down_w).item()
    assert product == pytest.approx(a * b, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(0.01, 100))
def test_scaling_the_input_squares_the_scale(factor):
    x, up_w, down_w = random(5, 8), random(32, 8, seed=1), random(32, 8, seed=2)
    assert torch.allclose(relu2_mlp(factor * x, up_w, down_w), factor**2 * relu2_mlp(x, up_w, down_w), rtol=1e-9)


def test_gradients():
    args = [t.requires_grad_() for t in (random(3, 4), random(16, 4, seed=1), random(16, 4, seed=2))]
    assert torch.autograd.gradcheck(relu2_mlp, args)


def test_silent_neurons_get_no_gradient_and_the_slope_is_twice_the_root():
    x = torch.ones(1, 1)
    up_w = torch.tensor([[-2.0], [0.0], [0.5], [3.0]], requires_grad=True)
    relu2_mlp(x, up_w, torch.ones(4, 1)).sum().backward()
    assert up_w.grad.flatten().tolist() == [0.0, 0.0, 1.0, 6.0]


def test_second_moment_of_normal_inputs():
    x, eye = random(200_000, 1), torch.ones(1, 1, dtype=torch.float64)
    h = relu2_mlp(x, eye, eye)
    assert h.mean().item() == pytest.approx(0.5, abs=0.01) and h.square().mean().item() == pytest.approx(1.5, abs=0.05)
    assert (h == 0).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_the_rung_uses_it_and_the_one_before_does_not(monkeypatch):
    tokens, calls = torch.arange(12).view(1, 12), []
    monkeypatch.setattr("speedrun_lib.gpt.relu2_mlp", lambda *args, **kw: calls.append(1) or relu2_mlp(*args, **kw))
    outputs = {}
    for rung in ("qk_norm", "relu2"):
        torch.manual_seed(0)
        model = build_model(recipe_for(rung, "nano", {"num_layers": "2"}), SIZES["nano"])
        with torch.no_grad():
            outputs[rung] = model.logits(tokens)
        assert len(calls) == (0 if rung == "qk_norm" else 2), "once per layer, from its rung on"
    assert not torch.allclose(outputs["qk_norm"], outputs["relu2"], atol=1e-3)


def test_the_mlp_reads_the_normed_stream(monkeypatch):
    seen = []
    monkeypatch.setattr("speedrun_lib.gpt.relu2_mlp", lambda x, **kw: seen.append(x) or relu2_mlp(x, **kw))
    torch.manual_seed(0)
    model = build_model(recipe_for("relu2", "nano", {"num_layers": "2"}), SIZES["nano"])
    with torch.no_grad():
        model.logits(torch.arange(12).view(1, 12))
    for x in seen:
        assert torch.allclose(x.square().mean(-1), torch.ones(1, 12), atol=0.01)


def test_bfloat16_stays_bfloat16():
    x, up_w, down_w = random(3, 8).bfloat16(), random(32, 8, seed=1).bfloat16(), random(32, 8, seed=2).bfloat16()
    out = relu2_mlp(x, up_w, down_w)
    exact = F.relu(x.double() @ up_w.double().T).square() @ down_w.double()
    assert out.dtype == torch.bfloat16 and (out.double() - exact).norm() < 0.02 * exact.norm()
