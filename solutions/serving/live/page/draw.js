// The pictures: the block map, the steps, the curves. Each is a function of the model and a canvas.

import { colour } from "./model.js";

const GAP = 1;
const COLUMN = 8; // pixels of a step
let hatch = null;

/** A canvas's context, sized for the screen's pixels, and its size in CSS pixels. */
function prepared(canvas, height = canvas.clientHeight) {
  const width = canvas.clientWidth;
  const ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

const named = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Columns and size of cells so that all blocks fit into about 220 pixels of height. */
export function grid(width, count) {
  let size = 14;
  while (size > 3 && Math.ceil(count / Math.floor(width / size)) * size > 220) size -= 1;
  const columns = Math.max(1, Math.floor(width / size));
  return { size, columns, rows: Math.ceil(count / columns) };
}

/** One cell a block: free, cached, owned in its sequence's colour, framed when shared or just copied. */
export function drawBlocks(model, canvas) {
  const count = model.sizes?.num_blocks ?? 0;
  const { size, columns, rows } = grid(canvas.clientWidth, count);
  canvas.style.height = `${Math.max(1, rows) * size}px`;
  const { context } = prepared(canvas, Math.max(1, rows) * size);
  const [free, cached, ink] = [named("--free"), named("--cached"), named("--ink")];
  for (let block = 0; block < count; block += 1) {
    const [x, y] = [(block % columns) * size, Math.floor(block / columns) * size];
    const state = model.blocks.get(block);
    const owners = state?.owners ?? [];
    const shown = owners.includes(model.marked) ? model.marked : owners[0];
    context.globalAlpha = model.marked === null || owners.includes(model.marked) ? 1 : 0.3;
    context.fillStyle = owners.length ? colour(shown) : state?.cached ? cached : free;
    context.fillRect(x, y, size - GAP, size - GAP);
    if ((owners.length > 1 || model.copied.has(block)) && size > 4) {
      context.strokeStyle = ink;
      context.setLineDash(model.copied.has(block) ? [2, 1] : []);
      context.strokeRect(x + 0.75, y + 0.75, size - GAP - 1.5, size - GAP - 1.5);
    }
  }
  context.globalAlpha = 1;
  context.setLineDash([]);
}

/** Blocks in host memory: one cell each, in the colour of the sequence that was swapped out. */
export function drawSwapped(model, canvas) {
  const count = model.sizes?.num_host_blocks ?? 0;
  const { size, columns, rows } = grid(canvas.clientWidth, count);
  canvas.style.height = `${rows * size}px`;
  const { context } = prepared(canvas, rows * size);
  const free = named("--free");
  for (let block = 0; block < count; block += 1) {
    const owner = model.swapped.get(block);
    context.fillStyle = owner === undefined ? free : colour(owner);
    context.fillRect((block % columns) * size, Math.floor(block / columns) * size, size - GAP, size - GAP);
  }
}

/** Hatching over what was decoded, so that prompts and answers differ in black and white too. */
function hatching(context) {
  if (hatch) return hatch;
  const tile = document.createElement("canvas");
  tile.width = tile.height = 4;
  const pen = tile.getContext("2d");
  pen.strokeStyle = "rgb(255 255 255 / .55)";
  pen.beginPath();
  pen.moveTo(0, 4);
  pen.lineTo(4, 0);
  pen.stroke();
  hatch = context.createPattern(tile, "repeat");
  return hatch;
}

/**
 * A step's column, stacked by sequence, as a picture that is kept as long as it would look the same. Its height is the square
 * root of its tokens, or a step that only decodes would not be seen beside one that computes a prompt.
 */
function column(step, tokens, highest, room, marked) {
  const key = `${highest} ${room} ${marked} ${window.devicePixelRatio}`;
  if (step.picture?.key === key) return step.picture;
  const height = Math.max(1, room * Math.sqrt(tokens / highest));
  const canvas = document.createElement("canvas");
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.ceil(COLUMN * ratio);
  canvas.height = Math.ceil(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  let y = height;
  for (const row of step.rows) {
    const part = (height * row.tokens) / tokens;
    const where = [0, y - part, COLUMN - GAP, Math.max(part, 0.5)];
    context.globalAlpha = marked === null || marked === row.id ? 1 : 0.25;
    context.fillStyle = colour(row.id);
    context.fillRect(...where);
    if (row.decodes) {
      context.fillStyle = hatching(context);
      context.fillRect(...where);
    }
    if (row.drafted) {
      context.fillStyle = "rgb(255 255 255 / .6)";
      context.fillRect(0, y - part, COLUMN - GAP, (part * row.drafted) / row.tokens);
    }
    y -= part;
  }
  step.picture = { key, canvas, height };
  return step.picture;
}

/** A column a step; the token budget as a line; a mark above steps that preempted. */
export function drawTimeline(model, canvas) {
  const { context, width, height } = prepared(canvas);
  const steps = model.steps.slice(-Math.floor(width / COLUMN));
  const totals = steps.map((step) => step.rows.reduce((sum, row) => sum + row.tokens, 0));
  const highest = Math.max(8, ...totals);
  const room = height - 18;
  const warn = named("--warn");
  steps.forEach((step, index) => {
    const picture = column(step, totals[index], highest, room, model.marked);
    context.drawImage(picture.canvas, index * COLUMN, height - picture.height, COLUMN, picture.height);
    if (step.preempted.length) {
      context.fillStyle = warn;
      context.fillRect(index * COLUMN, 0, COLUMN - GAP, 4);
    }
  });
  const budget = model.sizes?.max_num_batched_tokens;
  context.fillStyle = context.strokeStyle = named("--quiet");
  context.font = "12px system-ui, sans-serif";
  if (budget && budget <= highest * 1.1) {
    const y = height - room * Math.sqrt(budget / highest);
    context.setLineDash([4, 3]);
    context.beginPath();
    context.moveTo(0, y);
    context.lineTo(width, y);
    context.stroke();
    context.setLineDash([]);
  }
  if (budget) context.fillText(`highest ${highest} tokens, budget ${budget}, heights as square roots`, 4, 12);
}

/** A line over the values, from 0 to the highest. */
export function drawCurve(canvas, values) {
  const { context, width, height } = prepared(canvas);
  const top = Math.max(...values, 1e-9);
  context.strokeStyle = named("--accent");
  context.lineWidth = 1.5;
  context.beginPath();
  values.forEach((value, index) => {
    const [x, y] = [(index / Math.max(1, values.length - 1)) * width, height - 3 - (value / top) * (height - 6)];
    if (index) context.lineTo(x, y);
    else context.moveTo(x, y);
  });
  context.stroke();
}
