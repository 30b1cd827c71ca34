"""Schedules: the table of record 82 on the objects that the trainer moves, token totals, and what faults would show."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import speedrun_lib.optimizer as optimizer_module
import speedrun_lib.train as trainer
from speedrun_lib.data import PARTS, find_shards, write_demo
from speedrun_lib.gpt import build_model
from speedrun_lib.mtp import stage_bounds
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.schedules import BATCH_FACTOR, LR_FACTOR, momentum_at, stage_batch, staged_lr, staged_tokens
from speedrun_lib.train import Run, RunLog, build_optimizer, join_world, set_step, tokens_before, total_steps

UNIT = 131_072  # tokens per step in the first stage of size full

# ---- numeric oracles: spec 07, section 6

R82 = [  # step, factor, momentum, short and long window in blocks, weights of the targets
    (0, 1, 0.85, (1, 3), (1, 0.5, 0.25)),
    (1, 1, 0.850333, (1, 3), (1, 0.5, 0.249454)),
    (100, 1, 0.883333, (1, 3), (1, 0.5, 0.195415)),
    (300, 1, 0.95, (1, 3), (1, 0.5, 0.086245)),
    (457, 1, 0.95, (1, 3), (1, 0.5, 0.000546)),
    (458, 1.52, 0.95, (3, 7), (1, 0.5)),
    (549, 1.52, 0.95, (3, 7), (1, 0.400871)),
    (550, 1.52, 0.95, (3, 7), (1, 0.399782)),
    (551, 1.518339394, 0.95, (3, 7), (1, 0.398693)),
    (700, 1.270909091, 0.95, (3, 7), (1, 0.236383)),
    (916, 0.912218182, 0.95, (3, 7), (1, 0.001089)),
    (917, 1.027139394, 0.95, (5, 11), (1,)),
    (1000, 0.868181818, 0.95, (5, 11), (1,)),
    (1200, 0.485151515, 0.95, (5, 11), (1,)),
    (1335, 0.226606061, 0.95, (5, 11), (1,)),
    (1336, 0.224690909, 0.948, (5, 11), (1,)),
    (1374, 0.151915152, 0.872, (5, 11), (1,)),
    (1375, 0.15, 0.87, (6, 13), (1,)),
    (1384, 0.15, 0.852, (6, 13), (1,)),
]
STAGE_OF_82 = {0: (131_072, 896, 0.1), 458: (262_144, 2048, 0.116945957208), 917: (393_216, 2048, 0.127517523796),
               1375: (393_216, 2048, 0.131777988439)}  # first step -> tokens per step, longest document, softmax scale


@pytest.fixture(scope="module")
def dwarf():
    "Network of width 96, optimizer and loader of the full recipe."
    recipe = recipe_for("staged", "full", {"bigram_size": "64", "val_len": "16384"})
    model = build_model(recipe, dataclasses.replace(SIZES["full"], name="dwarf", model_dim=96, vocab_size=257))
    optimizer = build_optimizer(recipe, model)
    return SimpleNamespace(recipe=recipe, model=model, optimizer=optimizer, loader=SimpleNamespace())


def go_to(run, step: int) -> None:
    set_step(step, run.model, run.optimizer, run.loader, run.recipe)


def state(run) -> dict:
    "All that a schedule moves."
    return {"groups": [(group["lr"], group["momentum"]) for group in run.optimizer.param_groups],
            "number": run.optimizer.step_number,
            "loader": (run.loader.row_len, run.loader.max_len), "windows": (int(run.model.short), int(run.model.long)),
            "targets": run.model.mtp_weights.tolist(), "scale": run.model.softmax_scale.item(),
            "tables": (run.model.rotary_cos.double().sum().item(), run.model.rotary_sin.double().abs().sum().item())}


@pytest.mark.parametrize("step, factor, momentum, windows, targets", R82)
def test_the_trainer_follows_the_table_of_record_82(dwarf, step, factor, momentum, windows, targets):
    go_to(dwarf, step)
    for group in dwarf.optimizer.param_groups:
        assert abs(group["lr"] / group["initial_lr"] - factor) < 6e-10 and abs(group["momentum"] - momentum) < 6e-7
    assert (int(dwarf.model.short), int(dwarf.model.long)) == tuple(128 * blocks for blocks in windows)
    padded = torch.tensor([*targets, 0.0, 0.0])[:3]
    torch.testing.assert_close(dwarf.model.mtp_weights, padded, atol=6e-7, rtol=0)
    start = max(first for first in STAGE_OF_82 if first <= step)
    assert (PARTS * dwarf.loader.row_len, dwarf.loader.max_len) == STAGE_OF_82[start][:2]
    assert abs(dwarf.model.softmax_scale.item() - STAGE_OF_82[start][2]) < 1e-8
    muon = {"qk_bank", "vo_bank", "mlp_bank"}
    due = {group["name"] for group in dwarf.optimizer.due()}
    assert due == muon if step % 2 == 0 else muon < due and "lm_head" in due


@pytest.mark.parametrize("step, factor", [(423, 1.52), (508, 1.52), (549, 1.446286089), (700, 1.174803150),
                                          (846, 0.912309711), (847, 1.027086614), (1000, 0.709842520),
                                          (1200, 0.295144357), (1269, 0.152073491), (1270, 0.15), (1284, 0.15)])
def test_rates_of_record_89(step, factor):
    assert abs(staged_lr(step, 1270) - factor) < 6e-10


@pytest.mark.parametrize("step, total, momentum", [(1269, 1285, 0.882), (1270, 1285, 0.88), (1284, 1285, 0.852),
                                                   (150, 1385, 0.90), (300, 1385, 0.95)])
def test_momentum_of_the_records(step, total, momentum):
    assert abs(momentum_at(step, total) - momentum) < 1e-9


@pytest.mark.parametrize("steps, extension, by_stage, total", [
    (1375, 10, (60_030_976, 120_324_096, 180_092_928, 3_932_160), 364_380_160),
    (1270, 15, (55_443_456, 111_149_056, 166_330_368, 5_898_240), 338_821_120)])
def test_tokens_by_stage(steps, extension, by_stage, total):
    borders = 0, *stage_bounds(steps), steps + extension
    counts = [staged_tokens(step, steps, UNIT) for step in borders]
    assert tuple(b - a for a, b in zip(counts, counts[1:], strict=False)) == by_stage and counts[-1] == total


def test_totals_of_record_82(dwarf):
    recipe = recipe_for("staged")
    assert stage_bounds(recipe.steps) == (458, 917, 1375) and total_steps(recipe) == 1385
    assert tokens_before(1385, recipe) == 364_380_160
    updates = 0
    for step in range(1385):
        dwarf.optimizer.step_number = step
        updates += len(dwarf.optimizer.due()) > 3
    assert updates == 692


def test_rates_at_factor_one(dwarf):
    go_to(dwarf, 0)
    lr = {group["name"]: group["lr"] for group in dwarf.optimizer.param_groups}
    expected = {"qk_bank": 0.023, "vo_bank": 0.023, "lm_head": 0.008, "embed": 0.008, "value_embeds": 0.6,
                "bigram_embed": 0.6, "scalars": 0.04, "resid_lambdas": 0.04, "smear_gate": 8e-5, "skip_gate": 4e-4,
                "mudd_w1": 0.002, "mudd_w2": 0.002, "mudd_b2": 0.002}
    assert {name: lr[name] for name in expected} == pytest.approx(expected)
    mlp = next(group for group in dwarf.optimizer.param_groups if group["name"] == "mlp_bank")
    rows, columns = mlp["params"][0].shape[1:]
    up = mlp["lr"] * math.sqrt(rows / columns)
    assert (up, up * mlp["lr_odd"]) == pytest.approx((0.046, 0.092))


def test_plateaus_follow_the_batch():
    assert abs(LR_FACTOR[1] - BATCH_FACTOR[1] ** 0.6) < 0.005 and abs(LR_FACTOR[2] - BATCH_FACTOR[2] ** 0.5) < 0.005
    assert 1.12 < staged_lr(917, 1375) / staged_lr(916, 1375) < 1.13, "the rate jumps up inside the cooldown"


# ---- properties


@given(total=st.integers(1, 5000), warmup=st.integers(1, 400), cooldown=st.integers(1, 400), data=st.data())
def test_momentum_stays_between_its_ends(total, warmup, cooldown, data):
    step = data.draw(st.integers(0, total))
    assert 0.85 - 1e-12 <= momentum_at(step, total, warmup, cooldown) <= 0.95 + 1e-12
    assert momentum_at(0, total, warmup, cooldown) == momentum_at(total, total, warmup, cooldown) == 0.85
    assert momentum_at(step, total, warmup, cooldown) == momentum_at(total - step, total, cooldown, warmup)


@given(steps=st.integers(1, 3000), extension=st.integers(0, 60), unit=st.integers(1, 10**6), data=st.data())
def test_tokens_are_the_sum_over_steps(steps, extension, unit, data):
    step = data.draw(st.integers(0, steps + extension))
    lengths = [stage_batch(s, steps, unit, 5, 9)[0] for s in range(step)]
    assert staged_tokens(step, steps, unit) == sum(lengths)


@given(steps=st.integers(3, 5000), unit=st.integers(1, 10**5), data=st.data())
def test_batches_grow_and_documents_become_longer(steps, unit, data):
    step = data.draw(st.integers(0, steps + 20))
    length, longest = stage_batch(step, steps, unit, 896, 2048)
    second, third, _ = stage_bounds(steps)
    assert length == unit * (1 + (step >= second) + (step >= third))
    assert longest == (2048 if step >= second else 896)


@given(steps=st.integers(3, 5000), frac=st.floats(0, 1), floor=st.floats(0, 1), data=st.data())
def test_the_rate_falls_from_a_plateau_to_the_floor(steps, frac, floor, data):
    step = data.draw(st.integers(0, steps - 1))
    second, third, _ = stage_bounds(steps)
    plateau = LR_FACTOR[(step >= second) + (step >= third)]
    rate = staged_lr(step, steps, frac, floor)
    assert floor - 1e-9 <= rate <= plateau + 1e-9
    if step <= int(steps * (1 - frac)):
        assert rate == plateau
    if int(steps * (1 - frac)) < steps:
        assert staged_lr(steps, steps, frac, floor) == staged_lr(steps + 9, steps, frac, floor) == floor


def test_without_a_cooldown_the_rate_stays_on_its_plateaus():
    assert [staged_lr(step, 9, cooldown_frac=0.0) for step in (0, 3, 6, 8)] == [1, 1.52, 1.73, 1.73]


@settings(max_examples=15, deadline=None)
@given(step=st.integers(0, 1385), other=st.integers(0, 1385))
def test_a_step_is_reached_from_anywhere(dwarf, step, other):
    "Resuming needs nothing but the number of the step."
    go_to(dwarf, step)
    first = state(dwarf)
    go_to(dwarf, other)
    go_to(dwarf, step)
    assert state(dwarf) == first


# ---- on the network of size nano


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    folder = write_demo(tmp_path_factory.mktemp("data") / "demo_bytes", "bytes")
    recipe = recipe_for("staged", "nano", {"steps": "12"})
    torch.manual_seed(0)
    model = build_model(recipe, SIZES["nano"])
    return SimpleNamespace(recipe=recipe, model=model, optimizer=build_optimizer(recipe, model), folder=folder,
                           loader=trainer.training_loader(find_shards(folder, "train"), recipe, SIZES["nano"]))


@pytest.mark.parametrize("step, tokens, longest", [(0, 256, 112), (3, 256, 112), (4, 512, 256), (8, 768, 256),
                                                   (12, 768, 256)])
def test_the_loader_delivers_the_batch_of_the_stage(nano, step, tokens, longest):
    go_to(nano, step)
    borders = []
    for inputs, targets, cu_seqlens, max_len in nano.loader.next_step(list(range(PARTS))):
        assert inputs.shape == targets.shape == (1, tokens) and int(max_len) == longest and cu_seqlens.max() == tokens
        borders.append(cu_seqlens.diff().max().item())
    assert max(borders) <= longest, "no piece of a document is longer than the stage allows"
    assert max(borders) > longest // 2, "and some use the room"


def test_muon_uses_the_momentum_of_the_step(nano, monkeypatch):
    used, rule = [], optimizer_module.nesterov
    monkeypatch.setattr(optimizer_module, "nesterov",
                        lambda buffer, grad, momentum: used.append(float(momentum)) or rule(buffer, grad, momentum))
    for step in (0, 10, 14):
        go_to(nano, step)
        nano.model.vo_bank.grad = torch.zeros_like(nano.model.vo_bank)
        nano.optimizer.step()
    assert total_steps(nano.recipe) == 16 and used == pytest.approx([0.85, 0.85 + 0.1 / 3, 0.85 + 0.1 / 3])


def test_warm_up_visits_every_stage_and_leaves_no_trace(nano, monkeypatch):
    seen = []

    def careless(model, optimizer, batches, recipe, world):
        seen.append((batches[0][0].shape[1], int((model.mtp_weights > 0).sum()), int(model.long)))
        for p in model.parameters():
            p.data.add_(1)
            p.grad = torch.ones_like(p)
        optimizer.state[model.embed]["step"] = 7

    monkeypatch.setattr(trainer, "train_step", careless)
    nano.loader.next_step(list(range(PARTS)))
    before, position = [p.detach().clone() for p in nano.model.parameters()], nano.loader.state()
    trainer.warm_up(nano.model, nano.model, nano.optimizer, nano.loader, nano.recipe, join_world("cpu"))
    assert seen == [(256, 3, 48), (256, 3, 48), (512, 2, 112), (768, 1, 176), (768, 1, 208)]
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(nano.model.parameters(), before, strict=True))
    assert nano.loader.state() == position and not nano.optimizer.state


def test_order_of_events_in_a_run(nano, tmp_path, monkeypatch):
    events, network, real_step = [], [], trainer.set_step
    monkeypatch.setattr(trainer, "build_model", lambda *_: nano.model)

    def setting(step, model, *rest):
        real_step(step, model, *rest)
        network[:] = [model]
        events.append(("set", step))

    def validating(*_):
        events.append(("validate", int(network[0].short), int(network[0].long)))
        return 1.0

    def training(model, optimizer, batches, *_):
        events.append(("train", batches[0][0].shape[1]))
        return torch.ones(())

    for name, function in (("set_step", setting), ("validate", validating), ("train_step", training)):
        monkeypatch.setattr(trainer, name, function)
    run = Run(nano.folder, tmp_path, val_every=4, log_every=1)
    trainer.train(nano.recipe, SIZES["nano"], run, join_world("cpu"), RunLog(tmp_path, 0))
    expected = []
    for step in range(16):
        expected.append(("set", step))
        if step % 4 == 0:
            expected.append(("validate", *[(16, 48), (48, 112), (80, 176), (96, 208)][step // 4]))
        expected.append(("train", (256, 512, 768, 768)[step // 4]))
    assert events == [*expected, ("set", 16), ("validate", 96, 320)], "the last validation looks 20 blocks back"
