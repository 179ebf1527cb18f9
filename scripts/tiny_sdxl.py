"""Train the tiny SDXL pipeline on the picture world and write it as a diffusers folder.

Every part of a StableDiffusionXLPipeline is there at a small size: two CLIP text encoders and
their tokenizers, a VAE that halves the side three times, a UNet with SDXL's text and time
conditioning, and SDXL's noise schedule.  The VAE is trained first; the text encoders and the
UNet are then trained together on its cached latents with the epsilon loss.

    python scripts/tiny_sdxl.py OUT
"""

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from alignkit.demo.scene_world import draw_caption, draw_scene, render

SIDE = 64
TOKENS = 32
VAE_STEPS = 6000
VAE_BATCH = 8
UNET_STEPS = 5000
UNET_BATCH = 64
SCENES = 32_000
CAPTION_DROPOUT = 0.1
KL_WEIGHT = 1e-4
SHAPE_WEIGHT = 6.0
START, END = "<|startoftext|>", "<|endoftext|>"


# --- the untrained parts -----------------------------------------------------------------------


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer whose merges make every word of the world one token."""
    rng = np.random.default_rng(0)
    words = sorted({w for _ in range(5000) for w in re.findall("[a-z]+", draw_caption(rng).text)})
    letters = [chr(code) for code in _byte_letters()]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        left = word[0]
        for letter in [*word[1:-1], f"{word[-1]}</w>"] if len(word) > 1 else []:
            if (left, letter) not in merges:
                merges.append((left, letter))
                tokens.append(left + letter)
            left += letter
    vocabulary = {token: index for index, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def _byte_letters() -> list[int]:
    """The code points by which byte-level BPE writes the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return shown + [256 + index for index in range(256 - len(shown))]


def build_pipeline() -> StableDiffusionXLPipeline:
    """The whole pipeline with fresh weights."""
    tokenizer = build_tokenizer()
    text = CLIPTextModel(_text_config(tokenizer, width=32))
    text_2 = CLIPTextModelWithProjection(_text_config(tokenizer, width=48))
    for name, weight in [*text.named_parameters(), *text_2.named_parameters()]:
        # SDXL reads hidden states before any norm: CLIP's own 0.02 would hardly reach the UNet.
        if name.endswith("embedding.weight"):
            nn.init.normal_(weight, std=0.5)
    width_2 = text_2.config.projection_dim
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 3),
        norm_num_groups=16,
        cross_attention_dim=text.config.hidden_size + text_2.config.hidden_size,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + width_2,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        force_upcast=False,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    return StableDiffusionXLPipeline(
        vae, text, text_2, tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    )


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    # SDXL reads the last layer but one, so three layers are two that matter to cross-attention.
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=width // 16,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


# --- training ----------------------------------------------------------------------------------


def draw_pictures(n: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """Captions and their pictures as bytes of shape (n, 3, side, side)."""
    captions, pictures = [], np.empty((n, SIDE, SIDE, 3), dtype=np.uint8)
    for index in range(n):
        prompt = draw_caption(rng)
        captions.append(prompt.text)
        pictures[index] = np.asarray(
            render(draw_scene(prompt, rng), SIDE, int(rng.integers(2**31)))
        )
    return captions, torch.from_numpy(pictures).permute(0, 3, 1, 2)


def scaled(pictures: Tensor) -> Tensor:
    """Bytes to the [-1, 1] that the VAE sees."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train_vae(vae: AutoencoderKL, rng: np.random.Generator, steps: int) -> None:
    """Absolute plus squared error and a little KL, on freshly drawn pictures."""
    vae.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = _warm_cosine(optimizer, steps)
    for step in range(steps):
        pictures = scaled(draw_pictures(VAE_BATCH, rng)[1])
        posterior = vae.encode(pictures).latent_dist
        error = vae.decode(posterior.sample()).sample - pictures
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        # The shapes cover little of a picture; without a weight their colours are learnt last.
        chroma = pictures.amax(1, keepdim=True) - pictures.amin(1, keepdim=True)
        weight = 1 + SHAPE_WEIGHT * (chroma > 0.4)
        distance = (weight * (error.abs() + error.square())).mean()
        loss = distance + KL_WEIGHT * divergence
        _descend(loss, optimizer, schedule, vae)
        _report("vae", step, steps, loss=loss, error=error.abs().mean(), kl=divergence)
    vae.eval()


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Balance the VAE's channels and set the scaling factor that gives unit deviation."""
    means = encode(vae, pictures)
    _balance(vae, means.mean((0, 2, 3)), means.std((0, 2, 3)))
    vae.register_to_config(scaling_factor=float(1 / encode(vae, pictures).std()))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The posterior means, unscaled."""
    batches = [vae.encode(scaled(batch)).latent_dist.mean for batch in pictures.split(256)]
    return torch.cat(batches).contiguous()


def _balance(vae: AutoencoderKL, mean: Tensor, deviation: Tensor) -> None:
    """Give all latent channels mean 0 and one deviation, without changing any reconstruction.

    The epsilon loss weighs channels alike, whereas the VAE leaves some five times as wide as
    others.  The change is exact: it is folded into the 1x1 convolutions around the latents.
    """
    narrow, wide = vae.quant_conv, vae.post_quant_conv
    factor = deviation.square().mean().sqrt() / deviation
    channels = len(factor)
    narrow.weight[:channels] *= factor.view(-1, 1, 1, 1)
    narrow.bias[:channels] = (narrow.bias[:channels] - mean) * factor
    narrow.bias[channels:] += 2 * factor.log()
    wide.bias += wide.weight[:, :, 0, 0] @ mean
    wide.weight /= factor.view(1, -1, 1, 1)


def tokenize(pipe: StableDiffusionXLPipeline, captions: list[str]) -> Tensor:
    """Token ids, padded as the pipeline pads."""
    return pipe.tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def embed(pipe: StableDiffusionXLPipeline, ids: Tensor) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning: both encoders' last hidden states but one, and the pooled second."""
    first = pipe.text_encoder(ids, output_hidden_states=True)
    second = pipe.text_encoder_2(ids, output_hidden_states=True)
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return hidden, second.text_embeds


def denoising_loss(pipe: StableDiffusionXLPipeline, latents: Tensor, ids: Tensor) -> Tensor:
    """The epsilon loss; dropped captions are zeros, as SDXL embeds the empty prompt."""
    n = len(latents)
    hidden, pooled = embed(pipe, ids)
    kept = (torch.rand(n) >= CAPTION_DROPOUT).float()
    time_ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32).expand(n, -1)
    noise = torch.randn_like(latents)
    steps = torch.randint(pipe.scheduler.config.num_train_timesteps, (n,))
    level = pipe.scheduler.alphas_cumprod[steps].view(n, 1, 1, 1)
    guess = pipe.unet(
        level.sqrt() * latents + (1 - level).sqrt() * noise,
        steps,
        hidden * kept.view(n, 1, 1),
        added_cond_kwargs={"text_embeds": pooled * kept.view(n, 1), "time_ids": time_ids},
    ).sample
    return functional.mse_loss(guess, noise)


def train_denoiser(
    pipe: StableDiffusionXLPipeline, latents: Tensor, ids: Tensor, steps: int
) -> None:
    """Train UNet and text encoders together and leave the average of their weights in place."""
    modules = nn.ModuleList([pipe.unet, pipe.text_encoder, pipe.text_encoder_2]).train()
    # A foreach average over parameters is far cheaper than a copy of the modules.
    weights = [p for p in modules.parameters() if p.requires_grad]
    average = [w.detach().clone() for w in weights]
    optimizer = torch.optim.AdamW(weights, lr=1.5e-3, weight_decay=1e-3, betas=(0.9, 0.99))
    schedule = _warm_cosine(optimizer, steps)
    for step, rows in zip(range(steps), _batches(len(latents)), strict=False):
        loss = denoising_loss(pipe, latents[rows], ids[rows])
        _descend(loss, optimizer, schedule, modules)
        decay = min(0.998, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [w.detach() for w in weights], 1 - decay)
        _report("unet", step, steps, loss=loss)
    with torch.no_grad():
        for weight, mean in zip(weights, average, strict=True):
            weight.copy_(mean)
    modules.eval()


def _warm_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    def factor(step: int) -> float:
        return min((step + 1) / 150, 0.5 * (1 + math.cos(math.pi * step / steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _batches(n: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(n)[: n - n % UNET_BATCH].split(UNET_BATCH)


def _descend(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    module: nn.Module,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    schedule.step()


_sums: dict[str, float] = {}


def _report(stage: str, step: int, steps: int, **values: Tensor) -> None:
    """Print the means of the last 250 steps."""
    for name, value in values.items():
        _sums[name] = _sums.get(name, 0.0) + value.item() / 250
    if (step + 1) % 250 == 0 or step + 1 == steps:
        shown = "  ".join(f"{name} {_sums.pop(name):.4f}" for name in values)
        print(f"{stage} {step + 1}/{steps}  {shown}  ({time.process_time():.0f} s)", flush=True)


# --- the folder --------------------------------------------------------------------------------


def make(
    out_dir: Path,
    seed: int = 0,
    vae_steps: int = VAE_STEPS,
    unet_steps: int = UNET_STEPS,
    scenes: int = SCENES,
) -> None:
    """Train the pipeline and write it to ``out_dir``."""
    torch.manual_seed(seed)
    pipe = build_pipeline()
    train_vae(pipe.vae, np.random.default_rng([seed, 0]), vae_steps)
    torch.manual_seed(seed)
    captions, pictures = draw_pictures(scenes, np.random.default_rng([seed, 1]))
    normalise_latents(pipe.vae, pictures)
    latents = encode(pipe.vae, pictures) * pipe.vae.config.scaling_factor
    train_denoiser(pipe, latents, tokenize(pipe, captions), unet_steps)
    save(pipe, out_dir)


def save(pipe: StableDiffusionXLPipeline, out_dir: Path) -> None:
    """Write half-precision weights which load in full precision by default."""
    pipe.to(dtype=torch.float16).save_pretrained(out_dir)
    for encoder in ("text_encoder", "text_encoder_2"):
        path = out_dir / encoder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
