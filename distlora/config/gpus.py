"""What cards can do, from their makers' data sheets: memory, rates, links. Imports no torch.

Three figures of a data sheet are not what they seem. Operations are often those of sparse weights, twice what dense
ones get. A GeForce card's highest figure is for sums in fp16; with sums in fp32, as training has them, it is half of
that. And NVLink and PCIe are said in both directions together; here they are in one, PCIe as the signal has it
(16 lanes of 32 or 16 GT/s, 128 of 130 bits), before the headers of packets, which take a tenth or so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CONTEXT_BYTES = int(0.6 * 2**30)
"""What CUDA's context and libraries take of a card beside torch's allocator."""

PCIE_4, PCIE_5 = 31.5e9, 63e9
"""Bytes a second in one direction over 16 lanes."""
_MIB = 2**20
_NOT_WHOLE = r"Laptop|Max-Q|\bMIG\b|\bGRID\b|-\d+[ABCQ]\b"
"""Laptops' cards, slices of a card, and cards of virtual machines have the name of a faster one in theirs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A GPU. Rates are the makers', in bytes and operations a second."""

    name: str
    """As `card=` has it."""
    title: str
    pattern: str
    """What the device's own name has in it, as a regular expression; no device has those of two."""
    capability: tuple[int, int]
    """Compute capability, by which kernels are chosen."""
    processors: int
    """Streaming multiprocessors."""
    memory_bytes: int
    """As CUDA says it (total_memory): what the maker says less what driver and ECC keep, the least among drivers."""
    flops: float
    """Dense bf16 with fp32 accumulation."""
    bandwidth: float
    """Of its memory."""
    link: float
    """Into it from the other cards of the machine, in one direction."""
    has_nvlink: bool = False
    """Whether that is NVLink among all of them. Bridges between some are not counted, since a ring of all passes
    through PCIe; of a pair that has one, say it by card.link_gb_per_second."""
    host_link: float = PCIE_4
    """Between it and the host, in one direction."""
    network: float
    """Into a machine of such cards from other machines, in one direction, as such machines usually are."""

    @property
    def usable_bytes(self) -> int:
        """What a process can have of its memory."""
        return self.memory_bytes - CONTEXT_BYTES


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        # HGX B200 data sheet: 36 PFLOPS of 8 sparse. 8 TB/s, NVLink 5 of 1.8 TB/s; DGX B200: 8 x 400 Gb/s.
        Card(
            name="b200",
            title="B200 180 GB",
            pattern=r"\bB200\b",
            capability=(10, 0),
            processors=148,
            memory_bytes=182_631 * _MIB,
            flops=2.25e15,
            bandwidth=8e12,
            link=900e9,
            has_nvlink=True,
            host_link=PCIE_5,
            network=400e9,
        ),
        # H200 data sheet: 1,979 TFLOPS sparse, 4.8 TB/s, NVLink 900 GB/s; DGX H200: 8 x 400 Gb/s.
        Card(
            name="h200",
            title="H200 141 GB",
            pattern=r"\bH200\b(?! NVL)",
            capability=(9, 0),
            processors=132,
            memory_bytes=143_071 * _MIB,
            flops=989e12,
            bandwidth=4.8e12,
            link=450e9,
            has_nvlink=True,
            host_link=PCIE_5,
            network=400e9,
        ),
        # H200 NVL data sheet: 1,671 TFLOPS sparse, 4.8 TB/s, bridges of 900 GB/s between two or four.
        Card(
            name="h200_nvl",
            title="H200 NVL 141 GB",
            pattern=r"\bH200 NVL\b",
            capability=(9, 0),
            processors=132,
            memory_bytes=143_071 * _MIB,
            flops=835e12,
            bandwidth=4.8e12,
            link=PCIE_5,
            host_link=PCIE_5,
            network=200e9,
        ),
        # GH200 data sheet, with 96 GB of HBM3: 1,979 TFLOPS sparse, 4 TB/s, NVLink-C2C to its CPU of 900 GB/s. One a
        # machine, with a network adapter of 400 Gb/s; link is that of NVLink between superchips.
        Card(
            name="gh200",
            title="GH200 96 GB",
            pattern=r"\bGH200\b(?! 144G)",
            capability=(9, 0),
            processors=132,
            memory_bytes=96_768 * _MIB,
            flops=989e12,
            bandwidth=4e12,
            link=450e9,
            has_nvlink=True,
            host_link=450e9,
            network=50e9,
        ),
        # H100 data sheet, SXM: 1,979 TFLOPS sparse, 3.35 TB/s, NVLink 900 GB/s; DGX H100: 8 x 400 Gb/s.
        Card(
            name="h100",
            title="H100 SXM 80 GB",
            pattern=r"\bH100\b(?! PCIe| NVL)",
            capability=(9, 0),
            processors=132,
            memory_bytes=81_008 * _MIB,
            flops=989e12,
            bandwidth=3.35e12,
            link=450e9,
            has_nvlink=True,
            host_link=PCIE_5,
            network=400e9,
        ),
        # H100 PCIe data sheet: 1,513 TFLOPS sparse, 2 TB/s, bridges of 600 GB/s between two. NVIDIA's reference server:
        # an adapter of 200 Gb/s for two cards, of 8.
        Card(
            name="h100_pcie",
            title="H100 PCIe 80 GB",
            pattern=r"\bH100 PCIe\b",
            capability=(9, 0),
            processors=114,
            memory_bytes=81_008 * _MIB,
            flops=756e12,
            bandwidth=2.0e12,
            link=PCIE_5,
            host_link=PCIE_5,
            network=100e9,
        ),
        # H100 data sheet, NVL: 1,671 TFLOPS sparse, 3.9 TB/s, bridges of 600 GB/s between two.
        Card(
            name="h100_nvl",
            title="H100 NVL 94 GB",
            pattern=r"\bH100 NVL\b",
            capability=(9, 0),
            processors=132,
            memory_bytes=95_232 * _MIB,
            flops=835e12,
            bandwidth=3.9e12,
            link=PCIE_5,
            host_link=PCIE_5,
            network=100e9,
        ),
        # As the H100 SXM, NVLink 400 GB/s.
        Card(
            name="h800",
            title="H800 SXM 80 GB",
            pattern=r"\bH800\b(?! PCIe)",
            capability=(9, 0),
            processors=132,
            memory_bytes=81_008 * _MIB,
            flops=989e12,
            bandwidth=3.35e12,
            link=200e9,
            has_nvlink=True,
            host_link=PCIE_5,
            network=400e9,
        ),
        # A100 data sheet: 312 TFLOPS, 1,555 GB/s with 40 GB, 2,039 with 80 (SXM) and 1,935 (PCIe), NVLink 600 GB/s, on
        # PCIe between two; DGX A100: 8 x 200 Gb/s.
        Card(
            name="a100_40gb",
            title="A100 SXM 40 GB",
            pattern=r"\bA100-SXM4?-40GB\b",
            capability=(8, 0),
            processors=108,
            memory_bytes=40_326 * _MIB,
            flops=312e12,
            bandwidth=1.555e12,
            link=300e9,
            has_nvlink=True,
            network=200e9,
        ),
        Card(
            name="a100_80gb",
            title="A100 SXM 80 GB",
            pattern=r"\bA100-SXM4?-80GB\b",
            capability=(8, 0),
            processors=108,
            memory_bytes=81_037 * _MIB,
            flops=312e12,
            bandwidth=2.039e12,
            link=300e9,
            has_nvlink=True,
            network=200e9,
        ),
        Card(
            name="a100_pcie_40gb",
            title="A100 PCIe 40 GB",
            pattern=r"\bA100-PCIE-40GB\b",
            capability=(8, 0),
            processors=108,
            memory_bytes=40_326 * _MIB,
            flops=312e12,
            bandwidth=1.555e12,
            link=PCIE_4,
            network=50e9,
        ),
        Card(
            name="a100_pcie_80gb",
            title="A100 PCIe 80 GB",
            pattern=r"\bA100 80GB PCIe\b",
            capability=(8, 0),
            processors=108,
            memory_bytes=81_037 * _MIB,
            flops=312e12,
            bandwidth=1.935e12,
            link=PCIE_4,
            network=50e9,
        ),
        # As the A100 SXM 80 GB, NVLink 400 GB/s.
        Card(
            name="a800",
            title="A800 SXM 80 GB",
            pattern=r"\bA800-SXM4?-80GB\b",
            capability=(8, 0),
            processors=108,
            memory_bytes=81_037 * _MIB,
            flops=312e12,
            bandwidth=2.039e12,
            link=200e9,
            has_nvlink=True,
            network=200e9,
        ),
        # L40S data sheet: 362 TFLOPS dense, 864 GB/s, PCIe 4. EC2 g6e.48xlarge, of 8: 400 Gb/s.
        Card(
            name="l40s",
            title="L40S 48 GB",
            pattern=r"\bL40S\b",
            capability=(8, 9),
            processors=142,
            memory_bytes=45_457 * _MIB,
            flops=362e12,
            bandwidth=864e9,
            link=PCIE_4,
            network=50e9,
        ),
        # L40 data sheet: 181 TFLOPS dense, 864 GB/s.
        Card(
            name="l40",
            title="L40 48 GB",
            pattern=r"\bL40\b",
            capability=(8, 9),
            processors=142,
            memory_bytes=45_457 * _MIB,
            flops=181e12,
            bandwidth=864e9,
            link=PCIE_4,
            network=50e9,
        ),
        # Ada whitepaper for professionals: 364 TFLOPS dense, 960 GB/s, no NVLink. A workstation's 10 Gb Ethernet.
        Card(
            name="rtx6000_ada",
            title="RTX 6000 Ada 48 GB",
            pattern=r"\bRTX 6000 Ada\b",
            capability=(8, 9),
            processors=142,
            memory_bytes=48_622 * _MIB,
            flops=364e12,
            bandwidth=960e9,
            link=PCIE_4,
            network=1.25e9,
        ),
        # GA102 whitepaper: 154.8 TFLOPS dense, 768 GB/s, a bridge of 112.5 GB/s between two.
        Card(
            name="a6000",
            title="RTX A6000 48 GB",
            pattern=r"\bRTX A6000\b",
            capability=(8, 6),
            processors=84,
            memory_bytes=48_539 * _MIB,
            flops=155e12,
            bandwidth=768e9,
            link=PCIE_4,
            network=1.25e9,
        ),
        # A40 data sheet: 149.7 TFLOPS dense, 696 GB/s, a bridge of 112.5 GB/s between two.
        Card(
            name="a40",
            title="A40 48 GB",
            pattern=r"\bA40\b",
            capability=(8, 6),
            processors=84,
            memory_bytes=45_416 * _MIB,
            flops=150e12,
            bandwidth=696e9,
            link=PCIE_4,
            network=25e9,
        ),
        # A10 data sheet: 125 TFLOPS dense, 600 GB/s. OCI BM.GPU.A10.4: 2 x 50 Gb/s.
        Card(
            name="a10",
            title="A10 24 GB",
            pattern=r"\bA10\b",
            capability=(8, 6),
            processors=72,
            memory_bytes=22_558 * _MIB,
            flops=125e12,
            bandwidth=600e9,
            link=PCIE_4,
            network=12.5e9,
        ),
        # A10G data sheet: 70 TFLOPS dense, 600 GB/s. EC2 g5.48xlarge, of 8: 100 Gb/s.
        Card(
            name="a10g",
            title="A10G 24 GB",
            pattern=r"\bA10G\b",
            capability=(8, 6),
            processors=80,
            memory_bytes=22_558 * _MIB,
            flops=70e12,
            bandwidth=600e9,
            link=PCIE_4,
            network=12.5e9,
        ),
        # L4 data sheet: 242 TFLOPS sparse, 300 GB/s. EC2 g6.48xlarge, of 8: 100 Gb/s.
        Card(
            name="l4",
            title="L4 24 GB",
            pattern=r"\bL4\b",
            capability=(8, 9),
            processors=58,
            memory_bytes=22_558 * _MIB,
            flops=121e12,
            bandwidth=300e9,
            link=PCIE_4,
            network=12.5e9,
        ),
        # RTX Blackwell whitepaper: 209.5 TFLOPS dense with fp32 accumulation, 1,792 GB/s, PCIe 5, no NVLink. GeForce
        # cards stand in workstations with 10 Gb Ethernet.
        Card(
            name="rtx5090",
            title="RTX 5090 32 GB",
            pattern=r"\bRTX 5090\b(?! D)",
            capability=(12, 0),
            processors=170,
            memory_bytes=32_109 * _MIB,
            flops=210e12,
            bandwidth=1.792e12,
            link=PCIE_5,
            host_link=PCIE_5,
            network=1.25e9,
        ),
        # Ada whitepaper: 165.2 TFLOPS dense with fp32 accumulation, 1,008 GB/s, no NVLink.
        Card(
            name="rtx4090",
            title="RTX 4090 24 GB",
            pattern=r"\bRTX 4090\b(?! D)",
            capability=(8, 9),
            processors=128,
            memory_bytes=24_081 * _MIB,
            flops=165e12,
            bandwidth=1.008e12,
            link=PCIE_4,
            network=1.25e9,
        ),
        # GA102 whitepaper: 71 TFLOPS dense with fp32 accumulation, 936 GB/s, a bridge of 112.5 GB/s between two.
        Card(
            name="rtx3090",
            title="RTX 3090 24 GB",
            pattern=r"\bRTX 3090\b(?! Ti)",
            capability=(8, 6),
            processors=82,
            memory_bytes=24_126 * _MIB,
            flops=71e12,
            bandwidth=936e9,
            link=PCIE_4,
            network=1.25e9,
        ),
    )
}


def card_named(device: str) -> Card | None:
    """By the device's own name (`NVIDIA H100 80GB HBM3`); None for one that is not in the table."""
    if re.search(_NOT_WHOLE, device):
        return None
    return next((card for card in CARDS.values() if re.search(card.pattern, device)), None)
