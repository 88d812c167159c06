"""Instructions of the fused kernel's main loop for every 16-byte load of packed words a lane makes

    python tests/count_sass.py          needs nvcc and nvdisasm (pip install nvidia-cuda-nvdisasm)

Counted in the machine code for sm_90, groups of 128, where no GPU is needed. An instruction counts
where it stands, whether or not a predicate will let it do its work.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernel  # noqa: E402

LIMITS = {4: 80, 8: 75, 16: 85, 32: 105, 64: 135}  # tokens: instructions in float16
INSTANCES = {(1, 1): 4, (1, 2): 8, (2, 2): 16, (4, 1): 32, (8, 1): 64}  # NT, R: tokens


def tool(name):
    """The path of one of CUDA's tools, from the toolkit or a Python package; None"""
    packages = Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}")
    return shutil.which(name) or next(map(str, packages), None)


# What torch gives to nvcc: no conversion or operator of 16-bit numbers is implicit.
TORCH_FLAGS = [f"-D__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS",
                                                    "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")]


def build(arch, folder):
    """Compile for one GPU: (what nvcc says of registers and spills, the machine code's path)"""
    source, cubin = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
    source.write_text(kernel.CUDA)
    done = subprocess.run([tool("nvcc"), "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v",
                           *TORCH_FLAGS, "-cubin", "-o", cubin, source],
                          check=True, capture_output=True, text=True)
    return done.stdout + done.stderr, cubin


def disassemble(cubin):
    """{mangled name: [instruction or label]} of every kernel"""
    text = subprocess.check_output([tool("nvdisasm"), "-c", cubin], text=True)
    kernels = {}
    for part in re.split(r"^\.text\.(?=\w+:$)", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition(":")
        kernels[name] = re.findall(r"^\.L\w+(?=:)|(?<=\*/)\s+[@A-Z].*?;", body, re.MULTILINE)
    return kernels


def main_loop(instructions):
    """The shortest stretch from a label to a jump back to it that multiplies"""
    loops = []
    for i, instruction in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L\w+)\)", instruction)
        if target and target[1] in instructions[:i]:
            body = instructions[instructions.index(target[1]):i + 1]
            loops.append([line.strip() for line in body if not line.startswith(".L")])
    return min((loop for loop in loops if any("HMMA" in line for line in loop)), key=len)


def count(cubin, dtype="6__half"):
    """{tokens: instructions a load}"""
    counts = {}
    for name, instructions in disassemble(cubin).items():
        found = re.search(rf"fused_kernelI{dtype}Li(\d)ELi(\d)ELi\dELi1E", name)
        if found:
            loop = main_loop(instructions)
            loads = sum("LDG.E.EF.128" in line for line in loop)  # EF: streamed, only words are
            assert loads, name
            counts[INSTANCES[int(found[1]), int(found[2])]] = len(loop) / loads
    return counts


if __name__ == "__main__":
    if not (tool("nvcc") and tool("nvdisasm")):
        sys.exit("nvcc or nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        _, cubin = build(90, folder)
        half, bfloat = count(cubin), count(cubin, "13__nv_bfloat16")
    print("| tokens | float16 | limit | bfloat16 |\n|---|---|---|---|")
    for tokens, limit in LIMITS.items():
        print(f"| <= {tokens} | {half[tokens]:.1f} | {limit} | {bfloat[tokens]:.1f} |")
