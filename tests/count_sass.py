"""Instructions of the fused kernel's main loop for every 16-byte load of packed words a lane makes

Counted in the machine code for sm_90, float16, groups of 128, where no GPU is needed. An
instruction counts where it stands, whether or not a predicate will let it do its work.
"""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import kernel

LIMITS = {4: 80, 8: 75, 16: 85, 32: 105, 64: 135}  # tokens: instructions
# What torch gives to nvcc before kernel.CUDA_FLAGS.
TORCH_FLAGS = [f"-D__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS",
                                                    "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")]
INSTANCES = {(1, 1): 4, (1, 2): 8, (2, 2): 16, (4, 1): 32, (8, 1): 64}  # NT, R: tokens


def tool(name):
    """The path of one of CUDA's tools, from the toolkit or a Python package; None"""
    packages = Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}")
    return shutil.which(name) or next(map(str, packages), None)


def build(arch, folder):
    """Compile for one GPU: (what nvcc says of registers and spills, the machine code's path)"""
    source, cubin = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
    source.write_text(kernel.CUDA)
    done = subprocess.run([tool("nvcc"), "-std=c++17", *TORCH_FLAGS, *kernel.CUDA_FLAGS,
                           f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", "-o", cubin, source],
                          check=True, capture_output=True, text=True)
    return done.stdout + done.stderr, cubin


def main_loop(instructions):
    """The shortest stretch from a label to a jump back to it that multiplies"""
    loops = []
    for i, instruction in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L\w+)\)", instruction)
        if target and target[1] in instructions[:i]:
            body = instructions[instructions.index(target[1]):i + 1]
            loops.append([line for line in body if not line.startswith(".L")])
    return min((loop for loop in loops if any("HMMA" in line for line in loop)), key=len)


def count(cubin):
    """{tokens: instructions a load}"""
    text, counts = subprocess.check_output([tool("nvdisasm"), "-c", cubin], text=True), {}
    for part in re.split(r"^\.text\.(?=\w+:$)", text, flags=re.MULTILINE)[1:]:
        name = re.match(r"\w+fused_kernelI6__halfLi(\d)ELi(\d)ELi\dELi1E", part)
        if name:
            loop = main_loop(re.findall(r"^\.L\w+(?=:)|(?<=\*/)\s+[@A-Z].*?;", part, re.MULTILINE))
            loads = sum("LDG.E.EF.128" in line for line in loop)  # EF: streamed, only words are
            assert loads, name
            counts[INSTANCES[int(name[1]), int(name[2])]] = len(loop) / loads
    return counts
