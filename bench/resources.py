"""``python -m bench resources``: what our kernels take of a chip, without one.

Each row of the tuning tables, and each tile of the contrastive kernels, is compiled ahead of time
for its architecture at CLIP's sizes, and the machine code is read: registers, spills, shared
memory, tensor-core instructions; with them the predicted occupancy, and the fraction of the tiles'
work that is useful. Of the extension's kernels, the code that it holds is read. Needs triton, and
no GPU.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench import mlp_launches
from tinyclip import _extension
from tinyclip.ops._panels import Panel, StatsMemory
from tinyclip.triton_kernels import contrastive, tiling
from tinyclip.triton_kernels.attention_bwd import plan_attention_bwd
from tinyclip.triton_kernels.attention_fwd import plan_attention_fwd
from tinyclip.triton_kernels.launch import Launch
from tinyclip.triton_kernels.tuning import Kind, Tile, shipped, table

# Per multiprocessor, CUDA programming guide: shared memory a block may have, and all there is.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_ALL = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
REGISTERS, WARPS = 65536, 64
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")


class Problem(NamedTuple):
    """An attention problem to compile for; the batch and the heads do not count."""

    length: int
    causal: bool = False
    masked: bool = False  # key_mask and head_gate

    products = True

    @property
    def shape(self) -> str:
        """For the table."""
        return f"{self.length}{'c' if self.causal else ''}{'m' if self.masked else ''}"

    def useful(self, tile: Tile) -> float:
        """The scores that count over those that the tiles compute."""
        lengths = (self.length, self.length)
        return tiling.useful_fraction(*lengths, tile.block_m, tile.block_n, self.causal)


class Resources(NamedTuple):
    """What the machine code of a launch takes; spills in bytes of stack a thread."""

    registers: int
    spills: int
    shared: int
    tensor_core: str
    blocks_per_sm: int


def source(launch: Launch):
    """The launch as Triton's ahead-of-time compiler takes it, specialised as at run time."""
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            hints[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                hints[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, hints)


def _cuobjdump(*words: str | Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *words], capture_output=True, text=True, check=True).stdout


def resources(launch: Launch, arch: int) -> Resources:
    """Compile a launch for an architecture and read what came out."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(
        source(launch),
        target=GPUTarget("cuda", arch, 32),
        options=launch.options,
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = _cuobjdump("-res-usage", cubin), _cuobjdump("-sass", cubin)
    return _read(usage, sass, arch, compiled.metadata.shared, launch.num_warps)


def _read(usage: str, sass: str, arch: int, shared: int, warps: int) -> Resources:
    """Of one kernel, from what cuobjdump says of it."""
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in _TENSOR_CORE}
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = SHARED_ALL[arch] // (shared + 1024)  # the driver keeps 1 KiB a block
    return Resources(
        registers,
        stack,
        shared,
        " ".join(f"{name} {count}" for name, count in counts.items() if count) or "none",
        min(by_registers, by_shared, WARPS // warps, 32),
    )


def extension_resources(arch: str) -> dict[str, Resources]:
    """The contrastive kernels in the extension for an architecture ("90a"), by name."""
    extension = _extension.load()
    number = int(re.match(r"\d+", arch)[0])
    words = ("-arch", f"sm_{arch.partition('+')[0]}", extension.__file__)
    sass = re.split(r"\n\s*Function : ", _cuobjdump("-sass", *words))[1:]
    code = dict(section.split("\n", 1) for section in sass)
    found = {}
    for name, usage in re.findall(r"Function (\w+):\n(.*)", _cuobjdump("-res-usage", *words)):
        if short := re.search(r"contrastive_(stats|grads|merge)_kernel(.*?)EEv", name):
            kind, instance = short[1], short[2]
            teacher = "Lb1" in instance[-4:]
            element = re.search(r"Bf16|Fp16|Fp32ILb[01]", instance)
            bytes_ = 4 if element and "32" in element[0] else 2
            shared = 0 if kind == "merge" else extension.contrastive_cuda_shared(teacher, bytes_)
            label = {"Fp32ILb1": "Fp32", "Fp32ILb0": "Fp32 as TF32"}
            label = label.get(element[0], element[0]) if element else ""
            label = f"{kind} {label}{' teacher' if teacher else ''}"
            warps = 4 if kind == "merge" else 8
            found[label] = _read(usage, code[name], number, shared, warps)
    return found


def attention_launch(kind: str, dtype: torch.dtype, d: int, problem: Problem, tile: Tile) -> Launch:
    """A launch on tensors without memory: packed in, as the modules call it."""
    b, h, length = 4, 12, problem.length
    meta = {"device": "meta", "dtype": dtype}
    q, k, v = torch.empty(b, length, 3, h, d, **meta).unbind(2)
    out = torch.empty(b, length, h, d, **meta)
    stats = torch.empty(2, b, h, length, device="meta")
    mask = gate = None
    if problem.masked:
        mask = torch.empty(b, length, dtype=torch.bool, device="meta")
        gate = torch.empty(h, device="meta")
    shared = (out, stats, mask, gate, problem.causal, d**-0.5)
    if kind == "fwd":
        return plan_attention_fwd(q, k, v, *shared, tile)
    needs = [True, True, True, problem.masked]
    return plan_attention_bwd(out, q, k, v, *shared, needs, [q, k, v], tile)[0]


def shipped_launches() -> Iterator[tuple[str, int, Tile, Problem, Launch]]:
    """Every row of the tables with the problems it serves: (name, arch, tile, problem, launch)."""
    yield from _attention_launches()
    yield from mlp_launches.launches()


def _attention_launches() -> Iterator[tuple[str, int, Tile, Problem, Launch]]:
    for row in table():
        dtype = torch.bfloat16 if row["bits"] == 16 else torch.float32
        problems = [Problem(50), Problem(50, True, True)]
        if row["length"] is None:
            problems = [Problem(77, True), Problem(197), Problem(257, False, True)]
        for problem in problems:
            arches = [row["arch"]] if row["bits"] == 16 else [80, 90, 100]
            for arch in arches:
                key = Kind(row["kind"], arch, row["bits"], row["d"], *problem[:2])
                tile = Tile(*row["tile"])
                if shipped(key) != tile:
                    continue
                name = f"{row['kind']} {str(dtype).removeprefix('torch.')} D{row['d']}"
                launch = attention_launch(row["kind"], dtype, row["d"], problem, tile)
                yield name, arch, tile, problem, launch


def contrastive_launches() -> Iterator[tuple[str, Launch]]:
    """Every contrastive kernel and tile: 16 and 32 bit, with and without a teacher, ragged too."""
    for bits, teacher, ragged in (
        *((16, False, False), (16, True, False), (16, False, True), (16, True, True)),
        *((32, False, False), (32, True, False)),
    ):
        m, d, dt = 4096, 500 if ragged else 512, 700 if ragged else 768
        dtype = torch.bfloat16 if bits == 16 else torch.float32
        a, ta, ds = (torch.empty(m, x, device="meta", dtype=dtype) for x in (d, dt, m))
        vector, rows = torch.empty(m, device="meta"), torch.empty(5, m, device="meta")
        its = (ta, ta, vector) if teacher else (None, None, None)
        panel = Panel(a, a, vector, *its, 0)
        tiles = {kind: contrastive.tile_of(kind, dtype, teacher) for kind in ("stats", "grads")}
        parts = StatsMemory.make(m, m, tiles["stats"][:2], teacher, "meta")
        first = (True, False)
        passes = contrastive.plan_stats(panel, rows, rows, vector, parts, first, tiles["stats"])
        grads = (panel, rows, rows, (vector, vector), 0.5, ds, vector, tiles["grads"])
        name = f"{str(dtype).removeprefix('torch.')}{' teacher' if teacher else ''}"
        name += " ragged" if ragged else ""
        yield f"stats {name}", passes[0]
        yield f"grads {name}", contrastive.plan_grads(*grads)
        if not ragged and bits == 16:
            yield f"merge {name}", passes[2]


def main() -> int:
    """Print the table; 1 if anything spills or asks for more shared memory than there is."""
    columns = ("kernel", "sm", "tile", "size", "useful", "regs", "spills", "shared", "blocks/SM")
    print(f"{'  '.join(f'{name:>9}' for name in columns)}  tensor-core instructions")
    bad = 0
    for name, arch, tile, problem, launch in shipped_launches():
        found = resources(launch, arch)
        size = f"{tile.block_m}x{tile.block_n}/{tile.num_warps}/{tile.num_stages}"
        print(
            f"{name:>19} {arch:>4} {size:>12} {problem.shape:>6} {problem.useful(tile):>6.0%}"
            f" {found.registers:>5} {found.spills:>6} {found.shared:>7} {found.blocks_per_sm:>3}"
            f"  {found.tensor_core}",
            flush=True,
        )
        bad += found.spills > 0 or found.shared > SHARED_LIMIT[arch]
    for name, launch in contrastive_launches():
        for arch in SHARED_LIMIT:
            found = resources(launch, arch)
            print(
                f"{'contrastive ' + name:>50} {arch:>4} {found.registers:>5} {found.spills:>6}"
                f" {found.shared:>7} {found.blocks_per_sm:>3}  {found.tensor_core}",
                flush=True,
            )
            bad += found.spills > 0 or found.shared > SHARED_LIMIT[arch]
    extension = _extension.load()
    for arch in extension.build_info()["architectures"] if extension else ():
        for name, found in extension_resources(arch).items():
            print(
                f"{'extension ' + name:>50} {arch:>7} {found.registers:>5} {found.spills:>6}"
                f" {found.shared:>7} {found.blocks_per_sm:>3}  {found.tensor_core}",
                flush=True,
            )
            bad += found.spills > 0
    return 1 if bad else 0
