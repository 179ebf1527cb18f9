"""What does the image cache cost: to fill, to read, and to open when it is as large as Pick-a-Pic?

building  images/s of a pass that decodes, encodes and writes, against the VAE alone on pixels
          that are ready in memory: many short rounds in one process, each of them both in turn and
          every other one in reverse, and the median of their ratios. On a CPU in CPU seconds of all
          threads, so that neither other work nor an idle core counts; its VAE is half as wide as
          SDXL's, so that decoding and writing weigh four times what they do in earnest
reading   pairs/s of batches from the cache at 1024 px (latents 4 x 128 x 128, prompts 77 x 2048
          and 1280, float16)
opening   seconds from an index of a million rows to the first batch, and resident memory above
          what the imports take, in a process of its own

python scripts/bench_image_cache.py [--quick] [--device cuda] [--only PART]
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from alignkit.columns import Sieve
from alignkit.options import ImageOptions
from alignkit.rows import read_rows
from alignkit_diffusion.autoencoder import Autoencoder
from alignkit_diffusion.cache.arrays import dump_arrays, load_arrays
from alignkit_diffusion.cache.keys import short_hash
from alignkit_diffusion.cache.store import Store
from alignkit_diffusion.conditioning import StoredPrompts, prompt_key
from alignkit_diffusion.data import ImageExamples
from alignkit_diffusion.images import Augmentation, Placement
from alignkit_diffusion.latents import Disk, LatentStore
from alignkit_diffusion.reading import scan
from alignkit_diffusion.table import RowTable

PROMPTS = 58_960
"""Distinct prompts of Pick-a-Pic v2."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=sorted(PARTS))
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.open is not None:
        print(json.dumps(open_index(given.open)))
        return
    for name, part in PARTS.items():
        if given.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                for line in part(Path(folder), given):
                    print(f"{name}: {line}", flush=True)


def build(folder: Path, given: Any) -> Any:
    """A full pass against the VAE alone."""
    on_gpu = given.device != "cpu"
    side, count, rounds = (1024, 32, 9) if on_gpu else (128, 16, 12)
    if given.quick:
        side, count, rounds = 64, 8, 1
    widths = (128, 256, 512, 512) if on_gpu else (64, 128, 256, 256)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        sample_size=side,
        scaling_factor=0.13025,
    )
    device = torch.device(given.device)
    autoencoder = Autoencoder(vae.eval().to(device), device)
    rows = read_rows([_row(number, side) for number in range(count // 2)])
    options = ImageOptions(resolution=side)
    batch = autoencoder.batch_size(side, side)
    pixels = torch.rand(count, 3, side, side) * 2 - 1

    def alone(_: int) -> None:
        for some in pixels.split(batch):
            autoencoder.posterior(some)

    def whole(number: int) -> None:
        disk = Disk(Store(folder / str(number)), torch.float16)
        latents = LatentStore(autoencoder, rows, None, disk=disk)
        scan(rows, "pairs", options, Sieve(rows, "error"), latents)
        disk.store.save_index()
        assert latents.encoded == count

    clock = time.perf_counter if on_gpu else time.process_time
    for warm_up in (alone, whole):
        warm_up(rounds)
    taken: dict[str, list[float]] = {"alone": [], "whole": []}
    for number in range(rounds):
        both = (alone, whole) if number % 2 else (whole, alone)
        for call in both:
            began = clock()
            call(number)
            taken[call.__name__].append(clock() - began)
    shares = [a / w for a, w in zip(taken["alone"], taken["whole"], strict=True)]
    rates = {name: count * rounds / sum(seconds) for name, seconds in taken.items()}
    yield (
        f"share {statistics.median(shares):.1%} of the VAE alone (rounds {min(shares):.1%} to "
        f"{max(shares):.1%}, all together {rates['whole'] / rates['alone']:.1%}); "
        f"{rates['whole']:.2f} images/s against {rates['alone']:.2f}; {rounds} rounds of {count} "
        f"JPEG images of {side} px, batches of {batch}, {given.device}"
    )


def _row(number: int, side: int) -> dict[str, Any]:
    def jpeg(seed: int) -> bytes:
        coarse = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
        buffer = io.BytesIO()
        image = Image.fromarray(coarse).resize((side + side // 4, side), Image.Resampling.BICUBIC)
        image.save(buffer, "JPEG", quality=92)
        return buffer.getvalue()

    return {"prompt": "a cat", "chosen": jpeg(2 * number), "rejected": jpeg(2 * number + 1)}


def read(folder: Path, given: Any) -> Any:
    """Batches of pairs in random order."""
    rows, seconds = (64, 0.5) if given.quick else (2048, 15.0)
    examples = _filled(folder, rows, rows, (4, 128, 128), (77, 2048), 1280, prompts=rows // 16)
    order = np.random.default_rng(0).permutation(rows).tolist()
    began, seen = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        some = [order[(seen + place) % rows] for place in range(16)]
        examples.collate(some, [0] * 16)
        seen += 16
    rate = seen / (time.perf_counter() - began)
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**20
    yield f"{rate:.0f} pairs/s, checksums verified; {rows} pairs, {size:.0f} MiB of shards"


def index(folder: Path, given: Any) -> Any:
    """As large as Pick-a-Pic."""
    rows = 20_000 if given.quick else 1_000_000
    began = time.perf_counter()
    prompts = min(PROMPTS, rows)
    _filled(folder, rows, rows, (4, 1, 1), (1, 4), 4, prompts=prompts)
    made = time.perf_counter() - began
    command = [sys.executable, __file__, "--open", str(folder)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    yield (
        f"{found['seconds']:.2f} s to the first batch, {found['resident']:.0f} MiB resident above "
        f"imports (peak {found['peak']:.0f}); {rows} rows, {rows} images, {prompts} prompts "
        f"(written in {made:.0f} s)"
    )


def open_index(folder: Path) -> dict[str, float]:
    """In a process of its own."""
    before, began = _resident(), time.perf_counter()
    examples = _opened(folder)
    examples.collate(range(16), [0] * 16)
    seconds, after = time.perf_counter() - began, _resident()
    return {"seconds": seconds, "resident": after - before, "peak": _peak() - before}


def _filled(
    folder: Path,
    rows: int,
    images: int,
    latent: tuple[int, ...],
    hidden: tuple[int, int],
    pooled: int,
    *,
    prompts: int,
) -> ImageExamples:
    """A cache of random numbers, as `build` leaves one."""
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 256, (images, 16), dtype=np.uint8)
    latents, texts = Store(folder / "latents"), Store(folder / "prompts")
    placement = Placement.of(1024, 1024, (1024, 1024), Augmentation()).key()
    mean = torch.randn(latent).half()
    for row in range(images):
        latents.put(short_hash(digests[row].tobytes(), placement, "mean"), {"mean": mean + row % 7})
    names = [f"prompt number {number}, of about the usual length" for number in range(prompts)]
    features, whole = torch.randn(hidden).half(), torch.randn(pooled).half()
    for prompt in [None, *names]:
        texts.put(prompt_key(prompt), {"hidden": features, "pooled": whole})
    latents.save_index()
    texts.save_index()
    pictures = rng.integers(0, images, 2 * rows)
    none = np.full(rows, np.nan, "f4")
    columns = {
        "number": np.arange(rows, dtype="i8"),
        "prompt": rng.integers(0, prompts, rows).astype("i4"),
        "images": np.full(rows, 2, "i4"),
        "desirable": np.full(rows, -1, "i1"),
        **dict.fromkeys(("weight", "target_margin", "p_chosen"), none),
        "digest": digests[pictures],
        "height": np.full(2 * rows, 1024, "i4"),
        "width": np.full(2 * rows, 1024, "i4"),
        "column": np.tile(np.array([0, 1], "i4"), rows),
        "place": np.full(2 * rows, -1, "i4"),
        "rank": np.tile(np.array([0, 1], "i4"), rows),
        "score": np.full(2 * rows, np.nan, "f4"),
    }
    table = RowTable(columns, names, ["jpg_0", "jpg_1"])
    (folder / "table").write_bytes(dump_arrays(table.dump()))
    return _opened(folder)


def _opened(folder: Path) -> ImageExamples:
    arrays = load_arrays(folder / "table")
    assert arrays is not None
    table, _ = RowTable.load(arrays)
    autoencoder: Any = None
    disk = Disk(Store(folder / "latents"), torch.float16)
    latents = LatentStore(autoencoder, None, None, disk=disk)
    nothing: Any = None
    prompts = StoredPrompts(
        nothing,
        nothing,
        torch.device("cpu"),
        store=Store(folder / "prompts"),
        dtype=torch.float16,
    )
    options = ImageOptions(resolution=1024)
    return ImageExamples(table, latents, prompts, options, seed=0, skipped={})


def _resident() -> float:
    """MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak() -> float:
    """MiB. Not getrusage, whose maximum is that of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


PARTS = {"building": build, "reading": read, "opening": index}

if __name__ == "__main__":
    main()
