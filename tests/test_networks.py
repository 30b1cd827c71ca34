"The two networks and their schedules: properties that hold for any seed, and what a fault would look like."

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib.baseline import GPT2, Block, CausalSelfAttention, cosine, decay_groups
from speedrun_lib.gpt import GPT, build_model
from speedrun_lib.lean import causal_attention, lean_mlp, rms_norm, split_heads, trapezoid
from speedrun_lib.recipe import LADDER, SIZES, recipe_for
from speedrun_lib.runs import row_borders
from speedrun_lib.train import World, build_optimizer, train_step
from tests.rungs import depth, row_logits

BOTH = pytest.mark.parametrize("rung", ["baseline", "lean"])
EVERY = pytest.mark.parametrize("rung", [rung.name for rung in LADDER])
CPU = World(0, 1, torch.device("cpu"))


def nano(rung, seed=0, layers=3, vocab_size=257):
    "A network of size nano, shallow unless asked otherwise."
    torch.manual_seed(seed)
    size = dataclasses.replace(SIZES["nano"], vocab_size=vocab_size)
    return build_model(recipe_for(rung, "nano", {"num_layers": str(depth(rung, layers))}), size)


def woken(model):
    "The same network a little away from its start, where some rungs have projections of zero."
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    return model


def tokens(rows=2, length=24, seed=0, vocab_size=257):
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def positions_that_move(model, at):
    "Whether the logits of each position move when the token at position `at` changes."
    before = tokens()
    after = before.clone()
    after[:, at] = (after[:, at] + 1) % 257
    logits = model.logits if isinstance(model, GPT2) else lambda x: row_logits(model, x)
    with torch.no_grad():
        return (logits(before) != logits(after)).any(dim=2).any(dim=0)


# ---- what a position may see


@EVERY
def test_a_token_changes_its_own_and_later_logits_only(rung):
    model = woken(nano(rung)).double()  # in bf16 a small change may be rounded away
    for at in (0, 1, 13, 23):
        moved = positions_that_move(model, at)
        assert not moved[:at].any() and moved[at:].all()


@EVERY
def test_every_parameter_learns(rung):
    model = woken(nano(rung))
    extra = () if isinstance(model, GPT2) else row_borders(model.recipe, 24)
    model(tokens(rows=1), tokens(rows=1, seed=1), *extra).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@BOTH
def test_the_causality_test_sees_a_missing_mask(rung, monkeypatch):
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, is_causal, scale=None: attention(q, k, v))
    assert positions_that_move(nano(rung), 23)[:23].any()


@BOTH
def test_rows_of_a_batch_do_not_mix(rung):
    model, batch = nano(rung), tokens(rows=3)
    with torch.no_grad():
        alone = torch.cat([model.logits(row[None]) for row in batch])
        torch.testing.assert_close(model.logits(batch), alone, atol=1e-5, rtol=1e-5)


@BOTH
def test_the_order_of_earlier_tokens_matters(rung):
    model, row = nano(rung), tokens(rows=1)
    swapped = row[:, [1, 0, *range(2, 24)]]
    with torch.no_grad():
        assert (model.logits(row)[0, -1] - model.logits(swapped)[0, -1]).abs().max() > 1e-4


# ---- initial state


@BOTH
@pytest.mark.parametrize("vocab_size", [257, 4_096, 50_257])
def test_first_loss_is_the_logarithm_of_the_vocabulary(rung, vocab_size):
    model = nano(rung, layers=11, vocab_size=vocab_size)
    with torch.no_grad():
        loss = model(tokens(4, 64, 0, vocab_size), tokens(4, 64, 1, vocab_size)).item()
    # logits are products of a vector of length sqrt(d) with rows of standard deviation 0.02
    assert abs(loss - (math.log(vocab_size) + 128 * 0.02**2 / 2)) < 0.06


@BOTH
def test_projections_into_the_stream_start_smaller_with_depth(rung):
    model = nano(rung, layers=8)
    if rung == "baseline":
        inner = [b.attn.qkv.weight for b in model.blocks] + [b.up.weight for b in model.blocks]
        outer = [b.attn.proj.weight for b in model.blocks] + [b.proj.weight for b in model.blocks]
    else:
        inner = [model.qk_bank, model.vo_bank[::2], model.mlp_bank[::2]]
        outer = [model.vo_bank[1::2], model.mlp_bank[1::2]]
    assert all(abs(w.std() / 0.02 - 1) < 0.05 for w in inner)
    assert all(abs(w.std() / (0.02 / math.sqrt(16)) - 1) < 0.05 for w in outer)


COUNTS = {  # weights of each rung at nano, mini, full
    "baseline": (2_445_184, 40_789_632, 124_439_808),
    "lean": (2_228_352, 38_959_488, 117_240_576),
    "rotary": (2_195_584, 38_762_880, 116_454_144),  # without a table of positions
    "zero_init": (2_211_840, 38_780_928, 116_490_240),  # 127 or 47 more rows in the vocabulary
    "untied": (2_260_992, 58_097_664, 155_123_712),  # a second table
    "x0_skip": (2_261_003, 58_097_675, 155_123_723),
    "lambdas": (2_261_071, 58_097_743, 155_123_791),
    "gated_skip": (2_195_547, 57_507_931, 152_764_507),  # without the attention of layer 6
    "backout": (2_195_548, 57_507_932, 152_764_508),
    "value_embeds": (2_441_308, 154_091_612, 345_931_868),  # five tables
    "ve_gates": (2_441_548, 154_091_972, 345_932_228),
    "smear": (2_441_560, 154_091_984, 345_932_240),
    "attn_gate": (2_442_040, 154_092_704, 345_932_960),
    "bigram": (3_490_627, 250_676_395, 539_100_331),  # a table of pairs
    "mudd": (3_508_830, 250_727_366, 539_200_454),
    "xsa": (3_508_874, 250_727_432, 539_200_520),  # record 82 without the padding of its banks
    "sharded": (3_705_482, 252_693_512, 547_064_840),  # with it
}


def test_number_of_weights():
    "Rungs that are not listed have as many as the rung below them."
    expected = None
    for rung in (r.name for r in LADDER):
        expected = COUNTS.get(rung, expected)
        with torch.device("meta"):
            models = [build_model(recipe_for(rung, size), SIZES[size]) for size in ("nano", "mini", "full")]
        assert tuple(sum(p.numel() for p in m.parameters()) for m in models) == expected, rung


# ---- gradients


@BOTH
def test_gradients_reach_every_weight_matrix(rung):
    model = nano(rung, layers=4)
    model(tokens(), tokens(seed=1)).backward()
    for name, p in model.named_parameters():
        matrices = p.grad if name.endswith("_bank") else p.grad[None]
        assert all(g.abs().max() > 0 for g in matrices), name
    used = model.position.weight.grad if rung == "baseline" else model.position.grad
    assert used[:24].abs().amax(1).min() > 0 and used[24:].abs().max() == 0, "only positions that occur learn"


def test_the_bias_of_the_keys_cannot_learn():
    "It adds the same number to all scores of a query, which the softmax removes: a reason to drop it."
    model = nano("baseline")
    model(tokens(), tokens(seed=1)).backward()
    q, k, v = model.blocks[1].attn.qkv.bias.grad.chunk(3)
    assert k.abs().max() < 1e-4 * max(q.abs().max(), v.abs().max())


# ---- pieces


def test_attention_is_the_masked_softmax_written_out():
    torch.manual_seed(1)
    module, x = CausalSelfAttention(32, 4), torch.randn(2, 7, 32)
    q, k, v = (y.view(2, 7, 4, 8).transpose(1, 2) for y in module.qkv(x).split(32, dim=2))
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(7, 7).triu(1) > 0, -math.inf)
    expected = module.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 32))
    torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1e-5)


def test_lean_pieces_are_the_baseline_without_biases():
    torch.manual_seed(2)
    block, x = Block(32, 4), torch.randn(2, 7, 32)
    with torch.no_grad():
        for name, p in block.named_parameters():
            if "norm" not in name and name.endswith("bias"):
                p.zero_()
        x -= x.mean(-1, keepdim=True)  # where the mean is zero, LayerNorm without gain is RMS norm
        torch.testing.assert_close(rms_norm(x), block.norm1(x), atol=1e-4, rtol=1e-4)
        q, k, v = (split_heads(x, w, 4) for w in block.attn.qkv.weight.chunk(3))
        lean = F.linear(causal_attention(q, k, v).flatten(2), block.attn.proj.weight)
        torch.testing.assert_close(lean, block.attn(x), atol=1e-6, rtol=1e-5)
        mlp = block.proj(F.gelu(block.up(x), approximate="tanh"))
        torch.testing.assert_close(lean_mlp(x, block.up.weight, block.proj.weight.T), mlp, atol=1e-6, rtol=1e-5)


@given(scale=st.floats(1e-2, 1e4), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_rms_norm_forgets_the_scale(scale, seed):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rms_norm(scale * x), rms_norm(x), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(rms_norm(x).square().mean(-1), torch.ones(4), atol=1e-4, rtol=1e-4)


def test_a_block_whose_projections_are_zero_changes_nothing():
    torch.manual_seed(3)
    block, x = Block(32, 4), torch.randn(2, 7, 32)
    assert not torch.equal(block(x), x)
    for module in (block.attn.proj, block.proj):
        torch.nn.init.zeros_(module.weight)
        torch.nn.init.zeros_(module.bias)
    assert torch.equal(block(x), x)


# ---- schedules

shares = st.floats(0, 1)
part = st.floats(0.001, 0.499)  # of a run; warm-up and cooldown together stay below one


@given(warmup=part, cooldown=part, first=shares, second=shares)
def test_schedules_stay_between_zero_and_one_and_rise_then_fall(warmup, cooldown, first, second):
    early, late = sorted((first, second))
    for factor in (lambda t: cosine(t, warmup), lambda t: trapezoid(t, warmup, cooldown)):
        assert 0 <= factor(early) <= 1 and 0 <= factor(late) <= 1
        if late < warmup:
            assert factor(early) <= factor(late)
        if early >= warmup:
            assert factor(early) >= factor(late)


@given(warmup=part, cooldown=part)
def test_ends_and_corners_of_the_schedules(warmup, cooldown):
    for factor in (lambda t: cosine(t, warmup), lambda t: trapezoid(t, warmup, cooldown)):
        assert factor(0.0) == 0 and factor(warmup) == 1 and abs(factor(1.0)) < 1e-12
        assert math.isclose(factor(warmup / 2), 0.5)
    assert math.isclose(cosine((1 + warmup) / 2, warmup), 0.5, abs_tol=1e-9)
    assert math.isclose(trapezoid(1 - cooldown / 2, warmup, cooldown), 0.5, abs_tol=1e-9)
    assert trapezoid((warmup + 1 - cooldown) / 2, warmup, cooldown) == 1, "the plateau"


@given(warmup=part, step=st.floats(1e-6, 1e-4), at=st.floats(0, 0.999))
def test_schedules_do_not_jump(warmup, step, at):
    steepest = step * (1 / warmup + math.pi / 2 / (1 - warmup) + 1e-9)
    assert abs(cosine(at + step, warmup) - cosine(at, warmup)) <= steepest + 1e-12
    assert abs(trapezoid(at + step, warmup, 0.5) - trapezoid(at, warmup, 0.5)) <= step * (1 / warmup + 2) + 1e-12


def test_schedules_without_warm_up_or_cooldown_start_and_end_at_the_peak():
    assert cosine(0.0, 0.0) == trapezoid(0.0, 0.0, 0.4) == trapezoid(1.0, 0.1, 0.0) == 1


def test_trapezoids_of_different_length_share_their_way_until_the_cooldown():
    short, long = (lambda s, n=n: trapezoid(s / n, 100 / n, 200 / n) for n in (1000, 5000))
    assert all(math.isclose(short(s), long(s)) for s in range(800))
    assert math.isclose(short(900), 0.5) and long(900) == 1


# ---- optimizer groups, repeatability


@BOTH
def test_decay_groups_hold_every_parameter_once(rung):
    model = nano(rung)
    matrices, vectors = decay_groups(model, 0.1)
    grouped = [*matrices["params"], *vectors["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in matrices["params"]) and all(p.dim() == 1 for p in vectors["params"])
    assert len(vectors["params"]) == (3 * 8 + 2 if rung == "baseline" else 0)


def losses(rung, seed):
    "Losses of three training steps."
    model, recipe = nano(rung, seed), recipe_for(rung, "nano")
    assert isinstance(model, GPT2 if rung == "baseline" else GPT)
    optimizer = build_optimizer(recipe, model)
    batches = [(tokens(), tokens(seed=1)), (tokens(seed=2), tokens(seed=3))]
    return [train_step(model, optimizer, batches, recipe, CPU).item() for _ in range(3)]


@BOTH
def test_the_same_seed_gives_the_same_losses_and_training_lowers_them(rung):
    first = losses(rung, seed=0)
    assert losses(rung, seed=0) == first and losses(rung, seed=1) != first
    assert first[2] < first[1] < first[0]
