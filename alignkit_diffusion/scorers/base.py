"""What all scorers share: batches, float32, and no answer that is not a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from alignkit.errors import ConfigError, DataError
from alignkit.places import is_missing


class Scorer:
    """A frozen model as a reward of images; higher is better.

    Args:
        name: such as "pickscore"; the key of its scores.
        unit: what a score is, for reports.
        modules: the models it uses.
        score: `(prompts, images) -> (B,)` float32, on a batch.
        batch_size: images per forward.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        modules: Sequence[nn.Module],
        score: Callable[[list[str], list[Image]], Tensor],
        batch_size: int = 16,
    ) -> None:
        self.name = name
        self.unit = unit
        self.modules = tuple(modules)
        self.batch_size = batch_size
        self._score = score

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Image],
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[float]:
        """Scores of images, each for its prompt.

        Raises:
            DataError: a score is not finite; the prompt is named.
        """
        scores: list[float] = []
        starts = range(0, len(responses), self.batch_size)
        for start in tqdm(starts, desc=f"Scoring: {self.name}", leave=False, disable=None):
            asked = [str(prompt) for prompt in prompts[start : start + self.batch_size]]
            images = [one.convert("RGB") for one in responses[start : start + self.batch_size]]
            scores += self._score(asked, images).float().tolist()
        for prompt, score in zip(prompts, scores, strict=True):
            if not abs(score) < float("inf"):
                raise DataError(
                    f"The scorer {self.name!r} gave {score} for an image of the prompt {prompt!r}. "
                    "Load it in float32, or look at the image."
                )
        return scores


def unique(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Each text once, and for every prompt the place of its text."""
    texts = list(dict.fromkeys(prompts))
    place = {text: number for number, text in enumerate(texts)}
    return texts, [place[prompt] for prompt in prompts]


def find_weights(name: str, weights: str, file: str) -> Path:
    """The safetensors file of `weights`: itself, `file` in a folder, or `file` on the hub.

    Raises:
        ConfigError: it is not there, or in a format that runs code when it is read.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        path = path / file
    elif not path.exists() and not is_missing(weights):
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(weights, file))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"The weights of {name!r} are a local path or a hub name that holds {file}; "
                f"{weights!r} is neither: {error}"
            ) from error
    if not path.exists():
        raise ConfigError(f"The weights of {name!r} must exist; there is no {str(path)!r}.")
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"The weights of {name!r} must be a .safetensors file, since reading other formats can "
            f"run code; got {path.name!r}. Convert it once with safetensors.torch.save_file("
            f"torch.load({str(path)!r}, weights_only=True), ...); of a file with a 'state_dict' "
            "save that entry."
        )
    return path
