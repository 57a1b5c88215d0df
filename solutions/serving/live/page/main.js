// Joins the parts: the feed fills the model, and every change is drawn at the screen's next frame.

import { load, newChat } from "./chat.js";
import { drawBlocks, drawCurve, drawSwapped, drawTimeline, grid } from "./draw.js";
import { api, follow, key, replay, replayFrom } from "./feed.js";
import { Model, colour } from "./model.js";

const MAX_ROWS = 48;
const MAX_CLIENTS = 8;
const METRICS_EVERY = 2000;
const byId = (id) => document.getElementById(id);
const model = new Model();
const curves = new Map(); // name → {canvas, caption, values}
let source = new AbortController();
let pending = false;

function say(text, needsKey = false) {
  byId("connection").textContent = text;
  byId("key-form").hidden = !needsKey;
}

/** Milliseconds between two readings of a histogram's sum and count in Prometheus' text; null without new entries. */
function meanOf(text, name, before) {
  const read = (suffix) => Number(text.match(new RegExp(`^${name}_${suffix}\\{.*\\} (\\S+)`, "m"))?.[1] ?? 0);
  const now = { sum: read("sum"), count: read("count") };
  const mean = before && now.count > before.count ? (1000 * (now.sum - before.sum)) / (now.count - before.count) : null;
  return [now, mean];
}

/** How often the expert that is chosen most is chosen, of the mean. */
function busiest(loads) {
  const total = loads.reduce((sum, load) => sum + load, 0);
  return total ? (Math.max(...loads) * loads.length) / total : 1;
}

async function readMetrics() {
  const before = {};
  for (;;) {
    try {
      const response = await fetch(api("metrics"), { headers: key.headers() });
      const text = response.ok ? await response.text() : "";
      model.experts = [...text.matchAll(/^byov:expert_tokens_total\{.*\} (\S+)/gm)].map((sample) => Number(sample[1]));
      for (const [kind, name] of [["ttft", "vllm:time_to_first_token_seconds"], ["itl", "vllm:inter_token_latency_seconds"]]) {
        const [now, mean] = meanOf(text, name, before[kind]);
        before[kind] = now;
        if (mean !== null) model.latencies[kind] = mean;
      }
    } catch { /* the feed says that the server is away */ }
    await new Promise((resume) => setTimeout(resume, METRICS_EVERY));
  }
}

function numbers() {
  const { stats, sizes } = model;
  if (!stats || !sizes) return [];
  const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "none yet");
  return [
    ["running", `${stats.num_running} of ${sizes.max_num_seqs}`],
    ["waiting", stats.num_waiting],
    ["tokens generated", stats.num_generation_tokens],
    ["tokens a second", model.rate().toFixed(0)],
    ["KV blocks in use", share(stats.kv_cache_usage, 1)],
    ["prompt tokens cached", share(stats.prefix_cache_hits, stats.prefix_cache_queries)],
    ...(stats.kv_offload
      ? [
          ["prompt tokens from the tier", share(stats.kv_offload.num_hits, stats.prefix_cache_queries)],
          ["the tier's bytes in use", share(stats.kv_offload.num_bytes, stats.kv_offload.limit)],
        ]
      : []),
    ["preemptions", stats.num_preemptions],
    ["drafts accepted", share(stats.spec_decode_num_accepted_tokens, stats.spec_decode_num_draft_tokens)],
    ...(stats.spec_decode_num_draft_tokens
      ? [
          ["tokens that a draft brings", (stats.spec_decode_num_accepted_tokens / stats.spec_decode_num_drafts).toFixed(2)],
          ["tokens drafted now", (stats.spec_decode_mean_length ?? 0).toFixed(1)],
        ]
      : []),
    ...(stats.num_steps_ahead ? [["steps begun ahead", share(stats.num_steps_ahead, stats.num_steps)]] : []),
    ["time to first token", `${model.latencies.ttft.toFixed(0)} ms`],
    ["time per token", `${model.latencies.itl.toFixed(0)} ms`],
    ...Object.entries(stats.served ?? {}).slice(0, MAX_CLIENTS).map(([client, tokens]) => [`served to ${client || "nobody"}`, tokens]),
    ...(model.experts.length ? [["busiest expert's tokens", `${busiest(model.experts).toFixed(2)} × the mean`]] : []),
  ];
}

function showNumbers() {
  const list = byId("numbers");
  const entries = numbers();
  while (list.childElementCount > entries.length) list.lastElementChild.remove();
  while (list.childElementCount < entries.length) {
    const entry = document.createElement("div");
    entry.append(document.createElement("dt"), document.createElement("dd"));
    list.append(entry);
  }
  entries.forEach(([name, value], index) => {
    const [term, definition] = list.children[index].children;
    term.textContent = name;
    definition.textContent = value;
    definition.id = `number-${name.replaceAll(" ", "-")}`;
  });
}

function describe(sequence) {
  const written = Math.max(0, sequence.tokens - sequence.prompt);
  const phase = sequence.computed < sequence.prompt ? `prompt ${sequence.computed} of ${sequence.prompt}` : `${written} written`;
  const cached = sequence.cached ? `, ${sequence.cached} cached` : "";
  const again = sequence.preemptions ? `, preempted ${sequence.preemptions}×` : "";
  return `${sequence.id} ${sequence.status}: ${phase}${cached}${again}`;
}

function showQueue() {
  const list = byId("queue");
  const shown = [...model.sequences.values()].slice(0, MAX_ROWS);
  while (list.childElementCount > shown.length) list.lastElementChild.remove();
  while (list.childElementCount < shown.length) {
    const row = document.createElement("li");
    const text = document.createElement("div");
    text.append(document.createElement("small"), document.createElement("progress"));
    row.append(document.createElement("i"), text);
    row.tabIndex = 0;
    for (const event of ["pointerenter", "focus"]) row.addEventListener(event, () => model.mark(Number(row.dataset.id)));
    for (const event of ["pointerleave", "blur"]) row.addEventListener(event, () => model.mark(null));
    list.append(row);
  }
  const sharers = model.marked === null ? new Set() : model.sharers(model.marked);
  shown.forEach((sequence, index) => {
    const row = list.children[index];
    row.dataset.id = sequence.id;
    row.dataset.status = sequence.status;
    row.classList.toggle("marked", sequence.id === model.marked || sharers.has(sequence.id));
    row.firstElementChild.style.background = sequence.status === "running" ? colour(sequence.id) : "transparent";
    const [text, bar] = row.lastElementChild.children;
    text.textContent = describe(sequence);
    text.title = sequence.request;
    bar.setAttribute("aria-label", `tokens of ${sequence.id} in the cache`);
    bar.max = sequence.tokens;
    bar.value = sequence.computed;
  });
}

/** The curves' captions; what it returns draws them. */
function describeCurves() {
  const { points } = model;
  const step = (at, of) => points.slice(1).map((point, index) => at(point, points[index]) / (of?.(point, points[index]) || 1));
  const series = {
    "tokens a second": step((now, before) => now.stats.num_generation_tokens - before.stats.num_generation_tokens, (now, before) => now.seconds - before.seconds),
    "time to first token, ms": points.map((point) => point.ttft),
    "time per token, ms": points.map((point) => point.itl),
    "KV use, %": points.map((point) => 100 * point.stats.kv_cache_usage),
    "running": points.map((point) => point.stats.num_running),
    "waiting": points.map((point) => point.stats.num_waiting),
    "prompt tokens cached, %": points.map(({ stats }) => (100 * stats.prefix_cache_hits) / (stats.prefix_cache_queries || 1)),
    "drafts accepted, %": points.map(({ stats }) => (100 * stats.spec_decode_num_accepted_tokens) / (stats.spec_decode_num_draft_tokens || 1)),
  };
  for (const [name, values] of Object.entries(series)) {
    if (!curves.has(name)) {
      const figure = document.createElement("figure");
      const canvas = document.createElement("canvas");
      const caption = document.createElement("figcaption");
      canvas.setAttribute("role", "img");
      figure.append(canvas, caption);
      byId("curves").append(figure);
      curves.set(name, { canvas, caption });
    }
    const { canvas, caption } = curves.get(name);
    caption.textContent = `${name}: ${(values.at(-1) ?? 0).toFixed(0)}`;
    canvas.setAttribute("aria-label", `${caption.textContent}, highest ${Math.max(0, ...values).toFixed(0)}`);
  }
  return () => Object.entries(series).forEach(([name, values]) => drawCurve(curves.get(name).canvas, values));
}

function describeBlocks() {
  const states = [...model.blocks.values()];
  const owned = states.filter(({ owners }) => owners.length).length;
  const shared = states.filter(({ owners }) => owners.length > 1).length;
  const count = model.sizes?.num_blocks ?? 0;
  if (model.marked === null) {
    byId("blocks-said").textContent = `${count} blocks of ${model.sizes?.block_size ?? 0} tokens: ${owned} owned, ${shared} of them shared; ${states.length - owned} cached and free to take; ${count - states.length} empty`;
  }
  byId("blocks").dataset.owned = owned;
  byId("blocks").dataset.shared = shared;
}

function describeSwapped() {
  byId("host").hidden = !model.sizes?.num_host_blocks;
  byId("host-said").textContent = `${model.swapped.size} blocks of ${new Set(model.swapped.values()).size} requests were moved here and come back`;
}

/** First all words, then all pictures: a picture asks for its size, and each word behind that would lay the page out again. */
function draw() {
  pending = false;
  showNumbers();
  describeBlocks();
  describeSwapped();
  showQueue();
  byId("timeline-said").textContent = model.steps.length ? `${model.steps.length} steps, the last is number ${model.steps.at(-1).number}` : "no steps yet";
  const drawCurves = describeCurves();
  drawBlocks(model, byId("blocks"));
  drawSwapped(model, byId("swapped"));
  drawTimeline(model, byId("timeline"));
  drawCurves();
}

function changed() {
  if (!pending) requestAnimationFrame(draw);
  pending = true;
}

/** The block under the pointer, in words; its first owner is marked everywhere. */
function pointAtBlock(event) {
  const { size, columns } = grid(event.target.clientWidth, model.sizes?.num_blocks ?? 0);
  const block = Math.floor(event.offsetY / size) * columns + Math.floor(event.offsetX / size);
  const state = model.blocks.get(block);
  const owners = state?.owners ?? [];
  model.mark(owners[0] ?? null);
  const held = owners.length ? `held by ${owners.slice(0, 8).join(", ")}${owners.length > 8 ? " and others" : ""}` : "free";
  byId("blocks-said").textContent = `block ${block}: ${held}${state?.cached ? ", its content is cached" : ""}`;
}

async function setStepControl(change) {
  const response = await fetch(api("live/control"), {
    method: "POST", headers: { "Content-Type": "application/json", ...key.headers() }, body: JSON.stringify(change),
  });
  if (!response.ok) return say((await response.json()).error.message);
  const control = await response.json();
  byId("pause").setAttribute("aria-pressed", control.paused);
  byId("pause").textContent = control.paused ? "Go on" : "Pause";
  byId("delay-shown").textContent = control.delay ? `${Math.round(1000 * control.delay)} ms a step` : "off";
}

function start(run) {
  source.abort();
  source = new AbortController();
  run(source.signal);
}

function main() {
  byId("legend").innerHTML = '<span class="is-free"></span>empty<span class="is-cached"></span>cached<span class="is-owned"></span>owned, a colour a request<span class="is-shared"></span>shared';
  model.addEventListener("change", changed);
  window.addEventListener("resize", changed);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  byId("new-chat").addEventListener("click", () => newChat().focus());
  byId("load").addEventListener("click", async ({ target }) => {
    target.disabled = true;
    await load().catch((error) => say(error.message));
    target.disabled = false;
  });
  byId("blocks").addEventListener("pointermove", pointAtBlock);
  byId("blocks").addEventListener("pointerleave", () => model.mark(null));
  byId("pause").addEventListener("click", ({ target }) => setStepControl({ paused: target.getAttribute("aria-pressed") !== "true" }));
  byId("step").addEventListener("click", () => setStepControl({ paused: true, steps: 1 }));
  byId("delay").addEventListener("change", ({ target }) => setStepControl({ delay: Number(target.value) / 1000 }));
  byId("trace").addEventListener("change", ({ target }) => start((signal) => replay(target.files[0], model, say, signal)));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set(byId("key").value);
    start((signal) => follow(model, say, signal));
  });
  newChat();
  draw();
  const trace = new URLSearchParams(location.search).get("trace");
  if (trace) return start((signal) => replayFrom(trace, model, say, signal));
  start((signal) => follow(model, say, signal));
  readMetrics();
}

main();
