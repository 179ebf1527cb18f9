"""Policy gradients: the policy answers prompts itself, a reward scores the answers, and their
likelihood moves by the score.

All maximise  E[score] - kl_coef KL(policy, reference)  per answer. They differ in what a token is
credited with and in how often a rollout is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from alignkit.methods.online import Critic, KLControl, KLMode, Online, Truncation


@dataclass(frozen=True, repr=False)
class PPO(Online):
    """Proximal policy optimisation: a clipped ratio, a critic, several epochs over each rollout.

    Schulman et al. 2017 (1707.06347); for language Ziegler et al. 2019 (1909.08593) and Ouyang et
    al. 2022 (2203.02155).

    Attributes:
        kl_coef: strength of the KL to the reference, per nat of an answer; 0 asks for no reference.
        kl_mode: "reward_k1" takes it off the reward of each token; "loss_k2" and "loss_k3" add it
            to the loss. Only these have the KL's gradient.
        kl_controller: "fixed"; "adaptive" steers kl_coef so that the KL comes to `kl_target`
            (Ziegler et al., eq. 5); "constraint" makes it the dual variable of KL <= kl_target.
        kl_target: nats per answer, of the last two.
        clip_range: of the ratio; infinity is the importance-weighted policy gradient.
        value_clip_range: of the critic's move within a rollout; None is no clip.
        vf_coef: weight of the critic's loss.
        entropy_coef: weight of the entropy of the next token.
        gamma, lam: discount per token, and how far credit reaches (1506.02438).
        rollout_size: answers sampled at a time; None is one optimizer batch.
        inner_epochs: passes over each rollout.
        whiten_advantages: to mean 0 and spread 1 over the tokens of the whole rollout. It rescales
            the policy's loss against entropy_coef and ptx_coef.
        whiten_rewards: to spread 1, the mean kept, after the KL is taken off.
        early_stop_kl: the rest of a rollout's minibatches is left out once KL(old, new), per token,
            is above it.
        truncation: what becomes of an answer that max_new_tokens cut. "bootstrap": it has not
            ended, so its score does not count and the critic's word on the state after its last
            token stands in (Pardo et al. 2018, 1712.00378). "penalty": it scores
            -missing_eos_penalty. "as_end": it scores as if it had ended.
        missing_eos_penalty: taken off the score of a cut answer; with "penalty", all of its score,
            and 1 where it is None.
        score_clip: scores are held to +-score_clip, after they are normalised.
        normalize_scores: to mean 0 and spread 1 of all scores so far.
        critic: "separate" is a model of its own, that starts as the policy; "shared" a value head
            on the policy's trunk; "reward_model" starts as the reward model's folder.
        critic_warmup: optimizer steps in which only the critic learns.
        ptx_coef: weight of the negative log-likelihood per token of `ptx_data`, PPO-ptx (Ouyang et
            al. 2022, eq. 2).
        ptx_data: rows of `text`, or demonstrations, of which each step sees a batch.
    """

    name: ClassVar[str] = "ppo"
    paper: ClassVar[str] = "Schulman et al. 2017, arXiv:1707.06347"
    credit: ClassVar[str] = "gae"
    surrogate: ClassVar[Literal["clipped", "reinforce"]] = "clipped"
    per: ClassVar[Literal["token", "answer", "answer_mean"]] = "token"

    kl_coef: float = 0.05
    kl_mode: KLMode = "reward_k1"
    kl_controller: KLControl = "fixed"
    kl_target: float | None = None
    clip_range: float = 0.2
    value_clip_range: float | None = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    rollout_size: int | None = None
    inner_epochs: int = 2
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    early_stop_kl: float | None = None
    truncation: Truncation = "bootstrap"
    missing_eos_penalty: float | None = None
    score_clip: float | None = None
    normalize_scores: bool = False
    critic: Critic = "separate"
    critic_warmup: int = 0
    ptx_coef: float = 0.0
    ptx_data: Any = None


@dataclass(frozen=True, repr=False)
class A2C(Online):
    """Advantage actor-critic: one pass per rollout, no ratio, no clip.

    Mnih et al. 2016 (1602.01783); of language models GopherCite (Menick et al. 2022, 2203.11147)
    and Sparrow (Glaese et al. 2022, 2209.14375). With lam 1 the advantage is the reward to go minus
    the critic's value.

    Attributes: as in `PPO`.
    """

    name: ClassVar[str] = "a2c"
    paper: ClassVar[str] = "Mnih et al. 2016, arXiv:1602.01783"
    credit: ClassVar[str] = "gae"
    surrogate: ClassVar[Literal["clipped", "reinforce"]] = "reinforce"
    per: ClassVar[Literal["token", "answer", "answer_mean"]] = "token"

    kl_coef: float = 0.05
    kl_mode: KLMode = "reward_k1"
    kl_controller: KLControl = "fixed"
    kl_target: float | None = None
    vf_coef: float = 0.5
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 1.0
    whiten_advantages: bool = False
    whiten_rewards: bool = False
    truncation: Truncation = "bootstrap"
    missing_eos_penalty: float | None = None
    score_clip: float | None = None
    normalize_scores: bool = False
    critic: Critic = "separate"
    critic_warmup: int = 0
    ptx_coef: float = 0.0
    ptx_data: Any = None


@dataclass(frozen=True, repr=False)
class REINFORCE(Online):
    """The policy gradient with a baseline: the return to go of each token, less the mean return of
    the rollout's other answers.

    Williams 1992; for language Ahmadian et al. 2024 (2402.14740). One pass per rollout.

    Attributes: as in `PPO`.
    """

    name: ClassVar[str] = "reinforce"
    paper: ClassVar[str] = "Williams 1992; Ahmadian et al. 2024, arXiv:2402.14740"
    credit: ClassVar[str] = "reinforce"
    surrogate: ClassVar[Literal["clipped", "reinforce"]] = "reinforce"
    per: ClassVar[Literal["token", "answer", "answer_mean"]] = "token"

    kl_coef: float = 0.05
    kl_mode: KLMode = "reward_k1"
    kl_controller: KLControl = "fixed"
    kl_target: float | None = None
    entropy_coef: float = 0.0
    gamma: float = 1.0
    whiten_advantages: bool = False
    truncation: Truncation = "as_end"
    missing_eos_penalty: float | None = None
    score_clip: float | None = None
    normalize_scores: bool = False
    ptx_coef: float = 0.0
    ptx_data: Any = None


@dataclass(frozen=True, repr=False)
class RLOO(Online):
    """REINFORCE leave-one-out: several answers to each prompt, each against the mean of the others.

    Kool et al. 2019; Ahmadian et al. 2024 (2402.14740). The whole answer is one action, and its
    return holds the KL.

    Attributes: as in `PPO`, and
        samples_per_prompt: answers to each prompt.
    """

    name: ClassVar[str] = "rloo"
    paper: ClassVar[str] = "Ahmadian et al. 2024, arXiv:2402.14740"
    credit: ClassVar[str] = "leave_one_out"
    surrogate: ClassVar[Literal["clipped", "reinforce"]] = "reinforce"
    per: ClassVar[Literal["token", "answer", "answer_mean"]] = "answer"

    samples_per_prompt: int = 4
    kl_coef: float = 0.05
    kl_mode: KLMode = "reward_k1"
    kl_controller: KLControl = "fixed"
    kl_target: float | None = None
    entropy_coef: float = 0.0
    whiten_advantages: bool = False
    truncation: Truncation = "as_end"
    missing_eos_penalty: float | None = None
    score_clip: float | None = None
    normalize_scores: bool = False
    ptx_coef: float = 0.0
    ptx_data: Any = None


@dataclass(frozen=True, repr=False)
class GRPO(Online):
    """Group-relative policy optimisation: each answer against the others to its prompt, in units of
    their spread, with PPO's clipped ratio.

    Shao et al. 2024 (2402.03300). Losses are meant over the tokens of each answer, then over
    answers. Its KL is k3 in the loss, weighted by the ratio and of whole answers, so that its
    gradient is that of KL(policy, reference).

    Attributes: as in `PPO`, and
        samples_per_prompt: answers to each prompt.
        scale_advantages: by the group's spread; False is Dr. GRPO's (Liu et al. 2025, 2503.20783).
    """

    name: ClassVar[str] = "grpo"
    paper: ClassVar[str] = "Shao et al. 2024, arXiv:2402.03300"
    credit: ClassVar[str] = "group"
    surrogate: ClassVar[Literal["clipped", "reinforce"]] = "clipped"
    per: ClassVar[Literal["token", "answer", "answer_mean"]] = "answer_mean"

    samples_per_prompt: int = 8
    kl_coef: float = 0.04
    kl_mode: KLMode = "loss_k3"
    kl_controller: KLControl = "fixed"
    kl_target: float | None = None
    clip_range: float = 0.2
    entropy_coef: float = 0.0
    rollout_size: int | None = None
    inner_epochs: int = 1
    scale_advantages: bool = True
    early_stop_kl: float | None = None
    truncation: Truncation = "as_end"
    missing_eos_penalty: float | None = None
    score_clip: float | None = None
    normalize_scores: bool = False
    ptx_coef: float = 0.0
    ptx_data: Any = None
