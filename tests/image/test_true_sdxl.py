"""The published UNet of SDXL, without its weights: on torch's meta device nothing is stored.

The expected counts are public: 2.57 billion parameters; kohya's scripts say "create LoRA for U-Net:
722 modules". FLOPs were counted on the published UNet alone: 6.76 TFLOP per image and forward.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit.adapters import adapters_off
from alignkit.batches import Batch
from alignkit.losses import PREFERENCE_LOSSES
from alignkit.objectives.criterion import Criterion
from alignkit.objectives.preference import PreferenceObjective
from alignkit.options import LoRA
from alignkit.reference import FrozenModel, SwitchedAdapter
from alignkit.reference_bank import BankedReference
from alignkit_diffusion import lora
from alignkit_diffusion.content import ImageContent, ImageDraw, PromptEmbeddings
from alignkit_diffusion.families.sdxl import SDXL, TIME_IDS
from alignkit_diffusion.kohya import original_name
from alignkit_diffusion.likelihood import DenoisingLikelihood, ImageBackend
from alignkit_diffusion.memory import MemoryModel
from alignkit_diffusion.policy import factor_of, native_size
from alignkit_diffusion.schedule import read_schedule
from tests.image.conftest import make_pipeline

META = torch.device("meta")


def true_unet() -> Any:
    """stabilityai/stable-diffusion-xl-base-1.0, unet/config.json."""
    from diffusers import UNet2DConditionModel

    with META:
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


@pytest.fixture(scope="module")
def unet() -> Any:
    return true_unet()


def trained(unet: Any) -> float:
    return sum(p.numel() for p in unet.parameters() if p.requires_grad) / 1e6


def adapted(**adapter: Any) -> Any:
    unet = true_unet()
    with META:
        lora.add_adapter(unet, LoRA(**adapter), seed=0)
    lora.train_only_adapter(unet)
    return unet


def test_the_unet_is_the_published_one(unet: Any) -> None:
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    pooled = 1280
    assert unet.add_embedding.linear_1.in_features == pooled + TIME_IDS * 256
    pipe = SimpleNamespace(unet=unet)
    assert native_size(pipe, 8) == (1024, 1024) and factor_of(pipe, 8) == 32


@pytest.mark.parametrize(
    ("adapter", "millions"),
    [
        ({"rank": 8, "targets": "attention"}, 11.6),
        ({"rank": 64, "targets": "attention+ff"}, 167.4),
    ],
)
def test_adapters_have_the_known_sizes(adapter: dict[str, Any], millions: float) -> None:
    assert trained(adapted(**adapter)) == pytest.approx(millions, abs=0.05)


def test_names_for_kohya_are_those_of_the_first_release(unet: Any) -> None:
    layers = lora.resolve_targets(
        unet, [*lora.PRESETS["attention+ff"], "proj_in", "proj_out"]
    )  # what kohya's scripts adapt
    assert len(layers) == 722
    names = {original_name(layer, unet) for layer in layers}
    assert len(names) == 722
    blocks = {".".join(name.split(".")[:3]).removesuffix(".transformer_blocks") for name in names}
    assert blocks - {n for n in blocks if n.startswith("middle")} == {
        *(f"input_blocks.{i}.1" for i in (4, 5, 7, 8)),
        *(f"output_blocks.{i}.1" for i in range(6)),
    }
    for diffusers, first in {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.4.1."
        "transformer_blocks.0.attn1.to_q",
        "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
        "up_blocks.0.attentions.2.transformer_blocks.9.ff.net.2": "output_blocks.2.1."
        "transformer_blocks.9.ff.net.2",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.2.resnets.2.time_emb_proj": "output_blocks.8.0.emb_layers.1",
    }.items():
        assert original_name(diffusers, unet) == first


def flops(call: Any, unet: Any, **context: Any) -> float:
    """Of a forward of the bare UNet on two images, and of its backward where it is asked for."""
    from torch.utils.flop_counter import FlopCounterMode

    two = {
        "sample": torch.empty(2, 4, 128, 128, device=META),
        "timestep": torch.zeros(2, device=META),
        "encoder_hidden_states": torch.empty(2, 77, 2048, device=META),
        "added_cond_kwargs": {
            "text_embeds": torch.empty(2, 1280, device=META),
            "time_ids": torch.empty(2, 6, device=META),
        },
    }
    with FlopCounterMode(display=False) as counter:
        call(unet(**two).sample)
    return counter.get_total_flops()


def floor_of(policy: Any, base: Any, *, checkpointing: bool) -> float:
    """Policy forward and backward on two images, reference forward on two; with checkpointing one
    forward of the policy more. Counted on diffusers' UNets alone."""
    both = flops(lambda made: made.square().mean().backward(), policy)
    with torch.no_grad():
        again = flops(lambda _: None, policy)
        reference = flops(lambda _: None, base)
    return both + reference + (again if checkpointing else 0)


class OneStep:
    """A training step of one pair at 1024 px through the objective, on the meta device."""

    def __init__(self, adapter: LoRA | None, *, checkpointing: bool) -> None:
        from diffusers import EulerDiscreteScheduler

        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        family = SDXL(read_schedule(EulerDiscreteScheduler(**betas)))
        self.unet = true_unet() if adapter is None else adapted(**adapter.__dict__)
        memory = MemoryModel(1.0, 0, torch.device("cpu"))

        def module(unet: Any, recompute: bool) -> DenoisingLikelihood:
            return DenoisingLikelihood(
                unet, family, precision="fp32", gradient_checkpointing=recompute
            )

        backend = ImageBackend(module(self.unet, checkpointing), family, memory)
        reference: Any = SwitchedAdapter(backend, lambda: adapters_off(self.unet))
        if adapter is None:
            reference = FrozenModel(module(true_unet(), False))
        objective = PreferenceObjective(
            backend, reference, Criterion.of(PREFERENCE_LOSSES["sigmoid"], beta=5000.0), budget=1
        )
        latents = tuple(torch.empty(4, 128, 128, device=META) for _ in range(2))
        geometry = torch.tensor([[1024.0, 1366, 0, 171, 1024, 1024], [896, 896, 0, 0, 1024, 1024]])
        prompts = PromptEmbeddings(
            torch.empty(1, 77, 2048, device=META), torch.empty(1, 1280, device=META)
        )
        one = torch.tensor([0])
        content = ImageContent(latents, geometry, prompts)
        batch = Batch(content, torch.tensor([0, 0]), torch.tensor([0, 1]), one, one)
        draw = backend.draw(batch, (0, 1))
        noise = tuple(noise.to(META) for noise in draw.noise)
        on_meta = ImageDraw(draw.timesteps, noise, (0,))
        backend.draw = lambda *_: on_meta  # type: ignore[method-assign]
        (self.micro,) = objective.micro_batches(batch, 1)
        self.objective = objective

    def flops(self) -> float:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            loss, _ = self.objective(self.micro)
            loss.backward()
        return counter.get_total_flops()

    def take_from_a_bank(self) -> None:
        """Let a table hold what the reference says of the row's draws."""
        given = {"draws": 4, "seed": 0, "budget": 1, "rows": 1, "keep": False}
        objective = self.objective
        bank = BankedReference(objective.reference, objective.backend, **given)
        bank.table = {0: torch.zeros(4, 2)}
        objective.reference = bank


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "plain", "recomputed", "banked"),
    [
        (LoRA(rank=8, targets="attention"), 41.8, 52.0, (28.3, 38.5)),
        (LoRA(rank=64), 43.8, 56.5, None),
        (None, 54.0, 64.4, None),
    ],
    ids=["lora8", "lora64", "whole"],
)
def test_a_step_costs_what_it_must(
    adapter: LoRA | None,
    plain: float,
    recomputed: float,
    banked: tuple[float, float] | None,
    unet: Any,
) -> None:
    """At most 1.05 of what the UNet alone must do, which leaves no room for a second UNet, a VAE or
    a reference on more than two images; docs/recipe-sdxl.md has the table. With a noise bank there
    is no reference at all."""
    for checkpointing, expected in ((False, plain), (True, recomputed)):
        step = OneStep(adapter, checkpointing=checkpointing)
        found = step.flops()
        assert found <= 1.05 * floor_of(step.unet, unet, checkpointing=checkpointing)
        assert found / 1e12 == pytest.approx(expected, abs=0.1)
        if banked is not None:
            step.take_from_a_bank()
            assert step.flops() / 1e12 == pytest.approx(banked[checkpointing], abs=0.1)


def test_text_encoders_and_vae_rest_in_a_step(rows: list[dict[str, Any]]) -> None:
    from alignkit import DPO, TrainerOptions, build

    pipe = make_pipeline()
    options = TrainerOptions(max_steps=2, batch_size=4, learning_rate=1e-3)
    run = build(pipe, DPO(), rows, adapter=LoRA(rank=2), trainer=options)
    called: list[str] = []
    for name in ("vae", "text_encoder", "text_encoder_2"):
        for part in getattr(pipe, name).modules():
            part.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    list(run.steps())
    assert called == []
    assert calls == [8, 8] * 2  # the reference's and the policy's four pairs, twice
