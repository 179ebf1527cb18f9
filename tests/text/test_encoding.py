"""Ids are those of the tokenizer's own call, by whatever way they were found."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from alignkit.text.encoding import Encoder
from alignkit.text.formats import Rendered, render_answers
from alignkit.text.words import EXPRESSIONS
from tests.builders import TEXT, tiny_tokenizer

WORDS = [
    "the sky",
    " the  sky ",
    "\n\nblue",
    "grey<|im_end|>",
    "<|im_start|>",
    " ",
    "fox's 123",
    "é😀",
    "what the sky",
    "I'll see\u0301 the 12 skies'",
]


def metaspace(scheme: str) -> Any:
    """Words with a blank in front, as sentencepiece models have them."""
    from transformers import PreTrainedTokenizerFast

    letters = sorted({*"".join([*TEXT, *WORDS]), "▁", "\n"})
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    inner = Tokenizer(
        models.BPE(vocabulary, [("t", "h")] if "th" in vocabulary else [], unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    inner.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = tiny_tokenizer().chat_template
    return tokenizer


def swallowing() -> Any:
    """A special token that takes the blanks on both sides."""
    tokenizer = tiny_tokenizer()
    token = AddedToken("<|im_start|>", lstrip=True, rstrip=True, special=True)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [token]}, replace_extra_special_tokens=False
    )
    return tokenizer


def by_expression(expression: str) -> Any:
    """Words found as a published tokenizer finds them."""
    tokenizer = tiny_tokenizer(bos=True)
    steps = [
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def by_digits() -> Any:
    tokenizer = tiny_tokenizer()
    steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


TOKENIZERS = {
    "byte level": tiny_tokenizer,
    "with bos": lambda: tiny_tokenizer(bos=True),
    "without template": lambda: tiny_tokenizer(chat=False),
    "metaspace at the start": lambda: metaspace("first"),
    "metaspace everywhere": lambda: metaspace("always"),
    "swallowing blanks": swallowing,
    "digits one by one": by_digits,
    **{
        f"expression {place}": partial(by_expression, one)
        for place, one in enumerate(sorted(EXPRESSIONS))
    },
}


def rows(tokenizer: Any) -> list[Rendered]:
    found = []
    for first in WORDS:
        for second in WORDS:
            answers = {"chosen": first + second + ".", "rejected": second + "no"}
            if tokenizer.chat_template:
                prompt = [{"role": "user", "content": second}]
                found.append(render_answers(tokenizer, prompt, answers, {}))
            found.append(Rendered(first, tuple(first + a for a in answers.values()), chat=False))
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_the_plain_call(name) -> None:
    tokenizer = TOKENIZERS[name]()
    encoder, items = Encoder(tokenizer), rows(tokenizer)
    found = encoder.encode(items)
    for item in items:
        for text in (item.prompt, *item.full):
            expected = tokenizer(text, add_special_tokens=not item.chat, verbose=False)["input_ids"]
            assert found[text, item.chat].tolist() == expected, (name, text)
            assert found[text, item.chat].dtype == np.int32
    assert encoder._core is not None
    assert encoder._cuts
    assert (encoder._frame is None) == name.startswith("metaspace")


def test_a_prompt_is_encoded_once_for_all_its_answers() -> None:
    tokenizer = tiny_tokenizer()
    encoder, items = Encoder(tokenizer), rows(tokenizer)
    encoder.encode(items[:2])  # the first texts are encoded in both ways
    seen: list[str] = []

    class Core:
        def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> Any:
            seen.extend(texts)
            return tokenizer.backend_tokenizer.encode_batch_fast(
                texts, add_special_tokens=add_special_tokens
            )

    encoder._core = Core()
    chat = render_answers(
        tokenizer, [{"role": "user", "content": "why?"}], {"chosen": "air", "rejected": "sky"}, {}
    )
    encoder.encode([chat])
    assert seen == [
        "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>",
        "<|im_start|>assistant\n",
        "<|im_start|>assistant\nair<|im_end|>\n",
        "<|im_start|>assistant\nsky<|im_end|>\n",
    ]


def test_a_plain_prompt_is_encoded_once_but_for_its_last_word() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    encoder = Encoder(tokenizer)
    encoder.encode([Rendered("a b", ("a b c",), chat=False)])
    seen: list[str] = []
    inner = encoder._ids
    encoder._ids = lambda texts, *, special: seen.extend(texts) or inner(texts, special=special)
    prompt = "why is the sky blue? "
    item = Rendered(prompt, (prompt + "air", prompt + " no"), chat=False)
    found = encoder.encode([item])
    assert seen == ["why is the sky", " blue? ", " blue? air", " blue?  no"]
    assert all(ids.tolist() == tokenizer(text)["input_ids"] for (text, _), ids in found.items())


PIECES = [
    "a",
    "sky",
    " ",
    "  ",
    "\n",
    "'s",
    "'",
    "9",
    "12",
    "é",
    "e\u0301",
    "ß",
    "。",
    "<|im_end|>",
]
PIECES += [" the", "The", "\t", "x y", ".", "-", "😀", "<", "ll", "\u00a0", "\u0301"]


@pytest.mark.parametrize("name", ["with bos", "expression 0", "expression 1", "expression 2"])
def test_no_text_is_cut_where_it_matters(name) -> None:
    tokenizer, draw = TOKENIZERS[name](), random.Random(0)

    def text() -> str:
        return "".join(draw.choices(PIECES, k=draw.randint(1, 12)))

    items = []
    for _ in range(500):
        prompt = text()
        items.append(Rendered(prompt, (prompt + text(), prompt + text()), chat=False))
    found = Encoder(tokenizer).encode(items)
    texts = [text for item in items for text in (item.prompt, *item.full)]
    expected = tokenizer(texts, verbose=False)["input_ids"]
    assert [found[text, False].tolist() for text in texts] == expected


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("a b", special=False),
        AddedToken("sky", lstrip=True, special=False),
        AddedToken("sky", rstrip=True, special=False),
    ],
    ids=["across", "before", "behind"],
)
def test_added_tokens_that_take_blanks_forbid_cuts_between_words(token) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([token])
    assert Encoder(tokenizer)._frame is None


class Odd:
    """A tokenizer whose own call does more than its core."""

    def __init__(self) -> None:
        self._inner = tiny_tokenizer()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, texts: Any, **options: Any) -> Any:
        found = self._inner(texts, **options)
        return {"input_ids": [[7, *one] for one in found["input_ids"]]}


def test_a_tokenizer_that_does_more_than_its_core_is_asked_itself() -> None:
    tokenizer = Odd()
    items = rows(tokenizer)
    found = Encoder(tokenizer).encode(items)
    assert all(ids[0] == 7 for ids in found.values())


def test_a_core_that_cuts_or_pads_is_not_used() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    items = rows(tokenizer)
    found = Encoder(tokenizer).encode(items)
    assert max(map(len, found.values())) > 3
