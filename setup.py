"""Builds the extension ``tinyclip._C`` from csrc; everything else is said in pyproject.toml.

Nothing here imports torch, opens a socket or runs git. Whatever cannot be built is left out, and
the reason is written to ``tinyclip/_build_info.json``, where ``tinyclip doctor`` finds it; only
``TINYCLIP_CUDA=1`` turns a missing CUDA half into an error. docs/build.md lists the variables.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext as _build_ext
from setuptools.errors import CompileError, SetupError

# A new file under csrc is built as soon as it is there: *.cpp always, *.cu where there is nvcc.
CPU_SOURCES = sorted(Path("csrc").rglob("*.cpp"))
CUDA_SOURCES = sorted(Path("csrc").rglob("*.cu"))
# The files that see Python and pybind11; the others stay untouched when their paths change.
BINDINGS = sorted(Path("csrc").glob("bindings*.cpp"))

CXX_FLAGS = ["-std=c++17", "-O3", "-Icsrc"]
# A product is rounded before it is added to: every processor computes the same bits.
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-ffp-contract=off"]
OLDEST_CUDA = (12, 0)


@dataclass(frozen=True)
class Knobs:
    """What the environment asks of this build, checked before anything is compiled."""

    cuda: str
    architectures: list[str]
    jobs: int

    @classmethod
    def read(cls) -> "Knobs":
        cuda = os.environ.get("TINYCLIP_CUDA") or "auto"
        if cuda not in ("auto", "0", "1"):
            raise SetupError(f"TINYCLIP_CUDA is {cuda!r}; it must be auto, 0 or 1")
        architectures = re.split(r"[;,\s]+", os.environ.get("TINYCLIP_CUDA_ARCHS", ""))
        for arch in filter(None, architectures):
            if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
                rule = "it must be a list such as 80;90a;100+PTX"
                raise SetupError(f"TINYCLIP_CUDA_ARCHS has {arch!r}; {rule}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if not re.fullmatch(r"[1-9]\d*", jobs):
            raise SetupError(f"MAX_JOBS is {jobs!r}; it must be a whole number of at least 1")
        return cls(cuda, list(filter(None, architectures)), int(jobs))


def run(command: list[str]) -> str:
    """The output of ``command``, or CompileError with the first error it printed."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise CompileError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode == 0:
        return done.stdout
    print(done.stdout, file=sys.stderr)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
    # A compiler that failed without a word is named by ninja alone.
    errors = errors or [line for line in lines if line.startswith("FAILED:")] or lines[-1:]
    said = errors[0][:300] if errors else "it printed nothing"
    raise CompileError(f"{Path(command[0]).name} exited with status {done.returncode}: {said}")


@dataclass(frozen=True)
class Host:
    """The C++ compiler, as the words that start its command line."""

    words: list[str]
    flags: list[str]

    @classmethod
    def find(cls) -> "Host":
        if sys.platform != "linux":
            raise CompileError(f"the extension is built on Linux only, this is {sys.platform}")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise CompileError("Python.h was not found: install this Python's development headers")
        if importlib.util.find_spec("pybind11") is None:
            raise CompileError("pybind11 is not installed")
        named = shlex.split(os.environ.get("CXX", ""))
        found = [named] if named else [["g++"], ["c++"], ["clang++"]]
        words = next((w for w in found if shutil.which(w[0])), None)
        if words is None:
            what = f"CXX={named[0]} was not found" if named else "no C++ compiler was found"
            raise CompileError(f"{what} (g++, c++ and clang++ are looked for on PATH, or CXX)")
        return cls(words, ["-fopenmp"] if cls._has_openmp(words) else [])

    @staticmethod
    def _has_openmp(words: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <omp.h>\nint main() { return !omp_get_max_threads(); }\n")
            try:
                run([*words, "-fopenmp", str(source), "-o", str(source.with_suffix(""))])
            except CompileError:
                return False
        return True


@dataclass(frozen=True)
class Cuda:
    """nvcc, its version, and the architectures to compile for."""

    nvcc: str
    version: str
    architectures: list[str]

    @classmethod
    def find(cls, architectures: list[str]) -> "Cuda | None":
        """None where there is no nvcc; CompileError where there is one that is of no use."""
        nvcc = cls._locate()
        if nvcc is None:
            return None
        match = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"]))
        if match is None:
            raise CompileError(f"{nvcc} --version names no release")
        version = (int(match[1]), int(match[2]))
        if version < OLDEST_CUDA:
            raise CompileError(f"nvcc is {match[1]}.{match[2]}, {OLDEST_CUDA[0]}.0 is the oldest")
        # PTX of an "a" architecture runs on no later chip, so plain 90 carries it before 12.8.
        usual = ["80", "90a", "100+PTX"] if version >= (12, 8) else ["80", "90a", "90+PTX"]
        return cls(nvcc, f"{match[1]}.{match[2]}", architectures or usual)

    @staticmethod
    def _locate() -> str | None:
        if named := os.environ.get("NVCC"):
            if found := shutil.which(named):
                return found
            raise CompileError(f"NVCC={named} was not found")
        # An empty CUDA_HOME means: look on PATH only.
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        in_home = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
        if os.environ.get("CUDA_HOME") and in_home is None:
            raise CompileError(f"CUDA_HOME={home} has no bin/nvcc")
        return in_home if os.environ.get("CUDA_HOME") else shutil.which("nvcc") or in_home

    def gencode(self) -> list[str]:
        flags = []
        for arch in self.architectures:
            number, _, ptx = arch.partition("+")
            code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
            flags.append(f"-gencode=arch=compute_{number},code={code}")
        return flags


@dataclass(frozen=True)
class Step:
    """One command that makes one file."""

    output: Path
    inputs: list[Path]
    command: list[str]
    depfile: Path | None = None


def plan(host: Host, cuda: Cuda | None, folder: Path) -> list[Step]:
    """The compile steps and, last, the link step."""
    import pybind11

    python_side = [
        *("-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()),
        *([f"-DTINYCLIP_CUDA_ARCHS={','.join(cuda.architectures)}"] if cuda else []),
    ]
    host_flags = [*HOST_FLAGS, *host.flags]
    steps = []
    for source in CPU_SOURCES + (CUDA_SOURCES if cuda else []):
        output = folder / f"{source}.o"
        depfile = output.with_suffix(".d")
        if source.suffix == ".cu":
            command = [cuda.nvcc, "-ccbin", host.words[-1], *CXX_FLAGS, *cuda.gencode()]
            command += ["-lineinfo", "-Xcompiler", ",".join(host_flags)]
        else:
            command = [*host.words, *CXX_FLAGS, *host_flags, "-Wextra"]
            command += python_side if source in BINDINGS else []
        command += ["-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
        steps.append(Step(output, [source], command, depfile))

    objects = [step.output for step in steps]
    library = folder / "_C.so"
    # torch puts its own libcudart among the global symbols; ours must neither meet nor replace it.
    if cuda:
        command = [cuda.nvcc, "-ccbin", host.words[-1], "-shared", "-nodlink", "-cudart", "static"]
        command += ["-Xlinker", "--exclude-libs=ALL"]
        command += ["-Xcompiler", ",".join(host.flags)] if host.flags else []
    else:
        command = [*host.words, "-shared", "-Wl,--exclude-libs=ALL", *host.flags]
    command += [*map(str, objects), "-o", str(library)]
    return [*steps, Step(library, objects, command)]


def find_ninja() -> list[str] | None:
    """The words that start ninja: the program, or the Python package that brings it."""
    words = [["ninja"], [sys.executable, "-m", "ninja"]]
    for candidate in words if importlib.util.find_spec("ninja") else words[:1]:
        try:
            run([*candidate, "--version"])
        except CompileError:
            continue
        return candidate
    return None


def carry_out(steps: list[Step], folder: Path, jobs: int) -> None:
    """Run the steps: those out of date and in parallel by ninja, else all, one after another."""
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    ninja = find_ninja()
    if ninja is None:
        for step in steps:
            print(shlex.join(step.command))
            run(step.command)
        return

    def path(name: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(name))

    lines = [f"builddir = {path(folder)}"]  # where ninja keeps its log
    lines += ["rule compile", "  command = $words", "  depfile = $out_d", "  deps = gcc"]
    lines += ["rule link", "  command = $words"]
    for step in steps:
        rule = "compile" if step.depfile else "link"
        lines.append(f"build {path(step.output)}: {rule} {' '.join(map(path, step.inputs))}")
        lines.append(f"  words = {shlex.join(step.command).replace('$', '$$')}")
        lines += [f"  out_d = {step.depfile}"] if step.depfile else []
    graph = folder / "build.ninja"
    graph.write_text("\n".join(lines) + "\n")
    print(run([*ninja, "-v", "-f", str(graph), "-j", str(jobs)]))


class build_ext(_build_ext):
    """Builds what this machine can build and keeps the reason for the rest."""

    def run(self) -> None:
        self.knobs = Knobs.read()
        self.record = {"extension": False, "reason": None, "cuda": None, "cuda_reason": None}
        for ext in self.extensions:
            # A leftover of an earlier build would be loaded in place of what this one cannot make;
            # a checkout's own module stays while a wheel is made of the checkout.
            inside = Path("tinyclip", Path(self.get_ext_filename(ext.name)).name)
            folder = Path() if self.inplace else Path(self.build_lib)
            Path(folder, inside).unlink(missing_ok=True)
        super().run()
        package = Path("tinyclip") if self.inplace else Path(self.build_lib, "tinyclip")
        package.mkdir(parents=True, exist_ok=True)
        Path(package, "_build_info.json").write_text(json.dumps(self.record, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        library = cuda = None
        try:
            host = Host.find()
        except CompileError as error:
            self._leave_out("reason", error)
            return
        try:
            if cuda := self._find_cuda():
                library = self._build(host, cuda)
        except CompileError as error:
            cuda = self._leave_out("cuda_reason", error)
        try:
            library = library or self._build(host, None)
        except CompileError as error:
            self._leave_out("reason", error)
            return
        self.record.update(extension=True, cuda=cuda and cuda.version)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)

    def _find_cuda(self) -> Cuda | None:
        if self.knobs.cuda == "0":
            self.record["cuda_reason"] = "TINYCLIP_CUDA=0 switched it off"
            return None
        cuda = Cuda.find(self.knobs.architectures)
        if cuda is None:
            missing = "nvcc was not found when the package was built"
            if self.knobs.cuda == "1":
                raise CompileError(missing)
            self.record["cuda_reason"] = missing
        return cuda

    def _build(self, host: Host, cuda: Cuda | None) -> Path:
        # Not self.build_temp: an editable install's is deleted, and its objects are worth keeping.
        folder = Path("build", f"csrc-{sysconfig.get_config_var('SOABI')}")
        steps = plan(host, cuda, folder)
        carry_out(steps, folder, self.knobs.jobs)
        return steps[-1].output

    def _leave_out(self, key: str, error: CompileError) -> None:
        """Record and announce what cannot be built, or fail if it was asked for."""
        if self.knobs.cuda == "1":
            raise CompileError(
                f"TINYCLIP_CUDA=1, but no CUDA code can be built: {error}"
            ) from error
        self.record[key] = str(error)
        what = "CUDA code" if key == "cuda_reason" else "its extension"
        print(
            f"warning: tinyclip is installed without {what}; every feature is still there.",
            f"warning:   why: {error}",
            "warning:   `tinyclip doctor` repeats it; docs/build.md says what the build looks for.",
            sep="\n",
            file=sys.stderr,
        )


setup(
    packages=[*find_packages(include=["tinyclip", "tinyclip.*"]), "tinyclip.triton_kernels"],
    # Optional, so that a build without it is copied and listed as one; TINYCLIP_CUDA=1 must fail.
    ext_modules=[
        Extension(
            "tinyclip._C",
            [str(source) for source in CPU_SOURCES + CUDA_SOURCES],
            optional=os.environ.get("TINYCLIP_CUDA") != "1",
        )
    ],
    cmdclass={"build_ext": build_ext},
)
