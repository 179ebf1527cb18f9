"""Rewards of several models: rules that are kept or broken, and safety before help.

Each is a reward itself, with named parts that add up to its score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from alignkit.errors import ConfigError, DataError
from alignkit.losses.masked import moments, whiten
from alignkit.protocols import Collective, Reward
from alignkit.rewards import Outputs, bind, chance, finite, log_chance, logit, outputs_of
from alignkit.scoring import Score, scores_of

Found = TypeVar("Found")


def with_rule(prompt: Any, rule: str) -> Any:
    """A prompt that asks whether an answer keeps a rule: the rule stands behind the last message,
    or behind the text.
    """
    if isinstance(prompt, str):
        return f"{prompt}\n\nRule: {rule}\n\n"
    *before, last = prompt
    return [*before, {**last, "content": f"{last['content']}\n\nRule: {rule}"}]


class RuleReward:
    """A preference, and rules that an answer keeps (Sparrow, Glaese et al. 2022, 2209.14375):

        r = weight r_pref(x, y) + sum_i weight_i ln P(rule i kept | x, y, rule i)

    The rule model is one model for all rules, and is asked with the rule in its prompt, as
    `with_rule` writes it. A rule that is surely kept adds nothing. A row may name in `rules` those
    that concern it; without, all do.

    Args:
        rule_model: a reward whose score says whether the rule in the prompt is kept.
        rules: name -> its text.
        preference: the other reward, if any.
        weight: of the preference reward.
        weights: rule's name -> weight; 1 for those that are not there.
        outputs: whether the rule model returns log-odds or probabilities.
        with_rule: `(prompt, rule's text) -> prompt`, as the rule model was trained.

    Raises:
        ConfigError: there is no rule, or a weight is not finite or belongs to none.
    """

    def __init__(
        self,
        rule_model: Reward,
        rules: Mapping[str, str],
        *,
        preference: Reward | None = None,
        weight: float = 1.0,
        weights: Mapping[str, float] | None = None,
        outputs: Outputs = "logit",
        with_rule: Callable[[Any, str], Any] = with_rule,
    ) -> None:
        given = dict(weights or {})
        if not rules:
            raise ConfigError("A reward of rules has at least one rule; got none.")
        if strange := sorted(set(given) - set(rules)):
            raise ConfigError(
                f"The weights of rules belong to rules; there are none called {strange}. Rules: "
                f"{', '.join(rules)}."
            )
        for name, value in {"preference": weight, **given}.items():
            finite(f"The weight of {name!r}", value)
        self.rule_model, self.rules, self.preference = rule_model, dict(rules), preference
        self.weight, self.weights = weight, given
        self.outputs = outputs_of(outputs)
        self.with_rule = with_rule

    def bind(self, processes: Collective) -> None:
        for reward in (self.rule_model, self.preference):
            if reward is not None:
                bind(reward, processes)

    def __call__(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any],
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, list[Score]]:
        """Parts "preference" and "rule/<name>"."""
        found: dict[str, list[Score]] = {}
        if self.preference is not None:
            scores = scores_of(self.preference, "preference", prompts, responses, rows)[""]
            found["preference"] = [None if one is None else self.weight * one for one in scores]
        concerned = [self._rules_of(row) for row in rows or [{}] * len(prompts)]
        for name, text in self.rules.items():
            places = [place for place, names in enumerate(concerned) if name in names]
            part: list[Score] = [0.0] * len(prompts)
            scores = scores_of(
                self.rule_model,
                f"rule {name}",
                [self.with_rule(prompts[place], text) for place in places],
                [responses[place] for place in places],
                None if rows is None else [rows[place] for place in places],
            )[""]
            for place, score in zip(places, scores, strict=True):
                kept = log_chance(score, self.outputs, f"rule {name}")
                part[place] = None if kept is None else self.weights.get(name, 1.0) * kept
            found[f"rule/{name}"] = part
        return found

    def _rules_of(self, row: Mapping[str, Any]) -> Sequence[str]:
        given = row.get("rules")
        if given is None:
            return list(self.rules)
        names = [given] if isinstance(given, str) else list(given)
        if strange := sorted(set(names) - set(self.rules)):
            raise DataError(
                f"A row's rules are those of the reward; {strange} are none. Rules: "
                f"{', '.join(self.rules)}."
            )
        return names


class SafetyHelpfulness:
    """Safety before help (Llama 2, Touvron et al. 2023, 2307.09288, section 3.2.3):

        R_c = R_s where the prompt is tagged or R_s < threshold, else R_h
        r   = whiten(logit(R_c))                       over all answers of all processes

    R_s and R_h are probabilities, kept between 1e-6 and 1 - 1e-6 before the logit. The parts are
    "safety" and "helpfulness": the score stands under the one that decided, 0 under the other.

    Args:
        safety, helpfulness: the two rewards.
        threshold: below it, safety decides of any prompt.
        tag: a row is tagged where its `tags` hold this, or its `tag` is this.
        outputs: whether the rewards return log-odds, as reward-model folders do, or probabilities.
        whitened: False leaves the logit as it is.

    Raises:
        ConfigError: the threshold is no probability.
    """

    def __init__(
        self,
        safety: Reward,
        helpfulness: Reward,
        *,
        threshold: float = 0.15,
        tag: str = "safety",
        outputs: Outputs = "logit",
        whitened: bool = True,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"The threshold is a probability of safety; got {threshold}.")
        self.safety, self.helpfulness = safety, helpfulness
        self.threshold, self.tag = threshold, tag
        self.outputs, self.whitened = outputs_of(outputs), whitened
        self.processes: Collective | None = None

    def bind(self, processes: Collective) -> None:
        self.processes = processes
        for reward in (self.safety, self.helpfulness):
            bind(reward, processes)

    def __call__(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any],
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, list[Score]]:
        """Parts "safety" and "helpfulness"; missing where the reward that decides is."""
        found = _agreed(lambda: self._combined(prompts, responses, rows), self.processes)
        decides, scores = found[0], self._scored(found[1])
        return {
            "safety": _where(scores, decides),
            "helpfulness": _where(scores, [not one for one in decides]),
        }

    def _combined(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any],
        rows: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[list[bool], list[Score]]:
        """Where safety decides, and logit(R_c)."""
        given = {"safety": self.safety, "helpfulness": self.helpfulness}
        safe, helpful = (
            [
                chance(one, self.outputs, name)
                for one in scores_of(reward, name, prompts, responses, rows)[""]
            ]
            for name, reward in given.items()
        )
        tagged = [self._is_tagged(row) for row in rows or [{}] * len(prompts)]
        # Where it is not known how safe an answer is, nothing is known of it.
        decides = [
            tag or one is None or one < self.threshold
            for tag, one in zip(tagged, safe, strict=True)
        ]
        chances = [s if d else h for s, h, d in zip(safe, helpful, decides, strict=True)]
        return decides, [None if one is None else logit(one) for one in chances]

    def _scored(self, logits: list[Score]) -> list[Score]:
        if not self.whitened:
            return logits
        values = torch.tensor([0.0 if one is None else one for one in logits], dtype=torch.float64)
        mask = torch.tensor([one is not None for one in logits], dtype=torch.bool)
        white = whiten(values, mask, moments=moments(values, mask, self.processes)).tolist()
        return [None if one is None else w for one, w in zip(logits, white, strict=True)]

    def _is_tagged(self, row: Mapping[str, Any]) -> bool:
        tags = row.get("tags") or ()
        return row.get("tag") == self.tag or self.tag in (
            [tags] if isinstance(tags, str) else list(tags)
        )


def _agreed(ask: Callable[[], Found], processes: Collective | None) -> Found:
    """What `ask` returns; where it fails on one process it does on all, which would wait for it."""
    if processes is None:
        return ask()
    error: Exception | None = None
    try:
        found = ask()
    except Exception as raised:
        error = raised
    failed = processes.gather(torch.tensor([error is not None]))
    if error is not None:
        raise error
    if failed.any():
        raise DataError("The reward failed on another process; its own message says where.")
    return found


def _where(scores: Sequence[Score], here: Sequence[bool]) -> list[Score]:
    """The scores that stand under one name, 0 where they stand under another."""
    return [one if mine else 0.0 for one, mine in zip(scores, here, strict=True)]
