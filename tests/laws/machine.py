"""One optimizer step of every loss in either wing, through `build()`: what the laws of the whole
machine are stated on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from alignkit import DPO, KTO, TextOptions, TrainerOptions, build
from alignkit.losses import LOSSES, UNPAIRED_LOSSES, GroupLoss, Loss, UnpairedLoss
from tests.builders import move, tiny_lm, tiny_tokenizer, token_rows
from tests.image.conftest import make_pipeline, picture

Rows = Sequence[Mapping[str, Any]]

SIDES = {"text": ("chosen_ids", "rejected_ids"), "image": ("chosen", "rejected")}
PROMPTS = ("a red circle", "a blue square", "big cat")
TEXT = "The sky is blue and grey in the evening near the old harbour, number 7."


@dataclass(frozen=True)
class Step:
    """The first step of a run: its record, and the gradients of what is trained, unclipped."""

    record: dict[str, float]
    gradients: dict[str, Tensor]


def rows_for(wing: str, loss: Loss, num: int = 8, *, answers: int = 3) -> list[dict[str, Any]]:
    """Rows of the loss's kind, of uneven lengths; a ranking has so many answers."""
    if isinstance(loss, GroupLoss):
        return [_ranking(wing, i, answers) for i in range(num)]
    if isinstance(loss, UnpairedLoss):
        return [_single(wing, i) for i in range(num)]
    scores = [{"score_chosen": 1 + 0.4 * i, "score_rejected": 0.5} for i in range(num)]
    if wing == "text":
        return [row | score for row, score in zip(token_rows(num), scores, strict=True)]
    pairs = [
        {"prompt": PROMPTS[i % 3], "chosen": _picture(2 * i), "rejected": _picture(2 * i + 1)}
        for i in range(num)
    ]
    return [row | score for row, score in zip(pairs, scores, strict=True)]


def _ranking(wing: str, i: int, answers: int) -> dict[str, Any]:
    order = [[0, 1, 2], [1, 0, -1], [0, 1, 1], [1, 0, 2]][i % 4]
    name = "responses" if wing == "text" else "images"
    return {
        "prompt": PROMPTS[i % 3] + " ",
        name: [_answer(wing, 3 * i + place) for place in range(answers)],
        "ranking": order[:answers],
    }


def _single(wing: str, i: int) -> dict[str, Any]:
    name = "completion" if wing == "text" else "image"
    return {"prompt": f"{PROMPTS[i % 3]} {i} ", name: _answer(wing, i), "label": i % 2 > 0}


def _answer(wing: str, i: int) -> Any:
    return _picture(i) if wing == "image" else TEXT[4 * (i % 7) : 4 * (i % 7) + 8 + 5 * (i % 8)]


@cache
def _picture(i: int) -> Any:
    return picture(i, 16, 16)


def method_for(loss: Loss, beta: float | None = None) -> DPO | KTO:
    if loss.name in UNPAIRED_LOSSES:
        return KTO(loss=loss.name, beta=beta)
    return DPO(loss=loss.name, beta=beta)


IMAGE_BETA = 20.0
"""Half errors of the tiny random pipeline differ by 0.01 to 0.1."""


def policies(wing: str) -> tuple[Any, Any]:
    """A policy, and a reference some way off."""
    if wing == "text":
        model, tokenizer = tiny_lm("llama"), tiny_tokenizer()
        other = copy.deepcopy(model)
        move(other, 0.1)
        return (model, tokenizer), (other, tokenizer)
    pipe, other = make_pipeline(), make_pipeline()
    move(other.unet, 0.05)
    return pipe, other


def first_step(wing: str, loss: Loss, rows: Rows, **trainer: Any) -> Step:
    """All rows in one global batch, the policy away from its reference."""
    method = method_for(loss, IMAGE_BETA if wing == "image" and loss.scale_free else None)
    return first_step_of(wing, method, rows, reference=loss.needs_reference, **trainer)


def first_step_of(
    wing: str, method: DPO | KTO, rows: Rows, *, reference: bool = True, **trainer: Any
) -> Step:
    """The same for a method with options of its own."""
    policy, other = policies(wing)
    run = build(
        policy,
        method,
        rows,
        reference=other if reference else "none",
        data_options=TextOptions(identical_pairs="keep") if wing == "text" else None,
        trainer=TrainerOptions(
            max_steps=1,
            batch_size=len(rows),
            learning_rate=1e-3,
            max_grad_norm=1e9,
            precision="fp32",
            **trainer,
        ),
    )
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        for name, parameter in run.trainer.parameters.items():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()

    run.trainer.optimizer.register_step_pre_hook(keep)
    (record,) = run.steps()
    return Step(record.as_dict(), gradients)


def distance(found: Step, expected: Step) -> float:
    """Norm of the difference of all gradients, relative to the expected ones'."""
    assert found.gradients.keys() == expected.gradients.keys() and expected.gradients
    pairs = [(found.gradients[n].double(), g.double()) for n, g in expected.gradients.items()]
    apart = sum(float((a - b).square().sum()) for a, b in pairs)
    return (apart / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def losses_of(wing: str) -> list[Loss]:
    """The losses that the wing trains with in the unit of its log-ratios."""
    return [
        loss
        for loss in LOSSES.values()
        if wing in loss.modalities
        and (wing == "text" or loss.scale_free or loss.modalities == ("image",))
    ]
