"""The figures of a plan, for one rank, in bytes above what is held before loading begins."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Memory", "RankPlan", "Step"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is held at the end of loading, and the peak before. With a CPU for device, all is the host's.

    anonymous_peak: of the host without buffers for a GPU: the driver maps these, so that the anonymous memory of the
    process, which a report measures, does not have them.
    """

    host_held: int
    host_peak: int
    anonymous_peak: int
    device_held: int
    device_peak: int

    def on_cpu(self, *, peak: int) -> Memory:
        """The same where the device is the CPU, and `peak` is of both together."""
        held = self.host_held + self.device_held
        return Memory(host_held=held, host_peak=peak, anonymous_peak=peak, device_held=0, device_peak=0)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step at its worst moment; the peaks are sums of what is above them.

    weights, quant_state, adapters, gradients, optimizer: what the rank holds between steps.
    gathered: what FSDP has unsharded then. dequantized: the 16-bit weight of a linear layer while it multiplies.
    activations: an estimate, from the shapes of the linear layers, for attention that keeps no scores. logits: with
        their gradients.
    on_host: what of it waits on the CPU (with cpu_offload), and so is no part of the device's peak.
    moment: "loss" or "backward".
    """

    weights: int
    quant_state: int
    adapters: int
    gradients: int
    optimizer: int
    gathered: int
    dequantized: int
    activations: int
    logits: int
    on_host: int
    host_peak: int
    device_peak: int
    moment: str


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """bytes_read: from the checkpoint, without what one rank of each node reads for the others."""

    bytes_read: int
    load: Memory
    train: Step | None

    @property
    def device_peak(self) -> int:
        """Of loading and training."""
        return max(self.load.device_peak, self.train.device_peak if self.train is not None else 0)

    @property
    def host_peak(self) -> int:
        """Of loading and training."""
        return max(self.load.host_peak, self.train.host_peak if self.train is not None else 0)
