"Sparse rows: what is marked, announced and sent, the sum that arrives, and when the trainer calls."

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_lib import sparse, train
from speedrun_lib.bigram import bigram_rows
from speedrun_lib.data import find_shards, write_demo
from speedrun_lib.gpt import build_model
from speedrun_lib.optimizer import Optimizer
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.runs import measured
from speedrun_lib.sharded import Exchange
from speedrun_lib.sparse import SPARSE_FROM, SparseRows
from speedrun_lib.train import World, forward, load_checkpoint, save_checkpoint, train_step, training_loader, warm_up

CPU = torch.device("cpu")


def member(rank, size, rows=16, active=True):
    "The sparse rows of one process among several, without any process group."
    exchange = Exchange()
    exchange.rank, exchange.size = rank, size
    found = SparseRows(rows, exchange)
    found.active = active
    return found


class Post:
    "Stands for the network between processes that take turns in one thread; delivers when everybody has sent."

    def __init__(self, size):
        self.size, self.letters = size, []

    def all_to_all_single(self, output, input, output_splits=None, input_splits=None, async_op=False):
        assert async_op, "nobody waits where it sends"
        even = [len(input) // self.size] * self.size
        self.letters.append((output, input.split(input_splits or even), output_splits or even))
        assert sum(output_splits or even) == len(output) and output.is_contiguous() and input.is_contiguous()
        if len(self.letters) == self.size:
            for rank, (output, _, splits) in enumerate(self.letters):
                assert splits == [len(parts[rank]) for _, parts, _ in self.letters], "announced and sent must agree"
                output.copy_(torch.cat([parts[rank] for _, parts, _ in self.letters]))
            self.letters.clear()
        return SimpleNamespace(wait=lambda: None)


@st.composite
def tables(draw):
    "Rows in use by each process: (processes, rows), and a seed for gradients."
    size, share = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(1, 4))
    used = draw(st.lists(st.lists(st.booleans(), min_size=size * share, max_size=size * share),
                         min_size=size, max_size=size))
    return torch.tensor(used), draw(st.integers(0, 99))


def exchanged(used, grads, monkeypatch, marked=None):
    "Every process's sparse rows and averaged gradient after one exchange."
    size, rows = used.shape
    monkeypatch.setattr(sparse, "dist", Post(size))
    members = [member(rank, size, rows) for rank in range(size)]
    for each, mine in zip(members, used if marked is None else marked, strict=True):
        each.used |= mine
        each.announce(CPU)
    for each in members:
        each.exchange_rows()
    for each, grad in zip(members, grads, strict=True):
        each.send(grad)
    return members, [each.receive(grad) for each, grad in zip(members, grads, strict=True)]


def whole_gradients(used, seed, dtype=torch.bfloat16):
    "Gradients of whole numbers, zero in unused rows: sums are exact in any order."
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randint(1, 9, (*used.shape, 3), generator=generator).to(dtype)
    return grads * used[..., None]


@settings(max_examples=60, deadline=None)
@given(tables())
def test_the_exchange_is_the_mean_of_the_owners_rows(table):
    used, seed = table
    size = len(used)
    grads = whole_gradients(used, seed)
    expected = (grads.float().sum(0) / size).to(grads.dtype).view(size, -1, 3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        members, means = exchanged(used, grads.clone(), monkeypatch)
    assert torch.equal(torch.stack(means), expected)
    sent = torch.stack([each.send_counts for each in members])
    received = torch.stack([each.receive_counts for each in members])
    assert torch.equal(sent.T, received) and not sent.diagonal().any(), "own rows stay at home"
    by_owner = used.view(size, size, -1)
    assert torch.equal(sent, by_owner.sum(-1).fill_diagonal_(0))
    for rank, each in enumerate(members):
        share = used.shape[1] // size
        assert (each.received_rows // share == rank).all(), "what arrives belongs to this process"
        assert each.rows.dtype == torch.int32 and each.rows.unique().tolist() == each.rows.tolist()
        assert not (each.rows // share == rank).any() and used[rank][each.rows.long()].all()
        assert not each.used.any(), "marks are cleared for the next two steps"


@settings(max_examples=30, deadline=None)
@given(tables(), st.integers(0, 2**32))
def test_rows_too_many_do_not_matter(table, seed):
    used, gradient_seed = table
    extra = used | (torch.rand(used.shape, generator=torch.Generator().manual_seed(seed)) < 0.3)
    grads = whole_gradients(used, gradient_seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _, exact = exchanged(used, grads.clone(), monkeypatch)
        _, generous = exchanged(used, grads.clone(), monkeypatch, extra)
    assert all(torch.equal(a, b) for a, b in zip(exact, generous, strict=True))


def test_every_addition_rounds_once_in_bf16(monkeypatch):
    used = torch.ones(4, 4, dtype=torch.bool)
    grads = torch.zeros(4, 4, 3, dtype=torch.bfloat16)
    grads[:, 0] = torch.tensor([256.0, 1.0, 1.0, 1.0])[:, None]  # above 256 whole numbers are two apart, ties to even
    _, means = exchanged(used, grads, monkeypatch)
    assert (means[0] == 64).all() and means[0].dtype == torch.bfloat16, "259 exact, 256 when 1 is added three times"


def test_marks_add_up_over_even_and_odd_steps():
    rows = member(1, 8, 1024)
    first, second = (torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(n)) for n in range(2))
    rows.mark(first)
    assert set(rows.used.nonzero().flatten().tolist()) == set(bigram_rows(first, 1024).flatten().tolist())
    rows.mark(second)
    both = {*bigram_rows(first, 1024).flatten().tolist(), *bigram_rows(second, 1024).flatten().tolist()}
    assert set(rows.used.nonzero().flatten().tolist()) == both and 1023 in both, "the reserved row is used too"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 15)))
def test_a_waiting_gradient_is_marked(found):
    rows, grad = member(0, 8), torch.zeros(16, 3)
    grad[found, 1] = -0.5
    rows.used[15] = True
    rows.mark_gradient(grad)
    rows.mark_gradient(None)
    assert set(rows.used.nonzero().flatten().tolist()) == {15, *found}


def test_fewer_processes_stay_dense(monkeypatch):
    monkeypatch.setattr(sparse, "dist", None)  # any exchange would fail
    assert SPARSE_FROM == 8 and not SparseRows(16, Exchange()).active
    rows = member(0, 4, active=False)
    rows.mark(torch.tensor([[1, 2, 3]]))
    rows.mark_gradient(torch.ones(16, 3))
    rows.announce(CPU)
    rows.exchange_rows()
    assert not rows.used.any() and rows.counting is None


@pytest.mark.parametrize("size, active", [(1, False), (4, False), (8, True)])
def test_eight_processes_are_sparse(size, active):
    exchange = Exchange()
    exchange.size = size
    assert SparseRows(16, exchange).active == active


def test_numbers_are_sent_once(monkeypatch):
    monkeypatch.setattr(sparse, "dist", Post(1))
    rows = member(0, 1)
    rows.exchange_rows()
    assert not hasattr(rows, "numbering"), "nothing is announced in an even step"
    rows.announce(CPU)
    rows.exchange_rows()
    first = rows.numbering
    rows.exchange_rows()
    assert rows.numbering is first, "a later part of the same step sends nothing"


# the optimizer and the trainer


@pytest.fixture(scope="module")
def small():
    "A small network of the last rung and its recipe."
    recipe = dataclasses.replace(recipe_for("sparse_bigram", "nano"), bigram_size=1024, num_heads=4)
    torch.manual_seed(0)
    return recipe, build_model(recipe, dataclasses.replace(SIZES["nano"], model_dim=32))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "Shards of the demo text."
    return find_shards(write_demo(tmp_path_factory.mktemp("demo"), "bytes"), "train")


@pytest.fixture
def optimizer(small):
    "Its optimizer, which believes in eight processes."
    recipe, model = small
    model.zero_grad()
    found = Optimizer(recipe, model)
    found.sparse.active = True
    return found


@pytest.mark.parametrize("step, announced", [(0, False), (1, True), (2, False), (3, True)])
def test_only_odd_steps_announce(optimizer, step, announced, monkeypatch):
    monkeypatch.setattr(sparse, "dist", Post(1))
    optimizer.step_number = step
    parts = [torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    marked = []
    monkeypatch.setattr(optimizer.sparse, "mark", marked.append)
    optimizer.announce_rows(parts)
    assert (optimizer.sparse.counting is not None) == announced
    assert all(x is y for x, y in zip(marked, parts, strict=True)), "all parts of this process, in every step"


def test_rows_of_the_table_alone_travel_sparsely(small, optimizer, monkeypatch):
    recipe, model = small
    calls = []
    fake = SimpleNamespace(active=True, send=lambda grad: calls.append(("send", grad)),
                           receive=lambda grad: calls.append(("receive", grad)) or grad)
    optimizer.sparse = fake
    optimizer.step_number = 1
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    table = model.bigram_embed.grad
    optimizer.step()
    assert [name for name, _ in calls] == ["send", "receive"] and all(grad is table for _, grad in calls)
    calls.clear()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step_number = 2
    optimizer.step()
    assert not calls and model.bigram_embed.grad is not None, "in even steps the table waits"
    fake.active = False
    optimizer.step_number = 3
    optimizer.step()
    assert not calls and model.bigram_embed.grad is None, "dense"


def test_the_trainer_calls_in_order(small, optimizer, monkeypatch):
    recipe, model = small
    calls, loss = [], torch.zeros((), requires_grad=True)
    inputs = [torch.zeros(1, 4), torch.ones(1, 4)]
    fake = SimpleNamespace(
        announce_rows=lambda inputs: calls.append(("announce", inputs)), due=list,
        sparse=SimpleNamespace(exchange_rows=lambda: calls.append("rows")), step=lambda: calls.append("step"))
    loss.register_hook(lambda _: calls.append("backward"))
    monkeypatch.setattr(train, "forward", lambda *_: calls.append("forward") or 1 * loss)
    train_step(model, fake, [(x,) for x in inputs], recipe, World(0, 1, CPU))
    (first, seen), *rest = calls
    assert first == "announce" and all(x is y for x, y in zip(seen, inputs, strict=True)), "before the first pass"
    assert rest == ["forward", "rows", "backward"] * 2 + ["step"], "numbers travel under the backward pass"


def test_the_network_uses_marked_rows_and_no_others(small, optimizer, demo):
    recipe, model = small
    loader = training_loader(demo, recipe, SIZES["nano"])
    optimizer.step_number = 0
    for part, batch in enumerate(loader.next_step([0, 5])):
        optimizer.announce_rows([batch[0]])
        forward(model, batch, recipe, World(0, 1, CPU)).backward()
        touched = model.bigram_embed.grad.any(1)
        assert torch.equal(touched, optimizer.sparse.used), part


def test_the_warm_up_leaves_no_marks(small, optimizer, demo, monkeypatch):
    recipe, model = small
    loader = training_loader(demo, recipe, SIZES["nano"])
    monkeypatch.setattr(train, "train_step",
                        lambda model, optimizer, batches, *_: [optimizer.sparse.mark(batch[0]) for batch in batches])
    warm_up(model, model, optimizer, loader, recipe, World(0, 1, CPU))
    assert not optimizer.sparse.used.any()


def test_checkpoints_mark_the_rows_that_wait(small, optimizer, tmp_path):
    recipe, model = small
    optimizer.step_number = 1
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.sparse.active = False
    optimizer.step()  # so that there is a state to save
    optimizer.sparse.active = True
    model.bigram_embed.grad = torch.zeros_like(model.bigram_embed)
    model.bigram_embed.grad[[3, 700]] = 0.5
    path, world = tmp_path / "checkpoint.safetensors", World(0, 1, CPU)
    save_checkpoint(path, model, optimizer, {"step": 2}, recipe, world)
    assert optimizer.sparse.used.nonzero().flatten().tolist() == [3, 700], "the run goes on with the rows of all"
    resumed = Optimizer(recipe, model)
    resumed.sparse.active, model.bigram_embed.grad = True, None
    load_checkpoint(path, model, resumed, {}, recipe)
    assert resumed.sparse.used.nonzero().flatten().tolist() == [3, 700]


def test_counted_rows_fit_the_hash():
    table = measured("bigram_rows")
    expected = 251_520 * (1 - torch.exp(-torch.tensor(table.pairs_mean.to_numpy()) / 251_520))
    assert (abs(expected.numpy() / table.rows_mean - 1) < 0.01).all(), "pairs fall into rows like balls into bins"
    assert (table.rows_min <= table.rows_mean).all() and (table.rows_mean <= table.rows_max).all()
    assert (table.received_mean - table.rows_mean * (1 - 1 / table.world)).abs().max() < 100
