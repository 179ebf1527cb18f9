"""Does memory stay flat when text is streamed? Reads ROWS pairs once and prints what it took.

    python scripts/bench_streaming.py --rows 1000000

Growth is the resident set, looked at eight times in the pass, against what it was before the data
was opened; the bar is 300 MB for a million rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from alignkit.options import TextOptions
from alignkit.stream import open_stream
from alignkit.stream_source import StreamSource
from alignkit.text.data import Reader
from alignkit.text.streamed import TextStream
from tests.builders import TEXT, tiny_tokenizer

WORDS = " ".join(TEXT).split()


def write(path: Path, rows: int) -> None:
    """Pairs of about 300 bytes, all different."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            words = [WORDS[(i * 7 + place * 13 + i // 31) % len(WORDS)] for place in range(30)]
            row = {
                "prompt": f"{i} " + " ".join(words[:12]),
                "chosen": " " + " ".join(words[12:20]),
                "rejected": " " + " ".join(words[20:]),
            }
            file.write(json.dumps(row) + "\n")


def resident() -> float:
    """MB now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=64)
    rows, batch = (vars(parser.parse_args())[name] for name in ("rows", "batch"))
    tokenizer, options = tiny_tokenizer(), TextOptions(streaming=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        write(path, rows)
        before, started = resident(), time.perf_counter()
        stream = open_stream(path)
        reader = partial(Reader, stream, tokenizer, options, "pairs")
        examples: Any = TextStream(stream, reader, lambda prepared: None)
        alone: Any = SimpleNamespace(rank=0, size=1)
        source = StreamSource(
            {"": examples}, batch_size=batch, buffer=options.shuffle_buffer, seed=0, processes=alone
        )
        seen, marks = 0, {}
        for step, _ in enumerate(source, start=1):
            seen += batch
            if step % max(1, rows // batch // 8) == 0:
                marks[seen] = round(resident() - before, 1)
            if seen + batch > rows:
                break
        seconds = time.perf_counter() - started
        size = path.stat().st_size
    found = {
        "rows": seen,
        "file_mb": round(size / 1e6, 1),
        "growth_mb_after_rows": marks,
        "most_growth_mb": max(marks.values()),
        "rows_per_second": round(seen / seconds),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
