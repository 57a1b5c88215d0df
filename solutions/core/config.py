"""Every setting of the engine in one record, and the command-line flags made from it. Names and meaning are vLLM's."""

from __future__ import annotations

import argparse
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ..memory.transfer.transfer_config import TransferConfig

DEFAULT_MODEL = "smollm2-135m"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_FETCH = "fetch that revision with hf download NAME --revision REVISION --local-dir FOLDER, and give the folder as"
REFUSED_FLAGS = {
    "--revision": f"{_FETCH} --model",
    "--tokenizer-revision": f"{_FETCH} --tokenizer",
    "--trust-remote-code": "no code from a model's folder is run; leave it out, and use a model of transformers' own classes",
}
"""Flags of vLLM's, and what to do instead."""
KINDS = {"int": int, "bool": bool}
"""Types whose values are checked; the others are read by whoever uses them."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str | int) -> int:
    """A number of bytes from ``"512MiB"``, ``"2GiB"``, ``"1.5g"`` or ``"1000"``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?(?:ib)?)b?", str(text).strip().lower())
    if not match or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _flag(default: Any, text: str, choices: tuple[str, ...] | None = None, kind: Any = None, name: str = "") -> Any:
    return field(default=default, metadata={"help": text, "choices": choices, "type": kind, "name": name})


@dataclass(slots=True)
class EngineConfig:
    """Settings of one engine. Each field is also a command-line flag (``max_num_seqs`` is ``--max-num-seqs``).

    Raises:
        ValueError: a setting is none of its choices, or of another type; `tensor_parallel_size` is less than 1, or more than
            the executor has room for; settings exclude each other.
    """

    model: str = _flag(DEFAULT_MODEL, "alias, folder in Hugging Face format, .gguf file, or hub id")
    tokenizer: str | None = _flag(None, "folder or hub id of the tokenizer, if it is not the model's")
    dtype: str = _flag("auto", "precision of weights and KV cache; auto: bfloat16 where that is fast", DTYPES)
    device: str = _flag("auto", "where the model runs", ("auto", "cpu", "cuda"))
    tensor_parallel_size: int = _flag(1, "ranks that share the model: GPUs, or processes with a part of the cores")
    enable_expert_parallel: bool = _flag(
        False, "give each rank some of the experts of a model that has them, instead of a part of each"
    )
    distributed_executor_backend: str | None = _flag(
        None,
        "where the ranks run; uni: one, in this process; mp: processes on this machine; ray: actors on one or more nodes of a "
        "Ray cluster; default: uni for one rank, mp for more",
        ("uni", "mp", "ray"),
    )
    collective_backend: str = _flag(
        "auto",
        "how ranks add up; auto: through memory that they share on a CPU, else by gloo or NCCL; ring: rings in Python, slower, "
        "to learn from",
        ("auto", "ring"),
    )
    load_format: str = _flag("auto", "dummy: random weights, to measure speed without a download", ("auto", "dummy"))
    max_model_len: int | None = _flag(None, "longest sequence, prompt and output; default: the model's context", kind=int)
    block_size: int = _flag(16, "tokens in a KV block")
    kv_cache_memory_bytes: int | None = _flag(
        None,
        "memory for KV blocks, such as 2GiB; default: a quarter of the free memory, at most 4GiB",
        kind=parse_bytes,
    )
    kv_cache_dtype: str = _flag(
        "auto",
        "auto: that of the model; int8: half of 16 bits, with a scale for each head of a token; fp8: on a GPU",
        ("auto", "int8", "fp8"),
    )
    touch_kv_cache: bool = _flag(
        False, "on a CPU: write the KV cache at start; costs about 1 s per GB, and spares the first requests that delay"
    )
    gpu_memory_utilization: float = _flag(
        0.9, "share of a GPU's memory that weights, activations and KV blocks may take together"
    )
    num_gpu_blocks_override: int | None = _flag(None, "number of KV blocks, instead of what fits the memory", kind=int)
    swap_space: int = _flag(
        1 << 30, "host memory for swapped-out KV blocks, used with --preemption-mode swap", kind=parse_bytes
    )
    kv_offload: str | None = _flag(
        None,
        "where KV blocks go that leave the prefix cache, to come back instead of being computed; host: host memory; else a "
        "folder, which a restarted server finds again and several may share (./host for one of that name); default: nowhere",
    )
    kv_offload_size: int = _flag(
        4 << 30, "most bytes there, with --kv-offload, such as 20GiB; the least recently used go first", kind=parse_bytes
    )
    kv_transfer_config: str | None = _flag(
        None,
        "hand the KV blocks of prompts from one engine to another, as JSON: "
        '{"kv_connector": "tcp", "kv_role": "kv_producer", "kv_addresses": ["10.0.0.5:14579"]} computes prompts for others, '
        '"kv_consumer" with the same addresses fetches them and writes the answers; connector shm, for one machine, takes '
        "paths of Unix sockets; more keys: kv_buffer_size, kv_lease_seconds",
    )
    max_num_seqs: int = _flag(256, "most sequences running at once")
    max_num_batched_tokens: int | None = _flag(
        None,
        "token budget of a step; smaller steadies the time between tokens; default: 512 on a CPU, 8192 on a GPU",
        kind=int,
    )
    enable_prefix_caching: bool = _flag(True, "reuse the KV blocks of a prompt's beginning that was seen before")
    prefix_cache: str = _flag(
        "hash",
        "how they are found; hash: whole blocks, by their hashes; radix: tokens up to the first that differs, in a tree",
        ("hash", "radix"),
    )
    enable_chunked_prefill: bool = _flag(True, "split long prompts over several steps")
    long_prefill_token_threshold: int = _flag(0, "most tokens of one prompt in one step; 0: no limit but the budget")
    scheduling_policy: str = _flag(
        "fcfs",
        "who goes first; fcfs: by arrival; priority: lower priority value; lpm: longest prefix match, by what is cached; fair: "
        "the client (an API key, else an address) that was served least",
        ("fcfs", "priority", "lpm", "fair"),
    )
    client_weights: str | None = _flag(
        None,
        'with --scheduling-policy fair, larger shares, as JSON: {"203.0.113.7": 2}; a client with an API key is called by the '
        "first 32 digits of the key's SHA-256; default: 1 for each",
    )
    async_scheduling: bool = _flag(
        False,
        "decide the next step while the device computes this one, for a GPU that waits for the host; a CPU gains nothing",
    )
    preemption_mode: str = _flag("recompute", "what becomes of a preempted sequence's KV blocks", ("recompute", "swap"))
    max_num_waiting: int | None = _flag(None, "most sequences that may wait; more are refused; default: no limit", kind=int)
    attention_backend: str = _flag(
        "auto",
        "naive: a loop to read; torch: batched; cpu: in C++; triton, cuda: on a GPU, or slowly on a CPU to learn from",
        ("auto", "naive", "torch", "cpu", "triton", "cuda"),
    )
    enable_cpu_kernels: bool = _flag(True, "on a CPU: run the layers on C++ kernels with packed weights")
    enforce_eager: bool = _flag(
        False, "call every kernel from Python instead of recording steps (on a GPU: CUDA graphs) and replaying them"
    )
    quantization: str | None = _flag(
        None,
        "on a CPU; int8: weights and activations in 8 bits; int4: weights in 4 bits, groups of 32, and activations in 8; gguf: "
        "a GGUF file's own blocks, instead of 16 bits for each weight; on a GPU from compute capability 8.9; fp8: weights and "
        "activations as floats of 8 bits; the others say what a checkpoint is",
        ("int8", "int4", "gguf", "gptq", "awq", "compressed-tensors", "fp8"),
    )
    batch_invariant: bool = _flag(
        False, "on a CPU: compute a token bit for bit the same alone and in any batch; attention is slower for it"
    )
    speculative_config: str | None = _flag(
        None,
        'speculative decoding, as JSON: {"method": "ngram", "num_speculative_tokens": 4} drafts from the text itself, '
        '{"method": "draft_model", "model": ..., "quantization": ...} with a smaller model, {"method": "eagle", "model": '
        'FOLDER} with a head that python -m solutions.core.eagle.train has trained for this model, {"method": "mtp"} with the '
        'module that DeepSeek-V3 has for it; as many as pay, by what is measured, unless "adaptive": false; more keys: '
        "disable_by_batch_size, num_speculative_tokens_per_batch_size, prompt_lookup_min, prompt_lookup_max; of a head also "
        "speculative_token_tree, drafts that branch: [[0], [1], [0, 0]] is its two likeliest next tokens, and one behind the "
        "first",
    )
    pooler_config: str | None = _flag(
        None,
        'how embeddings are made, as JSON: {"pooling_type": "mean", "normalize": true}; types are mean, last and cls; default: '
        "as the model's files say, else this",
    )
    generation_config: str = _flag(
        "auto",
        "where the defaults of temperature, top_p, top_k, min_p, repetition_penalty and max_tokens come from; auto: the "
        "model's generation_config.json; vllm: no file; else a folder with such a file",
    )
    override_generation_config: str | None = _flag(None, 'defaults that go before those, as JSON: {"temperature": 0.5}')
    enable_lora: bool = _flag(False, "let requests name LoRA adapters as their model")
    lora_modules: tuple[str, ...] = _flag((), "adapters to load at start, each as NAME=FOLDER, a folder that PEFT has saved")
    max_loras: int = _flag(8, "most adapters that are loaded at once")
    max_lora_rank: int = _flag(16, "highest rank of an adapter")
    seed: int = _flag(0, "seeds the sampling of requests that bring no seed of their own")

    def __post_init__(self) -> None:
        self._check_values()
        if self.tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size must be at least 1, got {self.tensor_parallel_size}")
        if self.enable_expert_parallel and self.tensor_parallel_size == 1:
            raise ValueError("--enable-expert-parallel deals experts out over ranks; it needs --tensor-parallel-size above 1")
        if self.distributed_executor_backend == "uni" and self.tensor_parallel_size > 1:
            raise ValueError(
                f"--distributed-executor-backend uni has one rank, and --tensor-parallel-size is {self.tensor_parallel_size}; "
                "use mp, or ray for several nodes"
            )
        if self.scheduling_policy == "lpm" and not self.enable_prefix_caching:
            raise ValueError("--scheduling-policy lpm goes by what is cached; leave --no-enable-prefix-caching out")
        if self.client_weights is not None and self.scheduling_policy != "fair":
            raise ValueError("--client-weights needs --scheduling-policy fair")
        if self.prefix_cache == "radix" and (self.tier_flag is not None or not self.enable_prefix_caching):
            flag = "--no-enable-prefix-caching" if self.tier_flag is None else f"{self.tier_flag}, which goes by hashes"
            raise ValueError(f"--prefix-cache radix: not with {flag}")
        if self.tier_flag is not None:
            self._check_tier(self.tier_flag)
        if self.lora_modules and not self.enable_lora:
            raise ValueError("--lora-modules needs --enable-lora")
        if self.enable_lora:
            self._check_lora()
        if self.async_scheduling and self.speculative_config is not None:
            raise ValueError(
                "--async-scheduling: not with --speculative-config; drafts follow tokens that are not known a step ahead"
            )
        if self.async_scheduling and (self.tensor_parallel_size > 1 or self.distributed_executor_backend in ("mp", "ray")):
            raise ValueError("--async-scheduling: only with one rank in the engine's process; other ranks are told each token")

    @property
    def tier_flag(self) -> str | None:
        """The flag that puts a tier below the prefix cache, if one does."""
        if self.kv_transfer_config is not None:
            return "--kv-transfer-config"
        return None if self.kv_offload is None else "--kv-offload"

    def _check_tier(self, flag: str) -> None:
        if self.kv_offload is not None and not self.kv_offload:
            raise ValueError("--kv-offload takes a folder, or host")
        if not self.enable_prefix_caching:
            raise ValueError(f"{flag} goes by what the prefix cache knows; leave --no-enable-prefix-caching out")
        if self.tensor_parallel_size > 1 or self.distributed_executor_backend in ("mp", "ray"):
            raise ValueError(f"{flag}: only with one rank in the engine's process; each rank has a part of every block")
        if self.kv_transfer_config is None:
            return
        transfer = TransferConfig.parse(self.kv_transfer_config)
        if self.kv_offload is not None:
            raise ValueError("--kv-transfer-config: not with --kv-offload; an engine has one tier")
        if self.enable_lora:
            raise ValueError("--kv-transfer-config: not with --enable-lora; each engine has salts of its own for its adapters")
        if self.async_scheduling and transfer.is_producer:
            raise ValueError(
                "--kv-transfer-config: a kv_producer not with --async-scheduling, which gives blocks away before they are read"
            )

    def _check_values(self) -> None:
        for f in fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            kind = KINDS.get(str(f.type).removesuffix(" | None"))
            if kind is not None and type(value) is not kind and (value is not None or f.default is not None):
                raise ValueError(f"{f.name}: {'a whole number' if kind is int else 'True or False'}, not {value!r}")
            of_a_kind = f.name == "attention_backend" and value == "full"  # an encoder's
            if choices is not None and value is not None and value not in choices and not of_a_kind:
                raise ValueError(f"--{f.name.replace('_', '-')}: one of {', '.join(choices)}, not {value!r}")

    def _check_lora(self) -> None:
        if self.max_loras < 1:
            raise ValueError(f"max_loras must be at least 1, got {self.max_loras}")
        if not 1 <= self.max_lora_rank <= 512:
            raise ValueError(f"max_lora_rank must be between 1 and 512, got {self.max_lora_rank}")
        if self.distributed_executor_backend == "ray":
            raise ValueError("--enable-lora: not with ranks that are Ray actors; use --distributed-executor-backend mp")
        if self.batch_invariant:
            raise ValueError("--enable-lora: not with --batch-invariant; steps with adapters in them round in more places")

    def to_args(self) -> dict[str, Any]:
        """The settings as a dictionary, for records of measurements."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class _RefusedFlag(argparse.Action):
    """A flag of vLLM's that is not supported; its help is what to do instead."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, values: object, option: str | None = None) -> None:
        parser.error(f"{option} is not supported: {REFUSED_FLAGS[str(option)]}")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of `EngineConfig`."""
    for flag in REFUSED_FLAGS:
        parser.add_argument(flag, action=_RefusedFlag, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    group = parser.add_argument_group("engine")
    for f in fields(EngineConfig):
        assert f.default is not MISSING
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"] + ("" if f.default is None or isinstance(f.default, bool) else f" (default: {f.default})")
        if isinstance(f.default, tuple):
            group.add_argument(flag, nargs="+", default=f.default, metavar="NAME=FOLDER", help=f.metadata["help"])
        elif isinstance(f.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            kind = f.metadata["type"] or type(f.default) if f.default is not None else f.metadata["type"] or str
            group.add_argument(flag, type=kind, default=f.default, choices=f.metadata["choices"], help=text)


def config_from_flags(args: argparse.Namespace) -> EngineConfig:
    """The `EngineConfig` in parsed flags."""
    return EngineConfig(**{f.name: getattr(args, f.name) for f in fields(EngineConfig)})
