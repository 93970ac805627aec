"""Published figures of accelerators, and the rates that plans and decisions are made with."""

import re
from dataclasses import dataclass

from safereg_dist.errors import ConfigError

GIB = 2**30
MFU = 0.4
"""Share of the peak that matrix products of a large model reach; 0.35 to 0.5 is usual."""
LINK_EFFICIENCY = 0.7
"""Share of a link's peak that large all-gathers reach; 0.6 to 0.8 is usual."""
USABLE_MEMORY = 0.92
"""Share of the memory that tensors get: the rest is the driver, NCCL's buffers, fragments."""

HOST_LINK_BYTES_PER_S = 2e10
"""Between a GPU and its host's memory, each way: what PCIe 4 x16 reaches; PCIe 5 twice that."""
HOST_MEMORY_BYTES_PER_S = 2e11
"""What a host's memory reaches for all its GPUs together: the order of two sockets of servers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator as its maker describes it, in the server it usually comes in."""

    name: str
    flops_per_s: float
    """Peak of dense bf16 matrix products with float32 sums (no sparsity), FLOP/s."""
    memory_bytes: int
    """Size of its memory, bytes; `USABLE_MEMORY` of it can be planned with."""
    memory_bytes_per_s: float
    """Peak bandwidth of its memory, bytes/s."""
    node_bytes_per_s: float
    """Peak bandwidth to the GPUs of its node, one direction (NVLink, Infinity Fabric, PCIe)."""
    network_bytes_per_s: float
    """Peak bandwidth of its usual share of the node's network, one direction."""
    aliases: tuple[str, ...] = ()
    """Other names, and how torch's name of the device begins; lower case, without separators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates that one rank achieves, not the peak."""

    flops_per_s: float
    link_bytes_per_s: float
    """Rate of the slowest link that a collective over all ranks crosses, one direction."""


def _gpu(
    name: str, tflops: float, gib: int, memory: float, node: float, network: float, *aliases: str
) -> Gpu:
    """TFLOP/s, GiB, and GB/s of memory, node and network."""
    return Gpu(
        name=name,
        flops_per_s=tflops * 1e12,
        memory_bytes=gib * GIB,
        memory_bytes_per_s=memory * 1e9,
        node_bytes_per_s=node * 1e9,
        network_bytes_per_s=network * 1e9,
        aliases=aliases,
    )


# From the makers' data sheets; where those give FLOPs with sparsity or a link's both directions
# together, half of it. Network: the usual server (DGX A100 8 x 200 Gb/s, DGX H100 and B200
# 8 x 400 Gb/s, PCIe servers 8 GPUs on 2 x 400 Gb/s or less).
GPUS = (
    _gpu("A100-40GB", 312, 40, 1555, 300, 25, "a100sxm440gb", "a100pcie40gb", "a10040"),
    _gpu("A100-80GB", 312, 80, 2039, 300, 25, "a100", "a100sxm480gb", "a100pcie80gb", "a10080"),
    _gpu("A800-80GB", 312, 80, 2039, 200, 25, "a800"),
    _gpu("H100-SXM", 989, 80, 3350, 450, 50, "h100", "h10080gbhbm3", "h10080gb", "h100sxm5"),
    _gpu("H100-PCIe", 756, 80, 2000, 64, 12.5),
    _gpu("H100-NVL", 835, 94, 3900, 300, 25),
    _gpu("H800", 989, 80, 3350, 200, 50, "h800sxm"),
    _gpu("H20", 148, 96, 4000, 450, 50),
    _gpu("H200", 989, 141, 4800, 450, 50, "h200sxm", "h200nvl"),
    _gpu("GH200", 989, 96, 4000, 450, 50, "gh200480gb"),
    _gpu("B200", 2250, 180, 7700, 900, 50, "b200sxm"),
    _gpu("GB200", 2500, 186, 8000, 900, 50),
    _gpu("B300", 2250, 270, 7700, 900, 100),
    _gpu("L40S", 362, 48, 864, 32, 12.5),
    _gpu("L40", 181, 48, 864, 32, 12.5),
    _gpu("L4", 121, 24, 300, 32, 6.25),
    _gpu("A40", 149.7, 48, 696, 32, 12.5),
    _gpu("A10G", 70, 24, 600, 32, 3.1),
    _gpu("RTX-A6000", 154.8, 48, 768, 32, 3.1, "a6000"),
    _gpu("RTX-4090", 165.2, 24, 1008, 32, 3.1, "4090", "geforcertx4090"),
    _gpu("RTX-3090", 71, 24, 936, 32, 3.1, "3090", "geforcertx3090"),
    _gpu("MI250X-GCD", 191.5, 64, 1638, 50, 12.5, "mi250x", "mi250"),
    _gpu("MI300X", 1307, 192, 5300, 448, 50),
    _gpu("MI325X", 1307, 256, 6000, 448, 50),
    _gpu("MI355X", 2500, 288, 8000, 538, 50),
)
CPU_RATES = Rates(flops_per_s=5e10, link_bytes_per_s=1e9)
"""A few CPU cores with float32 and gloo on one machine: the order of magnitude."""
UNLISTED_RATES = Rates(flops_per_s=4e13, link_bytes_per_s=1e10)
"""A GPU that the table lacks: a small data-centre card on PCIe and 100 Gb/s."""


def find_gpu(name: str) -> Gpu:
    """The GPU of that name or alias; case, blanks, `-` and `_` do not matter.

    Raises:
        ConfigError: not in the table; lists what is.
    """
    wanted = _plain(name)
    for gpu in GPUS:
        if wanted in (_plain(gpu.name), *gpu.aliases):
            return gpu
    raise ConfigError(
        f"--gpu must be one of {', '.join(gpu.name for gpu in GPUS)}, got {name!r}: choose the "
        "nearest one"
    )


def achieved_rates(gpu: Gpu, *, spans_nodes: bool) -> Rates:
    """Peak rates times `MFU` and `LINK_EFFICIENCY`; the link is the slowest on the way."""
    link = gpu.node_bytes_per_s
    if spans_nodes:
        link = min(link, gpu.network_bytes_per_s)
    return Rates(flops_per_s=MFU * gpu.flops_per_s, link_bytes_per_s=LINK_EFFICIENCY * link)


def rates_of_device(device_name: str | None, *, spans_nodes: bool) -> Rates:
    """Rates of the device that torch names so; None is a CPU. Never fails: see `UNLISTED_RATES`.

    Ranks on different devices get different rates: decide on one rank's, or agree.
    """
    if device_name is None:
        return CPU_RATES
    plain = _plain(device_name)
    named = {
        alias: gpu
        for gpu in GPUS
        for alias in (_plain(gpu.name), *gpu.aliases)
        if re.match(rf"{alias}(?!\d)", plain)  # an L40 is no L4
    }
    if not named:
        return UNLISTED_RATES
    longest = max(named, key=len)  # prefers the longer match: `h100pcie` over `h100`
    return achieved_rates(named[longest], spans_nodes=spans_nodes)


def _plain(name: str) -> str:
    """Lower case, without separators and makers' names."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia|amd)(instinct)?", "", plain)
