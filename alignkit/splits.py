"""Training and held-out rows of one data set, told apart by their prompts.

A split by rows would put one prompt on both sides, and data sets of preferences ask the same prompt
many times: a held-out accuracy would then measure memory. The split is a function of the prompt and
the share alone, so it is the same in every run, process and order of the rows; a larger share holds
out what a smaller one does, and more.
"""

from __future__ import annotations

import unicodedata
from hashlib import blake2b
from typing import Literal

Part = Literal["all", "train", "held_out"]

SPLIT = "split"
"""`eval_data` that is the held-out part of `data`."""


def normalised(prompt: str) -> str:
    """What counts as the same prompt: letter case, spaces and Unicode's spellings do not."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def is_held_out(prompt: str, share: float) -> bool:
    """Whether a prompt is among the share that is not trained on."""
    raw = normalised(prompt).encode("utf-8", "surrogatepass")
    place = int.from_bytes(blake2b(raw, digest_size=8, key=b"alignkit held out").digest(), "big")
    return place < share * 2**64


def in_part(prompt: str, share: float, part: Part) -> bool:
    """Whether a row with this prompt is in a part of the data."""
    return part == "all" or is_held_out(prompt, share) == (part == "held_out")
