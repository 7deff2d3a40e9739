// The pipeline's Gantt chart: ranks down, time across; a bar for each action, a hatched row where a rank idles.
//
// Spans come in columns, sorted by rank, lane and start. Only what is in view is drawn, and spans narrower than a pixel
// are drawn once a pixel, so that hundreds of thousands stay fluid.

import { KINDS, shade, variable } from "./colors.js";
import * as format from "./format.js";
import { GUTTER, prepare, steer, ticks, tickText } from "./viewport.js";

const AXIS = 24;
const COMPUTE = 0;

export class Gantt {
  /**
   * @param {HTMLCanvasElement} canvas @param {any} timeline @param {import("./viewport.js").Viewport} viewport
   * @param {{show: (event: PointerEvent, text: string[]) => void, hide: () => void, rank: (rank: number | null) => void}} handlers
   */
  constructor(canvas, timeline, viewport, handlers) {
    this.canvas = canvas;
    this.timeline = timeline;
    this.viewport = viewport;
    this.handlers = handlers;
    this.rows = index(timeline);
    this.critical = new Set(timeline.critical_path);
    this.showCritical = false;
    this.hovered = -1;
    this.numDrawn = 0;
    this.pending = 0;
    const ranks = timeline.num_ranks;
    this.rowHeight = Math.max(7, Math.min(38, Math.floor(460 / ranks)));
    this.height = AXIS + ranks * this.rowHeight + 2;
    viewport.listeners.add(() => this.drawSoon());
    steer(canvas, viewport, { hover: (event) => this.hover(event), leave: () => this.leave() });
    new ResizeObserver(() => this.drawSoon()).observe(canvas);
    this.draw();
  }

  drawSoon() {
    cancelAnimationFrame(this.pending);
    this.pending = requestAnimationFrame(() => this.draw());
  }

  draw() {
    const { context, width } = prepare(this.canvas, this.height);
    const plot = width - GUTTER;
    this.palette = palette(this.timeline.kinds);
    this.numDrawn = 0;
    this.drawAxis(context, plot);
    for (const rank of this.rows.keys()) this.drawRank(context, rank, plot);
    if (this.showCritical) this.drawCritical(context, plot);
    this.drawHovered(context, plot);
  }

  /** @param {CanvasRenderingContext2D} context @param {number} plot */
  drawAxis(context, plot) {
    context.font = `11px ${variable("--sans")}`;
    context.textBaseline = "middle";
    const { times, step } = ticks(this.viewport, plot / 90);
    for (const time of times) {
      const x = Math.round(GUTTER + this.viewport.x(time, plot)) + 0.5;
      context.strokeStyle = variable("--grid");
      context.beginPath();
      context.moveTo(x, AXIS - 5);
      context.lineTo(x, this.height);
      context.stroke();
      context.fillStyle = variable("--ink-3");
      context.textAlign = x > GUTTER + plot - 30 ? "right" : x < GUTTER + 20 ? "left" : "center";
      context.fillText(tickText(time, step), x, 9);
    }
  }

  /** @param {CanvasRenderingContext2D} context @param {number} rank @param {number} plot */
  drawRank(context, rank, plot) {
    const top = AXIS + rank * this.rowHeight;
    const inner = this.rowHeight > 12 ? this.rowHeight - 4 : this.rowHeight - 1;
    if (this.rowHeight >= 9 || rank % 4 === 0) {
      context.fillStyle = variable("--ink-2");
      context.textAlign = "right";
      context.font = `${this.rowHeight >= 14 ? 12 : 9}px ${variable("--sans")}`;
      context.fillText(this.rowHeight >= 16 ? `rank ${rank}` : String(rank), GUTTER - 9, top + inner / 2);
    }
    context.save();
    context.beginPath();
    context.rect(GUTTER, top, plot, this.rowHeight);
    context.clip();
    context.fillStyle = variable("--row");
    context.fillRect(GUTTER, top, plot, inner);
    context.fillStyle = hatch(context);
    context.fillRect(GUTTER, top, plot, inner);
    const lanes = this.rows[rank];
    const strip = lanes.size > 1 && this.rowHeight >= 14 ? Math.max(3, Math.round(inner * 0.2)) : 0;
    for (const [lane, [begin, end]] of lanes) {
      if (lane === COMPUTE) this.drawSpans(context, begin, end, top, inner - strip, plot);
      else if (strip || lane !== 1) this.drawSpans(context, begin, end, top + inner - Math.max(strip, 2), Math.max(strip, 2), plot);
    }
    context.restore();
  }

  /** @param {CanvasRenderingContext2D} context */
  drawSpans(context, /** @type {number} */ begin, /** @type {number} */ end, /** @type {number} */ top, /** @type {number} */ height, /** @type {number} */ plot) {
    const { start_s, end_s, kind, microbatch, stage } = this.timeline;
    const { from_s, to_s } = this.viewport;
    const scale = plot / (to_s - from_s);
    const chunks = Math.max(1, this.timeline.num_ranks);
    context.font = `${Math.min(11.5, height - 3)}px ${variable("--sans")}`;
    context.textAlign = "center";
    let painted = -1;
    for (let at = firstAfter(end_s, begin, end, from_s); at < end && start_s[at] < to_s; at++) {
      const left = GUTTER + (start_s[at] - from_s) * scale;
      const right = GUTTER + (end_s[at] - from_s) * scale;
      if (right - left < 0.6) {
        const column = Math.floor(left);
        if (column === painted) continue;
        painted = column;
      }
      const tones = /** @type {string[][]} */ (this.palette)[kind[at]];
      const tone = tones[Math.floor(stage[at] / chunks) % tones.length];
      context.fillStyle = tone[microbatch[at] & 1];
      const x = Math.max(left, GUTTER - 1);
      const wide = Math.min(right, GUTTER + plot + 1) - x;
      context.fillRect(x, top, Math.max(wide - (right - left > 3 ? 0.8 : 0), 0.6), height);
      this.numDrawn++;
      if (wide > 10 && height >= 11 && microbatch[at] >= 0) {
        const number = String(microbatch[at]);
        if (wide < 4 + 6.5 * number.length) continue;
        context.fillStyle = "rgb(10 16 26 / 78%)";
        context.fillText(number, x + wide / 2, top + height / 2 + 0.5);
      }
    }
  }

  /** @param {CanvasRenderingContext2D} context @param {number} plot */
  drawCritical(context, plot) {
    context.strokeStyle = variable("--ink");
    context.lineWidth = 1.3;
    context.beginPath();
    for (const at of this.timeline.critical_path) {
      const x = GUTTER + this.viewport.x(this.timeline.start_s[at], plot);
      const right = GUTTER + this.viewport.x(this.timeline.end_s[at], plot);
      if (right < GUTTER || x > GUTTER + plot) continue;
      const y = AXIS + this.timeline.rank[at] * this.rowHeight + 1;
      const from = Math.max(x, GUTTER);
      context.rect(from, y, Math.min(right, GUTTER + plot) - from - 1, this.rowHeight - 6);
    }
    context.stroke();
    context.lineWidth = 1;
  }

  /** @param {CanvasRenderingContext2D} context @param {number} plot */
  drawHovered(context, plot) {
    if (this.hovered < 0) return;
    const { start_s, end_s, rank } = this.timeline;
    const x = GUTTER + this.viewport.x(start_s[this.hovered], plot);
    const right = GUTTER + this.viewport.x(end_s[this.hovered], plot);
    context.strokeStyle = variable("--ink");
    context.lineWidth = 1.6;
    context.strokeRect(Math.max(x, GUTTER), AXIS + rank[this.hovered] * this.rowHeight + 0.5, Math.max(right - Math.max(x, GUTTER), 1), this.rowHeight - 4);
    context.lineWidth = 1;
  }

  /** @param {PointerEvent} event */
  hover(event) {
    const rank = Math.floor((event.offsetY - AXIS) / this.rowHeight);
    const plot = this.canvas.clientWidth - GUTTER;
    if (rank < 0 || rank >= this.timeline.num_ranks || event.offsetX < GUTTER) {
      this.leave();
      return;
    }
    const time_s = this.viewport.time(event.offsetX - GUTTER, plot);
    const low = (event.offsetY - AXIS) % this.rowHeight > (this.rowHeight - 4) * 0.8;
    const found = this.find(rank, time_s, low);
    if (found !== this.hovered) {
      this.hovered = found;
      this.drawSoon();
    }
    this.handlers.rank(rank);
    this.handlers.show(event, found < 0 ? this.describeIdle(rank, time_s) : this.describe(found));
  }

  leave() {
    if (this.hovered >= 0) {
      this.hovered = -1;
      this.drawSoon();
    }
    this.handlers.rank(null);
    this.handlers.hide();
  }

  /** The span of a rank at a time, -1 for none. @param {number} rank @param {number} time_s @param {boolean} low */
  find(rank, time_s, low) {
    const lanes = [...this.rows[rank].entries()].sort(([a], [b]) => (low ? b - a : a - b));
    for (const [, [begin, end]] of lanes) {
      const at = firstAfter(this.timeline.end_s, begin, end, time_s);
      if (at < end && this.timeline.start_s[at] <= time_s) return at;
    }
    return -1;
  }

  /** @param {number} at @returns {string[]} */
  describe(at) {
    const { kinds, kind, stage, microbatch, slice, replica, start_s, end_s, rank } = this.timeline;
    const name = kinds[kind[at]];
    const action = `${replica[at] ? `${replica[at]}:` : ""}${stage[at]}${name}${microbatch[at] >= 0 ? microbatch[at] : ""}${slice[at] >= 0 ? `.${slice[at]}` : ""}`;
    const words = [`${action} – ${KINDS[name]?.[1] || name}`];
    words.push(`rank ${rank[at]}, stage ${stage[at]}${microbatch[at] >= 0 ? `, microbatch ${microbatch[at]}` : ""}`);
    words.push(`${format.seconds(end_s[at] - start_s[at])}, from ${format.seconds(start_s[at])}`);
    return words;
  }

  /** @param {number} rank @param {number} time_s @returns {string[]} */
  describeIdle(rank, time_s) {
    const [begin, end] = this.rows[rank].get(COMPUTE) || [0, 0];
    const next = firstAfter(this.timeline.end_s, begin, end, time_s);
    const until_s = next < end ? this.timeline.start_s[next] : this.timeline.makespan_s;
    const since_s = next > begin ? this.timeline.end_s[next - 1] : 0;
    return ["bubble", `rank ${rank} idles for ${format.seconds(Math.max(0, until_s - since_s))}`];
  }
}

/** Rows of each rank: lane -> [begin, end) of its spans. @param {any} timeline */
function index(timeline) {
  /** @type {Map<number, [number, number]>[]} */
  const rows = Array.from({ length: timeline.num_ranks }, () => new Map());
  for (let at = 0; at < timeline.rank.length; at++) {
    const lanes = rows[timeline.rank[at]];
    const range = lanes.get(timeline.lane[at]);
    if (range) range[1] = at + 1;
    else lanes.set(timeline.lane[at], [at, at + 1]);
  }
  return rows;
}

/** The first span in [begin, end) that ends after a time. @param {number[]} end_s */
function firstAfter(end_s, /** @type {number} */ begin, /** @type {number} */ end, /** @type {number} */ time_s) {
  let low = begin;
  let high = end;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (end_s[middle] > time_s) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** For each kind, tones by chunk, each for even and odd microbatches. @param {string[]} kinds */
function palette(kinds) {
  return kinds.map((name) => {
    const base = variable(KINDS[name]?.[0] || "--other");
    return [0, 0.22, -0.16, 0.4].map((amount) => [shade(base, amount), shade(base, amount + 0.13)]);
  });
}

/** @param {CanvasRenderingContext2D} context */
function hatch(context) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 7;
  const paint = /** @type {CanvasRenderingContext2D} */ (tile.getContext("2d"));
  paint.strokeStyle = variable("--hatch");
  paint.lineWidth = 1;
  paint.beginPath();
  for (const shift of [-7, 0, 7]) {
    paint.moveTo(shift, 7);
    paint.lineTo(shift + 7, 0);
  }
  paint.stroke();
  return /** @type {CanvasPattern} */ (context.createPattern(tile, "repeat"));
}
