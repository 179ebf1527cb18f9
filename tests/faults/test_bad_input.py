"""Bad input through `align()`: one clear error or a counted skip; the folder stays usable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alignkit import (
    DPO,
    ConfigError,
    DataError,
    GenerationOptions,
    ImageOptions,
    LoRA,
    NonFiniteError,
    TextOptions,
    align,
)
from alignkit import checkpoint as checkpoint_files
from alignkit.api import build
from tests.builders import pair_rows, tiny_lm, tiny_tokenizer
from tests.faults.runs import checkpoints, lines_of, options, write_rows

Inputs = Callable[[str], Path]
SHORT = options(max_steps=2, save_every=1, sample_every=None)
FEW = GenerationOptions(max_new_tokens=2)


def _run(folder: Path, data: Any, run_dir: Path, **more: Any) -> Any:
    given = {"run_dir": run_dir, "trainer": SHORT, "generation": FEW, **more}
    return align(str(folder / "policy"), DPO(), data, **given)


def _skipped(run_dir: Path) -> dict[str, int]:
    return json.loads((run_dir / "result.json").read_text())["facts"]["data"]["skipped"]


def _assert_nothing_half_done(run_dir: Path) -> None:
    """Neither a checkpoint nor a model nor a temporary file; what a next attempt accepts."""
    found = [path for path in run_dir.rglob("*") if path.name != ".lock"]
    assert found == []


def _without(row: dict[str, Any], column: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != column}


PLAIN = pair_rows(8, chat=False)

WHOLLY_BAD: dict[str, tuple[str, str]] = {
    "empty file": ("", "at least one row"),
    "missing column": (
        "".join(json.dumps(_without(row, "rejected")) + "\n" for row in PLAIN),
        r"'rejected' is missing. Columns found: chosen, prompt",
    ),
    "a misspelt column": (
        "".join(json.dumps(_without(row, "chosen") | {"choosen": "a"}) + "\n" for row in PLAIN),
        r"Did you mean 'choosen'\?",
    ),
    "a broken line": (json.dumps(PLAIN[0]) + '\n{"prompt": "a", "cho', "line 2"),
    "only identical pairs": (
        json.dumps(PLAIN[0] | {"rejected": PLAIN[0]["chosen"]}) + "\n",
        "chosen and rejected are the same",
    ),
    "a weight of NaN": (json.dumps(PLAIN[0] | {"weight": float("nan")}) + "\n", "weight"),
}


@pytest.mark.parametrize("name", WHOLLY_BAD)
def test_data_that_cannot_be_used(name: str, inputs: Inputs, tmp_path: Path) -> None:
    """One DataError; after it the same run folder takes the mended data."""
    text, message = WHOLLY_BAD[name]
    data, run_dir = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text(text)
    with pytest.raises(DataError, match=message) as kept:  # a kept traceback must not matter
        _run(inputs("text"), data, run_dir)
    _assert_nothing_half_done(run_dir)
    write_rows(data, PLAIN)
    assert len(_run(inputs("text"), data, run_dir).history) == 2
    assert kept.value


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "empty completion": ({"chosen": " "}, "chosen is empty"),
    "no completion": ({"rejected": None}, "rejected must be a string"),
    "a number for an answer": ({"chosen": 3}, "chosen must be a string"),
    "negative weight": ({"weight": -1.0}, "weight"),
    "a probability above 1": ({"p_chosen": 1.5}, "p_chosen"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped_and_counted(
    name: str, inputs: Inputs, tmp_path: Path
) -> None:
    change, message = BAD_ROWS[name]
    rows = [*PLAIN[:3], PLAIN[3] | change, *PLAIN[4:]]
    data, run_dir = write_rows(tmp_path / "data.jsonl", rows), tmp_path / "run"
    with pytest.raises(DataError, match=rf"Row 3 .*{message}"):
        _run(inputs("text"), data, run_dir)
    _assert_nothing_half_done(run_dir)
    result = _run(inputs("text"), data, run_dir, data_options=TextOptions(on_bad_row="skip"))
    ((reason, count),) = _skipped(run_dir).items()
    assert message in reason and count == 1
    without = _run(inputs("text"), [*PLAIN[:3], *PLAIN[4:]], tmp_path / "without")
    assert [h["loss"] for h in result.history] == [h["loss"] for h in without.history]


def test_identical_pairs(inputs: Inputs, tmp_path: Path) -> None:
    rows = [*PLAIN, PLAIN[2] | {"rejected": PLAIN[2]["chosen"]}]
    _run(inputs("text"), rows, tmp_path / "run")
    assert _skipped(tmp_path / "run") == {"chosen and rejected are the same": 1}
    again = tmp_path / "again"
    with pytest.raises(DataError, match=r"Row 8 .*are the same"):
        _run(inputs("text"), rows, again, data_options=TextOptions(identical_pairs="error"))
    _run(inputs("text"), rows, again, data_options=TextOptions(identical_pairs="keep"))


def test_held_out_data_that_cannot_be_used(inputs: Inputs, tmp_path: Path) -> None:
    run_dir, held_out = tmp_path / "run", tmp_path / "held_out.jsonl"
    held_out.write_text("")
    with pytest.raises(DataError, match=r"held_out.jsonl is empty"):
        _run(inputs("text"), PLAIN, run_dir, eval_data=str(held_out))
    _assert_nothing_half_done(run_dir)


def test_a_folder_that_is_no_policy(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"config\.json.*model_index\.json"):
        _run(tmp_path, PLAIN, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_part_of_a_pipeline_is_no_policy(inputs: Inputs, tmp_path: Path) -> None:
    pipeline = inputs("image") / "policy"
    with pytest.raises(ConfigError, match=rf"UNet2DConditionModel alone.*'{pipeline}'"):
        align(str(pipeline / "unet"), DPO(), PLAIN, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wing", "file"),
    [
        ("text", "model.safetensors"),
        ("text", "config.json"),
        ("text", "tokenizer.json"),
        ("image", "unet/diffusion_pytorch_model.safetensors"),
        ("image", "unet/config.json"),
        ("image", "model_index.json"),
    ],
)
def test_a_policy_with_a_torn_file(wing: str, file: str, inputs: Inputs, tmp_path: Path) -> None:
    """As a broken download leaves it: a ConfigError that names the policy."""
    torn = shutil.copytree(inputs(wing) / "policy", tmp_path / "policy") / file
    raw = torn.read_bytes()
    torn.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ConfigError, match=str(tmp_path / "policy")):
        _run(tmp_path, PLAIN, tmp_path / "run", generation=GenerationOptions())
    _assert_nothing_half_done(tmp_path / "run")


def _poisoned() -> tuple[Any, Any, list[dict[str, Any]]]:
    """A model with NaN in the embedding of a token that only row 5 holds."""
    rows = [dict(row) for row in PLAIN]
    rows[5]["chosen"] += " ~"
    model, tokenizer = tiny_lm("llama"), tiny_tokenizer()
    (token,) = tokenizer("~", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    return model, tokenizer, rows


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    """The row is named, its update is not made, and no checkpoint is written after it."""
    model, tokenizer, rows = _poisoned()
    run_dir = tmp_path / "run"
    trainer = options(epochs=1, max_steps=None, batch_size=1, save_every=1, sample_every=None)
    run = build((model, tokenizer), DPO(), rows, trainer=trainer, run_dir=run_dir, generation=FEW)
    with pytest.raises(NonFiniteError, match=r"Rows whose loss is not finite: 5\."):
        for _ in run.steps():
            pass
    done = run.trainer.step
    assert 0 < done < len(rows)
    assert len(lines_of(run_dir)) == done
    newest = run_dir / "checkpoints" / checkpoints(run_dir)[-1]
    assert newest.name == f"step-{done:06d}"
    saved = checkpoint_files.load(newest)["trainer"]["parameters"]
    for name, parameter in run.trainer.parameters.items():
        assert torch.equal(parameter.nan_to_num(), saved[name].nan_to_num()), name
        assert parameter.grad is None
    mended = align(
        (tiny_lm("llama"), tokenizer),
        DPO(),
        rows,
        trainer=trainer,
        run_dir=run_dir,
        generation=FEW,
        resume="never",
    )
    assert len(mended.history) == len(rows)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """NaN everywhere: all rows of the batch are to blame, and nothing is left behind."""
    model, tokenizer = tiny_lm("llama"), tiny_tokenizer()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    trainer = options(max_steps=3, batch_size=8, save_every=1, sample_every=None)
    given = {"trainer": trainer, "generation": FEW, "run_dir": tmp_path / "run"}
    with pytest.raises(NonFiniteError, match=r"0, 1, 2, 3, 4, 5, 6, 7\."):
        align((model, tokenizer), DPO(), PLAIN, **given)
    for name in ("checkpoints", "model", "metrics.jsonl", "result.json"):
        assert not (tmp_path / "run" / name).exists()
    assert len(align((tiny_lm("llama"), tokenizer), DPO(), PLAIN, **given).history) == 3


def test_tokens_beyond_the_model(inputs: Inputs, tmp_path: Path) -> None:
    rows = [{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [9999]}]
    with pytest.raises(ConfigError, match="id 9999 and the model has 384 embeddings"):
        _run(inputs("text"), rows, tmp_path / "run")
    _assert_nothing_half_done(tmp_path / "run")


# --- pictures ----------------------------------------------------------------------------------


def _pictures(folder: Path, change: Callable[[Path], str]) -> Path:
    """Six pairs of JPEG files; `change` makes something of the last chosen one, and names it."""
    from tests.image.conftest import picture

    folder.mkdir()
    rows = []
    for i in range(6):
        row = {"prompt": "a red circle"}
        for side, seed in (("chosen", 2 * i), ("rejected", 2 * i + 1)):
            row[side] = f"{side}_{i}.jpg"
            picture(seed, 24, 20).save(folder / row[side])
        rows.append(row)
    rows[-1]["chosen"] = change(folder / rows[-1]["chosen"])
    write_rows(folder / "metadata.jsonl", rows)
    return folder


def _losses(inputs: Inputs, data: Path, **more: Any) -> list[float]:
    trainer = options(epochs=1, max_steps=None, batch_size=2, save_every=None, sample_every=None)
    given = {
        "adapter": LoRA(rank=2),
        "trainer": trainer,
        "generation": GenerationOptions(steps=1),
        **more,
    }
    history = align(str(inputs("image") / "policy"), DPO(), str(data), **given).history
    return [line["loss"] for line in history]


def _truncated(path: Path) -> str:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    return path.name


def _missing(path: Path) -> str:
    path.unlink()
    return path.name


def _text_file(path: Path) -> str:
    path.write_text("this is not a picture")
    return path.name


@pytest.mark.parametrize("change", [_truncated, _missing, _text_file])
def test_a_picture_that_cannot_be_read(
    change: Callable[[Path], str], inputs: Inputs, tmp_path: Path
) -> None:
    data, run_dir = _pictures(tmp_path / "data", change), tmp_path / "run"
    with pytest.raises(DataError, match=r"Row 5 .*chosen"):
        _losses(inputs, data, run_dir=run_dir)
    _assert_nothing_half_done(run_dir)
    _losses(inputs, data, run_dir=run_dir, data_options={"on_bad_row": "skip"})
    assert sum(_skipped(run_dir).values()) == 1
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join(lines[:-1]))
    assert [line["loss"] for line in lines_of(run_dir)] == _losses(inputs, data)


def _grey(path: Path) -> str:
    Image.open(path).convert("L").save(path.with_suffix(".png"))
    return f"{path.stem}.png"


def _grey_as_colour(path: Path) -> str:
    Image.open(path).convert("L").convert("RGB").save(path.with_suffix(".png"))
    return f"{path.stem}.png"


def _see_through(path: Path) -> str:
    """Fully transparent on its left half, whatever colour lies beneath."""
    pixels = np.asarray(Image.open(path).convert("RGBA")).copy()
    pixels[:, :12, 3] = 0
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    return f"{path.stem}.png"


def _on_white(path: Path) -> str:
    pixels = np.asarray(Image.open(path).convert("RGB")).copy()
    pixels[:, :12] = 255
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    return f"{path.stem}.png"


def _rotated(path: Path) -> str:
    """Stored on its side, with the note of a camera that it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path.with_suffix(".png"), exif=exif)
    return f"{path.stem}.png"


def _upright(path: Path) -> str:
    Image.open(path).transpose(Image.Transpose.ROTATE_270).save(path.with_suffix(".png"))
    return f"{path.stem}.png"


@pytest.mark.parametrize(
    ("change", "same_as"),
    [(_grey, _grey_as_colour), (_see_through, _on_white), (_rotated, _upright)],
    ids=["grey-scale", "alpha channel", "EXIF rotation"],
)
def test_a_picture_of_another_kind(
    change: Callable[[Path], str],
    same_as: Callable[[Path], str],
    inputs: Inputs,
    tmp_path: Path,
) -> None:
    """Used like the plain RGB picture that a person sees."""
    mine = _losses(inputs, _pictures(tmp_path / "data", change))
    assert mine == _losses(inputs, _pictures(tmp_path / "same", same_as))
    assert mine != _losses(inputs, _pictures(tmp_path / "plain", lambda path: path.name))


def test_image_options_hold(inputs: Inputs, tmp_path: Path) -> None:
    """Ties and identical pairs are counted; a resolution that does not fit is refused."""
    data = _pictures(tmp_path / "data", lambda path: "rejected_5.jpg")
    run_dir = tmp_path / "run"
    _losses(inputs, data, run_dir=run_dir)
    assert sum(_skipped(run_dir).values()) == 1
    with pytest.raises(ConfigError, match="multiple of"):
        _losses(inputs, data, data_options=ImageOptions(resolution=17))
