// Why: keeps the overview true to the controller's pictures. Text reaches the page as textContent only, never as markup.
"use strict";

const state = {};
const GOOD = new Set(["HEALTHY", "COMPLETED", "RUNNING", "verified"]);
const ENDED = new Set(["COMPLETED", "FAILED", "CANCELLED"]);
const BAD = new Set(["QUARANTINED", "FAILED", "revoked", "suspect", "SUSPECT"]);

function byId(id) { return document.getElementById(id); }

function made(name, text, className) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text === null ? "-" : String(text);
  if (className) element.className = className;
  return element;
}

function chip(text) {
  const tone = GOOD.has(text) ? "good" : BAD.has(text) ? "bad" : "wait";
  const sign = tone === "good" ? "✓ " : tone === "bad" ? "✗ " : "… ";
  return made("span", sign + text, "chip " + tone);
}

function row(cells) {
  const line = made("tr");
  for (const cell of cells) {
    const box = made("td");
    if (cell instanceof Node) box.append(cell); else box.textContent = cell === null || cell === undefined ? "-" : String(cell);
    line.append(box);
  }
  return line;
}

function rows(id, entries, empty) {
  byId(id).replaceChildren(...(entries.length ? entries : [row([empty])]));
}

function facts(id, pairs) {
  byId(id).replaceChildren(...pairs.map(([name, value]) => {
    const box = made("div");
    box.append(made("dt", name), value instanceof Node ? wrapped(value) : made("dd", value === undefined ? null : value));
    return box;
  }));
}

function wrapped(node) { const box = made("dd"); box.append(node); return box; }

function duration(value) {
  if (typeof value !== "number") return "-";
  return value < 1 ? Math.round(value * 1000) + " ms" : value.toFixed(2) + " s";
}

function drawJob() {
  const job = state.job || {}, curve = state.curve || [];
  if (!job.job) return;
  byId("job-title").textContent = job.job;
  document.title = job.job + " - Assay";
  facts("job", [
    ["State", chip(String(job.status))],
    ["Committed", job.committed_steps + " of " + job.steps],
    ["Generation", job.generation],
    ["Ranks", job.world],
    ["Loss", curve.length && curve[curve.length - 1][1] !== null ? curve[curve.length - 1][1].toFixed(4) : null],
    ["Incidents", (state.incidents || []).length],
  ]);
  byId("why").textContent = job.reason || "";
  const lost = (job.lost_coverage || []).map((entry) => made("li", "✗ " + entry.text));
  byId("lost").replaceChildren(...lost);
  byId("lost").hidden = !lost.length;
  byId("progress").max = job.steps || 1;
  byId("progress").value = job.committed_steps || 0;
  const marks = (state.incidents || []).map((i) => i.detected_step).filter((s) => s !== null);
  drawCurve(byId("curve"), byId("curve-text"), curve, job.steps, marks);
  rows("generations", (job.generations || []).map((g) => row(
    [g.generation, g.first_step === null ? "-" : g.first_step + " to " + g.last_step, g.resumed_from, g.reason],
  )), "none yet");
}

function drawIncident(incident) {
  const card = made("article", undefined, "incident");
  const title = made("h3"), link = made("a", incident.kind + (incident.node ? " on " + incident.node : ""));
  link.href = "/incidents/" + encodeURIComponent(incident.id);
  title.append(link, " ", made("span", incident.caught === false ? "✗ escaped" : incident.verdict ||
    (incident.recovery_s === null ? "… open" : "✓ recovered"),
    "chip " + (incident.caught === false ? "bad" : incident.recovery_s === null ? "wait" : "good")));
  card.append(title, made("p", "step " + (incident.detected_step === null ? "-" : incident.detected_step) +
    ", detected after " + duration(incident.detect_s) + ", recovered after " + duration(incident.recovery_s) +
    (incident.resumed_from ? ", resumed from " + incident.resumed_from : "")));
  const list = made("ol", undefined, "timeline"), entries = incident.timeline || [];
  for (const entry of entries) {
    const item = made("li");
    item.append(made("span", "+" + (entry.time - entries[0].time).toFixed(3) + " s", "when"), made("span", entry.text));
    list.append(item);
  }
  card.append(list);
  return card;
}

function drawIncidents() {
  const cards = (state.incidents || []).map(drawIncident).reverse();
  byId("incidents").replaceChildren(...(cards.length ? cards : [made("p", "None.")]));
}

function drawNodes() {
  const generation = (state.job || {}).generation;
  const holds = (name) => (state.placement || []).filter((p) => p.node === name && p.generation === generation)
    .map((p) => "rank " + p.rank).join(", ");
  rows("nodes", (state.nodes || []).map((n) => {
    const name = n.node === undefined ? n.name : n.node;
    return row([name, chip(String(n.state)), holds(name) || (n.spare ? "spare" : "-"), doubts(n), n.reason || n.why || ""]);
  }), "none yet");
}

function counted(count, name) { return count ? count + " " + name + (count === 1 ? "" : "s") : ""; }

// How far each device of a node is doubted, and on what evidence.
function doubts(node) {
  const box = made("span");
  for (const s of node.suspicion || []) {
    const told = [counted(s.faults, "fault"), counted(s.undecided, "undecided alarm"), counted(s.false_alarms, "false alarm")];
    if (s.last_at !== null) told.push("last " + new Date(s.last_at * 1000).toLocaleString());
    const line = made("div", s.mean.toFixed(3));
    line.title = s.device + (s.serial ? ", serial " + s.serial : "");
    if (s.last_at !== null) line.append(made("div", told.filter(Boolean).join(", "), "small"));
    box.append(line);
  }
  return box;
}

function drawCheckpoints() {
  rows("checkpoints", (state.checkpoints || []).slice().reverse().map((c) => row(
    [c.step, chip(String(c.trust)), c.bytes === null ? "-" : (c.bytes / 1048576).toFixed(1) + " MiB",
      made("span", c.digest, "digest")],
  )), "none yet");
}

function draw() { drawJob(); drawIncidents(); drawNodes(); drawCheckpoints(); }

function take(delta, whole) {
  if (whole) for (const key of Object.keys(state)) delete state[key];
  for (const [key, value] of Object.entries(delta)) if (value === null) delete state[key]; else state[key] = value;
  draw();
}

function link(text, tone) { byId("link").textContent = text; byId("link").className = "chip " + tone; }

// The browser reconnects by itself and sends the Last-Event-ID.
const source = new EventSource("/events");
source.addEventListener("picture", (event) => take(JSON.parse(event.data), true));
source.addEventListener("delta", (event) => take(JSON.parse(event.data), false));
source.addEventListener("open", () => link("✓ live", "good"));
source.addEventListener("error", () => link(ENDED.has((state.job || {}).status)
  ? "… not connected: the controller has ended with the run"
  : "… not connected: the controller is away, training goes on", "wait"));
addEventListener("resize", drawJob);
