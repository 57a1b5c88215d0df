"""Compiles the Triton kernels for cards that need not be there and says what they take:

    python -m solutions.tests.compile_triton

Shared memory is what Triton asks for at launch; registers and spills are what the assembler reports.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are defined

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from solutions.attention import paged_kernels_triton as kernels
from solutions.attention.latent_attention_triton import LatentTritonBackend
from solutions.attention.paged_attention_triton import DECODE_CONFIGS, DOT, MAX_SPLITS, PREFILL_CONFIGS, Config, padded
from solutions.core.platform.triton_mode import triton
from solutions.models.kernels import layers_triton as layers
from solutions.models.lora import products_triton as lora
from solutions.quantization.kernels import float8_triton, grouped_float8_triton, w4a16_triton

POINTERS = {
    "slot_mapping": "*i64", "block_tables": "*i32", "query_start_loc": "*i32", "context_lens": "*i32",
    "key_scales": "*fp16", "value_scales": "*fp16", "partial_sums": "*fp32", "partial_stats": "*fp32",
}  # fmt: skip
"""Types of the arguments that are not of the model's type or numbers."""

GROUP, H_KV, BLOCK_SIZE = 4, 8, 16


@dataclass(slots=True)
class Report:
    """What one kernel takes on one card: registers and spilled bytes of a thread, bytes of shared memory of a program."""

    kernel: str
    capability: int
    head_dim: int
    variant: str
    registers: int
    spilled: int
    shared: int


def compile_for(
    kernel: str, capability: int, sizes: dict[str, int], absent: tuple[str, ...], cache: str, **options: int
) -> Report:
    """Compile for bfloat16 queries.

    Args:
        sizes: of the kernel's capital letters. absent: pointers that are None. cache: the type of cached elements.
    """
    function = getattr(kernels, kernel)
    constants = {**sizes, **dict.fromkeys(absent)}
    signature = {name: "constexpr" if name in constants else kind(name, cache) for name in function.arg_names}
    # as a launch would find them: addresses, and strides that are not left unspecialized, are multiples of 16
    aligned = [n for n, t in signature.items() if (t.startswith("*") and n not in kernels.STEP_ARRAYS) or is_fixed_stride(n)]
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = assemble(compiled.asm["ptx"], capability)
    variant = ", ".join(f"{k} {v}" for k, v in {**{k: sizes[k] for k in sizes if k.startswith("BLOCK_")}, **options}.items())
    return Report(kernel, capability, sizes["D"], f"{cache} cache {variant}", registers, spilled, compiled.metadata.shared)


def kind(name: str, cache: str) -> str:
    """Triton's name for an argument's type."""
    if name in POINTERS:
        return POINTERS[name]
    if name in ("keys", "values"):
        return f"*{cache}"
    if name.startswith(("num_", "table_")) or name.endswith("_stride"):
        return "i32"
    return "fp32" if name in ("scale_log2", "cap_log2") else "*bf16"


def compile_product(
    function: JITFunction, capability: int, kinds: dict[str, str], blocks: dict[str, int | float | None]
) -> Report:
    """Compile a product for bfloat16 activations.

    Args:
        kinds: types of the arguments that are no whole numbers. blocks: of the kernel's capital letters, and what is None.
    """
    signature = {name: "constexpr" if name in blocks else kinds.get(name, "i32") for name in function.arg_names}
    sizes = ("num_inputs", "num_outputs", "group_size", "inputs_a_split")  # multiples of 16, and so are rows apart
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in sizes or name.endswith("_stride")
    }
    source = ASTSource(function, signature, blocks, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    registers, spilled = assemble(compiled.asm["ptx"], capability)
    variant = ", ".join(f"{name} {size}" for name, size in blocks.items())
    return Report(function.__name__, capability, 0, variant, registers, spilled, compiled.metadata.shared)


def products(capability: int) -> Iterator[Report]:
    """The products with 4-bit weights, of adapters and of experts, and what stands between products."""
    kinds = {"x": "*bf16", "packed": "*i32", "scales": "*fp16", "zeros": "*fp16", "out": "*bf16"}
    for block_m in (16, 64):
        blocks = {"BLOCK_M": block_m, "BLOCK_N": w4a16_triton.BLOCK_N, "BLOCK_K": w4a16_triton.BLOCK_K}
        yield compile_product(w4a16_triton.w4a16_kernel, capability, kinds, blocks)
    of_step = {"tiles": "*i32", "order": "*i64", "table": "*i64"}
    blocks = {"TILE": lora.TILE, "BLOCK_R": lora.BLOCK_R}
    kinds = {"x": "*bf16", "inner": "*fp32"} | of_step
    yield compile_product(lora.shrink_kernel, capability, kinds, blocks | {"BLOCK_K": lora.BLOCK_K})
    kinds = {"inner": "*fp32", "y": "*bf16"} | of_step | {"blocks": "*i32"}
    yield compile_product(lora.expand_kernel, capability, kinds, blocks | {"BLOCK_N": lora.BLOCK_N, "SPLITS": lora.MAX_SPLITS})
    kinds = {"x": "*bf16", "weights": "*bf16", "biases": "*bf16", "bounds": "*i64", "out": "*bf16"}
    blocks = {"BLOCK_N": layers.BLOCK_N, "BLOCK_K": layers.BLOCK_K}
    for block_m in (16, layers.MAX_ROWS):
        yield compile_product(layers.grouped_kernel, capability, kinds, blocks | {"BLOCK_M": block_m})
        yield compile_product(layers.grouped_kernel, capability, kinds, blocks | {"BLOCK_M": block_m, "biases": None})
    kinds = {"x": "*bf16", "weight": "*bf16", "out": "*bf16"} | dict.fromkeys(("eps", "offset"), "fp32")
    for add in (False, True):
        yield compile_product(layers.norm_kernel, capability, kinds, {"ADD": add, "SIZE": 576, "BLOCK": 1024})
    yield compile_product(layers.silu_mul_kernel, capability, {"gate_up": "*bf16", "out": "*bf16"}, {"BLOCK": 1024})


def float8_products(capability: int) -> Iterator[Report]:
    """With rounded activations and with whole ones, of one matrix and of experts, and what rounds: 128 columns, whole rows."""
    kinds = {"x": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32"}
    for block in (128, 8192):
        yield compile_product(float8_triton.round_kernel, capability, kinds, {"LARGEST": 448.0, "BLOCK": block})
    kinds = {"x_scales": "*fp32", "weights": "*fp8e4nv", "scales": "*fp32", "out": "*bf16"}
    for block_m in (16, 64):
        blocks = {"BLOCK_M": block_m, "BLOCK_N": float8_triton.BLOCK_N, "BLOCK_K": float8_triton.BLOCK_K}
        yield compile_product(float8_triton.float8_kernel, capability, kinds | {"x": "*fp8e4nv"}, blocks)
        yield compile_product(float8_triton.float8_kernel, capability, kinds | {"x": "*bf16"}, blocks | {"x_scales": None})
        kernel, grouped = grouped_float8_triton.grouped_float8_kernel, kinds | {"bounds": "*i64", "biases": "*bf16"}
        yield compile_product(kernel, capability, grouped | {"x": "*fp8e4nv"}, blocks | {"biases": None})
        yield compile_product(kernel, capability, grouped | {"x": "*bf16"}, blocks | {"x_scales": None})


def over_latents(capability: int) -> Iterator[Report]:
    """DeepSeek's: a latent of 512 elements and 64 that are turned, in bfloat16 and, in small tiles, in int8."""
    for config in LatentTritonBackend.decode_configs:
        sizes = {"GROUP": config.block_m, "H_KV": 1, "D": 512, "D_PADDED": 512, "TURNED": 64, "TURNED_PADDED": 64}
        sizes |= {"BLOCK_SIZE": BLOCK_SIZE, "WINDOW": 0, "CAPPED": False}
        sizes |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        yield compile_for("attend", capability, sizes, ("key_scales", "value_scales", "sinks"), "bf16", **options)
        if config.block_n == DOT:
            yield compile_for("attend", capability, sizes, ("sinks",), "i8", **options)


def is_fixed_stride(name: str) -> bool:
    return name.endswith("_stride") and name != "table_stride"


def assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills."""
    arch = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"-arch={arch}", str(source), "-o", str(source.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", said)[1]), int(re.search(r"(\d+) bytes spill stores", said)[1])


def reports(head_dims: list[int], configs: list[Config]) -> Iterator[Report]:
    """All kernels with each configuration, for compute capability 8.0 and 9.0; those for float8 for 8.9 and 9.0."""
    for capability in (89, 90):
        yield from float8_products(capability)
    for capability in (80, 90):
        yield from products(capability)
        yield from over_latents(capability)
        for dim in head_dims:
            heads = {"H": GROUP * H_KV, "H_KV": H_KV, "D": dim}
            half = {"H_PADDED": GROUP * H_KV, "H_KV_PADDED": H_KV, "HALF_PADDED": padded(dim // 2)}
            scales = ("key_scales", "value_scales")
            yield compile_for("write_kv", capability, heads | half, scales, "bf16", num_warps=4)
            yield compile_for("write_kv", capability, heads | half, (), "i8", num_warps=4)
            yield compile_for("write_kv", capability, heads | half, (*scales, "cos", "signed_sin"), "bf16", num_warps=4)
            splits = {"D": dim, "D_PADDED": padded(dim), "SPLITS_PADDED": MAX_SPLITS}
            yield compile_for("merge_splits", capability, splits, (), "bf16", num_warps=4)
            for config in configs:
                sizes = {
                    "GROUP": GROUP,
                    "H_KV": H_KV,
                    "D": dim,
                    "D_PADDED": padded(dim, DOT),
                    "BLOCK_SIZE": BLOCK_SIZE,
                    "WINDOW": 0,
                    "CAPPED": False,
                    "TURNED": 0,
                    "TURNED_PADDED": 0,
                }
                sizes |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
                options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
                partials = ("partial_sums", "partial_stats", "sinks")
                yield compile_for("attend", capability, sizes, (*scales, *partials), "bf16", **options)
                if config in (DECODE_CONFIGS[0], PREFILL_CONFIGS[0]):
                    capped = sizes | {"WINDOW": 512, "CAPPED": True}  # as Gemma 2 has it
                    yield compile_for("attend", capability, capped, (*scales, *partials), "bf16", **options)
                    yield compile_for("attend", capability, sizes, ("sinks",), "i8", **options)
                    if dim == 64:  # as gpt-oss has it
                        yield compile_for("attend", capability, sizes, scales, "bf16", **options)
                    if capability >= 89:
                        yield compile_for("attend", capability, sizes, (*scales, *partials), "fp8e4nv", **options)


def main() -> None:
    """Print a line of JSON for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every configuration and head size, not just the first")
    everything = parser.parse_args().all
    configs = [*DECODE_CONFIGS, *PREFILL_CONFIGS] if everything else [DECODE_CONFIGS[0], PREFILL_CONFIGS[0]]
    for report in reports([64, 80, 96, 128] if everything else [64, 128], configs):
        print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    main()
