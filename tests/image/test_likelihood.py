"""The denoising likelihood against a derivation of its own, and the laws of the shared draw."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignkit.batches import Batch
from alignkit.errors import ConfigError
from alignkit.options import LoRA
from alignkit_diffusion import build
from alignkit_diffusion.content import ImageContent, ImageDraw, PromptEmbeddings
from alignkit_diffusion.families import Prediction
from alignkit_diffusion.families.sdxl import SDXL
from alignkit_diffusion.likelihood import DenoisingLikelihood
from alignkit_diffusion.schedule import Schedule
from tests.image.conftest import BUILD, make_pipeline, picture


@pytest.fixture(scope="module")
def lora_wing() -> Any:
    return build(make_pipeline(), adapter=LoRA(rank=4), **BUILD)


@pytest.fixture(scope="module")
def batch(lora_wing: Any, rows: list[dict[str, Any]]) -> Batch:
    examples = lora_wing.examples(rows, None, kind="pairs", seed=0)
    return examples.collate(range(8), [0] * 8)


def total(wing: Any, batch: Batch, draw: ImageDraw | None = None) -> Tensor:
    draw = wing.backend.draw(batch, (0, 1)) if draw is None else draw
    with torch.no_grad():
        return wing.backend.module(batch, draw).total


def move(wing: Any, scale: float = 0.3) -> None:
    """Give the trained parameters some values of their own."""
    seeded = torch.Generator().manual_seed(1)
    for parameter in wing.backend.module.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=seeded)
            parameter.data += scale * noise * parameter.data.std().clamp(min=0.1)


def abar_by_hand(t: int) -> float:
    """Stable Diffusion's scaled-linear schedule: betas linear in their square roots."""
    product, low, high = 1.0, math.sqrt(0.00085), math.sqrt(0.012)
    for step in range(t + 1):
        product *= 1.0 - (low + (high - low) * step / 999) ** 2
    return product


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_equals_a_float64_derivation(prediction_type: str, rows: list[dict[str, Any]]) -> None:
    pipe = make_pipeline(prediction_type=prediction_type)
    wing = build(pipe, adapter=None, **BUILD)
    batch = wing.examples(rows[:3], None, kind="pairs", seed=0).collate([0, 1, 2], [0, 0, 0])
    draw = wing.backend.draw(batch, (5, 7))
    found = wing.backend.module(batch, draw, frozenset({"error", "timestep"}))
    unet = copy.deepcopy(pipe.unet).double()
    unet.config.dtype = torch.float64
    with torch.no_grad():
        for answer in range(6):
            group = answer // 2
            t = int(draw.timesteps[group])
            abar = abar_by_hand(t)
            clean = batch.content.latents[answer].double()
            noise = draw.noise[group].double()
            noisy = math.sqrt(abar) * clean + math.sqrt(1 - abar) * noise
            prediction = unet(
                noisy[None],
                torch.tensor(t),
                encoder_hidden_states=batch.content.prompts.hidden[group][None].double(),
                added_cond_kwargs={
                    "text_embeds": batch.content.prompts.pooled[group][None].double(),
                    "time_ids": batch.content.geometry[answer][None],
                },
            ).sample[0]
            target = noise
            if prediction_type == "v_prediction":
                target = math.sqrt(abar) * noise - math.sqrt(1 - abar) * clean
            squared = [
                (target[c, h, w] - prediction[c, h, w]).item() ** 2
                for c in range(4)
                for h in range(8)
                for w in range(8)
            ]
            error = math.fsum(squared) / len(squared)
            assert found.extras["error"][answer].item() == pytest.approx(error, rel=2e-5)
            assert found.total[answer].item() == pytest.approx(-error / 2, rel=2e-5)
            assert found.extras["timestep"][answer] == t
    assert found.total.dtype == torch.float32
    assert torch.equal(found.length, torch.ones(6))


def test_the_schedule_has_the_known_values(pipe: Any) -> None:
    schedule = SDXL.of(pipe, "it").schedule
    for t, value in [(0, 0.99915), (499, 0.2776697), (999, 0.0046601)]:
        assert schedule.alphas_cumprod[t].item() == pytest.approx(value, abs=2e-7)
        assert schedule.alphas_cumprod[t].item() == pytest.approx(abar_by_hand(t), rel=1e-5)
    assert schedule.snr(torch.tensor(0)).item() == pytest.approx(1175, rel=1e-3)
    assert schedule.snr(torch.tensor(999)).item() == pytest.approx(0.0047, abs=5e-5)


def test_v_errors_are_epsilon_errors_over_abar() -> None:
    # eps_hat = sqrt(abar) v_hat + sqrt(1 - abar) x_t, hence err_v = err_eps / abar.
    abar = torch.tensor([0.3], dtype=torch.float64)
    schedule = Schedule(abar, "v_prediction")
    clean, noise, wrong = torch.randn(3, 1, 4, 8, 8).unbind(0)
    t = torch.zeros(1, dtype=torch.int64)
    noisy, v = schedule.add_noise(clean, noise, t), schedule.target(clean, noise, t)
    v_hat = v + 0.1 * wrong
    eps_hat = math.sqrt(0.3) * v_hat + math.sqrt(0.7) * noisy
    ratio = (v_hat - v).square().mean() / (eps_hat - noise).square().mean()
    assert ratio.item() == pytest.approx(1 / 0.3, rel=1e-4)


class Fixed(nn.Module):
    """A denoiser and its family that return given numbers."""

    name = "fixed"
    num_timesteps = 1000
    timesteps = None

    def __init__(self, prediction: Tensor, target: Tensor) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.values = (prediction, target)

    def conditioning(self, *_: Any) -> dict[str, Any]:
        return {}

    def predict(self, *_: Any) -> Prediction:
        prediction, target = self.values
        return Prediction(prediction, target, torch.ones(len(target)))


def of_values(prediction: Tensor, target: Tensor) -> Tensor:
    """`total` of the given (N, C, H, W) predictions and targets."""
    num, *shape = target.shape
    batch = Batch(
        ImageContent(
            tuple(torch.zeros(num, *shape)),
            torch.zeros(num, 6),
            PromptEmbeddings(torch.zeros(num // 2, 1, 1)),
        ),
        torch.arange(num // 2).repeat_interleave(2),
        torch.tensor([0, 1] * (num // 2)),
        torch.arange(num // 2),
        torch.arange(num // 2),
    )
    fixed: Any = Fixed(prediction, target)
    module = DenoisingLikelihood(fixed, fixed, precision="fp32", gradient_checkpointing=False)
    draw = ImageDraw(torch.zeros(num // 2, dtype=torch.int64), tuple(torch.zeros(num // 2, *shape)))
    return module(batch, draw).total


@pytest.mark.parametrize(
    ("errors", "beta", "logit", "loss", "factor"),
    [
        ((0.1000, 0.1010, 0.1002, 0.1008), 5000, 1.0, 0.313262, 0.268941),
        ((0.1008, 0.1000, 0.1000, 0.1000), 2000, -0.8, 1.171101, 0.689974),
        ((0.1000, 0.1008, 0.1000, 0.1000), 2000, 0.8, 0.371101, 0.310026),
        ((0.1000, 0.1010, 0.1002, 0.1009), 5000, 0.75, 0.386871, 0.320821),
        ((0.2, 0.3, 0.2, 0.3), 5000, 0.0, 0.693147, 0.5),
    ],
)
def test_goldens(
    errors: tuple[float, ...], beta: float, logit: float, loss: float, factor: float
) -> None:
    # A constant difference of sqrt(error) between target and prediction has that mean square.
    target = torch.tensor(errors, dtype=torch.float64).sqrt().view(4, 1, 1, 1).expand(4, 4, 8, 8)
    logps = of_values(torch.zeros(4, 4, 8, 8), target.float())
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = logps.double()
    found = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    assert found.item() == pytest.approx(logit, abs=1e-3)
    assert nn.functional.softplus(-found).item() == pytest.approx(loss, abs=5e-4)
    assert torch.sigmoid(-found).item() == pytest.approx(factor, abs=5e-4)


def test_errors_are_reduced_in_float32_whatever_the_model_computes_in() -> None:
    torch.manual_seed(3)
    target = torch.randn(64, 4, 64, 64)
    prediction = (target + 0.3 * torch.randn(64, 4, 64, 64)).bfloat16()
    exact = (target.double() - prediction.double()).square().mean(dim=(1, 2, 3))
    half = (target.bfloat16() - prediction).square().mean(dim=(1, 2, 3)).double()

    def logits(errors: Tensor) -> Tensor:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected = errors.view(4, 16)
        margin = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
        return -2500 * margin

    found = logits(-2 * of_values(prediction, target).double())
    assert (found - logits(exact)).abs().max() < 1e-3
    assert (logits(half) - logits(exact)).square().mean().sqrt() > 0.3  # the check can tell


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_a_fresh_adapter_is_bitwise_its_reference(
    kind: Any, precision: str, rows: list[dict[str, Any]]
) -> None:
    options = {**BUILD, "precision": precision}
    wing = build(make_pipeline(), adapter=LoRA(rank=2, kind=kind), **options)
    batch = wing.examples(rows[:3], None, kind="pairs", seed=0).collate([0, 1, 2], [0, 0, 0])
    draw = wing.backend.draw(batch, (0, 1))
    policy = wing.backend.module(batch, draw).total.detach()
    with wing.adapters_off():
        reference = total(wing, batch, draw)
    if kind == "dora" and precision == "bf16":
        # DoRA divides by a column norm that it computes in the adapter's precision.
        assert torch.allclose(policy, reference, atol=2e-2)
    else:
        assert torch.equal(policy, reference) or kind == "dora"
        assert torch.allclose(policy, reference, atol=1e-5)
    move(wing)
    with wing.adapters_off():
        assert torch.equal(total(wing, batch, draw), reference)
    assert not torch.allclose(total(wing, batch, draw), reference, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("source", ["folder", "memory"])
def test_a_copy_of_a_full_policy_is_bitwise_its_reference(
    source: str, precision: str, pipeline_folder: Path, rows: list[dict[str, Any]]
) -> None:
    policy = str(pipeline_folder) if source == "folder" else make_pipeline()
    wing = build(policy, adapter=None, **{**BUILD, "precision": precision})
    batch = wing.examples(rows[:3], None, kind="pairs", seed=0).collate([0, 1, 2], [0, 0, 0])
    reference = copy.deepcopy(wing.backend.module)
    draw = wing.backend.draw(batch, (0, 1))
    policy = wing.backend.module(batch, draw).total.detach()
    with torch.no_grad():
        assert torch.equal(policy, reference(batch, draw).total)
    move(wing)
    with torch.no_grad():
        assert torch.equal(policy, reference(batch, draw).total)
    assert not torch.allclose(policy, total(wing, batch, draw), atol=1e-4)


def margin(policy: Tensor, reference: Tensor) -> Tensor:
    ratio = policy - reference
    return ratio[0::2] - ratio[1::2]


def test_draws_that_are_not_shared_break_the_margin(lora_wing: Any, batch: Batch) -> None:
    draw = lora_wing.backend.draw(batch, (0, 1))
    policy = total(lora_wing, batch, draw)
    assert torch.equal(margin(policy, total(lora_wing, batch, draw)), torch.zeros(8))
    other = total(lora_wing, batch, lora_wing.backend.draw(batch, (0, 2)))
    assert margin(policy, other).abs().min() > 1e-6
    # The rejected images alone on another noise: an unshared draw within the pair.
    single = dataclasses.replace(
        batch.select([0]), group=torch.tensor([0, 1]), **{n: torch.tensor([0, 1]) for n in NAMES}
    )
    prompts = batch.content.prompts.select([0, 0])
    content = dataclasses.replace(single.content, prompts=prompts)
    single = dataclasses.replace(single, content=content)
    apart = total(lora_wing, single, lora_wing.backend.draw(single, (0, 1)))
    assert apart[0].item() == pytest.approx(policy[0].item(), rel=1e-5)
    assert abs(apart[1] - policy[1]) > 1e-4


NAMES = ("position", "row_id")


def test_identical_images_of_a_pair_score_alike(lora_wing: Any, rows: list[dict[str, Any]]) -> None:
    options = dataclasses.replace(lora_wing.default_options, identical_pairs="keep")
    same = [{**row, "rejected": row["chosen"]} for row in rows[:3]]
    batch = lora_wing.examples(same, options, kind="pairs", seed=0).collate([0, 1, 2], [0] * 3)
    scores = total(lora_wing, batch)
    assert torch.allclose(scores[0::2], scores[1::2], atol=1e-6)


def test_no_split_changes_a_draw_or_a_score(lora_wing: Any, batch: Batch) -> None:
    whole = total(lora_wing, batch)
    draw = lora_wing.backend.draw(batch, (0, 1))
    for budget in (1, 2, 3, 8, "auto"):
        pieces = lora_wing.backend.split(batch, budget)
        assert sum(piece.num_groups for piece in pieces) == 8
        if isinstance(budget, int):
            assert len(pieces) == math.ceil(8 / budget)
        parts = [lora_wing.backend.draw(piece, (0, 1)) for piece in pieces]
        assert torch.equal(torch.cat([part.timesteps for part in parts]), draw.timesteps)
        noise = [tensor for part in parts for tensor in part.noise]
        assert all(torch.equal(a, b) for a, b in zip(noise, draw.noise, strict=True))
        scores = torch.cat([total(lora_wing, piece) for piece in pieces])
        assert torch.allclose(scores, whole, rtol=1e-5)


def test_draws_differ_between_positions_steps_and_seeds(lora_wing: Any, batch: Batch) -> None:
    draw = lora_wing.backend.draw
    seen = [draw(batch, key) for key in ((0, 1), (0, 2), (1, 1))]
    flat = torch.stack([noise for one in seen for noise in one.noise]).flatten(1)
    assert len(torch.unique(flat, dim=0)) == 24
    assert len({tuple(one.timesteps.tolist()) for one in seen}) == 3
    moved = dataclasses.replace(batch, position=batch.position + 8)
    assert not torch.equal(draw(moved, (0, 1)).noise[0], seen[0].noise[0])
    assert torch.equal(draw(batch, (0, 1)).noise[3], seen[0].noise[3])


def test_draws_are_uniform_in_time_and_standard_normal(lora_wing: Any, batch: Batch) -> None:
    drawn = [lora_wing.backend.draw(batch, (0, step)) for step in range(150)]
    times = torch.cat([one.timesteps for one in drawn]).double()
    assert times.min() >= 0 and times.max() <= 999
    # 1200 draws: the mean of a uniform law on 0..999 is 499.5 +- 8.3.
    assert abs(times.mean() - 499.5) < 5 * 288.7 / math.sqrt(len(times))
    noise = torch.stack([n for one in drawn for n in one.noise]).double()
    assert abs(noise.mean()) < 5 / math.sqrt(noise.numel())
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / noise.numel())


def test_mixed_latent_shapes_are_kept_apart(lora_wing: Any, batch: Batch) -> None:
    wide = tuple(
        torch.zeros(4, 8, 12) if i in (2, 3, 8, 9) else x
        for i, x in enumerate(batch.content.latents)
    )
    mixed = dataclasses.replace(batch, content=dataclasses.replace(batch.content, latents=wide))
    pieces = lora_wing.backend.split(mixed, 8)
    assert [piece.position.tolist() for piece in pieces] == [[0, 2, 3, 5, 6, 7], [1, 4]]
    assert all(total(lora_wing, piece).isfinite().all() for piece in pieces)
    with pytest.raises(AssertionError, match="one latent shape"):
        total(lora_wing, mixed)


def test_unknown_extras_are_refused(lora_wing: Any, batch: Batch) -> None:
    draw = lora_wing.backend.draw(batch, (0, 1))
    with pytest.raises(ConfigError, match=r"'errors'.*Did you mean 'error'"):
        lora_wing.backend.module(batch, draw, frozenset({"errors"}))


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_checkpointing_gives_the_plain_gradient(
    adapter: LoRA | None, rows: list[dict[str, Any]]
) -> None:
    gradients = []
    for checkpointing in (False, True):
        pipe = make_pipeline()
        wing = build(pipe, adapter=adapter, **{**BUILD, "gradient_checkpointing": checkpointing})
        if adapter is not None:
            move(wing)
        batch = wing.examples(rows[:2], None, kind="pairs", seed=0).collate([0, 1], [0, 0])
        calls: list[int] = []
        resnet = pipe.unet.mid_block.resnets[1]
        resnet.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        wing.backend.module(batch, wing.backend.draw(batch, (0, 1))).total.sum().backward()
        assert len(calls) == (2 if checkpointing else 1)
        assert not pipe.unet.is_gradient_checkpointing
        trained = [p for p in pipe.unet.parameters() if p.requires_grad]
        gradients.append([p.grad for p in trained])
        assert all(gradient is not None for gradient in gradients[-1])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)


def test_dropout_is_off(rows: list[dict[str, Any]]) -> None:
    wing = build(make_pipeline(), adapter=LoRA(rank=4, dropout=0.5), **BUILD)
    move(wing)
    batch = wing.examples(rows[:2], None, kind="pairs", seed=0).collate([0, 1], [0, 0])
    draw = wing.backend.draw(batch, (0, 1))
    wing.backend.module.train()
    assert not any(module.training for module in wing.policy.unet.modules())
    first, second = (wing.backend.module(batch, draw).total for _ in range(2))
    assert torch.equal(first, second)


def test_bfloat16_stays_near_float32(pipe: Any, rows: list[dict[str, Any]]) -> None:
    exact = build(pipe, adapter=LoRA(rank=2), **BUILD)
    batch = exact.examples(rows[:3], None, kind="pairs", seed=0).collate([0, 1, 2], [0] * 3)
    rounded = build(make_pipeline(), adapter=LoRA(rank=2), **{**BUILD, "precision": "bf16"})
    scores = total(rounded, batch)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, total(exact, batch), atol=2e-2)
    assert not torch.equal(scores, total(exact, batch))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, LoRA(rank=4, targets="all")])
def test_dpo_steps_raise_the_margin(adapter: LoRA | None) -> None:
    # Dark is better than bright. Fresh draws every step, measured on draws and pictures of their
    # own: neither a fit of one noise nor of one picture.
    wing = build(make_pipeline(), adapter=adapter, **BUILD)
    rows = [
        {
            "prompt": "a house",
            "chosen": picture(2 * i).point(lambda value: value // 4),
            "rejected": picture(2 * i + 1).point(lambda value: 255 - value // 4),
        }
        for i in range(8)
    ]
    examples = wing.examples(rows, None, kind="pairs", seed=0)
    seen, held_out = (examples.collate(part, [0] * 4) for part in (range(4), range(4, 8)))
    reference = copy.deepcopy(wing.backend.module).requires_grad_(False)
    trained = [p for p in wing.backend.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3 if adapter is None else 1e-2)

    def margins(batch: Batch, step: int) -> Tensor:
        draw = wing.backend.draw(batch, (0, step))
        with torch.no_grad():
            frozen = reference(batch, draw).total
        return margin(wing.backend.module(batch, draw).total, frozen)

    assert torch.equal(margins(seen, 1), torch.zeros(4))
    for step in range(1, 31):
        loss = nn.functional.softplus(-500 * margins(seen, step)).mean()
        if step == 1:
            assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = torch.cat([margins(held_out, 1000 + step).detach() for step in range(10)])
    assert after.mean() > 3 * after.std() / math.sqrt(len(after))
