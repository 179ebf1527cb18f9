"""The image wing's entry: `build` loads a pipeline and hands over its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from alignkit.adapters import active_adapters, adapter_on, adapters_off
from alignkit.columns import check_kind
from alignkit.mixtures import first_set
from alignkit.options import GenerationOptions, ImageOptions, LoRA
from alignkit.protocols import Wing
from alignkit_diffusion import lora
from alignkit_diffusion.autoencoder import Autoencoder
from alignkit_diffusion.data import ImageExamples
from alignkit_diffusion.editing import Editing
from alignkit_diffusion.generation import sample_images
from alignkit_diffusion.geometry import checked
from alignkit_diffusion.kernels import Folding
from alignkit_diffusion.likelihood import likelihood_of
from alignkit_diffusion.mixed import MixedImages, prepared
from alignkit_diffusion.policy import (
    Policy,
    factor_of,
    load_policy,
    native_size,
    refuse_incomparable,
)
from alignkit_diffusion.reading import distinct_prompts
from alignkit_diffusion.rows import open_rows

NATS = "nats: the ELBO, estimated at one shared timestep and noise"
UNIT = "half the mean squared denoising error per latent element, at a shared timestep and noise"


def build(
    policy: Any,
    *,
    adapter: LoRA | None,
    device: Any,
    precision: str,
    gradient_checkpointing: bool | str,
    seed: int,
    timestep_weighting: str = "uniform",
    timesteps: str | Sequence[int] | None = None,
    channels_last: bool | str = "auto",
    beside: Wing | None = None,
) -> ImageWing:
    """Load a Stable Diffusion pipeline and make its UNet, or an adapter on it, trainable.

    Args:
        policy: a diffusers folder, a hub name, or a `DiffusionPipeline` in memory, whose UNet is
            trained in place. One that carries an adapter goes on with it if `adapter` is None.
        adapter: a fresh or continued LoRA on the UNet; None trains the whole UNet in float32.
        device: where the UNet is trained.
        precision: "fp32", "bf16" or "fp16": what frozen weights are loaded in and the UNet computes
            in.
        gradient_checkpointing: "auto" turns it on where one pair at the native size would not fit.
        seed: of the adapter's start.
        timestep_weighting: how the errors of an image weigh over timesteps, the method's option of
            the same name: "uniform", "min_snr", "elbo", or "nats", which changes the unit of
            `Likelihood.total` to the ELBO in nats (see `likelihood`).
        timesteps: those that training draws from, the method's option of the same name: "turbo", or
            a list; None is all.
        channels_last: the trainer's option of the same name; "auto" is on GPUs.
        beside: the policy's wing, if this pipeline is its reference, whose weighting and
            timesteps it takes.

    Raises:
        ConfigError: the pipeline, the adapter's targets or folder, the precision or the weighting
            cannot be used.
    """
    device = torch.device(device)
    if adapter is not None:
        state = "continued" if adapter.continue_from else "fresh"
    else:
        carried = lora.adapter_name(getattr(policy, "unet", None))
        state = "none" if carried is None else "continued"
    whole = state == "none" if beside is None else beside.adapter == "none"
    if beside is not None:
        assert isinstance(beside, ImageWing)
        channels_last, timesteps = beside.channels_last, beside.timesteps
        timestep_weighting = beside.timestep_weighting
    loaded = load_policy(
        policy, precision=precision, whole=whole, device=device, channels_last=channels_last
    )
    unet = loaded.pipe.unet
    try:
        if timesteps is not None:
            loaded = replace(loaded, family=loaded.family.restricted(timesteps))
        if adapter is not None:
            lora.give_adapter(unet, adapter, seed=seed, loader=loaded.family.pipeline_class)
    except BaseException:
        loaded.give_back()
        raise
    if beside is not None:
        refuse_incomparable(loaded, cast(ImageWing, beside)._pipe, beside.family)
        unet.requires_grad_(False)
    elif whole:
        unet.requires_grad_(True)
    else:
        lora.train_only_adapter(unet)
    return ImageWing(
        loaded,
        adapter=state,
        device=device,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        timestep_weighting=timestep_weighting,
        timesteps=timesteps,
        added=adapter is not None,
    )


class ImageWing(Editing):
    """The parts of an image run: the `Wing` of this package.

    Attributes:
        backend: evaluates images.
        adapter: "none", "fresh" or "continued".
        default_options: `ImageOptions` at the size that the UNet was trained for.
    """

    modality = "image"
    tokenizer = None
    chat = False

    def __init__(
        self,
        loaded: Policy,
        *,
        adapter: str,
        device: torch.device,
        precision: str,
        gradient_checkpointing: bool | str,
        timestep_weighting: str,
        timesteps: str | Sequence[int] | None = None,
        added: bool = False,
    ) -> None:
        self._pipe = loaded.pipe
        self._loaded = loaded
        self._added = added
        self.adapter = adapter
        self.device = device
        self.precision = precision
        self.timestep_weighting = timestep_weighting
        self.timesteps = timesteps
        self.channels_last = loaded.channels_last
        self.family = loaded.family
        self._autoencoder = Autoencoder(loaded.parts.vae, device, loaded.parts.fill_vae)
        factor = self._autoencoder.factor
        self._unit = factor_of(loaded.pipe, factor)
        side = min(native_size(loaded.pipe, factor))
        self.default_options = ImageOptions(resolution=side)
        self._resolution: int | None = side
        self._folding = Folding(loaded.pipe.unet)
        self._module, self.backend = likelihood_of(
            loaded.pipe.unet,
            loaded.family,
            device=device,
            precision=precision,
            checkpointing=gradient_checkpointing,
            timestep_weighting=timestep_weighting,
            side=side // factor,
        )

    @property
    def policy(self) -> Any:
        """The pipeline, whole; training may not have needed its VAE and text encoders."""
        return self._loaded.whole()

    def adapters_off(self) -> AbstractContextManager[None]:
        """A context in which the UNet computes without its adapter; for no-grad forwards."""
        return adapters_off(self._pipe.unet)

    def adapter_on(self, name: str) -> AbstractContextManager[None]:
        """A context in which the UNet computes with another adapter; for no-grad forwards."""
        return adapter_on(self._pipe.unet, name)

    def trained_adapters(self) -> list[str]:
        """The adapter that is trained, if there is one."""
        return active_adapters(self._pipe.unet)

    def examples(
        self, data: Any, options: ImageOptions | None, *, kind: str, seed: int
    ) -> ImageExamples | MixedImages:
        """Read, check and encode image rows; see `data.prepare_examples`.

        Args:
            data: a file, folder, hub name, dataset, list of rows (see `layouts`) or a mixture.
            options: None takes the wing's default.
            kind: "pairs", "groups", "unpaired" or "supervised".
            seed: of augmentation.

        Raises:
            ConfigError: `kind` or the resolution is impossible.
            DataError: the data is missing, or a row is bad and the options do not say "skip".
        """
        check_kind(kind)
        options = self._checked(options)
        self._resolution = options.resolution
        return prepared(
            data,
            options,
            kind=kind,
            parts=self._loaded.parts,
            family=self.family,
            autoencoder=self._autoencoder,
            device=self.device,
            seed=seed,
        )

    def prompts(self, data: Any, options: ImageOptions | None, limit: int) -> list[str]:
        """The first `limit` distinct prompts of the data; of a mixture, of its first set."""
        options = self._checked(options)
        return distinct_prompts(open_rows(first_set(data), options), options, limit)

    def sample(self, prompts: Sequence[str], options: GenerationOptions, *, seed: int) -> list[Any]:
        """One PIL image per prompt, keyed by (seed, its place); see `generation.sample_images`."""
        self._loaded.parts.fill_encoders()
        return sample_images(
            self._pipe,
            self.family,
            self._autoencoder,
            prompts,
            options,
            seed=seed,
            device=self.device,
            precision=self.precision,
        )

    def prompt_text(self, prompt: str) -> str:
        """A prompt as a person reads it."""
        return prompt

    def engage(self) -> None:
        """The UNet as it was while training."""
        self._loaded.take_again()
        self._folding.begin()

    def release(self) -> None:
        """Give a pipeline in hand back as it came, apart from its UNet's weights."""
        self._folding.end()
        self._loaded.give_back()

    def undo(self) -> None:
        """After a failure: release, and take off the adapter that `build` added."""
        if self._added:
            lora.remove_adapter(self._pipe.unet)
            self._added = False
        self.release()

    def describe(self) -> dict[str, Any]:
        """Facts for the report; counts are of parameters, of the UNet alone."""
        parameters = list(self._pipe.unet.parameters())
        return {
            "class": type(self._pipe).__name__,
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "precision": self.precision,
            "adapter": self.adapter,
            "gradient_checkpointing": self._module.gradient_checkpointing,
            "resolution": self._resolution,
            "log_ratio_unit": NATS if self.timestep_weighting == "nats" else UNIT,
            "timestep_weighting": self.timestep_weighting,
            **self.family.describe(),
        }

    def save(
        self,
        folder: Path,
        *,
        base: str | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write the adapter (diffusers' layout, kohya's beside it), or the whole pipeline folder.

        Args:
            folder: made if it is not there.
            base: the name that the adapter's metadata names as its base.
            weights: None; an image policy is never sharded.
        """
        assert weights is None, "an image policy is never sharded"
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = lora.adapter_name(self._pipe.unet)
        if name is None:
            self.policy.save_pretrained(folder, safe_serialization=True)
        else:
            loader = self.family.pipeline_class
            lora.save_adapter(self._pipe.unet, folder, name, base, loader=loader)

    def _checked(self, options: ImageOptions | None) -> ImageOptions:
        options = self.default_options if options is None else options
        return checked(options, self.default_options.resolution or 0, self._unit)
