"""Iterative preference optimisation: rounds of sampling, labelling and one offline phase each.

A composition of `align()` calls: round n starts from what round n - 1 left, its policy answers the
prompts, a reward or judge labels the answers, and one run of its own trains on them.

Xu et al. 2023 (2312.16682); Dong et al. 2024 (2405.07863); Pang et al. 2024 (2404.19733).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from alignkit.api import align
from alignkit.asking import digest_of, read_prompts
from alignkit.assemble import continued
from alignkit.config import NOT_COMPARED, RunConfig, check, to_mapping
from alignkit.criteria import criterion_of
from alignkit.draws import generator
from alignkit.errors import ConfigError
from alignkit.labeller import (
    Labeller,
    check_labels,
    nothing_preferred,
    write_rows,
)
from alignkit.methods import KTO, SFT, Method, Preference, RewardModel
from alignkit.options import GenerationOptions, ImageOptions, LoRA, TextOptions, TrainerOptions
from alignkit.parts import build_wing, modality_of
from alignkit.protocols import PreferenceJudge, Reward
from alignkit.records import keep_or_refuse
from alignkit.result import AlignResult
from alignkit.rows import Row
from alignkit.runtime import Runtime

log = logging.getLogger("alignkit")


def align_rounds(
    policy: str | Path,
    method: Method,
    prompts: Any,
    *,
    run_dir: str | Path,
    reward: Reward | None = None,
    judge: PreferenceJudge | None = None,
    rounds: int = 3,
    samples_per_prompt: int = 2,
    soft_labels: bool = False,
    reference: Literal["round", "first"] = "round",
    adapter: LoRA | None = None,
    data_options: TextOptions | ImageOptions | None = None,
    generation: GenerationOptions | None = None,
    trainer: TrainerOptions | None = None,
    eval_data: Any = None,
    seed: int = 0,
) -> AlignResult:
    """Align a model in rounds, each on preferences among its own answers.

    Main arguments:
        policy: a folder or hub name. A model in hand is refused: each round starts from the files
            of the one before.
        method: of each round; a loss of pairs sees the best and the worst answer to each prompt, a
            loss of rankings all of them.
        prompts: rows with `prompt`, as `align` takes data, or a list of prompts.
        run_dir: holds `round-1`, `round-2` ..., each a run folder, and `answers/round-1` ... with
            what each round trained on. Called again, it goes on where it was: a finished round is
            not redone, and answers that were labelled are not sampled or labelled again. More
            `rounds` may be asked for than before; anything else that changed is refused.
        reward: `(prompts, responses, rows) -> scores`, None for an answer without one.
        judge: `(prompts, a, b, rows) -> P(a beats b)`, instead of a reward; asked in both orders.

    Other arguments:
        rounds: how many.
        samples_per_prompt: answers that the policy gives to each prompt of a round.
        soft_labels: train on the judge's probabilities (`p_chosen`) instead of its verdicts.
        reference: "round" compares each round's policy with its own start, "first" with the policy
            that was handed in. They converge to different policies.
        adapter: trained in the first round and continued in the later ones; None trains all
            weights.
        data_options, trainer, eval_data: of each round's run; `data_options.columns` renames
            columns of `prompts`.
        generation: how the policy answers, and how reports sample. An answer that
            `max_new_tokens` cuts is judged as it is: leave room.
        seed: of everything; each round samples with a key of its own.

    Returns:
        The result of the last round.

    Raises:
        ConfigError: for options that do not go together, before anything is loaded.
        DataError: for prompts that cannot be read, or a round in which no answer is preferred.
        CheckpointError: for a `run_dir` of rounds that were asked for otherwise.
    """
    _check_rounds(policy, rounds)
    check_labels(reward, judge, samples_per_prompt, soft_labels)
    folder, modality = Path(run_dir), modality_of(policy)
    first = RunConfig(
        policy,
        method,
        str(folder / "answers" / "round-1"),
        eval_data=eval_data,
        reference=_reference(reference, policy, adapter),
        adapter=adapter,
        data_options=None if data_options is None else replace(data_options, columns={}),
        generation=generation or GenerationOptions(),
        trainer=trainer or TrainerOptions(),
        run_dir=folder / "round-1",
        seed=seed,
    )
    check(first, modality)
    if not isinstance(method, Preference) or criterion_of(method, modality).kind.rows == "unpaired":
        others = {
            SFT: "demonstrations",
            KTO: "single labelled ones",
            RewardModel: "labelled rows",
        }
        read = others.get(type(method), "prompts")
        raise ConfigError(
            f"Rounds prefer answers to one another, and {type(method).__name__} reads {read}. Take "
            "DPO() with a loss of pairs or rankings."
        )
    rows = read_prompts(prompts, {} if data_options is None else data_options.columns)
    labeller = Labeller(reward, judge, samples_per_prompt, soft_labels)
    asked = {**to_mapping(first), **labeller.describe(), "prompts": digest_of(rows)}
    runtime = Runtime()
    keep_or_refuse(
        folder / "rounds.json", asked, "rounds", ignored=NOT_COMPARED, write=runtime.is_main
    )
    for number, config in _phases(first, modality, folder, rounds):
        if runtime.is_main and not Path(config.data).exists():
            _answer(Path(config.data), labeller, config, modality, rows, number)
        runtime.barrier()
        result = align(**{field.name: getattr(config, field.name) for field in fields(config)})
    return result


def _phases(
    first: RunConfig, modality: str, folder: Path, rounds: int
) -> Iterator[tuple[int, RunConfig]]:
    """The rounds that are not finished, and the last one, each going on from the one before."""
    config = first
    for number in range(1, rounds + 1):
        if number > 1:
            config = replace(
                continued(config, modality, folder / f"round-{number - 1}" / "model"),
                data=str(folder / "answers" / f"round-{number}"),
                run_dir=folder / f"round-{number}",
            )
        if number == rounds or not (folder / f"round-{number}" / "result.json").exists():
            yield number, config


def _answer(
    place: Path,
    labeller: Labeller,
    config: RunConfig,
    modality: str,
    rows: Sequence[Row],
    number: int,
) -> None:
    """Sample, label and write the rows of a round.

    Raises:
        DataError: if the answers to no prompt are preferred to one another.
    """
    wing = build_wing(config, modality, Runtime())
    seed = int(generator("rounds", config.seed, number).integers(2**31))
    found = labeller.label(wing, config.generation, rows, seed=seed)
    wing.release()
    if not found:
        raise nothing_preferred(len(rows))
    log.info("Round %d: %d of %d prompts have a preference.", number, len(found), len(rows))
    write_rows(place, found)


def _reference(wanted: str, policy: str | Path, adapter: LoRA | None) -> str:
    if wanted == "round":
        # Of a fresh adapter off, of weights or an adapter that go on a copy: their start.
        return "auto"
    if wanted != "first":
        raise ConfigError(f"reference of rounds is 'round' or 'first'; got {wanted!r}.")
    if adapter is None:
        return str(policy)
    if adapter.continue_from is not None:
        raise ConfigError(
            "reference='first' compares every round with the policy that was handed in, and an "
            "adapter on top of it (adapter.continue_from) is not among its files. Merge the "
            "adapter into the policy first, or write reference='round'."
        )
    return "adapter_off"


def _check_rounds(policy: Any, rounds: Any) -> None:
    if not isinstance(policy, (str, Path)):
        raise ConfigError(
            "The policy of rounds is a folder or hub name, since each round starts from the files "
            f"of the one before; got {type(policy).__name__}. Save it with save_pretrained first."
        )
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ConfigError(f"rounds must be a whole number of at least 1; got {rounds!r}.")
