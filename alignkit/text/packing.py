"""Layouts: where each token of ragged answers stands in the rows that a model computes.

    padded   a row per answer, prompt and all, filled up to the longest
    varlen   one row of all answers, each after a prompt of its own; nothing is filled up
    prefix   one row of all groups, each prompt once and all of its answers after it

Position s predicts token s + 1. So a completion's last token is nobody's input, and is left out,
unless the layout is to be whole, for what is read off after it; the first token of every answer of
a group is predicted at the last position of their prompt.
Packed rows need an attention that keeps sequences apart (attention.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignkit.text.content import TextContent


@dataclass(frozen=True)
class Group:
    """One prompt and its answers in a packed row: `start`, and tokens of each, one after another.

    A sequence of its own is a prompt without answers.
    """

    start: int
    prompt: int
    answers: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        return self.prompt + max(self.answers, default=0)


def spans(group: Group) -> tuple[slice, slice, list[slice]]:
    """Where the prompt, all answers, and each of them that takes a place stand in the row."""
    end = group.start + group.prompt
    each, place = [], end
    for length in group.answers:
        if length:
            each.append(slice(place, place + length))
        place += length
    return slice(group.start, end), slice(end, place), each


@dataclass(frozen=True)
class Layout:
    """Rows on the host.

    Attributes:
        ids: (R, T).
        positions: (R, T), each token's place in its own sequence.
        ends: real tokens of each row.
        groups: the sequences of a packed row; empty for padded rows.
        predicts: (M,) places in the flattened rows whose output predicts a scored token.
        targets: (M,) the scored tokens, answer by answer.
        places: (M,) their places in their completions.
        lengths: scored tokens of each answer.
        width: tokens of the longest completion.
        lasts: (N,) where each answer's last token stands in the flattened rows, if it is there.
    """

    ids: np.ndarray
    positions: np.ndarray
    ends: tuple[int, ...]
    groups: tuple[Group, ...]
    predicts: np.ndarray
    targets: np.ndarray
    places: np.ndarray
    lengths: tuple[int, ...]
    width: int
    lasts: np.ndarray

    def to(self, device: torch.device) -> Placed:
        """On the device, by one transfer that the host does not wait for."""
        parts = [self.ids, self.positions, self.predicts, self.targets, self._cells()]
        parts += [np.array(self.lengths), np.array(self.ends), self.lasts]
        held = torch.from_numpy(np.concatenate([part.ravel() for part in parts]).astype(np.int64))
        if device.type == "cuda":
            held = held.pin_memory()
        held = held.to(device, non_blocking=True)
        tensors = [
            t.view(p.shape) for t, p in zip(held.split([p.size for p in parts]), parts, strict=True)
        ]
        return Placed(self, *tensors)

    def _cells(self) -> np.ndarray:
        """(M,) each scored token's place in a flattened table of N rows of `width`."""
        return np.repeat(np.arange(len(self.lengths)) * self.width, self.lengths) + self.places


@dataclass(frozen=True)
class Placed:
    """A layout with its tensors on the device."""

    host: Layout
    ids: Int[Tensor, "R T"]
    positions: Int[Tensor, "R T"]
    predicts: Int[Tensor, " M"]
    targets: Int[Tensor, " M"]
    cells: Int[Tensor, " M"]
    lengths: Int[Tensor, " N"]
    ends: Int[Tensor, " R"]
    lasts: Int[Tensor, " L"]

    def attention(self) -> Bool[Tensor, "R T"]:
        """True on real tokens."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.ends[:, None]

    def mask(self) -> Bool[Tensor, "N K"]:
        """True on the cells of `table` that hold a scored token."""
        return self.table(torch.ones_like(self.cells, dtype=torch.bool))

    def table(self, values: Float[Tensor, " M"]) -> Float[Tensor, "N K"]:
        """Numbers of the scored tokens in their completions' places, 0 elsewhere.

        Every cell is written once, so that no order of additions is left to chance.
        """
        rows, width = len(self.host.lengths), self.host.width
        return values.new_zeros(rows * width).scatter(0, self.cells, values).view(rows, width)


@dataclass
class _Row:
    """A packed row in the making."""

    ids: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    size: int = 0

    def add(self, ids: np.ndarray, position: int) -> int:
        """Tokens at the given position of their sequence and after; returns where they stand."""
        place = self.size
        self.ids.append(ids)
        self.positions.append(np.arange(position, position + len(ids)))
        self.size += len(ids)
        return place

    def layout(self, groups: list[Group], tokens: _Tokens) -> Layout:
        ids, positions = np.concatenate(self.ids), np.concatenate(self.positions)
        return Layout(ids[None], positions[None], (self.size,), tuple(groups), **tokens.fields())


class _Tokens:
    """The scored tokens of a layout in the making."""

    def __init__(self, content: TextContent, whole: bool) -> None:
        self.content = content
        self.whole = whole
        self.predicts: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.places: list[np.ndarray] = []
        self.lasts: list[int] = []

    def inputs(self, answer: int) -> np.ndarray:
        """The tokens of a completion that predict something: those before its last scored one; or
        all of them.
        """
        completion = self.content.completions[answer]
        if self.whole:
            return completion
        counted = self.content.counted(answer)
        return completion[: counted[-1] if len(counted) else 0]

    def add(self, answer: int, prompt_end: int, start: int) -> None:
        """An answer whose inputs stand at `start`, after a prompt that ends before `prompt_end`."""
        counted = self.content.counted(answer)
        self.predicts.append(np.where(counted == 0, prompt_end - 1, start + counted - 1))
        self.targets.append(self.content.completions[answer][counted])
        self.places.append(counted)
        if self.whole:
            self.lasts.append(start + len(self.content.completions[answer]) - 1)

    def fields(self) -> dict[str, Any]:
        """What a layout says of them."""
        return {
            "predicts": np.concatenate(self.predicts),
            "targets": np.concatenate(self.targets),
            "places": np.concatenate(self.places),
            "lengths": tuple(map(len, self.places)),
            "width": max(map(len, self.content.completions)),
            "lasts": np.array(self.lasts, dtype=np.int64),
        }


def padded(content: TextContent, whole: bool = False) -> Layout:
    """Masks come from lengths, never from a pad id: pad may equal eos or any other token."""
    tokens = _Tokens(content, whole)
    prompts = [content.prompts[owner] for owner in content.owner]
    answers = [tokens.inputs(answer) for answer in range(len(prompts))]
    ends = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    ids = np.zeros((len(ends), max(ends)), dtype=np.int64)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : ends[row]] = np.concatenate([prompt, answer])
        begin = row * ids.shape[1] + len(prompt)
        tokens.add(row, begin, begin)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return Layout(ids, positions, tuple(ends), (), **tokens.fields())


def varlen(content: TextContent, whole: bool = False) -> Layout:
    """Every answer after a prompt of its own."""
    row, tokens, groups = _Row(), _Tokens(content, whole), []
    for answer, owner in enumerate(content.owner):
        groups.append(_alone(row, tokens, answer, content.prompts[owner]))
    return row.layout(groups, tokens)


def prefix(content: TextContent, whole: bool = False) -> Layout:
    """Every prompt once; a group of one answer is a sequence like any other."""
    row, tokens, groups = _Row(), _Tokens(content, whole), []
    members: list[list[int]] = [[] for _ in content.prompts]
    for answer, owner in enumerate(content.owner):
        members[owner].append(answer)
    assert [a for group in members for a in group] == list(range(len(content.owner))), members
    for prompt, answers in zip(content.prompts, members, strict=True):
        if len(answers) == 1:
            groups.append(_alone(row, tokens, answers[0], prompt))
            continue
        start = row.add(prompt, 0)
        end, sizes = row.size, []
        for answer in answers:
            inputs = tokens.inputs(answer)
            tokens.add(answer, end, row.add(inputs, len(prompt)))
            sizes.append(len(inputs))
        groups.append(Group(start, len(prompt), tuple(sizes)))
    return row.layout(groups, tokens)


def _alone(row: _Row, tokens: _Tokens, answer: int, prompt: np.ndarray) -> Group:
    inputs = tokens.inputs(answer)
    start = row.add(prompt, 0)
    end = row.size
    tokens.add(answer, end, row.add(inputs, len(prompt)))
    return Group(start, len(prompt) + len(inputs))


LAYOUTS: Mapping[str, Callable[[TextContent, bool], Layout]] = {
    "padded": padded,
    "varlen": varlen,
    "prefix": prefix,
}
PACKED = ("prefix", "varlen")


def lay_out(content: TextContent, *, whole: bool = False) -> Layout:
    """The layout that the content names; `whole`: with completions' last tokens as inputs, too."""
    return LAYOUTS[content.layout](content, whole)


Stretch = tuple[int, int, int]
"""Where a sequence lies in a layout: its row, its first place, its tokens."""


def stretches(layout: Layout) -> list[Stretch]:
    """Where each answer with its prompt lies; answers that share one lie in several places."""
    if not layout.groups:
        return [(row, 0, end) for row, end in enumerate(layout.ends)]
    assert not any(group.answers for group in layout.groups), "the answers share their prompts"
    return [(0, group.start, group.prompt) for group in layout.groups]


def positions_of(content: TextContent, layout: str) -> list[int]:
    """Positions that each group takes in a packed row, before what no answer needs is left out."""
    taken = [len(prompt) if layout == "prefix" else 0 for prompt in content.prompts]
    for owner, completion in zip(content.owner, content.completions, strict=True):
        own = 0 if layout == "prefix" else len(content.prompts[owner])
        taken[owner] += own + len(completion)
    return taken
