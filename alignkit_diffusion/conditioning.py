"""Prompts as the UNet sees them, each encoded once: in memory, or in a store on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from alignkit.errors import DataError
from alignkit_diffusion.cache.keys import short_hash
from alignkit_diffusion.cache.shard import Damaged, Entry
from alignkit_diffusion.cache.store import Store
from alignkit_diffusion.content import PromptEmbeddings
from alignkit_diffusion.families import Family
from alignkit_diffusion.parts import Parts

logger = logging.getLogger(__name__)

PROMPTS_PER_CALL = 16


class Prompts(Protocol):
    """Where the embeddings of a data set's prompts are."""

    def look_up(self, prompts: Sequence[str | None]) -> PromptEmbeddings:
        """One row per prompt; None is a dropped caption."""
        ...


class PromptTable:
    """The embeddings of all prompts of a data set in memory, in the dtype of the text encoders.

    Row 0 stands for a dropped caption; prompts follow in the order of their first appearance.

    Args:
        parts: whose pipeline's encoders are used; they are put back where they were.
        family: knows how to encode.
        prompts: with repetitions.
        device: where the encoders run.
    """

    def __init__(
        self, parts: Parts, family: Family, prompts: Iterable[str], device: torch.device
    ) -> None:
        unique = list(dict.fromkeys(prompts))
        self._row = {prompt: row for row, prompt in enumerate(unique, start=1)}
        found = [part for _, part in encode(parts, family, [None, *unique], device)]
        pooled = [part.pooled for part in found if part.pooled is not None]
        self._table = PromptEmbeddings(
            torch.cat([part.hidden for part in found]), torch.cat(pooled) if pooled else None
        )

    def __len__(self) -> int:
        return len(self._row)

    def look_up(self, prompts: Sequence[str | None]) -> PromptEmbeddings:
        """One row per prompt; None is a dropped caption."""
        return self._table.select(
            [0 if prompt is None else self._row[prompt] for prompt in prompts]
        )


class StoredPrompts:
    """Embeddings in a store on disk; what it lacks is encoded into it.

    Args:
        parts, family, device: as of `PromptTable`.
        store: of these text encoders, tokenizers and this dtype.
        dtype: that they are kept in.
    """

    def __init__(
        self,
        parts: Parts,
        family: Family,
        device: torch.device,
        *,
        store: Store,
        dtype: torch.dtype,
    ) -> None:
        self.store = store
        self._parts = parts
        self._family = family
        self._device = device
        self._dtype = dtype

    def ensure(self, prompts: Iterable[str | None]) -> None:
        """Encode those that are not there."""
        lacking = [p for p in dict.fromkeys(prompts) if prompt_key(p) not in self.store]
        for some, embeddings in encode(self._parts, self._family, lacking, self._device):
            kept = {"hidden": embeddings.hidden.to(self._dtype)}
            if embeddings.pooled is not None:
                kept["pooled"] = embeddings.pooled.to(self._dtype)
            _refuse_not_finite(PromptEmbeddings(kept["hidden"], kept.get("pooled")), some)
            for row, prompt in enumerate(some):
                self.store.put(prompt_key(prompt), {name: t[row] for name, t in kept.items()})
        self.store.flush()

    def look_up(self, prompts: Sequence[str | None]) -> PromptEmbeddings:
        """One row per prompt; None is a dropped caption."""
        found = [self._get(prompt) for prompt in prompts]
        hidden = torch.stack([entry["hidden"] for entry in found])
        pooled = [entry["pooled"] for entry in found if "pooled" in entry]
        return PromptEmbeddings(hidden, torch.stack(pooled) if pooled else None)

    def _get(self, prompt: str | None) -> Entry:
        for _ in range(2):
            try:
                entry = self.store.get(prompt_key(prompt))
            except Damaged as damaged:
                lost = self.store.mend(damaged.shard)
                logger.warning("%s. %d embeddings are encoded again when needed.", damaged, lost)
                entry = None
            if entry is not None:
                return entry
            self.ensure([prompt])
        raise DataError(
            f"The embedding of {prompt!r} in {self.store.folder} is damaged, and so is what was "
            "written in its place. Look at the disk, or give another folder (data_options.cache)."
        )


def prompt_key(prompt: str | None) -> bytes:
    """Under which an embedding is kept; None is a dropped caption."""
    return short_hash("dropped") if prompt is None else short_hash("prompt", prompt)


Encoded = tuple[Sequence[str | None], PromptEmbeddings]


def encode(
    parts: Parts, family: Family, prompts: Sequence[str | None], device: torch.device
) -> Iterator[Encoded]:
    """Embeddings on the CPU, a few prompts at a time; None is a dropped caption.

    Raises:
        DataError: an embedding is not finite.
    """
    if not prompts:
        return
    parts.fill_encoders()
    pipe = parts.pipe
    written = [prompt for prompt in prompts if prompt is not None]
    warn_of_truncation(pipe, written)
    with encoders_on(pipe, device), torch.no_grad(), quiet_libraries():
        if None in prompts:
            yield [None], _on_cpu(family.dropped_prompt(pipe, device))
        starts = range(0, len(written), PROMPTS_PER_CALL)
        for start in tqdm(starts, desc="Encoding prompts", leave=False, disable=None):
            chunk = written[start : start + PROMPTS_PER_CALL]
            found = _on_cpu(family.encode_prompts(pipe, chunk, device))
            _refuse_not_finite(found, chunk)
            yield chunk, found


def _on_cpu(embeddings: PromptEmbeddings) -> PromptEmbeddings:
    pooled = embeddings.pooled
    return PromptEmbeddings(embeddings.hidden.cpu(), None if pooled is None else pooled.cpu())


def _refuse_not_finite(embeddings: PromptEmbeddings, prompts: Sequence[str | None]) -> None:
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
