#!/usr/bin/env python
"""Do alignkit's losses agree with TRL's, where TRL has them? Values and gradients, random inputs.

Run it with a Python that has TRL 1.16 and torch; it installs nothing. For instance, beside this
repository's environment:

    uv venv /tmp/trl && echo "$PWD/.venv/lib/python3.11/site-packages" \
        > /tmp/trl/lib/python3.11/site-packages/alignkit.pth
    uv pip install --python /tmp/trl --no-deps trl==1.16.0
    PYTHONPATH=. /tmp/trl/bin/python scripts/compare_trl_losses.py

TRL's own code runs: its trainers' loss methods, on a stand-in for the model that returns given
token log-probabilities. Prints one line per case and, at the end, in what TRL differs on purpose of
either side or by a defect. Exits with 1 if a case disagrees.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from alignkit.losses import (
    PREFERENCE_LOSSES,
    UNPAIRED_LOSSES,
    PairScores,
    UnpairedScores,
    modifiers,
)
from alignkit.losses.divergences import with_divergence
from alignkit.losses.mixture import weighted_sum

PAIRS, TOKENS, BETA = 12, 9, 0.3
TOLERANCE = 1e-6

DIFFERENCES = """
Known differences, none of them counted above:
  sigmoid        TRL ignores label_smoothing without a message; here it is conservative DPO.
  aot            TRL sorts within one process's micro-batch; here over the global batch.
  sft, cpo, orpo TRL's likelihood term is the mean over the micro-batch's tokens, so that it changes
                 with the split; here it is per example, divided by the example's own length.
  wpo            TRL leaves out the paper's min(1, .) of the weight.
  kto            TRL's baseline is the mean over micro-batches of mismatched answers in a fixed
                 order; here over the global batch, with weights, whatever the order.
  alpha          TRL computes it in float32 and fails on float64; its coefficient is 1 - ours.
  forward_kl     TRL lets e^x overflow; here it goes on along its tangent beyond e^30.
  simpo          TRL's gamma does not scale with beta; gamma_ratio here is gamma / beta.
  bco_pair       TRL has no shift; here it is an option.
"""


class Tokens:
    """Random token log-probabilities of PAIRS chosen, then as many rejected answers."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(seed)
        rows = 2 * PAIRS
        self.lengths = torch.randint(2, TOKENS + 1, (rows,), generator=draw)
        self.mask = torch.arange(TOKENS) < self.lengths[:, None]
        random = torch.rand(rows, TOKENS, generator=draw, dtype=torch.float64)
        logps = torch.where(self.mask, (random * 0.9 + 0.05).log(), 0.0).to(dtype)
        self.policy = logps.requires_grad_()
        noise = torch.randn(rows, TOKENS, generator=draw, dtype=torch.float64) * 0.6
        self.reference = torch.where(self.mask, logps.detach() + noise.to(dtype), 0.0)
        self.squares = torch.rand(rows, TOKENS, generator=draw, dtype=torch.float64).log()
        self.kl = torch.randn(rows, generator=draw, dtype=torch.float64) + 0.4

    def log_likelihoods(self, logps: Tensor, ld_alpha: float) -> tuple[Tensor, ...]:
        """(B,) of the chosen and of the rejected answers."""
        shared = torch.minimum(*self.lengths.chunk(2)).repeat(2)
        public = (logps * (torch.arange(TOKENS) < shared[:, None])).sum(1)
        return modifiers.without_surplus(logps.sum(1), public, ld_alpha).chunk(2)

    def scores(self, ld_alpha: float = 1.0) -> PairScores:
        """The same numbers as alignkit sees them."""
        policy = self.log_likelihoods(self.policy, ld_alpha)
        reference = self.log_likelihoods(self.reference, ld_alpha)
        lengths = self.lengths.to(policy[0]).chunk(2)
        return PairScores(*policy, *reference, chosen_length=lengths[0], rejected_length=lengths[1])


class Model:
    """Returns the token log-probabilities it was given, in the shape of TRL's fused head."""

    training = False

    def __init__(self, tokens: Tokens, logps: Tensor) -> None:
        zero = torch.zeros_like(logps)
        self.output = SimpleNamespace(
            log_probs=logps,
            entropy=zero,
            mean_logits=zero,
            is_top1=zero.bool(),
            log_sum_sq_probs=tokens.squares,
        )

    def __call__(self, **_: Any) -> Any:
        return self.output


def trainer(cls: type, tokens: Tokens, **options: Any) -> Any:
    """A TRL trainer that was never set up: its loss method and the attributes it reads."""
    made = object.__new__(cls)
    gather = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    plain = {
        "model": Model(tokens, tokens.policy),
        "accelerator": gather,
        "aux_loss_enabled": False,
        "beta": BETA,
        "precompute_ref_logps": True,
        "_metrics": {"eval": defaultdict(list)},
        "_total_train_tokens": 0,
    }
    made.__dict__.update(plain | options)
    return made


def dpo_loss(tokens: Tokens, loss: str | list[str], **options: Any) -> Tensor:
    from trl import DPOTrainer

    names = [loss] if isinstance(loss, str) else loss
    given = {
        "loss_types": names,
        "loss_weights": [1.0] * len(names),
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        "args": SimpleNamespace(discopop_tau=0.05),
        **options,
    }
    made = trainer(DPOTrainer, tokens, **given)
    mask = torch.cat([torch.zeros(len(tokens.mask), 1), tokens.mask], 1).long()
    ld_alpha = 1.0 if given["ld_alpha"] is None else given["ld_alpha"]
    reference = tokens.log_likelihoods(tokens.reference, ld_alpha)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    return DPOTrainer._compute_loss(made, made.model, inputs, False)


def kto_loss(tokens: Tokens, loss: str, liked: Tensor, **options: Any) -> Tensor:
    from trl import KTOTrainer

    made = trainer(KTOTrainer, tokens, loss_type=loss, calculate_KL=loss == "kto", **options)
    made._compute_kl_logps = lambda model, batch: tokens.kl
    mask = torch.cat([torch.zeros(len(tokens.mask), 1), tokens.mask], 1).long()
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": liked,
        "ref_logps": tokens.reference.sum(1),
        "ref_KL_logps": torch.zeros_like(tokens.kl),
    }
    return KTOTrainer._compute_loss(made, made.model, inputs, False)


def cpo_loss(tokens: Tokens, loss: str, gamma: float = 0.0) -> Tensor:
    from trl.experimental.cpo import CPOTrainer

    made = trainer(
        CPOTrainer, tokens, loss_type=loss, simpo_gamma=gamma, alpha=0.0, label_smoothing=0.0
    )
    logps = tokens.policy.sum(1)
    logps = logps / tokens.lengths if loss == "simpo" else logps
    return CPOTrainer.cpo_loss(made, *logps.chunk(2))[0].mean()


def orpo_loss(tokens: Tokens) -> Tensor:
    from trl.experimental.orpo import ORPOTrainer

    made = trainer(ORPOTrainer, tokens)
    mean = tokens.policy.sum(1) / tokens.lengths
    return -ORPOTrainer.odds_ratio_loss(made, *mean.chunk(2))[0].mean()


Case = tuple[str, Callable[[Tokens], Tensor], Callable[[Tokens], Tensor]]


def ours(name: str, divergence: str = "reverse_kl", **keywords: Any) -> Callable[[Tokens], Tensor]:
    return lambda tokens: PREFERENCE_LOSSES[name](
        with_divergence(tokens.scores(), divergence), beta=BETA, **keywords
    ).mean()


def theirs(name: str | list[str], **options: Any) -> Callable[[Tokens], Tensor]:
    return lambda tokens: dpo_loss(tokens, name, **options)


def cases() -> Iterator[Case]:
    plain = "sigmoid hinge ipo nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down"
    for name in [*plain.split(), "discopop", "sigmoid_norm"]:
        yield name, ours(name), theirs(name)
    for name in ("exo_pair", "robust"):
        for smoothing in (1e-3, 0.2):
            yield (
                f"{name} label_smoothing={smoothing}",
                ours(name, label_smoothing=smoothing),
                theirs(name, label_smoothing=smoothing),
            )
    for divergence in ("forward_kl", "js_divergence"):
        for name in ("sigmoid", "hinge", "ipo", "discopop", "sigmoid_norm"):
            yield (
                f"{name} {divergence}",
                ours(name, divergence),
                theirs(name, f_divergence_type=divergence),
            )
    for ld_alpha in (0.0, 0.4, 1.0):
        yield f"sigmoid ld_alpha={ld_alpha}", ld_dpo(ld_alpha), theirs("sigmoid", ld_alpha=ld_alpha)
    sums = theirs(["sigmoid", "bco_pair"], loss_weights=[0.8, 0.2])
    yield "0.8 sigmoid + 0.2 bco_pair", mpo, sums
    yield "sigmoid wpo", wpo, wpo_of_trl
    yield "simpo", simpo, lambda t: cpo_loss(t, "simpo", gamma=0.5)
    yield "cpo", ours("cpo", cpo_alpha=0.0), lambda t: cpo_loss(t, "sigmoid")
    for name in ("kto", "apo_zero_unpaired"):
        yield (
            name,
            unpaired(name),
            lambda t, name=name: kto_loss(
                t, name, labels(), desirable_weight=1.3, undesirable_weight=0.7
            ),
        )


def float32_cases() -> Iterator[Case]:
    """What TRL computes in float32 only."""
    yield "orpo odds term", orpo, orpo_loss
    for alpha in (0.3, 0.7):
        yield (
            f"sigmoid alpha={alpha}",
            lambda t, a=alpha: PREFERENCE_LOSSES["sigmoid"](
                with_divergence(t.scores(), "alpha", a), beta=BETA
            ).mean(),
            theirs(
                "sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 - alpha
            ),
        )


def ld_dpo(ld_alpha: float) -> Callable[[Tokens], Tensor]:
    return lambda t: PREFERENCE_LOSSES["sigmoid"](t.scores(ld_alpha), beta=BETA).mean()


def mpo(tokens: Tokens) -> Tensor:
    row = weighted_sum({"sigmoid": 0.8, "bco_pair": 0.2}, PREFERENCE_LOSSES)
    return row(tokens.scores(), beta=BETA).mean()


def wpo(tokens: Tokens) -> Tensor:
    """Three nats less than the means by answer, so that no weight passes 1."""
    aligned = ((tokens.policy.detach() - tokens.squares) * tokens.mask).sum(1) / tokens.lengths
    chosen, rejected = (aligned - 3).chunk(2)
    weight = modifiers.wpo_weight(chosen, rejected)
    return (PREFERENCE_LOSSES["sigmoid"](tokens.scores(), beta=BETA) * weight).mean()


def wpo_of_trl(tokens: Tokens) -> Tensor:
    """The same three nats, in ln sum p^2 of every token."""
    squares = tokens.squares
    tokens.squares = squares + 3
    loss = dpo_loss(tokens, "sigmoid", use_weighting=True)
    tokens.squares = squares
    return loss


def simpo(tokens: Tokens) -> Tensor:
    return PREFERENCE_LOSSES["simpo"](tokens.scores(), beta=BETA, gamma_ratio=0.5 / BETA).mean()


def orpo(tokens: Tokens) -> Tensor:
    """The odds term alone: the whole loss less its likelihood term."""
    scores = tokens.scores()
    whole = PREFERENCE_LOSSES["orpo"](scores, beta=1.0, lam=BETA)
    return (whole - modifiers.anchor_loss(scores)).mean()


def labels() -> Tensor:
    return torch.arange(2 * PAIRS) % 3 > 0


def unpaired(name: str) -> Callable[[Tokens], Tensor]:
    def loss(tokens: Tokens) -> Tensor:
        scores = UnpairedScores(
            tokens.policy.sum(1), tokens.reference.sum(1), labels(), kl=tokens.kl
        )
        weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
        return UNPAIRED_LOSSES[name](scores, beta=BETA, **weights).mean()

    return loss


def agreement(case: Case, dtype: torch.dtype, seed: int) -> tuple[float, float]:
    """Relative difference of the losses and of their gradients by token of an answer."""
    _, *both = case
    values, slopes = [], []
    for compute in both:
        tokens = Tokens(seed, dtype)
        loss = compute(tokens)
        values.append(loss.item())
        # What padding would pass on is no token's.
        slopes.append(torch.autograd.grad(loss, tokens.policy)[0][tokens.mask].double())
    value = abs(values[0] - values[1]) / abs(values[1])
    slope = (slopes[0] - slopes[1]).abs().max() / slopes[1].abs().max()
    return value, slope.item()


def main() -> int:
    warnings.simplefilter("ignore")
    import trl

    print(
        f"TRL {trl.__version__}, {PAIRS} random pairs, three draws; largest relative difference\n"
    )
    failed = []
    every = [(case, torch.float64) for case in cases()]
    every += [(case, torch.float32) for case in float32_cases()]
    for case, dtype in every:
        found = [agreement(case, dtype, seed) for seed in range(3)]
        value, slope = (max(column) for column in zip(*found, strict=True))
        agrees = value <= TOLERANCE and slope <= TOLERANCE
        failed += [] if agrees else [case[0]]
        print(f"{case[0]:32} loss {value:.1e}  gradient {slope:.1e}  {'' if agrees else 'DIFFERS'}")
    print(DIFFERENCES)
    print(f"disagree: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
