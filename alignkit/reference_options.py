"""The references that are options of their own; the named ones are plain strings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from alignkit.errors import ConfigError
from alignkit.ranges import positive, share


@dataclass(frozen=True)
class AdapterReference:
    """The reference is the base model with another adapter of the policy on.

    Attributes:
        name: of an adapter that the policy carries beside the trained one: of a PeftModel or
            pipeline in hand, or a sub-folder of an adapter folder, as peft saves them.
    """

    kind: ClassVar[str] = "adapter"
    name: str


@dataclass(frozen=True)
class EMAReference:
    """A moving average of the policy: reference <- decay reference + (1 - decay) policy.

    Attributes:
        decay: in [0, 1).
        every: optimizer steps between two updates.
    """

    kind: ClassVar[str] = "ema"
    decay: float
    every: int = 1

    def __post_init__(self) -> None:
        share("reference", decay=self.decay)
        positive("reference", every=self.every)
        if self.decay == 1:
            raise ConfigError(
                "reference.decay must be below 1; with 1 the reference never moves, which is "
                'reference="frozen".'
            )


@dataclass(frozen=True)
class SyncedReference:
    """TR-DPO (2404.09656): every `every` steps reference <- (1 - mix) reference + mix policy.

    Attributes:
        every: optimizer steps between two updates.
        mix: share of the policy, in (0, 1]; 1 is the hard update, the paper's soft one is 0.6.
    """

    kind: ClassVar[str] = "synced"
    every: int
    mix: float = 1.0

    def __post_init__(self) -> None:
        positive("reference", every=self.every, mix=self.mix)
        share("reference", mix=self.mix)


@dataclass(frozen=True)
class PrecomputedReference:
    """Reference log-likelihoods from a table, so that no reference model is evaluated. Text only.

    Attributes:
        table: row number in the data -> one value per answer (chosen, then rejected); or a data
            file with the columns `row` and `logps`, as `precompute_reference` writes it.
    """

    kind: ClassVar[str] = "precomputed"
    table: Any

    def __post_init__(self) -> None:
        if not isinstance(self.table, (str, Path, Mapping)):
            raise ConfigError(
                "reference.table is a mapping from row numbers to values, or a file; got "
                f"{type(self.table).__name__}."
            )


@dataclass(frozen=True)
class CachedReference:
    """A reference whose log-likelihoods are kept on disk and shared by all runs. Text only.

    A number is found again by the token ids (where the answer begins, which tokens count), the
    bytes of the reference's weights and the dtype of its arithmetic, and by nothing else: learning
    rate, beta, loss, batches and paths play no part.

    Attributes:
        of: the reference, as without a cache: "auto", "frozen", "adapter_off", an
            `AdapterReference`, or another model.
        folder: where the numbers are; None is the user's cache folder (`ALIGNKIT_CACHE`).
        ahead: compute what is missing in one pass before training, and hold no reference while
            training. False: compute it when it is first needed, with the policy's own
            micro-batches, so that equal weights give equal bits; the reference stays in memory.
    """

    kind: ClassVar[str] = "cached"
    of: Any = "auto"
    folder: str | Path | None = None
    ahead: bool = True

    def __post_init__(self) -> None:
        moving = (EMAReference, SyncedReference)
        if isinstance(self.of, (*moving, PrecomputedReference, CachedReference, NoiseBank)):
            why = "moves with the policy" if isinstance(self.of, moving) else "has its numbers"
            raise ConfigError(
                f"reference.of={self.of!r} cannot be cached: it {why}. Give it as the reference "
                "itself."
            )
        if self.of is None or self.of == "none":
            raise ConfigError(
                f"reference.of is the reference whose numbers are kept; got {self.of!r}. Write "
                'CachedReference(), or reference="none".'
            )


@dataclass(frozen=True)
class NoiseBank:
    """A reference evaluated once, before training, on a fixed bank of draws. Images only.

    Every row has `draws` pairs of timestep and noise, of which a step takes one; a step then runs
    the policy alone. Filling the bank costs `draws` reference forwards of every row, so it pays
    from that many epochs on; and it shows a row at no more than `draws` timesteps, where each step
    without a bank makes new ones. What that costs in quality nobody has published.

    Attributes:
        draws: per row.
        of: the reference, as without a bank: "auto", "frozen", "adapter_off", an
            `AdapterReference`, or another model.
    """

    kind: ClassVar[str] = "noise_bank"
    draws: int = 4
    of: Any = "auto"

    def __post_init__(self) -> None:
        positive("reference", draws=self.draws)
        others = (EMAReference, SyncedReference, PrecomputedReference, CachedReference, NoiseBank)
        if isinstance(self.of, others) or self.of in (None, "none"):
            raise ConfigError(
                "reference.of is what a noise bank is filled from, a reference that stands still; "
                f"got {self.of!r}. Write NoiseBank(draws={self.draws}), or give {self.of!r} as the "
                "reference itself."
            )


ReferenceOption = (
    AdapterReference
    | EMAReference
    | SyncedReference
    | PrecomputedReference
    | CachedReference
    | NoiseBank
)

REFERENCE_KINDS: Mapping[str, type[ReferenceOption]] = MappingProxyType(
    {
        cls.kind: cls
        for cls in (
            AdapterReference,
            EMAReference,
            SyncedReference,
            PrecomputedReference,
            CachedReference,
            NoiseBank,
        )
    }
)
"""`kind` in YAML -> option class of a reference."""
