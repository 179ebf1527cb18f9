"""Token ids of rendered rows, exactly those of the tokenizer's own call, without its overhead.

Each distinct text is encoded once, in one batch, and a prompt once for all of its answers: texts
are cut where the tokenizer does not look across, in conversations behind a special token, in plain
text between two words (words.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from alignkit.text.content import Ids
from alignkit.text.formats import Rendered
from alignkit.text.words import WORD_END, frame

TokensOf = Mapping[tuple[str, bool], Ids]
"""(text, rendered by a chat template) -> its ids."""

PROBES = 16
"""Texts of the first batch that are encoded in the plain way too, and must agree."""


class Encoder:
    """Encodes rendered rows.

    The short ways (the tokenizer's Rust core, and cuts at special tokens) are compared with the
    plain call on the first texts, and left where they differ.

    Args:
        tokenizer: not changed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._core = _core_of(tokenizer)
        self._cuts = _cuts_of(tokenizer) if self._core is not None else {}
        self._cut = re.compile(f"(?s:.*)({'|'.join(map(re.escape, self._cuts))})")
        self._frame = frame(tokenizer) if self._core is not None else None
        self._proven = self._core is None

    def encode(self, rendered: Sequence[Rendered]) -> TokensOf:
        """The ids of every text in `rendered`."""
        if not self._proven and rendered:
            self._prove(rendered[:PROBES])
        tokens: dict[tuple[str, bool], Ids] = {}
        for chat in (True, False):
            items = [item for item in rendered if item.chat == chat]
            # A chat template has placed BOS and EOS itself; adding them again would double them.
            found = self._in_parts(items, chat=chat)
            rest = [text for text in _texts(items) if text not in found]
            found |= zip(rest, self._ids(rest, special=not chat), strict=True)
            tokens |= {(text, chat): ids for text, ids in found.items()}
        return tokens

    def _prove(self, sample: Sequence[Rendered]) -> None:
        self._proven = True
        for chat in (True, False):
            items = [item for item in sample if item.chat == chat]
            texts = _texts(items)
            if not texts:
                continue
            expected = dict(zip(texts, self._plainly(texts, special=not chat), strict=True))
            parts = self._in_parts(items, chat=chat)
            if not _agree([expected[text] for text in parts], parts.values()):
                self._cuts, self._frame, parts = {}, None, {}
            rest = [text for text in texts if text not in parts]
            found = self._ids(rest, special=not chat)
            if not _agree([expected[text] for text in rest], found):
                self._core, self._cuts, self._frame = None, {}, None

    def _in_parts(self, items: Sequence[Rendered], *, chat: bool) -> dict[str, Ids]:
        """Whole texts from the ids of their parts, where the tokenizer allows it."""
        if chat:
            return self._behind_tokens(items) if self._cuts else {}
        return self._between_words(items) if self._frame is not None else {}

    def _between_words(self, items: Sequence[Rendered]) -> dict[str, Ids]:
        """Plain texts cut before the last word of their prompt that allows it."""
        assert self._frame is not None
        cuts: list[tuple[str, str, str]] = []  # whole text, its head, the rest
        for item in items:
            found = None if item.prompt is None else WORD_END.match(item.prompt)
            if found is not None:
                head, prompt = found[0], str(item.prompt)
                texts = (text for text in (prompt, *item.full) if text.startswith(prompt))
                cuts += [(text, head, text[len(head) :]) for text in texts]
        parts = list(dict.fromkeys(part for _, *both in cuts for part in both))
        ids = dict(zip(parts, self._ids(parts, special=False), strict=True))
        before, after = (np.array(side, dtype=np.int32) for side in self._frame)
        return {
            text: np.concatenate([before, ids[head], ids[rest], after]) for text, head, rest in cuts
        }

    def _behind_tokens(self, items: Sequence[Rendered]) -> dict[str, Ids]:
        """Conversations put together from the ids of their prompts and of what follows.

        A special token is taken out of a text before anything else looks at it, and its sides are
        then encoded each for itself. So with P the text up to and including a special token s, and
        any t, ids(P t) = ids(P) + ids(s t) without its first.
        """
        cuts: list[tuple[str, str, str]] = []  # whole text, its head, the rest behind a token
        for item in items:
            found = None if item.prompt is None else self._cut.match(item.prompt)
            if item.prompt is None or found is None:
                continue
            head, token = item.prompt[: found.end()], found[1]
            for text in (item.prompt, *item.full):
                if text.startswith(head):
                    cuts.append((text, head, token + text[len(head) :]))
        parts = list(dict.fromkeys(part for _, *both in cuts for part in both))
        ids = dict(zip(parts, self._ids(parts, special=False), strict=True))
        whole = {}
        for text, head, rest in cuts:
            before, after = ids[head], ids[rest]
            # Where another added token swallows this one, there is no cut.
            if len(before) and len(after) and before[-1] == after[0] == self._id_at(head):
                whole[text] = np.concatenate([before, after[1:]])
        return whole

    def _id_at(self, head: str) -> int:
        return next(id_ for token, id_ in self._cuts.items() if head.endswith(token))

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        if self._core is None:
            return self._plainly(texts, special=special)
        encoded = self._core.encode_batch_fast(list(texts), add_special_tokens=special)
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def _plainly(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        if not texts:
            return []
        ids = self._tokenizer(
            list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False
        )["input_ids"]
        return [np.asarray(one, dtype=np.int32) for one in ids]


def _texts(items: Iterable[Rendered]) -> list[str]:
    """The distinct texts of rows."""
    texts = (text for item in items for text in (item.prompt, *item.full) if text is not None)
    return list(dict.fromkeys(texts))


def _agree(expected: Iterable[Ids], found: Iterable[Ids]) -> bool:
    return all(np.array_equal(*both) for both in zip(expected, found, strict=True))


def _core_of(tokenizer: Any) -> Any:
    """The tokenizer's Rust core, where it has one that neither cuts nor pads."""
    core: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(core, "encode_batch_fast"):
        return None
    return core if core.truncation is None and core.padding is None else None


def _cuts_of(tokenizer: Any) -> dict[str, int]:
    """Special tokens behind which a text can be cut, longest first: token -> id."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    ends = {tokenizer.bos_token, tokenizer.eos_token}
    added = dict(tokenizer.added_tokens_decoder)
    names = [token.content for token in added.values()]
    found = {
        token.content: id_
        for id_, token in added.items()
        if token.special
        and not (token.normalized or token.single_word)
        and (token.content in template or token.content in ends)
        and not any(token.content in other and token.content != other for other in names)
    }
    return dict(sorted(found.items(), key=lambda entry: -len(entry[0])))
