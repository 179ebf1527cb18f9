"""The reward model of the PPO question, for both sides: a head of chance on the policy's trunk.

This file is read by the peer's Python, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def classifier(model: str) -> Any:
    """A sequence classifier with one label."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    found = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype="float32")
    found.config.pad_token_id = AutoTokenizer.from_pretrained(model).pad_token_id
    return found.eval()


class Scorer:
    """The same as a reward function of texts."""

    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer

        self.model = classifier(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Any = None
    ) -> list[float]:
        texts = [prompt + " " + text for prompt, text in zip(prompts, responses, strict=True)]
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        scores: list[float] = self.model(**inputs).logits[:, 0].tolist()
        return scores
