"""The proof that images learn relations: its world by hand, and every step of it run small."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignkit.demo.scene_drawing import Scene, SceneObject, read_prompt, render

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def test_beside_is_how_far_two_things_are_from_standing_side_by_side() -> None:
    from relation_world import APART, MISSING, beside

    def picture(x: float, y: float) -> Image.Image:
        red = SceneObject("circle", "red", 0.3, 0.2, 0.12)
        return render(Scene((red, SceneObject("square", "blue", x, y, 0.12)), "white"))

    assert beside("a red circle and a blue square", picture(0.7, 0.3)) == pytest.approx(
        -0.1 - abs(0.4 - APART), abs=0.03
    )
    assert beside("a blue square and a red circle", picture(0.4, 0.8)) == pytest.approx(
        -0.6 - abs(0.1 - APART), abs=0.03
    )
    assert beside("a red circle and a green square", picture(0.7, 0.3)) == MISSING


@pytest.mark.slow
def test_pairs_differ_in_the_relation_alone() -> None:
    from relation_world import CLEAR, LEVEL, TIES, WRONG, beside, make_rows

    rows = make_rows(200, 0)
    held = {row["caption"] for row in make_rows(50, 0, split="heldout")}
    assert not held & {row["caption"] for row in rows}
    gaps, colours = [], []
    for row in rows:
        pair = [Image.open(io.BytesIO(row[side])).convert("RGB") for side in ("jpg_0", "jpg_1")]
        prompt = read_prompt(row["caption"])
        gaps.append(beside(prompt, pair[0]) - beside(prompt, pair[1]))
        first, second = (np.asarray(picture, dtype=float).mean((0, 1)) for picture in pair)
        colours.append(np.abs(first - second).max())
    true = np.array([row["true"] for row in rows])
    people = np.array([row["people"] for row in rows])
    told = true != 0.5
    assert np.all(np.abs(np.array(gaps)[~told]) < LEVEL)
    assert np.all(np.array(gaps)[told] * (2 * true[told] - 1) >= CLEAR)
    # Renderings tint and scale a little; of 255 that is all that a mean colour can see.
    assert np.median(colours) < 4
    assert 1 - told.mean() == pytest.approx(TIES, abs=0.06)
    assert np.mean(true[told] != people[told]) == pytest.approx(WRONG, abs=0.08)
    assert np.array_equal(people == 0.5, ~told)


@pytest.mark.slow
def test_the_proof_in_small(tmp_path: Path) -> None:
    import prove_images_learn as proof

    found = proof.prove(tmp_path, proof.QUICK, ["scorer"])
    assert 0 <= found["scorer"]["accuracy"] <= 1
    assert found["arms"]["scorer"]["win_rate"]["num"] == proof.QUICK.prompts
    assert (tmp_path / "figures.json").is_file()
    # What is there is kept: nothing is trained again.
    assert proof.prove(tmp_path, proof.QUICK, ["scorer"])["arms"] == found["arms"]
    with pytest.raises(SystemExit, match="another size or seed"):
        proof.prove(tmp_path, proof.QUICK, ["scorer"], seed=1)


def test_bars_are_missed_by_what_is_below_them() -> None:
    import prove_images_learn as proof

    def arm(won: float, low: float = -1e-4) -> dict[str, dict[str, float]]:
        return {"win_rate": {"value": won}, "error/chosen": {"low": low}}

    good = {"true": arm(0.9), "noisy": arm(0.6), "soft": arm(0.7), "robust": arm(0.86)}
    assert proof.misses({"arms": good | {"scorer": arm(0.86)}}) == []
    assert len(proof.misses({"arms": good | {"scorer": arm(0.84)}})) == 1
    assert len(proof.misses({"arms": good | {"scorer": arm(0.86, low=1e-4)}})) == 1
    assert len(proof.misses({"arms": good | {"scorer": arm(0.9), "robust": arm(0.84)}})) == 1
