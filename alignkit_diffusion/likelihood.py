"""The image wing's log-likelihood: minus half the mean squared denoising error at a shared draw.

Wallace et al. 2023 (2311.12908), eq. 14, in the form that its authors' code gives it: the logit of
a pair is -beta/2 [(L_w - L_l) - (R_w - R_l)] with L and R the *mean* squared errors of policy and
reference. With `total` = -L/2 that is beta times the difference of log-ratios, the same formula as
for text.

    total = -1/2 weight_t L          weight 1 ("uniform"), or another of mean 1 over timesteps
    total = -T D w_t L               "nats": w_t the exact weights of the ELBO, T timesteps, D
                                     elements of a latent, so D L is the sum of squared errors

Averaged over timesteps and noise, the second is the ELBO in nats up to a constant that policy and
reference share: log-ratios mean for images what they mean for text, as losses that are no function
of beta * log_ratio alone require. For weights that hardly vary with t, a nat is 1 / (2 D sum w_t)
of the first unit. SDXL: sum w_t = 6.53; at 1024 px D = 65536, and beta 5000 of the first unit is
0.0058 in nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alignkit.batches import Batch, Likelihood
from alignkit.errors import refuse_unknown
from alignkit_diffusion.content import ImageContent, ImageDraw, widened
from alignkit_diffusion.drawing import Drawing
from alignkit_diffusion.families import Family
from alignkit_diffusion.memory import MemoryModel

EXTRAS = ("error", "timestep", "overlap")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast to bf16 or fp16, or nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[precision])


class DenoisingLikelihood(nn.Module):
    """One UNet call on all images of a micro-batch; its forward **is** the likelihood.

    Dropout is off for good, also an adapter's: `train()` keeps the module in evaluation mode,
    because policy and reference must compute the same function.

    Args:
        unet: the denoiser, shared with the pipeline.
        family: what it predicts, and of what.
        precision: "fp32", "bf16" or "fp16", the dtype that it computes in under autocast.
        gradient_checkpointing: recompute activations in backward.
        timestep_weighting: "uniform" as published, "min_snr", "elbo" or "nats"; a reference that is
            another module has the same.
    """

    def __init__(
        self,
        unet: nn.Module,
        family: Family,
        *,
        precision: str,
        gradient_checkpointing: bool,
        timestep_weighting: str = "uniform",
    ) -> None:
        super().__init__()
        self.unet = unet
        self.family = family
        self.precision = precision
        self.gradient_checkpointing = gradient_checkpointing
        self.timestep_weighting = timestep_weighting
        self._weights = (
            None if timestep_weighting == "uniform" else family.timestep_weights(timestep_weighting)
        )
        self.train(False)

    def train(self, mode: bool = True) -> DenoisingLikelihood:
        super().train(False)
        return self

    def shard_units(self) -> list[nn.Module]:
        """The repeated blocks of the UNet: what is compiled block by block."""
        repeated = getattr(self.unet, "_repeated_blocks", ())
        return [module for module in self.unet.modules() if type(module).__name__ in repeated]

    def forward(
        self, batch: Batch, draw: ImageDraw, want: frozenset[str] = frozenset()
    ) -> Likelihood:
        """Minus half the weighted mean squared error of each image.

        Args:
            batch: N images of one latent shape, in G groups.
            draw: timestep and noise of each group.
            want: of "error", the unweighted mean squared error (N,) float32; "timestep", (N,)
                int64; and "overlap" (N,) float32, detached: the mean over elements of an image's
                residual times that of the best-ranked image of its group. It is proportional to the
                product of the two errors' gradients with respect to the UNet's output, and the
                best image's own to its square, which is its "error" (SDPO).

        Raises:
            ConfigError: an extra is unknown.
        """
        for name in want:
            refuse_unknown("extra of the image likelihood", name, EXTRAS)
        content: ImageContent = batch.content
        shapes = {tuple(latents.shape) for latents in content.latents}
        assert len(shapes) == 1, f"a micro-batch has one latent shape, see split(); got {shapes}"
        assert len(draw.timesteps) == batch.num_groups, (draw.timesteps.shape, batch.num_groups)

        device = next(self.unet.parameters()).device
        latents = torch.stack(content.latents).to(device)  # (N, C, H, W)
        noise = torch.stack(draw.noise).to(device)[batch.group.to(device)]  # (N, C, H, W)
        timesteps = draw.timesteps[batch.group]  # (N,), on the CPU
        conditioning = self.family.conditioning(content, batch.group, device)
        with autocast(device, self.precision), self._checkpointing():
            found = self.family.predict(self.unet, latents, noise, timesteps, conditioning)
        # In float32 whatever the model computes in: reduced in bfloat16, a logit at beta 5000 is
        # off by about 1 (rms).
        difference = widened(found.target) - widened(found.prediction)  # (N, C, H, W)
        error = difference.square().mean(dim=(1, 2, 3))  # (N,)
        made = {
            "error": lambda: error,
            "timestep": lambda: timesteps.to(device),
            "overlap": lambda: overlap(difference, batch),
        }
        return Likelihood(
            total=-0.5 * found.weight * self._weight(timesteps, difference) * error,
            length=torch.ones_like(error),
            extras={name: made[name]() for name in want},
        )

    def _weight(self, timesteps: Tensor, difference: Tensor) -> Tensor | float:
        """The weight of each image by its timestep, (N,) float32."""
        if self._weights is None:
            return 1.0
        elements = difference[0].numel() if self.timestep_weighting == "nats" else 1
        return (elements * self._weights[timesteps]).float().to(difference.device)

    def _checkpointing(self) -> AbstractContextManager[None]:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        return checkpointing(self.unet) if recompute else nullcontext()


@torch.no_grad()
def overlap(residual: Float[Tensor, "N C H W"], batch: Batch) -> Float[Tensor, " N"]:
    """Mean over elements of an image's residual times that of the best of its group."""
    ranks = torch.where(batch.rank < 0, batch.num_answers, batch.rank).tolist()
    groups = batch.group.tolist()
    best: dict[int, int] = {}
    for answer, group in enumerate(groups):
        if ranks[answer] < ranks[best.setdefault(group, answer)]:
            best[group] = answer
    other = torch.tensor([best[group] for group in groups], device=residual.device)
    return (residual * residual[other]).mean(dim=(1, 2, 3))


@contextmanager
def checkpointing(unet: Any) -> Iterator[None]:
    """Forwards inside recompute their activations in backward, which may run outside.

    Only the blocks' forwards read the switch, and backward recomputes what is below it; so it is
    put back at once and a UNet in the caller's hands is left as it was.
    """
    switches = [m for m in unet.modules() if hasattr(m, "gradient_checkpointing")]
    before = [module.gradient_checkpointing for module in switches]
    try:
        unet.enable_gradient_checkpointing()
        yield
    finally:
        for module, flag in zip(switches, before, strict=True):
            module.gradient_checkpointing = flag


class ImageBackend(Drawing):
    """Evaluates images: the `Backend` of this wing.

    Args:
        module: the policy's likelihood module; the runtime may replace it by its wrapper.
        family: says which timesteps there are.
        memory: how many images "auto" puts into one forward.

    Attributes:
        bank: how many draws of timestep and noise each row has; None makes new ones every step.
    """

    def __init__(self, module: nn.Module, family: Family, memory: MemoryModel) -> None:
        self.module = module
        self.family = family
        self.memory = memory
        self.bank: int | None = None
        # Read now: a wrapper for several processes hides it later.
        self.error_scale = -1.0 if module.timestep_weighting == "nats" else -2.0
        self._limits: dict[int, int] = {}

    def split(self, batch: Batch, budget: int | str) -> list[Batch]:
        """Micro-batches of one latent shape, of at most `budget` groups or of what memory allows.

        Groups keep their order within a shape. "auto" counts latent elements per forward.
        """
        content: ImageContent = batch.content
        by_shape: dict[tuple[int, ...], list[int]] = {}
        answers = torch.bincount(batch.group, minlength=batch.num_groups).tolist()
        first = 0
        for group, size in enumerate(answers):
            by_shape.setdefault(tuple(content.latents[first].shape), []).append(group)
            first += size
        pieces = []
        for shape, groups in by_shape.items():
            largest = max(answers[group] for group in groups)
            elements = largest * int(torch.Size(shape).numel())
            limit = budget if isinstance(budget, int) else self._limit(elements)
            pieces += [groups[i : i + limit] for i in range(0, len(groups), limit)]
        if len(pieces) == 1:
            return [batch]
        return [batch.select(piece) for piece in pieces]

    def _limit(self, elements: int) -> int:
        # Measured once: later the optimizer's state is in the free memory's place.
        if elements not in self._limits:
            self._limits[elements] = self.memory.groups(elements)
        return self._limits[elements]


def likelihood_of(
    unet: Any,
    family: Family,
    *,
    device: torch.device,
    precision: str,
    checkpointing: bool | str,
    timestep_weighting: str,
    side: int,
) -> tuple[DenoisingLikelihood, ImageBackend]:
    """A UNet's likelihood and the backend of it.

    Args:
        checkpointing: "auto" turns it on where one pair of latents of `side` would not fit.
    """
    memory = MemoryModel.of(unet, device=device, precision=precision)
    if checkpointing == "auto":
        pair = 2 * unet.config.in_channels * side * side
        checkpointing = device.type == "cuda" and not memory.fits(pair)
    module = DenoisingLikelihood(
        unet,
        family,
        precision=precision,
        gradient_checkpointing=bool(checkpointing),
        timestep_weighting=timestep_weighting,
    )
    memory = memory.checkpointed() if checkpointing else memory
    return module, ImageBackend(module, family, memory)
