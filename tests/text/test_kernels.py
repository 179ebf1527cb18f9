"""What computes packed rows on GPUs, as far as a CPU can tell.

Flex attention runs here by torch's own eager arithmetic, with gradients. Kernels that take
sequences by their lengths are stood in for by functions of the same signature, which go sequence by
sequence.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention import varlen as torch_varlen
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from alignkit.errors import ConfigError
from alignkit.text import flex, varlen
from alignkit.text.backend import TextBackend
from alignkit.text.kernels import KERNELS, PLAIN, Call, chosen
from alignkit.text.likelihood import TextLikelihood
from alignkit.text.masks import PackedMask
from alignkit.text.packing import Group, spans
from alignkit.text.policy import checkpoint_layers
from tests.losses.no_sync import NoSync
from tests.text.models import make
from tests.text.test_packing import SHAPES, WANT, assert_equal, batch_of, computed, laid

LONG = ((60, (20, 1, 30)), (70, (12,)), (40, (9, 52)))
"""Several blocks of 128 tokens."""
GROUPS = (Group(0, 300, (40, 0, 90)), Group(430, 150), Group(580, 20, (33, 7)))
LENGTH = 640


@pytest.fixture
def eager(monkeypatch) -> None:
    """Flex attention without its compiler. Torch forbids gradients on CPUs, and has them."""
    monkeypatch.setattr(flex, "compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(flex, "missing", lambda device: None)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    serve(monkeypatch, "flex")


def serve(monkeypatch: Any, name: str, **changes: Any) -> None:
    """A kernel of the table counts as there."""
    there = replace(KERNELS[name], missing=lambda device: None, **changes)
    monkeypatch.setitem(KERNELS, name, there)


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float,
    window: tuple[int, int],
    softcap: float = 0.0,
) -> Tensor:
    """Sequence by sequence, counted from the lower right: (tokens, heads, size)."""
    edges = [one.tolist() for one in starts]
    assert all(one.dtype == torch.int32 for one in starts)
    assert longest == tuple(max(b - a for a, b in pairwise(e)) for e in edges)
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    out = []
    for place in range(len(edges[0]) - 1):
        asked, seen = (slice(one[place], one[place + 1]) for one in edges)
        q, k, v = query[asked], key[seen], value[seen]
        scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        ahead = torch.arange(len(k))[None] - torch.arange(len(q))[:, None] - (len(k) - len(q))
        hidden = (ahead > window[1]) | ((ahead < -window[0]) if window[0] >= 0 else False)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v.double()).to(q.dtype))
    return torch.cat(out)


def fake_torch(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
) -> Tensor:
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return dense(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale, tuple(window_size))


def fake_flash(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
) -> Tensor:
    assert causal and dropout_p == 0
    window = (window_size[0], 0)
    longest = (max_seqlen_q, max_seqlen_k)
    starts = (cu_seqlens_q, cu_seqlens_k)
    return dense(q, k, v, starts, longest, softmax_scale, window, softcap)


@pytest.fixture(params=["torch", "flash_attn"])
def lengths(request, monkeypatch) -> str:
    """Either of the functions that take sequences by their lengths, on a CPU in float32."""
    if request.param == "torch":
        monkeypatch.setattr(torch_varlen, "varlen_attn", fake_torch)
    else:
        monkeypatch.setattr(varlen, "_torch_has_it", lambda: False)
    package: Any = ModuleType("flash_attn")
    package.__spec__ = importlib.util.spec_from_loader("flash_attn", None)
    package.flash_attn_varlen_func = fake_flash
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    serve(monkeypatch, "varlen", takes=lambda call: True)
    return request.param


def test_the_stand_in_has_the_signature_of_torchs_own() -> None:
    own, ours = (inspect.signature(f).parameters for f in (torch_varlen.varlen_attn, fake_torch))
    assert list(own) == list(ours)
    assert [(p.kind, p.default) for p in own.values()] == [
        (p.kind, p.default) for p in ours.values()
    ]


FAMILIES = [
    "gemma2",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("llama", "mistral", "gpt2", "gemma3")
    ),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_flex_attention_gives_what_padded_rows_give(family, eager) -> None:
    module, batch = TextLikelihood(make(family)), batch_of(LONG)
    expected = computed(module, batch)
    module.kernels = ("flex",)
    for layout in ("prefix", "varlen"):
        assert_equal(computed(module, laid(batch, layout)), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_kernels_by_lengths_give_what_padded_rows_give(family, lengths) -> None:
    module, batch = TextLikelihood(make(family)), batch_of(SHAPES)
    expected = computed(module, batch)
    module.kernels = ("varlen",)
    for layout in ("prefix", "varlen"):
        assert_equal(computed(module, laid(batch, layout)), expected)


def test_a_recomputed_block_finds_its_kernel_again(lengths) -> None:
    model = make("llama")
    module, batch = TextLikelihood(model), batch_of(SHAPES, "prefix")
    expected = computed(module, batch)
    checkpoint_layers(model)
    module.kernels = ("varlen",)
    assert_equal(computed(module, batch), expected)


def test_the_host_does_not_wait_for_a_plan(eager, lengths) -> None:
    mask = PackedMask(GROUPS, causal_mask_function, None)
    with NoSync():
        flex.block_mask(mask, torch.device("cpu"))
        where = varlen.plan(GROUPS, torch.device("cpu"))
    assert where.queries is not where.keys
    alone = varlen.plan((Group(0, 5), Group(5, 3)), torch.device("cpu"))
    assert alone.queries is alone.keys and alone.places is None  # as cuDNN asks for


PATTERNS: dict[str, tuple[Callable[..., Tensor], int | None]] = {
    "causal": (causal_mask_function, None),
    "sliding": (sliding_window_causal_mask_function(70), 70),
    "chunked": (chunked_causal_mask_function(70, torch.zeros(1, dtype=torch.int64)), 70),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_blocks_hold_who_sees_whom(pattern) -> None:
    """Against the definition: same sequence or its prompt, by positions in the sequence."""
    function, reach = PATTERNS[pattern]
    mask = PackedMask(GROUPS, function, reach)
    assert mask.slides == (pattern == "sliding")
    wanted = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for group in GROUPS:
        prompt, _, each = spans(group)
        for part in (prompt, *each):
            own = list(range(part.start, part.stop))
            row = own if part == prompt else [*range(prompt.start, prompt.stop), *own]
            places = torch.arange(len(row))
            seen = function(0, 0, places[:, None], places[None]) & (places[:, None] >= places)
            for place in range(len(row) - len(own), len(row)):
                wanted[row[place], row] = seen[place]
    made = flex.block_mask(mask, torch.device("cpu"))
    places = torch.arange(LENGTH)
    seen = made.mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places[None])
    assert torch.equal(seen, wanted)
    number = LENGTH // flex.BLOCK
    blocks = wanted.view(number, flex.BLOCK, number, flex.BLOCK).sum((1, 3))
    assert (made.to_dense()[0, 0][blocks > 0] == 1).all()
    if pattern != "chunked":  # whose blocks are told by the tokens that come before
        assert torch.equal(made.to_dense()[0, 0] > 0, blocks > 0)
        full = int((blocks == flex.BLOCK**2).sum())
        assert int(made.full_kv_num_blocks.sum()) == full and (full > 0) == (reach is None)


def call_of(**changes: Any) -> Call:
    mask = PackedMask(GROUPS, causal_mask_function, None)
    given = Call(mask, (4, 2), (16, 16), 0.25, None, torch.bfloat16, torch.device("cpu"))
    return replace(given, **changes)


def test_what_is_not_there_is_not_tried() -> None:
    assert chosen("auto", [call_of()]) == (PLAIN, {})
    for name in ("varlen", "flex"):
        _, refused = chosen(name, [call_of()])
        assert "on CUDA GPUs" in refused[name]


def test_the_first_that_passes_its_trial_computes(eager, lengths, monkeypatch) -> None:
    serve(monkeypatch, "varlen", takes=lambda call: call.softcap is None)
    assert chosen("auto", [call_of()]) == (("varlen", *PLAIN), {})
    # A layer that it does not take goes to the next.
    both = [call_of(), call_of(softcap=2.0)]
    assert chosen("auto", both) == (("varlen", "flex", *PLAIN), {})
    assert "soft-capped" in chosen("varlen", both)[1]["varlen"]
    assert chosen("flex", both) == (("flex",), {})


def test_a_kernel_that_is_wrong_or_fails_is_passed_over(eager, lengths, monkeypatch) -> None:
    def upper_left(*given: Any, **named: Any) -> Tensor:
        """As if causality were counted from the upper left."""
        query, key, value, call = given
        return KERNELS["sequences"].run(query, key.roll(1, 2), value, call)

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    serve(monkeypatch, "varlen", run=upper_left)
    serve(monkeypatch, "flex", run=fails)
    kernels, refused = chosen("auto", [call_of()])
    assert kernels == PLAIN
    assert "off by" in refused["varlen"] and "no kernel image" in refused["flex"]


def test_the_backend_takes_up_the_choice_and_tells_it(eager) -> None:
    module, other = TextLikelihood(make("gemma2")), TextLikelihood(make("gemma2"))
    backend = TextBackend(module)
    backend.beside.append(other)
    backend.choose("prefix", "flex")
    assert module.kernels == other.kernels == ("flex",)
    assert backend.facts()["attention over packed rows"] == "flex"
    with pytest.raises(ConfigError, match=r"attention='varlen' cannot.*Write attention='auto'"):
        backend.choose("prefix", "varlen")


@pytest.mark.slow
def test_rows_of_other_lengths_are_not_compiled_anew(monkeypatch) -> None:
    """The kernel as it is used, compiled; CPUs have it without gradients."""
    serve(monkeypatch, "flex")
    module = TextLikelihood(make("mistral"))
    module.kernels = ("flex",)
    counters = torch._dynamo.utils.counters["stats"]
    found = []
    for shapes in (LONG, (*LONG, (60, (20, 9))), ((90, (20, 1, 30)), *LONG, (33, (3,)))):
        batch = batch_of(shapes)
        with torch.no_grad():
            expected = module(batch, want=WANT).extras["token_logps"]
            packed = module(laid(batch, "prefix"), want=WANT).extras["token_logps"]
        torch.testing.assert_close(packed, expected, rtol=1e-6, atol=1e-5)
        found.append(counters["unique_graphs"])
    assert 0 < found[0] == found[1] == found[2]


@pytest.mark.slow
# The compiler looks at an attribute of its inputs that warns of being looked at.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks_take_packed_rows_of_any_length() -> None:
    """Compiled for one length and then for all, with gradients and without; no code is made."""
    plain, module = (TextLikelihood(make("mistral")) for _ in range(2))
    torch._dynamo.reset()
    for unit in module.shard_units():
        unit.compile(backend="eager")
    counters = torch._dynamo.utils.counters["stats"]
    found = []
    for shapes in (SHAPES, LONG, ((3, (2, 2)), (5, (6,))), (*LONG, *SHAPES)):
        batch = batch_of(shapes, "prefix")
        assert_equal(computed(module, batch), computed(plain, batch))
        with torch.no_grad():
            module(batch)
        found.append(counters["unique_graphs"])
    assert 0 < found[1] == found[2] == found[3]
