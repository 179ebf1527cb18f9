"""One optimizer step of every loss in either wing, through `build()`: what the laws of the whole
machine are stated on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alignkit import DPO, TextOptions, TrainerOptions, build
from alignkit.losses import PREFERENCE_LOSSES, PairLoss
from tests.builders import move, tiny_lm, tiny_tokenizer, token_rows
from tests.image.conftest import make_pipeline, picture

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Step:
    """The first step of a run: its record, and the gradients of what is trained, unclipped."""

    record: dict[str, float]
    gradients: dict[str, Tensor]


def text_rows(num: int = 8) -> list[dict[str, Any]]:
    return token_rows(num)


def image_rows(num: int = 8) -> list[dict[str, Any]]:
    prompts = ["a red circle", "a blue square", "big cat"]
    return [
        {
            "prompt": prompts[i % 3],
            "chosen": picture(2 * i, 16, 16),
            "rejected": picture(2 * i + 1, 16, 16),
        }
        for i in range(num)
    ]


ROWS = {"text": text_rows, "image": image_rows}
SIDES = {"text": ("chosen_ids", "rejected_ids"), "image": ("chosen", "rejected")}
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


def first_step(wing: str, row: PairLoss, rows: Rows, **trainer: Any) -> Step:
    """All rows in one global batch, the policy away from its reference."""
    policy, other = policies(wing)
    run = build(
        policy,
        DPO(loss=row.name, beta=IMAGE_BETA if wing == "image" else None),
        rows,
        reference=other if row.needs_reference else "none",
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


def names(wing: str) -> list[str]:
    """The pairwise losses that the wing trains with."""
    return [
        name
        for name, row in PREFERENCE_LOSSES.items()
        if wing in row.modalities
        and (row.scale_free or wing == "text")
        and not row.coupled
        and set(row.needs) <= {"chosen_length", "rejected_length"}
    ]
