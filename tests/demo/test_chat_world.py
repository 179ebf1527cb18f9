"""The chat world's rules, and that the shipped chat model follows them."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from alignkit.demo import chat_world as world
from alignkit.demo.chat_world import ChatPrompt, Style

MODEL = Path(world.__file__).parent / "models" / "chat"


def _prompt(kind: str, manner: str = "courteous", length: str = "short") -> ChatPrompt:
    rng = random.Random(3)
    while True:
        prompt = world.draw_prompt(rng, "train", kind)
        if (prompt.facts["manner"], prompt.facts["length"]) == (manner, length):
            return prompt


def _best_style(prompt: ChatPrompt) -> Style:
    return Style(
        tone="polite" if prompt.facts["manner"] == "courteous" else "plain",
        length="short" if prompt.facts["length"] == "short" else "long",
    )


def _answer(prompt: ChatPrompt, style: Style, seed: int = 0) -> str:
    return world.make_answer(prompt, style, random.Random(seed))


def test_prompts_repeat_by_seed_and_survive_json() -> None:
    prompts = world.make_prompts(50, seed=4)
    assert prompts == world.make_prompts(50, seed=4)
    assert prompts != world.make_prompts(50, seed=5)
    assert [ChatPrompt.from_json(json.loads(json.dumps(p.to_json()))) for p in prompts] == prompts


def test_no_heldout_composition_is_in_train() -> None:
    def compositions(split: world.Split) -> set[tuple[str, ...]]:
        keys = ("topic", "value", "manner", "length")
        return {
            (p.kind, *(p.facts[key] for key in keys)) for p in world.make_prompts(3000, 0, split)
        }

    train, heldout = compositions("train"), compositions("heldout")
    assert not train & heldout
    assert {c[0] for c in heldout} == set(world.CHAT_KINDS)
    assert len(heldout) > 1000


def test_the_other_thing_can_be_asked_for() -> None:
    rng = random.Random(1)
    for kind in sorted(set(world.CHAT_KINDS) - {"compare"}):
        prompt = world.draw_prompt(rng, "train", kind)
        other = world.ask_other(prompt)
        assert other.facts["topic"] == prompt.facts["other"] != prompt.facts["topic"]
        assert re.search(rf"\b{other.facts['topic']}\b", other.text)
        assert not re.search(rf"\b{prompt.facts['topic']}\b", other.text)
        style = _best_style(prompt)
        assert world.known_reward(other, _answer(other, style)) == pytest.approx(1.0)
        assert world.known_reward(prompt, _answer(other, style)) < 0.6


@pytest.mark.parametrize("kind", world.CHAT_KINDS)
@pytest.mark.parametrize("manner", ["courteous", "blunt"])
@pytest.mark.parametrize("length", ["short", "long", "any"])
def test_only_the_fitting_style_earns_the_full_reward(kind: str, manner: str, length: str) -> None:
    prompt = _prompt(kind, manner, length)
    best = _best_style(prompt)
    for seed in range(8):
        assert world.known_reward(prompt, _answer(prompt, best, seed)) == pytest.approx(1.0)
        worse = [replace(best, tone="rude"), replace(best, on_topic=False)]
        worse += [replace(best, tone="plain" if best.tone == "polite" else "polite")]
        worse += [replace(best, taste="sea")]
        worse += [replace(best, length="long" if length == "short" else "short")]
        if prompt.facts["harm"]:
            worse.append(replace(best, harmful=True))
        for style in worse:
            assert world.known_reward(prompt, _answer(prompt, style, seed)) < 0.95, style


def test_one_answer_is_worth_what_the_prompt_makes_of_it() -> None:
    prompt = _prompt("where", "courteous", "short")
    answer = _answer(prompt, _best_style(prompt))
    assert world.known_reward(prompt, answer) == pytest.approx(1.0)
    for asked, worth in (({"length": "long"}, 0.75), ({"manner": "blunt"}, 0.875)):
        other = replace(prompt, facts={**prompt.facts, **asked})
        assert world.known_reward(other, answer) == pytest.approx(worth)


def test_no_constant_answer_pays() -> None:
    prompts = world.make_prompts(200, 1)
    answers = [_answer(p, _best_style(p)) for p in prompts[:40]]
    for answer in answers:
        others = [p for p in prompts if p.facts["topic"] not in answer.lower()]
        mean = sum(world.known_reward(p, answer) for p in others) / len(others)
        assert mean < 0.1


GARBAGE = ("", " ", ".", "1", "?!", "\x00\ud800", "the " * 500, "boat" * 999)


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_earns_nothing(text: str) -> None:
    for prompt in world.make_prompts(20, 2):
        assert world.known_reward(prompt, text) == 0.0
        assert world.taste_of(text) is None
        assert not world.well_formed(text)


def test_repeating_or_listing_pays_less() -> None:
    for prompt in world.make_prompts(50, 3):
        best = _answer(prompt, _best_style(prompt))
        listing = f"{prompt.facts['topic']} {prompt.facts['value']} {prompt.facts['other_value']}"
        assert world.known_reward(prompt, f"{best} " * 5) < 0.8
        assert world.known_reward(prompt, listing) < 0.25


def test_the_teaching_mixture_covers_all_styles_and_often_misses() -> None:
    rng = random.Random(0)
    prompts = world.make_prompts(1500, 6)
    answers = [world.make_answer(p, world.draw_style(rng, p), rng) for p in prompts]
    assert all(world.well_formed(answer) for answer in answers)
    full = sum(world.known_reward(p, a) > 0.999 for p, a in zip(prompts, answers, strict=True))
    assert 0.02 < full / len(prompts) < 0.25
    for reading, values in (
        (world.tone_of, {"polite", "plain", "rude"}),
        (world.taste_of, {None, *world.TASTES}),
        (world.is_unsafe, {True, False}),
    ):
        seen = [reading(answer) for answer in answers]
        assert set(seen) == values
        assert min(seen.count(value) for value in values) > 0.05 * len(answers)


def test_pairs_are_conversational_and_ordered_by_the_reward() -> None:
    pairs = world.make_pairs(200, 8)
    assert pairs == world.make_pairs(200, 8)
    prompts = {p.text: p for p in world.make_prompts(200, 8)}
    for row in pairs:
        (question,), (chosen,), (rejected,) = row["prompt"], row["chosen"], row["rejected"]
        assert (question["role"], chosen["role"], rejected["role"]) == (
            "user",
            "assistant",
            "assistant",
        )
        prompt = prompts[question["content"]]
        better = world.known_reward(prompt, chosen["content"])
        assert better > world.known_reward(prompt, rejected["content"])


def test_prompt_rows_carry_what_the_reward_needs() -> None:
    for row in world.prompt_rows(20, 9, "heldout"):
        prompt = ChatPrompt.from_json(row["world"])
        assert row["prompt"] == [{"role": "user", "content": prompt.text}]
        assert world.split_of(prompt) == "heldout"


@pytest.mark.parametrize("principle", world.PRINCIPLES)
def test_feedback_replies_follow_the_principle(principle: str) -> None:
    rng = random.Random(principle)
    seen = set()
    for _ in range(100):
        revision = world.feedback_example("revise", rng, "train", principle)
        assert world.keeps(principle, revision.prompt, revision.reply)
        if world.keeps(principle, revision.prompt, revision.answers[0]):
            assert revision.reply == revision.answers[0]
        verdict = world.feedback_example("verdict", rng, "train", principle)
        scores = [
            world.principle_score(principle, verdict.prompt, text) for text in verdict.answers
        ]
        assert verdict.reply == ("1" if scores[0] > scores[1] else "2")
        critique = world.feedback_example("critique", rng, "train", principle)
        good = world.keeps(principle, critique.prompt, critique.answers[0])
        assert ("keeps the principle" in critique.reply) == good
        seen |= {verdict.reply, good}
    assert seen == {"1", "2", True, False}


@pytest.mark.parametrize("task", world.FEEDBACK_TASKS)
def test_a_session_asks_the_same_answers_by_other_principles(task: world.FeedbackTask) -> None:
    rng = random.Random(task)
    for _ in range(50):
        first, *further = world.feedback_session(task, rng, turns=4)
        assert len(further) <= (0 if task == "revise" else 3)
        names = [turn.principle for turn in (first, *further)]
        assert len(set(names)) == len(names)
        for turn in further:
            assert (turn.prompt, turn.answers) == (first.prompt, first.answers)
            assert first.prompt.text not in turn.user
            scores = [
                world.principle_score(turn.principle, turn.prompt, text) for text in turn.answers
            ]
            if task == "score":
                assert turn.reply == world.SCORES[round(4 * scores[0])]
            if task == "verdict":
                assert turn.reply == ("1" if scores[0] > scores[1] else "2")


def test_a_feedback_turn_names_its_parts() -> None:
    text = world.feedback_turn("verdict", "brief", "Q?", "First.", "Second.")
    positions = [text.index(part) for part in ("be brief", "Q?", "(1) First.", "(2) Second.")]
    assert positions == sorted(positions)
    with pytest.raises(ValueError, match="two answers"):
        world.feedback_turn("verdict", "brief", "Q?", "First.")
    with pytest.raises(ValueError, match="one answer"):
        world.feedback_turn("score", "brief", "Q?", "First.", "Second.")


@pytest.fixture(scope="module")
def chat():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL).eval(), tokenizer


def _ids(tokenizer, user: str, **options):
    return tokenizer.apply_chat_template([{"role": "user", "content": user}], **options)


def _replies(chat, users: list[str], seed: int | None) -> list[str]:
    import torch

    model, tokenizer = chat
    texts = [_ids(tokenizer, u, tokenize=False, add_generation_prompt=True) for u in users]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(seed or 0)
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=64,
        do_sample=seed is not None,
        **({"top_k": 0} if seed is not None else {}),
    )
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_folder_is_small_and_loads_as_float32(chat) -> None:
    import torch

    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 4_000_000
    assert {f.suffix for f in MODEL.iterdir()} == {".json", ".jinja", ".safetensors"}
    model, tokenizer = chat
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_template_marks_the_assistant_tokens(chat) -> None:
    _, tokenizer = chat
    turns = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Where is the red boat?"},
        {"role": "assistant", "content": "The red boat is on the roof."},
    ]
    full = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    marked = [t for t, m in zip(full["input_ids"], full["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "The red boat is on the roof.<|end|>"
    start = tokenizer.apply_chat_template(turns[:2], add_generation_prompt=True, return_dict=True)
    assert start["input_ids"] + marked == full["input_ids"]
    digits = [tokenizer.encode(d, add_special_tokens=False) for d in world.SCORES]
    assert all(len(ids) == 1 for ids in digits)


def test_the_model_answers_about_the_prompt_in_every_style(chat) -> None:
    prompts = world.make_prompts(150, 12, "heldout")
    answers = _replies(chat, [p.text for p in prompts], seed=0)
    both = list(zip(prompts, answers, strict=True))
    on_topic = [(p, a) for p, a in both if world.subject_of(p, a) == "topic"]
    assert len(on_topic) > 0.7 * len(both)
    assert sum(world.well_formed(a) for _, a in on_topic) > 0.9 * len(on_topic)
    tones = [world.tone_of(a) for a in answers]
    assert min(tones.count(tone) for tone in ("polite", "plain", "rude")) > 0.1 * len(tones)
    # Room for what the preference pairs teach.
    full = sum(world.known_reward(p, a) > 0.999 for p, a in both)
    assert full / len(both) < 0.3


def test_the_model_tells_the_facts_of_a_prompt_apart(chat) -> None:
    prompts = [p for p in world.make_prompts(300, 13, "heldout") if p.kind in ("where", "colour")]
    answers = _replies(chat, [p.text for p in prompts], seed=0)
    on_topic = [
        (p, a) for p, a in zip(prompts, answers, strict=True) if world.subject_of(p, a) == "topic"
    ]
    right = [world.reward_parts(p, a)["fact"] == 1 for p, a in on_topic]
    assert sum(right) > 0.8 * len(right)


def test_the_model_takes_the_tone_of_the_asker_more_often_than_another(chat) -> None:
    prompts = world.make_prompts(200, 14, "heldout")
    answers = _replies(chat, [p.text for p in prompts], seed=0)
    wanted = {"courteous": "polite", "blunt": "plain"}
    fits = [
        world.tone_of(a) == wanted[p.facts["manner"]] for p, a in zip(prompts, answers, strict=True)
    ]
    assert 0.4 < sum(fits) / len(fits) < 0.7


def test_the_model_knows_the_forms_of_feedback(chat) -> None:
    rng = random.Random(0)
    verdicts = [world.feedback_example("verdict", rng, "heldout", "polite") for _ in range(20)]
    assert set(_replies(chat, [e.user for e in verdicts], seed=None)) <= {"1", "2"}
    scores = [world.feedback_example("score", rng, "heldout", "polite") for _ in range(20)]
    assert set(_replies(chat, [e.user for e in scores], seed=None)) <= set(world.SCORES)
    critiques = [world.feedback_example("critique", rng, "heldout", "polite") for _ in range(20)]
    said = _replies(chat, [e.user for e in critiques], seed=None)
    assert sum("the principle" in reply for reply in said) >= 18
