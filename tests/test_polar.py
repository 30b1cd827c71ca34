"""Polar Express: coefficients from their derivation, the oracles' digits, and what a faulty wiring would break."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib.gpt import build_model
from speedrun_lib.muon import nesterov, newton_schulz
from speedrun_lib.polar import POLAR_COEFFICIENTS, minimax_quintic, polar_coefficients, polar_express
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.train import build_optimizer

BAND = 0.858872644, 1.141127356  # image of [1e-3, 1]
QUICK = settings(max_examples=40, deadline=None)


def stops(s, coefficients=POLAR_COEFFICIENTS):
    "A singular value after each iteration."
    out = []
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
        out.append(s)
    return np.array(out)


def matrix(values, rows, columns, seed):
    "A matrix with these singular values, largest dimension first or last."
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, len(values), generator=g, dtype=torch.float64))[0] for n in (rows, columns))
    return u @ torch.as_tensor(values, dtype=torch.float64).diag() @ v.T


# ---- coefficients


def test_the_stored_coefficients_are_the_derived_ones():
    assert np.abs(np.subtract(polar_coefficients(), POLAR_COEFFICIENTS)).max() < 1e-12


CHANGES = [{"safety": 1.01}, {"cushion": 0.0}, {"cushion": 0.05}, {"lower": 2e-3}, {"steps": 6}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_constant_of_the_derivation_matters(change):
    assert np.abs(np.subtract(polar_coefficients(**change)[:5], POLAR_COEFFICIENTS)).max() > 1e-3


def test_the_last_polynomial_is_not_divided_by_the_safety_factor():
    wrong = 2.300530711627095, -1.611166555725838, 0.3833374427545269  # oracle: wrongly divided
    a, b, c = polar_coefficients()[-1]
    assert np.allclose((a / 1.02, b / 1.02**3, c / 1.02**5), wrong, atol=1e-12)
    assert np.prod([a for a, _, _ in POLAR_COEFFICIENTS]) == pytest.approx(989.4684, abs=5e-5)


@QUICK
@given(st.floats(-3, -0.05), st.floats(0.3, 3))
def test_the_quintic_is_minimax(exponent, upper):
    lower = upper * 10**exponent
    a, b, c = minimax_quintic(lower, upper)
    x = np.linspace(lower, upper, 4001)
    worst = np.abs(1 - stops(x, [(a, b, c)])[0]).max()
    peaks = [lower, *sorted(np.sqrt(np.roots([5 * c, 3 * b, a]))), upper]  # equal errors with alternating signs
    errors = 1 - stops(np.array(peaks), [(a, b, c)])[0]
    assert np.allclose(errors, worst * np.array([1, -1, 1, -1]), rtol=1e-5, atol=1e-12)
    scaled = minimax_quintic(lower / upper, 1.0)
    assert np.allclose((a * upper, b * upper**3, c * upper**5), scaled, rtol=1e-6)


def test_the_quintic_of_a_point_is_flat_there():
    a, b, c = minimax_quintic(2.0, 2.0)
    assert a * 2 + b * 8 + c * 32 == pytest.approx(1)
    assert a + 3 * b * 4 + 5 * c * 16 == pytest.approx(0) and 6 * b * 2 + 20 * c * 8 == pytest.approx(0)
    assert np.allclose(minimax_quintic(1.0, 1.0), minimax_quintic(1 - 1e-4, 1.0), atol=1e-3)
    final = stops(np.geomspace(1e-3, 1, 999), polar_coefficients(steps=12, safety=1.0, cushion=0.0))[-1]
    assert np.abs(final - 1).max() < 1e-12, "with enough iterations the interval becomes a point"


# ---- oracles (specification 07, section 1)

FILM = {
    1: (1.552031515, 0.276371924, 1.017837422, 1.354656963, 0.859128963),
    1 / 1.02: (1.192004140, 1.265061848, 0.949782237, 1.450773301, 0.903537420),
    0.5: (1.764077207, 0.254051850, 0.943760272, 1.458098218, 0.910610876),
    0.1: (0.793330947, 1.962013117, 1.409083497, 0.584688216, 1.059161138),
    0.05: (0.405022277, 1.456298950, 0.419346922, 1.209261310, 0.908558279),
    0.01: (0.081543064, 0.328151695, 1.181013062, 1.046786008, 1.027110178),
    0.001: (0.008156532, 0.032974763, 0.128227438, 0.416347028, 0.858872644),
    0.0001: (0.000815655, 0.003297636, 0.012833205, 0.042161746, 0.098806193),
}


@pytest.mark.parametrize("s", FILM)
def test_singular_values_over_iterations(s, monkeypatch):
    assert np.allclose(stops(s), FILM[s], atol=6e-10, rtol=0)
    # the same through matrices: a second singular value makes the normalised first one equal to s
    if s < 0.98:
        rest = np.sqrt(1 / 1.02**2 - s**2)
        for k in range(1, 6):
            monkeypatch.setattr("speedrun_lib.polar.POLAR_COEFFICIENTS", POLAR_COEFFICIENTS[:k])
            out = torch.linalg.svdvals(polar_express(1e6 * matrix([s, rest], 3, 2, 0)[None]))[0]
            assert np.allclose(sorted(out), sorted([FILM[s][k - 1], stops(rest)[k - 1]]), atol=1e-8)


def test_images():
    image = stops(np.geomspace(1e-3, 1, 200_001))
    assert np.allclose([image[4].min(), image[4].max()], BAND, atol=6e-10, rtol=0)
    assert np.allclose(image[:4].max(1), [1.991680, 1.966366, 1.869212, 1.575530], atol=6e-7, rtol=0)


TOYS = {
    (6, 4): (1.184185611, (1.135300, 1.004355, 0.898114, 0.874266), (0.046593, 0.456240, -0.073241)),
    (4, 6): (1.079388667, (1.118975, 1.068993, 1.049926, 0.893159), (-0.024974, 0.460731, 0.623785)),
}


@pytest.mark.parametrize("shape", TOYS)
def test_momentum_and_polar_of_a_small_matrix(shape):
    i, j = (torch.arange(n, dtype=torch.float64) for n in shape)
    grad = torch.sin(1.3 * i[:, None] + 0.7 * j) + 0.5 * torch.cos(0.11 * i[:, None] * j)
    buffer = torch.zeros_like(grad)
    u = nesterov(buffer, grad, 0.85)
    norm, values, corner = TOYS[shape]
    assert (buffer[0, 0].item(), u[0, 0].item()) == pytest.approx((0.075, 0.13875), abs=1e-12)
    assert u.norm().item() == pytest.approx(norm, abs=6e-10)
    out = polar_express(u[None])[0]
    assert torch.linalg.svdvals(out).tolist() == pytest.approx(values, abs=1.5e-6)
    assert out[0, :3].tolist() == pytest.approx(corner, abs=1.5e-6)


# ---- properties of the function

SPECTRA = st.lists(st.floats(-2.9, 0), min_size=1, max_size=6)  # exponents of ten; -2.9 leaves room for the norm's 1.02
SHAPES = st.tuples(st.integers(6, 9), st.integers(6, 9), st.integers(0, 9_999))


def spectrum(exponents):
    "Singular values with Frobenius norm one, none below 1.1e-3."
    values = 10 ** np.array(exponents)
    return np.maximum(values / np.linalg.norm(values), 1.1e-3)


@QUICK
@given(SPECTRA, SHAPES)
def test_singular_values_end_in_the_band_and_vectors_stay(exponents, shape):
    values = spectrum(exponents)
    m = matrix(values, *shape)
    out = polar_express(m[None])[0]
    found = torch.linalg.svdvals(out)[: len(values)]
    assert found.min() > BAND[0] - 1e-9 and found.max() < BAND[1] + 1e-9
    expected = stops(values / (m.norm().item() * 1.02 + 1e-6))[4]
    assert torch.allclose(out, matrix(expected, *shape), atol=1e-9), "the polynomial acts on singular values alone"


@QUICK
@given(SPECTRA, SHAPES, st.floats(2, 6))  # below, the 1e-6 beside the norm shows: slopes of the film reach 989
def test_the_size_of_the_gradient_does_not_matter(exponents, shape, magnitude):
    m = matrix(spectrum(exponents), *shape)[None]
    assert torch.allclose(polar_express(m * 10**magnitude), polar_express(1e6 * m), atol=3e-5)


@QUICK
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9_999))
def test_tall_is_wide_transposed_and_a_stack_is_its_matrices(rows, columns, seed):
    stack = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out = polar_express(stack)
    assert torch.allclose(polar_express(stack.mT), out.mT, atol=1e-9)
    assert torch.allclose(torch.cat([polar_express(m[None]) for m in stack]), out, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_zero_matrices_stay_zero_beside_others(dtype, shape):
    stack = torch.zeros(3, *shape, dtype=dtype)
    stack[1] = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    out = polar_express(stack)
    assert out.dtype == dtype and out.shape == stack.shape
    assert not out[[0, 2]].any() and torch.linalg.svdvals(out[1].double()).min() > 0.8


def test_input_is_left_alone():
    stack = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    before = stack.clone()
    polar_express(stack)
    assert torch.equal(stack, before)


@QUICK
@given(SHAPES)
def test_bf16_stays_near_the_band(shape):
    "Rounding moves singular values a little and must not explode."
    rows, columns, seed = shape
    m = matrix(np.geomspace(1, 1e-2, 6), rows, columns, seed)
    found = torch.linalg.svdvals(polar_express(m.bfloat16()[None]).double())[0, :6]
    assert found.min() > BAND[0] - 0.1 and found.max() < BAND[1] + 0.1


# ---- precautions


def test_the_safety_factor_absorbs_two_per_cent():
    assert BAND[0] < stops(1.02)[4] < BAND[1]
    assert stops(1.005, polar_coefficients(safety=1.0))[4] > 1e60


def test_the_cushion_keeps_large_values_large():
    x = np.linspace(0.5, 1, 5001)
    assert stops(x)[0].min() > 0.16 and stops(x, polar_coefficients(cushion=0.0))[0].min() < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_the_cushion_reduces_what_rounding_leaks(seed, monkeypatch):
    "A singular value in the first dip, in bf16: how much of its row ends in other directions."
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(128, 128, generator=g, dtype=torch.float64))[0] for _ in range(2))
    s = torch.logspace(0, -2.5, 128, dtype=torch.float64)
    s[1:] *= (1 - (0.837 * 1.02) ** 2) ** 0.5 / s[1:].norm()
    s[0] = 0.837 * 1.02  # the norm is one, and the function divides by 1.02
    m, leaks = (u @ s.diag() @ v.T).bfloat16()[None], {}
    for cushion in (0.02, 0.0):
        monkeypatch.setattr("speedrun_lib.polar.POLAR_COEFFICIENTS", polar_coefficients(cushion=cushion))
        row = u[:, 0] @ polar_express(m)[0].double() @ v
        leaks[cushion] = row[1:].norm().item()
    assert leaks[0.02] < 0.05 and leaks[0.0] > 2 * leaks[0.02]


# ---- wiring


@pytest.mark.parametrize(("rung", "function"), [("muon", newton_schulz), ("polar", polar_express)])
def test_the_rung_switches_the_orthogonalisation(rung, function):
    recipe = recipe_for(rung, "nano", {"num_layers": "1"})
    torch.manual_seed(0)
    model = build_model(recipe, SIZES["nano"])
    optimizer = build_optimizer(recipe, model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name in ("qk_bank", "vo_bank", "mlp_bank"):
        update = function((1 - recipe.muon_momentum**2) * grads[name])  # Nesterov from a buffer of zeros
        lr = recipe.muon_lr * max(1, update.shape[-2] / update.shape[-1]) ** 0.5
        moved = before[name] - dict(model.named_parameters())[name].detach()
        assert torch.allclose(moved / lr, update, atol=2e-4), name
