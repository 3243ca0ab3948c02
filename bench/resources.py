"""``python -m bench resources``: what our kernels take of a chip, without one.

Each row of the tuning tables, and each tile of the contrastive kernels, is compiled ahead of time
for its architecture at CLIP's sizes, and the machine code is read: registers, spills, shared
memory, tensor-core instructions; with them the predicted occupancy, the fraction of the tiles' work
that is useful, and ptxas's warnings of serialized wgmma. Of the extension's kernels, the code that
it holds is read. Needs triton, and no GPU.
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
from tinyclip.triton_kernels.tuning import Kind, Tile, serving, table

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
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
# CLIP's lengths, causal and masked; of the tiles that were measured, lengths between them as well.
_CLIP = ("50", "50cm", "77c", "197", "257m")
_MEASURED = (*_CLIP, "77", "77cm", "97m", "128", "150m", "257", "577", "577m", "577cm")


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

    @classmethod
    def parse(cls, shape: str) -> "Problem":
        """The problem of a `shape`."""
        return cls(int(shape.rstrip("cm")), "c" in shape, "m" in shape)

    def useful(self, tile: Tile) -> float:
        """The scores that count over those that the tiles compute."""
        lengths = (self.length, self.length)
        return tiling.useful_fraction(*lengths, tile.block_m, tile.block_n, self.causal)


class Resources(NamedTuple):
    """What the machine code of a launch takes, and what ptxas warns of.

    `spills` are bytes of stack a thread, `spills_in_loops` the instructions that move them and run
    more than once: in a loop, or anywhere in code that has none. `serialized` are the codes of
    ptxas's warnings that it makes each wgmma wait for the one before (C7510 and its family).
    """

    registers: int
    spills: int
    spills_in_loops: int
    shared: int
    tensor_core: str
    blocks_per_sm: int
    serialized: str

    def faults(self, arch: int, spills_outside_loops: bool = False) -> list[str]:
        """Why the kernel is not fit to ship; `spills_outside_loops` permits those alone."""
        spills = self.spills_in_loops if spills_outside_loops else self.spills
        found = {
            "spills": spills > 0,
            "more shared memory than there is": self.shared > SHARED_LIMIT[arch],
            "too large for a multiprocessor": self.blocks_per_sm < 1,
            "serialized wgmma": self.serialized != "",
        }
        return [fault for fault, is_there in found.items() if is_there]


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


def _tool(name: str, *words: str | Path) -> subprocess.CompletedProcess:
    """Run one of the CUDA tools that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *words], capture_output=True, text=True, check=True)


def _cuobjdump(*words: str | Path) -> str:
    return _tool("cuobjdump", *words).stdout


def _serialized(ptx: str, folder: Path) -> str:
    """The codes of ptxas's warnings C75xx; Triton's own run of it keeps none of its output."""
    if "wgmma" not in ptx:
        return ""
    kernel = folder / "kernel.ptx"
    kernel.write_text(ptx)
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    log = _tool("ptxas", "-v", f"--gpu-name={target}", kernel, "-o", folder / "again.cubin").stderr
    assert "Used" in log, f"ptxas -v printed no registers: {log}"
    return " ".join(sorted(set(re.findall(r"C75\d\d", log))))


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
        serialized = _serialized(compiled.asm["ptx"], Path(folder))
    return _read(usage, sass, arch, compiled.metadata.shared, launch.num_warps, serialized)


def _spills_in_loops(sass: str) -> int:
    """Spill instructions between a branch backward and its target; all, if nothing branches so."""
    code = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(sass)]
    targets = ((at, re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)) for at, text in code)
    loops = [(int(to[1], 16), at) for at, to in targets if to and int(to[1], 16) < at]
    spills = [at for at, text in code if re.search(r"\b(LDL|STL)\b", text)]
    return sum(not loops or any(first <= at <= last for first, last in loops) for at in spills)


def _read(
    usage: str, sass: str, arch: int, shared: int, warps: int, serialized: str = ""
) -> Resources:
    """Of one kernel, from what cuobjdump says of it."""
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in _TENSOR_CORE}
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = SHARED_ALL[arch] // (shared + 1024)  # the driver keeps 1 KiB a block
    return Resources(
        registers,
        stack,
        _spills_in_loops(sass),
        shared,
        " ".join(f"{name} {count}" for name, count in counts.items() if count) or "none",
        min(by_registers, by_shared, WARPS // warps, 32),
        serialized,
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
        measured = (row["arch"], row["bits"], row["d"]) == (90, 16, 64)
        for problem in map(Problem.parse, _MEASURED if measured else _CLIP):
            arches = [row["arch"]] if row["bits"] == 16 else [80, 90, 100]
            for arch in arches:
                key = Kind(row["kind"], arch, row["bits"], row["d"], *problem[:2])
                if row != serving(key):
                    continue
                tile = Tile(*row["tile"])
                name = f"{row['kind']} {str(dtype).removeprefix('torch.')} D{row['d']}"
                launch = attention_launch(row["kind"], dtype, row["d"], problem, tile)
                yield name, arch, tile, problem, launch


# The exceptions to no spills: what is moved outside of all loops, once a program.
_SPILLS_OUTSIDE_LOOPS = {
    # Past 128 tokens, four loops and their tails take the 255 registers that there are; 2 to 34
    # words a thread, by length, mask and compiler, do not fit, in some 4,500 instructions. The tile
    # without spills, 64 x 32, takes 1.4 to 1.6 times as long on an H100.
    ("bwd bfloat16 D64", 90, Tile(64, 64, 4, 1)),
    # At 50 tokens: 4 words by Triton 3.8 on sm_80 and sm_90, 6 by 3.6 on sm_100.
    *(("bwd float32 D64", arch, Tile(32, 16, 8, 1)) for arch in (80, 90, 100)),
}


def may_spill_outside_loops(name: str, arch: int, tile: Tile) -> bool:
    """Whether spills of a shipped launch count in loops only."""
    return (name, arch, tile) in _SPILLS_OUTSIDE_LOOPS


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
    """Print the table; 1 if anything has faults, a spill or serialized wgmma among them."""
    columns = ("kernel", "sm", "tile", "size", "useful", "regs", "spills", "shared", "blocks/SM")
    print(f"{'  '.join(f'{name:>9}' for name in columns)}  tensor-core instructions")
    bad = 0
    for name, arch, tile, problem, launch in shipped_launches():
        found = resources(launch, arch)
        size = f"{tile.block_m}x{tile.block_n}/{tile.num_warps}/{tile.num_stages}"
        label = f"{name:>19} {arch:>4} {size:>12} {problem.shape:>6} {problem.useful(tile):>6.0%}"
        bad += _print(label, found, found.faults(arch, may_spill_outside_loops(name, arch, tile)))
    for name, launch in contrastive_launches():
        for arch in SHARED_LIMIT:
            found = resources(launch, arch)
            bad += _print(f"{'contrastive ' + name:>46} {arch:>4}", found, found.faults(arch))
    extension = _extension.load()
    for arch in extension.build_info()["architectures"] if extension else ():
        for name, found in extension_resources(arch).items():
            faults = found.faults(int(re.match(r"\d+", arch)[0]))
            bad += _print(f"{'extension ' + name:>43} {arch:>7}", found, faults)
    return 1 if bad else 0


def _print(label: str, found: Resources, faults: list[str]) -> bool:
    """A row of the table; whether the kernel has faults."""
    spills = f"{found.spills}{'' if found.spills_in_loops or not found.spills else '*'}"
    print(
        f"{label} {found.registers:>5} {spills:>6} {found.shared:>7} {found.blocks_per_sm:>3}"
        f"  {found.tensor_core}{f' {found.serialized}' if found.serialized else ''}"
        f"{'  FAULT: ' + ', '.join(faults) if faults else ''}",
        flush=True,
    )
    return bool(faults)
