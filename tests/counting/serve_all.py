"""A program that lets the engine, the server and the commands do what a learner's stages do: ``python serve_all.py FOLDER``.

The default model answers in an engine with the settings of each stage, in the server, and under the benchmarks. A small model
does what takes its time: it swaps, drafts, is quantized, and runs on the kernels for GPUs, interpreted or built for a CPU.
"""

from __future__ import annotations

import builtins
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from fastapi.testclient import TestClient

from benchmarks import latency, memory, throughput
from solutions.attention import paged_attention_triton, paged_kernels_triton
from solutions.batching.sampling_params import SamplingParams, StructuredOutput
from solutions.benchmarks.servers import as_flags, running_server
from solutions.core.engine import LLM
from solutions.core.graphs.decode_graphs import graph_sizes
from solutions.quantization import awq, gptq
from solutions.quantization.kernels import w4a16_triton
from solutions.serving.replicas.two_phase_proxy import create_proxy
from solutions.tests.eagle_heads import make_random_head
from solutions.tests.tiny_models import VOCAB_SIZE, make_tiny, make_tiny_llama
from stages.course.tools.catalog import load_course

MODEL = "smollm2-135m"
SETTINGS = {"model": MODEL, "max_model_len": 128, "max_num_seqs": 8, "dtype": "float32", "kv_cache_memory_bytes": 64 << 20}
TEXT = "one two three four one two three four one two three"
GREEDY = SamplingParams(temperature=0, max_tokens=6)
GARBAGE = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=1, allowed_token_ids=[175])
"""Of the default model's vocabulary token 175 is the byte E4, with which a character begins and never ends."""
CHOOSY = SamplingParams(max_tokens=6, top_p=0.9, frequency_penalty=0.5, min_tokens=2)
KERNELS = {module.__file__ for module in (paged_kernels_triton, w4a16_triton)}
"""Files whose kernels Triton's interpreter compiles from their text, so that `sitecustomize` does not see them."""


def answer(prompts: list[Any], params: SamplingParams | list[SamplingParams], **settings: Any) -> None:
    """Let an engine with these settings answer, and end."""
    llm = LLM(**(SETTINGS | settings))
    assert all(output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False))
    llm.llm_engine.close()


def engines() -> None:
    """The default model with the settings of each stage."""
    form = StructuredOutput("regex", "a|b")
    sampled = [SamplingParams(n=2, seed=1, max_tokens=6), SamplingParams(structured_output=form, max_tokens=6)]
    several = [GREEDY, GARBAGE, CHOOSY, *sampled]
    for stage in load_course():
        if stage.settings:
            answer([TEXT] * len(several), several, **stage.settings)


def note_kernels(frame: FrameType, event: str, _: object) -> None:
    """For `sys.setprofile`: notes the kernels that the interpreter calls."""
    if event == "call" and frame.f_code.co_filename in KERNELS:
        path = Path(frame.f_code.co_filename)
        builtins._note_call(f"{path.relative_to(Path(awq.__file__).parents[1])}:{frame.f_code.co_name}")


def small_models(folder: Path) -> None:
    """Swapping, drafts of a model, quantized models, and kernels for GPUs on a CPU."""
    tiny = str(folder / "tiny")
    make_tiny_llama(Path(tiny), hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    crowd = [{"prompt_token_ids": [i] * 40} for i in range(5)]
    long = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    answer(crowd, long, model=tiny, num_gpu_blocks_override=12, preemption_mode="swap")
    answer([*crowd, *crowd], long, model=tiny, max_num_seqs=2, scheduling_policy="fair", prefix_cache="radix")
    brief = SamplingParams(max_tokens=5, stop_token_ids=list(range(VOCAB_SIZE)))
    answer(crowd, [brief, *[long] * 4], model=tiny, async_scheduling=True)
    for _ in range(2):  # the second one reads what the first has written
        answer(crowd[:1], long, model=tiny, kv_offload=str(folder / "kv"))
    make_tiny("mixtral", folder / "experts")
    answer(crowd[:1], long, model=str(folder / "experts"), enable_cpu_kernels=False)
    make_tiny("deepseek_v2", folder / "latents")
    plain = {"prompt_token_ids": [1, 2] * 90}  # long enough to make its keys and values of the latents
    answer([crowd[0], plain], long, model=str(folder / "latents"), max_model_len=256)
    answer(crowd[:1], long, model=tiny, attention_backend="torch", kv_cache_dtype="int8")
    answer(crowd[:1], long, model=tiny, tensor_parallel_size=2)
    make_tiny("gemma3_text", folder / "windows")
    answer(crowd[:2], long, model=str(folder / "windows"))
    transfer = {"kv_connector": "tcp", "kv_role": "kv_producer", "kv_addresses": ["127.0.0.1:0"]}
    producer = LLM(**(SETTINGS | {"model": tiny, "kv_transfer_config": json.dumps(transfer)}))
    producer.generate([crowd[0], crowd[0]], SamplingParams(max_tokens=1), use_tqdm=False)
    transfer |= {"kv_role": "kv_consumer", "kv_addresses": [producer.llm_engine.tiers.tier.server.address]}
    answer(crowd[:1], long, model=tiny, kv_transfer_config=json.dumps(transfer))
    producer.llm_engine.close()
    drafts = json.dumps({"method": "draft_model", "model": tiny, "adaptive": False})
    answer(crowd[:1], SamplingParams(max_tokens=8, ignore_eos=True), model=tiny, speculative_config=drafts)
    make_random_head(folder / "head", tiny)
    tree = {"method": "eagle", "model": str(folder / "head"), "speculative_token_tree": [[0], [1]], "adaptive": False}
    answer(crowd[:1], long, model=tiny, speculative_config=json.dumps(tree), enable_prefix_caching=False)
    recipe = ["--model", tiny, "--group-size", "32", "--num-samples", "2", "--sequence-length", "16"]
    gptq.main([*recipe, "--output", str(folder / "gptq")])
    awq.main([*recipe, "--output", str(folder / "awq")])
    prompt, two = [{"prompt_token_ids": [1, 2, 3] * 11}], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    for method in ("gptq", "awq"):
        answer(prompt, two, model=str(folder / method), enable_cpu_kernels=False)
    llm = LLM(**(SETTINGS | {"model": tiny, "attention_backend": "cuda"}))
    llm.llm_engine.executor.worker.capture_graphs(graph_sizes(4), lambda step: step)  # there may be no card to record them
    llm.generate(prompt, two, use_tqdm=False)
    paged_attention_triton.MIN_SPLIT = 16  # a short context is cut, too
    sys.setprofile(note_kernels)
    answer(prompt, two, model=str(folder / "gptq"), attention_backend="triton", enable_cpu_kernels=False)
    sys.setprofile(None)


def server() -> None:
    """Requests of all kinds to the server, load of a benchmark, one who leaves, and the end in the middle of an answer."""
    settings = SETTINGS | {"scheduling_policy": "priority", "max_num_seqs": 2}
    with running_server(*as_flags(settings), "--max-waiting-tokens", "2000") as (process, url):
        latency.main(["--url", url, *workload(4), "--concurrency", "2", "--rates", "20"])
        with httpx.Client(base_url=url, timeout=60) as client:
            talk = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
            piece = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "stop": ["zz"]}
            assert "[DONE]" in client.post("/chat/completions", json=talk | piece).text
            assert client.post("/completions", json={"model": MODEL, "prompt": TEXT, "stop": [1]}).status_code == 400
            assert client.post("/completions", json={"model": MODEL, "prompt": TEXT, "max_tokens": 2}).status_code == 200
            endless = {"model": MODEL, "prompt": TEXT, "max_tokens": 100, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/completions", json=endless) as response:
                next(response.iter_lines())
            with TestClient(create_proxy([], [url.removesuffix("/v1")], 60, 60, 1 << 20)) as proxy:
                asked = {"model": MODEL, "prompt": f"{TEXT} {TEXT}", "max_tokens": 2}
                assert proxy.post("/v1/completions", json=asked).status_code == 200
            assert "vllm:" in client.get(url.removesuffix("v1") + "metrics").text
            with client.stream("POST", "/completions", json=endless | {"max_tokens": 20}) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert "data: [DONE]" in list(lines)
        assert process.wait(30) == 0


def workload(requests: int) -> list[str]:
    """Flags of a benchmark's smallest workload."""
    return ["--num-prompts", str(requests), "--input-len", "8", "--output-len", "4"]


def main() -> None:
    engines()
    small_models(Path(sys.argv[1]))
    server()
    throughput.main([*workload(2), "--backend", "both", "--repeats", "2", "--max-model-len", "64", "--dtype", "float32"])
    memory.main(["--num-requests", "60", "--kv-cache-memory-bytes", "2GiB", "--block-sizes", "16", "--max-model-lens", "1024"])


if __name__ == "__main__":
    main()
