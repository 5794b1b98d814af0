"""The figures of a plan, for one rank, in bytes above what is held before loading begins."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Memory", "Peaks", "RankPlan", "Step"]


@dataclass(kw_only=True)
class Peaks:
    """Maxima over moments that are noted one after the other, in bytes.

    host, device: of each. anonymous: of the host without what is pinned. both: of host and device together.
    """

    host: int = 0
    anonymous: int = 0
    device: int = 0
    both: int = 0

    def note(self, *, host: int, device: int, pinned: int = 0) -> None:
        """A moment at which so much is held; `pinned` is part of `host`."""
        self.host = max(self.host, host)
        self.anonymous = max(self.anonymous, host - pinned)
        self.device = max(self.device, device)
        self.both = max(self.both, host + device)

    def memory(self, *, host_held: int, device_held: int, on_cpu: bool) -> Memory:
        """The figures of a phase with these peaks, at whose end so much is held."""
        if on_cpu:
            held = host_held + device_held
            return Memory(host_held=held, host_peak=self.both, anonymous_peak=self.both, device_held=0, device_peak=0)
        return Memory(
            host_held=host_held,
            host_peak=self.host,
            anonymous_peak=self.anonymous,
            device_held=device_held,
            device_peak=self.device,
        )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes held at the end of loading, and the peak before. Where ranks compute on a CPU, all is the host's.

    anonymous_peak: of the host without buffers for a GPU: the driver maps these, so that the anonymous memory of the
    process, which a report measures, does not have them.
    """

    host_held: int
    host_peak: int
    anonymous_peak: int
    device_held: int
    device_peak: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step at its worst moment; the peaks are sums of what is above them.

    weights, quant_state, adapters, gradients, optimizer: held between steps.
    gathered: what the sharding has whole then. dequantized: the weight of a quantized layer while it multiplies.
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
    """The figures of one rank. train: None if only loading was planned.

    bytes_read: from the checkpoint, without what one rank of each node reads for the others.
    """

    bytes_read: int
    load: Memory
    train: Step | None

    @property
    def device_peak(self) -> int:
        """Device peak over loading and training."""
        return max(self.load.device_peak, self.train.device_peak if self.train is not None else 0)

    @property
    def host_peak(self) -> int:
        """Host peak over loading and training."""
        return max(self.load.host_peak, self.train.host_peak if self.train is not None else 0)
