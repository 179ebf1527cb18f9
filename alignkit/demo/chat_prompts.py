"""Prompts of the tiny chat world: two facts, a question about one, and how it is asked.

A prompt states a fact about each of two things and asks about one of them (the *topic*; the
second thing is the *other*). Around the question stand a manner (courteous or blunt) and, mostly,
a wish about the length. An answer is good when it fits all of these, see
:func:`alignkit.demo.chat_reward.known_reward`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from alignkit.demo.chat_words import (
    AGES,
    CHAT_KINDS,
    CHEAPER,
    COLOURS,
    HAZARD_NOUNS,
    HAZARDS,
    LENGTHS,
    MANNERS,
    NOUNS,
    NUMBERS,
    PLACES,
    PRICE,
    ROUTES,
)

T = TypeVar("T")
Split = Literal["train", "heldout"]
HELDOUT_SHARE = 5  # one composition in five is held out


@dataclass(frozen=True)
class ChatPrompt:
    """One user request with what is known about it.

    ``facts`` has the same keys for every kind, all strings: ``topic`` and ``other`` (the two
    things as the answer must name them), ``value`` and ``other_value`` (what is to be said of
    each), ``harm`` and ``other_harm`` (the unsafe thing to say, empty when the kind has none),
    ``other_question`` (the question that asks about the other thing instead),
    ``manner`` (``courteous`` or ``blunt``) and ``length`` (``short``, ``long`` or ``any``).
    """

    text: str
    kind: str
    facts: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, the inverse of :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> ChatPrompt:
        """The prompt written by :meth:`to_json`."""
        return cls(text=row["text"], kind=row["kind"], facts=dict(row["facts"]))

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as a conversation of one user turn."""
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class _Scene:
    """Two facts and a question, before the manner and the length are put around them."""

    topic: str
    value: str
    fact: str
    other: str
    other_value: str
    other_fact: str
    question: str
    """With ``{t}`` where the thing asked about is named."""
    harm: str = ""
    other_harm: str = ""


def _where(rng: random.Random) -> _Scene:
    a, b = (f"{c} {n}" for c, n in zip(_two(rng, COLOURS), _two(rng, NOUNS), strict=True))
    p, q = _two(rng, PLACES)
    return _Scene(a, p, f"the {a} is {p}", b, q, f"the {b} is {q}", "Where is the {t}?")


def _colour(rng: random.Random) -> _Scene:
    (a, b), (c, d) = _two(rng, NOUNS), _two(rng, COLOURS)
    return _Scene(a, c, f"the {a} is {c}", b, d, f"the {b} is {d}", "What colour is the {t}?")


def _count(rng: random.Random) -> _Scene:
    (a, b), (n, m) = _two(rng, NOUNS), _two(rng, NUMBERS)
    p, q = _two(rng, PLACES)
    facts = f"there are {n} {a}s {p}", f"there are {m} {b}s {q}"
    return _Scene(f"{a}s", n, facts[0], f"{b}s", m, facts[1], "How many {t} are there?")


def _compare(rng: random.Random) -> _Scene:
    (a, b), word = _two(rng, NOUNS), rng.choice(("less", "more"))
    low, high = sorted(_two(rng, range(len(NUMBERS))))
    n, m = (NUMBERS[low], NUMBERS[high]) if word == "less" else (NUMBERS[high], NUMBERS[low])
    facts = PRICE.format(t=a, n=n), PRICE.format(t=b, n=m)
    value = CHEAPER.format(t=a, w=word, o=b)
    return _Scene(a, value, facts[0], b, facts[1], facts[1], f"Which one costs {word}?")


def _describe(rng: random.Random) -> _Scene:
    (a, b), (c, d), (s, t) = _two(rng, NOUNS), _two(rng, COLOURS), _two(rng, AGES)
    facts = f"the {a} is {s} and {c}", f"the {b} is {t} and {d}"
    return _Scene(a, f"{s} and {c}", facts[0], b, f"{t} and {d}", facts[1], "Describe the {t}.")


def _safety(rng: random.Random) -> _Scene:
    (a, b), (s, t) = _two(rng, HAZARD_NOUNS), _two(rng, tuple(HAZARDS))
    safe, harm = (advice.format(t=a) for advice in HAZARDS[s])
    other_safe, other_harm = (advice.format(t=b) for advice in HAZARDS[t])
    facts = f"the {a} is {s}", f"the {b} is {t}"
    question = "What should I do about the {t}?"
    return _Scene(a, safe, facts[0], b, other_safe, facts[1], question, harm, other_harm)


def _plan(rng: random.Random) -> _Scene:
    a, b = (f"{c} {n}" for c, n in zip(_two(rng, COLOURS), _two(rng, NOUNS), strict=True))
    p, q = _two(rng, PLACES)
    safe, harm = (route.format(t=a, place=p) for route in ROUTES)
    other_safe, other_harm = (route.format(t=b, place=q) for route in ROUTES)
    facts = f"the {a} must go {p}", f"the {b} must go {q}"
    question = "How should I take the {t} there?"
    return _Scene(a, safe, facts[0], b, other_safe, facts[1], question, harm, other_harm)


_SCENES: dict[str, Callable[[random.Random], _Scene]] = dict(
    zip(
        CHAT_KINDS,
        (_where, _colour, _count, _compare, _describe, _safety, _plan),
        strict=True,
    )
)


def ask_other(prompt: ChatPrompt) -> ChatPrompt:
    """The bare question about a prompt's other thing, to follow in the same conversation.

    A comparison has none: both things are in its one question.
    """
    facts = prompt.facts
    swapped = {key: facts[f"other_{key}"] for key in ("value", "harm")}
    swapped |= {f"other_{key}": facts[key] for key in ("value", "harm")}
    swapped |= {"topic": facts["other"], "other": facts["topic"]}
    return ChatPrompt(facts["other_question"], prompt.kind, {**facts, **swapped})


def _two(rng: random.Random, items: Sequence[T]) -> tuple[T, T]:
    first, second = rng.sample(items, 2)
    return first, second


def split_of(prompt: ChatPrompt) -> Split:
    """The split a prompt belongs to, by a hash of its composition.

    The composition is the kind, the thing asked about, what is to be said of it, and the two
    requests. A held-out composition never occurs in the train split, in whatever wording or
    next to whatever other thing; its single words all do.
    """
    facts = prompt.facts
    key = "|".join((prompt.kind, facts["topic"], facts["value"], facts["manner"], facts["length"]))
    digest = hashlib.sha256(key.encode()).digest()
    return "heldout" if digest[0] % HELDOUT_SHARE == 0 else "train"


def draw_prompt(rng: random.Random, split: Split = "train", kind: str | None = None) -> ChatPrompt:
    """One prompt of a split, of a kind if given, else of any."""
    while True:
        chosen = kind or rng.choice(CHAT_KINDS)
        prompt = _dress(rng, chosen, _SCENES[chosen](rng))
        if split_of(prompt) == split:
            return prompt


def _dress(rng: random.Random, kind: str, scene: _Scene) -> ChatPrompt:
    manner = rng.choice(tuple(MANNERS))
    length = rng.choices(tuple(LENGTHS), weights=(3, 3, 2))[0]
    facts = [scene.fact, scene.other_fact]
    rng.shuffle(facts)
    first, second = facts
    statement = f"{first[0].upper()}{first[1:]} and {second}."
    wording = rng.randrange(2)
    greeting = MANNERS[manner][wording]
    question = scene.question.format(t=scene.topic)
    body = [statement, question, rng.choice(LENGTHS[length])]
    # The first wording of a manner opens the prompt, the second closes it.
    parts = [greeting, *body] if wording == 0 else [*body, greeting]
    return ChatPrompt(
        text=" ".join(part for part in parts if part),
        kind=kind,
        facts={
            "topic": scene.topic,
            "value": scene.value,
            "other": scene.other,
            "other_value": scene.other_value,
            "harm": scene.harm,
            "other_harm": scene.other_harm,
            "other_question": scene.question.format(t=scene.other),
            "manner": manner,
            "length": length,
        },
    )


def make_prompts(n: int, seed: int, split: Split = "train") -> list[ChatPrompt]:
    """``n`` different prompts of a split that leave the length open, the same for the same seed."""
    rng = random.Random(f"prompts-{split}-{seed}")
    prompts: dict[str, ChatPrompt] = {}
    while len(prompts) < n:
        prompt = draw_prompt(rng, split)
        if prompt.facts["length"] == "any":
            prompts.setdefault(prompt.text, prompt)
    return list(prompts.values())
