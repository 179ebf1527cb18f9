"""How many images fit into one forward.

The figure everything is scaled from: SDXL's UNet keeps 10.55 GiB of activations per pair of 1024 px
images (2 x 65536 latent elements) in bfloat16 with flash attention, 0.91 GiB with checkpointing,
which makes 86 and 7.5 kB per latent element. Activations grow with the widths of the UNet, SDXL's
being 320 + 640 + 1280.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

GIB = 2**30
BYTES_PER_ELEMENT = 10.55 * GIB / (2 * 65536)
CHECKPOINTED = 0.91 / 10.55
SDXL_WIDTHS = 320 + 640 + 1280
CPU_BUDGET = 4 * GIB
"""A constant, so that a resumed run splits its batches as before and stays bitwise equal."""
CPU_SHARE = 0.25
"""Of the weights' bytes: what activations may take on a CPU under checkpointing, which is asked for
where memory is scarce. Larger forwards would be hardly faster there, and not small any more."""
CPU_LEAST = 64 * 2**20
"""What they may take in any case: nobody is short of that."""
MARGIN = 0.85
"""The share of free GPU memory that activations may take; the rest is for workspaces."""


@dataclass(frozen=True)
class MemoryModel:
    """An estimate of the activations of one UNet.

    Attributes:
        bytes_per_element: saved activations per latent element of a forward with gradient.
        reserved: bytes on the device that training will still take: gradients and two moments.
        device: where the UNet computes.
        weights: bytes of the UNet.
        scarce: memory is: activations are recomputed.
    """

    bytes_per_element: float
    reserved: int
    device: torch.device
    weights: int = 0
    scarce: bool = False

    @classmethod
    def of(cls, unet: Any, *, device: torch.device, precision: str) -> MemoryModel:
        """From the widths and the parameters of `unet`; see `checkpointed`."""
        width = sum(unet.config.block_out_channels) / SDXL_WIDTHS
        factor = 2.0 if precision == "fp32" else 1.0
        trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
        weights = sum(p.numel() * p.element_size() for p in unet.parameters())
        return cls(BYTES_PER_ELEMENT * width * factor, 3 * 4 * trained, device, weights)

    def checkpointed(self) -> MemoryModel:
        """The same UNet with checkpointing."""
        smaller = self.bytes_per_element * CHECKPOINTED
        return replace(self, bytes_per_element=smaller, scarce=True)

    def groups(self, elements: int) -> int:
        """How many groups of so many latent elements one forward may hold; at least 1."""
        return max(1, int(self.available() / (self.bytes_per_element * elements)))

    def fits(self, elements: int) -> bool:
        """Whether one forward with gradient on so many latent elements fits."""
        return self.available() >= self.bytes_per_element * elements

    def available(self) -> float:
        """Bytes that activations may take."""
        if self.device.type != "cuda":
            scarce = max(CPU_LEAST, CPU_SHARE * self.weights)
            return min(CPU_BUDGET, scarce) if self.scarce else CPU_BUDGET
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return MARGIN * (free + cached) - self.reserved
