"""Answers in tokens: equal to a plain loop over one row without a cache, whatever the batch, the
model's cache, retired rows, shared prompts or the adapter; and distributed as the model says."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alignkit.adapters import adapters_off
from alignkit.batches import Batch
from alignkit.capabilities import SampledAnswer, SamplesTokens
from alignkit.draws import generator
from alignkit.errors import ConfigError
from alignkit.options import GenerationOptions, LoRA
from alignkit.text import generation
from alignkit.text.content import TextContent
from alignkit.text.generation import generate
from tests.builders import text_wing, tiny_tokenizer
from tests.text.models import MODELS, VOCABULARY, make

EOS = [2, 11, 23, 42]
"""Several, so that answers of random models end at many places."""


def plainly(
    model: Any, prompt: Any, options: GenerationOptions, key: tuple[int, ...], eos: list[int]
) -> SampledAnswer:
    """The answer by a forward of the whole row per token."""
    uniforms = generator("sample", *key).random(options.max_new_tokens)
    ids, logps = list(map(int, prompt)), []
    for number in uniforms:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        scores = logits / options.temperature
        if options.top_k:
            scores[scores < scores.topk(options.top_k).values[-1]] = -math.inf
        if options.top_p < 1:
            ordered, places = scores.softmax(-1).sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            scores[places[before >= options.top_p]] = -math.inf
        chances = scores.softmax(-1)
        token = int((chances.cumsum(-1) <= number).sum())
        logps.append(float(chances[token].log()))
        ids.append(token)
        if token in eos:
            return SampledAnswer(ids[len(prompt) :], True, logps)
    return SampledAnswer(ids[len(prompt) :], False, logps)


def prompts_of(sizes: list[int]) -> list[Any]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, VOCABULARY, size).astype(np.int32) for size in sizes]


def batch_of(asked: list[Any], found: list[SampledAnswer]) -> Batch:
    """Groups of one: each prompt with its answer."""
    answers = tuple(np.array(one.ids, dtype=np.int32) for one in found)
    content = TextContent(tuple(asked), answers, tuple(range(len(found))))
    index = torch.arange(len(found))
    return Batch(content, index, torch.zeros_like(index), index, index)


def same(found: list[SampledAnswer], expected: list[SampledAnswer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.ids, one.ended) == (other.ids, other.ended)
        assert one.logps == pytest.approx(other.logps, abs=2e-4)


FAST = ("llama", "gpt2")
FAMILIES = [
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in sorted(MODELS)
]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_a_plain_loop(family: str) -> None:
    """Ragged prompts; one prompt four times; rows that end early; a filter and a temperature."""
    model, tokenizer = make(family), None
    ragged, one = prompts_of([3, 9, 14, 5, 4, 11]), prompts_of([17])
    asked = [*ragged, *one * 4]
    keys = [(7, 1, place) for place in range(len(asked))]
    options = GenerationOptions(max_new_tokens=12, temperature=1.3, top_k=60, top_p=0.97)
    expected = [plainly(model, p, options, k, EOS) for p, k in zip(asked, keys, strict=True)]
    lengths = [len(answer.ids) for answer in expected]
    assert len(set(lengths)) > 2 and any(a.ended for a in expected), "rows end at many places"
    same(generate(model, tokenizer, asked, options, keys, EOS), expected)
    same(generate(model, tokenizer, one * 4, options, keys[6:], EOS), expected[6:])
    same(generate(model, tokenizer, asked[:1], options, keys[:1], EOS), expected[:1])


def test_rows_that_are_done_are_not_computed(monkeypatch: Any) -> None:
    model, asked = make("llama"), prompts_of([6] * 32)
    keys = [(0, place) for place in range(32)]
    options, sizes = GenerationOptions(max_new_tokens=40), []
    forward = type(model).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    found = generate(model, None, asked, options, keys, EOS)
    needed = sum(len(answer.ids) - 1 for answer in found)
    longest = max(len(answer.ids) for answer in found)
    decoded = sum(sizes) - 32 * 6
    assert decoded <= 2 * needed + longest and decoded < 0.7 * 32 * (longest - 1)
    # Nor is a prompt read more than once for its answers.
    sizes.clear()
    generate(model, None, prompts_of([30]) * 16, options, keys[:16], EOS)
    assert sizes[0] == 29 and all(size <= 16 for size in sizes[1:])


def test_an_answer_depends_on_its_key_alone(monkeypatch: Any) -> None:
    model, asked = make("llama"), prompts_of([3, 9, 14, 5] * 3)
    keys = [(0, 4, place) for place in range(12)]
    options = GenerationOptions(max_new_tokens=10)
    whole = generate(model, None, asked, options, keys, EOS)
    order = np.random.default_rng(1).permutation(12)
    shuffled = generate(
        model, None, [asked[i] for i in order], options, [keys[i] for i in order], EOS
    )
    same(shuffled, [whole[i] for i in order])
    monkeypatch.setattr(generation, "TOKENS_PER_BATCH", 40)
    same(generate(model, None, asked, options, keys, EOS), whole)
    other = generate(model, None, asked, options, [(0, 5, place) for place in range(12)], EOS)
    assert sum(a.ids == b.ids for a, b in zip(other, whole, strict=True)) < 4


# ---- the distribution


def tabular() -> Any:
    """A language model that is a table: logits after a token are a row of it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = 5
    config = GPT2Config(
        vocab_size=size, n_positions=8, n_embd=size, n_layer=1, n_head=1,
        tie_word_embeddings=False, eos_token_id=0, bos_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    # Blocks add nothing; the norm of a one-hot embedding is that vector, scaled and shifted.
    torch.nn.init.eye_(model.transformer.wte.weight)
    torch.nn.init.ones_(model.transformer.ln_f.weight)
    with torch.no_grad():
        model.lm_head.weight.copy_(0.8 * torch.randn(size, size, generator=draw))
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_are_the_products_of_the_model_s_probabilities(temperature: float) -> None:
    """Chi-square over all answers of at most two tokens, at the 1e-4 level."""
    from scipy.stats import chi2

    model, num, eos = tabular(), 6000, 0
    with torch.no_grad():
        logits = model(input_ids=torch.arange(5)[:, None]).logits[:, 0].double()
    step = (logits / temperature).softmax(-1)
    chances = {(eos,): float(step[3, eos])}
    for a in range(1, 5):
        chances |= {(a, b): float(step[3, a] * step[a, b]) for b in range(5)}
    options = GenerationOptions(max_new_tokens=2, temperature=temperature)
    prompt = np.array([3], dtype=np.int32)
    found = generate(model, None, [prompt] * num, options, [(5, i) for i in range(num)], [eos])
    counts = Counter(tuple(answer.ids) for answer in found)
    assert set(counts) <= set(chances) and sum(chances.values()) == pytest.approx(1)
    statistic = sum((counts[a] - num * p) ** 2 / (num * p) for a, p in chances.items())
    assert statistic < chi2.ppf(1 - 1e-4, df=len(chances) - 1)
    for answer in found[:50]:
        assert sum(answer.logps) == pytest.approx(math.log(chances[tuple(answer.ids)]), abs=1e-5)
        assert answer.ended == (answer.ids[-1] == eos)


def test_sampled_log_probabilities_are_the_likelihood_s() -> None:
    """At temperature 1, token by token, with an adapter on and off."""
    wing = text_wing("qwen2", adapter=LoRA(rank=4))
    assert isinstance(wing, SamplesTokens)
    with torch.no_grad():
        for name, parameter in wing.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    asked = [np.arange(5, 5 + size, dtype=np.int32) for size in (4, 9, 9, 6)]
    options, keys = GenerationOptions(max_new_tokens=12), [(0, 0, place) for place in range(4)]

    def pair() -> tuple[list[SampledAnswer], Any]:
        found = wing.generate_tokens(asked, options, keys=keys)
        batch = batch_of(asked, found)
        return found, wing.backend.module(batch, None, frozenset({"token_logps"}))

    answers = {}
    for state in ("on", "off"):
        with torch.no_grad(), adapters_off(wing.policy) if state == "off" else SwitchedOn():
            found, likelihood = pair()
        table = likelihood.extras["token_logps"]
        for row, answer in zip(table.tolist(), found, strict=True):
            assert answer.logps == pytest.approx(row[: len(answer.logps)], abs=1e-5)
        answers[state] = [answer.ids for answer in found]
    assert answers["on"] != answers["off"]


class SwitchedOn:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


# ---- ends


def test_a_stop_string_ends_an_answer_and_is_its_last_token() -> None:
    wing = text_wing("llama")
    tokenizer = tiny_tokenizer()
    asked = [np.array([5, 6, 7], dtype=np.int32)] * 24
    keys = [(1, place) for place in range(24)]
    free = wing.generate_tokens(asked, GenerationOptions(max_new_tokens=30), keys=keys)
    texts = [tokenizer.decode(answer.ids) for answer in free]
    # Letters of two tokens in a row, so that the string is found across them.
    stop = tokenizer.decode(free[0].ids[8:10])
    options = GenerationOptions(max_new_tokens=30, stop=(stop, "e"))
    found = wing.generate_tokens(asked, options, keys=keys)
    assert any(stop in text for text in texts)
    for answer, whole in zip(found, free, strict=True):
        begun = (whole.ids[:n] for n in range(1, 31))
        ends = (b for b in begun if any(s in tokenizer.decode(b) for s in options.stop))
        expected = next(ends, whole.ids)
        assert answer.ids == expected and len(answer.logps) == len(expected)
        assert answer.ended == (whole.ended or len(expected) < 30)
    assert any(answer.ended and answer.ids[-1] != 3 for answer in found)


def test_a_prompt_to_learn_from_is_not_cut() -> None:
    wing, prompt = text_wing("llama"), np.full(250, 5, dtype=np.int32)
    options = GenerationOptions(max_new_tokens=6)
    assert len(wing.generate_tokens([prompt], options, keys=[(0,)])[0].ids) <= 6
    with pytest.raises(ConfigError, match=r"250 tokens and its answer up to 7 .*256 positions"):
        wing.generate_tokens([prompt], GenerationOptions(max_new_tokens=7), keys=[(0,)])


def test_no_step_keeps_its_scores(monkeypatch: Any) -> None:
    import weakref

    from alignkit.text.picking import Pick

    made: list[Any] = []
    pick = Pick.__call__

    def watched(self: Any, ids: Any, scores: Any) -> Any:
        assert sum(one() is not None for one in made) <= 1
        made.append(weakref.ref(scores))
        return pick(self, ids, scores)

    monkeypatch.setattr(Pick, "__call__", watched)
    options = GenerationOptions(max_new_tokens=9)
    generate(make("llama"), None, prompts_of([6] * 8), options, [(0, i) for i in range(8)], [])
    assert len(made) == 9


def test_processes_without_work_keep_step() -> None:
    """A process that has fewer batches than another runs as many."""
    counts = torch.tensor([1, 3])
    together = SimpleNamespace(rank=0, size=2, gather=lambda value: counts)
    steps = list(generation._in_step([[0, 1]], together))  # type: ignore[arg-type]
    assert steps == [[0, 1], [], []]
    assert list(generation._in_step([[0], [1]], None)) == [[0], [1]]
