// The form and the request it stands for, each made from the other; checked by the service while it is filled in.

import * as api from "./api.js";
import { byId, h } from "./dom.js";
import * as format from "./format.js";

const NUMBERS = ["global_batch", "sequence_length", "devices", "deadline_s", "gap", "top"];
const PIN_NUMBERS = new Set(["tp", "pp", "dp", "cp", "ep", "microbatch", "chunks", "zero"]);
const FIELD_OF = [
  [/^\/model/, "model"],
  [/^\/cluster/, "cluster"],
  [/^\/job\/global_batch/, "global_batch"],
  [/^\/job\/sequence_length/, "sequence_length"],
  [/^\/job\/gap/, "gap"],
  [/^\/deadline_s/, "deadline_s"],
  [/^\/devices/, "devices"],
  [/^\/job\/space/, "pins"],
];

export const EXAMPLES = [
  { title: "GPT-3 175B", detail: "1,024 A100, batch 1,536", request: { model: "gpt3-175b", cluster: "a100-sxm-80g:8x128", job: { global_batch: 1536, sequence_length: 2048 } } },
  { title: "Llama 3.1 70B", detail: "128 H100, sequence 8,192", request: { model: "llama3.1-70b", cluster: "h100-sxm:8x16", job: { global_batch: 512, sequence_length: 8192 } } },
  { title: "Megatron 18.4B", detail: "256 A100, batch 1,024", request: { model: "megatron-18.4b", cluster: "a100-sxm-80g:8x32", job: { global_batch: 1024, sequence_length: 2048 } } },
  { title: "Llama 2 13B", detail: "16 H100, fits and fast", request: { model: "llama2-13b", cluster: "h100-sxm:8x2", job: { global_batch: 128, sequence_length: 4096 } } },
  { title: "Mixtral 8x7B", detail: "64 H100, experts", request: { model: "mixtral-8x7b", cluster: "h100-sxm:8x8", job: { global_batch: 256, sequence_length: 4096 } } },
  { title: "Two kinds of nodes", detail: "A100 and V100 together", request: { model: "megatron-7.5b", cluster: "a100-sxm-80g:8x2+v100-sxm-32g:8x2", job: { global_batch: 256, sequence_length: 2048 } } },
];

export class Form {
  /** @param {(request: any) => void} onSubmit @param {() => void} onEdit */
  constructor(onSubmit, onEdit) {
    this.element = byId("question");
    this.extra = /** @type {any} */ ({});
    this.aborter = new AbortController();
    this.timer = 0;
    this.element.addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      const request = this.request();
      if (request) onSubmit(request);
    });
    this.element.addEventListener("input", () => {
      this.showSource();
      onEdit();
      this.checkSoon();
    });
    this.element.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.element.requestSubmit();
    });
  }

  async fillCatalogue() {
    const [models, clusters, gpus, schedules] = await Promise.all(["models", "clusters", "gpus", "schedules"].map(api.catalog));
    const option = (/** @type {any} */ entry) => h("option", { value: entry.name }, entry.summary || "");
    byId("models").replaceChildren(...models.map(option));
    const shorthands = gpus.map((/** @type {any} */ gpu) => ({ name: `${gpu.name}:8x1`, summary: gpu.summary }));
    byId("clusters").replaceChildren(...[...clusters, ...shorthands].map(option));
    byId("pin-schedule").append(...schedules.map((/** @type {any} */ entry) => h("option", { value: entry.name }, entry.name)));
    return { models, clusters };
  }

  showSource() {
    const pasted = this.element.elements.source.value === "json";
    byId("model").hidden = pasted;
    byId("model-json").hidden = !pasted;
  }

  /** The request as the form stands, or null with the reason shown. @param {boolean} [quiet] */
  request(quiet = false) {
    const text = (/** @type {string} */ id) => byId(id).value.trim();
    /** @type {any} */
    let model = text("model");
    if (this.element.elements.source.value === "json") {
      try {
        model = JSON.parse(byId("model-json").value);
      } catch (error) {
        if (!quiet) this.show([{ pointer: "/model", message: `not JSON: ${/** @type {Error} */ (error).message}` }]);
        return null;
      }
    }
    /** @type {any} */
    const numbers = {};
    for (const name of NUMBERS) {
      const written = text(name).replaceAll(",", "").replaceAll("_", "");
      if (written !== "") numbers[name] = Number.isNaN(Number(written)) ? written : Number(written);
    }
    /** @type {any} */
    const pins = {};
    for (const input of this.element.querySelectorAll("[data-pin]")) {
      const value = input.value.trim();
      if (value !== "") pins[input.dataset.pin] = PIN_NUMBERS.has(input.dataset.pin) && value !== "" && !Number.isNaN(Number(value)) ? Number(value) : value;
    }
    const job = { ...this.extra.job, global_batch: numbers.global_batch, sequence_length: numbers.sequence_length };
    if (byId("precision").value !== "bf16") job.precision = byId("precision").value;
    if (numbers.gap !== undefined) job.gap = typeof numbers.gap === "number" ? numbers.gap / 100 : numbers.gap;
    if (Object.keys(pins).length) job.space = { ...(job.space || {}), pins };
    const request = /** @type {any} */ ({ ...this.extra, model, cluster: this.extra.cluster || text("cluster"), job });
    for (const name of ["devices", "deadline_s", "top"]) if (numbers[name] !== undefined) request[name] = numbers[name];
    return request;
  }

  /** Fill the form from a request; what it has no field for is kept and sent along. @param {any} request */
  fill(request) {
    const job = request.job || {};
    const { precision, gap, space, global_batch, sequence_length, ...otherJob } = job;
    const { pins, ...otherSpace } = space || {};
    const { model, cluster, devices, deadline_s, top, schema_version, labels, job: _job, ...other } = request;
    this.extra = { ...other };
    if (Object.keys(otherJob).length || Object.keys(otherSpace).length) this.extra.job = { ...otherJob };
    if (Object.keys(otherSpace).length) this.extra.job.space = otherSpace;
    const set = (/** @type {string} */ id, /** @type {any} */ value) => (byId(id).value = value === undefined || value === null ? "" : String(value));
    const pasted = typeof model !== "string";
    this.element.elements.source.value = pasted ? "json" : "catalogue";
    set("model", pasted ? "" : model);
    byId("model-json").value = pasted ? JSON.stringify(model, null, 1) : "";
    if (typeof cluster === "string") set("cluster", cluster);
    else if (cluster) {
      this.extra.cluster = cluster;
      set("cluster", cluster.name);
    }
    set("global_batch", global_batch);
    set("sequence_length", sequence_length);
    set("devices", devices);
    set("precision", precision || "bf16");
    set("deadline_s", deadline_s);
    set("gap", gap === undefined || gap === null ? "" : +(gap * 100).toPrecision(6));
    set("top", top);
    for (const input of this.element.querySelectorAll("[data-pin]")) input.value = pins?.[input.dataset.pin] ?? "";
    byId("constraints").open = Object.values(pins || {}).some((value) => value !== null);
    byId("effort").open = [deadline_s, gap, top].some((value) => value !== undefined && value !== null);
    this.showSource();
    this.checkSoon();
  }

  checkSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.check(), 280);
  }

  async check() {
    this.aborter.abort();
    this.aborter = new AbortController();
    if (this.extra.cluster && byId("cluster").value.trim() !== this.extra.cluster.name) delete this.extra.cluster;
    const request = this.request();
    if (!request || request.model === "" || request.cluster === "") return;
    try {
      const report = await api.validate(request, this.aborter.signal);
      this.show(report.violations.map((/** @type {any} */ item) => ({ ...item, pointer: (item.pointer || "").replace(/^\/request/, "") })), report.summary);
      return report;
    } catch (error) {
      if (/** @type {Error} */ (error).name !== "AbortError" && error instanceof api.ProblemError) this.show(pointed(error.problem));
    }
  }

  /** Show what is wrong at its field, and what is understood at the others. @param {any[]} violations @param {any} [summary] */
  show(violations, summary) {
    for (const note of this.element.querySelectorAll(".note")) note.textContent = "";
    for (const field of this.element.querySelectorAll(".wrong")) field.classList.remove("wrong");
    if (summary?.num_layers) byId("note-model").textContent = `${summary.num_layers} layers, ${format.count(summary.num_parameters)} parameters`;
    if (summary?.groups) {
      const groups = summary.groups.map((/** @type {any} */ group) => `${group.num_nodes * group.devices_per_node} × ${group.device}, ${format.bytes(group.memory_bytes)}`);
      byId("note-cluster").textContent = groups.join(" + ");
    }
    for (const item of violations) {
      const name = FIELD_OF.find(([pattern]) => /** @type {RegExp} */ (pattern).test(item.pointer || ""))?.[1] || "request";
      const note = byId(`note-${name}`);
      const hint = item.hint && !/schema/.test(item.hint) ? ` – ${item.hint}` : "";
      note.textContent = [note.closest(".wrong") ? note.textContent : "", item.message + hint].filter(Boolean).join("; ");
      (byId(`field-${name}`) || note).classList.add("wrong");
      if (name === "pins") {
        byId("constraints").open = true;
        note.classList.add("error");
      }
    }
  }
}

/** The violations that a problem document points at. @param {any} problem */
export function pointed(problem) {
  const listed = (problem.errors || []).map((/** @type {any} */ error) => ({ pointer: error.pointer, message: error.detail, hint: problem.hint }));
  return listed.length ? listed : [{ pointer: "", message: problem.detail, hint: problem.hint }];
}
