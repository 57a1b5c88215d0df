// Chats with the model, each a conversation of its own; they run at the same time, which is what continuous batching is for.

import { api, events, key } from "./feed.js";

const PREAMBLE = "You are a patient teacher who explains how servers for language models work. Answer in two sentences. ";
const TOPICS = ["paging", "batching", "queues", "caches", "attention", "sampling", "latency", "memory"];

let model = null;

/** The name of the served model, asked once. */
async function served() {
  model ??= (await (await fetch(api("v1/models"), { headers: key.headers() })).json()).data[0].id;
  return model;
}

const field = (id) => document.getElementById(id);

/** What the sampling fields say; an empty one is left to the server. */
function sampling() {
  const fields = { temperature: "temperature", top_p: "top-p", max_tokens: "max-tokens", seed: "seed" };
  const given = Object.entries(fields).filter(([, id]) => field(id).value !== "" && field(id).checkValidity());
  return Object.fromEntries(given.map(([name, id]) => [name, Number(field(id).value)]));
}

/** Stream an answer; `piece` gets each part of its text. Throws what the server says is wrong. */
async function ask(messages, settings, piece, signal) {
  const response = await fetch(api("v1/chat/completions"), {
    method: "POST",
    headers: { "Content-Type": "application/json", ...key.headers() },
    body: JSON.stringify({ model: await served(), messages, stream: true, ...settings }),
    signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    for (const choice of chunk.choices) piece(choice.delta.content ?? "");
  }
}

/** A message on the page; returns the node that its text grows in. */
function show(list, who, text, kind = "message") {
  const node = document.createElement("div");
  node.className = kind;
  const name = document.createElement("b");
  name.textContent = who;
  const content = document.createElement("span");
  content.textContent = text;
  node.append(name, content);
  list.append(node);
  list.scrollTop = list.scrollHeight;
  return content;
}

/** Add a chat to the page. */
export function newChat() {
  const chats = field("chats");
  const chat = field("chat").content.cloneNode(true).firstElementChild;
  const [list, form, box] = [".messages", "form", "textarea"].map((selector) => chat.querySelector(selector));
  const [stop, again] = [".stop", ".again"].map((selector) => chat.querySelector(selector));
  chat.querySelector("h3").textContent = `Chat ${chats.childElementCount + 1}`;
  const messages = [];
  let controller = null;

  async function answer() {
    controller = new AbortController();
    stop.disabled = false;
    again.disabled = true;
    const reply = { role: "assistant", content: "" };
    const node = show(list, "assistant", "");
    try {
      await ask(messages, sampling(), (text) => {
        reply.content += text;
        node.textContent = reply.content;
        list.scrollTop = list.scrollHeight;
      }, controller.signal);
    } catch (error) {
      if (error.name !== "AbortError") show(list, "error", error.message, "message error");
    }
    if (reply.content) messages.push(reply);
    else node.parentElement.remove();
    controller = null;
    stop.disabled = true;
    again.disabled = messages.at(-1)?.role !== "assistant";
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (controller || !box.value.trim()) return;
    messages.push({ role: "user", content: box.value });
    show(list, "you", box.value);
    box.value = "";
    answer();
  });
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    form.requestSubmit();
  });
  stop.addEventListener("click", () => controller?.abort());
  again.addEventListener("click", () => {
    messages.pop();
    [...list.querySelectorAll(".message:not(.error)")].at(-1).remove();
    answer();
  });
  chats.append(chat);
  return box;
}

/**
 * Many requests at once that begin alike, sent as one list of prompts, because a browser opens six connections to a server
 * and no more. Resolves at the end of the last; throws what the server says is wrong.
 */
export async function load(count = 32) {
  const prompt = Array.from({ length: count }, (_, number) => {
    const topic = TOPICS[number % TOPICS.length];
    return `${PREAMBLE.repeat(4)}\nQuestion ${number + 1}: what does a beginner get wrong about ${topic}? ${"Think of all of it. ".repeat(number % 5)}\nAnswer:`;
  });
  const response = await fetch(api("v1/completions"), {
    method: "POST",
    headers: { "Content-Type": "application/json", ...key.headers() },
    body: JSON.stringify({ model: await served(), prompt, stream: true, max_tokens: 80, temperature: 0.5 }),
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const chunk of events(response)) if (chunk.error) throw new Error(chunk.error.message);
}
