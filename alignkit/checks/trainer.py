"""What the trainer's options ask of the machine, the data and the run folder, checked up front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.errors import ConfigError, refuse_unknown
from alignkit.options import TrainerOptions
from alignkit.splits import SPLIT

if TYPE_CHECKING:
    from alignkit.config import RunConfig


def check_evaluation(config: RunConfig) -> None:
    """Evaluations need data, and what follows their metrics needs the metrics' names."""
    if config.trainer.eval_every is not None and config.eval_data is None:
        raise ConfigError(
            f"trainer.eval_every={config.trainer.eval_every} evaluates on eval_data, which is not "
            "given. Add eval_data, or leave eval_every out."
        )
    sets = config.eval_data
    if isinstance(sets, Mapping) and not sets:
        raise ConfigError("eval_data must name at least one set; got {}. Leave it out.")
    _check_split(config, list(sets.values()) if isinstance(sets, Mapping) else [sets])
    starts = [f"eval/{name}/" for name in sets] if isinstance(sets, Mapping) else ["eval/"]
    stop = config.trainer.early_stop
    followed = {
        "keep_best": config.trainer.keep_best,
        "early_stop.metric": None if stop is None else stop.metric,
    }
    for option, metric in followed.items():
        if metric is not None and not metric.startswith(tuple(starts)):
            raise ConfigError(
                f"trainer.{option} follows a metric of an evaluation, whose name begins with "
                f"{' or '.join(map(repr, starts))}; got {metric!r}. Write "
                f"{starts[0] + metric.rpartition('eval/')[2]!r}."
            )


def _check_split(config: RunConfig, sets: list[object]) -> None:
    """The held-out part of `data` needs a share of its prompts."""
    given = config.data_options
    read = given.get if isinstance(given, Mapping) else lambda name: getattr(given, name, None)
    if any(isinstance(data, str) and data == SPLIT for data in sets) and not read("held_out_share"):
        raise ConfigError(
            f"eval_data={SPLIT!r} evaluates the part of data that data_options.held_out_share "
            "keeps away from training, and no share is given. Write "
            "data_options=ImageOptions(held_out_share=0.02), or give other rows."
        )


def check_hardware(trainer: TrainerOptions, modality: str | None) -> None:
    """What this machine, or this kind of policy, cannot do."""
    if trainer.optimizer == "adamw_8bit":
        if find_spec("bitsandbytes") is None:
            raise ConfigError(
                "trainer.optimizer='adamw_8bit' needs the package bitsandbytes, which is not "
                "installed. Run pip install bitsandbytes, or write optimizer='adamw'."
            )
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                "trainer.optimizer='adamw_8bit' needs a CUDA GPU, and this machine has none. "
                "Write optimizer='adamw'."
            )
    if trainer.precision == "fp16":
        import torch

        if not torch.accelerator.is_available():
            raise ConfigError(
                "trainer.precision='fp16' needs a GPU, and this machine has none. "
                "Write precision='fp32' or 'bf16'."
            )
    if trainer.channels_last is True and modality == "text":
        raise ConfigError(
            "trainer.channels_last=True lays out convolutions, of which text policies have none. "
            "Leave channels_last out."
        )
    if trainer.sharding != "none":
        _check_sharding(trainer, modality)


def _check_sharding(trainer: TrainerOptions, modality: str | None) -> None:
    """What shards cannot be given to."""
    sharding = trainer.sharding
    if modality == "image":
        raise ConfigError(
            f"trainer.sharding={sharding!r} is for text policies only: an SDXL pipeline fits one "
            "device, and its UNet is not sharded. Leave sharding out; several processes train "
            "with DDP."
        )
    if trainer.optimizer != "adamw":
        raise ConfigError(
            f"trainer.sharding={sharding!r} shards the state of optimizer='adamw' only; got "
            f"optimizer={trainer.optimizer!r}. Write optimizer='adamw', or leave sharding out."
        )
    if trainer.precision == "fp16":
        raise ConfigError(
            "trainer.precision='fp16' scales gradients by a factor on which shards cannot agree; "
            f"got sharding={sharding!r}. Write precision='bf16' or 'fp32', or leave sharding out."
        )
    if sharding == "zero3" and trainer.compile:
        raise ConfigError(
            "trainer.compile=True compiles blocks, whose weights sharding='zero3' gathers layer by "
            "layer while they run. Write sharding='fsdp2', or leave compile out."
        )
    if sharding == "zero3" and find_spec("deepspeed") is None:
        raise ConfigError(
            "trainer.sharding='zero3' needs the package deepspeed, which is not installed. Run pip "
            "install 'alignkit[deepspeed]', or write sharding='fsdp2', which shards the same."
        )


def check_router(trainer: TrainerOptions, modality: str | None) -> None:
    """The balance of experts: a language model's, seen by hooks."""
    given = trainer.router_aux_loss_coef
    if given is None:
        return
    if modality == "image":
        raise ConfigError(
            f"trainer.router_aux_loss_coef={given!r} balances the experts of a language model, and "
            "a pipeline has none. Leave it out."
        )
    if trainer.compile:
        raise ConfigError(
            f"trainer.router_aux_loss_coef={given!r} listens to the routers, which compiled blocks "
            "do not allow; got trainer.compile=True. Leave one of them out."
        )


def check_quantization(trainer: TrainerOptions, modality: str | None) -> None:
    """A base in 4 bits: a language model's, on a GPU, whole on each process."""
    if modality == "image":
        raise ConfigError(
            "adapter.quantization='4bit' is for language models; a UNet's convolutions stay as "
            "they are. Leave it out."
        )
    if trainer.sharding != "none":
        raise ConfigError(
            f"adapter.quantization='4bit' packs weights into bytes, which are not sharded; got "
            f"trainer.sharding={trainer.sharding!r}. Leave one of them out."
        )
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "adapter.quantization='4bit' needs a CUDA GPU, and this machine has none. Leave it "
            "out; the adapter then trains on the base in trainer.precision."
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "adapter.quantization='4bit' needs the package bitsandbytes, which is not installed. "
            "Run pip install 'alignkit[quantization]'."
        )


def check_outlets(config: RunConfig) -> None:
    """Trackers and the hub: there, and within reach."""
    trainer = config.trainer
    if trainer.trackers:
        _check_trackers(trainer.trackers, config.run_dir is not None)
    name = trainer.push_to_hub
    if name is None:
        return
    if "/" not in name:
        raise ConfigError(
            "trainer.push_to_hub must be a repository name with its owner; got "
            f"{name!r}. Write push_to_hub='your-name/{name}'."
        )
    if config.run_dir is None:
        raise ConfigError(
            f"trainer.push_to_hub={name!r} uploads the folder model/ of the run; got run_dir=None. "
            "Write run_dir='runs/name'."
        )
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE or get_token() is None:
        lacking = "the hub is switched off (HF_HUB_OFFLINE)"
        lacking = lacking if constants.HF_HUB_OFFLINE else "nobody is logged in to the hub"
        raise ConfigError(
            f"trainer.push_to_hub={name!r} uploads the model at the end, and {lacking}. Run "
            "`hf auth login` and go online, or leave push_to_hub out."
        )


def _check_trackers(names: Sequence[str], folder: bool) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    # Those of accelerate need a package each; a user's own may be registered there, too.
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    there = [str(name) for name in get_available_trackers()]
    for name in names:
        refuse_unknown("tracker", name, known)
        if name in LoggerType.list() and name not in there:
            raise ConfigError(
                f"trainer.trackers: the package of {name!r} is not installed. Install it, or leave "
                f"the tracker out. Installed: {', '.join(there) or 'none'}."
            )
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and not folder:
            raise ConfigError(
                f"trainer.trackers: {name!r} writes into the run folder; got run_dir=None. Write "
                "run_dir='runs/name'."
            )


def check_run_folder(config: RunConfig) -> None:
    """What writes into the run folder, or goes on from it, needs one."""
    trainer, resume = config.trainer, config.resume
    named = resume in ("auto", "must", "never")
    if not named and not Path(resume).exists():
        raise ConfigError(
            "resume must be 'auto', 'must', 'never' or the path of a checkpoint; got "
            f"{str(resume)!r}, and there is no such path."
        )
    if config.run_dir is not None:
        return
    if not named or resume == "must":
        raise ConfigError(
            f"resume={str(resume)!r} continues a run in its folder; got run_dir=None. "
            "Write run_dir='runs/name'."
        )
    for name in ("save_every", "sample_every", "keep_best"):
        if getattr(trainer, name) is not None:
            raise ConfigError(
                f"trainer.{name}={getattr(trainer, name)!r} writes into the run folder; got "
                "run_dir=None. Write run_dir='runs/name'."
            )
