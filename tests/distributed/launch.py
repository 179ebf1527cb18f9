"""Starts worlds of real processes, and leaves none behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def environment() -> dict[str, str]:
    """This process's, with one thread each and no trace of a launcher around us."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("ACCELERATE_", "MASTER_", "WORLD_", "LOCAL_", "TORCHELASTIC_"))
        and key not in ("RANK", "GROUP_RANK")
    }
    return kept | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def play_world(
    tasks: Sequence[dict[str, Any]], folder: Path, *, processes: int = 2, timeout: float = 300
) -> None:
    """Have `accelerate launch` start the processes, and wait for them.

    Raises:
        AssertionError: with the end of their output, if they fail or do not end in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    list_file = folder / "tasks.json"
    list_file.write_text(json.dumps(list(tasks)))
    # `--cpu` would start several processes through MPI only; the multi-process launcher does it
    # by itself, and ACCELERATE_USE_CPU keeps it on the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", str(processes), "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    command += ["-m", "tests.distributed.world", str(list_file)]
    with open(folder / "output.txt", "wb") as output:
        world = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = world.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(world)
    assert code == 0, _told(folder, tasks, code)


def _end(world: subprocess.Popen[bytes]) -> None:
    """The launcher leads a session of its own: its group is our children and no others."""
    try:
        os.killpg(world.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    world.wait()


def _told(folder: Path, tasks: Sequence[dict[str, Any]], code: int | None) -> str:
    failed = [path.read_text() for t in tasks for path in Path(t["folder"]).glob("failed*.txt")]
    output = (folder / "output.txt").read_text(errors="replace")[-6000:]
    return "\n".join([f"The world ended with {code}.", *failed, output])
