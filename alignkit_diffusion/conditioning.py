"""Prompts as the UNet sees them, each encoded once per run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from alignkit.errors import DataError
from alignkit_diffusion.content import PromptEmbeddings
from alignkit_diffusion.families import Family

logger = logging.getLogger(__name__)

PROMPTS_PER_CALL = 16


class PromptTable:
    """The embeddings of all prompts of a data set, on the CPU, in the dtype of the text encoders.

    Row 0 stands for a dropped caption; prompts follow in the order of their first appearance.

    Args:
        pipe: the pipeline whose encoders are used; they are put back where they were.
        family: knows how to encode.
        prompts: with repetitions.
        device: where the encoders run.
    """

    def __init__(
        self, pipe: Any, family: Family, prompts: Iterable[str], device: torch.device
    ) -> None:
        unique = list(dict.fromkeys(prompts))
        self._row = {prompt: row for row, prompt in enumerate(unique, start=1)}
        warn_of_truncation(pipe, unique)
        with encoders_on(pipe, device), torch.no_grad(), quiet_libraries():
            parts = [family.dropped_prompt(pipe, device)]
            starts = range(0, len(unique), PROMPTS_PER_CALL)
            for start in tqdm(starts, desc="Encoding prompts", leave=False, disable=None):
                chunk = unique[start : start + PROMPTS_PER_CALL]
                parts.append(_on_cpu(family.encode_prompts(pipe, chunk, device)))
                _refuse_not_finite(parts[-1], chunk)
        parts[0] = _on_cpu(parts[0])
        pooled = [part.pooled for part in parts if part.pooled is not None]
        self._table = PromptEmbeddings(
            torch.cat([part.hidden for part in parts]), torch.cat(pooled) if pooled else None
        )

    def __len__(self) -> int:
        return len(self._row)

    def look_up(self, prompts: Sequence[str | None]) -> PromptEmbeddings:
        """One row per prompt; None is a dropped caption."""
        return self._table.select(
            [0 if prompt is None else self._row[prompt] for prompt in prompts]
        )


def _on_cpu(embeddings: PromptEmbeddings) -> PromptEmbeddings:
    pooled = embeddings.pooled
    return PromptEmbeddings(embeddings.hidden.cpu(), None if pooled is None else pooled.cpu())


def _refuse_not_finite(embeddings: PromptEmbeddings, prompts: Sequence[str]) -> None:
    finite = embeddings.hidden.isfinite().all(dim=(1, 2))
    if embeddings.pooled is not None:
        finite &= embeddings.pooled.isfinite().all(dim=1)
    if not bool(finite.all()):
        prompt = prompts[finite.tolist().index(False)]
        raise DataError(
            f"Prompt embeddings must be finite; {prompt!r} gave NaN or infinity. Look at the "
            "weights of the pipeline's text encoders, and at the precision they are in."
        )


def text_encoders(pipe: Any) -> list[nn.Module]:
    """The pipeline's text encoders."""
    found = [part for name, part in pipe.components.items() if name.startswith("text_encoder")]
    return [part for part in found if isinstance(part, nn.Module)]


@contextmanager
def encoders_on(pipe: Any, device: torch.device) -> Iterator[None]:
    """Inside, the text encoders are on `device` in evaluation mode; afterwards as they were."""
    encoders = text_encoders(pipe)
    before = [(next(encoder.parameters()).device, encoder.training) for encoder in encoders]
    try:
        for encoder in encoders:
            encoder.to(device).eval()
        yield
    finally:
        for encoder, (place, training) in zip(encoders, before, strict=True):
            encoder.to(place).train(training)


def warn_of_truncation(pipe: Any, prompts: Sequence[str]) -> None:
    """One warning for all prompts that are longer than the text encoders read."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None or not prompts:
        return
    limit = tokenizer.model_max_length
    lengths = [len(ids) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]
    longer = sum(length > limit for length in lengths)
    if longer:
        logger.warning(
            "%d of %d prompts are longer than the %d tokens that the text encoders read; their "
            "ends are cut off.",
            longer,
            len(prompts),
            limit,
        )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, diffusers and transformers log nothing: what matters is said by us, once."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    both = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in both]
    try:
        for library in both:
            library.set_verbosity(logging.CRITICAL)
        yield
    finally:
        for library, verbosity in zip(both, before, strict=True):
            library.set_verbosity(verbosity)
