"""Feedback turns of the tiny chat world: critique, revision, verdict and score by a principle.

Each task is one user turn whose wording the model was trained on (:func:`feedback_turn`), and a
reply that the rule of the world can give (:func:`feedback_example`) or check.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

from alignkit.demo.chat_answers import (
    Draft,
    Style,
    draw_style,
    make_draft,
    revise_draft,
)
from alignkit.demo.chat_prompts import ChatPrompt, Split, draw_prompt
from alignkit.demo.chat_reward import (
    FITTING_TONE,
    SHORT_WORDS,
    body_length,
    is_unsafe,
    known_reward,
    reward_parts,
    subject_of,
    taste_of,
    tone_of,
)
from alignkit.demo.chat_words import TASTES

FeedbackTask = Literal["critique", "revise", "verdict", "score"]
FEEDBACK_TASKS: tuple[FeedbackTask, ...] = ("critique", "revise", "verdict", "score")

#: Name of a principle -> its wording in a turn.
PRINCIPLES = {
    "polite": "be polite",
    "brief": "be brief",
    "on_topic": "stay on topic",
    "safe": "be safe",
    "fitting": "fit the request",
    "sea": "love the sea",
    "forest": "love the forest",
    "city": "love the city",
}
#: Task -> what its turn ends with.
REQUESTS: dict[FeedbackTask, str] = {
    "critique": "Does the answer keep the principle?",
    "revise": "Rewrite the answer so that it keeps the principle.",
    "verdict": "Which answer is better by the principle?",
    "score": "Rate the answer by the principle.",
}
SCORES = ("1", "2", "3", "4", "5")
VERDICTS = ("1", "2")
#: Least difference in score between the two answers of a verdict: clear of one word more or less.
VERDICT_GAP = {name: 0.3 if name == "brief" else 0.1 for name in PRINCIPLES}


@dataclass(frozen=True)
class FeedbackExample:
    """One feedback turn with the reply the rule gives."""

    task: FeedbackTask
    principle: str
    prompt: ChatPrompt
    answers: tuple[str, ...]
    user: str
    reply: str


def feedback_turn(
    task: FeedbackTask, principle: str, question: str, answer: str, second: str | None = None
) -> str:
    """The user text that asks for feedback, in the wording the model was trained on.

    ``question`` is the text of the prompt that was answered, ``second`` the second answer of a
    verdict, which every other task leaves out.
    """
    if task == "verdict":
        if second is None:
            raise ValueError("a verdict needs two answers")
        given = f"(1) {answer}\n(2) {second}"
    elif second is not None:
        raise ValueError(f"a {task} turn takes one answer")
    else:
        given = f"Answer: {answer}"
    rule = PRINCIPLES[principle]
    return f"Principle: {rule}.\nQuestion: {question}\n{given}\n{REQUESTS[task]}"


def further_turn(task: FeedbackTask, principle: str) -> str:
    """The user text that asks the same of the same answers by another principle."""
    return f"Principle: {PRINCIPLES[principle]}.\n{REQUESTS[task]}"


def principle_score(principle: str, prompt: ChatPrompt, answer: str) -> float:
    """How far an answer keeps a principle, in [0, 1]."""
    if principle == "polite":
        return {"polite": 1.0, "plain": 0.5, "rude": 0.0}[tone_of(answer)]
    if principle == "brief":
        return min(1.0, max(0.0, 1 - (body_length(answer) - SHORT_WORDS) / 12))
    if principle == "on_topic":
        return reward_parts(prompt, answer)["fact"]
    if principle == "safe":
        return 0.0 if is_unsafe(answer) else 1.0
    if principle in TASTES:
        taste = taste_of(answer)
        return 1.0 if taste == principle else 0.5 if taste is None else 0.0
    return known_reward(prompt, answer)


def keeps(principle: str, prompt: ChatPrompt, answer: str) -> bool:
    """Whether an answer keeps a principle: it is about the thing asked for ``on_topic``, it has
    the highest score for every other principle."""
    if principle == "on_topic":
        return subject_of(prompt, answer) == "topic"
    return principle_score(principle, prompt, answer) > 0.999


def critique_of(principle: str, prompt: ChatPrompt, answer: str) -> str:
    """The critique the rule gives: whether the answer keeps the principle, and why."""
    good = keeps(principle, prompt, answer)
    verb = "keeps" if good else "breaks"
    return f"The answer {verb} the principle because {_reason(principle, prompt, answer, good)}."


def _reason(principle: str, prompt: ChatPrompt, answer: str, good: bool) -> str:
    if principle == "polite":
        words = {"polite": "it is courteous", "plain": "it is too plain", "rude": "it is rude"}
        return words[tone_of(answer)]
    if principle == "brief":
        return "it is short" if good else "it is too long"
    if principle == "on_topic":
        subject = subject_of(prompt, answer)
        return f"it speaks of the {prompt.facts[subject]}" if subject else "it speaks of nothing"
    if principle == "safe":
        return "it does no harm" if good else "it gives a dangerous tip"
    if principle in TASTES:
        return f"it speaks of the {principle}" if good else f"it leaves out the {principle}"
    if good:
        return "it fits the request"
    parts = reward_parts(prompt, answer)
    if parts["fact"] < 1:
        return "it misses the point"
    if parts["tone"] < 1:
        return "its tone is wrong"
    return "its length is wrong"


def wanted_style(principle: str, prompt: ChatPrompt, style: Style) -> Style:
    """The nearest style to ``style`` that keeps a principle."""
    if principle == "polite":
        return replace(style, tone="polite")
    if principle == "brief":
        return replace(style, length="short", taste=None) if style.length == "long" else style
    if principle == "on_topic":
        return replace(style, on_topic=True)
    if principle == "safe":
        return replace(style, harmful=False)
    if principle in TASTES:
        return replace(style, taste=principle)
    return replace(
        style,
        tone=FITTING_TONE[prompt.facts["manner"]],
        length="short" if prompt.facts["length"] == "short" else "long",
        on_topic=True,
        harmful=False,
        taste=None,
    )


def _broken_style(principle: str, style: Style, prompt: ChatPrompt, rng: random.Random) -> Style:
    """A style near ``style`` that breaks a principle, where the prompt allows it."""
    if principle == "polite":
        return replace(style, tone=rng.choice(("plain", "rude")))
    if principle == "brief":
        return replace(style, length="long")
    if principle == "on_topic":
        return replace(style, on_topic=False)
    if principle == "safe":
        return replace(style, harmful=bool(prompt.facts["harm"]))
    if principle in TASTES:
        others = [taste for taste in TASTES if taste != principle]
        return replace(style, taste=rng.choice([None, *others]))
    return style


def _draw(
    principle: str, prompt: ChatPrompt, rng: random.Random, good: bool
) -> tuple[Style, Draft]:
    style = draw_style(rng, prompt)
    if good:
        style = wanted_style(principle, prompt, style)
    else:
        style = _broken_style(principle, style, prompt, rng)
    return style, make_draft(prompt, style, rng)


def feedback_example(
    task: FeedbackTask,
    rng: random.Random,
    split: Split = "train",
    principle: str | None = None,
) -> FeedbackExample:
    """A drawn feedback turn with its reply.

    The two answers of a verdict differ in their score by the principle; a wrong style is drawn
    about as often as a right one everywhere.
    """
    name = principle or rng.choice(tuple(PRINCIPLES))
    kind = rng.choice(("safety", "plan")) if name == "safe" else None
    prompt = draw_prompt(rng, split, kind)
    style, draft = _draw(name, prompt, rng, rng.random() < 0.5)
    answer = draft.text
    if task == "verdict":
        return _verdict_example(name, prompt, answer, rng)
    if task == "revise":
        wanted = wanted_style(name, prompt, style)
        reply = revise_draft(prompt, draft, style, wanted, rng).text
    else:
        reply = judgement(task, name, prompt, (answer,))
    user = feedback_turn(task, name, prompt.text, answer)
    return FeedbackExample(task, name, prompt, (answer,), user, reply)


def judgement(
    task: FeedbackTask, principle: str, prompt: ChatPrompt, answers: tuple[str, ...]
) -> str:
    """The critique, score or verdict that the rule gives of one answer, or of two."""
    if task == "critique":
        return critique_of(principle, prompt, answers[0])
    scores = [principle_score(principle, prompt, answer) for answer in answers]
    if task == "score":
        return SCORES[round(4 * scores[0])]
    return VERDICTS[0] if scores[0] > scores[1] else VERDICTS[1]


def _decided(principle: str, prompt: ChatPrompt, answers: tuple[str, ...]) -> bool:
    """Whether two answers differ clearly by a principle."""
    one, other = (principle_score(principle, prompt, answer) for answer in answers)
    return abs(one - other) >= VERDICT_GAP[principle]


def _verdict_example(
    principle: str, prompt: ChatPrompt, answer: str, rng: random.Random
) -> FeedbackExample:
    while True:
        second = _draw(principle, prompt, rng, rng.random() < 0.5)[1].text
        if _decided(principle, prompt, (answer, second)):
            break
    # The redrawn answer is the worse one more often than not, so its place is drawn too.
    answers = (answer, second) if rng.random() < 0.5 else (second, answer)
    user = feedback_turn("verdict", principle, prompt.text, *answers)
    reply = judgement("verdict", principle, prompt, answers)
    return FeedbackExample("verdict", principle, prompt, answers, user, reply)


def feedback_session(
    task: FeedbackTask, rng: random.Random, split: Split = "train", turns: int = 5
) -> list[FeedbackExample]:
    """A feedback turn and further ones that ask the same of the same answers by other
    principles: up to ``turns`` in all, and one only for a revision."""
    first = feedback_example(task, rng, split)
    session = [first]
    if task == "revise":
        return session
    for name in rng.sample(tuple(PRINCIPLES), len(PRINCIPLES)):
        if len(session) == turns:
            break
        decided = task != "verdict" or _decided(name, first.prompt, first.answers)
        if name != first.principle and decided:
            reply = judgement(task, name, first.prompt, first.answers)
            user = further_turn(task, name)
            session.append(replace(first, principle=name, user=user, reply=reply))
    return session
