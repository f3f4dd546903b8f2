"""A small version of benchmarks/faults.py: of every kind of fault a few, each to be survived."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "faults.py"


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_a_few_faults_of_every_kind_are_survived(tmp_path):
    figures = tmp_path / "faults.json"
    command = [sys.executable, str(SCRIPT), "--part", "0.005", "--work", str(tmp_path / "work"), "--figures", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    kinds = json.loads(figures.read_text())["kinds"]
    assert list(kinds) == ["images", "checkpoints", "artifacts", "folders", "commands", "kills", "disk"]
    assert all(one["tried"] == one["survived"] == sum(one["how"].values()) > 1 for one in kinds.values())
