"""The image wing's own data: what a batch holds, and the randomness of one evaluation.

Legend for shapes: N images, G groups, C/H/W latent channels, height and width, L prompt tokens, D
text features, P pooled features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """In float32 whatever came, or in float64 where that came, as in checks of exactness."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class PromptEmbeddings:
    """Encoded prompts, one row each.

    Attributes:
        hidden: (G, L, D) per-token features.
        pooled: (G, P) features of the whole prompt; None in families without them.
    """

    hidden: Tensor
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.hidden.ndim == 3, self.hidden.shape
        assert self.pooled is None or len(self.pooled) == len(self.hidden)

    def __len__(self) -> int:
        return len(self.hidden)

    def select(self, rows: Sequence[int]) -> PromptEmbeddings:
        """The given rows, in the order given."""
        index = torch.as_tensor(list(rows), dtype=torch.int64, device=self.hidden.device)
        return PromptEmbeddings(
            self.hidden[index], None if self.pooled is None else self.pooled[index]
        )


@dataclass(frozen=True)
class ImageContent:
    """`Batch.content` of the image wing, on the CPU.

    Attributes:
        latents: N tensors (C, H, W), float32, scaled as the UNet sees them. A tuple, because images
            of different shapes may share a global batch; `split` keeps them apart in micro-batches.
        geometry: (N, 6) float32 pixels, one row per *image*: original height and width, top and
            left of the crop, height and width of the crop. Float32 until the UNet embeds them,
            because bfloat16 would turn 1366 into 1368.
        prompts: the G prompts, or what stands for a dropped one.
    """

    latents: tuple[Tensor, ...]
    geometry: Tensor
    prompts: PromptEmbeddings

    def __post_init__(self) -> None:
        assert self.geometry.shape == (len(self.latents), 6), self.geometry.shape
        assert self.geometry.dtype == torch.float32, self.geometry.dtype

    def select(self, groups: Sequence[int], answers: Sequence[int]) -> ImageContent:
        """The content of the given groups, whose images have the given places among the N."""
        return ImageContent(
            latents=tuple(self.latents[answer] for answer in answers),
            geometry=self.geometry[torch.as_tensor(list(answers), dtype=torch.int64)],
            prompts=self.prompts.select(groups),
        )

    @classmethod
    def joined(cls, parts: Sequence[ImageContent]) -> ImageContent:
        """The groups of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        pooled = [part.prompts.pooled for part in parts if part.prompts.pooled is not None]
        hidden = torch.cat([part.prompts.hidden for part in parts])
        return cls(
            latents=tuple(one for part in parts for one in part.latents),
            geometry=torch.cat([part.geometry for part in parts]),
            prompts=PromptEmbeddings(hidden, torch.cat(pooled) if pooled else None),
        )

    def recombine(self, groups: Sequence[int], answers: Sequence[int]) -> ImageContent:
        """Groups of one: the prompt of `groups[i]` with the image `answers[i]`, whosever it is.

        Sizes and crop stay with the image: they are facts about it, not about its prompt.
        """
        return self.select(groups, answers)

    def scored_lengths(self) -> list[int]:
        """An image's likelihood is one number."""
        return [1] * len(self.latents)


@dataclass(frozen=True)
class ImageDraw:
    """One timestep and one noise per *group*: shared by its images, by policy and by reference.

    Attributes:
        timesteps: (G,) int64, on the CPU.
        noise: G tensors (C, H, W), float32, on the CPU.
        numbers: which of its row's draws each one is, where they come from a bank.
    """

    timesteps: Tensor
    noise: tuple[Tensor, ...]
    numbers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert len(self.timesteps) == len(self.noise), (len(self.timesteps), len(self.noise))
