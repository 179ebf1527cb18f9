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

FAMILIES = {
    "StableDiffusionXLPipeline": ("alignkit_diffusion.families.sdxl", "SDXL"),
    "StableDiffusionPipeline": ("alignkit_diffusion.families.sd15", "SD15"),
}
"""Pipeline class -> where its family is."""

Conditioning = Mapping[str, Any]
"""What one UNet call is conditioned on, on its device, as the family's own names."""


class Prediction(NamedTuple):
    """One forward of the denoiser.

    Attributes:
        prediction: (N, C, H, W) in the dtype the model computed in.
        target: (N, C, H, W) float32, what it should have been: noise, v, later flow velocity.
        weight: (N,) float32, a factor of each image's squared error that belongs to the family; 1
            for the families here. The run's timestep weighting comes on top.
    """

    prediction: Tensor
    target: Tensor
    weight: Tensor


class Family(Protocol):
    """The denoiser's affairs. It holds no weights and no pipeline, and copies cheaply."""

    name: str

    @property
    def num_timesteps(self) -> int:
        """Timesteps are 0 .. num_timesteps - 1."""
        ...

    @property
    def timesteps(self) -> tuple[int, ...] | None:
        """Those that training draws from; None is all."""
        ...

    @property
    def pipeline_class(self) -> Any:
        """The diffusers pipeline, whose class methods read and write adapter files."""
        ...

    def restricted(self, timesteps: str | Sequence[int]) -> Family:
        """The same family, trained at a few timesteps alone; see `schedule.Schedule.restricted`."""
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

    def embed(self, pipe: Any, prompts: Sequence[str], device: Any) -> dict[str, Tensor]:
        """Float32 embeddings of prompts and of their empty counterparts, as a sampler's call names
        them.
        """
        ...

    def sampler(self, pipe: Any) -> Any:
        """A pipeline that makes latents from `embed`'s result with `pipe`'s UNet, and moves nothing
        of `pipe`.
        """
        ...

    def describe(self) -> dict[str, Any]: ...


HINTS = {
    "StableDiffusionXLImg2ImgPipeline": (
        "This is how the SDXL refiner is published. It goes on where the base stops, and makes no "
        "picture from a prompt, so that it has no preferences to learn; as an opponent, hand base "
        "and refiner to alignkit_diffusion.BaseAndRefiner."
    ),
    **dict.fromkeys(
        ("StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "LuminaPipeline"),
        "It is a flow model, whose velocities on continuous times no family here predicts yet: "
        "write one, a class with the members of alignkit_diffusion.families.Family and a line in "
        "FAMILIES.",
    ),
}
"""Pipeline class -> why it is no policy, and what to do."""


def check_class(class_name: str, given: str) -> None:
    """Raise `ConfigError` unless a family serves pipelines of this class."""
    if class_name in FAMILIES:
        return
    supported = " or ".join(sorted(FAMILIES))
    hint = HINTS.get(class_name, "")
    raise ConfigError(
        f"Image policies are pipelines of the class {supported}; {given} is a {class_name}. "
        f"{hint}{' ' * bool(hint)}Use a base such as 'stabilityai/stable-diffusion-xl-base-1.0' or "
        "a fine-tune of it."
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
