"""Whom to cite: the papers that a run rests on, as BibTeX.

The entries are in `references.bib`, found by arXiv number; a loss's table row names its papers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from alignkit.errors import refuse_unknown

_METHODS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "dpo": {"text": ("2305.18290",), "image": ("2305.18290", "2311.12908", "2307.01952")},
    "kto": {"text": ("2402.01306",), "image": ("2402.01306", "2404.04465", "2307.01952")},
    "reward_model": {"text": ("1706.03741", "2203.02155")},
    "sft": {"text": ("2203.02155",), "image": ("2203.02155", "2112.10752", "2307.01952")},
    "rejection_sampling": {"text": ("2307.09288", "2304.06767")},
    "ppo": {"text": ("1707.06347", "1909.08593", "2203.02155")},
    "a2c": {"text": ("1602.01783", "2209.14375")},
    "reinforce": {"text": ("2402.14740",)},
    "rloo": {"text": ("2402.14740",)},
    "grpo": {"text": ("2402.03300",)},
}
_OPTIONS = {
    "mixture": "2411.10442",
    "divergence": "2309.16240",
    "weighting": "2406.11827",
    "ld_alpha": "2409.06411",
    "anchor": "2404.19733",
    "safeguard": "2511.03317",
    "min_snr": "2303.09556",
    "neftune_alpha": "2310.05914",
    "centering": "2312.09244",
    "synced": "2404.09656",
}
_ADAPTERS = {
    "lora": ("2106.09685",),
    "dora": ("2106.09685", "2402.09353"),
    "rslora": ("2106.09685", "2312.03732"),
}


@cache
def entries() -> dict[str, str]:
    """arXiv number -> BibTeX entry, of every paper that alignkit can name."""
    text = files("alignkit").joinpath("references.bib").read_text(encoding="utf-8")
    found = (entry.strip() for entry in re.findall(r"^@.*?^}", text, re.DOTALL | re.MULTILINE))
    return {entry.split("eprint = {")[1].split("}")[0]: entry for entry in found}


def arxiv_numbers(paper: str) -> list[str]:
    """The arXiv numbers in a line such as "Rafailov et al. 2023, arXiv:2305.18290, Eq. 7"."""
    return re.findall(r"arXiv:(\d{4}\.\d{4,5})", paper)


def cited_modalities(method_name: str) -> tuple[str, ...]:
    """The modalities that a method is for."""
    return tuple(_METHODS[method_name])


def citations(
    method_name: str,
    loss_name: str | Sequence[str] | None = None,
    modality: str = "text",
    adapter: str | None = None,
    options: Sequence[str] = (),
) -> list[str]:
    """BibTeX entries of the papers that a run rests on, the method first.

    Args:
        method_name: a name of `alignkit.methods()`, such as "dpo".
        loss_name: a name, or names, of the tables of `alignkit.losses`; None for a loss of your
            own, whose paper only you know.
        modality: "text" or "image".
        adapter: the `kind` of the `LoRA` that was trained; None if all weights were.
        options: what else was used, as `criteria.cited_options` names it.
    """
    refuse_unknown("method", method_name, _METHODS)
    refuse_unknown("modality", modality, _METHODS[method_name])
    numbers = [*_METHODS[method_name][modality]]
    for name in [loss_name] if isinstance(loss_name, str) else loss_name or ():
        from alignkit.losses import LOSSES, REWARD_LOSSES, SUPERVISED_LOSSES

        known = {**REWARD_LOSSES, **LOSSES, **SUPERVISED_LOSSES}
        refuse_unknown("loss", name, known)
        numbers += arxiv_numbers(known[name].paper)
    numbers += [_OPTIONS[option] for option in options]
    if adapter is not None:
        refuse_unknown("adapter kind", adapter, _ADAPTERS)
        numbers += _ADAPTERS[adapter]
    return [entries()[number] for number in dict.fromkeys(numbers)]
