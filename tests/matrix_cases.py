"""What `nvidia-smi topo -m` prints on three nodes."""

from __future__ import annotations

LEGEND = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
"""

# Eight GPUs on NVSwitch, a NIC on the switch of each, and one more for storage on either socket.
NAMES = [*(f"GPU{gpu}" for gpu in range(8)), *(f"NIC{nic}" for nic in range(10))]
OWNER = {"NIC0": 0, "NIC1": 1, "NIC2": 2, "NIC3": 3, "NIC5": 4, "NIC6": 5, "NIC7": 6, "NIC8": 7}


def _cell(row: str, column: str) -> str:
    if row == column:
        return " X "
    if row[:3] == column[:3] == "GPU":
        return "NV18"
    near = [OWNER.get(name, 12) if name[:3] == "NIC" else int(name[3:]) for name in (row, column)]
    if near[0] == near[1] and row[:3] != column[:3]:
        return "PXB"
    # The two NICs of none are on either socket.
    sides = [0 if name == "NIC4" else number // 4 % 2 for name, number in zip((row, column), near, strict=True)]
    return "NODE" if sides[0] == sides[1] else "SYS"


def _row(row: str) -> str:
    side = ["0-51,104-155", "0", "N/A"] if row < "GPU4" else ["52-103,156-207", "1", "N/A"]
    return "\t".join([row, *(_cell(row, column) for column in NAMES), *(side if row[:3] == "GPU" else [])])


DGX_H100 = (
    "\t\x1b[4m"
    + "\t".join([*NAMES, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"])
    + "\x1b[0m\n"
    + "\n".join(map(_row, NAMES))
    + "\n"
    + LEGEND
)

L40S = (
    """\
$ nvidia-smi topo -m
        GPU0    GPU1    GPU2    GPU3    NIC0    NIC1    CPU Affinity    NUMA Affinity   GPU NUMA ID
GPU0     X      PIX     SYS     SYS     PIX     SYS     0-31,64-95      0               N/A
GPU1    PIX      X      SYS     SYS     PIX     SYS     0-31,64-95      0               N/A
GPU2    SYS     SYS      X      PXB     SYS     NODE    32-63,96-127    1               N/A
GPU3    SYS     SYS     PXB      X      SYS     NODE    32-63,96-127    1               N/A
NIC0    PIX     PIX     SYS     SYS      X      SYS
NIC1    SYS     SYS     NODE    NODE    SYS      X
"""
    + LEGEND
)

PAIRS = """\
        GPU0    GPU1    GPU2    GPU3    mlx5_0  CPU Affinity    NUMA Affinity
GPU0     X      SYS     SYS     NV12    NODE    0-15    0
GPU1    SYS      X      NV12    SYS     SYS     16-31   1
GPU2    SYS     NV12     X      NODE    SYS     16-31   1
GPU3    NV12    SYS     NODE     X      NODE    0-15    0
mlx5_0  NODE    SYS     SYS     NODE     X
"""
PAIRS = PAIRS.replace("GPU2    SYS     NV12     X      NODE", "GPU2    SYS     NV12     X      SYS ")
PAIRS = PAIRS.replace("GPU3    NV12    SYS     NODE", "GPU3    NV12    SYS     SYS ")

# Eight V100 in the cube mesh of a DGX-1: one link or two, or none, between two of them.
CUBE = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tGPU4\tGPU5\tGPU6\tGPU7\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV1\tNV1\tNV2\tNV2\tSYS\tSYS\tSYS\t0-19,40-59\t0
GPU1\tNV1\t X \tNV2\tNV1\tSYS\tNV2\tSYS\tSYS\t0-19,40-59\t0
GPU2\tNV1\tNV2\t X \tNV2\tSYS\tSYS\tNV1\tSYS\t0-19,40-59\t0
GPU3\tNV2\tNV1\tNV2\t X \tSYS\tSYS\tSYS\tNV1\t0-19,40-59\t0
GPU4\tNV2\tSYS\tSYS\tSYS\t X \tNV1\tNV1\tNV2\t20-39,60-79\t1
GPU5\tSYS\tNV2\tSYS\tSYS\tNV1\t X \tNV2\tNV1\t20-39,60-79\t1
GPU6\tSYS\tSYS\tNV1\tSYS\tNV1\tNV2\t X \tNV2\t20-39,60-79\t1
GPU7\tSYS\tSYS\tSYS\tNV1\tNV2\tNV1\tNV2\t X \t20-39,60-79\t1
"""
