"""A head is trained: what is learned from, gradients through a draft, runs that are interrupted, and drafts that are right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from solutions.batching.sampling_params import SamplingParams
from solutions.core.eagle import corpus, train
from solutions.core.eagle.corpus import Text, load_corpus, save_part, write_corpus
from solutions.core.eagle.learner import Learner, Plan, SoftCrossEntropy, frequent_tokens, make_batch, new_head
from solutions.core.eagle.questions import FORMS, SUBJECTS, make_questions
from solutions.core.eagle.unrolled import UnrolledHead
from solutions.core.engine import LLM
from solutions.core.platform import native
from solutions.models.heads.eagle import save_head
from solutions.models.kernels.attach import packed_of
from solutions.models.loader import load_model, resolve_model
from solutions.tests.eagle_heads import make_random_head
from solutions.tests.test_eagle import GREEDY, PROMPTS, SETTINGS, Oracle, eagle, tokens
from solutions.tests.tiny_models import make_tiny_mistral

FLAGS = ["--answers", "12", "--max-tokens", "40", "--draft-vocab-size", "64", "--epochs", "2", "--batch", "4", "--depth", "2"]


@pytest.fixture(scope="module")
def target(tiny_llama: Path) -> str:
    return str(tiny_llama)


@pytest.fixture(scope="module")
def model(target):
    return load_model(resolve_model(target, progress=False), torch.float32, torch.device("cpu"), progress=False)


def texts_of(target: str, prompts=PROMPTS, max_tokens: int = 30) -> list[Text]:
    """Greedy answers with transformers' hidden states."""
    params = dataclasses.replace(GREEDY, max_tokens=max_tokens)
    answers = tokens(LLM(target, **SETTINGS).generate(prompts, params, use_tqdm=False))
    body, texts = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).model, []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([*prompt["prompt_token_ids"], *answer])
        with torch.no_grad():
            texts.append(Text(ids, body(ids[None, :-1]).last_hidden_state[0], len(prompt["prompt_token_ids"])))
    return texts


def test_all_questions_are_asked_before_one_is_asked_again():
    every = len(FORMS) * len(SUBJECTS)
    asked = make_questions(every + 5, seed=1)
    assert len(set(asked)) == every
    assert asked[every:] == asked[:5]
    assert make_questions(50, seed=2) != asked[:50] == make_questions(50, seed=1)


def test_a_corpus_has_the_hidden_states_of_its_text(target, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PART", 4)
    llm = LLM(target, **SETTINGS, enable_prefix_caching=False, max_num_batched_tokens=64)
    assert list(write_corpus(llm, tmp_path, 6, 10, 0.8, seed=3)) == [4, 2]
    texts, body = load_corpus(tmp_path), AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).model
    tokenizer = llm.get_tokenizer()
    assert len(texts) == 6
    for text, question in zip(texts, make_questions(6, seed=3), strict=True):
        assert question in tokenizer.decode(text.tokens[: text.prompt_len])
        assert 0 < len(text.tokens) - text.prompt_len <= 10
        with torch.no_grad():
            expected = body(text.tokens[None, :-1]).last_hidden_state[0]
        torch.testing.assert_close(text.features.float(), expected, rtol=0.01, atol=0.01)
    # what is there is not written again, what is missing is, and comes out the same
    (tmp_path / "part-0001.safetensors").unlink()
    (tmp_path / "part-0000.safetensors").touch()
    before = (tmp_path / "part-0000.safetensors").stat().st_mtime_ns
    assert list(write_corpus(llm, tmp_path, 6, 10, 0.8, seed=3)) == [4, 2]
    assert (tmp_path / "part-0000.safetensors").stat().st_mtime_ns == before
    assert [text.tokens.tolist() for text in load_corpus(tmp_path)] == [text.tokens.tolist() for text in texts]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_unrolled_head_says_at_each_depth_what_a_draft_says(target, model, tmp_path, depth):
    """At every position of a text and every depth: the oracle is transformers' layer, which drafts one token after the other,
    but reads the text's own tokens as if they had been drafted."""
    head, oracle = make_random_head(tmp_path, target), Oracle(target, tmp_path)
    (text,) = texts_of(target, PROMPTS[1:2], max_tokens=6)
    body = model.model
    embedded = body.embed_tokens(text.tokens[1:])[None]
    rope = body.rotary_emb(torch.arange(embedded.shape[1]))
    outputs = UnrolledHead(head, model.config, rope)(embedded, text.features[None], depth)
    assert len(outputs) == depth
    ids = text.tokens.tolist()
    for end in range(2, len(ids) - depth):
        said = oracle.outputs(ids[: end + 1], ids[end + 1 : end + depth])
        for place, expected in enumerate(said):
            torch.testing.assert_close(outputs[place][0, end - 1 + place], expected, rtol=1e-3, atol=1e-3)


def test_what_counts_are_the_tokens_that_the_model_wrote():
    one, other = (Text(torch.arange(n), torch.zeros(n - 1, 4), prompt) for n, prompt in ((7, 4), (5, 2)))
    batch = make_batch([one, other])
    assert batch.ids.shape == (2, 7)
    # position p foretells token p + 2
    assert batch.counts.tolist() == [[False, False, True, True, True], [True, True, True, False, False]]


@pytest.mark.parametrize(
    ("rows", "dtype", "off"), [(1, torch.float32, 1e-5), (7, torch.float32, 1e-5), (7, torch.bfloat16, 0.02)]
)
def test_the_loss_of_tokens_is_cross_entropy(rows, dtype, off):
    generator = torch.Generator().manual_seed(rows)
    logits = (4 * torch.randn(rows, 33, generator=generator)).to(dtype).requires_grad_()
    wanted = (3 * torch.randn(rows, 33, generator=generator)).softmax(dim=-1).to(dtype)
    exact = logits.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(3 * F.cross_entropy(exact, wanted.double()), exact)
    loss = SoftCrossEntropy.apply(logits, wanted)
    (mine,) = torch.autograd.grad(3 * loss, logits)
    assert loss.item() == pytest.approx(F.cross_entropy(exact, wanted.double()).item(), rel=off)
    assert (mine.double() - slope).abs().max() < off * slope.abs().max()


def test_frequent_tokens():
    texts = [Text(torch.tensor([9, 9, 9, 5, 5, 7, 5, 7, 6]), torch.zeros(8, 4), 3)]
    assert frequent_tokens(texts, 2).tolist() == [5, 7]
    assert frequent_tokens(texts, 5).tolist() == [0, 1, 5, 6, 7]


def learner(model, texts, checkpoint: Path, **plan) -> Learner:
    torch.manual_seed(0)
    return Learner(model, new_head(model, frequent_tokens(texts, 64)), texts, Plan(**plan), checkpoint)


def test_an_interrupted_training_comes_to_the_same_head(target, model, tmp_path):
    texts = texts_of(target)
    settings = {"epochs": 2, "batch": 2, "depth": 2, "checkpoint_every": 2}
    whole = learner(model, texts, tmp_path / "whole.pt", **settings)
    losses = list(whole.train())
    assert len(losses) == whole.num_steps == 6
    first = learner(model, texts, tmp_path / "cut.pt", **settings)
    run = first.train()
    assert [next(run) for _ in range(5)] == losses[:5]  # the fifth step is not in the checkpoint
    again = learner(model, texts, tmp_path / "cut.pt", **settings)
    assert again.num_done == 4
    assert list(again.train()) == losses[4:]
    for name, tensor in whole.finish().state_dict().items():
        assert torch.equal(tensor, again.head.state_dict()[name]) or name == "fc.weight"
    assert torch.equal(whole.head.fc.weight, again.finish().fc.weight)


@pytest.fixture(scope="module")
def trained(target, model, tmp_path_factory) -> Path:
    """A head that has learned a few greedy texts of the tiny model by heart."""
    folder = tmp_path_factory.mktemp("trained")
    texts = texts_of(target)
    by_heart = learner(model, [texts[0], *texts], folder / "checkpoint.pt", epochs=40, batch=3, depth=3, rate=3e-3)
    list(by_heart.train())
    save_head(folder, by_heart.finish(), model.config, model.model.embed_tokens.weight)
    return folder


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_trained_head_drafts_what_comes(target, trained, quantization):
    if quantization is not None and native.load() is None:
        pytest.skip("no C++ kernels")
    params = dataclasses.replace(GREEDY, max_tokens=30)
    plain = LLM(target, **SETTINGS).generate(PROMPTS, params, use_tqdm=False)
    llm = LLM(target, **SETTINGS, speculative_config=eagle(trained, quantization=quantization))
    assert tokens(llm.generate(PROMPTS, params, use_tqdm=False)) == tokens(plain)
    stats = llm.llm_engine.stats()
    assert stats.spec_decode_num_accepted_tokens > 0.3 * stats.spec_decode_num_draft_tokens
    if quantization is not None:  # but for the matrix that joins small embeddings and large features
        head = llm.llm_engine.drafter.proposer.drafts.passes.head
        assert (packed_of(head.fc).scales is None, packed_of(head.lm_head).scales is None) == (True, False)


def test_the_command_trains_a_head_that_the_engine_takes(target, tmp_path, capsys):
    train.main(["--output", str(tmp_path / "head"), "--model", target, *FLAGS])
    assert "a head trained on" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "head").iterdir()} == {"config.json", "model.safetensors"}
    llm = LLM(target, **SETTINGS, speculative_config=eagle(tmp_path / "head"))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    assert tokens(llm.generate(PROMPTS[:1], params, use_tqdm=False)) == tokens(
        LLM(target, **SETTINGS).generate(PROMPTS[:1], params, use_tqdm=False)
    )


def test_an_interrupted_command_goes_on_with_the_same_flags_only(target, tmp_path, monkeypatch, capsys):
    folder, flags = tmp_path / "head", ["--output", str(tmp_path / "head"), "--model", target, *FLAGS]

    def interrupted(self):
        yield 1.0
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "train", interrupted)
        with pytest.raises(SystemExit, match="the same command goes on from here"):
            train.main(flags)
    parts = sorted((folder / train.WORK).glob("part-*"))
    assert parts
    with pytest.raises(SystemExit, match="an interrupted run with --epochs 2; give the same flags"):
        train.main([*flags, "--epochs", "3"])
    times = [part.stat().st_mtime_ns for part in parts]
    with monkeypatch.context() as patch:  # the text is there
        patch.setattr(corpus, "save_part", lambda *_: pytest.fail("a part is written again"))
        train.main(flags)
    assert times
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "--epochs is too small: 0"),
        (["--model", "no-such-model"], "there is no model"),
    ],
)
def test_wrong_flags_are_one_clear_error(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(["--output", str(tmp_path / "head"), *flags])
    assert message in f"{error.value}{capsys.readouterr().err}"
    assert not (tmp_path / "head").exists()


def test_other_families_are_refused(tmp_path):
    make_tiny_mistral(tmp_path / "model")
    with pytest.raises(SystemExit, match=r"heads are for models of the LLaMA family, and .* is a MistralForCausalLM"):
        train.main(["--output", str(tmp_path / "head"), "--model", str(tmp_path / "model")])
    assert not (tmp_path / "head").exists()


def test_a_part_is_whole_or_not_there(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_part([Text(torch.arange(4), torch.zeros(3, 8), 2)], tmp_path / "part-0000.safetensors")
    assert load_corpus(tmp_path) == []
