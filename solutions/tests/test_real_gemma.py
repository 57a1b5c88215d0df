"""Gemma 3 with its real weights, for those who have them: ``GEMMA3_270M_GGUF=/path/to/gemma-3-270m-q4_k_m.gguf``.

The file is pinned by its hash. What it holds is dequantized once, and transformers computes with the same numbers.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.models.gguf_convert import convert_gguf

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GGUF = os.environ.get("GEMMA3_270M_GGUF", "")
TEXT = "The capital of France is Paris, the capital of Italy is Rome, and the capital of Japan is"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not GGUF, reason="GEMMA3_270M_GGUF names no file")
def test_real_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers to a short prompt and to one longer than the window of 512, by both kernels of a CPU."""
    path = Path(GGUF)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    with monkeypatch.context() as patch:
        patch.setenv("BYOV_CACHE", str(tmp_path))
        folder = convert_gguf(path)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompts = [TEXT, f"{'It was a bright cold day in April, and the clocks were striking thirteen. ' * 40}{TEXT}"]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=1)
    for backend in ("torch", "cpu"):
        llm = LLM(str(folder), dtype="float32", max_model_len=1024, max_num_batched_tokens=200, attention_backend=backend)
        for output in llm.generate(prompts, params, use_tqdm=False):
            prompt, answer = output.prompt_token_ids, list(output.outputs[0].token_ids)
            assert prompt[0] == 2, "a text begins with <bos>"
            with torch.inference_mode():
                expected = oracle(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert answer == expected.argmax(-1).tolist()
            for row, token, entry in zip(expected, answer, output.outputs[0].logprobs, strict=True):
                assert abs(entry[token].logprob - float(row[token])) < 1e-3
            assert output.outputs[0].text.startswith(" Tokyo")
        llm.llm_engine.close()
