"""GPUs, the links between them, and what a collective over them takes.

In:  a GPU's name, or one that is described (`gpu_file`), how many, how many a node. Out: `Cluster`, whose methods give
seconds.

Peaks and links are the makers' figures of the eight-GPU machines that these are sold in, in one direction; memory is
what torch shows of them, from which a run's own estimate starts as well. What is reached of the peaks are the shares
below: of compute and bandwidth as one H200 has shown in the runs of docs/figures.md, of other GPUs as others have
published (docs/planning.md), of links as is usual of NCCL, which nobody has measured here. A collective takes
alpha * steps + bytes / bandwidth, one alpha and one bandwidth within a node, others between nodes. A gather has as many
steps as there are ranks, in a ring; a sum twice the depth of a tree.
"""

import math
from dataclasses import dataclass, replace

from kto_dist.base.errors import UserError
from kto_dist.cluster.allreduce import Links
from kto_dist.model.devices import PEAKS, kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device. Bandwidths in bytes a second, of one direction."""

    name: str
    flops: float
    """Dense bf16 peak."""
    memory: float
    """Bytes, as `torch.cuda.get_device_properties` has them."""
    bandwidth: float
    """Of its memory."""
    link: float
    """To the others of its node."""
    network: float
    """Of eight of them to other nodes: each has a card of its own."""
    host: float
    """To its share of the host's memory."""
    matmul: float = 0.70
    """Of the peak, in matmuls; the H200's profile in docs/figures.md shows it of matmuls of 16,384 rows."""
    attention: float = 0.30
    """Of the peak, by what attention must compute: rows of 360 tokens reach 0.17 on an H200, long ones more."""


GB = 1e9
GIB = 2.0**30
_A100 = Gpu(
    name="A100",
    flops=PEAKS["A100"],
    memory=79.25 * GIB,
    bandwidth=2039 * GB,
    link=300 * GB,
    network=200 * GB,
    host=25 * GB,
    attention=0.50,  # as FlashAttention 2 states
)
_H100 = Gpu(
    name="H100",
    flops=PEAKS["H100"],
    memory=79.1 * GIB,
    bandwidth=3350 * GB,
    link=450 * GB,
    network=400 * GB,
    host=50 * GB,
)
_PCIE_4, _PCIE_5 = 32 * GB, 64 * GB
"""Sixteen lanes, in one direction."""
# A card without NVLink reaches the others over PCIe. That its machine has 400 Gbit/s to others is an assumption.
_CARD = replace(_H100, link=_PCIE_4, network=50 * GB, host=25 * GB)
GPUS = {
    gpu.name: gpu
    for gpu in (
        _A100,
        replace(_A100, name="A100-40GB", memory=39.4 * GIB, bandwidth=1555 * GB),
        _H100,
        replace(_H100, name="H200", flops=PEAKS["H200"], memory=139.8 * GIB, bandwidth=4800 * GB),
        # its attention runs kernels of older GPUs; an assumption
        replace(
            _H100,
            name="B200",
            flops=PEAKS["B200"],
            memory=178.35 * GIB,
            bandwidth=7670 * GB,
            link=900 * GB,
            attention=0.16,
        ),
        # others have measured about 620 TFLOP/s in matmuls; attention is an assumption
        replace(
            _H100,
            name="MI300X",
            flops=PEAKS["MI300X"],
            memory=191.9 * GIB,
            bandwidth=5300 * GB,
            link=448 * GB,
            matmul=0.45,
            attention=0.20,
        ),
        # What follows has NVIDIA's figures (datasheets of H20, GH200, A100, H100, L40S and A10G, and the whitepaper on
        # Ada for the RTX 4090), and shares that nobody has measured on it.
        replace(_H100, name="H20", flops=PEAKS["H20"], memory=95.0 * GIB, bandwidth=4000 * GB),
        # beside a processor of its own, which has the share of its link that others have of PCIe
        replace(_H100, name="GH200", flops=PEAKS["GH200"], memory=94.5 * GIB, bandwidth=4000 * GB, host=350 * GB),
        replace(_A100, name="A100-PCIe", bandwidth=1935 * GB, link=_PCIE_4, network=50 * GB),
        replace(_CARD, name="H100-PCIe", flops=PEAKS["H100PCIE"], bandwidth=2000 * GB, link=_PCIE_5, host=50 * GB),
        # bridges join two of them; more than two meet over PCIe
        replace(
            _CARD,
            name="H100-NVL",
            flops=PEAKS["H100NVL"],
            memory=93.1 * GIB,
            bandwidth=3938 * GB,
            link=_PCIE_5,
            host=50 * GB,
        ),
        replace(_CARD, name="L40S", flops=PEAKS["L40S"], memory=44.4 * GIB, bandwidth=864 * GB),
        # in machines of 100 Gbit/s
        replace(_CARD, name="A10G", flops=PEAKS["A10G"], memory=22.1 * GIB, bandwidth=600 * GB, network=12.5 * GB),
        # which cannot read each other's memory: what one sends goes into the host's, and out again
        replace(
            _CARD,
            name="RTX-4090",
            flops=PEAKS["RTX4090"],
            memory=23.6 * GIB,
            bandwidth=1008 * GB,
            link=_PCIE_4 / 2,
            network=12.5 * GB,
        ),
    )
}
_SAME_SIZE = 0.15
"""Of its memory, by which a GPU may differ from the size that it is called by: makers count otherwise than torch."""
MOST_GPUS = 4096
_CARDS = 8
"""Of a node that `Gpu.network` is of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What is reached of every GPU's figures, and what the host takes: the assumptions, in one place."""

    experts: float = 0.50
    """Of what matmuls reach, in those of experts, whose rows are parted; from what others have published."""
    busy: float = 0.92
    """Of the time, that the device computes; the same profile."""
    memory: float = 0.70
    """Of the memory's bandwidth."""
    links: float = 0.80
    """Of links between nodes; an assumption."""
    links_inside: float = 0.80
    """Of links within a node; an assumption, until `--measure` has seen several GPUs."""
    overlap: float = 0.5
    """Of ZeRO-3's collectives, hidden behind compute where there is enough of it; an assumption."""
    host_seconds: float = 1.5e-3
    """The host's work for the forward of one layer; the H200's machine shows it with 135 million parameters."""
    host_backward: float = 2.0
    """Times so much in a backward without hooks (ZeRO 0 and 1); the same machine."""
    host_hooks: float = 3.0
    """And with hooks that reduce gradients as they come (ZeRO 2 and 3)."""
    hook_seconds: float = 6.5e-5
    """The host's work for what ZeRO 3 does around one module, whether or not it has weights, in a forward as in a
    backward. From a CPU (docs/planning.md): what a step of a tiny model takes longer than at ZeRO 2, divided by the
    modules that it passes, and by how much slower than the H200's that host is. On a GPU it was not measured."""
    host_adam: float = 100 * GB
    """Bytes a second and node that the optimizer on the host goes through; an assumption."""
    alpha_inside: float = 5e-6
    """Seconds of a message within a node; an assumption, as `links_inside` is."""
    alpha_between: float = 15e-6
    """And between nodes; an assumption."""
    traffic: float = 5.6
    """Passes over what a layer keeps, in its forward and backward without the matmuls, where layers are fused kernels;
    the same profile."""
    traffic_plain: float = 12.5
    """And of plain layers; from the step that they take."""
    compute: float = 1.0
    """What a measured run takes of the time that is computed for it, collectives apart (`--measure`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """So many of one GPU."""

    gpu: Gpu
    gpus: int
    per_node: int = 8
    host_memory: float = 2000 * GB
    """Bytes of a node."""
    shares: Shares = Shares()
    links_measured: bool = False
    """Whether those within a node were."""

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.per_node)

    @property
    def local(self) -> int:
        """GPUs of a node."""
        return min(self.gpus, self.per_node)

    @property
    def network(self) -> float:
        """Bytes a second of a node to others: rings run over all of its cards at once."""
        return self.gpu.network * self.per_node / _CARDS

    def gather(self, size: float, messages: int = 1) -> float:
        """Seconds until all ranks have what is `size` bytes together, each of which has a part; or have reduced as
        much to parts. In so many messages, each of which goes round a ring of all ranks: NCCL knows no other way."""
        if self.gpus == 1:
            return 0.0
        round_trip = self.shares.alpha_inside * (self.gpus - self.nodes) + self.shares.alpha_between * (self.nodes - 1)
        return messages * round_trip + self._passed(size)

    def reduce(self, size: float, messages: int = 1) -> float:
        """Seconds until all ranks have the sum of what is `size` bytes on each: up a tree, and down."""
        if self.gpus == 1:
            return 0.0
        depth = self.shares.alpha_inside * math.log2(self.local) + self.shares.alpha_between * math.log2(self.nodes)
        return 2 * (messages * depth + self._passed(size))

    def _passed(self, size: float) -> float:
        return size * (self.gpus - 1) / self.gpus / self._bandwidth

    @property
    def _bandwidth(self) -> float:
        inside = self.gpu.link * self.shares.links_inside
        return min(inside, self.network * self.shares.links) if self.nodes > 1 else inside


def gpu_called(name: str, memory: float | None = None) -> Gpu | None:
    """What people or torch call so, of all that are known; `memory`: bytes that it has, where the name need not say."""
    wanted, size = kind(name)
    alike = [gpu for gpu in GPUS.values() if kind(gpu.name)[0] == wanted]
    if memory is None and size is not None:
        memory = size * GIB
    if not alike or memory is None:
        return alike[0] if alike else None
    nearest = min(alike, key=lambda gpu: abs(gpu.memory - memory))
    return nearest if abs(nearest.memory - memory) < _SAME_SIZE * memory else None


def cluster_of(name: str | Gpu, gpus: int, per_node: int = 8, host_memory: float = 2000 * GB) -> Cluster:
    """`name`: of a GPU, in any usual way to write it, or the GPU itself. Raises `UserError`."""
    gpu = gpu_called(name) if isinstance(name, str) else name
    if gpu is None:
        raise UserError(
            f"--gpu ({name}) is none that is known: there are {', '.join(GPUS)}; describe another in a file, "
            "--gpu FILE.yaml (docs/planning.md)"
        )
    if not 1 <= gpus <= MOST_GPUS:
        raise UserError(f"--gpus ({gpus}) must be from 1 to {MOST_GPUS:,}")
    if gpus > per_node and gpus % per_node:
        raise UserError(
            f"--gpus ({gpus}) must be a multiple of --per-node ({per_node}), or fewer: nodes are rented whole"
        )
    return Cluster(gpu=gpu, gpus=gpus, per_node=per_node, host_memory=host_memory)


def calibrated(cluster: Cluster, compute: float) -> Cluster:
    """With the time that a measured run took of what was computed for it."""
    return replace(cluster, shares=replace(cluster.shares, compute=compute))


def linked(cluster: Cluster, links: Links, ranks: int, link: float) -> Cluster:
    """With the links within a node as so many ranks have found them, where the maker's are `link` bytes a second."""
    alpha = links.latency / 2 / math.log2(ranks)
    shares = replace(cluster.shares, alpha_inside=alpha, links_inside=links.bandwidth / link)
    return replace(cluster, shares=shares, links_measured=True)
