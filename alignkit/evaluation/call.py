"""`evaluate()`: a model against another one, on held-out pairs and on answers of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.capabilities import DrawsInStrata, Samples
from alignkit.criteria import criterion_of
from alignkit.errors import ConfigError
from alignkit.evaluation.answers import (
    Answers,
    Side,
    answer,
    judge_measures,
    reward_measures,
    text_measures,
)
from alignkit.evaluation.asked import OFF, Asked, Opponent
from alignkit.evaluation.edits import Strip, edit_measures, edit_strips
from alignkit.evaluation.likelihoods import (
    Measures,
    pair_measures,
    pair_numbers,
    prompt_key,
    same_tokens,
)
from alignkit.evaluation.page import Evaluation, refuse_other_files, write_evaluation
from alignkit.evaluation.sheet import refuse_other_sheet, write_sheet
from alignkit.methods import DPO
from alignkit.objectives.preference import PreferenceObjective
from alignkit.options import GenerationOptions, ImageOptions, TextOptions
from alignkit.protocols import PreferenceJudge, Reference
from alignkit.reference import FrozenModel, SwitchedAdapter
from alignkit.reward_names import name_of, reward_of
from alignkit.rows import Row, read_rows
from alignkit.runtime import Runtime
from alignkit.trained import Source, load, source_of

ALL = 2**31
"""More prompts than any data has."""


def evaluate(
    model: Any,
    *,
    against: Any = "auto",
    data: Any = None,
    prompts: Any = None,
    reward: Any = None,
    judge: PreferenceJudge | None = None,
    out: str | Path | None = None,
    edit: Sequence[float] = (),
    sheet: str | Path | None = None,
    data_options: TextOptions | ImageOptions | None = None,
    generation: GenerationOptions | None = None,
    prompt_column: str | None = None,
    num_prompts: int | None = None,
    precision: str = "auto",
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a model, against what it was trained from or against another one.

    Main arguments:
        model: a run folder or result, a model folder, a hub name, `(model, tokenizer)`, a pipeline.
        against: the opponent, in the same forms; "auto" is what the run began with, or the model
            without its adapter; "none" is nobody; anything with `sample(prompts, options, *, seed)`
            answers, such as `alignkit_diffusion.BaseAndRefiner`.
        data: held-out pairs, as `align` takes data: implicit accuracy, margins, drift; for images
            on a fixed bank of `data_options.eval_draws` timesteps and noises.
        prompts: a file (see `prompt_files.read_prompts`) or list of prompts that both sides answer
            from the same seed; left out, the distinct prompts of `data`, if answers are asked for.
        reward: `(prompts, responses, rows) -> scores`, or what else `reward_names.reward_of` takes.
        judge: `(prompts, a, b, rows) -> P(a beats b)`, asked in both orders.
        out: a folder for `index.html`, `evaluation.json`, `answers.jsonl` and pictures.

    Other arguments:
        edit: strengths at which pictures are edited, image to image and by inpainting.
        sheet: a folder for a blind sheet that people fill; see `read_sheets`.
        data_options, generation: as for `align`; a run's own generation options hold without.
        prompt_column: of a table of prompts.
        num_prompts: the first so many only.
        precision: as in `TrainerOptions`.
        confidence, num_resamples: of the intervals: a paired bootstrap over prompts.
        seed: of samples, draws, resamples and the sheet's order.

    Raises:
        ConfigError: for arguments that do not go together, before anything is loaded.
        DataError: for rows or prompts that cannot be used, and for a reward or judge that fails.
    """
    asked = Asked(
        model=model,
        against=against,
        data=data,
        prompts=prompts,
        reward=reward,
        judge=judge,
        edit=tuple(edit),
        sheet=sheet,
        data_options=data_options,
        generation=generation,
        prompt_column=prompt_column,
        num_prompts=num_prompts,
        precision=precision,
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )
    source = source_of(model)
    opponent = asked.opponent(source)
    asked.check(source, opponent)
    rows = asked.rows(source.modality)
    if out is not None:
        refuse_other_files(Path(out))
    if sheet is not None:
        refuse_other_sheet(Path(sheet), out)
    found = _Evaluator(asked, source, opponent).run(rows)
    if out is not None:
        found.folder = Path(out)
        write_evaluation(found, found.folder)
    if sheet is not None:
        assert found.answers is not None
        write_sheet(sheet, found.answers, modality=found.modality, seed=seed)
    return found


class _Evaluator:
    """Loads both sides, measures, and gives them back."""

    def __init__(self, asked: Asked, source: Source, opponent: Opponent) -> None:
        self.asked = asked
        self.source = source
        self.runtime = Runtime()
        if self.runtime.size > 1:
            raise ConfigError(
                f"An evaluation runs in one process; got {self.runtime.size}. Start it without a "
                "launcher."
            )
        self.warnings: list[str] = []
        # Before a model is loaded: a name that leads nowhere should not take so long to refuse.
        device = str(self.runtime.device)
        self.reward = (
            None
            if asked.reward is None
            else reward_of(asked.reward, source.modality, device=device)
        )
        how: dict[str, Any] = {"precision": asked.precision, "seed": asked.seed}
        self.wings = [load(source, self.runtime, **how)]
        try:
            self.model = Side(source.name, self.wings[0])
            self.opponent = self._side(opponent, how)
        except BaseException:
            self._give_back()
            raise

    def _side(self, opponent: Opponent, how: dict[str, Any]) -> Side | None:
        if opponent is None:
            return None
        wing = self.wings[0]
        if isinstance(opponent, str):
            assert opponent == OFF
            told = self.source.told.get("policy")
            named = isinstance(told, str) and not told.startswith("<")
            name = str(told) if named else f"{self.source.name} without its adapter"
            return Side(name, wing, wing.adapters_off)
        if isinstance(opponent, Samples):
            return Side(type(opponent).__name__, opponent)
        self.wings.append(load(opponent, self.runtime, beside=wing, **how))
        self.wings[1].chat = wing.chat
        return Side(opponent.name, self.wings[1])

    def _give_back(self) -> None:
        for wing in reversed(self.wings):
            wing.undo()

    def run(self, rows: list[Row] | None) -> Evaluation:
        """All that was asked for."""
        asked, wing = self.asked, self.wings[0]
        try:
            measures: Measures = {}
            objective = self._objective()
            pairs = {} if asked.data is None else self._on_pairs(objective)
            answers, strips = None, []
            if asked.wants_answers:
                options = asked.generation or self.source.generation
                rows = self._rows() if rows is None else rows
                answers = answer(rows, self.model, self.opponent, options, asked.seed)
                answers.texts = [wing.prompt_text(prompt) for prompt in answers.prompts]
                measures |= self._worth(answers)
            measures |= pairs
            if answers is not None and answers.counted[1] is not None:
                measures |= self._of_texts(answers, objective, options)
            if asked.edit:
                assert answers is not None
                how: Any = (asked.edit, options, asked.seed)
                strips = edit_strips(answers, self.model, self.opponent, *how)
                measures |= self._of_edits(answers, strips)
        finally:
            self._give_back()
        return Evaluation(
            model=self.model.name,
            against=None if self.opponent is None else self.opponent.name,
            modality=wing.modality,
            measures=measures,
            answers=answers,
            strips=strips,
            settings=asked.described(),
            warnings=self.warnings,
        )

    def _worth(self, answers: Answers) -> Measures:
        """What the reward and the judge say of the answers."""
        measures: Measures = {}
        if self.reward is not None:
            name = name_of(self.asked.reward, self.reward)
            how = self.asked.how
            measures |= reward_measures(answers, self.reward, name, self.warnings, **how)
        if self.asked.judge is not None:
            judge = self.asked.judge
            name = getattr(judge, "__name__", type(judge).__name__)
            measures |= judge_measures(answers, judge, name, self.warnings, **self.asked.how)
        return measures

    def _of_edits(self, answers: Answers, strips: Sequence[Strip]) -> Measures:
        """Win rates of what both sides edited."""
        sides = [side.name for side in (self.opponent, self.model) if side is not None]
        if self.reward is None or len(strips[0].rows) < 2:
            return {}
        name = name_of(self.asked.reward, self.reward)
        given: Any = (answers.rows, self.asked.edit, sides, self.reward, name)
        return edit_measures(strips, *given, **self.asked.how)

    def _of_texts(
        self, answers: Answers, objective: PreferenceObjective | None, options: GenerationOptions
    ) -> Measures:
        """Token counts; and likelihoods, if both sides read the same tokens."""
        if objective is not None and not same_tokens(*(wing.tokenizer for wing in self.wings)):
            self.warnings.append(
                "Model and opponent have different tokenizers: no KL, and no fluency under the "
                "opponent."
            )
            objective = None
        given = (self.model, objective, options, self.runtime)
        return text_measures(answers, *given, **self.asked.how)

    def _objective(self) -> PreferenceObjective | None:
        """What gives log-ratios of the model to the opponent."""
        wing = self.wings[0]
        if self.opponent is None or self.opponent.wing not in self.wings:
            return None
        reference: Reference
        if len(self.wings) == 1:
            reference = SwitchedAdapter(wing.backend, wing.adapters_off)
        else:
            reference = FrozenModel(self.wings[1].backend.module)
        criterion = criterion_of(DPO(), wing.modality)
        objective = PreferenceObjective(wing.backend, reference, criterion, seed=self.asked.seed)
        objective.prepare(self.runtime)
        return objective

    def _rows(self) -> list[Row]:
        """The distinct prompts of the data."""
        limit = self.asked.num_prompts or ALL
        found = self.wings[0].prompts(self.asked.data, self._options(), limit)
        return [{"prompt": prompt} for prompt in found]

    def _options(self) -> Any:
        return (self.asked.data_options or self.wings[0].default_options).held_out()

    def _on_pairs(self, objective: PreferenceObjective | None) -> Measures:
        if objective is None:
            return {}
        if not same_tokens(*(wing.tokenizer for wing in self.wings)):
            raise ConfigError(
                "Held-out pairs are scored token by token, and model and opponent have different "
                "tokenizers. Leave data out and compare answers to prompts, or give an opponent of "
                "the same tokenizer."
            )
        wing, options = self.wings[0], self._options()
        chat = wing.chat
        examples = wing.examples(self.asked.data, options, kind="pairs", seed=self.asked.seed)
        rows = read_rows(self.asked.data, columns=options.columns)
        if "prompt_ids" in rows[0]:
            wing.chat = chat  # rows of ids say nothing of how strings are asked
        for other in self.wings[1:]:
            other.chat = wing.chat
        found = pair_numbers(objective, examples, options.eval_draws, self.runtime)
        prompts = [prompt_key(rows[number]) for number in found.row_id.tolist()]
        backend = wing.backend
        scale = backend.error_scale if isinstance(backend, DrawsInStrata) else None
        return pair_measures(found, prompts, scale, **self.asked.how)
