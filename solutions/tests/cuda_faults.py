"""Mistakes planted in the CUDA kernels, to see that the tests find them. As a program: compares a build with the oracle."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from solutions.attention import cuda_build
from solutions.attention.paged_attention_cuda import CudaBackend
from solutions.core.platform import native
from solutions.tests.attention_cases import make_case

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Fault:
    """`old`, which occurs once in the kernels, becomes `new`. found_by: "oracle", or the sanitizer "address" or "thread"."""

    name: str
    old: str
    new: str
    found_by: str = "oracle"

    def plant(self, folder: Path) -> Path:
        """The kernels with this mistake, a file in `folder`."""
        path = few_kernels(folder)
        text = path.read_text()
        assert text.count(self.old) == 1, f"{self.old!r} occurs {text.count(self.old)} times in the kernels"
        path.write_text(text.replace(self.old, self.new))
        return path


LEFT_OUT = ("int attend_f16", "int attend_bf16", "    if (group == 1) return", "    if (s.head_dim <= MAX_HEAD_DIM / 2) return")


def few_kernels(folder: Path) -> Path:
    """The kernels without those that `is_right` does not use, which take most of the compiler's time: a file in `folder`."""
    lines = native.find_source(cuda_build.KERNELS).read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(LEFT_OUT)]
    assert len(kept) == len(lines) - len(LEFT_OUT)
    path = folder / "kernels.cu"
    path.write_text("".join(kept))
    return path


DROPPED_BARRIER = ("    __syncthreads();  // the rows are complete", "    // the rows are complete")
FAULTS = [
    Fault("dropped barrier, by its result", *DROPPED_BARRIER),
    Fault("dropped barrier, by the sanitizer", *DROPPED_BARRIER, "thread"),
    Fault("the next token is seen", "const int end = max(s.context_lens[low] - tokens_behind, 0)",
          "const int end = min(max(s.context_lens[low] - tokens_behind, 0) + 1, s.context_lens[low])"),
    Fault("context one too long", "max(s.context_lens[low] - tokens_behind, 0)",
          "s.context_lens[low] - tokens_behind + 1", "address"),
    Fault("last key of a full block is not seen", "if (has_some && position < keys.end)",
          "if (has_some && position < keys.end && (position + 1 != keys.end || (keys.end & block_mask) != 0))"),
    Fault("window one too long", "max(end - s.window, 0)", "max(end - s.window - 1, 0)"),
    Fault("window one too short", "max(end - s.window, 0)", "max(end - s.window + 1, 0)"),
    Fault("block of the position before", "block_table[position >> s.block_shift]",
          "block_table[max(position - 1, 0) >> s.block_shift]"),
    Fault("uninitialised shared memory", "if (first == 0) row[0] = largest[h], row[1] = weights[h];",
          "if (first == 0) row[1] = weights[h];"),
    Fault("lanes beyond the head", "first < s.head_dim;", "true;", "address"),
    Fault("shared memory too small", "HEADS * (2 + s.head_dim) * sizeof(float)",
          "HEADS * (1 + s.head_dim) * sizeof(float)", "address"),
    Fault("part of a split left out", "min(begin + length, keys.end)", "min(begin + length - 1, keys.end)"),
    Fault("sums not made relative to the new maximum", "weights[h] *= factor;", ""),
]  # fmt: skip

REPORTS = {"address": "AddressSanitizer", "thread": "ThreadSanitizer: data race"}


def sanitizer_environment(kind: str) -> dict[str, str]:
    """Environment of a Python process whose kernels are watched by a sanitizer, "address" or "thread", that they are built for.

    Raises:
        FileNotFoundError: the compiler has no library for it.
    """
    names = {"address": ["libasan.so", "libstdc++.so"], "thread": ["libtsan.so"]}[kind]
    paths = []
    for name in names:
        run = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        paths.append(run.stdout.strip())
        if not Path(paths[-1]).is_file():
            raise FileNotFoundError(f"g++ has no {name}, install its sanitizers")
    options = {
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return os.environ | options


def is_right(library: Path) -> bool:
    """Whether a build of the kernels gives the oracle's answer, in one pass and over a split context."""
    kernels = ctypes.CDLL(str(library))
    case = make_case([1, 1, 1, 3], [15, 16, 17, 33], heads=(3, 1), head_dim=80, block_size=16, window=20)
    for num_splits in (1, 3):
        got = case.run(CudaBackend(CPU, num_splits, library=kernels)).double()
        if not torch.allclose(got, case.expected(), rtol=0, atol=1e-5):  # NaN is not close to anything
            return False
    return True


def main() -> None:
    """Exit with 0 if the build of the kernels named on the command line is right, else with 1."""
    sys.exit(0 if is_right(Path(sys.argv[1])) else 1)


if __name__ == "__main__":
    main()
