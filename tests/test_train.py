"""The training loop: any number of processes, stopping, resuming, and one clear line for every failure."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from speedrun_lib import train as trainer
from speedrun_lib.data import TokenLoader, find_shards, read_shard, write_demo, write_shard
from speedrun_lib.export import diff_rungs
from speedrun_lib.gpt import build_model
from speedrun_lib.recipe import LADDER, SIZES, recipe_for
from speedrun_lib.runs import draw_runs, load_model, read_log, sample_text
from speedrun_lib.train import (
    Run,
    RunError,
    RunLog,
    join_world,
    read_checkpoint,
    set_step,
    tokens_before,
    total_steps,
    train,
    validate,
)
from tests.command import speedrun
from tests.rungs import NAMES, depth

SMALL_VAL = dataclasses.replace(SIZES["nano"], val_tokens=4096)
SPEEDRUN = str(Path(sys.executable).with_name("speedrun"))  # the command of this environment
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_demo(tmp_path_factory.mktemp("data") / "demo_bytes", "bytes")


@pytest.fixture(scope="module")
def few_to_validate(shards, tmp_path_factory) -> Path:
    "The same text, of which validation reads 4,096 bytes, for whole commands."
    folder = tmp_path_factory.mktemp("few")
    (train_shard,), (val,) = find_shards(shards, "train"), find_shards(shards, "val")
    (folder / train_shard.name).symlink_to(train_shard)
    write_shard(folder / val.name, read_shard(val)[:4097])
    return folder


def quick(rung: str = "muon", **changes: str):
    "A recipe small enough for a test: eight rows of 64 bytes, two layers where that is possible."
    small = {"steps": "6", "seq_len": "64", "val_len": "256", "num_layers": str(depth(rung, 2))}
    return recipe_for(rung, "nano", small | changes)


def run_here(shards: Path, folder: Path, recipe, val_every: int = 3, **options) -> float:
    torch.set_num_threads(1)
    run = Run(shards, folder, val_every=val_every, log_every=1, **options)
    return train(recipe, SMALL_VAL, run, join_world("cpu"), RunLog(folder, 0, run.resume))


def installed(*args: str, cwd: Path, env: dict = ENV) -> subprocess.CompletedProcess:
    "The command as a person starts it."
    return subprocess.run([SPEEDRUN, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=200)


SMALL = ["--size", "nano", "--set", "seq_len=64", "--set", "num_layers=2"]


SHALLOW = [name for name in NAMES if depth(name, 2) == 2]
# a choice of the deep ones: each holds all below it
DEEP = ["backout", "bigram", "xsa", "documents", "bf16_weights"]


@pytest.mark.parametrize("rung", SHALLOW + DEEP)
def test_rungs_learn(shards, tmp_path, rung):
    recipe = quick(rung, steps="20" if rung in SHALLOW else "6")
    loss = run_here(shards, tmp_path, recipe, val_every=30)
    log = read_log(tmp_path)
    assert loss < log.val_loss.dropna().iloc[0] - 1.5, "a few steps take bytes from 5.55 to below 4"
    assert log.tokens.iloc[-1] == tokens_before(total_steps(recipe), recipe)


def test_a_run_keeps_one_colour():
    log = pd.DataFrame({name: [0, 1] for name in ("step", "tokens", "train_time_ms", "train_loss", "val_loss")})
    for ax in draw_runs({"softcap": log, "muon": log}).axes:
        softcap, softcap_val, muon, muon_val = (line.get_color() for line in ax.lines)
        assert softcap == softcap_val != muon == muon_val


def test_log_has_the_format_of_the_original(shards, tmp_path):
    run_here(shards, tmp_path, quick())
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert any(re.fullmatch(r"step:6/6 val_loss:\d\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms", x)
               for x in lines)


@pytest.mark.parametrize("rung, stops", [("lean", (4,)), ("muon", (4,)), (LADDER[-1].name, (2, 4, 5, 9))])
def test_resuming_continues_to_the_bit(few_to_validate, tmp_path, rung, stops, monkeypatch):
    """With the last rung in all three stages and after them, between Adam's steps too; the head is split after step 5.

    One run stops and goes on at each of these steps: what a stop loses is missing at the end, too. The second stage
    (step 3) begins inside the part from 2 to 4, the third (5) with a part, the extension (8) inside that from 5 to 9.
    """
    recipe = quick(rung, steps="8", seq_len="32")
    loss = run_here(few_to_validate, tmp_path / "whole", recipe, val_every=6)
    first = read_checkpoint(tmp_path / "whole/checkpoint.safetensors")[0]

    def set_step_and_stop(step, *rest):
        "Send the signal that a cluster would send, at the start of a step."
        set_step(step, *rest)
        if step == stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("speedrun_lib.train.set_step", set_step_and_stop)
    folder = tmp_path / "parts"
    for stop in stops:
        run = Run(few_to_validate, folder, val_every=6, log_every=1, resume=stop != stops[0])
        with pytest.raises(RunError, match=f"stopped after step {stop}"):
            train(recipe, SMALL_VAL, run, join_world("cpu"), RunLog(folder, 0, run.resume))
    monkeypatch.undo()
    assert run_here(few_to_validate, folder, recipe, val_every=6, resume=True) == loss
    logs = [read_log(tmp_path / name).dropna(subset="train_loss") for name in ("whole", "parts")]
    assert logs[0].train_loss.tolist() == logs[1].train_loss.tolist(), "also on the way"
    second = read_checkpoint(folder / "checkpoint.safetensors")[0]
    assert all(torch.equal(first[k], second[k]) for k in first) and first.keys() == second.keys()


def test_resume_refuses_another_recipe(shards, tmp_path):
    run_here(shards, tmp_path, quick())
    with pytest.raises(RunError, match="another recipe"):
        run_here(shards, tmp_path, quick(muon_lr="0.5"), resume=True)


def test_a_run_is_never_overwritten(shards, tmp_path):
    run_here(shards, tmp_path, quick())
    with pytest.raises(RunError, match="already holds a run"):
        run_here(shards, tmp_path, quick())


@pytest.mark.parametrize("rung, worlds", [("muon", (1, 4)), (LADDER[-1].name, (1, 2))])
def test_any_number_of_processes_agrees(few_to_validate, tmp_path, rung, worlds):
    "The last rung shares the work of its optimizer, goes through all stages, and splits its head; here in fp32."
    small = ["--size", "nano", "--set", "seq_len=64", "--set", f"num_layers={depth(rung, 2)}", "--set", "val_len=256",
             "--set", "bf16_weights=false", "--set", "extension=2"]
    steps = "5" if rung == "muon" else "2"  # two more after the schedule
    base = ["train", rung, *small, "--steps", steps, "--device", "cpu", "--data", str(few_to_validate),
            "--val-every", "100"]
    losses = {}
    for n in worlds:
        out = tmp_path / f"w{n}"
        if n == 2:  # as a person starts it
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                       "--no-python", SPEEDRUN, *base, "--out", str(out)]
            done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=200)
        else:
            done = speedrun(*base, "--out", str(out), cwd=tmp_path, env=ENV, processes=n)
        assert done.returncode == 0, done.stderr[-2000:]
        log = read_log(out)
        losses[n] = torch.tensor([*log.train_loss.dropna(), *log.val_loss.dropna()])
    assert len(losses[1]) >= 6
    for n in worlds[1:]:
        torch.testing.assert_close(losses[n], losses[1], rtol=0, atol=5e-4)


def test_validation_reads_the_tokens_it_promises(shards):
    size, recipe = SIZES["nano"], quick()
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, inputs, targets):
            seen.append(inputs)
            return torch.zeros(())

    validate(Spy(), find_shards(shards, "val"), recipe, size, join_world("cpu"))
    tokens = torch.cat([x.flatten() for x in seen])
    expected = TokenLoader(find_shards(shards, "val"), 8, 64, bos=-1, aligned=False).tokens[: size.val_tokens]
    assert tokens.tolist() == expected.tolist()


def test_one_short_shard_is_enough(tmp_path):
    for split in ("train_000001", "val_000000"):
        write_shard(tmp_path / f"tiny_{split}.bin", torch.arange(2000).remainder(256).numpy())
    assert run_here(tmp_path, tmp_path / "run", quick(steps="12")) < 5.6


def test_non_finite_loss_stops_the_run(shards, tmp_path):
    with pytest.raises(RunError, match=r"the loss is (nan|inf).*learning rate"):
        run_here(shards, tmp_path, quick("lean", steps="30", adam_lr="1e30", warmup_frac="0", grad_clip="0"))
    assert len(read_log(tmp_path)) > 0, "the log of a failed run stays readable"


def test_a_cut_log_is_still_read(shards, tmp_path):
    run_here(shards, tmp_path, quick())
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "train_lo')
    assert read_log(tmp_path).step.max() == 6


def test_damaged_checkpoint_is_named(shards, tmp_path):
    run_here(shards, tmp_path, quick())
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match="damaged"):
        load_model(tmp_path)


def test_sampling_a_trained_run(shards, tmp_path):
    run_here(shards, tmp_path, quick())
    text = sample_text(tmp_path, "To be", 30, seed=3)
    assert text.startswith("To be") and text == sample_text(tmp_path, "To be", 30, seed=3)
    assert text != sample_text(tmp_path, "To be", 30, seed=4)


def test_interrupted_command_leaves_log_and_checkpoint(shards, tmp_path):
    out = tmp_path / "run"
    command = [SPEEDRUN, "train", "muon", *SMALL, "--steps", "100000",
               "--data", str(shards), "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=ENV, **pipes)
    log, deadline = out / "log.jsonl", time.time() + 90
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].startswith("stopped: stopped after step")
    _, meta = read_checkpoint(out / "checkpoint.safetensors")
    assert meta["step"] == read_log(out).step.max()


FAULTS = {
    "unknown rung": (["train", "muom"], "did you mean 'muon'?"),
    "unknown size": (["train", "muon", "--size", "huge"], "there are nano, mini, full"),
    "unknown field": (["train", "muon", "--set", "muonlr=1"], "did you mean 'muon_lr'?"),
    "bad value": (["train", "muon", "--set", "muon_lr=fast"], "takes a number"),
    "missing data": (["train", "muon", "--data", "nowhere"], "speedrun data get"),
    "no FineWeb": (["train", "muon", "--size", "full"], "speedrun data get fineweb"),
    "no run": (["sample", "nowhere"], "no checkpoint"),
    "unknown rungs to compare": (["diff", "lean", "moon"], "did you mean 'muon'?"),
    "unknown export": (["export", "x"], "unknown rung"),
    "empty folder": (["data", "check", "nowhere"], "nowhere"),
    "infinite steps": (["train", "muon", "--set", "steps=inf"], "takes a whole number"),
    "half a step": (["train", "muon", "--set", "steps=2.5"], "takes a whole number"),
    "three heads": (["train", "muon", "--set", "num_heads=3"], "num_heads=3"),
    "no banks": (["train", "muon", "--set", "positions=learned", "--set", "model=gpt2"], "needs model=gpt"),
    "one target": (["train", "fused_loss", "--set", "mtp=false"], "needs mtp=true"),
    "rung and check": (["export", "muon", "--check"], "takes no rung"),
    "file without rung": (["export", "-o", "x.py"], "say which"),
    "no such folder": (["export", "muon", "-o", "nowhere/x.py"], "nowhere/x.py: No such file"),
    "folder is a file": (["train", "muon", "--out", "file/run"], "cannot write to run folder"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path):
    args, expected = FAULTS[case]
    (tmp_path / "file").write_text("not a folder")
    done = (installed if case == "unknown rung" else speedrun)(*args, cwd=tmp_path, env=ENV)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and expected in lines[0]


def test_a_run_that_could_not_begin_leaves_the_folder_free(tmp_path):
    done = speedrun("train", "muon", "--set", "batch_rows=7", "--out", "run", cwd=tmp_path, env=ENV)
    assert done.returncode == 2 and (tmp_path / "run/log.jsonl").stat().st_size == 0
    RunLog(tmp_path / "run", 0)
    (tmp_path / "run/log.jsonl").write_text("{}")
    with pytest.raises(RunError, match="it has no checkpoint: delete it"):
        RunLog(tmp_path / "run", 0)


def test_a_full_disk_ends_in_one_line(shards, tmp_path, monkeypatch):
    def full(*_, **__):
        raise trainer.SafetensorError("No space left on device")

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(RunError, match="cannot write .*No space left on device.*free some space"):
        run_here(shards, tmp_path, quick(steps="1"))


def test_a_diff_in_a_pipe_keeps_every_character(tmp_path):
    done = speedrun("diff", "softcap", "muon", cwd=tmp_path, env=ENV)
    assert done.returncode == 0 and diff_rungs("softcap", "muon") in done.stdout


def test_the_log_says_what_differs_from_its_script(tmp_path):
    sets = ("steps=1", "muon_lr=0.5", "seq_len=32", "num_layers=1")
    done = speedrun("train", "muon", "--out", "run", *(x for s in sets for x in ("--set", s)), cwd=tmp_path, env=ENV)
    assert done.returncode == 0 and "muon_lr=0.5" in (tmp_path / "run/log.txt").read_text(), done.stderr


def test_windows_without_several_targets(shards):
    recipe, size = recipe_for("windows", "nano", {"mtp": "false"}), SIZES["nano"]
    model = build_model(recipe, size)
    assert (int(model.short), int(model.long)) == (16, 48)


@pytest.mark.parametrize("wrong", ["--steps=0", "--val-every=-3", "--batch-rows=0", "--save-every=0"])
def test_a_script_refuses_numbers_below_one(wrong, capsys):
    with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", wrong])
        trainer.main({"nano": recipe_for("muon", "nano")}, SIZES, "muon")
    assert end.value.code == 2 and "is not 1 or more" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_asking_for_a_gpu_where_there_is_none(tmp_path):
    done = speedrun("train", "muon", "--device", "cuda", cwd=tmp_path, env=ENV)
    assert done.returncode == 2 and "torch sees none" in done.stderr.splitlines()[-1]


def test_world_size_that_does_not_divide(tmp_path):
    done = speedrun("train", "muon", cwd=tmp_path, env=ENV | {"WORLD_SIZE": "3", "RANK": "0"})
    assert done.returncode == 2 and "use 1, 2, 4 or 8" in done.stderr


@pytest.mark.parametrize("damage, expected", [
    (lambda b: b[:-100], "should have"),
    (lambda b: b"\0\0\0\0" + b[4:], "wrong magic"),
    (lambda b: b[:4] + b"\7\0\0\0" + b[8:], "version 7"),
    (lambda b: b[:6], "should have"),
])
def test_damaged_shards_are_named(shards, tmp_path, damage, expected):
    for path in shards.glob("*.bin"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    bad = next(tmp_path.glob("*train*"))
    bad.write_bytes(damage(bad.read_bytes()))
    done = speedrun("train", "muon", "--data", str(tmp_path), cwd=tmp_path, env=ENV)
    assert done.returncode == 2 and expected in done.stderr and bad.name in done.stderr


def test_demo_end_to_end(tmp_path):
    done = speedrun("demo", "--steps", "1", "--out", "runs/d", cwd=tmp_path, env=ENV)
    assert done.returncode == 0, done.stderr[-1500:]
    for name in ("curve.png", "curve.svg", "table.md", *(f"{r}/{f}" for r in ("baseline", "muon") for f in (
            "log.txt", "log.jsonl", "sample.txt", "checkpoint.safetensors", "curve.png"))):
        assert (tmp_path / "runs/d" / name).stat().st_size > 0, name
    assert "Try next" in done.stdout and "muon writes" in done.stdout
    first = json.loads((tmp_path / "runs/d/muon/log.jsonl").read_text().splitlines()[0])
    assert first["recipe"]["optimizer"] == "muon" and first["seed"] == 0


COMMANDS = ("demo", "ladder", "train", "sample", "export", "diff", "data get", "data check", "doctor", "site")


def test_every_command_has_help_with_an_example():
    from typer.testing import CliRunner

    from speedrun_lib.cli import app

    for command in COMMANDS:
        shown = CliRunner().invoke(app, [*command.split(), "--help"])
        assert shown.exit_code == 0 and f"Example: speedrun {command}" in " ".join(shown.output.split()), command


@pytest.mark.parametrize("args, expected", [
    (["ladder", "--size", "nano"], "adam_lr=0.016"),
    (["doctor"], "GPT-2 tokenizer"),
    (["diff", "softcap", "muon"], "+class Optimizer"),
    (["data", "get", "demo"], "demo_gpt2"),
])
def test_commands_that_only_look(args, expected, tmp_path):
    done = (installed if "doctor" in args else speedrun)(*args, cwd=tmp_path, env=ENV | {"COLUMNS": "200"})
    assert done.returncode == 0 and expected in done.stdout, done.stderr


def test_a_full_gpu_says_what_to_do(shards, tmp_path, monkeypatch):
    "The command line and scripts print such errors as one line."
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 23 GiB. GPU 0 has 40 GiB")

    run_here(shards, tmp_path / "trained", quick(steps="1"))
    monkeypatch.setattr(trainer, "build_model", full)
    with pytest.raises(RunError, match="CUDA out of memory: stop other programs .* SPEEDRUN_REPLAY=0"):
        run_here(shards, tmp_path / "stopped", quick())
    monkeypatch.setattr("speedrun_lib.runs.generate", full)
    with pytest.raises(RunError, match="CUDA out of memory: stop other programs"):
        sample_text(tmp_path / "trained")
