"""What tests of Triton kernels share: each runs on a GPU, and on a CPU in Triton's interpreter.

Triton decides when it is imported whether it interprets; so the tests of kernels on a CPU run in a process of their
own, which a test of each file starts with `interpret`.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from speedrun_lib.symmetric import INTERPRETED

ROOT = Path(__file__).resolve().parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CHILD = pytest.mark.skipif(not INTERPRETED, reason="runs in test_kernels_in_the_interpreter")
DEVICES = pytest.mark.parametrize("device", [pytest.param("cpu", marks=CHILD), pytest.param("cuda", marks=GPU)])
ON_GPU = pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
few = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def interpret(
    file: str,  # of tests
) -> None:
    "Run every test with a device of a file in a process in which Triton interprets."
    if INTERPRETED or not HAS_TRITON:
        pytest.skip("needs Triton, compiled")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file, "-k", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout + done.stderr
