// The colours of actions and ranks, read from the sheet so that both themes hold.

/** @type {Record<string, [string, string]>} colour variable and words */
export const KINDS = {
  F: ["--f", "forward"],
  B: ["--b", "backward"],
  I: ["--i", "input gradient"],
  W: ["--w", "weight gradient"],
  R: ["--r", "recomputation"],
  SEND_F: ["--comm", "activation sent"],
  RECV_F: ["--comm", "activation received"],
  SEND_B: ["--comm", "gradient sent"],
  RECV_B: ["--comm", "gradient received"],
  UNSHARD: ["--coll", "parameters gathered"],
  RESHARD: ["--coll", "parameters dropped"],
  REDUCE_GRAD: ["--coll", "gradients reduced"],
  OPT: ["--other", "optimizer step"],
  OFFLOAD: ["--other", "offload"],
  RELOAD: ["--other", "reload"],
  EVICT: ["--other", "eviction to the peer"],
  LOAD: ["--other", "load from the peer"],
  FILL: ["--other", "work in the bubble"],
};

/** @param {string} name */
export function variable(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** A colour made lighter (above 0) or darker. @param {string} hex @param {number} amount */
export function shade(hex, amount) {
  const target = amount > 0 ? 255 : 0;
  const weight = Math.abs(amount);
  const parts = [1, 3, 5].map((at) => Number.parseInt(hex.slice(at, at + 2), 16));
  return `rgb(${parts.map((part) => Math.round(part + (target - part) * weight)).join(" ")})`;
}

/** A colour for rank `index` of `count`: from blue over green to amber. @param {number} index @param {number} count */
export function rankColor(index, count) {
  const share = count > 1 ? index / (count - 1) : 0;
  const dark = document.documentElement.dataset.theme === "dark";
  return `hsl(${Math.round(222 - share * 186)} ${dark ? 62 : 58}% ${dark ? 64 : 47}%)`;
}

/** A softer one, to write on. @param {number} index @param {number} count */
export function rankTint(index, count) {
  const share = count > 1 ? index / (count - 1) : 0;
  return `hsl(${Math.round(222 - share * 186)} 58% 72%)`;
}
