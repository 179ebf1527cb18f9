"""Model families: everything that one kind of pipeline does in its own way.

Adding a family is a file with a class like `families.sdxl.SDXL` and a line in `FAMILIES`;
likelihood, data, adapters and saving know nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from alignkit.errors import ConfigError
from alignkit_diffusion.content import ImageContent, PromptEmbeddings

FAMILIES = {"StableDiffusionXLPipeline": ("alignkit_diffusion.families.sdxl", "SDXL")}
"""Pipeline class -> where its family is."""

Conditioning = Mapping[str, Any]
"""What one UNet call is conditioned on, on its device, as the family's own names."""


class Prediction(NamedTuple):
    """One forward of the denoiser.

    Attributes:
        prediction: (N, C, H, W) in the dtype the model computed in.
        target: (N, C, H, W) float32, what it should have been: noise, v, later flow velocity.
        weight: (N,) float32, a factor of each image's squared error that belongs to the family; 1
            for SDXL. The run's timestep weighting comes on top.
    """

    prediction: Tensor
    target: Tensor
    weight: Tensor


class Family(Protocol):
    """The denoiser's affairs. It holds no weights and no pipeline, and copies cheaply."""

    name: str

    @property
    def num_timesteps(self) -> int:
        """Timesteps are drawn from 0 .. num_timesteps - 1."""
        ...

    def conditioning(self, content: ImageContent, group: Tensor, device: Any) -> Conditioning:
        """What the N images are conditioned on; `group` (N,) says which prompt is an image's."""
        ...

    def predict(
        self,
        unet: nn.Module,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
    ) -> Prediction:
        """Noise clean latents (N, C, H, W) to CPU timesteps (N,), and denoise them in one call."""
        ...

    def differences(self, unet: Any, other: Family, other_unet: Any) -> list[str]:
        """What keeps a reference from being compared with a policy on the same latents and draws.

        `other` and `other_unet` are the reference's. Empty if nothing does.
        """
        ...

    def timestep_weights(self, kind: str) -> Tensor:
        """(T,) float64, what half the mean squared error counts at each timestep.

        `kind` is "uniform", "min_snr" or "elbo", of mean 1; or "nats": per latent element, see
        `schedule.Schedule.weights`.
        """
        ...

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], device: Any) -> PromptEmbeddings:
        """The pipeline's own embeddings of a few prompts, without gradient."""
        ...

    def dropped_prompt(self, pipe: Any, device: Any) -> PromptEmbeddings:
        """One row: what stands for a dropped caption, as in the family's own training."""
        ...

    def describe(self) -> dict[str, Any]: ...


def check_class(class_name: str, given: str) -> None:
    """Raise `ConfigError` unless a family serves pipelines of this class."""
    if class_name in FAMILIES:
        return
    supported = ", ".join(sorted(FAMILIES))
    hint = ""
    if class_name == "StableDiffusionXLImg2ImgPipeline":
        hint = " This is how the SDXL refiner is published, which is not a text-to-image policy."
    raise ConfigError(
        f"Image policies are pipelines of the class {supported}; {given} is a {class_name}.{hint} "
        "Use a base such as 'stabilityai/stable-diffusion-xl-base-1.0' or a fine-tune of it."
    )


def family_of(pipe: Any, given: str) -> Family:
    """The family of a loaded pipeline.

    Raises:
        ConfigError: no family serves it.
    """
    classes = [cls.__name__ for cls in type(pipe).__mro__ if cls.__name__ in FAMILIES]
    if not classes:
        check_class(type(pipe).__name__, given)
    module, name = FAMILIES[classes[0]]
    return getattr(import_module(module), name).of(pipe, given)
