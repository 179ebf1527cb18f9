"""Generate and rank: a model's own answers as preference rows."""

import json

import pytest

from alignkit import (
    DPO,
    CheckpointError,
    ConfigError,
    DataError,
    GenerationOptions,
    LoRA,
    TrainerOptions,
    align,
    sample_preferences,
)
from alignkit.demo.images import MODEL as PIPELINE
from alignkit.demo.text import MODEL as CHAT
from alignkit.rows import read_rows

PROMPTS = ["a red circle and a blue square", "a green triangle and a red circle", "a red square"]
SHORT = GenerationOptions(max_new_tokens=8)


def longest(prompts, responses, rows):
    return [float(len(response)) for response in responses]


def lines(folder):
    return (folder / "metadata.jsonl").read_text().splitlines()


def test_the_best_and_the_worst_answer_become_a_pair(tmp_path):
    out = sample_preferences(
        str(CHAT), PROMPTS, out=tmp_path / "rows", reward=longest, generation=SHORT
    )
    rows = list(read_rows(out))
    assert rows
    for row in rows:
        assert len(row["responses"]) <= 4
        assert len(row["chosen"]) == max(map(len, row["responses"]))
        assert len(row["rejected"]) == min(map(len, row["responses"]))
    trainer = TrainerOptions(max_steps=1, batch_size=1)
    assert align(str(CHAT), DPO(), out, trainer=trainer).history[0]["loss"] == pytest.approx(
        0.6931472
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
def test_pictures_are_ranked_beside_their_rows(tmp_path):
    steps = GenerationOptions(steps=2)

    def bright(prompts, images, rows):
        return [image.convert("L").resize((1, 1)).getpixel((0, 0)) for image in images]

    out = sample_preferences(
        str(PIPELINE), PROMPTS, out=tmp_path / "rows", reward=bright,
        samples_per_prompt=2, generation=steps,
    )  # fmt: skip
    for row in read_rows(out):
        assert all((out / name).is_file() for name in row["images"])
    trainer = TrainerOptions(max_steps=1, batch_size=1)
    result = align(str(PIPELINE), DPO(), out, trainer=trainer)
    assert result.history[0]["loss"] == pytest.approx(0.6931472)


def test_sampling_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("alignkit.labeller.PART", 1)
    calls = []

    def dies_once(prompts, responses, rows):
        calls.append(prompts[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return longest(prompts, responses, rows)

    def sample(out, reward):
        return sample_preferences(
            str(CHAT), PROMPTS, out=tmp_path / out, reward=reward, generation=SHORT
        )

    with pytest.raises(KeyboardInterrupt):
        sample("killed", dies_once)
    killed = sample("killed", dies_once)
    assert calls == [PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[2]]
    whole = sample("whole", longest)
    assert list(map(json.loads, lines(killed))) == list(map(json.loads, lines(whole)))
    with pytest.raises(CheckpointError, match="labelled_by"):
        sample("killed", longest)


def refuses(words, folder, **change):
    """Going on in a folder that was begun by `test_sampling_goes_on_only_as_it_was_begun`."""
    given = {"prompts": PROMPTS[:2], "reward": longest, "generation": SHORT, **change}
    with pytest.raises(CheckpointError, match=f"begun otherwise: {words}"):
        sample_preferences(str(CHAT), given.pop("prompts"), out=folder, **given)


def test_sampling_goes_on_only_as_it_was_begun(tmp_path):
    sample_preferences(str(CHAT), PROMPTS[:2], out=tmp_path, reward=longest, generation=SHORT)
    # As many prompts, but others; the same prompts, but rows that a reward reads otherwise.
    refuses("prompts: ", tmp_path, prompts=PROMPTS[1:])
    refuses("prompts: ", tmp_path, prompts=[{"prompt": one, "tag": "x"} for one in PROMPTS[:2]])
    refuses("generation.max_new_tokens: 8 before, 9 now", tmp_path,
            generation=GenerationOptions(max_new_tokens=9))  # fmt: skip
    refuses("adapter: null before", tmp_path, adapter=LoRA(continue_from="elsewhere"))
    refuses("seed: 0 before, 1 now", tmp_path, seed=1)


def test_what_cannot_be_ranked_is_told(tmp_path):
    with pytest.raises(ConfigError, match="neither"):
        sample_preferences(str(CHAT), PROMPTS, out=tmp_path)
    with pytest.raises(ConfigError, match="at least 2"):
        sample_preferences(str(CHAT), PROMPTS, out=tmp_path, reward=longest, samples_per_prompt=1)
    with pytest.raises(DataError, match="nothing to learn from"):
        sample_preferences(
            str(CHAT), PROMPTS[:1], out=tmp_path, reward=lambda p, r, rows: [1.0] * len(r),
            generation=SHORT,
        )  # fmt: skip
