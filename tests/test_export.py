"""Exported scripts: self-contained, clean, and the same mathematics as the package."""

import os
import subprocess
import sys
from pathlib import Path

import libcst as cst
import pytest
import torch

from speedrun_lib.data import read_shard, write_demo, write_shard
from speedrun_lib.export import (
    ENTRIES,
    ExportError,
    FoldBranches,
    Linker,
    count_diff,
    diff_rungs,
    export_script,
    facts,
    fold,
    fold_choices,
    linked,
    stale_exports,
)
from speedrun_lib.recipe import LADDER, SIZES, RecipeError, recipe_for
from speedrun_lib.runs import read_log
from speedrun_lib.train import Run, RunLog, join_world, train

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    "The demo text, of which validation reads 2,048 bytes."
    folder = write_demo(tmp_path_factory.mktemp("data") / "demo_bytes", "bytes")
    (val,) = folder.glob("*_val_*.bin")
    write_shard(val, read_shard(val)[:2049].copy())
    return folder


def run_script(path: Path, *args: str, processes: int = 0, env: dict | None = None) -> subprocess.CompletedProcess:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.run([sys.executable, *torchrun, str(path), *args], cwd=path.parent, env=env or ENV,
                          capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("rung", [r.name for r in LADDER])
def test_scripts_stand_alone_and_are_clean(rung, tmp_path):
    source = export_script(rung)
    path = tmp_path / "script.py"
    path.write_text(source)
    compile(source, str(path), "exec")
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / ".ruff.toml"), str(path)]
    ruff = subprocess.run(command, capture_output=True, text=True)
    assert ruff.returncode == 0, ruff.stdout
    assert "speedrun_lib" not in source and "# %%" not in source and "recipe_for" not in source
    assert 'custom_op("speedrun::' not in source, "loaded beside the package, it would take its operators"


@pytest.mark.parametrize("rung", ["baseline", "muon", LADDER[-1].name])
def test_script_and_package_give_the_same_losses(rung, shards, tmp_path):
    path, source, changes = tmp_path / f"{rung}.py", export_script(rung), {"steps": "2"}
    if rung == LADDER[-1].name:  # which adds four steps after the schedule; both with shorter rows
        changes = {"steps": "1", "seq_len": "64"}
        assert source.count("seq_len=256,") == 1
        source = source.replace("seq_len=256,", "seq_len=64,")
    path.write_text(source)
    args = ["--size", "nano", "--steps", changes["steps"], "--device", "cpu", "--data", str(shards)]
    done = run_script(path, *args, "--out", str(tmp_path / "script"))
    assert done.returncode == 0, done.stderr
    torch.set_num_threads(1)
    run = Run(shards, tmp_path / "package", log_every=1)
    train(recipe_for(rung, "nano", changes), SIZES["nano"], run, join_world("cpu"), RunLog(run.run_dir, 0))
    ours, theirs = read_log(tmp_path / "package"), read_log(tmp_path / "script")
    assert ours[["train_loss", "val_loss"]].equals(theirs[["train_loss", "val_loss"]])
    assert (tmp_path / "script/log.txt").read_text().startswith(path.read_text()), "a script prints itself into its log"


def test_two_processes_and_resuming(shards, tmp_path):
    path = tmp_path / "muon.py"
    path.write_text(export_script("muon"))
    args = ["--size", "nano", "--device", "cpu", "--data", str(shards), "--steps", "3"]
    one = run_script(path, *args, "--out", "one")
    two = run_script(path, *args, "--out", "two", processes=2)
    assert one.returncode == two.returncode == 0, two.stderr[-2000:]
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    torch.testing.assert_close(torch.tensor(logs[0].train_loss.dropna().values),
                               torch.tensor(logs[1].train_loss.dropna().values), rtol=0, atol=1e-4)
    again = run_script(path, *args, "--out", "one", "--resume")
    assert again.returncode == 0, again.stderr
    assert read_log(tmp_path / "one").val_loss.iloc[-1] == logs[0].val_loss.iloc[-1]


@pytest.mark.parametrize("args, env, expected", [
    (["--data", "nowhere"], {}, "speedrun data get"),
    (["--device", "cuda"], {}, "torch sees none"),
    ([], {"WORLD_SIZE": "3"}, "use 1, 2, 4 or 8"),
])
def test_bad_input_is_one_line(args, env, expected, tmp_path):
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    path = tmp_path / "muon.py"
    path.write_text(export_script("muon"))
    done = run_script(path, "--size", "nano", *args, env=ENV | env)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0]


def test_committed_milestones_are_up_to_date():
    assert stale_exports(ROOT / "exported_scripts") == []


def test_neighbouring_rungs_differ_little():
    for old, new, most in (("softcap", "muon", 280), ("qk_norm", "relu2", 50), ("polar", "normuon", 50)):
        assert sum(count_diff(diff_rungs(old, new))) < most
    assert diff_rungs("muon", "muon") == ""


def test_unknown_rung():
    with pytest.raises(RecipeError, match="did you mean 'muon'"):
        export_script("muom")


def folded(source: str, **choices) -> str:
    return cst.parse_module(source).visit(FoldBranches(choices)).code


@pytest.mark.parametrize("source, choices, expected", [
    ("x = 1 if recipe.a else 2\n", {"a": True}, "x = 1\n"),
    ("x = not recipe.a\n", {"a": True}, "x = False\n"),
    ("x = recipe.a and y\n", {"a": True}, "x = y\n"),
    ("x = recipe.a or y\n", {"a": True}, "x = True\n"),
    ("if recipe.m == 'x':\n    f()\nelif z:\n    g()\nelse:\n    h()\n", {"m": "y"},
     "if z:\n    g()\nelse:\n    h()\n"),
    ("if z:\n    g()\nelif recipe.a:\n    h()\nelse:\n    k()\n", {"a": True}, "if z:\n    g()\nelse:\n    h()\n"),
    ("if self.recipe.a:\n    f()\n", {"a": False}, ""),
    ("def f(recipe):\n    if recipe.a:\n        return 1\n    return 2\n", {"a": True},
     "def f(recipe):\n    return 1\n"),
])
def test_folding(source, choices, expected):
    assert folded(source, **choices).strip() == expected.strip()


def test_a_parameter_that_is_always_the_same_disappears_with_what_it_switches():
    source = """
class Loader:
    def __init__(self, files, aligned):
        self.files, self.aligned = files, aligned

    def read(self):
        return pack(self.files) if self.aligned else self.files


def pack(files):
    return sorted(files)


def main():
    return Loader(["a"], aligned=False).read()
"""
    code = fold(cst.parse_module(source), {}, ["main"]).code
    assert "aligned" not in code and "pack" not in code and 'Loader(["a"]).read()' in code
    space: dict = {}
    exec(code, space)
    assert space["main"]() == ["a"]


def test_an_annotated_attribute_that_nobody_reads_disappears():
    source = """
class Net:
    def __init__(self):
        self.past: list = []

    def go(self, recipe, windows):
        if recipe.a and windows != self.past:
            print(windows)
        self.past, (first, last) = windows, windows[-1]
        return first + last


def main(recipe):
    return Net().go(recipe, [(1, 2)])
"""
    code = fold(cst.parse_module(source), {"a": False}, ["main"]).code
    assert "past" not in code and "first, last = windows[-1]" in code.replace("(first, last)", "first, last")


@pytest.mark.parametrize("source, message", [
    ("from .other import *\n\ndef main(): ...\n", "star import"),
    ("def main(recipe):\n    return getattr(recipe, 'model')\n", "write recipe.<field>"),
    ("from .other import missing\n\ndef main():\n    return missing\n", "there is no missing"),
    ("def main(recipe):\n    return asdict(recipe)['model']\n", "train.py:2: .* write recipe.<field>"),
    ("def main(recipe):\n\n    kind, x = recipe.model, 1\n", "train.py:3: recipe.model is copied to a variable"),
    ("def main(recipe):\n    match recipe.model:\n        case 'gpt': ...\n", "train.py:2: match on a recipe choice"),
    ("def main(r: Recipe): ...\n", "train.py:1: a parameter of type Recipe must be called recipe"),
    ("def main():\n    from .other import x\n", "train.py:2: an import from the package inside"),
    ("from .other import x\nfrom json import loads\n\ndef main():\n    return x, loads\n", "imported from two places"),
    ("from .other import x\n\ndef y(): ...\n\ndef main():\n    return x, y\n", "the name y has another meaning"),
])
def test_code_that_cannot_be_followed_is_named(source, message):
    other = "from pickle import loads\n\nx = loads, y\n\ny = 1\n"
    with pytest.raises(ExportError, match=message):
        link({"train": source, "other": other}, ["model"])


def export_afresh(rung: str) -> str:
    for cached in (export_script, linked, facts, fold_choices):
        cached.cache_clear()
    return export_script(rung)


def test_exports_depend_on_neither_order_nor_repetition():
    rungs = [LADDER[0].name, LADDER[-1].name]
    alone = {rung: export_afresh(rung) for rung in rungs}
    assert {rung: export_script(rung) for rung in reversed(rungs)} == alone
    export_script.cache_clear()
    assert {rung: export_script(rung) for rung in rungs} == alone


TWO_WAYS = """
def limit(n):
    return min(n, 1000)


def fast(recipe, double=False):
    return limit(2 * recipe.steps if double else recipe.steps)


def slow(recipe):
    return limit(3 * recipe.steps)


def main(recipe):
    return fast(recipe) if recipe.a else slow(recipe)
"""


def test_folding_shares_statements_and_changes_none():
    module = cst.parse_module(TWO_WAYS)
    first, other, again = (fold(module, {"a": a}, ["main"]) for a in (True, False, True))
    assert first.code == again.code and "slow" not in first.code and "double" not in first.code
    assert "fast" not in other.code and module.code == TWO_WAYS
    assert first.body[0] is module.body[0], "what nothing changes stays the same object, with its facts"
    assert all(a is b for a, b in zip(first.body, fold(first, {}, ["main"]).body, strict=True))


def link(sources: dict[str, str], choices=()) -> str:
    linker = Linker(sources, choices)
    linker.reach("train", "main")
    return linker.flat()[0].code


def test_a_changed_source_is_read_again():
    main = "from .other import f\n\ndef main():\n    return f()\n"
    for value in ("1", "2", "1"):
        code = link({"train": main, "other": f"def f():\n    return {value}\n"})
        assert f"return {value}" in code


@pytest.mark.parametrize("body, kept", [
    ("    return other", True),
    ("    other = 1\n    return other", False),
    ("    return [other for other in range(3)]", False),
    ("    return [x for x in other]", True),
    ("    def inner(other):\n        return other\n    return inner(1)", False),
    ("    def inner():\n        return other\n    return inner()", True),
    ("    x: 'other' = 1\n    return x", True),
    ("    x: Literal['other'] = 'other'\n    return x", False),
    ("    return recipe.other, f(other=1)", False),
])
def test_only_a_use_of_the_global_name_counts(body, kept):
    source = f"from typing import Literal\n\ndef f(other): ...\n\ndef other(): ...\n\ndef main(recipe):\n{body}\n"
    assert ("def other" in link({"train": source})) == kept
    assert ("def other" in fold(cst.parse_module(source), {}, ["main"]).code) == kept


def test_what_is_registered_comes_along_and_modules_of_modules_too():
    source = """
import importlib
import importlib.util
import unused

@op
def kernel(x):
    return importlib.util.find_spec(x)

@kernel.register_fake
def _(x):
    return fake(x)

def fake(x):
    return x

def main():
    return kernel(1)
"""
    code = link({"train": source})
    assert "register_fake" in code and "def fake" in code and "import importlib.util" in code and "unused" not in code
    assert "register_fake" not in fold(cst.parse_module(source.replace("kernel(1)", "fake(1)")), {}, ["main"]).code


def test_a_variable_that_is_global_elsewhere_stays():
    source = "n = 0\n\ndef count():\n    global n\n    n = 1\n\ndef main():\n    count()\n    return n\n"
    assert "    n = 1" in fold(cst.parse_module(source), {}, ["main"]).code


def test_entries_exist():
    for name in ENTRIES:
        assert name in export_script("baseline")
