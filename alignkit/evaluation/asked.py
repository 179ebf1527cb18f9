"""What an evaluation is asked for, and what of it does not go together."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from alignkit.capabilities import Samples
from alignkit.config import to_plain
from alignkit.errors import ConfigError
from alignkit.evaluation.prompt_files import read_prompts
from alignkit.options import GenerationOptions, ImageOptions, TextOptions
from alignkit.places import is_missing
from alignkit.protocols import PreferenceJudge
from alignkit.ranges import positive
from alignkit.rows import Row, refuse_missing
from alignkit.trained import Source, source_of

OFF = "off"
"""The opponent is the model without its adapter."""

Opponent = Source | Samples | str | None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments of `evaluate`; see there."""

    model: Any
    against: Any = "auto"
    data: Any = None
    prompts: Any = None
    reward: Any = None
    judge: PreferenceJudge | None = None
    edit: tuple[float, ...] = ()
    sheet: str | Path | None = None
    data_options: TextOptions | ImageOptions | None = None
    generation: GenerationOptions | None = None
    prompt_column: str | None = None
    num_prompts: int | None = None
    precision: str = "auto"
    confidence: float = 0.95
    num_resamples: int = 10_000
    seed: int = 0

    @property
    def wants_answers(self) -> bool:
        """Whether both sides answer prompts."""
        return bool(self.edit) or any(
            one is not None for one in (self.prompts, self.reward, self.judge, self.sheet)
        )

    @property
    def how(self) -> dict[str, Any]:
        """Of the intervals."""
        return {
            "confidence": self.confidence,
            "num_resamples": self.num_resamples,
            "seed": self.seed,
        }

    def described(self) -> dict[str, Any]:
        """Plain values for the page and for JSON."""
        left_out = ("model", "against")
        return {
            f.name: to_plain(getattr(self, f.name)) for f in fields(self) if f.name not in left_out
        }

    def opponent(self, source: Source) -> Opponent:
        """Where the opponent lies, `OFF`, something that answers, or None.

        Raises:
            ConfigError: it is the model itself.
        """
        if self.against is None or (isinstance(self.against, str) and self.against == "none"):
            return None
        if isinstance(self.against, str) and self.against == "auto":
            return OFF if source.onto else source.start()
        if source.onto and str(self.against) == source.told.get("policy"):
            return OFF
        if isinstance(self.against, Samples):
            return self.against
        other = source_of(self.against)
        same = other.policy is source.policy or (
            isinstance(other.policy, str) and other.policy == source.policy
        )
        if same and other.adapter == source.adapter:
            raise ConfigError(
                f"A model is compared with another one; model and against are both {other.name!r}. "
                "Give what it was trained from, or leave against out."
            )
        return other

    def check(self, source: Source, opponent: Opponent) -> None:
        """Refuse what does not go together, before anything is loaded.

        Raises:
            ConfigError: naming the argument and the fix.
            DataError: for data that is not there.
        """
        positive("evaluate", num_prompts=self.num_prompts, num_resamples=self.num_resamples)
        if not 0 < self.confidence < 1:
            raise ConfigError(
                f"confidence is the coverage of the intervals, such as 0.95; got {self.confidence}."
            )
        if self.data is None and not self.wants_answers:
            raise ConfigError(
                "An evaluation needs held-out pairs (data), prompts, or both; got neither."
            )
        if isinstance(self.data, (str, Path)):
            refuse_missing(self.data)
        if self.prompts is None and self.data is None:
            raise ConfigError(
                "Rewards, judges, sheets and edits need prompts that both sides answer. Give "
                "prompts, or data with prompts."
            )
        if opponent is None:
            self._check_alone(source)
        scored = self.data is not None and (self.prompts is not None or not self.wants_answers)
        if isinstance(opponent, Samples) and scored:
            raise ConfigError(
                f"{type(opponent).__name__} answers prompts and has no likelihoods, so held-out "
                "pairs cannot be scored against it. Leave data out."
            )
        image = source.modality == "image"
        if self.edit and not image:
            raise ConfigError("edit is for diffusion pipelines; this model answers in text.")
        for strength in self.edit:
            if not 0 < strength <= 1:
                raise ConfigError(
                    f"The strengths of edit are shares above 0 and at most 1; got {strength}."
                )
        wanted = ImageOptions if image else TextOptions
        if self.data_options is not None and not isinstance(self.data_options, wanted):
            raise ConfigError(
                f"data_options of this model are {wanted.__name__}; got "
                f"{type(self.data_options).__name__}."
            )
        self._check_unused()

    def _check_alone(self, source: Source) -> None:
        """Without an opponent there is nothing to compare with."""
        needs = {
            "data (accuracy is against a reference)": self.data is not None and not self.prompts,
            "judge": self.judge is not None,
            "sheet": self.sheet is not None,
        }
        for name, given in needs.items():
            if given:
                why = "" if self.against == "none" else " and nothing says what it was trained from"
                raise ConfigError(
                    f"{name} compares {source.name!r} with another model{why}. Give against, such "
                    "as the base."
                )

    def _check_unused(self) -> None:
        """An option that would be ignored is refused."""
        unused = {
            "data_options": self.data_options is not None and self.data is None,
            "prompt_column": self.prompt_column is not None and self.prompts is None,
            "num_prompts": self.num_prompts is not None and not self.wants_answers,
            "generation": self.generation is not None and not self.wants_answers,
        }
        needed = {"data_options": "data", "prompt_column": "prompts"}
        for name, is_unused in unused.items():
            if is_unused:
                raise ConfigError(
                    f"{name} changes nothing without {needed.get(name, 'prompts')}. Leave it out, "
                    f"or give {needed.get(name, 'prompts')}."
                )

    def rows(self, modality: str) -> list[Row] | None:
        """The prompts that were given; None if they are those of the data, or if there are none.

        Raises:
            DataError: see `read_prompts`; or pictures are asked for by something else than text.
        """
        if self.prompts is None:
            return None
        if isinstance(self.prompts, (str, Path)) and is_missing(self.prompts):
            refuse_missing(self.prompts)
        rows = read_prompts(self.prompts, self.prompt_column)[: self.num_prompts]
        for number, row in enumerate(rows):
            if modality == "image" and not isinstance(row["prompt"], str):
                raise ConfigError(
                    f"Pictures are drawn to prompts that are strings; prompt {number} is "
                    f"{row['prompt']!r}."
                )
        return rows
