"""The text wing of a model that scores answers: a reward model that is trained, or a critic."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignkit.errors import ConfigError
from alignkit.options import GenerationOptions, LoRA, TextOptions
from alignkit.text.handed import base_of
from alignkit.text.notes import model_folder, read_notes, write_notes
from alignkit.text.pairwise import PairwiseBackend, separator_of
from alignkit.text.scalar import TextScalar
from alignkit.text.scalar_models import is_scalar, load_scalar, scalar_of
from alignkit.text.together import DTYPES, put_together
from alignkit.text.wing import TextWing


@dataclass(frozen=True)
class Scale:
    """How a head's outputs become a score.

    Attributes:
        outputs: of the head.
        ordinal: whether they are logits of "more than k"; see `TextScalar`.
        scale, offset: the score is scale * what the head gives + offset.
        pairwise: whether an answer is read together with the one it is compared with.
    """

    outputs: int = 1
    ordinal: bool = False
    scale: float = 1.0
    offset: float = 0.0
    pairwise: bool = False


def build(
    policy: Any,
    *,
    scalar: Scale | Mapping[str, Any],
    adapter: LoRA | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    gradient_checkpointing: bool | str = False,
    seed: int = 0,
    head: str = "normal",
    **others: Any,
) -> ScalarWing:
    """Load a model that scores answers and mark what is trained; see `alignkit.text.wing.build`.

    Args:
        policy: a reward model goes on from where it is; a causal language model gives its trunk,
            one in hand a copy of it.
        scalar: how scores are read off; `pairwise` and the rest are kept with the model.
        head: how a new head begins; see `load_scalar`.
    """
    assert not any(others.values()), others
    if not isinstance(scalar, Scale):
        scalar = Scale(**scalar)
    dtype = DTYPES[precision]
    kept = isinstance(policy, (str, Path)) and is_scalar(policy)
    if kept:
        scalar = _as_kept(scalar, Path(policy))
    model, tokenizer = load_scalar(
        policy,
        dtype=dtype,
        masters=torch.float32 if adapter is None else dtype,
        quantization=None if adapter is None else adapter.quantization,
        device=device,
        outputs=scalar.outputs,
        head=head,
        seed=seed,
    )
    in_hand = isinstance(policy, (tuple, list)) and model is policy[0]
    wing = put_together(
        model,
        tokenizer,
        ScalarWing,
        partial(TextScalar, ordinal=scalar.ordinal, scale=scalar.scale, offset=scalar.offset),
        in_hand=in_hand,
        adapter=adapter,
        device=device,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    wing.scale = scalar
    wing.goes_on = in_hand or wing.adapter == "continued" or kept
    if scalar.pairwise:
        wing.backend = PairwiseBackend(wing.module, separator_of(tokenizer))
    return wing


def _as_kept(scalar: Scale, folder: Path) -> Scale:
    """With the scale that a reward model's folder has.

    Raises:
        ConfigError: for a model that reads answers otherwise.
    """
    kept = scale_of(read_notes(folder))
    if (kept.pairwise, kept.ordinal) != (scalar.pairwise, scalar.ordinal):
        raise ConfigError(
            f"The reward model {str(folder)!r} was trained with pairwise={kept.pairwise}, "
            f"ordinal={kept.ordinal}, and is to go on with pairwise={scalar.pairwise}, "
            f"ordinal={scalar.ordinal}. Keep its kind and loss, or begin from a language model."
        )
    return replace(scalar, scale=kept.scale, offset=kept.offset)


class ScalarWing(TextWing):
    """A wing whose module gives scores; it reads rows as any text wing and writes nothing.

    Attributes:
        scale: how scores are read off of the head.
        goes_on: whether the head was trained before.
    """

    scale: Scale = Scale()
    goes_on = False

    def sample(self, prompts: Sequence[Any], options: GenerationOptions, *, seed: int) -> list[str]:
        raise ConfigError(
            "A reward model scores answers and writes none. Sample from a policy, and give this "
            "model's folder as `reward`."
        )

    def prompts(self, data: Any, options: TextOptions, limit: int) -> list[Any]:
        """None: there are no answers to show."""
        return []

    def describe(self) -> dict[str, Any]:
        found = super().describe()
        del found["unit of the log-ratio"]
        return found | {"score": "of the head, in float32, after the last token"}

    def save(
        self,
        folder: Path,
        *,
        base: str | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Also what the weights do not say, and a tokenizer that pads as the model expects."""
        held, self.tokenizer = self.tokenizer, copy.deepcopy(self.tokenizer)
        try:
            pad = base_of(self.policy).config.get_text_config().pad_token_id
            if pad is not None:
                self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(pad)
            super().save(folder, base=base, weights=weights)
        finally:
            self.tokenizer = held
        module = self.module
        assert isinstance(module, TextScalar)
        told = replace(self.scale, scale=module.scale, offset=module.offset)
        write_notes(folder, asdict(told) | {"chat": self.chat})


def critic_of(wing: TextWing, init: str | Path, adapter: LoRA | None = None) -> ScalarWing:
    """A model that scores the states of a policy's answers, to be trained beside it.

    Args:
        wing: the policy's, not sharded yet.
        init: "policy", whose trunk is copied as it computes now, with a head of zeros so that all
            values begin at 0; or a reward model's folder.
        adapter: trained in the place of all weights.
    """
    parameter = next(wing.policy.parameters())
    dtype = wing.module.autocast or torch.float32
    precision = next(name for name, one in DTYPES.items() if one == dtype)
    told = Scale()
    if init == "policy":
        source: Any = (scalar_of(wing.policy, copied=True, head="zeros"), wing.tokenizer)
    else:
        init = model_folder(init)
        if not is_scalar(init):
            raise ConfigError(
                f"A critic begins from 'policy' or a reward model's folder; {str(init)!r} is "
                "another model. Train one with RewardModel(...)."
            )
        source, told = str(init), scale_of(read_notes(Path(init)))
    made = build(source, scalar=told, adapter=adapter, device=parameter.device, precision=precision)
    made.backend.choose("auto")
    return made


def scale_of(notes: Mapping[str, Any]) -> Scale:
    """Of what is written beside a model; a plain one for other people's."""
    return Scale(**{f.name: notes[f.name] for f in fields(Scale) if f.name in notes})
