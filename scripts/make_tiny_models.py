"""Make the shipped tiny models anew: the chat LM and the SDXL pipeline, each trained from scratch.

Seeded and repeatable on one machine. The two are trained side by side, one thread each, in about 40
minutes on two cores.

    python scripts/make_tiny_models.py [--out alignkit/demo/models] [--only chat|sdxl] [--seed 0]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODELS = {"chat": "tiny_chat.py", "sdxl": "tiny_sdxl.py"}
BUDGET = 12 * 2**20
"""Bytes that the package may carry in models."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "alignkit/demo/models")
    parser.add_argument("--only", choices=sorted(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    names = [given.only] if given.only else list(MODELS)
    running = [
        subprocess.Popen(
            [sys.executable, HERE / MODELS[name], given.out / name, "--seed", str(given.seed)]
        )
        for name in names
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit("A model could not be made; see above.")
    size = sum(file.stat().st_size for file in given.out.rglob("*") if file.is_file())
    print(f"{given.out}: {size / 2**20:.1f} MiB")
    if size > BUDGET:
        sys.exit(f"The models may take {BUDGET / 2**20:.0f} MiB in all.")


if __name__ == "__main__":
    main()
