"""Builds picnn_fast._C with ninja; everything else about the package is in pyproject.toml.

Environment:
    CXX                   the C++ compiler, launcher and options before and after it if need be, as
                          in "ccache g++" (default: c++ or g++, whichever is on PATH)
    CUDA_HOME             where nvcc is looked for first
    PICNN_FAST_CUDA       0: no CUDA code; 1: fail without nvcc (default: CUDA code where nvcc is)
    PICNN_FAST_WERROR     1: compiler warnings are errors
    MAX_JOBS              parallel compilations (default: one a core)
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# The oldest torch whose stable ABI has what the kernels call; newer ones serve it too.
TORCH_TARGET_VERSION = "0x020a000000000000"
CUDA_ARCHITECTURES = ("80", "90")
# GCC takes the undefined operands of its own AVX-512 intrinsics for uninitialised variables.
X86_CAPABILITIES = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": [
        "-march=skylake-avx512",
        "-mprefer-vector-width=512",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],
}


def find_compiler() -> list[str] | None:
    """The words of the command, None where there is no such program."""
    named = os.environ.get("CXX")
    if named:
        commands = [[named] if shutil.which(named) else shlex.split(named)]
    else:
        commands = [["c++"], ["g++"]]
    for command in commands:
        path = shutil.which(command[0]) if command else None
        if path is not None:
            return [path, *command[1:]]
    return None


def host_compiler(command: list[str]) -> str:
    """The compiler itself, which nvcc takes without launcher and options."""
    programs = [shutil.which(word) for word in command if not word.startswith("-")]
    return [path for path in programs if path is not None][-1]


def find_nvcc() -> tuple[str | None, str]:
    """The path of nvcc, or None and the reason."""
    wanted = os.environ.get("PICNN_FAST_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"PICNN_FAST_CUDA: got {wanted!r}, want 0 or 1")
    if wanted == "0":
        return None, "PICNN_FAST_CUDA=0 was set at installation"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home] + ["nvcc"]
    nvcc = next((path for path in map(shutil.which, candidates) if path), None)
    if nvcc is None:
        if wanted == "1":
            sys.exit("PICNN_FAST_CUDA=1, but nvcc is not in CUDA_HOME nor on PATH")
        return None, "nvcc was not found at installation"
    try:
        version = version_line([nvcc])
    except BrokenToolError as error:
        if wanted == "1":
            sys.exit(f"PICNN_FAST_CUDA=1, but {error}")
        return None, str(error)
    if wanted == "1":
        return nvcc, ""
    import torch

    # The runtime linked in must not be newer than the driver, for which torch's CUDA stands.
    major = re.search(r"release (\d+)", version)
    built = torch.version.cuda
    if major and built and int(major[1]) > int(built.split(".")[0]):
        return None, (
            f"nvcc {major[1]} is newer than torch's CUDA {built}, and so perhaps than the driver;"
            " PICNN_FAST_CUDA=1 builds all the same"
        )
    return nvcc, ""


class BrokenToolError(Exception):
    """A compiler that does not even tell its version; the message says which."""


def version_line(command: list[str]) -> str:
    shown = shlex.join([*command, "--version"])
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    except OSError as error:
        raise BrokenToolError(f"{shown} does not run: {error.strerror}") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = " ".join((done.stderr or done.stdout).split()) or "nothing said"
        raise BrokenToolError(f"{shown} fails with status {done.returncode}: {said[:200]}")
    return next((line for line in lines if "release" in line), lines[0])


def define(name: str, text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return flag(f"-D{name}=", f'"{escaped}"')


def flag(option: str, value: object) -> str:
    """An option with a value, quoted for the shell inside a ninja file."""
    return option + shlex.quote(str(value)).replace("$", "$$")


class NinjaBuild(build_ext):
    """Writes build.ninja for the one extension and runs it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        work = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file())
        import ninja

        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", work, "-j", jobs]
        if subprocess.run(list(map(str, command))).returncode != 0:
            sys.exit(
                "picnn_fast: the compiled core does not build; the compiler's errors are above."
                " PICNN_FAST_CUDA=0 leaves the CUDA kernels out."
            )
        # A fresh inode: a process that has the old library mapped keeps it intact.
        staging = target.with_suffix(".new")
        shutil.copyfile(work / "_C.so", staging)
        staging.replace(target)


@dataclass(frozen=True)
class Tools:
    """What compiles: the words of the C++ compiler's command; nvcc, or None and the reason."""

    compiler: list[str]
    nvcc: str | None
    cuda_reason: str


# An object file, the rule that makes it, its source, and flags of its own.
Object = tuple[str, str, Path, list[str]]


def compiler_flags() -> dict[str, list[str]]:
    """Flags of all files that a rule compiles."""
    warnings, nvcc_warnings = ["-Wall", "-Wextra"], ["-Xcompiler", "-Wall,-Wextra"]
    if os.environ.get("PICNN_FAST_WERROR") == "1":
        warnings.append("-Werror")
        nvcc_warnings += ["--Werror", "all-warnings"]
    shared = ["-std=c++17", "-O3"]
    # Without contraction a * b + c rounds twice on every instruction set, as the reference does;
    # without trapping math and errno, loops with comparisons vectorise.
    arithmetic = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    cxx = [*warnings, *shared, "-fPIC", "-fvisibility=hidden", *arithmetic, "-g0"]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    newest = CUDA_ARCHITECTURES[-1]
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    cuda = [*nvcc_warnings, *shared, *codes, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return {"cxx": cxx, "nvcc": cuda}


def build_facts(tools: Tools) -> list[str]:
    """What ``build_info`` tells, as definitions of the bindings."""
    import torch

    architectures = " ".join(f"sm_{a}" for a in CUDA_ARCHITECTURES)
    architectures += f" compute_{CUDA_ARCHITECTURES[-1]}"
    return [
        define("PICNN_FAST_COMPILER", version_line(tools.compiler)),
        define("PICNN_FAST_TORCH", torch.__version__),
        define("PICNN_FAST_CUDA_REASON", tools.cuda_reason),
        define("PICNN_FAST_CUDA_COMPILER", version_line([tools.nvcc]) if tools.nvcc else ""),
        define("PICNN_FAST_CUDA_ARCHITECTURES", architectures if tools.nvcc else ""),
    ]


def objects(tools: Tools, torch_root: Path) -> list[Object]:
    """Every source, the kernels of the CPU once for each instruction set."""
    import pybind11

    # Not for the bindings: some releases of torch bring a pybind11 of their own.
    torch_flags = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        flag("-isystem ", torch_root / "include"),
    ]
    python = [
        flag("-isystem ", pybind11.get_include()),
        flag("-isystem ", sysconfig.get_path("include")),
    ]
    bindings = ROOT / "csrc/bindings.cpp"
    found: list[Object] = [("bindings.o", "cxx", bindings, [*build_facts(tools), *python])]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    capabilities = X86_CAPABILITIES if x86 else {"default": []}
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if not source.stem.endswith("_kernels"):
            found.append((f"cpu_{source.stem}.o", "cxx", source, torch_flags))
            continue
        for capability, flags in capabilities.items():
            names = [
                f"-DPICNN_FAST_NAMESPACE=picnn_fast_{capability}",
                f"-DPICNN_FAST_KERNELS={source.stem}_{capability}",
            ]
            found.append((f"cpu_{source.stem}_{capability}.o", "cxx", source, flags + names))
    if tools.nvcc:
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            found.append((f"cuda_{source.stem}.o", "nvcc", source, torch_flags))
    return found


def link_flags(tools: Tools, torch_root: Path) -> list[str]:
    # libtorch brings in libtorch_cuda where there is one: the weak stream symbol needs it.
    link = [flag("-L", torch_root / "lib"), "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    if tools.nvcc:
        toolkit = Path(tools.nvcc).resolve().parent.parent
        folders = [toolkit / "lib64", toolkit / "targets/x86_64-linux/lib", toolkit / "lib"]
        link += [flag("-L", folder) for folder in folders if folder.is_dir()]
        # Static: the library then loads beside a torch built without CUDA.
        link += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    return link


def ninja_file() -> str:
    import torch

    torch_root = Path(torch.__file__).parent
    compiler = find_compiler()
    assert compiler is not None
    tools = Tools(compiler, *find_nvcc())
    flags = compiler_flags()
    lines = [
        "ninja_required_version = 1.5",
        "cxx = " + " ".join(flag("", word) for word in compiler),
        f"cxx_flags = {' '.join(flags['cxx'])}",
        flag("nvcc = ", tools.nvcc or "nvcc") + flag(" -ccbin ", host_compiler(compiler)),
        f"nvcc_flags = {' '.join(flags['nvcc'])}",
    ]
    for rule in flags:
        lines += [
            f"rule {rule}",
            f"  command = ${rule} -MMD -MF $out.d ${rule}_flags $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    lines += ["rule link", "  command = $cxx -shared -o $out $in $flags"]
    outputs = []
    for output, rule, source, own in objects(tools, torch_root):
        path = re.sub(r"([$ :])", r"$\1", str(source))
        lines += [f"build {output}: {rule} {path}", f"  flags = {' '.join(own)}"]
        outputs.append(output)
    link = " ".join(link_flags(tools, torch_root))
    lines += [f"build _C.so: link {' '.join(outputs)}", f"  flags = {link}", "default _C.so", ""]
    return "\n".join(lines)


def extensions() -> list[Extension]:
    named = os.environ.get("CXX")
    problem = f"no C++ compiler found ({f'CXX={named}' if named else 'c++, g++ on PATH'})"
    compiler = find_compiler()
    if compiler is not None:
        try:
            version_line(compiler)
            problem = ""
        except BrokenToolError as error:
            if named:
                sys.exit(f"picnn_fast: CXX={named}: {error}")
            problem = str(error)
    if problem:
        print(
            f"picnn_fast: {problem}; installing without the compiled"
            " kernels. The PyTorch reference and Triton serve instead.",
            file=sys.stderr,
        )
        return []
    nvcc, reason = find_nvcc()
    if nvcc is None:
        print(f"picnn_fast: building without CUDA kernels: {reason}", file=sys.stderr)
    return [Extension("picnn_fast._C", sources=[])]


setup(
    packages=[*find_packages(include=["picnn_fast", "picnn_fast.*"]), "picnn_fast.triton_kernels"],
    # Under the package: another project installs a top-level module called triton_kernels.
    package_dir={"picnn_fast.triton_kernels": "triton_kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
