"""Loading causal language models; weights from safetensors only, and no code of a repository."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from alignkit.adapters import quiet_peft
from alignkit.errors import ConfigError
from alignkit.text.handed import base_of, evaluating

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NO_CODE: dict[str, Any] = {"trust_remote_code": False}
# Left out, it would ask on the terminal whether to run the code that a repository brings.


def load(
    policy: Any,
    *,
    dtype: torch.dtype,
    masters: torch.dtype,
    quantization: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder, a hub name, or the pair itself.

    A folder with a PEFT adapter is loaded on its base, trainable.

    Args:
        policy: what to load.
        dtype: of the base under an adapter.
        masters: of a model without an adapter.
        quantization: "4bit" stores the base in NF4 with doubly quantised scales (QLoRA,
            2305.14314), and computes in `dtype`.
        device: where a quantised base is loaded to.

    Raises:
        ConfigError: if it is none of these, lacks weights, or has no tokenizer.
    """
    if isinstance(policy, (tuple, list)):
        if quantization is not None:
            raise ConfigError(
                f"adapter.quantization={quantization!r} quantises weights while they are loaded, "
                "and this policy is in hand already. Give its folder or hub name, or load it with "
                "a quantization_config yourself and leave quantization out."
            )
        return _in_memory(policy)
    if not isinstance(policy, (str, Path)):
        raise ConfigError(
            "A text policy is a folder, a hub name, or (model, tokenizer); got "
            f"{type(policy).__name__}. A model in hand comes with its tokenizer: (model, "
            "tokenizer)."
        )
    name = str(policy)
    what = f"The policy {name!r} could not be loaded as a causal language model with its tokenizer"
    with loading_errors_of(what):
        folder = adapter_folder(name)
        if folder is None:
            more = {} if quantization is None else _in_4_bits(dtype, device)
            return load_whole(name, dtype if more else masters, **more), tokenizer_of(name)
        return _on_its_base(folder, dtype)


@contextmanager
def loading_errors_of(what: str) -> Iterator[None]:
    """Inside, what goes wrong with files or weights is a `ConfigError` that begins so."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what}: {error}") from error


def adapter_folder(name: str) -> Path | None:
    """The local folder of a PEFT adapter; None if `name` is no adapter.

    Raises:
        ConfigError: if its weights are not safetensors.
    """
    from transformers.utils import cached_file

    found = cached_file(
        name,
        ADAPTER_CONFIG,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return None
    weights = cached_file(name, ADAPTER_WEIGHTS, _raise_exceptions_for_missing_entries=False)
    if weights is None:
        raise ConfigError(
            f"The adapter {name!r} must hold {ADAPTER_WEIGHTS}, and it does not: other formats are "
            "unpickled, which can run code. Load it with peft yourself and save it again with "
            "save_pretrained."
        )
    return Path(found).parent


def _in_4_bits(dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """What transformers is told to load linear layers as NF4."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": torch.device(device)}}


def load_whole(name: str, dtype: torch.dtype | str, **more: Any) -> Any:
    """A model without an adapter, all of whose weights are there; `more` as `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, use_safetensors=True, output_loading_info=True, **_NO_CODE, **more
    )
    if told["missing_keys"]:
        some = sorted(told["missing_keys"])
        raise ConfigError(
            f"The policy {name!r} lacks weights of {type(model).__name__}, which would start at "
            f"random: {', '.join(some[:4])}{' ...' if len(some) > 4 else ''}. Give a checkpoint of "
            "a causal language model with its head."
        )
    return model


def _on_its_base(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from peft import AutoPeftModelForCausalLM

    with quiet_peft():
        model = AutoPeftModelForCausalLM.from_pretrained(
            str(folder), is_trainable=True, dtype=dtype, use_safetensors=True, **_NO_CODE
        )
    # As peft saves them: further adapters in sub-folders of their names, here switched off.
    for file in sorted(folder.glob(f"*/{ADAPTER_CONFIG}")):
        adapter_folder(str(file.parent))
        model.load_adapter(str(file.parent), adapter_name=file.parent.name)
    base = model.peft_config[model.active_adapter].base_model_name_or_path
    return model, tokenizer_beside(folder, base)


def tokenizer_beside(folder: Path, base: str) -> Any:
    """An adapter's own tokenizer, or that of its base."""
    return tokenizer_of(str(folder) if any(folder.glob("tokenizer*")) else base)


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a folder or a repository."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, **_NO_CODE)


def _in_memory(policy: Sequence[Any]) -> tuple[Any, Any]:
    if len(policy) != 2 or not isinstance(policy[0], nn.Module) or not callable(policy[1]):
        kinds = ", ".join(type(part).__name__ for part in policy)
        raise ConfigError(f"A text policy in memory is (model, tokenizer); got ({kinds}).")
    return policy[0], policy[1]


@torch.no_grad()
def refuse_other_models(model: Any) -> None:
    """Raise `ConfigError` unless the model predicts each token from those before it, and no others.

    Tried on two rows of two tokens that differ in the second: the logits of the first must not know
    of it. Models of one's own are taken at their word.
    """
    base = base_of(model)
    if not type(base).__module__.startswith("transformers."):
        return
    name, device = type(base).__name__, next(model.parameters()).device
    ids = torch.tensor([[0, 0], [0, 1]], device=device)
    try:
        with evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise ValueError("its logits are not those of tokens")
        rounding = 1e-4 if logits.dtype == torch.float32 else 0.05
        first, second = logits[:, 0].float()
    except Exception as error:  # of whatever the model takes instead
        raise ConfigError(
            f"{name} is no causal language model: {error}. Give a model of the class that "
            "AutoModelForCausalLM loads."
        ) from error
    if (first - second).abs().max() > rounding * first.std():
        raise ConfigError(
            f"{name} is no causal language model: its prediction after the first token depends on "
            "the second. Encoders such as BERT need is_decoder=True in their config, and to have "
            "been trained so."
        )
