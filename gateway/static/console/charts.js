// Charts of the last minutes: tokens per second, time to first token, inter-token latency.

import { h, list, options, setHidden, setText } from "./dom.js";
import { duration, minute, rate } from "./format.js";
import { t } from "./i18n.js";
import { side } from "./words.js";

const KEPT_SECONDS = 300;
const HEIGHT = 170;
const CHARTS = [
  { name: "tokens", figures: ["tokens"], format: rate },
  { name: "first", figures: ["time_to_first_token_p50", "time_to_first_token_p95"], format: duration },
  { name: "gap", figures: ["inter_token_latency_p50", "inter_token_latency_p95"], format: duration },
];

export class Charts {
  constructor(stream) {
    this.select = h("select", { id: "chart-tier", on: { change: () => stream.choose(this.select.value === "" ? null : this.select.value.slice(1)) } });
    this.charts = CHARTS.map((kind) => new Chart(kind));
    this.node = h("section", { "aria-labelledby": "h-charts" },
      h("div", { class: "head" }, h("h2", { id: "h-charts", text: t("charts") }),
        h("label", { for: "chart-tier", class: "visually-hidden", text: t("charts.tier") }), this.select),
      h("div", { class: "charts" }, ...this.charts.map((chart) => chart.node)),
      h("p", { class: "muted small", text: t("charts.note") }));
  }

  update({ status, series }) {
    options(this.select, [["", t("charts.all")], ...Object.keys(status.tiers).map((name) => [`.${name}`, name])]);
    for (const chart of this.charts) chart.update(status, series);
  }
}

class Chart {
  constructor(kind) {
    this.kind = kind;
    this.plot = null;
    this.area = h("div", { class: "plot", role: "img" });
    this.empty = h("p", { class: "empty", text: t("charts.empty") });
    this.legend = h("ul", { class: "legend" });
    this.node = h("figure", { class: "card chart" }, h("figcaption", { text: t(`figure.${kind.name}`) }), this.area, this.empty, this.legend);
    new ResizeObserver(() => this.plot?.setSize({ width: this.area.clientWidth, height: HEIGHT })).observe(this.area);
    addEventListener("themechange", () => this.drop());
  }

  drop() {
    this.plot?.destroy();
    this.plot = null;
    this.drawn = null;
  }

  update(status, series) {
    const backends = series ? Object.keys(series.backends) : [];
    const last = series?.at.at(-1) ?? null;
    const signature = JSON.stringify([series?.tier, backends, this.area.clientWidth > 0]);
    if (signature !== this.signature) {
      this.drop();
      this.signature = signature;
    }
    const has = backends.some((name) => this.kind.figures.some((figure) => series.backends[name][figure]?.some((value) => value)));
    setHidden(this.empty, has);
    setHidden(this.area, !has);
    list(this.legend, has ? backends : [], (name) => name, (name) => new LegendItem(name), (item, name) => item.update(status, name, this.kind, series.backends[name]));
    this.area.setAttribute("aria-label", has ? this.summary(series, backends) : "");
    if (!has || (this.plot && this.drawn === last) || this.area.clientWidth === 0) return;
    const data = this.data(series, backends);
    this.drawn = last;
    if (this.plot) this.plot.setData(data);
    else this.plot = new uPlot(this.options(status, backends), data, this.area);
  }

  /** Columns for uPlot. Where no samples were taken, a gap is left. */
  data(series, backends) {
    const names = backends.flatMap((backend) => this.kind.figures.map((figure) => series.backends[backend][figure] ?? []));
    const columns = [[], ...names.map(() => [])];
    series.at.forEach((at, index) => {
      const before = columns[0].at(-1);
      if (before !== undefined && at - before > 10) {
        columns[0].push(before + 2);
        for (const column of columns.slice(1)) column.push(null);
      }
      columns[0].push(at);
      names.forEach((values, place) => columns[place + 1].push(values[index] ?? null));
    });
    return columns;
  }

  options(status, backends) {
    const style = getComputedStyle(this.node);
    const probe = (name) => {
      const node = h("span", { class: name });
      this.node.append(node);
      const { color } = getComputedStyle(node);
      node.remove();
      return color;
    };
    const axis = { stroke: probe("muted"), grid: { stroke: probe("grid"), width: 1 }, ticks: { show: false }, font: `12px ${style.fontFamily}` };
    const { format } = this.kind;
    return {
      width: this.area.clientWidth, height: HEIGHT, padding: [8, 18, 0, 0],
      legend: { show: false }, cursor: { show: false },
      scales: {
        x: { range: (plot, low, high) => [high - KEPT_SECONDS, high] },
        y: { range: (plot, low, high) => [0, Math.max(high * 1.15, 0.005)] },
      },
      axes: [
        { ...axis, space: 44, size: 28, incrs: [60, 120, 300], values: (plot, values) => values.map((value) => minute(value * 1000)) },
        { ...axis, size: 58, space: 36, values: (plot, values) => values.map((value) => format(value)) },
      ],
      series: [{}, ...backends.flatMap((backend) => this.kind.figures.map((figure, place) => ({
        stroke: probe(`stroke ${side(status, backend)}`), width: place === 0 ? 2 : 1.5, dash: place === 0 ? undefined : [5, 4], spanGaps: false, points: { size: 4 },
      })))],
    };
  }

  summary(series, backends) {
    const parts = backends.map((name) => `${name}: ${latest(this.kind, series.backends[name])}`);
    return `${t(`figure.${this.kind.name}`)}. ${parts.join(". ")}`;
  }
}

function latest(kind, figures) {
  return kind.figures.map((figure) => kind.format(figures[figure]?.at(-1))).join(" / ");
}

class LegendItem {
  constructor(name) {
    this.swatch = h("span", { "aria-hidden": "true" });
    this.value = h("strong");
    this.node = h("li", {}, this.swatch, h("span", { text: name }), this.value);
  }

  update(status, name, kind, figures) {
    this.swatch.setAttribute("class", `swatch ${side(status, name)}`);
    setText(this.value, latest(kind, figures));
  }
}
