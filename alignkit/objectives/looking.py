"""The pass over a rollout before anything is learned from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Batch
from alignkit.likelihood import log_likelihoods
from alignkit.objectives.experience import Piece, places_of, wide

_TOKENS = frozenset({"token_logps"})


@torch.no_grad()
def look(objective: Any, batch: Batch, ends: bool) -> dict[str, Tensor]:
    """What the models say of a minibatch's answers.

    Args:
        objective: whose policy, reference and critic; cut into pieces as it cuts a step's batch.
        batch: this process's share; all processes must call it.
        ends: also value the state after the last token.

    Returns:
        (N, T) "old_logps", "entropy", and where there are such models "reference_logps" and
        "values"; (N,) "final_values"; on the CPU, of the answers in their order.
    """
    split = objective.backend.split(batch, objective.budget)
    pieces = [Piece(piece, (objective.seed, 0)) for piece in split]
    width = max(len(one) for one in batch.content.completions)
    rows = [_looked(objective, piece, ends, width) for piece in objective.evened(pieces)]
    places = places_of(split, batch)
    return {name: torch.cat([row[name] for row in rows[: len(pieces)]])[places] for name in rows[0]}


def _looked(objective: Any, piece: Piece, ends: bool, width: int) -> dict[str, Tensor]:
    critic = objective.critic
    want = _TOKENS | {"entropy"} | (frozenset() if critic is None else critic.of_policy)
    found = {}
    if objective.reference is None:
        policy = objective.policy(piece, want)
    else:
        policy, reference = log_likelihoods(
            objective.backend,
            objective.reference,
            piece.batch,
            piece.key,
            want=want,
            want_of_reference=_TOKENS,
        )
        found["reference_logps"] = reference.extras["token_logps"]
    found |= {"old_logps": policy.extras["token_logps"], "entropy": policy.extras["entropy"]}
    table = {name: wide(value.float().cpu(), width) for name, value in found.items()}
    if critic is None:
        return table
    values, finals = critic.look(piece.batch, policy, objective.backend, ends)
    table["values"] = wide(values.float().cpu(), width)
    return table | ({} if finals is None else {"final_values": finals.float().cpu()})
