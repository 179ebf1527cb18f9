"""How answers and pictures are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignkit.ranges import list_of_names, not_negative, positive, share


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How answers are sampled, for reports and online methods.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: 0 keeps the whole vocabulary.
        stop: strings that end an answer (text).
        engine: what samples text: the policy in hand, or vLLM with its weights (extra `vllm`; not
            run on real hardware), whose answers online methods weigh by importance.
        steps, guidance_scale, height, width: the image sampler's; None means the pipeline's size.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    engine: Literal["transformers", "vllm"] = "transformers"
    steps: int = 30
    guidance_scale: float = 5.0
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        names = ("max_new_tokens", "steps", "height", "width", "top_p")
        positive("generation", **{name: getattr(self, name) for name in names})
        share("generation", top_p=self.top_p)
        not_negative("generation", temperature=self.temperature, top_k=self.top_k)
        object.__setattr__(self, "stop", list_of_names("generation.stop", self.stop))
