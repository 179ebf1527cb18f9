"""A careful loop by hand around the same likelihood module: what the library's own work costs.

The rows are tokenised and batched beforehand; a step is two forwards, the DPO loss, backward,
clipping and AdamW, and nothing is logged.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from bench_text.meter import Meter, versions
from bench_text.ours import get_ready


def dpo(spec: dict[str, Any], meter: Meter) -> None:
    import torch
    from torch.nn.functional import logsigmoid
    from transformers import AutoModelForCausalLM

    from alignkit.memory import align_memory
    from alignkit.text.likelihood import TextLikelihood

    get_ready(meter)
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    align_memory(model)
    reference = TextLikelihood(copy.deepcopy(model).requires_grad_(False))
    policy = TextLikelihood(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=spec["rate"], weight_decay=0.0, fused=True)
    batches = _batches(spec)
    meter.count(model)
    meter.started(versions=versions("torch", "transformers"))
    for batch in batches:
        with torch.no_grad():
            expected = reference(batch).total
        ratio = policy(batch).total - expected
        loss = -logsigmoid(0.1 * (ratio[::2] - ratio[1::2])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.lap(loss=loss.item())


def _batches(spec: dict[str, Any]) -> list[Any]:
    """Packed pairs in the order of the file; a word is a token, and eos ends each answer."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from alignkit.batches import Batch
    from alignkit.text.content import TextContent

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    rows = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]

    def ids(text: str, *end: int) -> Any:
        return np.array([*tokenizer(text)["input_ids"], *end], dtype=np.int32)

    made = []
    for start in range(0, len(rows), spec["batch"]):
        some = rows[start : start + spec["batch"]]
        places = torch.arange(len(some))
        owner = places.repeat_interleave(2)
        content = TextContent(
            tuple(ids(row["prompt"]) for row in some),
            tuple(
                ids(row[side], tokenizer.eos_token_id)
                for row in some
                for side in ("chosen", "rejected")
            ),
            tuple(owner.tolist()),
            layout="prefix",
        )
        made.append(Batch(content, owner, torch.tensor([0, 1] * len(some)), places, places))
    return made
