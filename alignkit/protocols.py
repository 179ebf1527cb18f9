"""The seams of the house: everything that can be exchanged, with its full list of members.

They are structural (`typing.Protocol`): a user's own class needs no import from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from alignkit.batches import Batch, Likelihood, Metrics
from alignkit.examples import Examples
from alignkit.options import GenerationOptions

Draw = Any
"""The randomness of one evaluation: None for text; timesteps and noise for images."""

SourceRows = Sequence[Mapping[str, Any]] | None
Key = tuple[int, int]
"""(seed, optimizer step): with a group's `position` it determines every random draw of a step."""


class LikelihoodModule(Protocol):
    """A wing's `nn.Module` whose forward **is** the likelihood.

    DDP, FSDP2 and compile wrap this module; nobody calls a sub-module of it from outside.
    """

    def __call__(
        self, batch: Batch, draw: Draw = None, want: frozenset[str] = frozenset()
    ) -> Likelihood: ...


class Backend(Protocol):
    """One modality's way of evaluating answers."""

    module: nn.Module
    """The (possibly wrapped) `LikelihoodModule` of the policy."""

    def draw(self, batch: Batch, key: Key) -> Draw:
        """The randomness of `batch`, shared by chosen, rejected, policy and reference."""
        ...

    def split(self, batch: Batch, budget: int | str) -> list[Batch]:
        """Micro-batches of at most `budget` groups, or of what memory allows for "auto"."""
        ...


class Reference(Protocol):
    """The frozen comparison: a snapshot of the model handed in, never reloaded from its name."""

    def prepare(self, runtime: Any) -> None:
        """Place (and shard) what the reference owns. Called once, after the policy is placed."""
        ...

    def log_likelihood(self, batch: Batch, draw: Draw, want: frozenset[str]) -> Likelihood:
        """The reference's likelihood of the same micro-batch on the same draw, without gradient."""
        ...

    def update(self, step: int) -> None:
        """Called after every optimizer step; a moving reference moves here."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Trainable:
    """What an objective trains.

    Attributes:
        modules: name -> module to be wrapped (DDP, FSDP2). The runtime gives the wrapped module
            back through `replace`, because forwards must go through the wrapper.
        replace: called with (name, wrapped module).
    """

    modules: Mapping[str, nn.Module]
    replace: Callable[[str, nn.Module], None]


class Objective(Protocol):
    """What is optimised. Losses are **sums**; the trainer divides once by the global normaliser."""

    requires: frozenset[str]
    """Names of `Likelihood.extras` that the objective needs."""

    @property
    def trainable(self) -> Trainable: ...

    def normaliser(self, batch: Batch) -> Tensor:
        """This process's share of the number that the summed losses are divided by (a scalar)."""
        ...

    def micro_batches(self, batch: Batch, step: int) -> Iterable[Any]:
        """The pieces of `batch`, each evaluated and forgotten in turn; step 0 is evaluation."""
        ...

    def absent(self, micro: Any) -> Any:
        """A piece like `micro` that adds nothing; processes pad with it to equal numbers."""
        ...

    def __call__(self, micro: Any) -> tuple[Tensor, Metrics]:
        """The summed loss of a piece, with its graph, and its metrics, detached."""
        ...

    def prepare(self, runtime: Any) -> None:
        """Place what the objective owns besides `trainable`.

        Called once, after those are placed.
        """
        ...

    def rows_of(self, micro: Any) -> list[int]:
        """The row ids of a piece, for error messages."""
        ...

    def culprits(self, micro: Any) -> list[int]:
        """The rows of a piece whose own loss is not finite. All processes call it alike."""
        ...

    def evaluate(self, micro: Any) -> Metrics:
        """The metrics of a held-out piece, its loss among them, without gradient."""
        ...

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """What follows from a held-out set's means and is none itself, such as a perplexity."""
        ...

    def after_step(self, step: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class BatchSource(Protocol):
    """This process's share of one global batch after another. Online RL is a batch source too."""

    at_boundary: bool
    """Whether a checkpoint taken now loses nothing. A save due in mid-phase waits for it."""

    @property
    def total_steps(self) -> int | None:
        """How many batches there will be; None for an endless source."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Collective(Protocol):
    """The only view of other processes below floor 4."""

    rank: int
    size: int

    def sum(self, value: Tensor) -> Tensor:
        """Elementwise sum over processes. All processes must call it."""
        ...

    def gather(self, value: Tensor) -> Tensor:
        """Concatenation along dim 0 over processes, in rank order; lengths may differ."""
        ...


class Reward(Protocol):
    """Rule, Python function, classifier, scorer or judge: all the same to everybody above."""

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], rows: SourceRows = None
    ) -> Sequence[float | None] | Mapping[str, Sequence[float | None]]:
        """Scores (B,), or named parts of them. A failed answer is missing (None), never 0."""
        ...


class PreferenceJudge(Protocol):
    """P(a beats b)."""

    def __call__(
        self, prompts: Sequence[Any], a: Sequence[Any], b: Sequence[Any], rows: SourceRows = None
    ) -> Sequence[float]: ...


class Wing(Protocol):
    """What a modality hands to the roof: its parts, loaded and ready.

    A wing's package has one entry, `build(policy, *, adapter, device, precision,
    gradient_checkpointing, seed, beside=None) -> Wing`, where `policy` is a folder, a hub name or
    objects in memory, `adapter` a `LoRA` or None and `precision` "fp32", "bf16" or "fp16".
    `beside` is the policy's wing where the one to be built is its reference: nothing is then marked
    for training, and weights are stored as the policy's are, so that equal ones give equal bits.
    """

    modality: str
    backend: Backend
    policy: Any
    """What the caller gets back: a PreTrainedModel, a PeftModel or a DiffusionPipeline."""
    tokenizer: Any
    """The tokenizer of a text wing, None otherwise."""
    adapter: str  # "none", "fresh" or "continued"
    default_options: Any  # the TextOptions or ImageOptions that hold when the caller gives none
    chat: bool
    """Whether `sample` takes a bare string for a user's turn of a conversation."""

    def adapters_off(self) -> AbstractContextManager[None]:
        """A context in which the policy computes as if it had no adapter."""
        ...

    def adapter_on(self, name: str) -> AbstractContextManager[None]:
        """A context in which the policy computes with another of its adapters.

        Raises:
            ConfigError: the policy carries no adapter of this name.
        """
        ...

    def trained_adapters(self) -> list[str]:
        """Names of the adapters that are trained."""
        ...

    def examples(self, data: Any, options: Any, *, kind: str, seed: int) -> Examples:
        """Read, check and prepare rows.

        `kind` is "pairs", "groups" (rankings of K answers), "unpaired" (one labelled answer) or
        "supervised" (one to learn); a wing of tokens also takes `loss_on`, what of it is learned,
        and "prompts" (no answer), which leave `room` tokens for one.
        """
        ...

    def sample(self, prompts: Sequence[Any], options: GenerationOptions, *, seed: int) -> list[Any]:
        """One answer per prompt (strings or PIL images), each keyed by (seed, its place)."""
        ...

    def prompts(self, data: Any, options: Any, limit: int) -> list[Any]:
        """The first `limit` distinct prompts of the data, for samples in the report."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for the report: class, parameters, trained parameters, dtype, unit ..."""
        ...

    def prompt_text(self, prompt: Any) -> str:
        """A prompt as a person reads it."""
        ...

    def save(
        self,
        folder: Path,
        *,
        base: str | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write what users load.

        `base` is the name that an adapter's files give as their base; `weights` the policy's whole
        state dict where its own parameters are sharded.
        """
        ...

    def release(self) -> None:
        """Give objects in hand back as they came, apart from their weights."""

    def engage(self) -> None:
        """Make ready to train again after `release`."""

    def undo(self) -> None:
        """After a failure: release, and take off what `build` added, so that it can be retried."""
