"FP8 head: the codes, the product and its layouts, both gradients, the compiler, and the choice by hardware."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from speedrun_lib import fp8
from speedrun_lib.fp8 import (
    ACTIVATION_SCALE,
    GRADIENT_SCALE,
    WEIGHT_SCALE,
    choose_fp8,
    decided_fp8,
    fp8_gradients,
    fp8_head,
    fp8_matmul,
    quantise,
    uses_fp8,
)
from speedrun_lib.gpt import build_model
from speedrun_lib.logits import softcap
from speedrun_lib.recipe import SIZES, recipe_for
from tests.rungs import row_logits

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GPU = [pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8")]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
few = settings(deadline=None, max_examples=30)


def relative(found, right):
    "Norm of the difference over the norm."
    return float((found.double() - right.double()).norm() / right.double().norm())


def column_major(x):
    return x.T.contiguous().T


def random_head(t, d, v, dtype=torch.float32, device="cpu"):
    "A normed stream, a head as after some training, and the gradient of a cross-entropy summed over tokens."
    generator = torch.Generator().manual_seed(t + v)
    x = torch.nn.functional.rms_norm(torch.randn(t, d, generator=generator), (d,))
    w = 0.05 * torch.randn(d, v, generator=generator)
    grad = torch.softmax(x @ w, -1)
    grad[torch.arange(t), torch.randint(v, (t,), generator=generator)] -= 1
    return [y.to(device, dtype) for y in (x, w, grad)]


# ---- the codes


def codes(dtype):
    "All finite values of a format."
    values = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).float()
    return values[values.isfinite()]


def test_the_scales_are_those_of_the_record():
    assert (ACTIVATION_SCALE, WEIGHT_SCALE, GRADIENT_SCALE) == (100 / 448, 1.6 / 448, 0.75 / 448)
    assert math.sqrt(768) < 100 == pytest.approx(ACTIVATION_SCALE * codes(E4M3).max().item())


@pytest.mark.parametrize(("dtype", "count", "top", "small", "tiny"), [
    (E4M3, 254, 448, 2**-6, 2**-9), (E5M2, 248, 57_344, 2**-14, 2**-16)])
def test_formats(dtype, count, top, small, tiny):
    values = codes(dtype)
    assert len(values) == count and values.max() == top == -values.min()
    assert values[values > 0].min() == tiny and torch.finfo(dtype).smallest_normal == small


@DEVICES
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_code_comes_back(dtype, device):
    values = codes(dtype).to(device)
    for scale in (1.0, 0.25, 100 / 448):
        assert torch.equal(quantise(values * scale, scale, dtype).float(), values)


@given(x=st.floats(-440, 440, width=32), scale=st.sampled_from([ACTIVATION_SCALE, WEIGHT_SCALE, GRADIENT_SCALE]),
       dtype=st.sampled_from([E4M3, E5M2]))
@few
def test_quantise_takes_the_nearest_code(x, scale, dtype):
    stored = torch.tensor([x])
    found = quantise(stored * scale, scale, dtype).float()
    nearest = (codes(dtype) - stored).abs().min()
    assert (found - stored).abs() <= nearest + 1e-6 * stored.abs(), "the error is that of the nearest code"


@DEVICES
def test_beyond_the_largest_code(device):
    "Up to 464 e4m3 rounds to 448; beyond that a version of torch saturates or gives NaN, but never a wrong number."
    x = torch.tensor([448.0, 463.0, 500.0, 1e4], device=device)
    found = quantise(x, 1.0, E4M3).float().tolist()
    assert found[:2] == [448, 448] and all(y == 448 or math.isnan(y) for y in found[2:])


# ---- the product


@DEVICES
@pytest.mark.parametrize(("m", "k", "n"), [(16, 16, 16), (48, 64, 128), (272, 768, 400)])
@pytest.mark.parametrize("kinds", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=["44", "54", "45"])
def test_product_of_the_stored_numbers(device, m, k, n, kinds):
    generator = torch.Generator().manual_seed(m)
    a8 = (30 * torch.randn(m, k, generator=generator)).to(kinds[0]).to(device)
    b8 = column_major((30 * torch.randn(k, n, generator=generator)).to(kinds[1]).to(device))
    right = a8.double() @ b8.double() * 0.0125
    scale = torch.tensor(0.0125, device=device)
    # a tensor core keeps its running sums in fewer bits than fp32, with fast_accum for the whole row
    for dtype, tolerance in ((torch.float32, 1e-6 if device == "cpu" else 1e-3), (torch.bfloat16, 3e-3)):
        exact, fast = (fp8_matmul(a8, b8, scale, fast, dtype) for fast in (False, True))
        assert exact.dtype == dtype and exact.shape == (m, n) and exact.is_contiguous()
        assert relative(exact, right) < tolerance
        assert relative(fast, right) < (tolerance if device == "cpu" else 5e-3)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 5, 7), (17, 33, 1)])
def test_emulation_takes_any_shape(m, k, n):
    a8, b8 = torch.randn(m, k).to(E4M3), column_major(torch.randn(k, n).to(E4M3))
    found = fp8_matmul(a8, b8, torch.tensor(2.0), True, torch.float32)
    torch.testing.assert_close(found, 2 * a8.float() @ b8.float())


@DEVICES
def test_scales_at_every_address(device):
    "An element of a tensor may lie where cuBLASLt refuses it."
    a8, b8 = torch.randn(16, 32).to(E4M3).to(device), column_major(torch.randn(32, 16).to(E4M3).to(device))
    scales = torch.arange(1.0, 9.0, device=device)
    ones = fp8_matmul(a8, b8, scales[0], False, torch.float32)
    for scale in scales.unbind():
        torch.testing.assert_close(fp8_matmul(a8, b8, scale, False, torch.float32), scale * ones)


@DEVICES
def test_refusals(device):
    a8, b8 = torch.randn(16, 32).to(E4M3).to(device), column_major(torch.randn(32, 48).to(E4M3).to(device))
    scale = torch.tensor(1.0, device=device)
    with pytest.raises(ValueError, match=r"first factor must be row-major.*use \.contiguous\(\)"):
        fp8_matmul(column_major(a8), b8, scale, True, torch.bfloat16)
    with pytest.raises(ValueError, match=r"second factor must be column-major.*\.T\.contiguous\(\)\.T"):
        fp8_matmul(a8, b8.contiguous(), scale, True, torch.bfloat16)
    with pytest.raises(ValueError, match=r"cannot multiply \(16, 32\) by \(16, 48\)"):
        fp8_matmul(a8, b8[:16], scale, True, torch.bfloat16)
    for pair in ((a8.to(E5M2), b8.to(E5M2)), (a8.bfloat16(), b8)):
        with pytest.raises(ValueError, match="takes e4m3 factors"):
            fp8_matmul(*pair, scale, True, torch.bfloat16)
    for wrong in (torch.ones(1, device=device), scale.double()):
        with pytest.raises(ValueError, match="0-dim fp32 tensor"):
            fp8_matmul(a8, b8, wrong, True, torch.bfloat16)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_refusals_of_a_gpu(device):
    scale = torch.tensor(1.0, device=device)
    for k, n in ((24, 32), (32, 24)):
        a8, b8 = torch.randn(16, k).to(E4M3).to(device), column_major(torch.randn(k, n).to(E4M3).to(device))
        with pytest.raises(ValueError, match="multiples of 16"):
            fp8_matmul(a8, b8, scale, True, torch.bfloat16)
    with pytest.raises(ValueError, match="tensor on cuda"):
        fp8_matmul(a8, b8, scale.cpu(), True, torch.bfloat16)


# ---- gradients


@DEVICES
@pytest.mark.parametrize(("t", "d", "v"), [(32, 64, 128), (272, 128, 400)])
@pytest.mark.parametrize("upstream", [1.0, 0.125])
def test_gradients_are_the_products_of_what_is_stored(device, t, d, v, upstream):
    x, w, grad = random_head(t, d, v, device=device)
    x8, w8 = quantise(x, ACTIVATION_SCALE, E4M3), quantise(w, WEIGHT_SCALE, E4M3)
    grad8 = quantise(grad, GRADIENT_SCALE, E5M2)
    scale = torch.tensor(GRADIENT_SCALE, device=device) * upstream
    turned = []

    def transpose(y):
        turned.append(y)
        return y.T.contiguous()

    grad_x, grad_w = fp8_gradients(grad8, x8, w8, scale, torch.bfloat16, torch.float32, transpose)
    assert len(turned) == 2 and turned[0] is x8 and turned[1] is grad8, "w8 is used as it lies"
    stored_x, stored_w = x8.double() * ACTIVATION_SCALE, w8.double() * WEIGHT_SCALE
    stored_grad = grad8.double() * GRADIENT_SCALE * upstream
    assert grad_x.dtype == torch.bfloat16 and grad_w.dtype == torch.float32
    assert relative(grad_x, stored_grad @ stored_w.T) < 3e-3
    assert relative(grad_w, stored_x.T @ stored_grad) < (1e-6 if device == "cpu" else 1e-3)
    again = fp8_gradients(grad8, x8, w8, scale, torch.bfloat16, torch.float32)
    assert torch.equal(again[0], grad_x) and torch.equal(again[1], grad_w)


@DEVICES
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                                    (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])
def test_head_against_exact_products(device, dtypes):
    x, w, grad = random_head(96, 128, 384, device=device)
    x, w = (y.to(dtype).requires_grad_() for y, dtype in zip((x, w), dtypes, strict=True))
    z = fp8_head(x, w)
    assert z.dtype == torch.bfloat16 and z.shape == (96, 384) and z.is_contiguous()
    # e4m3 rounds by up to 1/16, e5m2 by up to 1/8; the target's -1 is stored as -640 instead of -597, 7 % too large
    assert 0.01 < relative(z.detach(), (x.double() @ w.double()).detach()) < 0.045
    found = torch.autograd.grad(z, (x, w), grad.bfloat16())
    right = grad.double() @ w.double().detach().T, x.double().detach().T @ grad.double()
    for name, a, b, leaf in zip("xw", found, right, (x, w), strict=True):
        assert a.dtype == leaf.dtype and a.shape == leaf.shape
        assert 0.01 < relative(a, b) < 0.09, name


@DEVICES
def test_gradients_follow_a_factor_of_two_exactly(device):
    "Scales are fixed: nothing is normalised by what arrives."
    x, w, grad = random_head(64, 64, 128, device=device)
    x, w = x.requires_grad_(), w.requires_grad_()
    z = fp8_head(x, w)
    once, twice = (torch.autograd.grad(z, (x, w), (f * grad).bfloat16(), retain_graph=True) for f in (1, 2))
    assert all(relative(b, 2 * a) < 1e-3 for a, b in zip(once, twice, strict=True))


@DEVICES
def test_head_takes_what_autograd_and_views_bring(device):
    x, w, _ = random_head(48, 64, 128, device=device)
    table = w.T.contiguous().requires_grad_()  # a tied embedding: the head is a transposed view
    wide = torch.stack([x, x], 1).requires_grad_()
    fp8_head(wide[:, 0], table.T).sum().backward()  # the gradient of a sum is an expanded scalar
    assert table.grad.shape == table.shape and (wide.grad[:, 1] == 0).all()
    assert relative(table.grad, x.sum(0).expand(128, 64)) < 0.09
    leaves, grad = (x.requires_grad_(), w.requires_grad_()), torch.randn(48, 128, device=device).bfloat16()
    right = fp8_head(*leaves)
    found = fp8_head(column_major(leaves[0]), leaves[1])
    assert torch.equal(found, right)
    for a, b in zip(torch.autograd.grad(found, leaves, column_major(grad)), torch.autograd.grad(right, leaves, grad),
                    strict=True):
        assert torch.equal(a, b)


@DEVICES
@pytest.mark.parametrize(("name", "wrong", "bound"), [
    ("ACTIVATION_SCALE", 1e3, 0.2), ("WEIGHT_SCALE", 20.0, 0.2), ("ACTIVATION_SCALE", 1e-3, 0.2),
    ("WEIGHT_SCALE", 1e-5, 0.2)])
def test_other_scales_are_worse(device, monkeypatch, name, wrong, bound):
    "Too large drowns numbers among the smallest codes, too small runs out of codes."
    x, w, _ = random_head(96, 128, 384, device=device)
    right = x @ w
    good = relative(fp8_head(x, w).float(), right)
    monkeypatch.setattr(fp8, name, wrong)
    bad = relative(fp8_head(x, w).float(), right)
    assert good < 0.045 and not bad < bound


# ---- the compiler


def head_loss(x, w, targets):
    "The head as the network uses it."
    z = fp8_head(x.flatten(0, 1), w) if uses_fp8(x.device.type) else x.flatten(0, 1) @ w
    return torch.nn.functional.cross_entropy(z.float(), targets, reduction="sum")


@pytest.fixture
def wish(monkeypatch):
    "Set SPEEDRUN_FP8 for one test."
    def set_wish(value):
        monkeypatch.setenv("SPEEDRUN_FP8", value)
        decided_fp8.cache_clear()
    set_wish("")
    yield set_wish
    monkeypatch.undo()
    decided_fp8.cache_clear()


@pytest.mark.parametrize(("device", "backend"), [
    ("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=GPU)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_one_compilation_for_all_numbers_of_tokens(device, backend, dtype, wish, fresh_compiler):
    wish("1")
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(head_loss, fullgraph=True, dynamic=False, backend=counter)
    for t in (32, 48, 80):
        x, w, _ = random_head(t, 64, 128, dtype, device)
        x, w = x[None].requires_grad_(), w.requires_grad_()
        targets = torch.arange(t, device=device)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(targets, 0)
        found, right = compiled(x, w, targets), head_loss(x, w, targets)
        torch.testing.assert_close(found, right, rtol=2e-3, atol=1e-2)
        for a, b in zip(torch.autograd.grad(found, (x, w)), torch.autograd.grad(right, (x, w)), strict=True):
            # where a quotient lies between two codes, other rounding before it may choose the other one
            assert a.dtype == b.dtype and relative(a, b) < (1e-6 if backend == "aot_eager" else 0.06)
    assert counter.frame_count == 1


@DEVICES
def test_operator_registrations(device):
    a8, b8 = torch.randn(32, 16).to(E4M3).to(device), column_major(torch.randn(16, 48).to(E4M3).to(device))
    inputs = a8, b8, torch.tensor(0.5, device=device), True, torch.bfloat16
    # test_schema compares inputs before and after with an operation that FP8 tensors lack
    torch.library.opcheck(fp8_matmul, inputs, test_utils=("test_faketensor", "test_aot_dispatch_static"))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_head_under_autocast(device):
    x, w, grad = random_head(64, 64, 128, device=device)
    x, w = x.requires_grad_(), w.requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        z = fp8_head(x, w)
    z.backward(grad.bfloat16())
    assert z.dtype == torch.bfloat16 and x.grad.dtype == w.grad.dtype == torch.float32


# ---- the choice


@pytest.mark.parametrize(("gpu", "capability", "able"), [
    ("T4", (7, 5), False), ("A100", (8, 0), False), ("RTX 3090", (8, 6), False), ("RTX 4090", (8, 9), True),
    ("H100", (9, 0), True), ("B200", (10, 0), True), ("RTX 5090", (12, 0), True)])
def test_every_gpu(gpu, capability, able):
    use, message = choose_fp8(capability, "")
    assert use == able and bool(message) == (not able) and "\n" not in message
    assert choose_fp8(capability, "0") == (False, ""), "switched off is not missing"
    if able:
        assert choose_fp8(capability, "1") == (True, "")
    else:
        assert "8.9" in message and "{}.{}".format(*capability) in message and "bf16" in message
        with pytest.raises(ValueError, match="SPEEDRUN_FP8=1: .*8.9"):
            choose_fp8(capability, "1")


def test_cpu_and_nonsense():
    assert choose_fp8((0, 0), "")[0] is False and len(choose_fp8((0, 0), "")[1]) < 60
    assert choose_fp8((0, 0), "1") == (True, "FP8 head: emulated on the CPU")
    with pytest.raises(ValueError, match="SPEEDRUN_FP8=yes is neither 0"):
        choose_fp8((9, 0), "yes")


def test_the_choice_is_said_once_by_one_process(wish, monkeypatch, capsys):
    assert not uses_fp8("cpu") and not uses_fp8("cpu")
    assert capsys.readouterr().out.count("\n") == 1
    wish("1")
    assert uses_fp8("cpu") and "emulated" in capsys.readouterr().out
    wish("0")
    assert not uses_fp8("cpu") and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "1")
    wish("")
    assert not uses_fp8("cpu") and capsys.readouterr().out == ""


# ---- the network


@pytest.fixture(scope="module")
def networks():
    "The same weights without and with the FP8 head."
    models = []
    for rung in ("staged", "fp8_head"):
        torch.manual_seed(0)
        models.append(build_model(recipe_for(rung, "nano"), SIZES["nano"]))
        with torch.no_grad():
            for p in models[-1].parameters():
                p += 0.05 * torch.randn(p.shape)
    return models


TOKENS = (torch.arange(48) * 7 % 257)[None]


def test_only_the_training_head_is_fp8(networks, wish):
    plain, ours = networks
    wish("1")
    with torch.no_grad():
        right = row_logits(plain, TOKENS)
        assert torch.equal(row_logits(ours.eval(), TOKENS), right), "evaluation uses the weights themselves"
        found = row_logits(ours.train(), TOKENS)
        stream = ours.hidden(TOKENS, torch.tensor([0, 48], dtype=torch.int32), torch.tensor(48, dtype=torch.int32))
        assert torch.equal(found, softcap(fp8_head(stream[0], ours.lm_head))[None])
        assert 0 < relative(found, right) < 0.03
        wish("")
        assert torch.equal(row_logits(ours, TOKENS), right), "a CPU does without unless told"


def test_gradients_of_the_network(networks, wish):
    wish("1")
    grads = []
    for model in networks:
        model.zero_grad()
        z = row_logits(model.train(), TOKENS).float()
        torch.nn.functional.cross_entropy(z[0, :-1], TOKENS[0, 1:], reduction="sum").backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    right, found = grads
    assert right.keys() == found.keys()
    assert 0.01 < relative(found["lm_head"], right["lm_head"]) < 0.1
    for name in ("embed", "qk_bank", "vo_bank", "mlp_bank"):
        assert 0.005 < relative(found[name], right[name]) < 0.25, name
