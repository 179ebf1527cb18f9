#!/usr/bin/env python
"""How much CPU time does a PPO step take, against TRL 1.12, the last with a PPOTrainer?

    python scripts/bench_ppo.py --peer-python PATH [--rounds 4]

Eight prompts a rollout, 53 new tokens, four epochs of one minibatch; reward model, reference and
critic of the policy's size, all separate models ("like for like"), and once more with LoRA on one
shared trunk. A step is a rollout with its updates. The peer's Python needs trl==1.12.0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench_text import command, duel, figures
from bench_text.duel import Contestant
from bench_text.figures import Bar, ratio

BATCH, TOKENS, EPOCHS = 8, 53, 4


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given)
    tokens = 8 if options.quick else TOKENS
    spec = command.specification(
        options, "instructions", BATCH, tokens=tokens, epochs=EPOCHS, shared=False
    )
    spec |= {"max_length": options.world.cap + tokens}
    found = [
        Contestant("alignkit", "ours", "ppo", spec),
        Contestant("alignkit, one trunk", "ours", "ppo", spec | {"shared": True}),
    ]
    if not options.no_peer:
        found.append(Contestant("TRL", "peer", "ppo", spec))
    told = duel.compete(found, options.rounds + 1, options)
    bars: list[Bar] = []
    if "TRL" in told:
        theirs, ours, trunk = told["TRL"], told["alignkit"], told["alignkit, one trunk"]
        for label, key, mine, bar in (
            ("whole step, like for like", "cpu", ours, 1.3),
            ("update, like for like", "update", ours, 1.8),
            ("whole step, one trunk", "cpu", trunk, 1.6),
        ):
            limit = None if options.quick else bar
            bars.append(figures.shown(label, ratio(theirs.timed(key), mine.timed(key)), limit))
        share = trunk.timed("mib")[-1] / theirs.timed("mib")[-1]
        bars.append(Bar("peak memory, one trunk", share, None if options.quick else 0.5, True))
    return figures.report("PPO", told, bars, options)


if __name__ == "__main__":
    sys.exit(main())
