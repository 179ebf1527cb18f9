"""Default betas per wing, each with its source."""

from __future__ import annotations

from collections.abc import Mapping

from alignkit.losses.table import Beta

TEXT = "Rafailov et al. 2023 section 6 (0.1 for dialogue), as in TRL"
IMAGE = "Wallace et al. 2023: 5000 for SDXL at 1024 px, mean reduction, one half inside"
NATS = "as for text, per nat: only with the ELBO-in-nats likelihood"


def betas(
    text: float = 0.1,
    source: str = TEXT,
    *,
    scale_free: bool = True,
    image: Beta | None = None,
) -> Mapping[str, Beta]:
    """The default betas of a row; a loss that is not scale-free takes its own per nat."""
    image = image or (Beta(5000.0, IMAGE) if scale_free else Beta(text, NATS))
    return {"text": Beta(text, source), "image": image}
