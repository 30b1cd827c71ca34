"""Run every test: the notebooks (assertions beside the code), then pytest.

`python -m tests` is the README's test command; further arguments go to pytest.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def registers_operators(page: Path) -> bool:
    "Such a page takes the operators from the package, and needs a process of its own."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return any(line.startswith("@torch.library.custom_op") for cell in cells for line in cell["source"])


def main() -> int:
    "Run both halves even when the first one fails; returns the exit code."
    env = os.environ | {"OMP_NUM_THREADS": "1", "SPEEDRUN_STATIC": "1", "MPLBACKEND": "agg"}
    alone = [path.stem for path in sorted((ROOT / "nbs").glob("*.ipynb")) if registers_operators(path)]
    commands = [["--path", f"nbs/{name}.ipynb"] for name in alone]
    commands.append(["--n_workers", "2", "--path", "nbs", "--skip_file_re", f"^([_.]|{'|'.join(alone)})"])

    def test(command: list[str]) -> int:
        return subprocess.run(["nbdev_test", *command], cwd=ROOT, env=env).returncode

    with ThreadPoolExecutor(2) as pool:
        notebooks = max([*pool.map(test, commands[:-1]), test(commands[-1])])
    print(f"notebooks: {'FAILED' if notebooks else 'passed'}", flush=True)
    # one worker more than cores: some tests wait for servers and for other processes
    pytest = [sys.executable, "-m", "pytest", "-n", "3", "--dist", "worksteal", *sys.argv[1:]]
    others = subprocess.run(pytest, cwd=ROOT, env=env)
    return notebooks or others.returncode


if __name__ == "__main__":
    sys.exit(main())
