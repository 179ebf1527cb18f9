"""What a wing may be able to do beyond its seams. Whoever wants it asks with `isinstance`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from alignkit.batches import Batch
from alignkit.options import GenerationOptions, LoRA
from alignkit.protocols import Backend, Collective, Key


@dataclass(frozen=True)
class Sampled:
    """Sampled answers with their tokens.

    Attributes:
        answers: strings, one per prompt.
        prompt_ids: what the model was asked, in token ids.
        answer_ids: what it answered; the closing eos is there where the answer ended by itself.
        cut: whether `max_new_tokens` (or the model's last position) ended the answer.
    """

    answers: list[str]
    prompt_ids: list[list[int]]
    answer_ids: list[list[int]]
    cut: list[bool]


@dataclass(frozen=True)
class SampledAnswer:
    """An answer in tokens.

    Attributes:
        ids: of the answer; where it ended by itself, with the eos or stop string that ended it.
        ended: whether it did; if not, the limit cut it.
        logps: of each token, the log-probability under the distribution that it was drawn from:
            with temperature, top_k and top_p.
    """

    ids: list[int]
    ended: bool
    logps: list[float]


@runtime_checkable
class SamplesTokens(Protocol):
    """A wing that answers prompts in tokens, as online methods learn from them."""

    def generate_tokens(
        self,
        prompts: Sequence[Any],
        options: GenerationOptions,
        *,
        keys: Sequence[Sequence[int]],
        together: Collective | None = None,
    ) -> list[SampledAnswer]:
        """An answer to each prompt.

        Args:
            prompts: arrays of token ids, with room for an answer of `max_new_tokens`.
            options: how to sample.
            keys: numbers that identify each answer, such as (seed, rollout, place): it is a
                function of them and the model, and of no neighbour, process or batch.
            together: the processes among which the model's weights are divided: all of them then
                call this, each with prompts of its own.
        """
        ...

    def answer_texts(self, prompts: Sequence[Any], answers: Sequence[Sequence[int]]) -> list[str]:
        """Sampled ids as rewards and people read them; prompts as they stand in the data."""
        ...


@runtime_checkable
class Samples(Protocol):
    """Something that answers prompts, and whose likelihoods nobody asks for."""

    def sample(
        self, prompts: Sequence[Any], options: GenerationOptions, *, seed: int
    ) -> Sequence[Any]:
        """One answer per prompt."""
        ...


@runtime_checkable
class CountsTokens(Protocol):
    """A wing whose answers have lengths."""

    def sample_counted(
        self, prompts: Sequence[Any], options: GenerationOptions, *, seed: int
    ) -> Sampled:
        """`Wing.sample`, with what was sampled before it became text."""
        ...


@runtime_checkable
class Tempers(Protocol):
    """A backend whose likelihoods can be those of answers sampled at another temperature than 1."""

    def temper(self, temperature: float) -> None:
        """From now on they are, the policy's and those of what was built beside it."""
        ...


@runtime_checkable
class SharesTrunk(Protocol):
    """A wing whose policy's own states a critic can read."""

    def value_head(self) -> Any:
        """A head of zeros on the policy's trunk, of which the likelihood gives the extra "values";
        its attribute `apart` keeps its gradient from the trunk. Call it before the policy is
        wrapped, and after the reference was copied.
        """
        ...


@runtime_checkable
class ScoresStates(Protocol):
    """A wing beside whose policy a model can stand that scores its answers, token by token."""

    def scalar(self, init: str | Path = "policy", *, adapter: LoRA | None = None) -> Backend:
        """A critic: its module's `total` is an answer's score, and its extra "values" (N, T) the
        values of the states before each completion token, with "token_mask" (N, T).

        `init` is "policy" (a copy of its trunk as it computes now, and a head of zeros) or a reward
        model's folder. Call it before the policy is sharded.
        """
        ...


@runtime_checkable
class DrawsInStrata(Protocol):
    """A backend whose likelihood is an error at a drawn place, such as a diffusion timestep."""

    error_scale: float
    """What a log-likelihood is multiplied by to give the error that it stands for."""

    def strata(self, batch: Batch, key: Key) -> tuple[tuple[str, ...], Tensor]:
        """Names of the strata, such as "t0-250", and (G,) which one each group's draw is from."""
        ...


@runtime_checkable
class EditsPictures(Protocol):
    """A wing whose policy also changes pictures that are there."""

    def edit(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Any],
        options: GenerationOptions,
        *,
        strength: float,
        seed: int,
    ) -> list[Any]:
        """Each picture noised to `strength` and denoised under its prompt (SDEdit)."""
        ...

    def inpaint(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Any],
        masks: Sequence[Any],
        options: GenerationOptions,
        *,
        strength: float,
        seed: int,
    ) -> list[Any]:
        """Each picture filled anew, under its prompt, where its mask is white."""
        ...


def counted_samples(
    wing: Samples, prompts: Sequence[Any], options: GenerationOptions, seed: int
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Answers; and, where they have tokens, their numbers and whether the limit cut them."""
    if not isinstance(wing, CountsTokens):
        return list(wing.sample(prompts, options, seed=seed)), {}
    found = wing.sample_counted(prompts, options, seed=seed)
    tokens = [len(answer) for answer in found.answer_ids]
    return list(found.answers), {"tokens": tokens, "cut": found.cut}
