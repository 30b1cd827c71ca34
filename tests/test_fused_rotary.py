"Norm, rotation and offset in one kernel, against the functions of their chapters."

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speedrun_lib import gpt
from speedrun_lib.fused_rotary import (
    fused_rotary_heads,
    fuses_rotary,
    plain_rotary_heads,
    rotary_heads,
    runs_rotary,
)
from speedrun_lib.offset_pairs import in_pairs
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.rotary import rotary_frequencies, rotary_table
from tests.kernels import DEVICES, ON_GPU, few, interpret


def test_kernels_in_the_interpreter():
    interpret("tests/test_fused_rotary.py")


def heads_of(t, h, k, device, seed=0):
    "Products, gradients, and tables that are longer than needed."
    generator = torch.Generator().manual_seed(seed)
    lengths = 0.5 + 3 * torch.rand(1, t, 3 * h, 1, generator=generator)  # far above epsilon, which depends on the dtype
    qkv_bthk = torch.randn(1, t, 3 * h, k, generator=generator) * lengths
    grads = [torch.randn(1, t, h, k, generator=generator) for _ in range(3)]
    tables = rotary_table(rotary_frequencies(k, 1024.0), 2 * t + 5)
    return [x.to(device, torch.bfloat16) for x in (qkv_bthk, *grads, *tables)]


def off(x, y):
    "Distance relative to the truth."
    return ((x.double() - y).norm() / y.norm()).item()


def errors(t, h, k, device, paired, offset, seed=0):
    "Of queries, keys and gradient, against fp64; whether values are copied to the bit."
    qkv, *grads, cos, sin = heads_of(t, h, k, device, seed)
    x, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    found = fused_rotary_heads(x, cos, sin, paired, offset)
    truth = plain_rotary_heads(exact, cos.double(), sin.double(), paired, offset)
    grad, = torch.autograd.grad(found, x, grads)
    true_grad, = torch.autograd.grad(truth, exact, [y.double() for y in grads])
    assert torch.equal(found[2], qkv[:, :, 2 * h :])
    return [off(found[0], truth[0]), off(found[1], truth[1]), off(grad, true_grad)]


@DEVICES
@pytest.mark.parametrize("paired, offset", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("t, h, k", [(20, 6, 128), (1, 2, 16), (33, 4, 32)])
def test_forward_and_gradient(device, paired, offset, t, h, k):
    assert max(errors(t, h, k, device, paired, offset)) < 2.5e-3, "rounded to bf16 once"


@DEVICES
@few
@given(st.integers(1, 40), st.integers(1, 2), st.booleans(), st.booleans(), st.integers(0, 99))
def test_any_number_of_tokens(device, t, pairs, paired, offset, seed):
    assert max(errors(t, 2 * pairs, 16, device, paired, offset, seed)) < 4e-3


@DEVICES
def test_no_tokens(device):
    qkv, *_, cos, sin = heads_of(0, 2, 16, device)
    assert [x.shape for x in fused_rotary_heads(qkv, cos, sin, False, False)] == [(1, 0, 2, 16)] * 3


@DEVICES
def test_results_are_rows_that_attention_takes(device):
    "Pairs are the same memory seen as twice the rows: nothing is copied."
    qkv, *_, cos, sin = heads_of(20, 4, 16, device)
    for x in fused_rotary_heads(qkv, cos, sin, True, False):
        assert x.is_contiguous() and in_pairs(x).data_ptr() == x.data_ptr()


@DEVICES
def test_what_it_refuses(device):
    qkv, *_, cos, sin = heads_of(20, 2, 16, device)
    for args, message in (
        ((qkv[0].float(), cos, sin, False, False), "in bf16"),
        ((qkv[0, :, :5], cos, sin, False, False), r"\(t, 3h, k\)"),
        ((qkv[0, :, :, :12].contiguous(), cos, sin, False, False), "power of two"),
        ((qkv[0, :, :3].contiguous(), cos, sin, True, False), "even number of heads"),
        ((qkv[0], cos[:30], sin, True, False), "tables with 40 rows"),
        ((qkv[0].repeat(1, 1, 2)[..., ::2], cos, sin, False, False), r"use \.contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            rotary_heads(*args)


@ON_GPU
def test_full_size(device):
    for paired, offset in ((False, False), (True, False), (False, True)):
        assert max(errors(16_384 + 24, 6, 128, device, paired, offset)) < 2.5e-3


@ON_GPU
def test_one_compilation_for_all_numbers_of_tokens(device):
    torch._dynamo.reset()
    run, (every, *_, cos, sin) = torch.compile(fused_rotary_heads, fullgraph=True), heads_of(200, 2, 16, device)
    for t in (64, 128, 192):
        qkv = every[:, :t].clone()
        torch._dynamo.mark_dynamic(qkv, 1)
        with torch._dynamo.config.patch(error_on_recompile=t > 64):
            found = run(qkv, cos, sin, True, False)
        expected = fused_rotary_heads(qkv, cos, sin, True, False)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_without_a_kernel_it_is_the_plain_function():
    qkv, *_, cos, sin = heads_of(20, 2, 16, "cpu")
    rows = torch.cat([qkv, qkv])
    for x in (qkv.float(), rows):
        found, plain = (f(x, cos, sin, True, False) for f in (fused_rotary_heads, plain_rotary_heads))
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert not runs_rotary("cpu", torch.float32) and not fuses_rotary("cpu", torch.float32)


def network_loss(rung, device, bf16="false"):
    "Loss and a gradient of a small network."
    recipe = dataclasses.replace(recipe_for(rung, "nano", {"bf16_weights": bf16, "bigram_size": "256"}), num_heads=4)
    torch.manual_seed(0)
    model = gpt.build_model(recipe, SIZES["nano"]).to(device)
    with torch.no_grad():
        model.vo_bank += 0.05 * torch.randn_like(model.vo_bank)
    tokens = torch.randint(0, 257, (1, 16), generator=torch.Generator().manual_seed(1)).to(device)
    cu_seqlens = torch.tensor([0, 5, 12, 16], dtype=torch.int32, device=device)
    loss = model(tokens, tokens.roll(-1, 1), cu_seqlens, torch.tensor(40, dtype=torch.int32))
    loss.backward()
    return loss.item(), model.qk_bank.grad


def test_on_a_cpu_the_network_computes_the_same_to_the_bit():
    (loss, grad), (expected, expected_grad) = (network_loss(rung, "cpu") for rung in ("fused_rotary", "replayed"))
    assert loss == expected and torch.equal(grad, expected_grad)


@DEVICES
def test_the_network_in_bf16_agrees(device, monkeypatch):
    calls = []
    monkeypatch.setattr(gpt, "fused_rotary_heads", lambda *args: calls.append(args[3:]) or fused_rotary_heads(*args))
    loss, grad = network_loss("fused_rotary", device, "true")
    expected, expected_grad = network_loss("replayed", device, "true")
    assert abs(loss - expected) < 2e-3 * expected and off(grad.float(), expected_grad.double()) < 0.1
    assert calls == [(i in (0, 2, 5, 9), i in (3, 10)) for i in range(11) if i != 6], "which layers do what"
