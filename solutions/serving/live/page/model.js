// What the page knows of the engine: frames of /live, or of a recorded trace, added up. No drawing here.

const MAX_STEPS = 120;
const MAX_POINTS = 300;

export class Model extends EventTarget {
  constructor() {
    super();
    this.marked = null; // the sequence under the pointer
    this.latencies = { ttft: 0, itl: 0 }; // milliseconds, from /metrics
    this.experts = []; // tokens that each was chosen for, from /metrics
    this.clear();
  }

  clear() {
    this.sizes = null;
    this.sequences = new Map(); // id → {id, request, status, prompt, tokens, computed, cached, preemptions}
    this.blocks = new Map(); // block → {owners: [id], cached}
    this.swapped = new Map(); // host block → sequence
    this.copied = new Map(); // block → number of the frame that made it a copy
    this.steps = []; // {number, seconds, rows: [{id, tokens, drafted, decodes}], preempted: [id]}
    this.points = []; // {seconds, stats, ttft, itl} at each frame
    this.stats = null;
    this.frames = 0;
  }

  /** Take in a frame, see `Snapshots` in snapshot.py. */
  apply(frame) {
    this.frames += 1;
    if (frame.full) {
      this.sizes = frame.engine;
      this.blocks.clear();
    }
    for (const [block, owners, cached] of frame.blocks) {
      if (owners.length || cached) this.blocks.set(block, { owners, cached });
      else this.blocks.delete(block);
    }
    this.swapped = new Map(frame.swapped.flatMap(([id, blocks]) => blocks.map((block) => [block, id])));
    for (const block of frame.copied) this.copied.set(block, this.frames);
    for (const [block, born] of this.copied) if (this.frames - born > 10) this.copied.delete(block);
    this.sequences = new Map(frame.sequences.map(([id, request, status, prompt, tokens, computed, cached, preemptions]) =>
      [id, { id, request, status, prompt, tokens, computed, cached, preemptions }]));
    for (const [number, seconds, rows, preempted] of frame.steps) {
      this.steps.push({ number, seconds, preempted, rows: rows.map(([id, tokens, drafted, decodes]) => ({ id, tokens, drafted, decodes })) });
    }
    this.steps.splice(0, this.steps.length - MAX_STEPS);
    this.stats = frame.stats;
    const last = frame.steps.at(-1);
    if (last) {
      this.points.push({ seconds: last[1], stats: frame.stats, ...this.latencies });
      this.points.splice(0, this.points.length - MAX_POINTS);
    }
    this.dispatchEvent(new Event("change"));
  }

  /** Mark a sequence everywhere, or none. */
  mark(id) {
    if (id === this.marked) return;
    this.marked = id;
    this.dispatchEvent(new Event("change"));
  }

  /** Ids of those who hold a block together with a sequence. */
  sharers(id) {
    const found = new Set();
    for (const { owners } of this.blocks.values()) if (owners.includes(id)) owners.forEach((owner) => found.add(owner));
    found.delete(id);
    return found;
  }

  /** Output tokens a second over the last points. */
  rate(count = 10) {
    const recent = this.points.slice(-count - 1);
    if (recent.length < 2) return 0;
    const [first, last] = [recent[0], recent.at(-1)];
    return (last.stats.num_generation_tokens - first.stats.num_generation_tokens) / (last.seconds - first.seconds || 1);
  }
}

const COLOURS = Array.from({ length: 360 }, (_, degree) => `hsl(${degree} 62% 48%)`);

/** A sequence's colour: neighbours in number are far apart on the colour circle. */
export const colour = (id) => COLOURS[Math.floor((id * 137.508) % 360)];
