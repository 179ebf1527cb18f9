"""Published data sets in exactly their own columns, and every format that TRL documents."""

from __future__ import annotations

from typing import Any

import pytest

from alignkit.errors import DataError
from alignkit.text.layouts import LAYOUTS, recognise
from tests.builders import TEMPLATE, tiny_tokenizer
from tests.text.test_data import CHAT, EOS, PLAIN, flat, ids, one, read, turn

# ---- the rows, with the columns and types that the hub shows

HH = {
    "chosen": "\n\nHuman: the sky?\n\nAssistant: blue\n\nHuman: why?\n\nAssistant: the air",
    "rejected": "\n\nHuman: the sky?\n\nAssistant: blue\n\nHuman: why?\n\nAssistant: a fox",
}
TLDR = {
    "info": {
        "id": "t3_34xale",
        "post": "a red fox lives near the river",
        "title": "the fox",
        "subreddit": "forest",
        "site": None,
        "article": None,
    },
    "summaries": [
        {"text": " the sky is blue", "policy": "sup1", "note": None},
        {"text": " a fox in the forest", "policy": "ref", "note": "ok"},
    ],
    "choice": 1,
    "worker": "HNzkrs9geGu1YMMfZ5Qvdt0ZaCthfB",
    "batch": "batch5",
    "split": "train",
    "extra": {"confidence": 7},
}


def rated(text: str, *ratings: str) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {
        "annotations": {
            name: {"Rating": rating, "Rationale": "so"}
            for name, rating in zip(aspects, ratings, strict=True)
        },
        "custom_system_prompt": "Be kind.",
        "model": "bard",
        "principle": "helpfulness",
        "response": text,
        "critique": "fine",
        "overall_score": 7.5,
        "fine-grained_score": 4.25,
    }


ULTRA = {
    "source": "evol_instruct",
    "instruction": "the sky?",
    "models": ["bard", "gpt-4", "llama-2-7b-chat"],
    "completions": [
        rated("a fox", "1", "2", "1", "N/A"),
        rated("blue", "5", "5", "4", "5"),
        rated("grey", "3", "N/A", "N/A", "4"),
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
USER = turn("user", "the sky?")
BINARIZED = {
    "prompt": "the sky?",
    "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
    "chosen": [USER, turn("assistant", "blue")],
    "rejected": [USER, turn("assistant", "a fox")],
    "messages": [USER, turn("assistant", "blue")],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
CLEANED = {
    "source": "evol_instruct",
    "prompt": "the sky?",
    "chosen": [USER, turn("assistant", "blue")],
    "chosen-rating": 4.75,
    "chosen-model": "gpt-4",
    "rejected": [USER, turn("assistant", "a fox")],
    "rejected-rating": 2.0,
    "rejected-model": "bard",
}
STEER = {
    "prompt": "the sky?",
    "response": "blue",
    "helpfulness": 3,
    "correctness": 4,
    "coherence": 4,
    "complexity": 1,
    "verbosity": 2,
}
STEER2 = {
    "split": "train",
    "prompt": "the sky?",
    "response_1": "blue",
    "response_2": "a fox",
    "preference_strength": -2,
    "preference_statement": "Response 1 is better",
    "preference_elaboration": "it answers",
    "three_most_similar_preferences": [],
    "all_preferences_unprocessed": [],
}
STEER3 = {
    "domain": "general",
    "language": "english",
    "context": [USER],
    "response1": "a fox",
    "response2": "blue",
    "overall_preference": 3,
    "individual_preference": [],
}


# ---- recognised


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (HH, "HH-RLHF"),
        (TLDR, "TL;DR comparisons"),
        (ULTRA, "UltraFeedback"),
        (BINARIZED, "UltraFeedback, binarized"),
        (CLEANED, "UltraFeedback, binarized with ratings"),
        (STEER, "HelpSteer"),
        (STEER2, "HelpSteer2 preferences"),
        (STEER3, "HelpSteer3 preferences"),
        (CHAT, None),
        (PLAIN, None),
        ({"chosen": "Human: hi AI: yes", "rejected": "Human: hi AI: no"}, None),
    ],
)
def test_layouts_are_told_by_their_columns(row, name) -> None:
    found = recognise(row)
    assert (found and found.name) == name
    assert [layout.name for layout in LAYOUTS if layout.fits(row)] == ([name] if name else [])


def test_what_was_recognised_is_told(caplog) -> None:
    read([STEER2, STEER2])
    assert caplog.text.count("read as HelpSteer2 preferences, by its columns") == 1


def test_a_layout_without_that_kind_of_rows_says_what_is_missing() -> None:
    with pytest.raises(DataError, match="rows of pairs have the columns chosen, rejected"):
        read([STEER])


# ---- converted


@pytest.mark.parametrize("row", [ULTRA, BINARIZED, CLEANED, STEER2, STEER3])
def test_dialogues_with_a_template_become_the_conversation(row) -> None:
    assert one(row) == one(CHAT)


def test_transcripts_become_conversations_or_stay_text() -> None:
    shared = [USER, turn("assistant", "blue"), turn("user", "why?")]
    sides = {
        name: [*shared, turn("assistant", text)]
        for name, text in (("chosen", "the air"), ("rejected", "a fox"))
    }
    assert one(HH) == one(sides)
    prompt, chosen, rejected = one(HH, tiny_tokenizer(chat=False))
    text = "\n\nHuman: the sky?\n\nAssistant: blue\n\nHuman: why?\n\nAssistant:"
    assert prompt == ids(text)
    assert (chosen, rejected) == ([*ids(" the air"), EOS], [*ids(" a fox"), EOS])


def test_a_transcript_may_go_on_after_the_answers_part() -> None:
    more = {**HH, "chosen": HH["chosen"] + "\n\nHuman: thanks\n\nAssistant: sure"}
    _, chosen, _ = one(more, tiny_tokenizer(chat=False))
    assert chosen == [*ids(" the air\n\nHuman: thanks\n\nAssistant: sure"), EOS]
    with pytest.raises(DataError, match="share no question"):
        one({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"})
    with pytest.raises(DataError, match="rejected is no transcript"):
        read([HH, {**HH, "rejected": "a fox"}])


def test_a_summary_follows_its_post() -> None:
    """The prompt of table 6 in Stiennon et al.; no template, since it is no dialogue."""
    prompt, chosen, rejected = one(TLDR)
    assert prompt == ids(
        "SUBREDDIT: r/forest\n\nTITLE: the fox\n\nPOST: a red fox lives near the river\n\nTL;DR:"
    )
    assert chosen == [*ids(" a fox in the forest"), EOS]
    assert rejected == [*ids(" the sky is blue"), EOS]
    article = {**TLDR, "choice": 0, "info": dict.fromkeys(TLDR["info"]) | {"article": "the river"}}
    prompt, chosen, _ = one(article)
    assert prompt == ids("ARTICLE: the river\n\nTL;DR:") and chosen[:-1] == ids(" the sky is blue")


def test_ratings_make_a_ranking_by_their_mean() -> None:
    examples = read([ULTRA], kind="groups")
    (label,) = examples.labels.labels
    # (1 + 2 + 1) / 3; (5 + 5 + 4 + 5) / 4; (3 + 4) / 2: what does not apply is not counted.
    assert label.rank == (2, 0, 1) and label.score == pytest.approx((4 / 3, 4.75, 3.5))
    assert len(examples.rows[0].answers) == 3
    (pair,) = read([ULTRA]).labels.labels
    assert pair.score == pytest.approx((4.75, 4 / 3))
    even = {**ULTRA, "completions": [rated("a", *"2222"), rated("b", *"2222")]}
    assert read([even, ULTRA]).skipped == {"tie": 1}


def test_scores_come_with_binarized_pairs() -> None:
    for row, score in ((BINARIZED, (8.5, 3.0)), (CLEANED, (4.75, 2.0))):
        assert read([row]).labels.labels[0].score == score


def test_helpfulness_is_a_label_and_strength_an_order() -> None:
    rows = [STEER | {"helpfulness": helpful} for helpful in (0, 2, 3, 4)]
    examples = read(rows, kind="unpaired")
    assert [label.desirable for label in examples.labels.labels] == [False, False, True, True]
    prompt, blue = one({**STEER, "label": True}, kind="unpaired")
    assert (prompt, blue) == one(CHAT)[:2]
    assert read([STEER2, STEER2 | {"preference_strength": 0}]).skipped == {"tie": 1}
    assert one(STEER2 | {"preference_strength": 1})[1:] == one(CHAT)[:0:-1]
    with pytest.raises(DataError, match=r"Row 0 .*between -3 and 3; got 4"):
        read([STEER3 | {"overall_preference": 4}])


# ---- TRL's documented formats: preference, unpaired; standard and conversational


def test_a_pair_is_two_single_answers() -> None:
    """As TRL's KTO reads paired data: the chosen one liked, the other not."""
    for row in (
        CHAT,
        PLAIN,
        BINARIZED,
        {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]},
    ):
        prompt, chosen, rejected = one(row)
        single = read([row], kind="unpaired")
        assert flat(single) == [prompt, chosen, prompt, rejected]
        assert [label.desirable for label in single.labels.labels] == [True, False]
        assert list(single.labels.rows) == [0, 0]
    with pytest.raises(DataError, match="'margin' speaks of a pair"):
        read([PLAIN | {"margin": 1.0}], kind="unpaired")


@pytest.mark.parametrize("given", [{"mood": "glad"}, '{"mood": "glad"}'])
def test_template_variables_reach_the_template(given) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if mood %}{{ mood }} {% endif %}" + TEMPLATE
    row = {**CHAT, "chat_template_kwargs": given}
    prompt, chosen, _ = one(row, tokenizer)
    assert prompt == ids("glad <|im_start|>user\nthe sky?<|im_end|>\n<|im_start|>assistant\n")
    assert chosen == one(CHAT)[1]
    unset = {**CHAT, "chat_template_kwargs": {"mood": None}}
    assert one(unset, tokenizer) == one(CHAT)
    for bad, words in (
        ({"tokenize": True}, "no variable of a template"),
        ("mood(", "must be a mapping or its JSON"),
        (["mood"], "is no mapping"),
    ):
        with pytest.raises(DataError, match=words):
            one({**CHAT, "chat_template_kwargs": bad}, tokenizer)
