"""The tiny chat world's data for the stages of a recipe, as files.

The reward is known, and only labels and measures: what is trained on is demonstrations, orders of
the policy's own answers, and prompts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from alignkit.atomic import atomic_write
from alignkit.combined_rewards import with_rule
from alignkit.demo.chat_answers import draw_style, make_answer
from alignkit.demo.chat_feedback import VERDICTS, feedback_example, principle_score, wanted_style
from alignkit.demo.chat_prompts import draw_prompt
from alignkit.demo.chat_reward import WEIGHTS
from alignkit.demo.chat_world import (
    ChatPrompt,
    known_reward,
    make_prompts,
    prompt_rows,
    reward_parts,
)
from alignkit.demo.text import MODEL
from alignkit.rows import read_rows

Row = dict[str, Any]

RULES = {
    "safe": "be safe.",
    "on_topic": "stay on topic.",
    "polite": "be polite.",
}
"""Principle of the world -> the rule as it is written after a prompt."""


def _safe(prompt: ChatPrompt, answer: str) -> float:
    """1 for a sound answer that does no harm."""
    return reward_parts(prompt, answer)["safe"]


def _helpful(prompt: ChatPrompt, answer: str) -> float:
    """The known reward without its part of safety."""
    parts, weights = reward_parts(prompt, answer), {k: v for k, v in WEIGHTS.items() if k != "safe"}
    return sum(w * parts[name] for name, w in weights.items()) / sum(weights.values())


class ChatWorld:
    """Data of the tiny chat world, each set a file that is made once.

    Args:
        folder: of the files.
        quick: few rows.
    """

    model: ClassVar[str] = str(MODEL)
    measured_by: ClassVar[str] = "the known reward"

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick

    def _size(self, full: int) -> int:
        return min(full, 16) if self.quick else full

    def _file(self, name: str, rows: Iterable[Mapping[str, Any]]) -> str:
        path = self.folder / f"{name}.jsonl"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    @staticmethod
    def reward(prompts: Sequence[Any], responses: Sequence[str], rows: Any) -> list[float]:
        """The known reward of answers to `prompt_rows`."""
        pairs = zip(rows, responses, strict=True)
        return [known_reward(ChatPrompt.from_json(row["world"]), text) for row, text in pairs]

    def prompts(self) -> str:
        """To be answered in training."""
        return self._file("prompts", prompt_rows(self._size(2048), seed=10))

    def heldout(self) -> str:
        """That policies are compared on."""
        return self._file("heldout-prompts", prompt_rows(self._size(300), 11, "heldout"))

    def demonstrations(self) -> str:
        """Answers of which half fit their prompt, and the others are as the model gives them."""
        rng, rows = random.Random("demonstrations"), []
        for prompt in make_prompts(self._size(512), seed=12):
            style = draw_style(rng, prompt)
            fitting = wanted_style("fitting", prompt, style)
            answer = make_answer(prompt, rng.choice((style, fitting)), rng)
            rows.append({"prompt": prompt.messages, "completion": answer})
        return self._file("demonstrations", rows)

    def to_rank(self, split: str = "train") -> str:
        """Prompts whose answers are ordered by how good they are."""
        num, seed = (self._size(600), 13) if split == "train" else (self._size(200), 14)
        return self._file(f"to-rank-{split}", prompt_rows(num, seed, split))  # type: ignore[arg-type]

    def ranked(self, split: str, answered: Path) -> str:
        """Sampled answers in the order that a labeller gives them, without their scores."""
        rows = []
        for row in read_rows(answered):
            scores = row["scores"]
            ranking = [sum(other > score for other in scores) for score in scores]
            kept = {"prompt": row["prompt"], "responses": row["responses"], "ranking": ranking}
            rows.append(kept)
        return self._file(f"ranked-{split}", rows)

    def tagged_prompts(self) -> str:
        """To be answered in training; those that ask for advice are a matter of safety."""
        rows = prompt_rows(self._size(512), seed=15)
        tagged = [
            row | {"tags": ["safety"] if row["world"]["facts"]["harm"] else []} for row in rows
        ]
        return self._file("tagged-prompts", tagged)

    def preference_pairs(self, split: str) -> str:
        """Answers in the styles of the model, the better one by the known reward chosen."""
        return self._file(f"preference-{split}", self._pairs("preference", split, known_reward))

    def rated_pairs(self, about: str, margins: Mapping[str, float], split: str = "train") -> str:
        """Pairs about helpfulness or safety, with margins by how far apart the answers are."""
        rows = self._pairs(about, split, _safe if about == "safety" else _helpful)
        for row in rows:
            gap = row.pop("gap")
            level = next(
                name
                for name, least in zip(margins, (0.4, 0.2, 0.1, 0), strict=True)
                if gap >= least
            )
            row["margin"] = margins[level]
        return self._file(f"{about}-{split}", rows)

    def rule_pairs(self, split: str) -> str:
        """The rule stands behind the prompt; the chosen answer keeps it and the other does not."""
        rows = []
        for name, text in RULES.items():
            made = self._pairs(f"rule {name}", split, partial(principle_score, name), 3)
            rows += [row | {"prompt": with_rule(row["prompt"], text)} for row in made]
        return self._file(f"rules-{split}", rows)

    def _pairs(self, seed: str, split: Any, score: Any, parts: int = 1) -> list[Row]:
        """Two drawn answers to each prompt whose scores differ."""
        num = self._size((1600 if split == "train" else 300) // parts)
        rng, rows = random.Random(f"{seed}-{split}"), list[Row]()
        while len(rows) < num:
            prompt = draw_prompt(
                rng, split, rng.choice(("safety", "plan")) if "safe" in seed else None
            )
            answers = [make_answer(prompt, draw_style(rng, prompt), rng) for _ in range(2)]
            worse, better = sorted(answers, key=lambda answer: score(prompt, answer))
            gap = score(prompt, better) - score(prompt, worse)
            if gap > 0.05:
                row = {"prompt": prompt.messages, "chosen": better, "rejected": worse}
                rows.append(row | {"gap": gap})
        return rows

    def pretraining(self) -> str:
        """What the model could do before, and no reward speaks of."""
        return self._file("pretraining", self._feedback("pretraining", self._size(2048), "train"))

    def tasks(self) -> dict[str, str]:
        """Held-out ones of the same kind: verdicts, critiques to the letter, their likelihood."""
        rng = random.Random("tasks")
        verdicts = [feedback_example("verdict", rng, "heldout") for _ in range(self._size(300))]
        choices = [
            {
                "prompt": _asked(one.user),
                "choices": list(VERDICTS),
                "answer": VERDICTS.index(one.reply),
            }
            for one in verdicts
        ]
        critiques = [feedback_example("critique", rng, "heldout") for _ in range(self._size(150))]
        exact = [{"prompt": _asked(one.user), "answer": one.reply} for one in critiques]
        text = self._feedback("text", self._size(300), "heldout")
        return {
            "multiple_choice": self._file("task-choices", choices),
            "exact_match": self._file("task-exact", exact),
            "text": self._file("task-text", text),
        }

    @staticmethod
    def _feedback(seed: str, num: int, split: Any) -> list[Row]:
        rng, rows = random.Random(seed), []
        for _ in range(num):
            task = rng.choice(("critique", "verdict", "score"))
            one = feedback_example(task, rng, split)  # type: ignore[arg-type]
            rows.append({"prompt": _asked(one.user), "completion": one.reply})
        return rows


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
