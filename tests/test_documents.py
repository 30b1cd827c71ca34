"Documents: packing, borders, the thread that reads ahead, and attention that does not cross borders."

import ast
import itertools
import math
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from speedrun_lib import documents
from speedrun_lib.data import DataError, OutOfDocumentsError, pack_row, write_shard
from speedrun_lib.documents import (
    ATTENTION,
    DocumentLoader,
    Prefetcher,
    VarlenAttention,
    attention_backend,
    available_attention,
    choose_attention,
    cumulative_lengths,
    dense_weights,
    document_slots,
    document_starts,
    flex_varlen,
    key_blocks,
    varlen_attention,
    varlen_attention_backward,
    varlen_attention_op,
)
from speedrun_lib.gpt import build_model
from speedrun_lib.recipe import LADDER, SIZES, recipe_for
from speedrun_lib.schedules import stage_batch
from speedrun_lib.train import World, compile_model, forward

CPU = torch.device("cpu")
PARTS = list(range(8))
few = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def scalars(max_len, window, scale=0.3):
    "The run-time numbers of attention, on the CPU."
    return torch.tensor(max_len, dtype=torch.int32), torch.tensor(window, dtype=torch.int32), torch.tensor(scale)


# ---- packing


def test_pieces_of_the_specification():
    starts = np.array([0, 5, 6, 20, 33, 34, 50, 90, 91, 100, 130, 135, 150, 170, 171, 200, 230])
    expected = [[(0, 5), (5, 6), (6, 17)], [(20, 32), (33, 34), (34, 38)], [(50, 62), (90, 91), (91, 95)],
                [(100, 112), (130, 135)], [(135, 147), (150, 155)], [(170, 171), (171, 183), (200, 204)]]
    cursor, cursors = 0, []
    for pieces in expected:
        found, cursor = pack_row(starts, 256, cursor, length=17, max_len=12)
        assert found == pieces
        cursors.append(cursor)
    assert cursors[1::2] == [6, 11, 16]
    with pytest.raises(OutOfDocumentsError):
        for _ in range(2):
            found, cursor = pack_row(starts, 256, cursor, length=17, max_len=12)


def numbered_shard(path, lengths):
    "A shard whose documents open with 0 and go on with their positions, so that a token says where it was."
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    tokens[np.cumsum([0, *lengths[:-1]])] = 0
    write_shard(path, tokens)
    return path


def rows_of(batches):
    "Every row with its last target, and its borders."
    for inputs, targets, borders, longest in batches:
        assert torch.equal(inputs[0, 1:], targets[0, :-1]) and inputs.dtype == targets.dtype == torch.int64
        yield torch.cat([inputs[0], targets[0, -1:]]).tolist(), borders.tolist(), int(longest)


lengths_of_documents = st.lists(st.integers(1, 40), min_size=60, max_size=120)


@given(lengths=lengths_of_documents, row_len=st.integers(3, 60), max_len=st.integers(1, 50))
@few
def test_a_step_packs_the_beginnings_of_all_documents_in_turn(tmp_path, lengths, row_len, max_len):
    path, cursor = numbered_shard(tmp_path / "a_train_1.bin", lengths), 0
    origins = np.cumsum([0, *lengths])
    loader = DocumentLoader([path], row_len, max_len, bos=0, aligned=True)
    try:
        first = loader.next_step(PARTS)
    except DataError:
        assert sum(min(n, max_len) for n in lengths) < 8 * (row_len + 1) + len(lengths) * max_len, "there was enough"
        return
    for row, borders, longest in rows_of(first):
        assert len(row) == row_len + 1 and borders[-1] == row_len and longest == max_len
        ends = sorted({*borders[1:-1], row_len} - {row_len}) + [row_len + 1]
        assert borders == sorted(borders) and borders[0] == 0
        filled = 0
        while filled <= row_len:
            origin, kept = origins[cursor], min(lengths[cursor], max_len, row_len + 1 - filled)
            assert row[filled : filled + kept] == [0, *range(origin + 1, origin + kept)], "the beginning, BOS included"
            filled += kept
            assert filled in ends or filled == row_len, "a border where the next document starts"
            cursor += 1
        assert filled == row_len + 1
    assert loader.state() == {"shard": 0, "cursor": cursor}


def test_borders_end_one_before_the_pieces(tmp_path):
    "The last token is a target only."
    path = numbered_shard(tmp_path / "a_train_1.bin", [5, 7, 30] * 30)
    (inputs, targets, borders, longest), *_ = DocumentLoader([path], 20, 8, 0, aligned=True).next_step(PARTS)
    assert borders.dtype == torch.int32 and document_slots(20) == 0 and len(borders) == 8, "five needed"
    assert borders[:4].tolist() == [0, 5, 12, 20] and int(longest) == 8
    assert targets[0, 11] == 0, "the end of a document is asked for the next one's opening token"


@pytest.mark.parametrize(("documents", "slots"), [(70, 96), (95, 96), (96, 128), (130, 256)])
def test_borders_that_fit_get_the_usual_slots(tmp_path, documents, slots):
    "A power of two only if zero, the starts and the end do not fit."
    path = numbered_shard(tmp_path / "a_train_1.bin", [32_769 // documents + 1] * (documents * 9))
    batch, *_ = DocumentLoader([path], 32_768, 2048, 0, aligned=True).next_step(PARTS)
    assert len(batch[2]) == slots and int((batch[2] < 32_768).sum()) == documents


def test_slots_are_those_of_the_specification():
    assert [document_slots(n) for n in (16_384, 32_768, 49_152, 262_144)] == [64, 96, 128, 896]
    assert document_slots(38_400) == 128 and document_slots(38_700) == 256


@given(starts=st.sets(st.integers(1, 99)), room=st.integers(1, 9))
def test_borders_against_a_loop(starts, room):
    starts = sorted(starts)
    borders = cumulative_lengths(torch.tensor(starts, dtype=torch.int64), 100, len(starts) + 1 + room).tolist()
    assert borders == [0, *starts, *[100] * room]


@given(lengths=lengths_of_documents, row_len=st.integers(2, 60))
@few
def test_validation_rows_follow_the_tape_and_may_start_inside_a_document(tmp_path, lengths, row_len):
    path = numbered_shard(tmp_path / "a_val_0.bin", lengths)
    loader = DocumentLoader([path], row_len, row_len, bos=0, aligned=False)
    total, at = sum(lengths), 0
    opens = set(np.cumsum([0, *lengths[:-1]]).tolist())
    for _ in range(total // (8 * row_len + 1)):
        for row, borders, _ in rows_of(loader.next_step(PARTS)):
            assert row == [0 if p in opens else p for p in range(at, at + row_len + 1)]
            inside = [p for p in range(row_len) if at + p in opens]
            assert borders == [0, *inside, *[row_len] * (len(borders) - 1 - len(inside))]
            at += row_len


def test_a_row_of_validation_that_starts_with_a_document_has_an_empty_one_first(tmp_path):
    path = numbered_shard(tmp_path / "a_val_0.bin", [6] * 100)
    batches = DocumentLoader([path], 12, 12, 0, aligned=False).next_step(PARTS)
    assert all(borders[:4] == [0, 0, 6, 12] for _, borders, _ in rows_of(batches))


def test_speeches_of_the_demo_are_found_at_the_edge_of_a_row(tmp_path):
    "The rule looks two tokens back, also across the row's beginning."
    tokens = np.array([256, 65, 10, 10, 66, 67, 10, 10, 10, 68, 10, 69] * 40)
    whole = document_starts(tokens, 256)
    assert whole[:4].tolist() == [0, 4, 9, 12]
    write_shard(tmp_path / "a_val_0.bin", tokens)
    for row_len in (4, 5, 7, 9):
        loader = DocumentLoader([tmp_path / "a_val_0.bin"], row_len, row_len, 256, aligned=False)
        for part, (_, borders, _) in enumerate(rows_of(loader.next_step(PARTS))):
            inside = [p - part * row_len for p in whole if 0 <= p - part * row_len < row_len]
            assert borders[1 : len(inside) + 1] == inside and set(borders[len(inside) + 1 :]) == {row_len}


# ---- shards


@pytest.fixture
def shards(tmp_path):
    "Three shards, the middle one too short for a batch of rows of 20."
    rng = np.random.default_rng(0)
    return [numbered_shard(tmp_path / f"a_train_{i}.bin", rng.integers(1, 30, n).tolist())
            for i, n in enumerate((100, 6, 70))]


def test_a_batch_that_crosses_shards_starts_again_on_the_next_that_holds_one(shards):
    loader = DocumentLoader(shards, 20, 12, 0, aligned=True)
    seen = []
    for _ in range(40):
        before = loader.state()
        batches = loader.next_step(PARTS)
        again = DocumentLoader(shards, 20, 12, 0, aligned=True)
        again.open(loader.shard, before["cursor"] if loader.shard == before["shard"] else 0)
        if loader.state()["cursor"] > before["cursor"]:
            assert all(torch.equal(a, b) for x, y in zip(batches, again.next_step(PARTS), strict=True)
                       for a, b in zip(x, y, strict=True))
        seen.append(loader.shard)
    assert {0, 2} == set(seen) and seen[0] == 0, "the short shard is passed over, and after the last comes the first"


def test_no_shard_holds_a_batch(shards):
    loader = DocumentLoader(shards[1:2], 20, 12, 0, aligned=True)
    for wrapped in (loader, Prefetcher(loader, CPU)):
        with pytest.raises(DataError, match="no shard of .* holds one batch of 8 rows of 20 tokens") as caught:
            wrapped.next_step(PARTS)
        assert "\n" not in str(caught.value)


def test_one_shard_is_read_again_and_again(shards):
    loader, first = DocumentLoader(shards[:1], 20, 12, 0, aligned=True), None
    for _ in range(30):
        batches, first = loader.next_step(PARTS), first or loader.state()
    assert loader.shard == 0 and len(loader.loaded) == 1 and batches[0][0].shape == (1, 20)


def test_the_next_shard_is_loaded_before_it_is_needed(shards, monkeypatch):
    loader = DocumentLoader(shards, 20, 12, 0, aligned=True)
    loader.loaded[1].result()
    monkeypatch.setattr(loader, "load", lambda shard: pytest.fail("loaded in the foreground") if shard == 1 else None)
    loader.open(1, 0)
    assert loader.shard == 1 and len(loader.starts) == 6


# ---- reading ahead


def test_reading_ahead_changes_nothing_also_across_stages_and_shards(shards):
    plain = DocumentLoader(shards, 20, 12, 0, aligned=True)
    ahead = Prefetcher(DocumentLoader(shards, 20, 12, 0, aligned=True), CPU)
    for step in range(40):
        stage = (20, 12) if step < 15 else (40, 25)
        for loader in (plain, ahead):
            loader.row_len, loader.max_len = stage
        assert plain.state() == ahead.state()
        parts = [0, 4] if step % 7 else [3]
        for a, b in zip(plain.next_step(parts), ahead.next_step(parts), strict=True):
            assert len(a) == len(b) == 4 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            assert a[0].shape == (1, stage[0])
    assert ahead.waited_s > 0


def test_a_resumed_run_reads_on_where_the_first_one_stopped(shards):
    whole = Prefetcher(DocumentLoader(shards, 20, 12, 0, aligned=True), CPU)
    for _ in range(9):
        whole.next_step(PARTS)
    kept = whole.state()
    rest = [whole.next_step(PARTS) for _ in range(20)]
    again = Prefetcher(DocumentLoader(shards, 20, 12, 0, aligned=True), CPU)
    again.next_step(PARTS)  # what a warm-up reads
    again.open(**kept)
    for batches in rest:
        for a, b in zip(batches, again.next_step(PARTS), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert again.state() == whole.state()


def test_a_damaged_shard_stops_the_step_that_needs_it_with_the_same_line(shards):
    shards[1].write_bytes(b"no shard")
    found = []
    for wrap in (lambda loader: loader, lambda loader: Prefetcher(loader, CPU)):
        loader = wrap(DocumentLoader(shards, 20, 12, 0, aligned=True))
        with pytest.raises(DataError) as caught:
            for steps in range(40):  # noqa: B007
                loader.next_step(PARTS)
        with pytest.raises(DataError):
            loader.next_step(PARTS)
        found.append((steps, str(caught.value)))
    assert found[0] == found[1] and found[0][0] > 3 and "not a token shard" in found[0][1]


def test_the_step_is_prepared_while_the_present_one_runs(shards):
    class Slow(DocumentLoader):
        def next_step(self, parts):
            threads.append(threading.current_thread())
            time.sleep(0.05)
            return super().next_step(parts)

    threads, loader = [], Prefetcher(Slow(shards, 20, 12, 0, aligned=True), CPU)
    loader.next_step(PARTS)
    first = loader.waited_s
    assert first >= 0.05
    time.sleep(0.3)
    loader.next_step(PARTS)
    assert loader.waited_s - first < 0.04, "it was ready"
    assert threading.main_thread() not in threads


# ---- which kernel


ALL = {"fa3", "fa4", "fa2", "flex", "reference"}


@pytest.mark.parametrize(("gpu", "capability", "best", "bare"), [
    ("CPU", (0, 0), "reference", "reference"), ("T4", (7, 5), "flex", "flex"), ("A100", (8, 0), "fa2", "fa2"),
    ("RTX 4090", (8, 9), "fa2", "fa2"), ("H100", (9, 0), "fa3", "fa2"), ("B200", (10, 0), "fa4", "fa2")])
def test_every_gpu_gets_a_kernel_that_it_runs(gpu, capability, best, bare):
    assert choose_attention(capability, ALL) == best
    assert choose_attention(capability, {"fa2", "flex", "reference"}) == bare
    assert choose_attention(capability, {"reference"}) == "reference", "float64"
    assert choose_attention(capability, ALL, "") == best, "an empty wish is none"
    for wish in ALL | {"fa5"}:
        try:
            assert choose_attention(capability, ALL, wish) == wish
        except ValueError as error:
            assert "\n" not in str(error) and f"SPEEDRUN_ATTENTION={wish}" in str(error) and "reference" in str(error)
        else:
            assert {"fa3": capability[0] == 9, "fa4": capability[0] in (9, 10), "fa2": capability[0] >= 8,
                    "flex": capability[0] >= 7}.get(wish, True)


def test_wishes_that_cannot_come_true():
    with pytest.raises(ValueError, match="=fa5 is not the name .* one of: fa3, fa4, fa2, flex, reference$"):
        choose_attention((9, 0), ALL, "fa5")
    with pytest.raises(ValueError, match="fa3 does not run on compute capability 8.0; .* use one of: fa2, flex, ref"):
        choose_attention((8, 0), ALL, "fa3")
    with pytest.raises(ValueError, match="fa4 is not installed"):
        choose_attention((9, 0), ALL - {"fa4"}, "fa4")
    with pytest.raises(ValueError, match="flex does not run on a CPU; on a CPU use one of: reference$"):
        choose_attention((0, 0), {"reference"}, "flex")


@pytest.fixture
def wish(monkeypatch):
    "Set SPEEDRUN_ATTENTION for one test."
    def set_wish(name):
        monkeypatch.setenv("SPEEDRUN_ATTENTION", name)
        attention_backend.cache_clear()
    yield set_wish
    monkeypatch.undo()
    attention_backend.cache_clear()


def test_the_environment_overrides_the_choice(wish):
    x = torch.zeros(3, 1, 4)
    wish("fa2")
    with pytest.raises(ValueError, match="SPEEDRUN_ATTENTION=fa2 does not run on a CPU"):
        varlen_attention(x, x, x, torch.tensor([0, 3], dtype=torch.int32), *scalars(3, 3))
    wish("reference")
    varlen_attention(x, x, x, torch.tensor([0, 3], dtype=torch.int32), *scalars(3, 3))


def test_precision_limits_the_choice():
    assert available_attention(torch.float64) == {"reference"}
    assert available_attention(torch.float32) == {"reference", "flex"}
    assert {"reference", "flex", "fa2"} <= available_attention(torch.bfloat16)


# ---- attention against a loop over queries


def by_query(q, k, v, borders, window, scale):
    "Attention of every query alone, in float64; only slices say what it sees."
    rows = []
    for start, end in itertools.pairwise(borders):
        for i in range(start, end):
            keys = slice(max(start, i - window), i + 1)
            weights = torch.softmax((k[keys] * q[i]).sum(-1) * scale, dim=0)
            rows.append((weights[..., None] * v[keys]).sum(0))
    return torch.stack(rows)


def compare(lengths, window, heads, head_dim, dtype, device, tolerance, compiled=False):
    "Output and gradients of `varlen_attention` against `by_query`, as relative errors."
    borders = [0, *itertools.accumulate(lengths)]
    generator = torch.Generator().manual_seed(len(lengths) + window)
    given_ = [torch.randn(borders[-1], heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
              for _ in range(4)]
    here = [x.to(device).requires_grad_() for x in given_[:3]]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=device)
    function = torch.compile(varlen_attention, fullgraph=True, dynamic=False) if compiled else varlen_attention
    out = function(*here, cu_seqlens, *scalars(max(lengths), window))
    found = [out, *torch.autograd.grad(out, here, given_[3].to(device))]
    exact = [x.double().requires_grad_() for x in given_[:3]]
    right = by_query(*exact, borders, window, float(torch.tensor(0.3)))
    right = [right, *torch.autograd.grad(right, exact, given_[3].double())]
    assert all(x.is_contiguous() and x.dtype == dtype for x in found)
    for a, b in zip(found, right, strict=True):
        size = max(b.norm(), 0.05 * exact[2].norm())  # with window 0 the gradients of q and k are zero
        error = (a.detach().cpu().double() - b.detach()).norm() / size
        assert error < tolerance, float(error)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), window=st.integers(0, 12))
@few
def test_reference_against_a_loop(lengths, window):
    if sum(lengths):
        compare(lengths, window, 2, 4, torch.float64, CPU, 1e-12)


SHAPES = pytest.mark.parametrize(("lengths", "window"), [
    ([0, 1, 127, 0, 130, 1, 250, 0, 0], 16), ([0, 1, 127, 0, 130, 1, 250, 0, 0], 128), ([509], 1000),
    ([1, 1, 1, 200], 0), ([300, 77], 300), ([64, 64, 128, 256], 130),
], ids=["short", "block", "one", "self", "whole", "tiles"])


@SHAPES
def test_reference_on_shapes_that_are_no_multiples_of_tiles(lengths, window):
    compare(lengths, window, 2, 16, torch.float32, CPU, 2e-6)


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BACKENDS = pytest.mark.parametrize("backend", [pytest.param(name, marks=GPU) for name, *_ in ATTENTION])
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float32: 2e-3}  # the reference also rounds its weights to bf16: 1.2e-2


def force(backend, dtype, wish):
    "Use a backend, or skip the test where it does not run."
    try:
        choose_attention(torch.cuda.get_device_capability(), available_attention(dtype), backend)
    except ValueError as error:
        pytest.skip(str(error))
    wish(backend)
    torch._dynamo.reset()


@SHAPES
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["bf16", "fp32"])
@BACKENDS
def test_kernels_against_a_loop(backend, dtype, lengths, window, wish):
    if backend == "flex" and len(lengths) not in (4, 9):
        pytest.skip("compiles for every length: three shapes are enough")
    force(backend, dtype, wish)
    compare(lengths, window, 3, 128, dtype, torch.device("cuda"), TOLERANCE[dtype])


@BACKENDS
def test_kernels_in_a_compiled_network(backend, wish):
    force(backend, torch.bfloat16, wish)
    tolerance = TOLERANCE[torch.bfloat16]
    compare([0, 1, 127, 0, 130, 1, 250, 0], 128, 3, 128, torch.bfloat16, torch.device("cuda"), tolerance, compiled=True)


@BACKENDS
def test_autocast_gives_kernels_their_precision(backend, wish):
    force(backend, torch.bfloat16, wish)
    q, k, v = (torch.randn(300, 2, 64, device="cuda", requires_grad=True) for _ in range(3))
    borders = torch.tensor([0, 100, 300, 300], dtype=torch.int32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = varlen_attention(q, k, v.bfloat16(), borders, *scalars(200, 50))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and q.grad.dtype == torch.float32 and v.grad.abs().sum() > 0


@SHAPES
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_block_mask_of_flex_attention(lengths, window):
    "On a CPU FlexAttention has no gradients, but the mask is the same."
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    q, k, v = (torch.randn(int(borders[-1]), 2, 16) for _ in range(3))
    with torch.no_grad():
        out = flex_varlen(q, k, v, borders, *scalars(0, window)[1:])
    torch.testing.assert_close(out, varlen_attention(q, k, v, borders, *scalars(512, window)), atol=2e-6, rtol=1e-4)


@SHAPES
@pytest.mark.parametrize("block", [16, 100, 128])
def test_blocks_of_keys_hold_what_is_seen_and_no_empty_block(lengths, window, block):
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    t = int(borders[-1])
    seen = dense_weights(torch.zeros(t, 1, 1), torch.zeros(t, 1, 1), borders, window, 1.0)[0] > 0
    counts, keys = key_blocks(borders, torch.tensor(window), t, block)
    for number, (count, row) in enumerate(zip(counts, keys, strict=True)):
        rows = seen[number * block : (number + 1) * block]
        wanted = [n for n in range(len(keys)) if rows[:, n * block : (n + 1) * block].any()]
        assert row[:count].tolist() == wanted and sorted(row.tolist()) == list(range(len(keys)))


def test_two_rows_for_each_token():
    "Paired heads: borders count tokens, the window counts rows."
    borders = torch.tensor([0, 5, 11, 11], dtype=torch.int32)
    q, k, v = (torch.randn(22, 2, 4) for _ in range(3))
    twice = varlen_attention(q, k, v, 2 * borders, *scalars(12, 7))
    assert torch.equal(varlen_attention(q, k, v, borders, *scalars(6, 7), rows=2), twice)


def test_dense_weights_are_zero_across_borders_and_behind_the_window():
    borders = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    seen = dense_weights(torch.randn(7, 1, 4), torch.randn(7, 1, 4), borders, 2, 1.0)[0] > 0
    expected = [[i >= j and i - j <= 2 and (i < 3) == (j < 3) for j in range(7)] for i in range(7)]
    assert seen.tolist() == expected


# ---- the operator and the compiler


def test_operator_registrations():
    borders = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    q, k, v = (torch.randn(9, 2, 4) for _ in range(3))
    inputs = q, k, v, borders, *scalars(6, 4), 1
    torch.library.opcheck(varlen_attention_op, inputs)
    out, lse = varlen_attention_op(*inputs)
    torch.library.opcheck(varlen_attention_backward, (torch.randn(9, 2, 4), q, k, v, out, lse, *inputs[3:]),
                          test_utils=("test_schema", "test_faketensor"))


def test_compiled_code_is_kept_until_a_gradient_changes(fresh_compiler, monkeypatch):
    q, k, v = (torch.randn(9, 2, 4, requires_grad=True) for _ in range(3))
    borders = torch.tensor([0, 3, 3, 9], dtype=torch.int32)

    def gradient():
        torch._dynamo.reset()
        counters.clear()
        grad, = torch.autograd.grad(compile_model(varlen_attention)(q, k, v, borders, *scalars(6, 4)).sum(), v)
        return grad, counters["aot_autograd"]["autograd_cache_hit"]

    with fresh_cache():
        right, hits = gradient()
        again, more_hits = gradient()
        assert torch.equal(right, again) and (hits, more_hits) == (0, 1)
        old = VarlenAttention.backward
        monkeypatch.setattr(VarlenAttention, "backward", staticmethod(lambda ctx, grad: old(ctx, 2 * grad)))
        twice, hits = gradient()
        assert torch.allclose(twice, 2 * right) and hits == 0, "the old gradient from the cache"


def test_windows_scale_and_longest_document_do_not_compile_again(fresh_compiler):
    counter = CompileCounter()
    attention = torch.compile(varlen_attention, backend=counter, fullgraph=True, dynamic=False)
    for tokens, max_len, window, scale in itertools.product((9, 12), (4, 9), (1, 5), (0.1, 0.2)):
        q, k, v = (torch.randn(tokens, 2, 4) for _ in range(3))
        borders = torch.tensor([0, 4, tokens, tokens], dtype=torch.int32)
        inputs = q, k, v, borders, *scalars(max_len, window, scale)
        torch.testing.assert_close(attention(*inputs), varlen_attention(*inputs))
    assert counter.frame_count == 2, "once for each length of a part"


def nano(rung):
    "A network of size nano away from its start."
    torch.manual_seed(0)
    model = build_model(recipe_for(rung, "nano"), SIZES["nano"])
    with torch.no_grad():
        for p in model.parameters():
            p += (0.05 * torch.randn(p.shape)).to(p.dtype)
    return model


def test_a_run_compiles_once(fresh_compiler):
    "All stages of the record: windows, YaRN, MTP weights, lengths of parts and of documents change at run time."
    model, counter = nano(LADDER[-1].name), CompileCounter()
    recipe, compiled = model.recipe, torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    seen = []
    for step in (0, 39, 40, 79, 40, 0):
        model.at_step(step)
        row_len, max_len = stage_batch(step, recipe.steps, 64, 24, 48)
        tokens = torch.randint(0, 257, (1, row_len))
        borders = cumulative_lengths(torch.tensor([20 + step % 3, 30 + step % 5]), row_len, 16 + step)
        part = tokens, tokens.clone(), borders, torch.tensor(max_len, dtype=torch.int32)
        forward(compiled, part, recipe, World(0, 1, torch.device("cpu")))
        seen.append(counter.frame_count)
    assert seen == [1] * 6


# ---- the network


def logits_after(model, borders, change=None):
    "Logits of 24 tokens, one of them changed on request."
    tokens = torch.arange(24)[None] * 7 % 257
    if change is not None:
        tokens[0, change] += 1
    with torch.no_grad():
        return model.logits(tokens, torch.tensor(borders, dtype=torch.int32), torch.tensor(24, dtype=torch.int32))[0]


@pytest.mark.parametrize("rung", ["documents", "yarn"])
def test_a_document_does_not_see_the_one_before(rung):
    "Except for its last token, which smear and bigrams carry over; from `key_offset` on, keys carry more."
    model = nano(rung)
    apart, together = [0, 10, 24, 24], [0, 24, 24, 24]
    moved = (logits_after(model, apart) != logits_after(model, apart, change=4)).any(-1)
    assert not moved[:4].any() and moved[4:10].all() and not moved[10:].any()
    moved = (logits_after(model, together) != logits_after(model, together, change=4)).any(-1)
    assert moved[4:].all()


@pytest.mark.parametrize("rung", ["documents", "bf16_weights"])
def test_a_document_gets_the_same_logits_alone_and_in_company(rung):
    model = nano(rung).double()
    tokens = torch.arange(24)[None] * 7 % 257

    def logits(inputs, borders):
        with torch.no_grad():
            borders = torch.tensor(borders, dtype=torch.int32)
            return model.logits(inputs, borders, torch.tensor(24, dtype=torch.int32))[0]

    alone, packed = logits(tokens[:, :10], [0, 10, 10]), logits(tokens, [0, 10, 24])
    torch.testing.assert_close(packed[:10], alone, atol=2e-2 if rung == "bf16_weights" else 1e-9, rtol=1e-3)


def test_the_loss_of_a_packed_row_is_finite_and_near_chance_at_the_start():
    torch.manual_seed(0)
    model = build_model(recipe_for("documents", "nano"), SIZES["nano"]).eval()
    tokens = torch.randint(0, 257, (1, 65))
    borders = cumulative_lengths(torch.tensor([7, 8, 40]), 64, 8)
    loss = model(tokens[:, :-1], tokens[:, 1:], borders, torch.tensor(64, dtype=torch.int32)).item()
    assert abs(loss - math.log(257)) < 0.5


def test_no_optional_kernel_is_imported_with_the_module():
    tree = ast.parse(Path(documents.__file__).read_text(encoding="utf-8"))
    modules = {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    modules |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in modules} - sys.stdlib_module_names <= {"numpy", "torch", "data"}
