"""KTO on text, from rows to the loss: the baseline is that of answers to other prompts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from alignkit import KTO, TrainerOptions, build
from tests.builders import tiny_lm, tiny_tokenizer

BETA, LIKED, DISLIKED = 0.05, 1.0, 1.5
ROWS: list[dict[str, Any]] = [
    {"prompt": "What is the sky?", "completion": " Blue and grey.", "label": True, "weight": 2},
    {"prompt": "What is the sky?", "completion": " A red fox in the forest.", "label": False},
    {"prompt": "Name an animal.", "completion": " Never.", "label": False, "weight": 0},
    {"prompt": "Name an animal.", "completion": " The fox.", "label": True},
    {"prompt": "How do I make tea?", "completion": " Boil water, and wait.", "label": True},
    {"prompt": "How do I make tea?", "completion": " No tea.", "label": False, "weight": 0.5},
]


def logp(model: Any, prompt: np.ndarray, completion: np.ndarray) -> float:
    """Of one answer alone, token by token, in float64."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
    with torch.no_grad():
        predicted = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    places = range(len(prompt), len(ids))
    return sum(float(predicted[at - 1, ids[at]]) for at in places)


def expected(run: Any, other: Any) -> float:
    """The mean loss of all rows, from the definition; the next row of another prompt, around the
    end, gives each row's mismatched answer, and rows of weight 0 give none.
    """
    batch = next(iter(run.trainer.source))
    prompts, answers = batch.content.prompts, batch.content.completions
    weight = batch.weight.tolist()

    def ratio(i: int, j: int) -> float:
        return logp(run.wing.policy, prompts[i], answers[j]) - logp(other, prompts[i], answers[j])

    present = [i for i in range(len(ROWS)) if weight[i] > 0]
    kl = 0.0
    for i in present:
        later = [*(j for j in present if j > i), *(j for j in present if j < i)]
        partner = next(j for j in later if not np.array_equal(prompts[j], prompts[i]))
        kl += weight[i] * ratio(i, partner)
    z = max(0.0, kl / sum(weight))
    total = 0.0
    for i in present:
        liked = bool(batch.desirable[i])
        gain = BETA * (ratio(i, i) - z) * (1 if liked else -1)
        total += weight[i] * (LIKED if liked else DISLIKED) * (1 - 1 / (1 + math.exp(-gain)))
    return total / sum(weight)


@pytest.mark.parametrize("micro_batch", [6, 2])
@pytest.mark.parametrize("seed", [1, 5])
def test_kto_from_rows_to_the_loss(micro_batch, seed) -> None:
    tokenizer = tiny_tokenizer()
    other = tiny_lm("llama", seed=seed)
    run = build(
        (tiny_lm("llama"), tokenizer),
        KTO(beta=BETA, undesirable_weight=DISLIKED),
        ROWS,
        reference=(other, tokenizer),
        trainer=TrainerOptions(max_steps=1, batch_size=6, micro_batch=micro_batch, log_every=1),
    )
    wanted = expected(run, other.eval())
    run.trainer.source.consumed = 0  # `expected` has looked at the batch
    (record,) = run.steps()
    assert record.loss == pytest.approx(wanted, rel=1e-4)
    assert {"rewards/chosen", "rewards/rejected", "objective/kl_baseline"} <= record.metrics.keys()
