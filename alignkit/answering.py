"""The policy answers prompts and a reward scores the answers, over all processes.

Every answer is drawn by its own key, (seed, rollout, place), so that neither batches nor processes
change what is written. Each process writes and scores its share, and then knows all of them: they
are small, and whatever is made of them is made on the whole rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Batch
from alignkit.capabilities import SamplesTokens
from alignkit.errors import DataError
from alignkit.options import GenerationOptions
from alignkit.protocols import Collective

Scorer = Callable[[Sequence[Any], Sequence[str], Sequence[Any]], Mapping[str, Sequence[Any]]]
"""(prompts, answers, rows) -> name -> scores, None where missing; "" is the total."""


@dataclass(frozen=True)
class Answers:
    """Answers to a batch of prompts, all of them.

    Attributes:
        batch: the prompts' batch with its answers.
        texts: as the reward saw them; those of this process.
        share: the places of this process's answers.
        ended: (N,) bool; the others were cut.
        scores: name -> (N,) float32, NaN where missing; "" is the total.
        sampled_logps: (N, T) of each token under what it was drawn from, 0 after the end.
    """

    batch: Batch
    texts: tuple[str, ...]
    share: range
    ended: Tensor
    scores: Mapping[str, Tensor]
    sampled_logps: Tensor

    def mask(self) -> Tensor:
        """(N, T) bool, real tokens."""
        lengths = torch.tensor(self.batch.content.scored_lengths())
        return torch.arange(int(lengths.max()))[None] < lengths[:, None]


class Writer:
    """See the module.

    Args:
        wing: whose policy writes.
        score: the reward.
        options: how answers are sampled.
        seed: of the draws.
        sharded: the policy's weights are divided among the processes.
    """

    def __init__(
        self,
        wing: SamplesTokens,
        score: Scorer,
        options: GenerationOptions,
        *,
        seed: int,
        sharded: bool = False,
    ) -> None:
        self.wing = wing
        self.score = score
        self.options = options
        self.seed = seed
        self.sharded = sharded

    @property
    def exact(self) -> bool:
        """Whether the policy itself writes, and not an engine that rounds otherwise."""
        return self.options.engine == "transformers"

    def answer(self, prompts: Batch, samples: int, number: int, processes: Collective) -> Answers:
        """`samples` answers to each prompt.

        Args:
            prompts: of all processes.
            samples: answers to each.
            number: of the rollout; the key of its draws.
            processes: the others.

        Raises:
            DataError: the reward failed, here or on another process.
        """
        num = prompts.num_groups * samples
        rank, size = processes.rank, processes.size
        share = range(rank * num // size, (rank + 1) * num // size)
        # A process without a share writes and scores one that is dropped, to keep in step.
        places = share or range(1)
        own = self.wing.generate_tokens(
            [prompts.content.prompts[place // samples] for place in places],
            self.options,
            keys=[(self.seed, number, place) for place in places],
            together=processes if self.sharded else None,
        )
        rows = [(prompts.rows or ())[place // samples] for place in places]
        asked = [row["prompt"] for row in rows]
        texts = self.wing.answer_texts(asked, [one.ids for one in own])
        scores = _agreed(lambda: self._scores(asked, texts, rows), processes)
        own = own[: len(share)]
        ids = [one.tolist() for one in _gathered([one.ids for one in own], processes, torch.int64)]
        ended = processes.gather(torch.tensor([one.ended for one in own], dtype=torch.bool))
        groups = [ids[start : start + samples] for start in range(0, num, samples)]
        batch = replace(
            prompts,
            content=prompts.content.answered(groups),
            group=torch.arange(prompts.num_groups).repeat_interleave(samples),
            rank=torch.full((num,), -1),
        )
        held = {name: processes.gather(scores[name][: len(share)]) for name in sorted(scores)}
        logps = _gathered([one.logps for one in own], processes, torch.float32)
        table = torch.nn.utils.rnn.pad_sequence(list(logps), batch_first=True)
        return Answers(batch, tuple(texts[: len(share)]), share, ended, held, table)

    def _scores(
        self, asked: Sequence[Any], texts: Sequence[str], rows: Sequence[Any]
    ) -> dict[str, Tensor]:
        found = self.score(asked, texts, rows)
        return {
            name: torch.tensor(
                [float("nan") if one is None else one for one in values], dtype=torch.float32
            )
            for name, values in found.items()
        }


def _agreed(ask: Callable[[], dict[str, Tensor]], processes: Collective) -> dict[str, Tensor]:
    """What the reward says; a failure of one process is one of all, which would wait for it."""
    error: Exception | None = None
    found: dict[str, Tensor] = {}
    try:
        found = ask()
    except Exception as raised:
        error = raised
    failed = processes.gather(torch.tensor([error is not None])).nonzero().flatten().tolist()
    if error is not None:
        raise error
    if failed:
        raise DataError(f"The reward failed on process {failed[0]}; its own message says where.")
    return found


def _gathered(
    ragged: Sequence[Sequence[float]], processes: Collective, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """A number per token of all processes' answers, in their order."""
    flat = torch.tensor([value for answer in ragged for value in answer], dtype=dtype)
    lengths = processes.gather(torch.tensor([len(one) for one in ragged], dtype=torch.int64))
    found: tuple[Tensor, ...] = processes.gather(flat).split(lengths.tolist())
    return found
