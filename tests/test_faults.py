"""A small version of benchmarks/faults.py: of every kind of fault one, to be survived."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "faults.py"


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_a_fault_of_every_kind_is_survived(tmp_path):
    figures = tmp_path / "faults.json"
    few = ["--part", "0.005", "--most", "1"]
    command = [sys.executable, str(SCRIPT), *few, "--work", str(tmp_path / "work"), "--figures", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    kinds = json.loads(figures.read_text())["kinds"]
    assert list(kinds) == ["images", "checkpoints", "artifacts", "folders", "commands", "kills", "disk"]
    assert all(one["tried"] == one["survived"] == sum(one["how"].values()) > 0 for one in kinds.values())
