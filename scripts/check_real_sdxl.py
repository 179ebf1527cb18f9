"""The true SDXL UNet, all 2,567,463,684 parameters of it, trained for three steps on a CPU.

Weights are random and in float32, pictures are noise of 256 px, and VAE and text encoders are as
small as they may be: a training step runs none of them. What runs is `alignkit.build`, the Trainer,
checkpoints and exports as in any run. It checks

  - that the margin before the first update is exactly 0, and losses are finite;
  - that a resumed run repeats the third step to the last bit;
  - that the exported adapter has the keys and shapes of diffusers' own layout, and loads;
  - that the forward does its arithmetic at 40 % or more of the rate of a plain matrix product;
  - that all of it stays below 20 GB.

    python scripts/check_real_sdxl.py [--size full|half|tiny] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from reduced_sdxl import TOKENS, Shape, frozen, gflops, scheduler, text_encoder, unet, vae

FULL = Shape(256, (320, 640, 1280), (1, 2, 10), (8,) * 4, (768, 1280), (1, 1), 256)
SIZES = {
    "full": FULL,
    "half": replace(FULL, widths=(128, 320, 640)),
    "tiny": Shape(64, (64, 64, 64), (1, 1, 1), (8,) * 4, (64, 64), (1, 1)),
}
PARAMETERS = 2_567_463_684
LIMIT_GB = 20.0
SHARE = 0.4
KEEP_FREED = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
)
"""First touches of fresh memory would be timed otherwise."""


def pipeline(shape: Shape) -> Any:
    from diffusers import StableDiffusionXLPipeline
    from tiny_sdxl import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TOKENS
    return StableDiffusionXLPipeline(
        frozen(lambda: vae(shape), 1),
        frozen(lambda: text_encoder(shape, 0, tokenizer), 2),
        frozen(lambda: text_encoder(shape, 1, tokenizer), 3),
        tokenizer,
        tokenizer,
        frozen(lambda: unet(shape), 0),
        scheduler(),
        add_watermarker=False,
    )


def rows(side: int) -> list[dict[str, Any]]:
    import numpy as np
    from PIL import Image

    drawn = np.random.default_rng(0)

    def picture() -> Any:
        return Image.fromarray(drawn.integers(0, 256, (side, side, 3), dtype=np.uint8))

    return [
        {"prompt": f"a red circle {i}", "chosen": picture(), "rejected": picture()}
        for i in range(3)
    ]


def matmul_rate() -> float:
    """GFLOP/s of a float32 product of 2048 x 2048 matrices; the best of five."""
    one, other = torch.randn(2, 2048, 2048)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        one @ other
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds) / 1e9


def forward_rate(run: Any, shape: Shape) -> tuple[float, float]:
    """GFLOP/s and seconds of the policy's forward on one pair, without gradient."""
    with torch.device("meta"):
        bare = unet(shape)
        count = gflops(
            lambda: bare(
                torch.empty(2, 4, shape.latent, shape.latent),
                torch.zeros(2, dtype=torch.int64),
                encoder_hidden_states=torch.empty(2, TOKENS, sum(shape.hidden)),
                added_cond_kwargs={
                    "text_embeds": torch.empty(2, shape.hidden[1]),
                    "time_ids": torch.empty(2, 6),
                },
            )
        )
    backend = run.wing.backend
    batch = run.trainer.source.examples.collate([0], [0])
    draw = backend.draw(batch, (0, 1))
    seconds = []
    with torch.no_grad(), run.wing.adapters_off():
        for _ in range(3):
            started = time.perf_counter()
            backend.module(batch, draw)
            seconds.append(time.perf_counter() - started)
    return count / min(seconds), min(seconds)


def expected_layout(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Key -> shape, of the file that diffusers itself writes of such an adapter."""
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import load_file

    with torch.device("meta"):
        bare = unet(shape)
        names = ["to_q", "to_k", "to_v", "to_out.0"]
        bare.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=names))
    state = {k: torch.zeros(v.shape) for k, v in get_peft_model_state_dict(bare).items()}
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=state)
        saved = load_file(Path(folder) / "pytorch_lora_weights.safetensors")
    return {key: tuple(value.shape) for key, value in saved.items()}


def loads_back(folder: Path, shape: Shape) -> int:
    """How many layers diffusers finds the adapter of, in both of its files; -1 if they disagree."""
    from diffusers import StableDiffusionXLPipeline

    counts = set()
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"):
        with torch.device("meta"):
            bare = unet(shape)
        state, alphas = StableDiffusionXLPipeline.lora_state_dict(
            str(folder), weight_name=name, unet_config=bare.config
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is copied into weights that are not stored
            bare.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
        counts.add(sum(hasattr(module, "lora_A") for module in bare.modules()))
    return counts.pop() if len(counts) == 1 else -1


def arguments(shape: Shape, folder: Path, **more: Any) -> dict[str, Any]:
    """Of `build`: three steps of one pair, with a checkpoint after each."""
    from alignkit import DPO, GenerationOptions, ImageOptions, LoRA, TrainerOptions

    options = TrainerOptions(
        max_steps=3,
        batch_size=1,
        learning_rate=1e-5,
        precision="fp32",
        gradient_checkpointing=False,
        save_every=1,
        keep_checkpoints=3,
        log_every=1,
    )
    return {
        "method": DPO(),
        "data": rows(shape.side),
        "adapter": LoRA(rank=8, targets="attention"),
        "data_options": ImageOptions(resolution=shape.side),
        "generation": GenerationOptions(steps=1),
        "trainer": options,
        "run_dir": folder,
        **more,
    }


def check(size: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    from alignkit import build

    shape = SIZES[size]
    found: dict[str, Any] = {}
    rate = matmul_rate()
    started = time.perf_counter()
    pipe = pipeline(shape)
    found["parameters"] = sum(p.numel() for p in pipe.unet.parameters())
    found["seconds to build"] = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        run = build(pipe, **arguments(shape, folder))
        run.prompts = []  # no samples: they would be pictures of noise
        records = list(run.steps())
        found["losses"] = [record.loss for record in records]
        found["margin before the first update"] = records[0].metrics["rewards/margins"]
        found["seconds per step"] = sorted(record.seconds for record in records)[1]
        speed, seconds = forward_rate(run, shape)
        found["seconds per forward of a pair"] = seconds
        found["matmul GFLOP/s"], found["forward GFLOP/s"] = rate, speed
        found["share of the matmul rate"] = speed / rate
        model = Path(name) / "model"
        run.wing.save(model)
        layout = expected_layout(shape)
        saved = load_file(model / "pytorch_lora_weights.safetensors")
        found["keys"] = len(saved)
        found["layout is diffusers'"] = {k: tuple(v.shape) for k, v in saved.items()} == layout
        found["layers that load back"] = loads_back(model, shape)
        run.abandon()  # takes the adapter off
        again = build(
            pipe, **arguments(shape, folder, resume=str(folder / "checkpoints" / "step-000002"))
        )
        again.prompts = []
        (record,) = again.steps()
        found["loss of the third step, resumed"] = record.loss
        again.abandon()
    found["peak GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return found


def misses(found: dict[str, Any], size: str) -> list[str]:
    wrong = {
        "the first loss is ln 2": abs(found["losses"][0] - math.log(2)) < 1e-7,
        "the first margin is 0": found["margin before the first update"] == 0.0,
        "losses are finite": all(math.isfinite(loss) for loss in found["losses"]),
        "training moves": found["losses"][2] != found["losses"][0],
        "a resumed step has the same bits": found["loss of the third step, resumed"]
        == found["losses"][2],
        "the layout is diffusers'": found["layout is diffusers'"],
        "both files load back": found["layers that load back"] == found["keys"] // 2,
        f"below {LIMIT_GB:g} GB": found["peak GB"] < LIMIT_GB,
    }
    if size == "full":
        wrong["the UNet is the published one"] = found["parameters"] == PARAMETERS
        wrong["40 % of the matmul rate"] = found["share of the matmul rate"] >= SHARE
    return [name for name, held in wrong.items() if not held]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    if "GLIBC_TUNABLES" not in os.environ:
        environment = os.environ | {"GLIBC_TUNABLES": KEEP_FREED}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    torch.set_num_threads(given.threads)
    found = check(given.size)
    for name, value in found.items():
        print(f"{name}: {json.dumps(value)}")
    missed = misses(found, given.size)
    print("\n".join(f"NOT: {name}" for name in missed) or "all of it holds")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
