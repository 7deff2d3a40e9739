// The answer: headline, stages, timeline, memory, alternatives; or why nothing fits.

import * as api from "./api.js";
import { KINDS, rankColor, rankTint } from "./colors.js";
import { download, h } from "./dom.js";
import * as format from "./format.js";
import { Gantt } from "./gantt.js";
import { MemoryChart } from "./memory.js";
import { Viewport } from "./viewport.js";

const ITEMS = [
  ["parameters", "#6c93dd"], ["gradients", "#8fb3ef"], ["optimizer", "#b7a3e0"], ["weight_versions", "#d3a7d8"],
  ["activations", "#5fb08c"], ["logits", "#a9c76a"], ["workspace", "#e2b35f"], ["communication", "#e0926a"],
  ["fragmentation", "#c9c4b8"], ["framework", "#a3a9b5"],
];
const VERDICTS = {
  optimal: ["good", "optimal"],
  within_gap: ["good", "within the gap"],
  feasible: ["warn", "feasible"],
  infeasible: ["bad", "infeasible"],
  no_solution: ["bad", "no plan found"],
};
const MAX_ROWS = 500;

/** Show what a final plan resource holds. @param {HTMLElement} place @param {any} resource @param {any} request @param {any} handlers */
export function showResource(place, resource, request, handlers) {
  const outcome = resource.result;
  if (outcome?.plan) return showOutcome(place, resource, request, handlers);
  if (outcome?.diagnosis) return showDiagnosis(place, outcome, request, handlers);
  const error = resource.error || { title: resource.state === "cancelled" ? "Cancelled" : "No answer", detail: resource.state === "cancelled" ? "The plan was discarded." : "" };
  showFailure(place, error);
}

/** @param {HTMLElement} place @param {any} problem */
export function showFailure(place, problem) {
  place.replaceChildren(h("div", { class: "card failure" },
    h("h2", {}, problem.title || "The question was refused"), h("p", {}, problem.detail || ""),
    problem.hint ? h("p", { class: "quiet" }, problem.hint) : null));
}

/** @param {HTMLElement} place @param {any} resource @param {any} request @param {any} handlers */
function showOutcome(place, resource, request, handlers) {
  const outcome = resource.result;
  const plans = [{ summary: summaryOf(outcome.plan), plan: outcome.plan }, ...outcome.alternatives];
  const shown = h("div", { id: "shown" });
  const alternatives = h("div", { class: "card" });
  place.replaceChildren(shown, ...(plans.length > 1 ? [alternatives] : []));
  const choose = async (/** @type {number} */ index) => {
    alternatives.replaceChildren(...alternativesTable(plans, index, choose));
    await showPlan(shown, plans[index].plan, index, resource, request, handlers);
  };
  return choose(0);
}

/** @param {HTMLElement} place @param {any} plan @param {number} index @param {any} resource @param {any} request @param {any} handlers */
async function showPlan(place, plan, index, resource, request, handlers) {
  const outcome = resource.result;
  const chart = h("div", { class: "card", id: "timeline" }, h("p", { class: "quiet" }, "Simulating the step …"));
  const details = h("div", { class: "two" }, stagesCard(plan), memoryCard(plan));
  place.replaceChildren(headlineCard(plan, index, outcome, resource, handlers), chart, details);
  handlers.shown(plan, index);
  try {
    const report = await api.simulate(plan, request.model);
    if (!chart.isConnected) return;
    if (report.timeline) timelineCard(chart, report, plan, handlers);
    else chart.replaceChildren(h("p", {}, `The timeline has ${format.count(report.num_spans)} spans, too many to send. The command line draws it: stagewright simulate plan.json --trace trace.json`));
  } catch (error) {
    if (!(error instanceof api.ProblemError)) throw error;
    chart.replaceChildren(h("p", { class: "note error" }, error.message));
  }
}

/** @param {any} plan */
function summaryOf(plan) {
  const { degrees } = plan.stages[0];
  const words = [["pp", plan.schedule.num_ranks], ["dp", degrees.dp], ["tp", degrees.tp], ["cp", degrees.cp], ["ep", degrees.ep]]
    .filter(([name, degree]) => degree > 1 || name === "pp" || name === "dp").map(([name, degree]) => `${name} ${degree}`);
  return `${words.join(", ")}, ${plan.schedule.name}`;
}

/** @param {any} plan @param {number} index @param {any} outcome @param {any} resource @param {any} handlers */
function headlineCard(plan, index, outcome, resource, handlers) {
  const { prediction } = plan;
  const peak = Math.max(...prediction.peak_memory_bytes);
  const worst = prediction.peak_memory_bytes.indexOf(peak);
  const limit = limitOf(plan, worst);
  const [stepNumber, stepUnit] = format.secondsParts(prediction.step_time_s);
  const [tokens, power] = format.countParts(prediction.tokens_per_s);
  const [peakNumber, peakUnit] = format.bytesParts(peak);
  const share = peak / limit;
  const perDevice = prediction.tokens_per_s / plan.mapping.pipeline_ranks.flat().length;
  const meter = h("div", { class: "meter", role: "img", "aria-label": `${format.percent(share, 0)} of the device memory` },
    h("i", { class: share > 1 ? "over" : share > 0.94 ? "tight" : "", style: { width: `${Math.min(100, share * 100)}%` } }));
  const figures = h("div", { class: "headline" },
    figure("step time", stepNumber, stepUnit, `${format.count(prediction.samples_per_s)} samples/s`, "main"),
    figure("throughput", tokens, `${power} tokens/s`.trim(), `${format.count(perDevice)} tokens/s/device`),
    figure("MFU", prediction.mfu === null ? "–" : (prediction.mfu * 100).toFixed(1), prediction.mfu === null ? "" : "%", prediction.hfu === null ? "" : `HFU ${format.percent(prediction.hfu)}`),
    figure("bubble", (prediction.bubble_over_total * 100).toFixed(1), "%", "idle over total"),
    h("div", { class: "figure" }, h("div", { class: "label" }, `peak memory, rank ${worst}`), h("div", { class: "value" }, peakNumber, h("small", {}, `${peakUnit} of ${format.bytes(limit)}`)), meter));
  return h("div", { class: "card", id: "headline" }, verdict(outcome, index, plan, resource), figures, chips(plan), h("div", { class: "tools foot" },
    h("button", { type: "button", onclick: () => download("plan.json", JSON.stringify(plan, null, 1)) }, "Download plan.json"),
    index === 0 ? h("button", { type: "button", onclick: handlers.trace }, "Trace for Perfetto") : null,
    h("button", { type: "button", onclick: handlers.copyLink }, "Copy link"),
    h("p", { class: "note" }, `Costs are ${prediction.source}${prediction.expected_error ? `, expected within ${format.percent(prediction.expected_error, 0)}` : ""}.`)));
}

/** @param {string} label @param {string} value @param {string} unit @param {string} [sub] @param {string} [kind] */
function figure(label, value, unit, sub = "", kind = "") {
  return h("div", { class: `figure ${kind}` }, h("div", { class: "label" }, label), h("div", { class: "value" }, value, h("small", {}, unit)), h("div", { class: "sub" }, sub || "\u00a0"));
}

/** @param {any} outcome @param {number} index @param {any} plan @param {any} resource */
function verdict(outcome, index, plan, resource) {
  if (index > 0) {
    const slower = plan.prediction.step_time_s / outcome.plan.prediction.step_time_s - 1;
    return h("p", { class: "verdict" }, h("span", { class: "badge" }, `alternative ${index}`), h("span", {}, `${format.percent(slower, 2)} slower than the plan`));
  }
  const [tone, words] = VERDICTS[/** @type {keyof VERDICTS} */ (outcome.status)];
  const parts = [];
  if (outcome.gap !== null && outcome.bound_s !== null) parts.push(outcome.status === "optimal"
    ? "Proven: no plan in the declared space is faster."
    : `Proven: no plan in the declared space takes less than ${format.seconds(outcome.bound_s)}, so this one is within ${format.gapText(outcome.gap)} of the best.`);
  if (resource.termination === "time_limit") parts.push("The deadline ended the search.");
  if (resource.termination === "cancelled") parts.push("You ended the search.");
  parts.push(`${format.count(outcome.evaluated)} of ${format.count(outcome.candidates)} candidates solved in ${format.seconds(outcome.wall_s)}${resource.cached ? ", known from before" : ""}.`);
  return h("p", { class: "verdict" }, h("span", { class: `badge ${tone}` }, words), h("span", {}, parts.join(" ")));
}

/** @param {any} plan */
function chips(plan) {
  const { degrees } = plan.stages[0];
  const levels = new Set(plan.stages.flatMap((/** @type {any} */ stage) => stage.recompute.map((/** @type {any} */ run) => run.level)));
  const values = [
    ["devices", plan.mapping.pipeline_ranks.flat().length], ["pp", plan.schedule.num_ranks], ["dp", degrees.dp], ["tp", degrees.tp], ["cp", degrees.cp], ["ep", degrees.ep],
    ["sp", degrees.sp ? "on" : "off"], ["zero", degrees.zero], ["schedule", plan.schedule.name], ["chunks", plan.schedule.num_chunks],
    ["microbatch", plan.schedule.microbatch], ["microbatches", plan.schedule.num_microbatches], ["recompute", levels.size ? [...levels].sort().join(" + ") : "none"],
  ];
  const kept = values.filter(([name, value]) => !(["cp", "ep", "chunks"].includes(String(name)) && value === 1));
  return h("div", { class: "chips" }, ...kept.map(([name, value]) => h("span", { class: "chip" }, `${name} `, h("b", {}, String(value)))));
}

/** @param {any} plan @param {number} rank */
function limitOf(plan, rank) {
  const stage = plan.schedule.placement[0].indexOf(rank);
  const group = plan.cluster.groups.find((/** @type {any} */ entry) => entry.name === plan.stages[stage]?.group) || plan.cluster.groups[0];
  return group.device.memory_bytes;
}

/** @param {HTMLElement} place @param {any} report @param {any} plan @param {any} handlers */
function timelineCard(place, report, plan, handlers) {
  const { timeline } = report;
  const viewport = new Viewport(timeline.makespan_s);
  const seen = new Set(timeline.kind.map((/** @type {number} */ kind) => timeline.kinds[kind]));
  const words = new Map([...seen].map((name) => KINDS[name] || ["--other", name]).map(([color, text]) => [color === "--comm" ? "sent between stages" : color === "--coll" ? "collective" : text, color]));
  const legend = h("div", { class: "legend" },
    ...[...words].map(([text, color]) => h("span", {}, h("i", { style: { background: `var(${color})` } }), text)),
    h("span", {}, h("i", { class: "hatched" }), "bubble"));
  const peak = Math.max(...plan.prediction.peak_memory_bytes);
  const ganttCanvas = h("canvas", { id: "gantt", tabindex: "0", role: "img", "aria-label": `Gantt chart: ${timeline.num_ranks} ranks over ${format.seconds(timeline.makespan_s)}, ${format.percent(plan.prediction.bubble_over_total)} idle. The table below holds the same.` });
  const memoryCanvas = h("canvas", { id: "memory", tabindex: "0", role: "img", "aria-label": `Memory over time of each rank; the highest peak is ${format.bytes(peak)}.` });
  const critical = h("button", { type: "button", "aria-pressed": "false" }, "Critical path");
  place.replaceChildren(
    h("div", { class: "card-head" }, h("h3", {}, "One training step"), legend, h("div", { class: "tools" },
      timeline.critical_path.length ? critical : null,
      h("button", { type: "button", "aria-label": "Zoom in", onclick: () => viewport.zoom(0.6) }, "+"),
      h("button", { type: "button", "aria-label": "Zoom out", onclick: () => viewport.zoom(1 / 0.6) }, "–"),
      h("button", { type: "button", onclick: () => viewport.reset() }, "Whole step"))),
    h("div", { class: "chart" }, ganttCanvas),
    h("p", { class: "chart-title" }, h("span", {}, "Memory of one device of each rank"), h("span", { class: "legend" }, ...rankLegend(timeline.num_ranks))),
    h("div", { class: "chart" }, memoryCanvas),
    h("p", { class: "keys" }, "Wheel or ", h("kbd", {}, "W"), " ", h("kbd", {}, "S"), " zoom, drag or ", h("kbd", {}, "A"), " ", h("kbd", {}, "D"), " pan, double click shows the whole step."),
    spansTable(timeline));
  const charts = { gantt: /** @type {any} */ (null), memory: /** @type {any} */ (null) };
  charts.memory = new MemoryChart(memoryCanvas, timeline, report.memory_limit_bytes, viewport, { show: handlers.showTip, hide: handlers.hideTip });
  charts.gantt = new Gantt(ganttCanvas, timeline, viewport, { show: handlers.showTip, hide: handlers.hideTip, rank: (rank) => charts.memory.highlight(rank) });
  critical.addEventListener("click", () => {
    charts.gantt.showCritical = !charts.gantt.showCritical;
    critical.setAttribute("aria-pressed", String(charts.gantt.showCritical));
    charts.gantt.drawSoon();
  });
  handlers.drawn(charts, viewport, report);
}

/** @param {number} count */
function rankLegend(count) {
  const shown = count <= 8 ? [...Array(count).keys()] : [0, Math.floor(count / 3), Math.floor((2 * count) / 3), count - 1];
  return shown.map((rank) => h("span", {}, h("i", { style: { background: rankColor(rank, count) } }), `rank ${rank}`));
}

/** The same as the chart, for those who read rather than look. @param {any} timeline */
function spansTable(timeline) {
  const details = h("details", { class: "table-alternative" }, h("summary", {}, "The timeline as a table"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    const count = Math.min(timeline.rank.length, MAX_ROWS);
    const rows = Array.from({ length: count }, (_, at) => h("tr", {},
      h("td", { class: "num" }, String(timeline.rank[at])), h("td", {}, timeline.lanes[timeline.lane[at]]),
      h("td", { class: "mono" }, `${timeline.stage[at]}${timeline.kinds[timeline.kind[at]]}${timeline.microbatch[at] >= 0 ? timeline.microbatch[at] : ""}`),
      h("td", { class: "num" }, format.seconds(timeline.start_s[at])), h("td", { class: "num" }, format.seconds(timeline.end_s[at])),
      h("td", { class: "num" }, format.seconds(timeline.end_s[at] - timeline.start_s[at]))));
    const rest = timeline.rank.length - count;
    details.append(h("div", { class: "scroll" }, h("table", {},
      h("caption", {}, rest > 0 ? `The first ${count} of ${timeline.rank.length} actions; the trace holds all.` : `${count} actions, by rank and start.`),
      h("thead", {}, h("tr", {}, ...["rank", "lane", "action", "start", "end", "duration"].map((name, at) => h("th", { scope: "col", class: at === 0 || at > 2 ? "num" : "" }, name)))),
      h("tbody", {}, ...rows))));
  }, { once: false });
  return details;
}

/** @param {any} plan */
function stagesCard(plan) {
  const { stages, schedule } = plan;
  const times = plan.prediction.stage_time_s; // of each stage, or of each rank
  const ranks = schedule.num_ranks;
  const layers = (/** @type {any} */ stage) => (stage.nodes ? stage.nodes.length : stage.layers[1] - stage.layers[0]);
  const rankOf = (/** @type {number} */ index) => schedule.placement.map((/** @type {number[]} */ row) => row[index]);
  const strip = h("div", { class: "strip", role: "img", "aria-label": `${plan.num_layers} layers on ${stages.length} stages` },
    ...stages.map((/** @type {any} */ stage, /** @type {number} */ index) => h("div", {
      title: `stage ${index}: ${layers(stage)} layers on rank ${rankOf(index)[0]}`,
      style: { "flex-grow": layers(stage), "flex-basis": 0, background: rankTint(rankOf(index)[0], ranks) },
    }, stages.length <= 40 ? String(layers(stage)) : "")));
  const rows = stages.map((/** @type {any} */ stage, /** @type {number} */ index) => {
    const levels = recomputeText(stage.recompute);
    const { degrees } = stage;
    return h("tr", {},
      h("td", { class: "num" }, String(index)), h("td", { class: "num" }, rankOf(index).join(", ")),
      h("td", {}, stage.nodes ? `${stage.nodes.length} nodes` : `${stage.layers[0]}–${stage.layers[1] - 1}`),
      h("td", { class: "num" }, String(layers(stage))),
      h("td", { class: "mono" }, `${degrees.dp} × ${degrees.tp}${degrees.cp > 1 ? ` × ${degrees.cp}` : ""}`),
      h("td", { class: "num" }, format.seconds(times[times.length === stages.length ? index : rankOf(index)[0]])),
      h("td", {}, levels));
  });
  const anyContext = stages.some((/** @type {any} */ stage) => stage.degrees.cp > 1);
  const heads = [["stage", 1], ["rank", 1], ["layers", 0], ["count", 1], [anyContext ? "dp × tp × cp" : "dp × tp", 0], ["time", 1], ["recompute", 0]];
  return h("div", { class: "card", id: "stages" }, h("h3", {}, "Stages"), strip,
    h("p", { class: "strip-caption" }, h("span", {}, `${plan.num_layers} layers in model order`), h("span", {}, "coloured by rank")),
    h("div", { class: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, ...heads.map(([name, right]) => h("th", { scope: "col", class: right ? "num" : "" }, name)))), h("tbody", {}, ...rows))));
}

/** How many layers recompute at each level. @param {{level: string, count: number}[]} runs */
function recomputeText(runs) {
  const counts = new Map();
  for (const { level, count } of runs) counts.set(level, (counts.get(level) || 0) + count);
  if (counts.size <= 1) return [...counts.keys()][0] || "none";
  return [...counts].map(([level, count]) => `${count} ${level}`).join(", ");
}

/** @param {any} plan */
function memoryCard(plan) {
  const { memory, peak_memory_bytes: peaks } = plan.prediction;
  const limits = peaks.map((/** @type {number} */ _, /** @type {number} */ rank) => limitOf(plan, rank));
  const widest = Math.max(...peaks, ...limits);
  const present = ITEMS.filter(([name]) => memory.some((/** @type {any} */ items) => items[name] > 0));
  const bars = memory.slice(0, 64).flatMap((/** @type {any} */ items, /** @type {number} */ rank) => [
    h("span", { class: "quiet" }, `rank ${rank}`),
    h("div", { class: "bar", role: "img", "aria-label": present.map(([name]) => `${name.replace("_", " ")} ${format.bytes(items[name])}`).join(", "), title: present.map(([name]) => `${name.replace("_", " ")}: ${format.bytes(items[name])}`).join("\n") },
      ...present.map(([name, color]) => h("i", { style: { width: `${(items[name] / widest) * 100}%`, background: color } })),
      h("span", { class: "limit", style: { left: `calc(${(limits[rank] / widest) * 100}% - 2px)` } })),
    h("span", {}, format.bytes(peaks[rank])),
  ]);
  return h("div", { class: "card", id: "breakdown" }, h("h3", {}, "Peak memory by item"), h("div", { class: "scroll" }, h("div", { class: "bars" }, ...bars)),
    h("div", { class: "legend swatches" }, ...present.map(([name, color]) => h("span", {}, h("i", { style: { background: color } }), name.replace("_", " ")))));
}

/** @param {any[]} plans @param {number} chosen @param {(index: number) => void} choose */
function alternativesTable(plans, chosen, choose) {
  const best = plans[0].plan.prediction.step_time_s;
  const rows = plans.map(({ plan, summary }, index) => {
    const { prediction, schedule, stages } = plan;
    const { degrees } = stages[0];
    const peak = Math.max(...prediction.peak_memory_bytes);
    return h("tr", { class: `choice ${index === chosen ? "chosen" : ""}`, onclick: () => choose(index) },
      h("td", {}, h("button", { type: "button", "aria-current": index === chosen ? "true" : null, title: summary }, index === 0 ? "the plan" : `alternative ${index}`)),
      h("td", { class: "num" }, format.seconds(prediction.step_time_s)), h("td", { class: "num" }, index === 0 ? "" : `+${format.percent(prediction.step_time_s / best - 1, 2)}`),
      ...[schedule.num_ranks, degrees.dp, degrees.tp, degrees.cp, degrees.ep, degrees.zero, schedule.microbatch].map((value) => h("td", { class: "num" }, String(value))),
      h("td", {}, `${schedule.name}${schedule.num_chunks > 1 ? ` ×${schedule.num_chunks}` : ""}`),
      h("td", { class: "num" }, prediction.mfu === null ? "–" : format.percent(prediction.mfu)), h("td", { class: "num" }, format.percent(prediction.bubble_over_total)), h("td", { class: "num" }, format.bytes(peak)));
  });
  const heads = [["", 0], ["step", 1], ["", 1], ["pp", 1], ["dp", 1], ["tp", 1], ["cp", 1], ["ep", 1], ["zero", 1], ["mb", 1], ["schedule", 0], ["MFU", 1], ["bubble", 1], ["peak memory", 1]];
  return [h("h3", {}, "Alternatives"), h("div", { class: "scroll" }, h("table", { id: "alternatives" },
    h("thead", {}, h("tr", {}, ...heads.map(([name, right]) => h("th", { scope: "col", class: right ? "num" : "" }, name)))), h("tbody", {}, ...rows)))];
}

/** @param {HTMLElement} place @param {any} outcome @param {any} request @param {any} handlers */
function showDiagnosis(place, outcome, request, handlers) {
  const { diagnosis } = outcome;
  const card = h("div", { class: "card diagnosis", id: "diagnosis" },
    h("p", { class: "verdict" }, h("span", { class: "badge bad" }, "infeasible"), h("span", {}, `Binding: ${diagnosis.binding}. ${format.count(outcome.candidates)} candidates, ${format.seconds(outcome.wall_s)}.`)),
    h("p", {}, `${diagnosis.message.charAt(0).toUpperCase()}${diagnosis.message.slice(1)}.`),
    diagnosis.relaxations.length ? h("div", {}, h("h3", {}, "What would fit"), h("ul", {}, ...diagnosis.relaxations.map((/** @type {any} */ entry) => h("li", {}, entry.change + (entry.step_time_s ? ` (${format.seconds(entry.step_time_s)} a step)` : ""))))) : null);
  place.replaceChildren(card, ...(diagnosis.nearest ? [h("div", { class: "two" }, memoryCard(diagnosis.nearest), stagesCard(diagnosis.nearest))] : []));
  handlers.shown(diagnosis.nearest, -1);
}
