"""Reward models as rewards and judges: what a model's folder, its head and its notes give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit.batches import Batch, Likelihood
from alignkit.errors import ConfigError
from alignkit.options import GenerationOptions, TextOptions
from alignkit.text.content import TextContent
from alignkit.text.examples import TokenRow
from alignkit.text.handed import max_positions
from alignkit.text.notes import model_folder, read_notes
from alignkit.text.pairwise import PairwiseBackend
from alignkit.text.rated_rows import VERDICT, question
from alignkit.text.scalar_models import is_scalar
from alignkit.text.scalar_wing import ScalarWing, scale_of
from alignkit.text.scalar_wing import build as build_scalar
from alignkit.text.wing import TextWing
from alignkit.text.wing import build as build_text

Rows = Sequence[Mapping[str, Any]] | None


def load_reward(
    place: str | Path, *, device: torch.device | str = "cpu", precision: str = "fp32"
) -> ModelReward | CritiqueReward:
    """A reward model as `(prompts, responses, rows) -> scores`.

    Args:
        place: a run folder, a model folder or a hub name: of a model with a scalar head, whole or
            as an adapter, whosever it is; or of a critic that `RewardModel` trained.
        device, precision: where and how it computes.

    Raises:
        ConfigError: for a language model, or one that judges pairs.
    """
    folder = model_folder(place)
    notes = read_notes(folder)
    if "critique" in notes:
        critic = build_text(str(folder), device=device, precision=precision)
        critic.chat = notes["chat"]
        return CritiqueReward(critic, notes["critique"])
    if notes.get("pairwise"):
        raise ConfigError(
            f"{str(place)!r} says which of two answers is better, and gives none of them a score. "
            "Give it as judge=..., or train RewardModel(kind='classifier')."
        )
    return ModelReward(_scorer(folder, notes, device, precision), name=Path(place).name)


def load_judge(
    place: str | Path, *, device: torch.device | str = "cpu", precision: str = "fp32"
) -> ModelJudge:
    """A reward model as `(prompts, a, b, rows) -> P(a beats b)`; see `load_reward`."""
    folder = model_folder(place)
    return ModelJudge(_scorer(folder, read_notes(folder), device, precision))


def _scorer(
    folder: Path, notes: Mapping[str, Any], device: torch.device | str, precision: str
) -> ScalarWing:
    if not is_scalar(folder):
        raise ConfigError(
            f"{str(folder)!r} is a language model and scores no answers. Train one with "
            "RewardModel(...), or give another model of AutoModelForSequenceClassification."
        )
    wing = build_scalar(str(folder), scalar=scale_of(notes), device=device, precision=precision)
    wing.policy.requires_grad_(False)
    wing.chat = notes.get("chat", wing.chat)
    return wing


def _as_asked(prompt: Any, chat: bool) -> Any:
    """A bare string is a user's turn where the model was trained on conversations."""
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


def _answered(response: Any, chat: bool) -> Any:
    whole = isinstance(response, str) and chat
    return [{"role": "assistant", "content": response}] if whole else response


def _read(wing: TextWing, rows: list[dict[str, Any]], kind: str) -> Sequence[TokenRow]:
    """Rows of texts as ids; what is longer than the model's positions loses its end."""
    options = TextOptions(
        max_length=max_positions(wing.policy) or 2**20, identical_pairs="keep", packing="auto"
    )
    return wing.examples(rows, options, kind=kind, seed=0).rows


@torch.no_grad()
def _totals(wing: TextWing, prompts: Sequence[np.ndarray], answers: Any) -> list[Tensor]:
    """Of each group of answers to a prompt, their totals."""
    if not prompts:
        return []
    owner = [group for group, given in enumerate(answers) for _ in given]
    content = TextContent(
        tuple(prompts), tuple(one for given in answers for one in given), tuple(owner)
    )
    batch = Batch(
        content=content,
        group=torch.tensor(owner),
        rank=torch.full((len(owner),), -1),
        position=torch.arange(len(prompts)),
        row_id=torch.arange(len(prompts)),
    )
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    for piece in wing.backend.split(batch, "auto"):
        scored: Likelihood = wing.backend.module(piece)
        sizes = torch.bincount(piece.group, minlength=piece.num_groups).tolist()
        parts = scored.total.double().cpu().split(sizes)
        for group, part in zip(piece.row_id.tolist(), parts, strict=True):
            found[group] = part
    return found


class ModelReward:
    """Scores of a model with a scalar head, in packed batches; answers to one prompt share it.

    Args:
        wing: the model.
        name: what reports call it.
    """

    def __init__(self, wing: ScalarWing, name: str = "reward_model") -> None:
        self.wing = wing
        self.name = name

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], rows: Rows = None
    ) -> list[float]:
        """One score per answer, in the unit that the model was trained in."""
        chat = self.wing.chat
        asked = [
            {"prompt": _as_asked(p, chat), "completion": _answered(r, chat), "score": 0.0}
            for p, r in zip(prompts, responses, strict=True)
        ]
        read = _read(self.wing, asked, "rated") if asked else []
        groups: dict[bytes, list[int]] = {}
        for place, row in enumerate(read):
            groups.setdefault(row.prompt.tobytes(), []).append(place)
        members = list(groups.values())
        totals = _totals(
            self.wing,
            [read[places[0]].prompt for places in members],
            [[read[place].answers[0] for place in places] for places in members],
        )
        scores = [0.0] * len(read)
        for places, found in zip(members, totals, strict=True):
            for place, score in zip(places, found.tolist(), strict=True):
                scores[place] = score
        return scores

    def centred_on(self, prompts: Sequence[Any], responses: Sequence[Any]) -> None:
        """Shift all scores so that these answers have a mean of 0 (Ouyang et al. 2022, 2203.02155,
        on demonstrations); no difference changes.
        """
        scores = self(prompts, responses)
        self.wing.module.offset -= sum(scores) / len(scores)  # type: ignore[operator, assignment]


class ModelJudge:
    """P(a beats b): of a pairwise model, or by Bradley-Terry of one that scores answers.

    Args:
        wing: the model.
    """

    def __init__(self, wing: ScalarWing) -> None:
        self.wing = wing
        self.reward = ModelReward(wing)

    def __call__(
        self, prompts: Sequence[Any], a: Sequence[Any], b: Sequence[Any], rows: Rows = None
    ) -> list[float]:
        """Antisymmetric: P(a beats b) + P(b beats a) = 1, and 1/2 for the same answer."""
        if not isinstance(self.wing.backend, PairwiseBackend):
            first, second = self.reward(prompts, a), self.reward(prompts, b)
            differences = torch.tensor(first).double() - torch.tensor(second).double()
            return torch.sigmoid(differences).tolist()
        chat = self.wing.chat
        asked = [
            {
                "prompt": _as_asked(p, chat),
                "chosen": _answered(one, chat),
                "rejected": _answered(other, chat),
            }
            for p, one, other in zip(prompts, a, b, strict=True)
        ]
        read = _read(self.wing, asked, "pairs") if asked else []
        totals = _totals(self.wing, [row.prompt for row in read], [row.answers for row in read])
        return [float(torch.sigmoid((one[0] - one[1]) / 2)) for one in totals]


class CritiqueReward:
    """What a critic's verdict is expected to be: it writes a critique, and its probabilities of the
    verdicts weigh what they are worth.

        score = mean over critiques of  sum_v P(v | prompt, answer, critique) worth(v)

    Args:
        wing: the critic.
        worth: verdict as written -> score.
        critiques: how many are written of each answer.
        generation: how; at temperature 0 they would all be the same.
        seed: of the critiques.

    Attributes:
        unfinished: critiques so far that reached no verdict in the tokens they had; an answer with
            no other one is missing.
    """

    name = "critique"

    def __init__(
        self,
        wing: TextWing,
        worth: Mapping[str, float],
        *,
        critiques: int = 1,
        generation: GenerationOptions | None = None,
        seed: int = 0,
    ) -> None:
        self.wing = wing
        self.worth = dict(worth)
        self.critiques = critiques
        warmth = 0.0 if critiques == 1 else 1.0
        self.generation = generation or GenerationOptions(temperature=warmth)
        self.seed = seed
        self.unfinished = 0

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], rows: Rows = None
    ) -> list[float | None]:
        chat = self.wing.chat
        asked = [question(p, r, chat) for p, r in zip(prompts, responses, strict=True)]
        found: list[list[float]] = [[] for _ in asked]
        for number in range(self.critiques if asked else 0):
            written = self.wing.sample(asked, self.generation, seed=self.seed + number)
            cut = [text.partition(VERDICT.strip()) for text in written]
            done = [place for place, (_, mark, _) in enumerate(cut) if mark]
            self.unfinished += len(asked) - len(done)
            scores = self._expected([asked[i] for i in done], [cut[i][0].rstrip() for i in done])
            for place, score in zip(done, scores, strict=True):
                found[place].append(score)
        return [sum(values) / len(values) if values else None for values in found]

    def _expected(self, asked: Sequence[Any], critiques: Sequence[str]) -> list[float]:
        """The same critique before every verdict cancels out of their probabilities."""
        rows = [
            {
                "prompt": prompt,
                "responses": [
                    _answered(f"{critique}{VERDICT}{verdict}", self.wing.chat)
                    for verdict in self.worth
                ],
                "ranking": list(range(len(self.worth))),
            }
            for prompt, critique in zip(asked, critiques, strict=True)
        ]
        if not rows:
            return []
        read = _read(self.wing, rows, "groups")
        totals = _totals(self.wing, [row.prompt for row in read], [row.answers for row in read])
        worth = torch.tensor(list(self.worth.values()), dtype=torch.float64)
        return [float(one.softmax(-1) @ worth) for one in totals]
