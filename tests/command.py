"""The `speedrun` command without waiting for its imports.

Each call runs in a process of its own, forked from one that has imported the package and nothing else: with its own
arguments, environment, folder, output and exit code, and seconds sooner. Tests that are about the start of
the command itself call the installed `speedrun` instead.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

FRESH = multiprocessing.get_context("forkserver")  # its server is a new interpreter, which knows nothing of pytest
FRESH.set_forkserver_preload(["tests.warm", __name__])


def speedrun(*args: str, cwd: Path, env: dict[str, str], processes: int = 1, timeout: float = 120
             ) -> subprocess.CompletedProcess:
    "Run the command; with several processes all of them as `torchrun` would start them, and the first one's output."
    world = [env] if processes == 1 else [
        env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(processes)}
        for port in [free_port()] for rank in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        started = [FRESH.Process(target=enter, args=(args, cwd, each, Path(folder) / str(rank)))
                   for rank, each in enumerate(world)]
        for process in started:
            process.start()
        for process in started:
            process.join(timeout)
        late = [process for process in started if process.exitcode is None]
        for process in late:
            process.kill()
        assert not late, f"speedrun {' '.join(args)} takes more than {timeout} s"
        out, err = (Path(folder, f"0.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
    return subprocess.CompletedProcess(args, max((process.exitcode for process in started), key=abs), out, err)


def enter(args: tuple[str, ...], cwd: Path, env: dict[str, str], output: Path) -> None:
    "Become the command: what the operating system and the console script do."
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    sys.argv = ["speedrun", *args]

    import torch

    from speedrun_lib.cli import command_line

    torch.set_num_threads(1)
    command_line()


def free_port() -> str:
    "A port that nobody listens on."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
