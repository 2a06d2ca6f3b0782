"""Kernels as Inductor writes them for GPUs: their results, and the instructions that Triton makes of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.7", reason="Triton is not here (pip install 'triton>=3.7,<3.8')")


def said(how, tmp_path):
    """What the script prints, in a process of its own: what it changes in torch and Triton is for good."""
    script = Path(__file__).with_name("triton_on_cpu.py")
    places = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = subprocess.run([sys.executable, script, how], env={**os.environ, **places}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_kernels_for_gpus_compute_what_plain_torch_does(tmp_path):
    lines = said("interpret", tmp_path)
    assert len(lines) == 3
    assert all("are the CPU's bit for bit" in line for line in lines)


@pytest.mark.slow
def test_nothing_is_fused_or_divided_inexactly(tmp_path):
    (line,) = said("compile", tmp_path)
    count, _, rest = line.partition(" ")
    assert int(count) > 20
    assert rest == "kernels; not as on a CPU: []"
