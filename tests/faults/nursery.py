"""A process that has imported everything and forks runs on request: a kill then costs no imports.

    python -m tests.faults.nursery LOG

Each line on stdin is the JSON of a run's arguments. It answers with the child's pid at once and,
when asked to reap it, with its exit status. Nothing is computed before the fork.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Nursery:
    """The parent's side.

    Args:
        log: gets what the children print.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self.pid: int | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery", str(log)],
            cwd=ROOT,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._answer() == "ready\n"

    def start(self, **arguments: Any) -> int:
        """Fork a run; its pid."""
        assert self.process.stdin is not None and self.pid is None
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.pid = int(self._answer())
        return self.pid

    def kill(self) -> bool:
        """SIGKILL the run; whether it was still alive."""
        assert self.pid is not None
        os.kill(self.pid, signal.SIGKILL)  # unreaped until `wait`, so the pid is nobody else's
        return self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """The run's exit status, negative for a signal."""
        assert self.pid is not None and self.process.stdin is not None
        self.process.stdin.write("reap\n")
        status = int(self._answer())
        self.pid = None
        return status

    def done(self) -> bool:
        """Whether the run has ended by itself."""
        with open(f"/proc/{self.pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the nursery died:\n{self.told()}"
        return line

    def told(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        if self.pid is not None:
            self.kill()
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def main() -> None:
    import diffusers  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    import alignkit.text.wing  # noqa: F401
    import alignkit_diffusion.wing  # noqa: F401
    from tests.faults.runs import do_run

    torch.set_num_threads(1)
    print("ready", flush=True)
    while line := sys.stdin.readline():
        arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_child(do_run, arguments))
        print(pid, flush=True)
        if sys.stdin.readline() != "reap\n":
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _child(run: Any, arguments: dict[str, Any]) -> int:
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        run(**arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


if __name__ == "__main__":
    main()
