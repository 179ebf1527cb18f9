"""From a data set to a cache that holds all that training on it reads.

The data set is cut into blocks that processes share (see `job`). Of a block, images are decoded in
threads ahead of the VAE, and only what the stores lack is encoded. The usable rows of all blocks
are joined to one table; a later run reads that table and opens neither data nor VAE nor text
encoders. It makes sure that the data is as it was and that no shard is gone; what is gone, and
nothing else, is encoded again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignkit.columns import Sieve
from alignkit.options import ImageOptions
from alignkit.places import cache_folder
from alignkit.records import to_json
from alignkit.rows import Rows
from alignkit_diffusion.autoencoder import Autoencoder
from alignkit_diffusion.cache.facts import (
    join_stamps,
    latent_facts,
    prompt_facts,
    stamps_of,
    unchanged,
)
from alignkit_diffusion.cache.job import Job
from alignkit_diffusion.cache.keys import DTYPES, identity_of, space_of, stamp
from alignkit_diffusion.cache.store import Store
from alignkit_diffusion.cache.writing import write
from alignkit_diffusion.conditioning import StoredPrompts
from alignkit_diffusion.families import Family
from alignkit_diffusion.geometry import Geometry
from alignkit_diffusion.latents import AUGMENTED_BYTES, Disk, LatentStore
from alignkit_diffusion.parts import Parts
from alignkit_diffusion.reading import missing, scan
from alignkit_diffusion.rows import ImageRow, open_rows, score_table
from alignkit_diffusion.table import RowTable

log = logging.getLogger("alignkit")

BLOCK = 256
"""Rows of a block."""

_READING = ("ties", "identical_pairs", "min_margin", "on_bad_row", "latents", "flip", "crop")
_SHAPES = ("resolution", "buckets", "bucket_step")


@dataclass
class Cached:
    """A data set whose latents and embeddings are on disk.

    Attributes:
        table: its usable rows.
        skipped: reason -> rows that are left out.
        latents, prompts: where the encoded things are.
    """

    table: RowTable
    skipped: dict[str, int]
    latents: LatentStore
    prompts: StoredPrompts


class Builder:
    """Fills a cache with a data set, or finds that it is there.

    Args:
        data, options, kind: as of `data.prepare_examples`.
        parts: lend the VAE and text encoders, if something has to be encoded.
        family, autoencoder, device: of the pipeline.
    """

    def __init__(
        self,
        data: Any,
        options: ImageOptions,
        *,
        kind: str,
        parts: Parts,
        family: Family,
        autoencoder: Autoencoder,
        device: torch.device,
    ) -> None:
        assert options.cache is not None
        self.data, self.kind = data, kind
        self.options = replace(options, part="all")
        self.root = cache_folder("images", None if options.cache == "auto" else options.cache)
        dtype = DTYPES[options.cache_dtype]
        memo = self.root / "hashes.json"
        spaces = {
            "latents": latent_facts(parts, options.cache_dtype, memo),
            "prompts": prompt_facts(parts, family, options.cache_dtype, memo),
        }
        self.spaces = {name: f"{name}-{space_of(facts)}" for name, facts in spaces.items()}
        self.stores = {name: Store(self.root / self.spaces[name]) for name in spaces}
        for name, facts in spaces.items():
            self._tell(self.root / self.spaces[name], facts)
        spread = options.latents == "sample"
        # Random crops never recur, so that a disk would fill and be of no use.
        fixed = Geometry(options).fixed is not None
        disk = Disk(self.stores["latents"], dtype) if fixed else None
        limit = None if fixed else AUGMENTED_BYTES
        self.latents = LatentStore(autoencoder, None, limit, spread=spread, disk=disk)
        self.prompts = StoredPrompts(
            parts, family, device, store=self.stores["prompts"], dtype=dtype
        )
        self._autoencoder = autoencoder
        self._rows: Rows | None = None

    @property
    def rows(self) -> Rows:
        """The data, opened when it is needed."""
        if self._rows is None:
            self._rows = open_rows(self.data, self.options, self.kind)
            self.latents.rows = self._rows
        return self._rows

    def run(self) -> Cached:
        """The data set, with all that it needs on disk.

        Raises:
            DataError: a row cannot be used and the options say "error"; or the disk refuses.
        """
        identity = identity_of(self.data)
        if identity is None:
            table, skipped = self._alone()
        else:
            job = Job(self.root / "jobs" / space_of(self._job_facts(identity)))
            self._tell(job.folder, self._job_facts(identity))
            table, skipped = self._shared(job)
        self._autoencoder.release()
        if self._rows is None:
            # Opened only if an image has to be encoded after all.
            self.latents.rows = _Late(self)
        return Cached(table, skipped, self.latents, self.prompts)

    def _alone(self) -> tuple[RowTable, dict[str, int]]:
        """Data that cannot be told from others: nothing is kept but latents and embeddings."""
        sieve = Sieve(self.rows, self.options.on_bad_row)
        found = self._encode(sieve, None)
        for store in self.stores.values():
            store.save_index()
        return RowTable.of(found), dict(sieve.skipped)

    def _shared(self, job: Job) -> tuple[RowTable, dict[str, int]]:
        while True:
            found = job.result()
            if found is None:
                self._build(job)
                continue
            table, facts = RowTable.load(found)
            if not unchanged(found):
                log.warning("%s: image files have changed; they are read again.", self.root)
                job.forget()
                continue
            if self._has(facts["shards"]) or self._mend(job, table, facts, found):
                return table, facts["skipped"]

    def _build(self, job: Job) -> None:
        """Do blocks until all are done, and join them."""
        rows, scores = self.rows, score_table(self.rows, self.kind, self.options)
        blocks = -(-len(rows) // BLOCK)
        for block in job.work(blocks):
            for store in self.stores.values():
                store.refresh()
            sieve = Sieve(rows, self.options.on_bad_row)
            indices = range(block * BLOCK, min((block + 1) * BLOCK, len(rows)))
            found = self._encode(sieve, indices, scores)
            table = RowTable.of(found)
            job.done(block, table.dump(skipped=dict(sieve.skipped)) | stamps_of(found))
        with job.joining():
            if job.result() is not None:
                return
            parts = [job.part(block) for block in range(blocks)]
            if any(part is None for part in parts):
                return  # taken away while it was read; the loop around does it again
            self._join(job, [part for part in parts if part is not None])

    def _join(self, job: Job, parts: list[Mapping[str, np.ndarray]]) -> None:
        loaded = [RowTable.load(part) for part in parts]
        skipped: Counter[str] = Counter()
        for _, facts in loaded:
            skipped.update(facts["skipped"])
        for store in self.stores.values():
            store.save_index()
        table = RowTable.joined([table for table, _ in loaded])
        told = table.dump(skipped=dict(skipped), shards=self._shards())
        job.finish(told | join_stamps(parts))

    def _encode(self, sieve: Sieve, indices: Any, scores: Any = None) -> list[ImageRow]:
        """Rows, with their images and prompts encoded and on disk."""
        found = scan(
            *(self.rows, self.kind, self.options, sieve, self.latents),
            indices=indices,
            scores=scores,
        )
        self.stores["latents"].flush()
        self.prompts.ensure([None, *(row.prompt for row in found)])
        return found

    def _mend(
        self, job: Job, table: RowTable, facts: dict[str, Any], found: Mapping[str, np.ndarray]
    ) -> bool:
        """Encode what is gone; False if the data is not what the table says."""
        with job.mending():
            for store in self.stores.values():
                store.refresh()
            lost = missing(table, self.options, self.latents)
            if lost:
                log.warning(
                    "%s: %d of %d rows have images that the cache lost; they are encoded again.",
                    self.root,
                    len(lost),
                    len(table),
                )
                sieve = Sieve(self.rows, self.options.on_bad_row)
                self._encode(sieve, lost)
                if missing(table, self.options, self.latents):
                    job.forget()
                    return False
            self.prompts.ensure([None, *table.prompts])
            for store in self.stores.values():
                store.save_index()
            told = table.dump(skipped=facts["skipped"], shards=self._shards())
            job.finish(told | {name: found[name] for name in ("stamps", "stamp_numbers")})
        return True

    def verify(self) -> int:
        """Check every entry against its checksum; damaged ones are given up, and counted."""
        return sum(store.verify() for store in self.stores.values())

    def _shards(self) -> dict[str, dict[str, int]]:
        return {name: store.shards for name, store in self.stores.items()}

    def _has(self, shards: Mapping[str, Mapping[str, int]]) -> bool:
        there = self._shards()
        return all(shards[name].items() <= there[name].items() for name in there)

    def _job_facts(self, identity: list[Any]) -> dict[str, Any]:
        options = {name: getattr(self.options, name) for name in (*_READING, *_SHAPES)}
        labels = self.options.labels
        scores = None
        if labels is not None:
            files = sorted(Path(labels.folder).expanduser().glob("*"))
            told = {name: str(value) for name, value in asdict(labels).items()}
            scores = [told, [stamp(file) for file in files]]
        columns = sorted(self.options.columns.items())
        what = {"data": identity, "kind": self.kind, "columns": columns, "scores": scores}
        return {**what, **options, **self.spaces}

    def _tell(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """What a folder of hashed names is about, for people."""
        path = folder / "about.json"
        if not path.exists():
            write(path, to_json(dict(facts), "about.json", indent=1) + "\n")


class _Late(Rows):
    """The data of a builder, opened when a row of it is asked for."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder.rows, name)

    def __getitem__(self, index: Any) -> Any:
        return self._builder.rows[index]

    def __len__(self) -> int:
        return len(self._builder.rows)
