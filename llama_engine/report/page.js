"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const colours = data.colours;
const $ = (id) => document.getElementById(id);
const short = (x) => x === null ? "" : x >= 100 ? x.toLocaleString("en", {maximumFractionDigits: 0}) : String(+x.toPrecision(3));
const options = (select, entries) => {
  for (const [value, text] of entries) select.add(new Option(text, value));
};

// draws the intervals of the points behind them
const whiskers = {
  id: "whiskers",
  beforeDatasetsDraw(chart) {
    const {ctx, scales: {x, y}} = chart;
    chart.data.datasets.forEach((set, index) => {
      if (!chart.isDatasetVisible(index)) return;
      ctx.strokeStyle = set.borderColor;
      for (const point of set.data) {
        const line = (a, b, c, d) => { ctx.beginPath(); ctx.moveTo(a, b); ctx.lineTo(c, d); ctx.stroke(); };
        if (point.xs) line(x.getPixelForValue(point.xs[0]), y.getPixelForValue(point.y), x.getPixelForValue(point.xs[1]), y.getPixelForValue(point.y));
        if (point.ys) line(x.getPixelForValue(point.x), y.getPixelForValue(point.ys[0]), x.getPixelForValue(point.x), y.getPixelForValue(point.ys[1]));
      }
    });
  },
};
const axis = (text, type = "linear") => ({type, title: {display: true, text}, ticks: {callback: (x) => short(x)}});
const series = (key) => [...new Set(data.loads.map((load) => load.series))].map((name, index) => ({
  label: name, borderColor: colours[index % colours.length], loads: data.loads.filter((load) => load.series === name),
}));
const tip = (load) => [
  `${load.series}, ${load.load}: ${load.status}`,
  `${short(load.per_user)} [${load.per_user_ci.map(short).join(", ")}] tokens/s a user`,
  `${short(load.per_gpu)} [${load.per_gpu_ci.map(short).join(", ")}] tokens/s a ${data.unit}`,
  ...(load.joules ? [`${short(load.joules)} J a token`] : []),
  ...(load.dollars ? [`$${short(load.dollars)} [${load.dollars_ci.map(short).join(", ")}] per million tokens`] : []),
  ...load.why,
];

let tradeoff;
function drawTradeoff() {
  const key = $("against").value;
  const sets = series().map((set) => ({
    ...set,
    pointRadius: 5, pointHoverRadius: 8,
    pointBackgroundColor: set.loads.map((load) => load.status === "VALID" ? set.borderColor : "#fff"),
    data: set.loads.filter((load) => load[key]).map((load) => ({
      x: load.per_user, y: load[key], xs: load.per_user_ci, ys: load[`${key}_ci`], load,
    })),
  }));
  tradeoff?.destroy();
  tradeoff = new Chart($("tradeoff"), {
    type: "scatter", data: {datasets: sets}, plugins: [whiskers],
    options: {
      animation: false, maintainAspectRatio: false,
      scales: {x: axis("output tokens/s that one user sees (1 / TPOT p50)"), y: axis($("against").selectedOptions[0].text, "logarithmic")},
      plugins: {tooltip: {callbacks: {label: (item) => tip(item.raw.load)}}},
    },
  });
}

let spread;
function drawSpread() {
  const key = $("metric").value;
  const sets = data.loads.filter((load) => load.quantiles[key]).map((load, index) => ({
    label: `${load.series}, ${load.load}${load.status === "VALID" ? "" : " (INVALID)"}`,
    borderColor: `hsl(${(index * 47) % 360} 65% 42%)`, borderDash: load.status === "VALID" ? [] : [5, 4],
    pointRadius: 0, borderWidth: 2, showLine: true, data: load.quantiles[key].map((x, percent) => ({x, y: percent})),
  }));
  spread?.destroy();
  spread = new Chart($("spread"), {
    type: "scatter", data: {datasets: sets},
    options: {
      animation: false, maintainAspectRatio: false, interaction: {mode: "nearest", axis: "y", intersect: false},
      scales: {x: axis($("metric").selectedOptions[0].text, "logarithmic"), y: {...axis("% of requests at most this"), min: 0, max: 100}},
      plugins: {tooltip: {callbacks: {label: (item) => `${item.dataset.label}: p${item.raw.y} ${short(item.raw.x)}`}}},
    },
  });
}

options($("against"), [["per_gpu", `output tokens/s of one ${data.unit}`],
  ...(data.loads.some((load) => load.joules) ? [["joules", "J per output token, board"]] : []),
  ...(data.loads.some((load) => load.dollars) ? [["dollars", "$ per million output tokens"]] : [])]);
options($("metric"), Object.entries(data.metrics));
$("against").onchange = drawTradeoff;
$("metric").onchange = drawSpread;
drawTradeoff();
drawSpread();
