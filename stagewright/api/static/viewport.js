// The window of time that charts share: zoomed and panned together, by wheel, drag and keys.

export const GUTTER = 58; // pixels left of the plot, for labels

export class Viewport {
  /** @param {number} end_s */
  constructor(end_s) {
    this.end_s = end_s;
    this.from_s = 0;
    this.to_s = end_s;
    /** @type {Set<() => void>} */
    this.listeners = new Set();
  }

  get isWhole() {
    return this.to_s - this.from_s >= this.end_s * (1 - 1e-9);
  }

  /** @param {number} from_s @param {number} to_s */
  set(from_s, to_s) {
    const width = Math.min(Math.max(to_s - from_s, this.end_s * 1e-6), this.end_s);
    this.from_s = Math.min(Math.max(from_s, 0), this.end_s - width);
    this.to_s = this.from_s + width;
    for (const listener of this.listeners) listener();
  }

  reset() {
    this.set(0, this.end_s);
  }

  /** @param {number} factor below 1 zooms in @param {number} at_s stays where it is */
  zoom(factor, at_s = (this.from_s + this.to_s) / 2) {
    this.set(at_s - (at_s - this.from_s) * factor, at_s + (this.to_s - at_s) * factor);
  }

  /** @param {number} share of the window's width */
  pan(share) {
    const shift = (this.to_s - this.from_s) * share;
    this.set(this.from_s + shift, this.to_s + shift);
  }

  /** @param {number} time_s @param {number} width pixels of the plot */
  x(time_s, width) {
    return ((time_s - this.from_s) / (this.to_s - this.from_s)) * width;
  }

  /** @param {number} x pixels from the plot's left @param {number} width */
  time(x, width) {
    return this.from_s + (x / width) * (this.to_s - this.from_s);
  }
}

/**
 * Let a canvas steer the viewport.
 * @param {HTMLCanvasElement} canvas @param {Viewport} viewport
 * @param {{hover: (event: PointerEvent) => void, leave: () => void}} handlers
 */
export function steer(canvas, viewport, handlers) {
  const width = () => canvas.clientWidth - GUTTER;
  canvas.addEventListener("wheel", (event) => {
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey) {
      viewport.pan((event.deltaX || event.deltaY) / width());
    } else {
      if (event.deltaY > 0 && viewport.isWhole) return; // all is in view: the page scrolls on
      viewport.zoom(Math.exp(event.deltaY * 0.0022), viewport.time(event.offsetX - GUTTER, width()));
    }
    event.preventDefault();
  }, { passive: false });
  let dragged = /** @type {number | null} */ (null);
  canvas.addEventListener("pointerdown", (event) => {
    dragged = event.offsetX;
    canvas.setPointerCapture(event.pointerId);
    canvas.classList.add("dragging");
  });
  canvas.addEventListener("pointermove", (event) => {
    if (dragged !== null) {
      viewport.pan((dragged - event.offsetX) / width());
      dragged = event.offsetX;
    }
    handlers.hover(event);
  });
  const release = () => {
    dragged = null;
    canvas.classList.remove("dragging");
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => handlers.leave());
  canvas.addEventListener("dblclick", () => viewport.reset());
  canvas.addEventListener("keydown", (event) => {
    /** @type {Record<string, () => void>} */
    const actions = {
      w: () => viewport.zoom(0.7), s: () => viewport.zoom(1 / 0.7), a: () => viewport.pan(-0.15), d: () => viewport.pan(0.15),
      arrowup: () => viewport.zoom(0.7), arrowdown: () => viewport.zoom(1 / 0.7),
      arrowleft: () => viewport.pan(-0.15), arrowright: () => viewport.pan(0.15), home: () => viewport.reset(), 0: () => viewport.reset(),
    };
    const action = event.ctrlKey || event.metaKey || event.altKey ? undefined : actions[event.key.toLowerCase()];
    if (action) {
      action();
      event.preventDefault();
    }
  });
}

/** A canvas sized to its box and the screen's pixels, cleared. @param {HTMLCanvasElement} canvas @param {number} height */
export function prepare(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth || canvas.parentElement?.clientWidth || 600;
  canvas.style.setProperty("height", `${height}px`);
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width };
}

/** Round times for an axis, at most `count` of them. @param {Viewport} viewport @param {number} count */
export function ticks(viewport, count) {
  const span = viewport.to_s - viewport.from_s;
  const rough = span / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough) || rough;
  const first = Math.ceil(viewport.from_s / step) * step;
  const found = [];
  for (let time = first; time <= viewport.to_s + step * 1e-6; time += step) found.push(time);
  return { times: found, step };
}

/** @param {number} time_s @param {number} step_s */
export function tickText(time_s, step_s) {
  const [factor, unit] = step_s >= 0.1 ? [1, "s"] : step_s >= 1e-4 ? [1e3, "ms"] : [1e6, "µs"];
  const places = Math.max(0, -Math.floor(Math.log10(step_s * factor) + 1e-9));
  return `${(time_s * factor).toFixed(places)} ${unit}`;
}
