// Speeds, and their pictures.
import { $, speed, svg } from "./dom.js";

/** When each token came. TTFT = t1 - t0; speed = (N - n1) / (tN - t1), decode only. */
export class Meter {
  constructor() { this.start = performance.now(); this.points = []; }
  add(tokens) {
    if (tokens > (this.points.at(-1)?.tokens ?? 0)) this.points.push({ ms: performance.now() - this.start, tokens });
  }
  get tokens() { return this.points.at(-1)?.tokens ?? 0; }
  get ttft() { return this.points[0]?.ms ?? 0; }
  get total() { return this.points.at(-1)?.ms ?? 0; }
  get rate() { return Meter.between(this.points[0], this.points.at(-1)); }
  /** Tokens a second over a window of eight arrivals. */
  get rates() { return this.points.map((p, i) => [p.ms, Meter.between(this.points[Math.max(0, i - 8)], p)]).slice(4); }
  static between(a, b) { return a && b && b.ms > a.ms ? ((b.tokens - a.tokens) * 1000) / (b.ms - a.ms) : 0; }
}

/** A line of `[x, y]` points, both axes from zero, in the box `[left, top, right, bottom]`, with a dot at its end. */
function line(name, points, [left, top, right, bottom], maxX, maxY) {
  const at = points.map(([x, y]) => [left + (x / maxX) * (right - left), bottom - (y / maxY) * (bottom - top)]);
  const [cx, cy] = at.at(-1);
  return [svg("polyline", { class: name, points: at.join(" ") }), svg("circle", { class: name, cx, cy, r: 3 })];
}

export function sparkline(target, meter) {
  const rates = meter.rates;
  if (rates.length < 2) return;
  const [start, end] = [rates[0][0], rates.at(-1)[0]], top = Math.max(...rates.map(([, rate]) => rate));
  const points = rates.map(([ms, rate]) => [ms - start, rate]);
  target.replaceChildren(
    svg("path", { class: "axis", d: "M0 31.5H160" }), ...line("engine", points, [1, 3, 156, 31], end - start, top * 1.1),
  );
  target.setAttribute("role", "img");
  target.setAttribute("aria-label", `Speed over the answer, up to ${speed(top)} tokens a second`);
}

export function raceplot(lanes, goal) {
  const plot = $("plot"), { width, height } = plot.getBoundingClientRect();
  const maxX = Math.max(1000, ...lanes.map((lane) => lane.meter.total)) * 1.02;
  const box = [30, 18, width - 10, height - 18], [left, top, right, bottom] = box;
  plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
  plot.replaceChildren(
    svg("path", { class: "axis", d: `M${left} ${bottom}H${right}` }),
    svg("path", { class: "finish", d: `M${left} ${top}H${right}` }),
    svg("text", { x: left, y: top - 6 }, `finish line: ${goal} tokens`),
    ...[0, goal / 2].map((n) => svg("text", { x: 0, y: bottom - (n / goal) * (bottom - top) + 4 }, n)),
  );
  const step = [0.25, 0.5, 1, 2, 5, 10, 30, 60].find((s) => maxX / 1000 / s <= Math.max(3, width / 90)) ?? 120;
  for (let s = 0; s * 1000 <= maxX; s += step) {
    const x = left + ((s * 1000) / maxX) * (right - left);
    plot.append(svg("path", { class: "axis", d: `M${x} ${top}V${bottom}` }));
    if (x < right - 20) plot.append(svg("text", { x: x + 2, y: height - 4 }, `${s} s`));
  }
  for (const { kind, meter } of lanes)
    plot.append(...line(kind, [[0, 0], ...meter.points.map((p) => [p.ms, p.tokens])], box, maxX, goal));
}
