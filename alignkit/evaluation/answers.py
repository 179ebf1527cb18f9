"""What model and opponent answer to the same prompts from the same seed, and what it is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from alignkit.capabilities import CountsTokens, Sampled, Samples
from alignkit.errors import DataError
from alignkit.evaluation.likelihoods import Measures, pair_numbers
from alignkit.evaluation.verdicts import verdicts_of
from alignkit.facts import EvaluationRow
from alignkit.length_control import length_controlled_win_rate
from alignkit.objectives.preference import PreferenceObjective
from alignkit.options import GenerationOptions, TextOptions
from alignkit.protocols import PreferenceJudge, Reward
from alignkit.sample_files import lengths
from alignkit.scoring import Rows, Score, scores_of
from alignkit.statistics import mean, paired_difference, preference_rate, preferences


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: of the model.
        wing: that computes, or something else that answers.
        switched: a context in which the wing is this side: its adapter off, or nothing.
    """

    name: str
    wing: Samples
    switched: Callable[[], AbstractContextManager[None]] = nullcontext

    def sample(
        self, prompts: Sequence[Any], options: GenerationOptions, seed: int
    ) -> tuple[list[Any], Sampled | None]:
        """Answers, and their tokens where they have some."""
        with self.switched():
            if isinstance(self.wing, CountsTokens):
                sampled = self.wing.sample_counted(prompts, options, seed=seed)
                return list(sampled.answers), sampled
            return list(self.wing.sample(prompts, options, seed=seed)), None


@dataclass
class Answers:
    """The same prompts, answered by both.

    Attributes:
        rows: with `prompt`, and what else stood beside it.
        before: the opponent's answers; empty where there is none.
        after: the model's.
        counted: tokens of before and after, for text.
        scores: name -> scores before and after.
        texts: the prompts as people read them.
    """

    rows: Rows
    before: list[Any]
    after: list[Any]
    counted: tuple[Sampled | None, Sampled | None] = (None, None)
    scores: dict[str, tuple[list[Score], list[Score]]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)

    @property
    def prompts(self) -> list[Any]:
        return [row["prompt"] for row in self.rows]

    @property
    def keys(self) -> list[str]:
        """What is resampled together: entries of one prompt."""
        return [repr(prompt) for prompt in self.prompts]


def answer(
    rows: Rows, model: Side, opponent: Side | None, options: GenerationOptions, seed: int
) -> Answers:
    """Sample both sides from one seed."""
    prompts = [row["prompt"] for row in rows]
    after, counted = model.sample(prompts, options, seed)
    if opponent is None:
        return Answers(rows, [], after, (None, counted))
    before, counted_before = opponent.sample(prompts, options, seed)
    return Answers(rows, before, after, (counted_before, counted))


def reward_measures(
    answers: Answers, reward: Reward, name: str, warnings: list[str], **how: Any
) -> Measures:
    """Win rate, win rate at equal length, and difference of scores; per part of the reward."""
    rows, prompts = answers.rows, answers.prompts
    after = scores_of(reward, name, prompts, answers.after, rows)
    if not answers.before:
        means = {part: mean(values, prompts=answers.keys, **how) for part, values in after.items()}
        return {
            _key("score", part): replace(
                EvaluationRow.of(_called("score", name, part), one, better=None), neutral=None
            )
            for part, one in means.items()
        }
    before = scores_of(reward, name, prompts, answers.before, rows)
    measures: Measures = {}
    for part, values in after.items():
        if part not in before:
            raise DataError(
                f"The reward {name!r} gave the part {part!r} to one side's answers only. Give all "
                "answers the same parts, None where there is no score."
            )
        pair = before[part], values
        answers.scores[f"{name}/{part}" if part else name] = pair
        found = preferences(*pair)
        measures[_key("win_rate", part)] = EvaluationRow.of(
            _called("win rate over the opponent", name, part),
            preference_rate(found, prompts=answers.keys, **how),
        )
        measures |= _at_equal_length(answers, found, name, part, warnings, how)
        measures[_key("score", part)] = EvaluationRow.of(
            _called("score", name, part), paired_difference(*pair, prompts=answers.keys, **how)
        )
    return measures


def judge_measures(
    answers: Answers, judge: PreferenceJudge, name: str, warnings: list[str], **how: Any
) -> Measures:
    """Win rate by a judge of pairs, asked in both orders, and how often the order decided."""
    said = verdicts_of(judge, name, answers.prompts, answers.before, answers.after, answers.rows)
    missing: list[Score] = [None] * len(said.preferences)
    answers.scores[name] = (missing, said.preferences)
    rate = preference_rate(said.preferences, prompts=answers.keys, **how)
    measures = {"win_rate/judge": EvaluationRow.of(f"win rate over the opponent, by {name}", rate)}
    found = [np.nan if value is None else value for value in said.preferences]
    measures |= _at_equal_length(answers, found, name, "judge", warnings, how)
    if said.asked_twice:
        measures["judge_flips"] = EvaluationRow(
            measure=f"verdicts of {name} that changed with the order",
            value=said.flips / said.asked_twice,
            num=said.asked_twice,
            unit="share",
            note="both orders were asked, and their mean counts",
        )
    return measures


def _at_equal_length(
    answers: Answers, found: Any, name: str, part: str, warnings: list[str], how: Mapping[str, Any]
) -> Measures:
    """Text answers have lengths, and judges like long ones."""
    if answers.counted[1] is None:
        return {}
    short, long = ([len(one) for one in side] for side in (answers.before, answers.after))
    resamples = min(1_000, how.get("num_resamples", 1_000))
    try:
        rate = length_controlled_win_rate(
            found,
            short,
            long,
            prompts=answers.keys,
            **{**how, "num_resamples": resamples},
        )
    except DataError as error:
        warnings.append(f"No win rate at equal length (by {name}): {error}")
        return {}
    slope = f"slope of length {rate.slope:+.2f} [{rate.slope_low:+.2f}, {rate.slope_high:+.2f}]"
    row = EvaluationRow.of(
        _called("win rate at equal length", name, "" if part == "judge" else part),
        rate,
        note=f"length-controlled (2404.04475); {slope}",
    )
    return {_key("win_rate_at_equal_length", part): row}


def text_measures(
    answers: Answers,
    model: Side,
    objective: PreferenceObjective | None,
    options: GenerationOptions,
    runtime: Any,
    **how: Any,
) -> Measures:
    """Lengths of answers; with an opponent that reads the same tokens, KL and fluency under it."""
    measures: Measures = {}
    if objective is not None:
        whole = replace(options, temperature=1.0, top_p=1.0, top_k=0, stop=())
        # The KL is an expectation over the model itself: temperature 1, and nothing cut away.
        _, own = model.sample(answers.prompts, whole, how["seed"] + 1)
        assert own is not None
        ratios = _numbers_of(objective, model.wing, own, own, runtime).chosen[:, 0]
        measures["kl"] = EvaluationRow.of(
            "KL to the opponent, per answer",
            mean(ratios, prompts=answers.keys, **how),
            unit="nats",
            better=None,
            note="mean log-ratio on the model's own answers at temperature 1",
        )
        before, after = answers.counted
        assert before is not None and after is not None
        said = _numbers_of(objective, model.wing, after, before, runtime).own
        measures["fluency"] = EvaluationRow.of(
            "fluency under the opponent, per token",
            paired_difference(said[1][:, 0], said[0][:, 0], prompts=answers.keys, **how),
            unit="nats",
            note="change of the opponent's own log-prob of the answers",
        )
    sides = zip(("before", "after"), answers.counted, strict=True)
    told = {n: lengths([len(i) for i in s.answer_ids], s.cut) for n, s in sides if s is not None}
    for name, words in LENGTHS.items():
        values = {side: found[name] for side, found in told.items()}
        measures[f"length/{name}"] = EvaluationRow(
            measure=words,
            value=values["after"],
            before=values.get("before"),
            after=values["after"],
            num=len(answers.after),
            unit="share" if name == "cut" else "tokens",
        )
    return measures


LENGTHS = {
    "tokens_median": "length of answers, median",
    "tokens_p95": "length of answers, 95th percentile",
    "cut": "answers cut by max_new_tokens",
}


def _numbers_of(
    objective: PreferenceObjective, wing: Any, chosen: Sampled, rejected: Sampled, runtime: Any
) -> Any:
    """Both models' numbers of answers as they were sampled, token by token."""
    rows = [
        {"prompt_ids": prompt, "chosen_ids": one, "rejected_ids": other}
        for prompt, one, other in zip(
            chosen.prompt_ids, chosen.answer_ids, rejected.answer_ids, strict=True
        )
    ]
    longest = max(sum(map(len, row.values())) for row in rows)
    options = TextOptions(max_length=longest, identical_pairs="keep", packing="none")
    chat = wing.chat
    examples = wing.examples(rows, options, kind="pairs", seed=0)
    wing.chat = chat  # rows of ids say nothing of how strings are asked
    return pair_numbers(objective, examples, 1, runtime)


def _key(what: str, part: str) -> str:
    return f"{what}/{part}" if part else what


def _called(what: str, name: str, part: str) -> str:
    return f"{what}, by {name}" + (f": {part}" if part else "")
