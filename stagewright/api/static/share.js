// The question in the address: deflate, then base64url, after the #. Nothing of it reaches a server.

/** @param {Uint8Array} data */
function toText(data) {
  let binary = "";
  for (const byte of data) binary += String.fromCharCode(byte);
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

/** @param {string} text */
function toBytes(text) {
  return Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (character) => character.charCodeAt(0));
}

/** @param {Uint8Array} data @param {CompressionStream | DecompressionStream} stream */
async function through(data, stream) {
  return new Uint8Array(await new Response(new Blob([data]).stream().pipeThrough(stream)).arrayBuffer());
}

/** @param {any} request */
export async function toHash(request) {
  const data = new TextEncoder().encode(JSON.stringify(request));
  return `#q=${toText(await through(data, new CompressionStream("deflate-raw")))}`;
}

/** @param {string} hash @returns {Promise<any | null>} null for an address that holds no question */
export async function fromHash(hash) {
  const match = /^#q=([A-Za-z0-9_-]+)$/.exec(hash);
  if (!match) return null;
  try {
    const data = await through(toBytes(match[1]), new DecompressionStream("deflate-raw"));
    return JSON.parse(new TextDecoder().decode(data));
  } catch {
    return null;
  }
}

/** @param {any} request @param {string} origin */
export function toCurl(request, origin) {
  const body = JSON.stringify(request).replaceAll("'", "'\\''");
  return `curl -s ${origin}/v1/plans -H 'Content-Type: application/json' -H 'Prefer: wait=60' -d '${body}'`;
}

/** @param {any} request */
export function toCommandLine(request) {
  const job = request.job || {};
  const space = job.space || {};
  const model = typeof request.model === "string" ? request.model : "model.json";
  const cluster = typeof request.cluster === "string" ? request.cluster : "cluster.json";
  const words = ["stagewright", "plan", model, "--cluster", cluster];
  words.push("--global-batch", String(job.global_batch), "--sequence-length", String(job.sequence_length));
  if (request.devices) words.push("--devices", String(request.devices));
  if (job.precision && job.precision !== "bf16") words.push("--precision", job.precision);
  for (const [name, value] of Object.entries(space.pins || {})) words.push("--pin", `${name}=${value}`);
  if (request.deadline_s) words.push("--deadline", String(request.deadline_s));
  if (job.gap !== undefined) words.push("--gap", String(job.gap));
  if (request.top !== undefined) words.push("--top", String(request.top));
  words.push("-o", "plan.json");
  return words.map((word) => (/^[\w.+:=,/-]+$/.test(word) ? word : `'${word}'`)).join(" ");
}
