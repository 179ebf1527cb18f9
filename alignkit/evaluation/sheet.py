"""A blind sheet for people, and what filled ones say.

The human protocol of Wallace et al. 2023 (2311.12908, sec. 5.1): two pictures to a prompt, three
questions (which do you prefer given the prompt; which looks better, whatever the prompt; which fits
the prompt better), five labels of different people per item, the majority decides. Win rates are
over items.

Which side is A is drawn per item and stands in `key.json`, which raters do not see.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.atomic import atomic_folder, atomic_write
from alignkit.draws import generator
from alignkit.errors import ConfigError, DataError
from alignkit.evaluation.answers import Answers
from alignkit.evaluation.verdicts import verdicts_of
from alignkit.pages import render
from alignkit.protocols import PreferenceJudge, Reward
from alignkit.sample_tables import picture
from alignkit.scoring import scores_of

QUESTIONS: Mapping[str, Mapping[str, str]] = {
    "image": {
        "general": "Which image do you prefer, given the prompt?",
        "appeal": "Which image looks better, whatever the prompt says?",
        "alignment": "Which image fits the description better?",
    },
    "text": {
        "general": "Which answer do you prefer?",
        "alignment": "Which answer does what the prompt asks better?",
    },
}
LABELS = 5
"""Labels of different raters that the protocol wants of each item."""
FORMATS = (".csv", ".jsonl")


def refuse_other_sheet(folder: Path, out: str | Path | None) -> None:
    """Raise `ConfigError` for a folder that a sheet cannot have."""
    if out is not None and folder.resolve() == Path(out).resolve():
        raise ConfigError(
            f"The sheet is blind and the page is not, so they need two folders; both are {folder}."
        )
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"A sheet needs a new folder; {folder} holds files, which may be people's labels."
        )


def write_sheet(folder: str | Path, answers: Answers, *, modality: str, seed: int) -> Path:
    """Write a folder with `sheet.csv` and `sheet.jsonl` (either may be filled), `index.html` to
    look at, `key.json`, and pictures.

    Args:
        folder: a new one.
        answers: of both sides.
        modality: "text" or "image": which questions are asked.
        seed: of the order of sides and items.

    Raises:
        ConfigError: there are files in the folder.
    """
    folder = Path(folder)
    refuse_other_sheet(folder, None)
    num, questions = len(answers.after), QUESTIONS[modality]
    swapped = [bool(generator("sheet", seed, place).integers(2)) for place in range(num)]
    order = generator("sheet order", seed).permutation(num).tolist()
    with atomic_folder(folder) as place:
        items, shown = [], []
        for item, index in enumerate(order):
            pair = answers.before[index], answers.after[index]
            a, b = pair[::-1] if swapped[index] else pair
            told = {"item": item, "prompt": answers.texts[index]}
            sides = {"a": a, "b": b}
            for side, one in sides.items():
                told[side] = one if isinstance(one, str) else f"images/{item:04d}-{side}.png"
                if not isinstance(one, str):
                    (place / "images").mkdir(exist_ok=True)
                    one.save(place / told[side])
            pictures = {s: picture(_file(place, told[s], one)) for s, one in sides.items()}
            items.append(told)
            shown.append({**told, "pictures": pictures})
        blank = dict.fromkeys(questions, "")
        rows = [{**told, "rater": "", **blank} for told in items]
        with (place / "sheet.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (place / "sheet.jsonl").write_text("".join(lines), encoding="utf-8")
        key = {"modality": modality, "model_is": ["a" if swapped[i] else "b" for i in order]}
        (place / "key.json").write_text(json.dumps(key), encoding="utf-8")
        page = render(
            "sheet.html.j2",
            title="Which do you prefer?",
            items=shown,
            questions=questions,
            labels=LABELS,
        )
        (place / "index.html").write_text(page, encoding="utf-8")
    return folder


def fill_sheet(
    folder: str | Path,
    rater: str,
    *,
    reward: Reward | None = None,
    judge: PreferenceJudge | None = None,
    question: str = "general",
) -> Path:
    """Answer one question of a sheet by a scorer or a judge, as one more rater.

    Args:
        folder: of `write_sheet`.
        rater: its name; the filled sheet is `<rater>.jsonl` in the folder.
        reward: the answer of the higher score is preferred, equal scores are a tie.
        judge: asked in both orders; a mean of one half is a tie. One of the two.
        question: of the sheet.

    Raises:
        ConfigError: there is no sheet or question, or not one of reward and judge.
        DataError: see `scoring`.
    """
    folder = Path(folder)
    key = key_of(folder)
    questions = QUESTIONS[key["modality"]]
    if question not in questions:
        raise ConfigError(f"The sheet asks {', '.join(questions)}; got {question!r}.")
    if (reward is None) == (judge is None):
        raise ConfigError("A sheet is filled by a reward or by a judge; give one of them.")
    rows = rows_of(folder / "sheet.jsonl")
    prompts = [row["prompt"] for row in rows]
    a, b = ([_opened(folder, row[side], key["modality"]) for row in rows] for side in ("a", "b"))
    if judge is not None:
        # The share for the second one, so b.
        wins = verdicts_of(judge, rater, prompts, a, b, rows).preferences
    else:
        assert reward is not None
        first, second = (scores_of(reward, rater, prompts, side, rows)[""] for side in (a, b))
        wins = [
            None if x is None or y is None else 0.5 + 0.5 * (y > x) - 0.5 * (x > y)
            for x, y in zip(first, second, strict=True)
        ]
    path = folder / f"{rater}.jsonl"
    lines = [
        {"item": row["item"], "rater": rater, question: _label(won)}
        for row, won in zip(rows, wins, strict=True)
    ]
    atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def _file(place: Path, name: str, answer: Any) -> Path | None:
    return None if isinstance(answer, str) else place / name


def _label(b_wins: float | None) -> str:
    if b_wins is None:
        return ""
    return "tie" if b_wins == 0.5 else "b" if b_wins > 0.5 else "a"


def key_of(folder: Path) -> dict[str, Any]:
    """Modality, and which side the model is, item by item."""
    if not (folder / "key.json").is_file():
        raise ConfigError(
            f"A sheet is a folder that `alignkit evaluate --sheet` wrote, with key.json in it; "
            f"{folder} is none."
        )
    found: dict[str, Any] = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    return found


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a sheet, blank or filled."""
    if path.suffix not in FORMATS:
        raise DataError(f"Filled sheets end in {' or '.join(FORMATS)}; got {path}.")
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _opened(folder: Path, given: str, modality: str) -> Any:
    if modality == "text":
        return given
    from PIL import Image

    with Image.open(folder / given) as opened:
        return opened.convert("RGB")
