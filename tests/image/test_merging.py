"""A merged pipeline predicts what base and adapter predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit import DPO, GenerationOptions, TrainerOptions, align, export_merged
from alignkit.errors import ConfigError
from alignkit.options import LoRA
from alignkit_diffusion import build
from alignkit_diffusion.merging import save_merged
from tests.image.conftest import BUILD, make_pipeline
from tests.image.sd15 import make_sd15
from tests.image.test_likelihood import move
from tests.image.test_lora import prediction


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_a_merged_pipeline_predicts_the_same(
    kind: Any, pipeline_folder: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    adapter = LoRA(rank=2, alpha=3, kind=kind, targets="all" if kind == "lora" else "auto")
    wing = build(str(pipeline_folder), adapter=adapter, **BUILD)
    move(wing)
    expected = prediction(wing.policy.unet)
    assert not torch.allclose(expected, prediction(make_pipeline().unet), atol=1e-2)
    wing.save(tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=str(pipeline_folder))
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert not [name for name, _ in merged.unet.named_modules() if "lora" in name]
    assert torch.allclose(prediction(merged.unet), expected, atol=1e-5)


def test_stable_diffusion_merges_alike(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    make_sd15().save_pretrained(tmp_path / "base")
    wing = build(str(tmp_path / "base"), adapter=LoRA(rank=2), **BUILD)
    move(wing)
    wing.save(tmp_path / "adapter")
    save_merged(str(tmp_path / "adapter"), tmp_path / "merged", str(tmp_path / "base"))
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    own = dict(merged.unet.named_parameters())
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    trained = wing.policy.unet.get_submodule(layer)
    expected = trained.base_layer.weight + trained.get_delta_weight("default")
    assert torch.allclose(own[f"{layer}.weight"], expected, atol=1e-6)


@pytest.mark.slow
def test_a_run_is_merged_with_the_base_that_it_names(
    rows: list[dict[str, Any]], pipeline_folder: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline
    from typer.testing import CliRunner

    from alignkit.cli import app

    def run(policy: Any, adapter: LoRA | None, name: str) -> Any:
        return align(
            policy,
            DPO(),
            rows,
            adapter=adapter,
            trainer=TrainerOptions(max_steps=1, batch_size=4, learning_rate=1e-2),
            generation=GenerationOptions(steps=1),
            run_dir=tmp_path / name,
        )

    result = run(str(pipeline_folder), LoRA(rank=2), "run")
    told = CliRunner().invoke(
        app, ["export", str(tmp_path / "run"), "--merged", str(tmp_path / "merged")]
    )
    assert told.exit_code == 0, told.output
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert torch.allclose(prediction(merged.unet), prediction(result.model.unet), atol=1e-5)
    run(make_pipeline(), LoRA(rank=2), "in hand")
    with pytest.raises(ConfigError, match="trained on a pipeline in memory"):
        export_merged(tmp_path / "in hand", tmp_path / "out")
    with pytest.raises(ConfigError, match="do not name the pipeline"):
        export_merged(tmp_path / "in hand" / "model", tmp_path / "out")
    run(str(pipeline_folder), None, "whole")
    with pytest.raises(ConfigError, match="is a whole pipeline"):
        export_merged(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / "out").exists()
