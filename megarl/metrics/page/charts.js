// Line, band and stacked charts as inline SVG. One cursor is shared by all charts of the page.
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 50, right: 14, top: 8, bottom: 22 };

// Text always goes in as text nodes: nothing in a run can become markup.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const finite = (value) => typeof value === "number" && Number.isFinite(value);

function formatNumber(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e7) return value.toExponential(2).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(4)));
}

function formatBytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${Number(value.toPrecision(3))} ${units[unit]}`;
}

function formatValue(value, unit) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;  // NaN, Infinity: kept as text
  if (unit === "percent") return `${Number((value * 100).toPrecision(3))}%`;
  if (unit === "bytes") return formatBytes(value);
  if (unit === "seconds") return value > 0 && value < 0.1 ? (value < 1e-4 ? "<0.1 ms" : `${Number((value * 1e3).toPrecision(3))} ms`) : `${formatNumber(value)} s`;
  if (unit === "gib") return `${formatNumber(value)} GiB`;
  return formatNumber(value);
}

// Round tick positions that cover [low, high].
function linearTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function decadeTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.max(Math.ceil(Math.log10(high)), first + 1);
  const stride = Math.ceil((last - first) / 5);
  const ticks = [];
  for (let exponent = first; exponent < last + stride; exponent += stride) ticks.push(10 ** exponent);
  return ticks;
}

// Exponential moving average, corrected for its start; on a log axis the average of the logarithms.
function smooth(values, weight, logarithmic) {
  let mean = 0, mass = 0;
  return values.map((value) => {
    if (!finite(value) || (logarithmic && value <= 0)) return null;
    mean = weight * mean + (1 - weight) * (logarithmic ? Math.log(value) : value);
    mass = weight * mass + (1 - weight);
    return logarithmic ? Math.exp(mean / mass) : mean / mass;
  });
}

// "M x y L x y ..." through the points that exist; a gap of missing values is bridged.
function linePath(xs, values, x, y) {
  let path = "";
  values.forEach((value, i) => {
    if (finite(value)) path += `${path ? "L" : "M"}${x(xs[i]).toFixed(1)} ${y(value).toFixed(1)}`;
  });
  return path;
}

function areaPath(xs, lower, upper, x, y) {
  const there = xs.map((_, i) => i).filter((i) => finite(lower[i]) && finite(upper[i]));
  if (!there.length) return "";
  const point = (i, values) => `${x(xs[i]).toFixed(1)} ${y(values[i]).toFixed(1)}`;
  return `M${there.map((i) => point(i, upper)).join("L")}L${there.reverse().map((i) => point(i, lower)).join("L")}Z`;
}

// The text in both of a metric's places: its legend and the glossary.
const describe = (run, key) => {
  const glossary = run.glossary ?? {};
  const family = Object.keys(glossary).find((name) => name.endsWith("*") && key.startsWith(name.slice(0, -1)));
  return glossary[key] ?? glossary[family];
};

const DASHES = ["6 4", "2 3", "10 3 2 3"];  // of the runs that this one is compared with
let chartCount = 0;

// spec: {title, note, unit, log, zero, stack, limit, wide, band: {low, high}, series: [{key, label, color, dots, exact}]}
// dots: measured now and then, drawn as points; exact: not smoothed. run.xs are the steps' places on the x axis,
// run.view the part of it that is shown (null: all), run.best the best evaluation.
class Chart {
  constructor(spec, run) {
    this.spec = spec;
    this.run = run;
    this.id = `plot-${(chartCount += 1)}`;
    this.isLog = Boolean(spec.log);
    this.at = el("small", { class: "at" });
    this.legend = el("div", { class: "legend" });
    this.plot = el("div", { class: "plot", tabindex: "0", role: "img" });
    this.logButton = el("button", { class: "tiny", type: "button", "aria-pressed": String(this.isLog), title: "Logarithmic axis" }, "log");
    this.logButton.hidden = !this.canBeLog();
    this.node = el("figure", { class: spec.wide ? "chart wide" : "chart" },
      el("h4", {}, spec.title, spec.note ? el("small", {}, spec.note) : null, this.at, this.logButton), this.legend, this.plot);
    this.readouts = spec.series.map((series) => {
      const value = el("b");
      const swatch = el("i");
      swatch.style.background = `var(${series.color})`;
      const meaning = describe(run, series.key);
      this.legend.append(el("span", meaning ? { class: "term", title: `${series.key}: ${meaning}` } : {}, swatch, series.label, value));
      return value;
    });
    if (spec.series.some((series) => series.key === run.best?.metric)) {
      this.legend.append(el("span", { class: "best-text" }, `best ${formatValue(run.best.value, spec.unit)} at step ${run.best.step}`));
    }
    const first = spec.series[0];
    const shown = run.series[first.key].filter((value) => value !== null);
    this.plot.setAttribute("aria-label",
      `${spec.title}: ${first.label} from ${formatValue(shown[0], spec.unit)} to ${formatValue(shown.at(-1), spec.unit)}`);
  }

  // A log axis needs values of more than one magnitude, all positive.
  canBeLog() {
    if (this.spec.stack || this.spec.unit === "percent") return false;
    const values = this.spec.series.flatMap((series) => this.run.series[series.key]).filter((v) => finite(v) && v !== 0);
    return values.length > 1 && values.every((v) => v > 0) && Math.max(...values) > 3 * Math.min(...values);
  }

  toggleLog() {
    this.isLog = !this.isLog;
    this.logButton.setAttribute("aria-pressed", String(this.isLog));
  }

  widen() {
    this.spec.wide = true;
    this.node.classList.add("wide");
  }

  get height() { return this.spec.wide ? 220 : 180; }

  draw(weight) {
    const { spec, run } = this;
    const width = this.plot.clientWidth;
    if (!width) return;
    const xs = run.xs;
    const others = spec.stack ? [] : run.others;
    const lines = spec.series.map((series) => run.series[series.key]);
    const smoothed = lines.map((values, i) => (spec.series[i].exact ? values : smooth(values, weight, this.isLog)));
    let areas = spec.band ? [[run.series[spec.band.low], run.series[spec.band.high]]] : [];
    if (spec.stack) {
      let below = xs.map(() => 0);
      areas = smoothed.map((values) => {
        const above = below.map((base, i) => (values[i] === null ? null : base + values[i]));
        const area = [below, above];
        below = above.map((value, i) => value ?? below[i]);  // a phase that a step lacks takes no room
        return area;
      });
    }
    const columns = (spec.stack ? areas.flat() : [...lines, ...areas.flat()]).map((values) => [xs, values]);
    for (const other of others) for (const { key } of spec.series) if (other.series[key]) columns.push([other.xs, other.series[key]]);
    const { x, y, ticksX, ticksY } = this.scales(width, columns);
    const root = svg("svg", { height: this.height, viewBox: `0 0 ${width} ${this.height}` });
    this.drawAxes(root, width, x, y, ticksX, ticksY);
    const clip = svg("clipPath", { id: this.id });
    clip.append(svg("rect", { x: MARGIN.left - 8, y: 0, width: Math.max(width - MARGIN.left - MARGIN.right + 16, 0), height: this.height }));
    const body = svg("g", { "clip-path": `url(#${this.id})` });
    root.append(clip, body);
    areas.forEach(([low, high], i) => {
      const color = spec.series[spec.stack ? i : 0].color;
      body.append(svg("path", { d: areaPath(xs, low, high, x, y), fill: `var(${color})`, "fill-opacity": spec.stack ? 0.8 : 0.13 }));
    });
    if (!spec.stack) {
      lines.forEach((values, i) => this.drawLine(body, spec.series[i], values, smoothed[i], weight, x, y));
    }
    others.forEach((other, n) => spec.series.forEach((series) => {
      if (!other.series[series.key]) return;
      const values = other.series[series.key].map((v) => (this.isLog && !(v > 0) ? null : v));
      const shown = series.exact || weight === 0 ? values : smooth(values, weight, this.isLog);
      body.append(svg("path", { d: linePath(other.xs, shown, x, y), fill: "none", stroke: `var(${series.color})`, "stroke-width": 1.6, "stroke-dasharray": DASHES[n % DASHES.length], class: "other" }));
    }));
    this.drawBest(body, x, y);
    this.overlay = svg("g", {});
    body.append(this.overlay);
    this.x = x;
    this.y = y;
    this.plot.replaceChildren(root);
    this.point(null);
  }

  drawLine(root, series, values, smoothed, weight, x, y) {
    const color = `var(${series.color})`;
    const xs = this.run.xs;
    const shown = this.isLog ? values.map((v) => (finite(v) && v > 0 ? v : null)) : values;
    const line = (d, width, opacity) => svg("path", {
      d, fill: "none", stroke: color, "stroke-width": width, "stroke-opacity": opacity, "stroke-linejoin": "round" });
    const raw = weight > 0 && !series.exact;
    root.append(line(linePath(xs, shown, x, y), raw ? 1 : 1.8, raw ? 0.32 : 1));
    if (raw) root.append(line(linePath(xs, smoothed, x, y), 2, 1));
    if (series.dots || shown.filter(finite).length === 1) {
      const radius = shown.filter(finite).length > 40 ? 1.8 : 3;
      shown.forEach((value, i) => {
        if (finite(value)) root.append(svg("circle", { cx: x(xs[i]), cy: y(value), r: radius, fill: color }));
      });
    }
  }

  // A ring around the best evaluation.
  drawBest(root, x, y) {
    const best = this.run.best;
    const series = this.spec.series.find((each) => each.key === best?.metric);
    const i = series ? this.run.steps.indexOf(best.step) : -1;
    if (i < 0 || (this.isLog && best.value <= 0)) return;
    const [cx, cy] = [x(this.run.xs[i]), y(best.value)];
    root.append(svg("circle", { cx, cy, r: 6.5, fill: "none", stroke: `var(${series.color})`, "stroke-width": 1.5, class: "best" }));
  }

  scales(width, columns) {
    const { spec, run, isLog } = this;
    const [first, last] = shownRange(run);
    let low = Infinity, high = -Infinity;
    for (const [xs, column] of columns) {
      column.forEach((value, i) => {
        if (!finite(value) || (isLog && value <= 0) || xs[i] < first || xs[i] > last) return;
        low = Math.min(low, value);
        high = Math.max(high, value);
      });
    }
    if (low > high) { low = isLog ? 1e-6 : 0; high = 1; }
    if (isLog && spec.limit) { low = Math.min(low, spec.limit); high = Math.max(high, spec.limit); }
    if (!isLog && (spec.zero || spec.stack)) low = Math.min(low, 0);
    if (low === high) { const pad = Math.abs(low) * 0.1 || 1; if (!spec.zero) low -= isLog ? 0 : pad; high += pad; }
    const ticksY = isLog ? decadeTicks(low, high) : linearTicks(low, high, 4);
    const [bottom, top] = [ticksY[0], ticksY.at(-1)];
    const inner = { w: width - MARGIN.left - MARGIN.right, h: this.height - MARGIN.top - MARGIN.bottom };
    const share = isLog
      ? (value) => Math.log(Math.max(value, bottom) / bottom) / Math.log(top / bottom)
      : (value) => (value - bottom) / (top - bottom);
    const ticksX = linearTicks(first, last, Math.max(2, Math.floor(inner.w / 90)))
      .filter((tick) => tick >= first && tick <= last && (run.axis !== "steps" || Number.isInteger(tick)));
    return {
      x: (place) => MARGIN.left + ((place - first) / (last - first)) * inner.w,
      y: (value) => MARGIN.top + (1 - share(value)) * inner.h,
      ticksX, ticksY,
    };
  }

  drawAxes(root, width, x, y, ticksX, ticksY) {
    const right = width - MARGIN.right, bottom = this.height - MARGIN.bottom;
    for (const tick of ticksY) {
      if (this.spec.unit === "bytes" && tick % 1) continue;
      const level = y(tick);
      root.append(svg("line", { x1: MARGIN.left, x2: right, y1: level, y2: level, class: "gridline" }));
      const text = this.isLog ? tick.toExponential(0).replace("e+", "e") : formatValue(tick, this.spec.unit);
      root.append(svg("text", { x: MARGIN.left - 7, y: level + 4, "text-anchor": "end" }, text));
    }
    root.append(svg("line", { x1: MARGIN.left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
    for (const tick of ticksX) {
      root.append(svg("text", { x: x(tick), y: this.height - 5, "text-anchor": "middle" }, formatTick(tick)));
    }
    if (this.spec.limit) {
      const level = y(this.spec.limit);
      root.append(svg("line", { x1: MARGIN.left, x2: right, y1: level, y2: level, class: "limit" }));
      root.append(svg("text", { x: right, y: level - 5, "text-anchor": "end", class: "limit-text" }, `limit ${formatNumber(this.spec.limit)}`));
    }
  }

  // Show the values at index i of the steps; null is the last step, without a cursor.
  point(i) {
    const { spec, run } = this;
    if (!this.overlay) return;
    this.overlay.replaceChildren();
    const index = i ?? run.steps.length - 1;
    this.at.textContent = i === null ? "" : `step ${run.steps[index].toLocaleString("en-US")}`;
    if (i !== null) {
      const cx = this.x(run.xs[index]);
      this.overlay.append(svg("line", { x1: cx, x2: cx, y1: MARGIN.top, y2: this.height - MARGIN.bottom, class: "cursor" }));
    }
    spec.series.forEach((series, n) => {
      const values = run.series[series.key];
      let from = index;  // a value measured now and then stands until the next one
      if (series.dots || i === null) while (from > 0 && values[from] === null) from -= 1;
      const value = values[from];
      const earlier = from !== index && value !== null ? ` (step ${run.steps[from]})` : "";
      const elsewhere = spec.stack ? "" : run.others.map((other) => valueNear(other, series.key, run.xs[index])).map((found) => (found === null ? "" : ` / ${formatValue(found, spec.unit)}`)).join("");
      this.readouts[n].textContent = formatValue(value, spec.unit) + earlier + elsewhere;
      if (i !== null && !spec.stack && finite(value) && !(this.isLog && value <= 0)) {
        this.overlay.append(svg("circle", { cx: this.x(run.xs[from]), cy: this.y(value), r: 3.5, fill: `var(${series.color})` }));
      }
    });
  }

  // The place on the x axis under a horizontal position of the pointer.
  placeAt(clientX) {
    const box = this.plot.getBoundingClientRect();
    const [first, last] = shownRange(this.run);
    const share = (clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
    return first + Math.min(Math.max(share, 0), 1) * (last - first);
  }

  // Index of the step nearest to it.
  indexAt(clientX) {
    const xs = this.run.xs, place = this.placeAt(clientX);
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= place) low = middle; else high = middle;
    }
    return place - xs[low] <= xs[high] - place ? low : high;
  }

  // Shade what a drag has marked, null: nothing.
  mark(from, to) {
    this.marked?.remove();
    this.marked = null;
    if (from === null) return;
    const [left, right] = [this.x(Math.min(from, to)), this.x(Math.max(from, to))];
    this.marked = svg("rect", { x: left, y: MARGIN.top, width: right - left, height: this.height - MARGIN.top - MARGIN.bottom, class: "marked" });
    this.plot.firstChild.append(this.marked);
  }
}

// The last value of another run at or before a place on the x axis, null: none.
function valueNear(other, key, place) {
  const values = other.series[key];
  if (!values) return null;
  for (let i = other.xs.length - 1; i >= 0; i -= 1) if (other.xs[i] <= place && values[i] !== null) return values[i];
  return null;
}

// The part of the x axis that is drawn.
function shownRange(run) {
  const ends = [run, ...run.others].filter((each) => each.xs.length);
  const first = Math.min(...ends.map((each) => each.xs[0])), last = Math.max(...ends.map((each) => each.xs.at(-1)));
  if (run.view) return run.view;
  return [first, last > first ? last : first + 1];
}

function formatTick(tick) {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (tick >= size) return `${Number((tick / (unit === "k" ? 1e3 : size)).toPrecision(4))}${unit}`;
  }
  return tick.toLocaleString("en-US");
}
