"""The README.md of `model/`: what it is, how to load it, how it was made."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from alignkit.facts import BETA_CONVENTION, ReportFacts, duration, label, show

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_TEXT_LORA = """\
from peft import PeftModel
from transformers import {loader}, AutoTokenizer

folder = {folder}
base = {base_model}
model = PeftModel.from_pretrained(base, folder)
tokenizer = AutoTokenizer.from_pretrained({tokenizer})"""

_TEXT_FULL = """\
from transformers import {loader}, AutoTokenizer

folder = {folder}
model = {loader}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained({tokenizer})"""

_IMAGE_LORA = """\
from diffusers import DiffusionPipeline

folder = {folder}
pipeline = {base_model}
pipeline.load_lora_weights(folder)
image = pipeline("a lighthouse at dawn").images[0]"""

_IMAGE_FULL = """\
from diffusers import DiffusionPipeline

folder = {folder}
pipeline = DiffusionPipeline.from_pretrained(folder)
image = pipeline("a lighthouse at dawn").images[0]"""


def model_card(facts: ReportFacts, *, base: str | None, modality: str, files: Iterable[str]) -> str:
    """The README.md of the folder `model/`.

    Args:
        facts: of the run.
        base: the model that was trained: hub name or folder; None for a model handed in. Of
            absolute paths, only what lies below the working directory or the last name is told.
        modality: "text" or "image".
        files: names of the files in `model/`. They tell an adapter (`adapter_config.json`,
            `pytorch_lora_weights.safetensors`) from a full model, and a kohya-style file beside it.
    """
    names = sorted(files)
    adapter = {"adapter_config.json", "pytorch_lora_weights.safetensors"} & set(names)
    library = "diffusers" if modality == "image" else "peft" if adapter else "transformers"
    front = _front_matter(facts, base, modality, library, bool(adapter))
    kohya = [name for name in names if name.endswith(".safetensors") and "kohya" in name]
    parts = [
        f"---\n{front}---",
        f"# {_line(facts.title)}",
        f"{'An adapter for' if adapter else 'Trained from'} {_base_words(base)}, aligned with "
        "preferences by alignkit.",
        "## Load it",
        f"```python\n{_loading_code(facts, base, modality, names, bool(adapter))}\n```",
    ]
    if kohya:
        listed = ", ".join(f"`{_line(name)}`" for name in kohya)
        parts.append(f"For programs that read kohya-style LoRA files, take {listed}.")
    parts += ["## How it was trained", _facts_table(facts)]
    if facts.evaluation:
        parts += ["## Evaluation", _evaluation_table(facts)]
    parts += ["## Intended use and limits", _limits(facts, modality)]
    if facts.citations:
        entries = "\n\n".join(_fenced(entry) for entry in facts.citations)
        parts += ["## Citations", f"```bibtex\n{entries}\n```"]
    return "\n\n".join(parts) + "\n"


def _front_matter(
    facts: ReportFacts, base: str | None, modality: str, library: str, adapter: bool
) -> str:
    # In one line, so that no value can hold the line that ends the front matter.
    method = " ".join(str(facts.method.get("name", "")).split())
    tags = ["alignkit", *([method] if method else []), *(["lora"] if adapter else [])]
    front: dict[str, Any] = {"library_name": library}
    if base is not None and _HUB_NAME.fullmatch(base) and not Path(base).exists():
        front["base_model"] = base
    text = "text-classification" if _scores(facts) else "text-generation"
    front["pipeline_tag"] = "text-to-image" if modality == "image" else text
    front["tags"] = tags
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10_000)


def _public(place: Any) -> Any:
    """A path without what only its owner should see: cards are made to be published."""
    path = Path(str(place))
    if not path.is_absolute():
        return place
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return path.name


def _loading_code(
    facts: ReportFacts, base: str | None, modality: str, names: list[str], adapter: bool
) -> str:
    folder = f"{_public(facts.run_dir).rstrip('/')}/model" if facts.run_dir else "model"
    base = None if base is None else _public(base)
    scores = modality == "text" and _scores(facts)
    loader = {"image": "DiffusionPipeline", "text": "AutoModelForCausalLM"}[modality]
    loader = "AutoModelForSequenceClassification" if scores else loader
    more = ", num_labels=1" if scores else ""
    given = "...  # the model that was trained"
    template = {
        ("text", True): _TEXT_LORA,
        ("text", False): _TEXT_FULL,
        ("image", True): _IMAGE_LORA,
        ("image", False): _IMAGE_FULL,
    }[modality, adapter]
    return template.format(
        folder=f"{folder!r}  # this folder, or its name on the hub",
        base_model=given if base is None else f"{loader}.from_pretrained({base!r}{more})",
        loader=loader,
        tokenizer="folder" if base is None or _has_tokenizer(names) else repr(base),
    )


def _scores(facts: ReportFacts) -> bool:
    """Whether the model gives a number and no answers."""
    return str(facts.policy.get("class", "")).endswith("ForSequenceClassification")


def _has_tokenizer(names: list[str]) -> bool:
    return any(name.startswith("tokenizer") for name in names)


def _base_words(base: str | None) -> str:
    return "a model handed in by its owner" if base is None else f"`{_line(_public(base))}`"


def _facts_table(facts: ReportFacts) -> str:
    method = dict(facts.method)
    convention = method.pop("beta_convention", None) or BETA_CONVENTION.get(facts.modality, "")
    rows: dict[str, str] = {}
    for prefix, mapping in (("", method), ("policy: ", facts.policy), ("data: ", facts.data)):
        rows |= {prefix + label(key): show(_public(value)) for key, value in mapping.items()}
    if method.get("beta"):
        rows["beta"] += f" ({convention})"
    if facts.seconds is not None:
        rows["time"] = duration(facts.seconds)
    return _table(("", ""), rows)


def _evaluation_table(facts: ReportFacts) -> str:
    rows = {row.measure: f"{row} {row.verdict}".strip() for row in facts.evaluation}
    return _table(("measure", "value [interval]"), rows)


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(lines)


def _limits(facts: ReportFacts, modality: str) -> str:
    what = "give pictures" if modality == "image" else "give answers"
    what = "score answers higher that are" if _scores(facts) else what
    return (
        f"The model is meant to {what} like those that its preference data preferred, with the "
        "biases of that data and of its base model, whose licence and limits go on to apply. "
        "It was not tested for safety beyond what stands above; judge it on your own prompts first."
    )


def _line(text: str) -> str:
    """Text from outside in one line of Markdown, without HTML and without an end of code."""
    return html.escape(" ".join(str(text).split()), quote=False).replace("`", "'")


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _fenced(text: str) -> str:
    return text.strip().replace("```", "'''")
