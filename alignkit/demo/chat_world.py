"""The tiny chat world: prompts, answers, a known reward, preference pairs and feedback turns.

This is the data side of the tiny chat model that ships with the package. Everything is plain
text made by rule, so that an aligned model can be measured against a reward that is known
exactly. The parts live in ``chat_words``, ``chat_prompts``, ``chat_answers``, ``chat_reward``
and ``chat_feedback``; this module gathers their public names and adds the preference rows.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from alignkit.demo.chat_answers import Draft, Style, draw_style, make_answer, make_draft
from alignkit.demo.chat_feedback import (
    FEEDBACK_TASKS,
    PRINCIPLES,
    SCORES,
    VERDICTS,
    FeedbackExample,
    FeedbackTask,
    critique_of,
    feedback_example,
    feedback_session,
    feedback_turn,
    keeps,
    principle_score,
)
from alignkit.demo.chat_prompts import (
    ChatPrompt,
    Split,
    ask_other,
    draw_prompt,
    make_prompts,
    split_of,
)
from alignkit.demo.chat_reward import (
    body_length,
    is_unsafe,
    known_reward,
    reward_parts,
    subject_of,
    taste_of,
    tone_of,
    well_formed,
)
from alignkit.demo.chat_words import CHAT_KINDS, TASTES

__all__ = [
    "CHAT_KINDS",
    "FEEDBACK_TASKS",
    "PRINCIPLES",
    "SCORES",
    "TASTES",
    "VERDICTS",
    "ChatPrompt",
    "Draft",
    "FeedbackExample",
    "FeedbackTask",
    "Split",
    "Style",
    "ask_other",
    "body_length",
    "critique_of",
    "draw_prompt",
    "draw_style",
    "feedback_example",
    "feedback_session",
    "feedback_turn",
    "is_unsafe",
    "keeps",
    "known_reward",
    "make_answer",
    "make_draft",
    "make_pairs",
    "make_prompts",
    "principle_score",
    "prompt_rows",
    "reward_parts",
    "split_of",
    "subject_of",
    "taste_of",
    "tone_of",
    "well_formed",
]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def make_pairs(n: int, seed: int, split: Split = "train") -> list[dict[str, Any]]:
    """``n`` preference rows in the conversational format, over different prompts.

    Both answers are drawn as the base model draws them; the chosen one has the higher known
    reward, and answers of equal reward are drawn again.
    """
    rng = random.Random(f"pairs-{split}-{seed}")
    rows = []
    for prompt in make_prompts(n, seed, split):
        while True:
            one, other = draw_style(rng, prompt), draw_style(rng, prompt)
            other = replace(other, on_topic=one.on_topic)
            first, second = make_answer(prompt, one, rng), make_answer(prompt, other, rng)
            gap = known_reward(prompt, first) - known_reward(prompt, second)
            if abs(gap) > 1e-6:
                break
        chosen, rejected = (first, second) if gap > 0 else (second, first)
        rows.append(
            {
                "prompt": prompt.messages,
                "chosen": _assistant(chosen),
                "rejected": _assistant(rejected),
            }
        )
    return rows


def prompt_rows(n: int, seed: int, split: Split = "train") -> list[dict[str, Any]]:
    """``n`` prompt-only rows: ``prompt`` as messages, and ``world``, the prompt as JSON data.

    ``ChatPrompt.from_json(row["world"])`` gives back what a reward needs to know.
    """
    return [
        {"prompt": prompt.messages, "world": prompt.to_json()}
        for prompt in make_prompts(n, seed, split)
    ]
