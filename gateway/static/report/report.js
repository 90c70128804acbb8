// Draws the charts of a report with uPlot from the JSON in #data. Colours follow the page's.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const tones = ["--a", "--b", "--c", "--d", "--e", "--f"];
  const plots = [];

  const format = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const digits = size >= 100 || value === Math.round(value) ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
    return value.toLocaleString(data.locale, { minimumFractionDigits: digits, maximumFractionDigits: digits });
  };

  // Ticks of an axis have the decimals of their step; on a logarithmic axis it is not constant.
  const tick = (value, step) => {
    if (step === null) return value.toLocaleString(data.locale, { maximumFractionDigits: 6 });
    let digits = 0;
    while (step > 0 && digits < 6 && Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) > 1e-6) digits++;
    return value.toLocaleString(data.locale, { minimumFractionDigits: digits, maximumFractionDigits: digits });
  };

  const axis = (label, side, log) => ({
    label, labelSize: 20, labelGap: 2, labelFont: "12px system-ui, sans-serif", font: "12px system-ui, sans-serif",
    stroke: () => colour("--soft"), grid: { stroke: () => colour("--grid"), width: 1 }, ticks: { stroke: () => colour("--grid"), width: 1, size: 4 },
    size: side ? (self, values) => Math.max(40, 14 + 7 * Math.max(0, ...(values || []).map((text) => (text || "").length))) : 34,
    values: (self, splits, place, space, step) => splits.map((value) => (value === null ? "" : tick(value, log ? null : step))),
  });

  function series(chart, one) {
    const stroke = () => colour(tones[one.tone % tones.length]);
    const base = { label: one.name, stroke, spanGaps: true, value: (self, value) => format(value) };
    if (chart.form === "points") return { ...base, paths: () => null, points: { show: true, size: 6, width: 1.25, fill: (self, i) => stroke() + "55", stroke } };
    const paths = chart.form === "steps" ? uPlot.paths.stepped({ align: 1 }) : uPlot.paths.linear();
    return { ...base, width: 2, paths, points: { show: false }, dash: one.kind === "forecast" ? [4, 4] : one.kind === "computed" ? [8, 4] : undefined };
  }

  function draw(chart, element) {
    const values = uPlot.join(chart.series.map((one) => [one.x, one.y]));
    const options = {
      width: element.clientWidth, height: 270, legend: { live: chart.form !== "points" }, cursor: { y: false, drag: { x: true, y: false } },
      scales: {
        x: { time: false, distr: chart.log ? 3 : 1 },
        y: { range: (self, low, high) => [0, chart.top || (high > 0 ? high * 1.08 : 1)] },
      },
      axes: [axis(chart.x, false, chart.log), axis(chart.y, true, false)],
      series: [{ label: chart.x, value: (self, value) => format(value) }, ...chart.series.map((one) => series(chart, one))],
    };
    const plot = new uPlot(options, values, element);
    plots.push([plot, element]);
  }

  for (const [id, chart] of Object.entries(data.charts)) draw(chart, document.getElementById(id));

  const resize = () => { for (const [plot, element] of plots) if (element.clientWidth && plot.width !== element.clientWidth) plot.setSize({ width: element.clientWidth, height: 270 }); };
  new ResizeObserver(resize).observe(document.body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { for (const [plot] of plots) plot.redraw(false, true); });
  document.documentElement.dataset.drawn = plots.length;
})();
