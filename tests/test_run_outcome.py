"""What a finished run sends to the hub."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from alignkit import DPO, CheckpointError, LoRA, TrainerOptions, align
from tests.builders import pair_rows, tiny_lm, tiny_tokenizer

REAL = huggingface_hub.HfApi


class FakeHub:
    """Takes the calls that the real client takes, by its own signatures, and keeps them."""

    calls: list[tuple[str, dict[str, Any]]]
    fails = False

    def __getattr__(self, name: str) -> Any:
        signature = inspect.signature(getattr(REAL, name))

        def call(*args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs).arguments
            if FakeHub.fails:
                raise ConnectionError("no route to the hub")
            told = {key: value for key, value in bound.items() if key != "self"}
            if "folder_path" in told:
                told["files"] = {path.name for path in Path(told["folder_path"]).iterdir()}
            FakeHub.calls.append((name, told))

        return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    FakeHub.calls, FakeHub.fails = [], False
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return FakeHub


def run(run_dir: Path) -> Any:
    # A model in hand: with HF_HUB_OFFLINE taken off, nothing may look for names.
    return align(
        (tiny_lm(), tiny_tokenizer()),
        DPO(),
        pair_rows(4),
        adapter=LoRA(rank=2),
        trainer=TrainerOptions(
            max_steps=1,
            batch_size=4,
            learning_rate=1e-3,
            precision="fp32",
            push_to_hub="me/aligned",
        ),
        run_dir=run_dir,
    )


@pytest.mark.slow
def test_the_model_is_pushed_with_its_card(hub: type[FakeHub], tmp_path: Path) -> None:
    run(tmp_path)
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    made, sent = (told for _, told in hub.calls)
    assert made == {"repo_id": "me/aligned", "exist_ok": True}
    assert sent["repo_id"] == "me/aligned" and Path(sent["folder_path"]) == tmp_path / "model"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= sent["files"]


@pytest.mark.slow
def test_a_failed_push_leaves_a_finished_run(hub: type[FakeHub], tmp_path: Path) -> None:
    hub.fails = True
    with pytest.raises(CheckpointError, match=r"could not be pushed.*hf upload me/aligned"):
        run(tmp_path)
    assert (tmp_path / "result.json").is_file() and (tmp_path / "model").is_dir()
