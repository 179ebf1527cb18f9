"""Parts of a pipeline whose weights stay on disk until something needs them.

Training from a cache runs the UNet alone, so the VAE and the text encoders are shells first:
modules with their settings and without numbers, on torch's meta device. What needs them fills them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

LAZY = ("vae", "text_encoder", "text_encoder_2")


class Unloaded:
    """A shell and how to load what belongs into it.

    Attributes:
        shell: takes the loaded module's place in itself, so that whoever holds it has the weights.
        dtype: that the weights are loaded in.
    """

    def __init__(self, shell: nn.Module, dtype: torch.dtype, load: Callable[[], nn.Module]) -> None:
        self.shell = shell
        self.dtype = dtype
        self._load: Callable[[], nn.Module] | None = load

    @property
    def filled(self) -> bool:
        return self._load is None

    def fill(self) -> None:
        """Load the weights, the first time."""
        if self._load is None:
            return
        loaded = self._load().requires_grad_(False).eval()
        self._load = None
        # The attributes of a module are all there is to it.
        object.__setattr__(self.shell, "__dict__", loaded.__dict__)


def is_shell(module: nn.Module) -> bool:
    """Whether a module has no numbers yet."""
    return any(parameter.is_meta for parameter in module.parameters())


def unloaded(folder: Path, name: str, library: str, cls: str, dtype: torch.dtype) -> Unloaded:
    """A part of the pipeline in a folder.

    Args:
        folder: of the pipeline.
        name: of the part, its folder in there.
        library, cls: as model_index.json names them.
        dtype: that it is loaded in.

    Raises:
        OSError: its settings are not there, or it has no .safetensors file.
    """
    found = getattr(import_module(library), cls)
    if not weight_files(folder, name):
        raise OSError(f"there is no .safetensors file in {folder / name}.")
    with torch.device("meta"):
        if library == "diffusers":
            shell = found.from_config(found.load_config(folder, subfolder=name))
        else:
            shell = found(found.config_class.from_pretrained(folder, subfolder=name))

    def load() -> nn.Module:
        key = "torch_dtype" if library == "diffusers" else "dtype"
        options = {"subfolder": name, "use_safetensors": True, "variant": variant(folder, name)}
        module: nn.Module = found.from_pretrained(folder, **options, **{key: dtype})
        return module

    return Unloaded(shell.eval(), dtype, load)


_NAMES = r"(?:diffusion_pytorch_model|model)(\.[\w-]+?)?(-\d+-of-\d+)?\.safetensors"


def variant(folder: Path, name: str) -> str | None:
    """The one variant, such as "fp16", that a folder holds a part in; None for the plain files,
    where they are there."""
    names = [path.name for path in (folder / name).glob("*.safetensors")]
    found = {match[1] for one in names if (match := re.fullmatch(_NAMES, one))}
    return next(iter(found)).removeprefix(".") if len(found) == 1 and None not in found else None


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files that a part is loaded from."""
    wanted = variant(folder, name)
    middle = "" if wanted is None else f".{wanted}"
    files = sorted((folder / name).glob("*.safetensors"))
    found = [(path, re.fullmatch(_NAMES, path.name)) for path in files]
    return [path for path, match in found if match and (match[1] or "") == middle]


_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_aligned(module: nn.Module, files: Sequence[Path]) -> None:
    """Read what lies in memory as it lies in a file once more, onto 64-byte boundaries.

    See `alignkit.memory.align_memory`, which would copy it there: then both, the pages of the file
    and the copy, are in memory at once.

    Args:
        module: was loaded from the files.
        files: of the module's weights.
    """
    waiting = {name: p for name, p in module.named_parameters() if p.data_ptr() % 64}
    for path in files:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            for name, told in json.loads(file.read(size)).items():
                parameter = waiting.get(name)
                if parameter is None or _STORED.get(told["dtype"]) != parameter.dtype:
                    continue
                fresh = torch.empty(parameter.shape, dtype=parameter.dtype)
                file.seek(8 + size + told["data_offsets"][0])
                raw = fresh.flatten().view(torch.uint8).numpy()
                if file.readinto(raw.data) == fresh.nbytes == raw.nbytes:
                    parameter.data = fresh


def place_of(name: str) -> Path:
    """The folder of a pipeline by its name; one from the hub is fetched."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    from diffusers import DiffusionPipeline

    return Path(DiffusionPipeline.download(name, use_safetensors=True))


def shells_of(
    folder: Path, index: Any, names: Sequence[str], dtype: torch.dtype
) -> dict[str, Unloaded]:
    """Those of the named parts that a pipeline has; `index` is its model_index.json."""
    told = {name: index.get(name) for name in names}
    there = {name: pair for name, pair in told.items() if pair and pair[1]}
    return {
        name: unloaded(folder, name, library, cls, dtype)
        for name, (library, cls) in there.items()
        if library in ("diffusers", "transformers")
    }
