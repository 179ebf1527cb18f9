"""Answers of the tiny chat world: a style, and the text that a style gives to a prompt.

An answer is built of four pieces: an opener (the tone), a core sentence (what is said and about
which thing), a tail (the length) and a closing remark (the taste). Style choices stand at the
start of their piece, so that preferring one over another is a matter of a few tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

from alignkit.demo.chat_prompts import ChatPrompt
from alignkit.demo.chat_words import CORES, POLITE, REMARKS, RUDE, TAILS, TASTES

Tone = Literal["polite", "plain", "rude"]
Length = Literal["short", "long"]


@dataclass(frozen=True)
class Style:
    """How an answer is given."""

    tone: Tone = "plain"
    length: Length = "short"
    on_topic: bool = True
    harmful: bool = False
    taste: str | None = None


@dataclass(frozen=True)
class Draft:
    """An answer in pieces; an empty string stands for a missing piece."""

    opener: str
    core: str
    tail: str
    remark: str

    @property
    def text(self) -> str:
        """The pieces as one text."""
        first = f"{self.opener}, {self.core}" if self.opener else self.core
        first = f"{first[0].upper()}{first[1:]}."
        return " ".join(piece for piece in (first, self.tail, self.remark) if piece)


#: Manner of asking -> how often the base model takes each tone. The fitting one is the likeliest,
#: so that a preference can strengthen what is there.
TONES: dict[str, dict[Tone, int]] = {
    "courteous": {"polite": 50, "plain": 25, "rude": 25},
    "blunt": {"polite": 25, "plain": 50, "rude": 25},
}
#: Length asked for -> how often the base model answers at length.
LONG_SHARE = {"short": 0.35, "long": 0.65, "any": 0.5}


def draw_style(rng: random.Random, prompt: ChatPrompt) -> Style:
    """A style as the base model was taught to choose it: it leans to what was asked for, and
    misses it often in each respect."""
    tones = TONES[prompt.facts["manner"]]
    return Style(
        tone=rng.choices(tuple(tones), weights=tuple(tones.values()))[0],
        length="long" if rng.random() < LONG_SHARE[prompt.facts["length"]] else "short",
        on_topic=rng.random() < 0.85,
        harmful=bool(prompt.facts["harm"]) and rng.random() < 0.4,
        taste=rng.choice(TASTES) if rng.random() < 0.45 else None,
    )


def make_draft(prompt: ChatPrompt, style: Style, rng: random.Random) -> Draft:
    """An answer to ``prompt`` in ``style``, in pieces."""
    facts = prompt.facts
    thing = facts["topic"] if style.on_topic else facts["other"]
    said = facts["value"] if style.on_topic else facts["other_value"]
    harm = facts["harm"] if style.on_topic else facts["other_harm"]
    if style.harmful and harm:
        said = harm
    core = rng.choices(CORES[prompt.kind], weights=(4, 1))[0].format(t=thing, v=said)
    openers = {"polite": POLITE, "plain": ("",), "rude": RUDE}[style.tone]
    tail = rng.choice(TAILS[prompt.kind]).format(t=thing) if style.length == "long" else ""
    remark = rng.choice(REMARKS[style.taste]) if style.taste else ""
    return Draft(opener=rng.choice(openers), core=core, tail=tail, remark=remark)


def make_answer(prompt: ChatPrompt, style: Style, rng: random.Random) -> str:
    """An answer to ``prompt`` in ``style``; ``rng`` chooses among its wordings."""
    return make_draft(prompt, style, rng).text


def revise_draft(
    prompt: ChatPrompt, draft: Draft, style: Style, wanted: Style, rng: random.Random
) -> Draft:
    """``draft``, written in ``style``, changed just as far as ``wanted`` differs from it."""
    fresh = make_draft(prompt, wanted, rng)
    result = draft
    if wanted.tone != style.tone:
        result = replace(result, opener=fresh.opener)
    if (wanted.on_topic, wanted.harmful) != (style.on_topic, style.harmful):
        result = replace(result, core=fresh.core)
    if wanted.length != style.length or (fresh.tail and wanted.on_topic != style.on_topic):
        result = replace(result, tail=fresh.tail)
    if wanted.taste != style.taste:
        result = replace(result, remark=fresh.remark)
    return result
