"""One contestant of `bench_sdxl_dpo.py`: commands by line on stdin, answers as JSON on stdout."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import reduced_sdxl as parts
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from reduced_sdxl import QUICK, REDUCED, TOKENS, TRUE_PROPORTIONS, Shape
from sdxl_recipe import BETA, Recipe
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from alignkit import DPO, LoRA, NoiseBank, Trainer, TrainerOptions
from alignkit.batches import Batch
from alignkit.config import RunConfig
from alignkit.draws import generator
from alignkit.parts import build_objective, build_wing
from alignkit.reference_bank import BankedReference
from alignkit.runtime import Runtime
from alignkit.sources import RowSource
from alignkit_diffusion.autoencoder import Autoencoder
from alignkit_diffusion.content import ImageContent, PromptEmbeddings

PAIRS = 8
BATCH = 4
LIBRARIES = (diffusers, peft, transformers, AutoencoderKL, UNet2DConditionModel)
LAZY = (CLIPTextModel, CLIPTextModelWithProjection, StableDiffusionXLPipeline)
"""Imported before memory is looked at, by every contestant alike."""


def prepare(folder: Path, shape: Shape) -> dict[str, Any]:
    """Pictures and token ids for the recipe; latents and embeddings of them as alignkit caches."""
    drawn = torch.Generator().manual_seed(0)
    coarse = torch.rand(2 * PAIRS, 3, 16, 16, generator=drawn)
    pixels = torch.nn.functional.interpolate(coarse, shape.side, mode="bicubic").clamp(0, 1) * 2 - 1
    ids = torch.randint(2, 1000, (PAIRS, TOKENS), generator=drawn)
    ids[:, 0], ids[:, -1] = 0, 1
    vae = parts.frozen(lambda: parts.vae(shape), 1)
    encoder = Autoencoder(vae, torch.device("cpu"))
    latents = torch.cat([encoder.encode(some) for some in pixels.split(2)])
    with torch.no_grad():
        readers = [parts.frozen(lambda i=i: parts.text_encoder(shape, i), 2 + i) for i in (0, 1)]
        read = [reader(ids, output_hidden_states=True) for reader in readers]
    torch.save(
        {
            "pixels": pixels.view(PAIRS, 6, shape.side, shape.side),
            "ids": ids,
            "latents": latents,
            "hidden": torch.cat([one.hidden_states[-2] for one in read], dim=-1),
            "pooled": read[1].text_embeds,
        },
        folder / "data.pt",
    )
    return {**parts.proportions(shape), "true": TRUE_PROPORTIONS}


class CachedPairs:
    """Pairs whose latents and embeddings were made before: the `Examples` of the benchmark."""

    def __init__(self, data: dict[str, Tensor], side: int) -> None:
        self.skipped: dict[str, int] = {}
        self.data = data
        self.side = float(side)

    def __len__(self) -> int:
        return len(self.data["hidden"])

    def collate(self, indices: Sequence[int], epochs: Sequence[int]) -> Batch:
        images = [2 * i + k for i in indices for k in (0, 1)]
        rows = list(indices)
        sizes = torch.tensor([self.side, self.side, 0, 0, self.side, self.side])
        content = ImageContent(
            tuple(self.data["latents"][images]),
            sizes.repeat(len(images), 1),
            PromptEmbeddings(self.data["hidden"][rows], self.data["pooled"][rows]),
        )
        group = torch.arange(len(images)) // 2
        place = torch.arange(len(rows))
        return Batch(content, group, torch.arange(len(images)) % 2, place, torch.tensor(rows))

    def mismatched(self, indices: Sequence[int]) -> list[int]:
        return list(range(len(indices)))


def pipeline(shape: Shape) -> Any:
    """The UNet in a pipeline whose other parts are as small as they may be: none of them works."""
    from tiny_sdxl import build_tokenizer

    small = Shape(shape.side, shape.widths, shape.depths, (8,) * 4, (64, shape.hidden[1]), (1, 1))
    tokenizer = build_tokenizer()
    return StableDiffusionXLPipeline(
        parts.frozen(lambda: parts.vae(small), 1),
        parts.frozen(lambda: parts.text_encoder(small, 0), 2),
        parts.frozen(lambda: parts.text_encoder(small, 1), 3),
        tokenizer,
        tokenizer,
        parts.frozen(lambda: parts.unet(shape), 0),
        parts.scheduler(),
        add_watermarker=False,
    )


class Ours:
    """alignkit's own trainer, objective and likelihood on cached rows."""

    def __init__(self, name: str, shape: Shape, data: dict[str, Tensor]) -> None:
        options = TrainerOptions(
            max_steps=10_000,
            batch_size=BATCH,
            learning_rate=1e-5,
            precision="fp32",
            gradient_checkpointing=name == "checkpointed",
        )
        pipe = pipeline(shape)
        config = RunConfig(
            pipe,
            DPO(beta=BETA),
            data=[],
            adapter=LoRA(rank=8, targets="attention"),
            reference=NoiseBank(draws=2) if name == "bank" else "auto",
            trainer=options,
        )
        runtime = Runtime()
        self.unet = pipe.unet
        self.wing = build_wing(config, "image", runtime)
        self.objective, _ = build_objective(config, self.wing, runtime)
        rows = CachedPairs(data, shape.side)
        source = RowSource(
            rows, batch_size=BATCH, epochs=None, seed=0, processes=runtime, shuffle=False
        )
        trainer = Trainer(self.objective, source, options, runtime=runtime)
        if isinstance(self.objective.reference, BankedReference):
            self.objective.reference.fill(rows)
        self.rows = rows
        self.records: Iterator[Any] = trainer.steps()

    def step(self) -> float:
        return next(self.records).loss

    def logits(self, rows: list[int]) -> Tensor:
        batch = self.rows.collate(rows, [0] * len(rows))
        (micro,) = self.objective.micro_batches(batch, 1)
        return BETA * self.objective.scores(micro).margin


class Theirs:
    """The recipe on pictures and token ids."""

    def __init__(self, name: str, shape: Shape, data: dict[str, Tensor]) -> None:
        self.recipe = Recipe(shape, checkpointing=True)
        self.unet = self.recipe.unet
        self.shape = shape
        self.pixels, self.ids = data["pixels"], data["ids"]
        self.taken = 0

    def step(self) -> float:
        start = BATCH * self.taken % PAIRS
        self.taken += 1
        self.recipe.step(self.pixels[start : start + BATCH], self.ids[start : start + BATCH])
        return self.recipe.told["loss"]

    def logits(self, rows: list[int]) -> Tensor:
        """On the draws that alignkit makes for step 1 of seed 0."""
        size = (4, self.shape.latent, self.shape.latent)
        keys = [(0, 1, place) for place in range(len(rows))]
        timesteps = [int(generator("timestep", *key).integers(1000)) for key in keys]
        noise = [generator("noise", *key).standard_normal(size, dtype="float32") for key in keys]
        draws = torch.tensor(timesteps), torch.from_numpy(np.stack(noise))
        return self.recipe.logits(self.pixels[rows], self.ids[rows], draws)[0]


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
        data = torch.load(self.folder / "data.pt", mmap=True)
        kind = Theirs if self.name == "recipe" else Ours
        self.made = kind(self.name, self.shape, data)
        return {}

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
        """Two pairs at a time: kernels for other numbers of images round in other places."""
        perturb(self.made.unet)
        with torch.no_grad():
            found = [self.made.logits([row, row + 1]) for row in range(0, PAIRS, 2)]
        return {"logits": torch.cat(found).tolist()}

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
