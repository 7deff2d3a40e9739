// Numbers for people. SI inside; units only here.

/** @param {number} value @param {number} digits */
function digits(value, digits = 3) {
  if (value === 0) return "0";
  const places = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(value))));
  return value.toFixed(Math.min(places, 8));
}

/** @param {number | null | undefined} seconds @returns {[string, string]} number and unit */
export function secondsParts(seconds) {
  if (seconds === null || seconds === undefined) return ["–", ""];
  const size = Math.abs(seconds);
  if (size >= 1 || size === 0) return [digits(seconds, 4), "s"];
  if (size >= 1e-3) return [digits(seconds * 1e3, 4), "ms"];
  return [digits(seconds * 1e6, 3), "µs"];
}

/** @param {number | null | undefined} seconds */
export function seconds(seconds) {
  const [number, unit] = secondsParts(seconds);
  return unit ? `${number} ${unit}` : number;
}

/** @param {number | null | undefined} count @returns {[string, string]} number and power of ten in words */
export function countParts(count) {
  if (count === null || count === undefined) return ["–", ""];
  for (const [limit, word] of /** @type {[number, string][]} */ ([[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])) {
    if (Math.abs(count) >= limit) return [digits(count / limit, 3), word];
  }
  return [Number.isInteger(count) ? String(count) : digits(count, 3), ""];
}

/** @param {number | null | undefined} count */
export function count(count) {
  return countParts(count).join("").trim();
}

/** @param {number | null | undefined} bytes @returns {[string, string]} */
export function bytesParts(bytes) {
  if (bytes === null || bytes === undefined) return ["–", ""];
  for (const [limit, unit] of /** @type {[number, string][]} */ ([[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])) {
    if (Math.abs(bytes) >= limit) return [digits(bytes / limit, 3), unit];
  }
  return [String(Math.round(bytes)), "B"];
}

/** @param {number | null | undefined} bytes */
export function bytes(bytes) {
  return bytesParts(bytes).join(" ").trim();
}

/** @param {number | null | undefined} share @param {number} places */
export function percent(share, places = 1) {
  return share === null || share === undefined ? "–" : `${(share * 100).toFixed(places)} %`;
}

/** A proven gap in words: small ones keep their digits. @param {number} gap */
export function gapText(gap) {
  if (gap < 1e-6) return "0 %";
  return `${digits(gap * 100, gap < 1e-3 ? 1 : 2)} %`;
}
