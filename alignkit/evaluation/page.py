"""What an evaluation leaves: numbers in JSON, answers beside them, and a page to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignkit.atomic import atomic_folder, atomic_write
from alignkit.errors import ConfigError
from alignkit.evaluation.answers import Answers
from alignkit.evaluation.edits import Strip
from alignkit.facts import EvaluationRow, ReportFacts, label, show
from alignkit.pages import render
from alignkit.records import to_json
from alignkit.report import result_card
from alignkit.run_folder import environment
from alignkit.sample_tables import MOST_ROWS, picture


@dataclass
class Evaluation:
    """What came of an evaluation.

    Attributes:
        model, against: the names of the two; `against` None without an opponent.
        modality: "text" or "image".
        measures: key -> measure, most important first.
        answers: prompts and answers, where some were asked for.
        strips: edited pictures.
        settings: what it was told.
        warnings: what a reader must know.
        folder: where the page is; None if nothing was written.
    """

    model: str
    against: str | None
    modality: str
    measures: dict[str, EvaluationRow]
    answers: Answers | None = None
    strips: Sequence[Strip] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    folder: Path | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Key -> value."""
        return {key: row.value for key, row in self.measures.items()}

    @property
    def page(self) -> Path | None:
        """The page, if it was written."""
        return None if self.folder is None else self.folder / "index.html"

    def __str__(self) -> str:
        width = max((len(row.measure) for row in self.measures.values()), default=0)
        lines = [_title(self)]
        lines += [
            f"  {r.measure:<{width}}  {f'{r}  {r.verdict}'.rstrip()}"
            for r in self.measures.values()
        ]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines + ([f"Page: {self.page}"] if self.folder else []))


MARK = "evaluation.json"


def refuse_other_files(folder: Path) -> None:
    """Raise `ConfigError` for a folder that holds something else than an earlier evaluation."""
    others = folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file()
    if folder.is_file() or others:
        raise ConfigError(
            f"An evaluation writes a folder of its own, and {folder} holds other files. Name a new "
            "one."
        )


def write_evaluation(found: Evaluation, folder: Path) -> None:
    """Write `evaluation.json`, `answers.jsonl`, pictures and `index.html`, all of it or nothing.

    Args:
        found: what came of it.
        folder: new, or an earlier evaluation's.
    """
    with atomic_folder(folder) as place:
        cells = [] if found.answers is None else _write_answers(found.answers, place)
        strips = [_write_strip(strip, number, place) for number, strip in enumerate(found.strips)]
        told = {
            "model": found.model,
            "against": found.against,
            "modality": found.modality,
            "measures": {key: asdict(row) for key, row in found.measures.items()},
            "settings": found.settings,
            "warnings": list(found.warnings),
            "environment": environment(),
        }
        atomic_write(place / MARK, to_json(told, "evaluation", indent=1) + "\n")
        facts = ReportFacts(title=_title(found), evaluation=tuple(found.measures.values()))
        page = render(
            "evaluation.html.j2",
            title=_title(found),
            result=result_card(facts),
            warnings=found.warnings,
            columns=list(short_names(*([found.against] if found.against else []), found.model)),
            rows=cells[:MOST_ROWS],
            left_out=max(0, len(cells) - MOST_ROWS),
            pictures=found.modality == "image",
            strips=strips,
            strengths=found.settings.get("edit") or [],
            settings=[(label(key), show(value)) for key, value in found.settings.items() if value],
        )
        (place / "index.html").write_text(page, encoding="utf-8")


def short_names(*names: str) -> tuple[str, ...]:
    """The last two parts of paths, which fit over a picture; the whole, where those are alike."""
    found = tuple("/".join(Path(name).parts[-2:]) for name in names)
    return found if len(set(found)) == len(names) else names


def _title(found: Evaluation) -> str:
    return f"{found.model} against {found.against}" if found.against else found.model


def _write_answers(answers: Answers, place: Path) -> list[dict[str, Any]]:
    """`answers.jsonl` and pictures; returns the page's rows."""
    sides = {"before": answers.before, "after": answers.after}
    lines, cells = [], []
    for index, text in enumerate(answers.texts):
        line: dict[str, Any] = {"prompt": text}
        shown = []
        for number, (side, given) in enumerate(sides.items()):
            if not given:
                continue
            answer = given[index]
            if not isinstance(answer, str):
                (place / side).mkdir(exist_ok=True)
                line[side] = f"{side}/{index:04d}.png"
                answer.save(place / line[side])
            else:
                line[side] = answer
            scores = {name: pair[number][index] for name, pair in answers.scores.items()}
            line |= {f"{name} {side}": score for name, score in scores.items()}
            told = [f"{name}: {show(s)}" for name, s in scores.items() if s is not None]
            cell = answer
            if not isinstance(answer, str):
                cell = picture(place / line[side]) if index < MOST_ROWS else None
            shown.append({"answer": cell, "note": "; ".join(told)})
        lines.append(to_json(line, "answers") + "\n")
        cells.append({"prompt": text, "answers": shown})
    (place / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
    return cells


def _write_strip(strip: Strip, number: int, place: Path) -> dict[str, Any]:
    folder = place / "edits"
    folder.mkdir(exist_ok=True)

    def kept(one: Any, name: str) -> Any:
        path = folder / f"{number:03d}-{name}.png"
        one.save(path)
        return picture(path)

    sides = zip(short_names(*strip.rows), strip.rows.values(), strict=True)
    rows = {
        side: [kept(one, f"{index}-{nth}") for nth, one in enumerate(made)]
        for index, (side, made) in enumerate(sides)
    }
    source = kept(strip.source, "source")
    return {"prompt": strip.prompt, "way": strip.way, "source": source, "rows": rows}
