// The page: a question in the form, its answer beside it, both in the address.

import * as api from "./api.js";
import { byId, copy, download, h } from "./dom.js";
import { EXAMPLES, Form, pointed } from "./form.js";
import * as format from "./format.js";
import { showFailure, showResource } from "./result.js";
import { fromHash, toCommandLine, toCurl, toHash } from "./share.js";

// What tests and curious people may look at.
const state = /** @type {any} */ ({ phase: "loading", request: null, resource: null, plan: null, chosen: 0, report: null, gantt: null, memory: null, viewport: null });
/** @type {any} */ (window).stagewright = state;

const form = new Form(ask, () => byId("note-request").replaceChildren());

const handlers = {
  shown: (/** @type {any} */ plan, /** @type {number} */ index) => Object.assign(state, { plan, chosen: index, gantt: null, memory: null, report: null }),
  drawn: (/** @type {any} */ charts, /** @type {any} */ viewport, /** @type {any} */ report) => Object.assign(state, { ...charts, viewport, report, phase: "drawn" }),
  showTip: (/** @type {PointerEvent} */ event, /** @type {string[]} */ lines) => {
    const tip = byId("tooltip");
    tip.replaceChildren(h("b", {}, lines[0]), ...lines.slice(1).map((line) => h("div", {}, line)));
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.setProperty("left", `${Math.min(event.clientX + 14, window.innerWidth - width - 8)}px`);
    tip.style.setProperty("top", `${event.clientY + 18 + height > window.innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`);
  },
  hideTip: () => (byId("tooltip").hidden = true),
  trace: async () => download("trace.json", await api.trace(state.resource.id)),
  copyLink: () => copyLink(),
};

/** Ask the service, follow the solve, show the answer. @param {any} request */
async function ask(request) {
  show("progress");
  Object.assign(state, { phase: "asking", request, resource: null, plan: null, report: null, gantt: null, memory: null });
  history.replaceState(null, "", await toHash(request));
  setRunning(true);
  const started = performance.now();
  const clock = setInterval(() => (byId("progress-time").textContent = `${((performance.now() - started) / 1000).toFixed(1)} s`), 100);
  try {
    let resource = await api.submit(request);
    state.resource = resource;
    if (["queued", "running"].includes(resource.state)) resource = await api.follow(resource.id, showProgress);
    await answer(resource, request);
  } catch (error) {
    fail(error);
  } finally {
    clearInterval(clock);
    setRunning(false);
  }
}

/** @param {any} resource @param {any} request */
async function answer(resource, request) {
  Object.assign(state, { resource, request, phase: "answered" });
  show("result");
  await showResource(byId("result"), resource, request, handlers);
}

/** @param {any} error */
function fail(error) {
  state.phase = "failed";
  const problem = error instanceof api.ProblemError ? error.problem : { title: "The service cannot be reached", detail: String(error.message || error) };
  if (error instanceof api.ProblemError) form.show(pointed(problem));
  show("result");
  showFailure(byId("result"), problem);
}

/** @param {any} resource */
function showProgress(resource) {
  state.resource = resource;
  if (resource.result) return;
  const { progress } = resource;
  byId("keep").disabled = progress === null || progress.incumbent_s === null || resource.cancel_requested !== null;
  const bar = byId("progress-bar");
  byId("progress-phase").textContent = resource.state === "queued" ? "Waiting for a solver" : progress ? capital(progress.phase) : "Starting the search";
  if (!progress) {
    bar.removeAttribute("value");
    return;
  }
  bar.value = progress.total ? progress.done / progress.total : 0;
  const rows = [["candidates", `${format.count(progress.done)} of ${format.count(progress.total)}`], ["best so far", format.seconds(progress.incumbent_s)], ["proven bound", format.seconds(progress.bound_s)], ["gap", progress.gap === null ? "–" : format.gapText(progress.gap)]];
  byId("progress-numbers").replaceChildren(...rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

/** @param {string} text */
function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** @param {"welcome" | "progress" | "result"} name */
function show(name) {
  for (const id of ["welcome", "progress", "result"]) byId(id).hidden = id !== name;
  if (name === "progress") {
    byId("progress-numbers").replaceChildren();
    byId("progress-bar").removeAttribute("value");
    byId("progress-phase").textContent = "Waiting for a solver";
    byId("keep").disabled = true;
  }
}

/** @param {boolean} running */
function setRunning(running) {
  byId("plan").disabled = running;
  byId("plan").textContent = running ? "Planning …" : "Plan";
}

/** @param {"incumbent" | "discard"} mode */
async function cancel(mode) {
  if (!state.resource) return;
  try {
    await api.cancel(state.resource.id, mode);
  } catch (error) {
    if (!(error instanceof api.ProblemError) || error.problem.status !== 409) throw error; // 409: it was done already
  }
}

async function copyLink() {
  const request = state.request || form.request();
  if (request) await copy(location.origin + location.pathname + (await toHash(request)), "Link");
}

function setTheme(/** @type {string} */ theme) {
  document.documentElement.dataset.theme = theme;
  state.gantt?.drawSoon();
  state.memory?.drawSoon();
}

async function open() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  setTheme(localStorage.getItem("theme") || (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => localStorage.getItem("theme") || setTheme(dark.matches ? "dark" : "light"));
  byId("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", theme);
    setTheme(theme);
  });
  byId("keep").addEventListener("click", () => cancel("incumbent"));
  byId("discard").addEventListener("click", () => cancel("discard"));
  byId("copy-link").addEventListener("click", copyLink);
  byId("copy-curl").addEventListener("click", () => copy(toCurl(form.request(), location.origin), "curl command"));
  byId("copy-cli").addEventListener("click", () => copy(toCommandLine(form.request()), "Command"));
  byId("examples").append(...EXAMPLES.map((example) => h("button", { type: "button", onclick: () => { form.fill(example.request); form.element.requestSubmit(); } }, example.title, h("span", {}, example.detail))));
  api.version().then((answer) => (byId("version").textContent = answer.version)).catch(() => {});
  form.fill(EXAMPLES[3].request);
  await Promise.all([form.fillCatalogue().catch(() => {}), openAddress()]);
  if (state.phase === "loading") state.phase = "ready";
}

/** Take the question, or a stored plan, that the address names. */
async function openAddress() {
  const stored = new URLSearchParams(location.search).get("plan");
  if (stored) {
    try {
      const [resource, request] = await Promise.all([api.plan(stored), api.question(stored)]);
      form.fill(request);
      if (["queued", "running"].includes(resource.state)) {
        state.resource = resource;
        show("progress");
        setRunning(true);
        await answer(await api.follow(stored, showProgress), request);
        setRunning(false);
      } else await answer(resource, request);
    } catch (error) {
      fail(error);
    }
    return;
  }
  const request = await fromHash(location.hash);
  if (request) {
    form.fill(request);
    await ask(request);
  }
}

window.addEventListener("hashchange", openAddress);
open();
