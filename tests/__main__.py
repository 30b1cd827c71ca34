"""Run every test: the notebooks (assertions beside the code), then pytest.

`python -m tests` is the README's test command; further arguments go to pytest.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    "Run both halves even when the first one fails; returns the exit code."
    env = os.environ | {"OMP_NUM_THREADS": "1", "SPEEDRUN_STATIC": "1", "MPLBACKEND": "agg"}
    notebooks = subprocess.run(["nbdev_test", "--n_workers", "2", "--path", "nbs"], cwd=ROOT, env=env)
    print(f"notebooks: {'passed' if notebooks.returncode == 0 else 'FAILED'}", flush=True)
    # one worker more than cores: some tests wait for servers and for other processes
    pytest = [sys.executable, "-m", "pytest", "-n", "3", "--dist", "worksteal", *sys.argv[1:]]
    others = subprocess.run(pytest, cwd=ROOT, env=env)
    return notebooks.returncode or others.returncode


if __name__ == "__main__":
    sys.exit(main())
