"""A model's own answers as preference rows: sample several to a prompt, label them, keep the best
and the worst.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from tqdm.auto import tqdm

from alignkit.asking import as_asked, digest_of, read_prompts
from alignkit.atomic import atomic_folder, atomic_write
from alignkit.config import RunConfig, to_mapping
from alignkit.draws import generator
from alignkit.errors import ConfigError, DataError
from alignkit.methods import DPO
from alignkit.options import GenerationOptions, LoRA
from alignkit.parts import build_wing, modality_of
from alignkit.preferences import Judged, by_judge, by_reward, preference_row
from alignkit.protocols import PreferenceJudge, Reward, Wing
from alignkit.records import keep_or_refuse
from alignkit.reward_names import name_of, reward_of
from alignkit.rows import Row
from alignkit.runtime import Runtime

log = logging.getLogger("alignkit")

PART = 64
"""Prompts that are sampled and labelled together; what a kill can cost."""


def sample_preferences(
    policy: Any,
    prompts: Any,
    *,
    out: str | Path,
    reward: Any = None,
    judge: PreferenceJudge | None = None,
    samples_per_prompt: int = 4,
    soft_labels: bool = False,
    adapter: LoRA | None = None,
    columns: Mapping[str, str] | None = None,
    generation: GenerationOptions | None = None,
    seed: int = 0,
) -> Path:
    """Generate and rank: a model answers each prompt several times, and a reward or judge says
    which of its answers is best and which is worst.

    Main arguments:
        policy: as `align` takes it, a language model or a diffusers pipeline.
        prompts: rows with `prompt`, as `align` takes data, or a list of prompts.
        out: the folder of rows, `metadata.jsonl` and pictures beside it, that `align` takes as
            data: pairs, and rankings of all answers. Called again after a kill, it goes on where it
            was.
        reward: what `reward_names.reward_of` takes: a function, a scorer's name, or several with
            weights.
        judge: `(prompts, a, b, rows) -> P(a beats b)`, instead of a reward; asked in both orders.

    Other arguments:
        samples_per_prompt: answers to each prompt.
        soft_labels: give the judge's probabilities as `p_chosen`.
        adapter: `LoRA(continue_from=...)`, an adapter that the policy answers with.
        columns: our column name -> the prompts' own.
        generation: how the policy answers.
        seed: of the samples.

    Returns:
        The folder.

    Raises:
        ConfigError: for arguments that do not go together.
        CheckpointError: the folder was begun with other arguments.
        DataError: the prompts cannot be read, or no answer is preferred to another.
    """
    check_labels(reward, judge, samples_per_prompt, soft_labels)
    folder, modality = Path(out), modality_of(policy)
    rows = read_prompts(prompts, columns or {})
    scored = None if reward is None else reward_of(reward, modality)
    labeller = Labeller(scored, judge, samples_per_prompt, soft_labels)
    generation = generation or GenerationOptions()
    config = RunConfig(policy, DPO(), [], adapter=adapter, generation=generation, seed=seed)
    told = to_mapping(config)
    asked = labeller.describe() | {"prompts": digest_of(rows), "num_prompts": len(rows)}
    asked |= {name: told[name] for name in ("policy", "adapter", "generation", "seed")}
    if scored is not None:
        asked["labelled_by"] = name_of(reward, scored)
    keep_or_refuse(folder / "asked.json", asked, "answers")
    wing, lines = build_wing(config, modality, Runtime()), []
    try:
        for start in tqdm(range(0, len(rows), PART), desc="Sampling and labelling", disable=None):
            place = folder / f"part-{start // PART:06d}"
            if not place.exists():
                key = int(generator("samples", seed, start).integers(2**31))
                given = rows[start : start + PART]
                write_rows(place, labeller.label(wing, generation, given, seed=key))
            lines += [_moved(line, place.name) for line in _lines(place)]
    finally:
        wing.release()
    if not lines:
        raise nothing_preferred(len(rows))
    atomic_write(folder / "metadata.jsonl", "\n".join(lines) + "\n")
    log.info("%s: %d of %d prompts have a preference.", folder, len(lines), len(rows))
    return folder


Found = list[tuple[dict[str, Any], dict[str, Image]]]
"""Rows, each with its pictures by the names that stand in it."""


@dataclass(frozen=True)
class Labeller:
    """Samples answers and makes rows of what a reward or a judge thinks of them.

    Attributes:
        reward, judge: one of the two.
        samples: answers per prompt.
        soft_labels: whether rows have the judge's probability as `p_chosen`.
    """

    reward: Reward | None
    judge: PreferenceJudge | None
    samples: int
    soft_labels: bool

    def describe(self) -> dict[str, Any]:
        """What the rows depend on, besides prompts and policy."""
        by = self.judge if self.reward is None else self.reward
        name = getattr(by, "__qualname__", type(by).__qualname__)
        return {"samples": self.samples, "soft_labels": self.soft_labels, "labelled_by": name}

    def label(
        self, wing: Wing, generation: GenerationOptions, rows: Sequence[Row], *, seed: int
    ) -> Found:
        """The rows of those prompts among whose answers one is preferred to another."""
        prompts = [row["prompt"] for row in rows]
        given = wing.sample(prompts * self.samples, generation, seed=seed)
        # An empty answer cannot be a row; so it is not judged either.
        num = len(rows)
        answers = [[a for a in given[start::num] if a != ""] for start in range(num)]
        name = "responses" if wing.modality == "text" else "images"
        found: Found = []
        for index, judged in enumerate(self._judge(rows, answers)):
            row = {**rows[index], "prompt": as_asked(rows[index]["prompt"], wing.chat)}
            kept = [_name(answer, index, k) for k, answer in enumerate(answers[index])]
            made = preference_row(row, name, kept, judged, soft_labels=self.soft_labels)
            if made is not None:
                pairs = zip(kept, answers[index], strict=True)
                found.append((made, {k: a for k, a in pairs if isinstance(a, Image)}))
        return found

    def _judge(self, rows: Sequence[Row], answers: Sequence[Sequence[Any]]) -> list[Judged]:
        if self.reward is not None:
            return by_reward(self.reward, rows, answers)
        assert self.judge is not None
        return by_judge(self.judge, rows, answers)


def write_rows(place: Path, found: Found) -> None:
    """Write the folder `place` of rows and their pictures, all of it or nothing."""
    with atomic_folder(place) as temporary:
        for _, pictures in found:
            for name, picture in pictures.items():
                picture.save(temporary / name)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row, _ in found]
        (temporary / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def nothing_preferred(num: int) -> DataError:
    """The error of a sampling that no row came of."""
    return DataError(
        f"There is nothing to learn from: of none of the {num} prompts is one answer preferred to "
        "another. Raise samples_per_prompt or generation.temperature, or look at what the reward "
        "or judge says."
    )


def check_labels(reward: Any, judge: Any, samples: Any, soft_labels: bool) -> None:
    """Refuse ways to label that do not go together.

    Raises:
        ConfigError: there is not one of reward and judge, or fewer than two answers.
    """
    if (reward is None) == (judge is None):
        given = "neither" if reward is None else "both"
        raise ConfigError(f"Answers are labelled by a reward or by a judge; got {given}.")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ConfigError(
            f"samples_per_prompt must be a whole number of at least 2; got {samples!r}."
        )
    if soft_labels and judge is None:
        raise ConfigError(
            "soft_labels are the probabilities that a judge gives; a reward has none. Give a "
            "judge, or leave soft_labels out."
        )


def _lines(place: Path) -> list[str]:
    return (place / "metadata.jsonl").read_text(encoding="utf-8").splitlines()


def _moved(line: str, part: str) -> str:
    """A row whose pictures are named from the folder above."""
    row = json.loads(line)
    if "images" in row:
        row["images"] = [f"{part}/{name}" for name in row["images"]]
        row |= {side: f"{part}/{row[side]}" for side in ("chosen", "rejected")}
    return json.dumps(row, ensure_ascii=False)


def _name(answer: Any, index: int, k: int) -> str:
    """An answer as it stands in a row: the text, or the name of a file beside the rows."""
    return f"{index:06d}-{k}.png" if isinstance(answer, Image) else answer
