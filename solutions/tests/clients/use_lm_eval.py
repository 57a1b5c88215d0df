"""lm-eval's models local-completions and local-chat-completions, with the server's tokenizer."""

import shared
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

model = LocalCompletionsAPI(base_url=f"{shared.URL}/completions", model=shared.MODEL, max_length=4096, max_retries=1)
chats = LocalChatCompletion(base_url=f"{shared.URL}/chat/completions", model=shared.MODEL, max_retries=1)
until = {"until": ["\n"], "max_gen_toks": shared.LIMIT}


@shared.feature("chat")
def chat() -> None:
    prompt = chats.apply_chat_template(shared.MESSAGES)
    (text,) = chats.generate_until([Instance("generate_until", {}, (prompt, until), 0)], disable_tqdm=True)
    shared.same(text)


@shared.feature("completions")
def completions() -> None:
    (text,) = model.generate_until([Instance("generate_until", {}, (shared.BEGINNING, until), 0)], disable_tqdm=True)
    right = shared.post("completions", prompt=shared.BEGINNING, max_tokens=shared.LIMIT, stop=["\n"])["choices"][0]["text"]
    assert text == right, text


@shared.feature("log-probabilities")
def log_probabilities() -> None:
    requests = [Instance("loglikelihood", {}, (shared.BEGINNING, end), 0) for end in (" Paris", " Rome")]
    (paris, greedy), (rome, no) = model.loglikelihood(requests, disable_tqdm=True)
    scored = shared.post("completions", prompt=shared.BEGINNING, max_tokens=1, logprobs=1)["choices"][0]
    assert scored["text"] == " Paris"
    assert abs(paris - scored["logprobs"]["token_logprobs"][0]) < 0.05, (paris, scored)
    assert (greedy, no) == (True, False)
    assert rome < paris < 0


shared.run()
