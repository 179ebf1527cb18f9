"""One contestant of `bench_sdxl_dpo.py`: commands by line on stdin, answers as JSON on stdout."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import peft
import reduced_sdxl as parts
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from reduced_sdxl import QUICK, REDUCED, TOKENS, TRUE_PROPORTIONS, Shape
from sdxl_recipe import BETA, Recipe
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from alignkit import DPO, ImageOptions, LoRA, NoiseBank, TrainerOptions, build
from alignkit.caching import cache_images
from alignkit.draws import generator
from alignkit_diffusion import wing
from alignkit_diffusion.content import ImageContent, PromptEmbeddings

PAIRS = 8
BATCH = 4
PROMPTS = ("a red circle on a blue square", "a green triangle", "two circles", "a small square")
LIBRARIES = (accelerate, diffusers, peft, transformers, AutoencoderKL, UNet2DConditionModel)
LAZY = (CLIPTextModel, CLIPTextModelWithProjection, StableDiffusionXLPipeline, build, wing)
"""Imported before memory is looked at, by every contestant alike."""


def prepare(folder: Path, shape: Shape) -> dict[str, Any]:
    """The pipeline's files; pictures beside their rows, which `alignkit cache images` encodes; and
    the same pictures and token ids as tensors, for the recipe."""
    from tiny_sdxl import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TOKENS
    encoders = [
        parts.frozen(lambda i=i: parts.text_encoder(shape, i, tokenizer), 2 + i) for i in (0, 1)
    ]
    StableDiffusionXLPipeline(
        parts.frozen(lambda: parts.vae(shape), 1),
        *encoders,
        tokenizer,
        tokenizer,
        parts.frozen(lambda: parts.unet(shape), 0),
        parts.scheduler(),
        add_watermarker=False,
    ).save_pretrained(folder / "pipeline")
    drawn = torch.Generator().manual_seed(0)
    coarse = torch.rand(2 * PAIRS, 3, 16, 16, generator=drawn)
    smooth = torch.nn.functional.interpolate(coarse, shape.side, mode="bicubic").clamp(0, 1)
    shown = (255 * smooth).round().to(torch.uint8)  # (16, 3, H, W), as a PNG keeps it
    rows, data = [], folder / "data"
    data.mkdir()
    for pair in range(PAIRS):
        row = {"prompt": f"{PROMPTS[pair % len(PROMPTS)]} and a number {pair}"}
        for side, name in enumerate(("chosen", "rejected")):
            row[name] = f"{name}_{pair}.png"
            Image.fromarray(shown[2 * pair + side].permute(1, 2, 0).numpy()).save(data / row[name])
        rows.append(row)
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache_images(
        str(folder / "pipeline"),
        str(data),
        data_options=options(folder),
        trainer=TrainerOptions(precision="fp32"),
    )
    read = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = tokenizer([row["prompt"] for row in rows], max_length=TOKENS, **read).input_ids
    pixels = (shown.float() / 255 * 2 - 1).view(PAIRS, 6, shape.side, shape.side)
    torch.save({"pixels": pixels, "ids": ids}, folder / "data.pt")
    return {**parts.proportions(shape), "true": TRUE_PROPORTIONS}


def options(folder: Path) -> ImageOptions:
    """Float32, since what is compared are logits to four places; float16 is the default."""
    return ImageOptions(cache=str(folder / "cache"), cache_dtype="fp32")


class Ours:
    """alignkit's own call on a cached folder."""

    def __init__(self, name: str, folder: Path) -> None:
        self.run = build(
            str(folder / "pipeline"),
            DPO(beta=BETA),
            str(folder / "data"),
            adapter=LoRA(rank=8, targets="attention"),
            reference=NoiseBank(draws=2) if name == "bank" else "auto",
            data_options=options(folder),
            trainer=TrainerOptions(
                max_steps=10_000,
                batch_size=BATCH,
                learning_rate=1e-5,
                precision="fp32",
                gradient_checkpointing=name == "checkpointed",
                shuffle=False,
            ),
        )
        self.unet = self.run.wing.backend.module.unet
        self.rows = self.run.trainer.source.examples
        self.records: Iterator[Any] = self.run.steps()

    def step(self) -> float:
        return next(self.records).loss

    def loaded(self) -> list[str]:
        """Parts of the pipeline that are in memory beside the UNet."""
        parts = self.run.wing._loaded.parts
        return [name for name, shell in parts.shells.items() if shell.filled]

    def logits(self, rows: list[int]) -> Tensor:
        return self._logits(self.rows.collate(rows, [0] * len(rows)))

    def exact(self, rows: list[int]) -> Tensor:
        """The same in float64."""
        self.unet.double()
        batch = self.rows.collate(rows, [0] * len(rows))
        prompts = batch.content.prompts
        content = ImageContent(
            tuple(one.double() for one in batch.content.latents),
            batch.content.geometry,
            PromptEmbeddings(prompts.hidden.double(), prompts.pooled.double()),
        )
        return self._logits(replace(batch, content=content))

    def _logits(self, batch: Any) -> Tensor:
        objective = self.run.trainer.objective
        micros = objective.micro_batches(batch, 1)
        return torch.cat([BETA * objective.scores(micro).margin for micro in micros])


class Theirs:
    """The recipe on pictures and token ids."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.recipe = Recipe(folder / "pipeline", shape, checkpointing=True)
        self.unet = self.recipe.unet
        self.shape = shape
        data = torch.load(folder / "data.pt", mmap=True)
        self.pixels, self.ids = data["pixels"], data["ids"]
        self.taken = 0

    def step(self) -> float:
        start = BATCH * self.taken % PAIRS
        self.taken += 1
        self.recipe.step(self.pixels[start : start + BATCH], self.ids[start : start + BATCH])
        return self.recipe.told["loss"]

    def logits(self, rows: list[int]) -> Tensor:
        return self.recipe.logits(self.pixels[rows], self.ids[rows], self._draws(len(rows)))[0]

    def _draws(self, num: int) -> tuple[Tensor, Tensor]:
        """Those that alignkit makes for step 1 of seed 0."""
        size = (4, self.shape.latent, self.shape.latent)
        keys = [(0, 1, place) for place in range(num)]
        timesteps = [int(generator("timestep", *key).integers(1000)) for key in keys]
        noise = [generator("noise", *key).standard_normal(size, dtype="float32") for key in keys]
        return torch.tensor(timesteps), torch.from_numpy(np.stack(noise))

    def exact(self, rows: list[int]) -> Tensor:
        """The same in float64, VAE and text encoders included, a pair at a time."""
        self.recipe.double()
        timesteps, noise = self._draws(len(rows))
        found = []
        for place, row in enumerate(rows):
            draws = timesteps[place : place + 1], noise[place : place + 1].double()
            pixels = self.pixels[row : row + 1].double()
            found.append(self.recipe.logits(pixels, self.ids[row : row + 1], draws)[0])
        return torch.cat(found)


def perturb(unet: Any) -> None:
    """Give the adapter weights of its own, the same in every contestant."""
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            drawn = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=drawn)


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Contestant:
    """Answers commands.

    Args:
        name: of the arm, or "prepare".
        folder: where the data is.
        shape: sizes of the parts.
    """

    def __init__(self, name: str, folder: Path, shape: Shape) -> None:
        self.name, self.folder, self.shape = name, folder, shape
        self.imports = resident()
        self.made: Any = None

    def ask(self, command: str) -> dict[str, Any]:
        return getattr(self, command)()

    def prepare(self) -> dict[str, Any]:
        return prepare(self.folder, self.shape)

    def ready(self) -> dict[str, Any]:
        recipe = self.name == "recipe"
        self.made = Theirs(self.folder, self.shape) if recipe else Ours(self.name, self.folder)
        return {"loaded": [] if recipe else self.made.loaded()}

    def step(self) -> dict[str, Any]:
        before = time.process_time()
        loss = self.made.step()
        return {"seconds": time.process_time() - before, "loss": loss}

    def memory(self) -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"mib": peak - self.imports}

    def count(self) -> dict[str, Any]:
        with FlopCounterMode(display=False) as counter:
            self.made.step()
        return {"gflop": counter.get_total_flops() / 1e9}

    def logits(self) -> dict[str, Any]:
        """Of a perturbed adapter, on four pairs at once; and those in float64."""
        perturb(self.made.unet)
        with torch.no_grad():
            found = self.made.logits(list(range(BATCH)))
            exact = self.made.exact(list(range(BATCH)))
        return {"logits": found.tolist(), "exact": exact.tolist()}

    def end(self) -> None:
        pass


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    shape = QUICK if "--quick" in sys.argv else REDUCED
    contestant = Contestant(sys.argv[1], Path(sys.argv[2]), shape)
    for line in sys.stdin:
        print(json.dumps(contestant.ask(line.strip())), flush=True)


if __name__ == "__main__":
    main()
