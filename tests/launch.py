"""The command line in several processes, as `accelerate launch` starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launched(arguments: list[str], folder: Path, processes: int) -> subprocess.CompletedProcess[str]:
    """`diffedit ARGUMENTS` in so many processes on the CPU, in a working folder."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    launch += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "diffedit", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.run(launch, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
