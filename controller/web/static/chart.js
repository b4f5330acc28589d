// Why: draws the loss as one SVG line, with a mark at each incident's step, without any library.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const BOX = { left: 44, right: 10, top: 10, bottom: 22, height: 240 };

function svgNode(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  if (text !== undefined) made.textContent = text;
  return made;
}

// points: [[step, loss], ...] ascending; steps: the last step; marks: steps of incidents.
function drawCurve(svg, caption, points, steps, marks) {
  const clean = points.filter((p) => Array.isArray(p) && Number.isFinite(p[0]) && Number.isFinite(p[1]));
  svg.replaceChildren();
  if (!clean.length) {
    caption.textContent = "No step is committed yet.";
    return;
  }
  const losses = clean.map((p) => p[1]);
  const low = Math.min(...losses), high = Math.max(...losses), span = high - low || 1;
  // One unit is one pixel, so that labels keep their size on a narrow screen.
  const width = Math.max(svg.clientWidth, 240);
  svg.setAttribute("viewBox", "0 0 " + width + " " + BOX.height);
  const last = Math.max(steps || 0, clean[clean.length - 1][0], 2);
  const x = (step) => BOX.left + ((step - 1) / (last - 1)) * (width - BOX.left - BOX.right);
  const y = (loss) => BOX.top + ((high - loss) / span) * (BOX.height - BOX.top - BOX.bottom);
  for (const value of [high, (high + low) / 2, low]) {
    svg.append(svgNode("line", { class: "axis", x1: BOX.left, x2: width - BOX.right, y1: y(value), y2: y(value) }));
    svg.append(svgNode("text", { x: 4, y: y(value) + 4 }, value.toFixed(2)));
  }
  for (const step of [1, last]) {
    svg.append(svgNode("text", { x: x(step), y: BOX.height - 6, "text-anchor": step === 1 ? "start" : "end" }, step));
  }
  for (const step of marks.filter(Number.isFinite)) {
    svg.append(svgNode("line", { class: "mark", x1: x(step), x2: x(step), y1: BOX.top, y2: BOX.height - BOX.bottom }));
  }
  const path = clean.map((p, i) => (i ? "L" : "M") + x(p[0]).toFixed(1) + " " + y(p[1]).toFixed(1)).join("");
  svg.append(svgNode("path", { class: "curve", d: path }));
  const end = clean[clean.length - 1];
  caption.textContent = "Loss in nats a byte, " + clean[0][1].toFixed(3) + " at step " + clean[0][0] + ", " +
    end[1].toFixed(3) + " at step " + end[0] + (marks.length ? "; dashed lines are incidents." : ".");
}
