"Sharding: any number of processes updates like one, and state goes in and out of shares without loss."

import dataclasses
import multiprocessing
import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from speedrun_lib import optimizer as used
from speedrun_lib import sparse
from speedrun_lib.bigram import bigram_rows
from speedrun_lib.data import PARTS
from speedrun_lib.gpt import build_model
from speedrun_lib.optimizer import Optimizer, parameter_rules
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.sharded import SCATTER_ORDER, SHARDED, WORK_ORDER, Exchange, divisible, in_processes
from speedrun_lib.two_speeds import split_step

STEPS, RUN = 9, 10  # tied until step 7, the last one that moves both together


def start(rung, device="cpu", **changes):
    "A network of size nano with random weights, the same in every process, and its optimizer."
    recipe = dataclasses.replace(recipe_for(rung, "nano", {"steps": str(STEPS)}), bigram_size=1024, **changes)
    size = dataclasses.replace(SIZES["nano"], model_dim=32, vocab_size=100)
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(recipe, num_heads=4), size)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
        model.embed.copy_(model.lm_head.T)
    model.to(device)
    return model, Optimizer(recipe, model)


def tokens_of(step, part):
    "Inputs of one part of a step."
    return torch.randint(0, 100, (1, 24), generator=torch.Generator().manual_seed(100 * step + part))


def add_gradients(model, step, part, share):
    "What one part would add to every gradient: random numbers, in the bigram table only at the rows it uses."
    generator = torch.Generator().manual_seed(1000 * step + part)
    for name, p in model.named_parameters():
        grad = torch.randn(p.shape, generator=generator)
        if name == "bigram_embed":
            rows = bigram_rows(tokens_of(step, part), len(p)).flatten().long()
            grad = torch.zeros_like(grad).index_add_(0, rows, grad[: len(rows)])
        grad = (grad * share).to(p)
        p.grad = grad if p.grad is None else p.grad + grad


def trained(rung, rank, size, steps=range(RUN), device="cpu", **changes):
    "Parameters and state of all processes after some steps, with the same eight parts for every number of processes."
    model, optimizer = start(rung, device, **changes)
    parts = range(rank, PARTS, size)
    for step in steps:
        optimizer.step_number = step
        if optimizer.recipe.sparse_bigram:
            optimizer.announce_rows([tokens_of(step, part) for part in parts])
            optimizer.sparse.exchange_rows()
        for part in parts:
            add_gradients(model, step, part, 1 / len(parts))
        optimizer.step()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: dict(optimizer.whole_state(p)) for name, p in model.named_parameters()}
    return weights, state


def everywhere(rung, size, **changes):
    "The same from several processes, which must agree."
    found = in_processes(size, lambda rank: to_lists(trained(rung, rank, size, **changes)))
    assert all(other == found[0] for other in found), "processes ended with different parameters"
    return found[0]


def to_lists(found):
    "Results as plain numbers, which travel between processes."
    weights, state = found
    return ({name: p.double().tolist() for name, p in weights.items()},
            {name: {key: x.double().tolist() for key, x in each.items()} for name, each in state.items()})


@pytest.fixture(scope="module")
def alone():
    "What one process reaches, in fp32 so that the order of sums hardly matters."
    return to_lists(trained("sharded", 0, 1, bf16_weights=False))


def close(a, b):
    "Equal up to rounding, which may flip whether a single weight decays."
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
    return (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_any_number_of_processes_updates_like_one(alone, size):
    weights, state = everywhere("sharded", size, bf16_weights=False)
    for name, expected in alone[0].items():
        assert close(weights[name], expected), name
        for key, value in alone[1][name].items():
            assert close(state[name][key], value), (name, key)


def test_bf16_weights_and_their_lost_bits_are_shared_too():
    (weights, state), (ours, theirs) = everywhere("sharded", 2), to_lists(trained("sharded", 0, 1))
    for name in ("qk_bank", "mlp_bank"):
        moved = torch.tensor(weights[name]) - torch.tensor(ours[name])
        assert moved.norm() < 0.01 * torch.tensor(ours[name]).norm(), name
        assert torch.tensor(state[name]["mantissa"]).shape == torch.tensor(theirs[name]["mantissa"]).shape


@pytest.mark.parametrize("size", [2, 8])
def test_sparse_rows_bring_the_same_gradient(alone, size, monkeypatch):
    monkeypatch.setattr(sparse, "SPARSE_FROM", 2)
    weights, _ = everywhere("sparse_bigram", size, bf16_weights=False)
    for name, expected in alone[0].items():
        assert close(weights[name], expected), name


def one_with_a_gpu(rank, size, rung, folder):
    "A process joined to the others by NCCL; leaves what it found in a file."
    sparse.SPARSE_FROM, gpus = 2, torch.cuda.device_count()
    if size > gpus:  # NCCL refuses to share a GPU within a machine: each process says that it is a machine of its own
        os.environ |= {"NCCL_HOSTID": f"machine {rank}", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
    torch.cuda.set_device(rank % gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    found = to_lists(trained(rung, rank, size, device=torch.device("cuda", rank % gpus), bf16_weights=False))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def by_nccl(size, rung, folder):
    "What several processes reach; they must agree to the bit."
    folder.mkdir()
    torch.multiprocessing.spawn(one_with_a_gpu, (size, rung, folder), nprocs=size)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    assert all(other == found[0] for other in found), "processes ended with different parameters"
    return found[0]


@pytest.mark.gpu
@pytest.mark.parametrize("rung", ["sharded", "sparse_bigram"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_any_number_of_processes_updates_like_one_by_nccl(rung, size, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    (weights, state), expected = by_nccl(size, rung, tmp_path / "several"), by_nccl(1, rung, tmp_path / "one")
    for name, one in expected[0].items():
        assert close(weights[name], one), name
        for key, value in expected[1][name].items():
            assert close(state[name][key], value), (name, key)


def test_a_forgotten_row_is_seen(alone, monkeypatch):
    monkeypatch.setattr(sparse, "SPARSE_FROM", 2)
    monkeypatch.setattr(sparse.SparseRows, "mark", lambda self, inputs_bt: self.used.__setitem__(slice(3), True))
    weights, _ = everywhere("sparse_bigram", 2, bf16_weights=False)
    assert not close(weights["bigram_embed"], alone[0]["bigram_embed"])


def test_orders_name_every_parameter_of_the_record():
    names = set(parameter_rules(recipe_for("sparse_bigram"))) - {"backout_lambda"}
    assert sorted(SCATTER_ORDER) == sorted(WORK_ORDER) == sorted(names)


def test_gradients_leave_and_are_worked_on_in_the_written_orders(monkeypatch):
    model, optimizer = start("sharded")
    names, seen = {p: name for name, p in model.named_parameters()}, []

    def noted(what):
        old = getattr(Exchange, what)

        def method(self, p, *more, **options):
            seen.append((what, names[p]))
            return old(self, p, *more, **options)

        return method

    for what in ("send", "receive", "spread"):
        monkeypatch.setattr(Exchange, what, noted(what))
    optimizer.step_number = 1
    add_gradients(model, 1, 0, 1.0)
    optimizer.step()
    by = {what: [name for way, name in seen if way == what] for what in ("send", "receive", "spread")}
    there = set(names.values()) - {"embed"}  # tied to the head
    assert by["send"] == [name for name in SCATTER_ORDER if name in there]
    assert by["receive"] == [name for name in WORK_ORDER if name in there]
    assert by["spread"] == [name for name in WORK_ORDER if name in there and name in SHARDED]
    assert [way for way, _ in seen[: len(there)]] == ["send"] * len(there), "all leave before the first is worked on"


def test_the_table_says_how_gradients_travel():
    rules = parameter_rules(recipe_for("sparse_bigram"))
    travels = {name: rule.travels for name, rule in rules.items()}
    assert {name for name, way in travels.items() if way != "all"} == set(SHARDED)
    assert travels["bigram_embed"] == "rows" and travels["value_embeds"] == "shares"
    assert all(rule.travels == "all" for rule in parameter_rules(recipe_for("fused_loss")).values())


@pytest.mark.parametrize("size, shapes", [("full", ((64, 256, 768), (24, 768, 768), (24, 3072, 768))),
                                          ("nano", ((40, 64, 128), (24, 128, 128), (24, 512, 128)))])
def test_banks_are_padded(size, shapes):
    with torch.device("meta"):
        model = build_model(recipe_for("sharded", size), SIZES[size])
    assert (model.qk_bank.shape, model.vo_bank.shape, model.mlp_bank.shape) == shapes
    assert all(divisible(shape) == shape for shape in shapes) and divisible((9, 5)) == (16, 5)


def test_padding_learns_nothing():
    model, optimizer = start("sharded")
    tokens = tokens_of(0, 0)
    borders = torch.tensor([0, 23], dtype=torch.int32), torch.tensor(23, dtype=torch.int32)
    model(tokens[:, :-1], tokens[:, 1:], *borders).backward()
    for bank, used_rows in ((model.qk_bank, 40), (model.vo_bank, 20), (model.mlp_bank, 22)):
        assert not bank.grad[used_rows:].any() and bank.grad[:used_rows].any()


def test_shares_make_a_whole():
    def round_trip(rank):
        mantissa = torch.arange(24).to(torch.uint16).view(8, 3)
        exchange, state = Exchange(), {"mantissa": mantissa, "step": torch.tensor(3.0)}
        part = exchange.share_state(state)
        whole = exchange.whole_state(part)
        return len(part["mantissa"]), whole["mantissa"].tolist(), whole["step"].item()

    full = torch.arange(24).view(8, 3).tolist()
    assert in_processes(4, round_trip) == [(2, full, 3.0)] * 4


def test_a_failing_process_is_reported(capfd):
    with pytest.raises(RuntimeError, match="a process failed"):
        in_processes(2, lambda rank: 1 / rank and time.sleep(60))
    assert "ZeroDivisionError" in capfd.readouterr().err
    for process in multiprocessing.active_children():
        process.join(10)
    assert not multiprocessing.active_children(), "the others would wait for ever"


def test_tensors_come_back_and_nothing_warns(monkeypatch):
    def averaged(rank):
        warnings.simplefilter("error")  # torch 2.13 has new names for two collectives
        exchange, p = Exchange(), torch.zeros(4)
        exchange.send(p, torch.full((4,), 2.0 * rank), in_shares=True)
        exchange.spread(p, exchange.receive(p))
        exchange.finish()
        return p

    assert all(torch.equal(p, torch.ones(4)) for p in in_processes(2, averaged))
    wait = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: wait(1))  # look so late that the process is gone
    assert in_processes(1, lambda rank: torch.ones(3))[0].sum() == 3


def test_the_split_copies_the_state_of_all_shares(alone, monkeypatch):
    assert split_step(STEPS) == 7
    monkeypatch.setattr(used, "transposed_state", lambda state: {})
    weights, _ = everywhere("sharded", 2, bf16_weights=False)
    assert not close(weights["embed"], alone[0]["embed"]), "the embedding's state after the split matters"
