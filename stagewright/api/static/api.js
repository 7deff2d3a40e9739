// The service as the page uses it: the public REST interface and nothing else.

const KEY = "stagewright-key";

/** An error answer: an RFC 9457 problem document. */
export class ProblemError extends Error {
  /** @param {any} problem */
  constructor(problem) {
    super(problem.detail || problem.title || "the service did not answer");
    this.problem = problem;
  }
}

/** @param {string} path @param {{method?: string, body?: any, headers?: Record<string, string>, signal?: AbortSignal}} [options] */
async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  /** @type {Record<string, string>} */
  const headers = { Accept: "application/json", ...(options.headers || {}) };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (options.body !== undefined) headers["Content-Type"] = "application/json";
  const body = options.body === undefined ? undefined : JSON.stringify(options.body);
  const response = await fetch(path, { method: options.method || "GET", headers, body, signal: options.signal });
  if (response.status === 401) {
    const entered = window.prompt("This service asks for a key:");
    if (entered) {
      sessionStorage.setItem(KEY, entered.trim());
      return request(path, options);
    }
  }
  return response;
}

/** @param {string} path @param {Parameters<typeof request>[1]} [options] */
async function json(path, options) {
  const response = await request(path, options);
  const value = await response.json().catch(() => ({ detail: `${response.status} ${response.statusText}` }));
  if (!response.ok) throw new ProblemError(value);
  return value;
}

/** @param {string} name */
export async function catalog(name) {
  return (await json(`/v1/catalog/${name}`)).data;
}

export function version() {
  return json("/version");
}

/** @param {any} body @param {AbortSignal} [signal] */
export function validate(body, signal) {
  return json("/v1/validations", { method: "POST", body: { request: body }, signal });
}

/** @param {any} body */
export function submit(body) {
  return json("/v1/plans", { method: "POST", body });
}

/** @param {string} id */
export function plan(id) {
  return json(`/v1/plans/${encodeURIComponent(id)}`);
}

/** @param {string} id */
export function question(id) {
  return json(`/v1/plans/${encodeURIComponent(id)}/request`);
}

/** @param {string} id @param {"incumbent" | "discard"} mode */
export function cancel(id, mode) {
  return json(`/v1/plans/${encodeURIComponent(id)}/cancel`, { method: "POST", body: { mode } });
}

/** @param {any} plan @param {any} model */
export function simulate(plan, model) {
  return json("/v1/simulations", { method: "POST", body: { plan, model } });
}

/** @param {string} id */
export async function trace(id) {
  return JSON.stringify(await json(`/v1/plans/${encodeURIComponent(id)}/trace`));
}

/**
 * Follow a plan until it is final: by its event stream, and by asking again where the stream breaks.
 * @param {string} id @param {(plan: any) => void} onChange
 */
export async function follow(id, onChange) {
  for (;;) {
    try {
      const response = await request(`/v1/plans/${encodeURIComponent(id)}/events`, { headers: { Accept: "text/event-stream" } });
      if (response.ok && response.body) await readEvents(response.body, onChange);
    } catch {
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
    const current = await plan(id);
    onChange(current);
    if (!["queued", "running"].includes(current.state)) return current;
  }
}

/** @param {ReadableStream<Uint8Array>} stream @param {(plan: any) => void} onChange */
async function readEvents(stream, onChange) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const blocks = text.split("\n\n");
    text = blocks.pop() || "";
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (data) onChange(JSON.parse(data.slice(6)));
    }
  }
}
