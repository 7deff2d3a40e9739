// Memory over time under the Gantt chart: a step line for each rank, and the line of the device's limit.

import { rankColor, variable } from "./colors.js";
import * as format from "./format.js";
import { GUTTER, prepare, steer, ticks } from "./viewport.js";

const HEIGHT = 170;
const TOP = 12;
const BOTTOM = 10;

export class MemoryChart {
  /**
   * @param {HTMLCanvasElement} canvas @param {any} timeline @param {number[]} limits of each rank
   * @param {import("./viewport.js").Viewport} viewport
   * @param {{show: (event: PointerEvent, text: string[]) => void, hide: () => void}} handlers
   */
  constructor(canvas, timeline, limits, viewport, handlers) {
    this.canvas = canvas;
    this.timeline = timeline;
    this.limits = limits;
    this.viewport = viewport;
    this.handlers = handlers;
    this.rank = /** @type {number | null} */ (null);
    this.pending = 0;
    const peaks = timeline.memory_bytes.map((/** @type {number[]} */ levels) => levels.reduce((a, b) => Math.max(a, b), 0));
    const highest = Math.max(...peaks, 0);
    const limit = Math.max(...limits);
    // A limit far above the peaks would flatten them: then it is named, not drawn.
    this.showLimit = limit < highest * 6;
    this.top_bytes = (this.showLimit ? Math.max(highest, limit) : highest) * 1.08 || 1;
    viewport.listeners.add(() => this.drawSoon());
    steer(canvas, viewport, { hover: (event) => this.hover(event), leave: () => this.leave() });
    new ResizeObserver(() => this.drawSoon()).observe(canvas);
    this.draw();
  }

  /** @param {number | null} rank */
  highlight(rank) {
    if (rank !== this.rank) {
      this.rank = rank;
      this.drawSoon();
    }
  }

  drawSoon() {
    cancelAnimationFrame(this.pending);
    this.pending = requestAnimationFrame(() => this.draw());
  }

  /** @param {number} bytes */
  y(bytes) {
    return TOP + (1 - bytes / this.top_bytes) * (HEIGHT - TOP - BOTTOM);
  }

  draw() {
    const { context, width } = prepare(this.canvas, HEIGHT);
    const plot = width - GUTTER;
    this.drawGrid(context, plot);
    const ranks = this.timeline.memory_bytes.length;
    context.save();
    context.beginPath();
    context.rect(GUTTER, 0, plot, HEIGHT);
    context.clip();
    for (let rank = ranks - 1; rank >= 0; rank--) if (rank !== this.rank) this.drawRank(context, rank, plot);
    if (this.rank !== null && this.rank < ranks) this.drawRank(context, this.rank, plot);
    context.restore();
    if (this.showLimit) this.drawLimit(context, plot);
  }

  /** @param {CanvasRenderingContext2D} context @param {number} plot */
  drawGrid(context, plot) {
    context.font = `11px ${variable("--sans")}`;
    context.textBaseline = "middle";
    context.strokeStyle = variable("--grid");
    for (const time of ticks(this.viewport, plot / 90).times) {
      const x = Math.round(GUTTER + this.viewport.x(time, plot)) + 0.5;
      context.beginPath();
      context.moveTo(x, TOP);
      context.lineTo(x, HEIGHT - BOTTOM);
      context.stroke();
    }
    const gib = 2 ** Math.floor(Math.log2(this.top_bytes / 3));
    for (let level = 0; level <= this.top_bytes; level += gib) {
      const y = Math.round(this.y(level)) + 0.5;
      context.strokeStyle = variable(level === 0 ? "--line-strong" : "--grid");
      context.beginPath();
      context.moveTo(GUTTER, y);
      context.lineTo(GUTTER + plot, y);
      context.stroke();
      context.fillStyle = variable("--ink-3");
      context.textAlign = "right";
      context.fillText(level === 0 ? "0" : format.bytes(level).replace(/\.0+(?= )/, ""), GUTTER - 9, y);
    }
  }

  /** @param {CanvasRenderingContext2D} context @param {number} rank @param {number} plot */
  drawRank(context, rank, plot) {
    const times = this.timeline.memory_time_s[rank];
    const levels = this.timeline.memory_bytes[rank];
    if (!times.length) return;
    const others = this.rank !== null && this.rank !== rank;
    context.strokeStyle = rankColor(rank, this.timeline.num_ranks);
    context.globalAlpha = others ? 0.22 : 1;
    context.lineWidth = this.rank === rank ? 2.4 : 1.4;
    context.lineJoin = "round";
    context.beginPath();
    let at = Math.max(0, last(times, this.viewport.from_s));
    context.moveTo(GUTTER + Math.max(0, this.viewport.x(times[at], plot)), this.y(levels[at]));
    let column = -1;
    let low = 0;
    let high = 0;
    for (at += 1; at < times.length && times[at] <= this.viewport.to_s; at++) {
      const x = GUTTER + this.viewport.x(times[at], plot);
      if (Math.floor(x) === column) {
        // Several steps in one pixel: their range is one stroke.
        low = Math.min(low, levels[at]);
        high = Math.max(high, levels[at]);
        context.lineTo(x, this.y(low));
        context.lineTo(x, this.y(high));
        context.lineTo(x, this.y(levels[at]));
      } else {
        context.lineTo(x, this.y(levels[at - 1]));
        context.lineTo(x, this.y(levels[at]));
        low = high = levels[at];
        column = Math.floor(x);
      }
    }
    context.lineTo(GUTTER + Math.min(plot, this.viewport.x(this.timeline.makespan_s, plot)), this.y(levels[at - 1]));
    context.stroke();
    if (this.rank === rank) {
      context.lineTo(GUTTER + Math.min(plot, this.viewport.x(this.timeline.makespan_s, plot)), this.y(0));
      context.lineTo(GUTTER, this.y(0));
      context.globalAlpha = 0.1;
      context.fillStyle = context.strokeStyle;
      context.fill();
    }
    context.globalAlpha = 1;
    context.lineWidth = 1;
  }

  /** @param {CanvasRenderingContext2D} context @param {number} plot */
  drawLimit(context, plot) {
    for (const limit of new Set(this.limits)) {
      const y = Math.round(this.y(limit)) + 0.5;
      context.strokeStyle = variable("--bad");
      context.setLineDash([6, 4]);
      context.beginPath();
      context.moveTo(GUTTER, y);
      context.lineTo(GUTTER + plot, y);
      context.stroke();
      context.setLineDash([]);
      context.fillStyle = variable("--bad");
      context.textAlign = "right";
      context.textBaseline = "bottom";
      context.fillText(`device memory ${format.bytes(limit)}`, GUTTER + plot - 4, y - 2);
      context.textBaseline = "middle";
    }
  }

  /** @param {PointerEvent} event */
  hover(event) {
    if (event.offsetX < GUTTER) {
      this.leave();
      return;
    }
    const time_s = this.viewport.time(event.offsetX - GUTTER, this.canvas.clientWidth - GUTTER);
    const rows = this.timeline.memory_time_s.map((/** @type {number[]} */ times, /** @type {number} */ rank) => {
      const at = last(times, time_s);
      return { rank, bytes: at < 0 ? 0 : this.timeline.memory_bytes[rank][at] };
    });
    if (!rows.length) return;
    const nearest = rows.reduce((/** @type {any} */ best, /** @type {any} */ row) =>
      Math.abs(this.y(row.bytes) - event.offsetY) < Math.abs(this.y(best.bytes) - event.offsetY) ? row : best);
    this.highlight(nearest.rank);
    const limit = this.limits[nearest.rank];
    this.handlers.show(event, [
      `rank ${nearest.rank}: ${format.bytes(nearest.bytes)}`,
      `${format.percent(nearest.bytes / limit, 0)} of ${format.bytes(limit)}, at ${format.seconds(time_s)}`,
    ]);
  }

  leave() {
    this.highlight(null);
    this.handlers.hide();
  }
}

/** The last index whose time is at most `time_s`, -1 for none. @param {number[]} times @param {number} time_s */
function last(times, time_s) {
  let low = 0;
  let high = times.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (times[middle] <= time_s) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}
