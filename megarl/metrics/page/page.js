// Which charts a run has, and the controls above them.
const SERIES_COLORS = ["--s0", "--s1", "--s2", "--s3", "--s4", "--s5"];
const PHASES = ["rollout", "reward", "logprobs", "train", "weights", "other"];
const MEMORY = ["parameters", "gradients", "optimizer", "reference", "merged", "critic", "activations", "other"];
const AXES = { steps: "Steps", samples: "Samples", tokens: "Tokens trained on", hours: "Hours" };
const HEADLINES = ["reward_mean", "accuracy", "loss", "validation_loss", "validation_accuracy"];  // drawn even if constant

// [section, [title, note, unit, {key: label}, options]...]; a chart is drawn when the run has one of its keys.
function chartPlan(limit) {
  return [
    ["Learning", [
      ["Reward", "mean ± standard deviation", "", { reward_mean: "mean" }, { band: { low: "reward_low", high: "reward_high" } }],
      ["Accuracy", "held-out", "percent", { accuracy: "accuracy" }, { zero: true, dots: true }],
      ["Loss", "", "", { loss: "training", validation_loss: "validation" }, { dots: ["validation_loss"] }],
      ["Preference accuracy", "pairs with a margin above 0", "percent",
        { reward_accuracy: "training", validation_accuracy: "held-out" }, { zero: true, dots: ["validation_accuracy"] }],
      ["Rewards", "of the two responses", "", { reward_chosen: "chosen", reward_rejected: "rejected" }, {}],
      ["Reward margin", "", "", { reward_margin: "training", validation_margin: "held-out" }, { dots: ["validation_margin"] }],
      ["Logprobs of responses", "summed", "", { logps_chosen: "chosen", logps_rejected: "rejected" }, {}],
      ["KL divergence", "", "", { kl_ref: "to reference", kl_policy: "old to current" }, {}],
      ["Entropy", "nats per token", "", { entropy: "entropy" }, {}],
      ["Response length", "tokens", "", { response_length_mean: "mean", response_length_max: "longest" }, { zero: true }],
      ["Responses and groups", "share", "percent",
        { truncated_fraction: "responses cut off", zero_std_groups_fraction: "groups without signal" }, { zero: true }],
    ]],
    ["Engine and trainer", [
      ["Logprob difference", "engine against trainer, per token", "",
        { logprob_abs_diff_max: "max", logprob_abs_diff_mean: "mean" }, { log: true, limit }],
      ["KL, engine to trainer", "", "", { kl_rollout_trainer: "KL" }, {}],
      ["Weights moved to the engine", "per step", "bytes", { weights_bytes_moved: "moved" }, { zero: true }],
    ]],
    ["Optimisation", [
      ["Gradient norm", "before clipping", "", { grad_norm: "norm" }, { zero: true }],
      ["Learning rate", "", "", { lr: "rate" }, { zero: true, exact: true }],
      ["Policy loss", "", "", { policy_loss: "loss" }, {}],
      ["Importance ratio", "", "", { ratio_mean: "mean", ratio_max: "max" }, {}],
      ["Clipped tokens", "share", "percent", { clip_fraction: "clipped" }, { zero: true }],
      ["Advantage", "", "", { advantage_mean: "mean" }, {}],
    ]],
    ["Speed", [
      ["Time per step", "seconds, by phase", "seconds", Object.fromEntries(PHASES.map((p) => [`seconds_${p}`, p])), { stack: true, wide: true, exact: true }],
      ["Throughput", "tokens per second", "", { tokens_per_second_rollout: "rollout", tokens_per_second_train: "training" }, { zero: true, exact: true }],
      ["Training compute", "TFLOP/s, all ranks", "", { train_tflops: "TFLOP/s" }, { zero: true, exact: true }],
      ["Model FLOPs utilisation", "training", "percent", { train_mfu: "MFU" }, { zero: true, exact: true }],
      ["Tokens per step", "", "", { num_tokens: "trained on", num_computed_tokens: "computed" }, { zero: true }],
    ]],
    ["Memory", [
      ["Trainer, by part", "rank 0, up to its peak", "gib", Object.fromEntries(MEMORY.map((name) => [`memory_${name}_gib`, name])), { stack: true, exact: true }],
      ["Peak", "rank 0", "gib", { peak_memory_gib: "memory" }, { zero: true, exact: true }],
      ["GPU memory", "after the step", "gib",
        { memory_allocated_gib: "trainer, in use", memory_reserved_gib: "trainer, reserved", memory_engine_allocated_gib: "engines" }, { zero: true, exact: true }],
      ["Engines", "their own", "gib", { memory_engine_parameters_gib: "parameters", memory_engine_kv_cache_gib: "KV cache" }, { zero: true, exact: true }],
      ["Resident memory", "by process, after the step", "gib",
        { memory_resident_gib: "trainer, rank 0", memory_engine_resident_gib: "engines", memory_environments_resident_gib: "environments" }, { zero: true, exact: true }],
    ]],
  ];
}

function addRewardBand(series) {
  const { reward_mean: mean, reward_std: std } = series;
  if (!mean || !std) return;
  const edge = (sign, bound) => mean.map((value, i) => {
    if (!finite(value) || !finite(std[i])) return null;
    const limit = series[bound]?.[i];  // a band beyond what was seen would be an invention
    const moved = value + sign * std[i];
    return finite(limit) ? (sign > 0 ? Math.min(moved, limit) : Math.max(moved, limit)) : moved;
  });
  series.reward_low = edge(-1, "reward_min");
  series.reward_high = edge(1, "reward_max");
}

const readable = (key) => key.replaceAll("_", " ").replace(/^./, (letter) => letter.toUpperCase());

// A series of one value, or one that repeats another, is a line of text rather than a chart.
class Folding {
  constructor(run) {
    this.run = run;
    this.drawn = [];  // [name, values]
    this.lines = [];
  }

  constant(key) {
    const values = this.run.series[key].filter((value) => value !== null);
    return values.length > 2 && values.every((value) => value === values[0]) ? values[0] : undefined;
  }

  // The name of a drawn series that this one equals, up to sign and rounding.
  double(key) {
    const values = this.run.series[key];
    if (values.filter(finite).length < 3) return undefined;
    for (const sign of [1, -1]) {
      const near = (a, b) => (a === null || b === null ? a === b : finite(a) && finite(b) && Math.abs(sign * a - b) <= 1e-6 * Math.max(Math.abs(a), Math.abs(b)));
      const twin = this.drawn.find(([, other]) => values.every((value, i) => near(other[i], value)));
      if (twin) return (sign < 0 ? "minus " : "") + twin[0];
    }
    return undefined;
  }

  // Whether a chart of these keys says nothing new; if so, it becomes a line.
  folds(title, keys, labels, unit) {
    if (keys.some((key) => HEADLINES.includes(key))) return false;
    const differs = (other, key) => other.series[key]?.some((value) => value !== null && value !== this.constant(key));
    if (this.run.others.some((other) => keys.some((key) => differs(other, key)))) return false;
    const names = keys.map((key) => (keys.length > 1 ? `${title}, ${labels[key]}` : title));
    const values = keys.map((key) => this.constant(key));
    if (values.every((value) => value !== undefined)) {
      keys.forEach((key, i) => this.lines.push([key, `${names[i]}: always ${formatValue(values[i], unit)}`]));
      return true;
    }
    const doubles = keys.map((key) => this.double(key));
    if (doubles.every((twin) => twin !== undefined)) {
      keys.forEach((key, i) => this.lines.push([key, `${names[i]}: equal to ${doubles[i]}`]));
      return true;
    }
    return false;
  }

  add(title, keys, labels) {
    for (const key of keys) this.drawn.push([keys.length > 1 ? `${title.toLowerCase()} (${labels[key]})` : title.toLowerCase(), this.run.series[key]]);
  }

  // What was folded since the last call, as an element; null: nothing.
  take() {
    if (!this.lines.length) return null;
    const items = this.lines.map(([key, text]) => {
      const meaning = describe(this.run, key);
      return el("li", meaning ? { class: "term", title: `${key}: ${meaning}` } : {}, text);
    });
    this.lines = [];
    return el("ul", { class: "folded", "aria-label": "Series without a chart" }, ...items);
  }
}

function buildCharts(run) {
  const charts = [];
  const folding = new Folding(run);
  const used = new Set(["reward_std", "reward_min", "reward_max", "seconds", "policy_version", "num_microbatches", "reward_low", "reward_high"]);
  const make = ([title, note, unit, keys, options]) => {
    for (const key of Object.keys(keys)) used.add(key);
    const present = Object.keys(keys).filter((key) => run.series[key]?.some((value) => (options.stack ? value : value !== null)));
    if (!present.length || (!options.stack && folding.folds(title, present, keys, unit))) return null;
    folding.add(title, present, keys);
    const band = options.band && run.series[options.band.low] ? options.band : null;
    const dotted = (key) => options.dots === true || Boolean(options.dots?.includes(key));
    const series = present.map((key, i) => ({
      key, label: keys[key], color: options.stack && PHASES.includes(keys[key]) ? `--s${PHASES.indexOf(keys[key])}` : SERIES_COLORS[i % SERIES_COLORS.length],
      dots: dotted(key), exact: dotted(key) || Boolean(options.exact),
    }));
    const chart = new Chart({ ...options, title, note: options.band && !band ? "mean" : note, unit, series, band }, run);
    charts.push(chart);
    return chart;
  };
  const host = document.getElementById("chart-sections");
  const section = (name, plans) => {
    const made = plans.map(make).filter((chart) => chart !== null);
    const folded = folding.take();
    if (made.length === 1) made[0].widen();
    if (!made.length && !folded) return;
    const grid = made.length ? el("div", { class: "grid" }, ...made.map((chart) => chart.node)) : null;
    const isOpen = name === "Learning" || !matchMedia("(max-width: 760px)").matches;
    host.append(el("details", { class: "section", open: isOpen ? "" : null }, el("summary", {}, name), ...[grid, folded].filter((node) => node !== null)));
  };
  for (const [name, plans] of chartPlan(run.difference_limit)) section(name, plans);
  const unknown = Object.keys(run.series).filter((key) => !used.has(key));
  section("More", unknown.map((key) => [describe(run, key) ? readable(key) : key, "", key.startsWith("seconds_") ? "seconds" : "", { [key]: key }, { exact: key.startsWith("seconds_") }]));
  return charts;
}

// What the reader has chosen survives a reload, which a page that follows a run does by itself.
const memory = {
  key: `megarl ${document.title}`,
  read() {
    try { return JSON.parse(sessionStorage.getItem(this.key)) ?? {}; } catch { return {}; }
  },
  write(change) {
    try { sessionStorage.setItem(this.key, JSON.stringify({ ...this.read(), ...change })); } catch { /* storage is off */ }
  },
};

function connect(charts, run) {
  const slider = document.getElementById("smoothing");
  const output = document.getElementById("smoothing-value");
  const axis = document.getElementById("x-axis");
  const reset = document.getElementById("reset-zoom");
  const kept = memory.read();
  slider.value = kept.smoothing ?? (run.steps.length >= 500 ? 0.9 : run.steps.length >= 100 ? 0.6 : 0);
  for (const name of Object.keys(AXES)) if (name === "steps" || run.axes[name]) axis.append(el("option", { value: name }, AXES[name]));
  if (kept.axis === "steps" || run.axes[kept.axis]) axis.value = kept.axis;
  const setAxis = () => {
    run.axis = axis.value;
    for (const each of [run, ...run.others]) each.xs = each.axes[run.axis] ?? each.steps;
  };
  const draw = () => {
    output.textContent = slider.value === "0" ? "off" : Number(slider.value).toFixed(2);
    reset.hidden = run.view === null;
    for (const chart of charts) chart.draw(Number(slider.value));
  };
  const zoom = (view) => { run.view = view; draw(); };
  const point = (index) => { for (const chart of charts) chart.point(index); };
  let cursor = null;
  run.view = null;
  setAxis();
  for (const chart of charts) {
    let from = null;  // where a drag began
    const move = (event) => {
      cursor = chart.indexAt(event.clientX);
      point(cursor);
      if (from !== null) chart.mark(from, chart.placeAt(event.clientX));
    };
    chart.plot.addEventListener("pointermove", move);
    chart.plot.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "touch") from = chart.placeAt(event.clientX);
      move(event);
    });
    chart.plot.addEventListener("pointerup", (event) => {
      const to = chart.placeAt(event.clientX), [first, last] = shownRange(run);
      const began = from;
      from = null;
      chart.mark(null);
      if (began !== null && Math.abs(to - began) > 0.03 * (last - first)) zoom([Math.min(began, to), Math.max(began, to)]);
      else document.dispatchEvent(new CustomEvent("show-step", { detail: run.steps[chart.indexAt(event.clientX)] }));
    });
    chart.plot.addEventListener("pointerleave", () => { from = null; chart.mark(null); cursor = null; point(null); });
    chart.plot.addEventListener("dblclick", () => zoom(null));
    chart.plot.addEventListener("blur", () => point(null));
    chart.plot.addEventListener("keydown", (event) => {
      if (event.key === "Enter") {
        document.dispatchEvent(new CustomEvent("show-step", { detail: run.steps[cursor ?? run.steps.length - 1] }));
        return;
      }
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      cursor = Math.min(Math.max((cursor ?? run.steps.length - 1) + by, 0), run.steps.length - 1);
      point(cursor);
    });
    chart.logButton.addEventListener("click", () => {
      chart.toggleLog();
      memory.write({ log: charts.filter((each) => each.isLog).map((each) => each.spec.title) });
      draw();
    });
    if (kept.log && kept.log.includes(chart.spec.title) !== chart.isLog && chart.canBeLog()) chart.toggleLog();
  }
  slider.addEventListener("input", () => { memory.write({ smoothing: slider.value }); draw(); });
  axis.addEventListener("change", () => { memory.write({ axis: axis.value }); setAxis(); zoom(null); });
  reset.addEventListener("click", () => zoom(null));
  for (const section of document.querySelectorAll("details.section")) section.addEventListener("toggle", draw);
  let width = document.body.clientWidth;
  draw();  // at once: an observer's first call waits for a frame, which a page without a screen may never have
  new ResizeObserver(() => {
    if (document.body.clientWidth !== width) { width = document.body.clientWidth; draw(); }
  }).observe(document.body);
}

function showPhaseTotals(phases) {
  const total = PHASES.reduce((sum, phase) => sum + (phases?.[phase] ?? 0), 0);
  if (!total) return;
  const share = document.getElementById("phase-share"), legend = document.getElementById("phase-legend");
  PHASES.forEach((phase, i) => {
    const seconds = phases[phase] ?? 0;
    if (!seconds) return;
    const part = el("i", { title: `${phase}: ${formatNumber(seconds)} s` });
    part.style.flex = String(seconds);
    const swatch = el("i");
    part.style.background = swatch.style.background = `var(--s${i})`;
    share.append(part);
    legend.append(el("span", {}, swatch, phase, el("b", {}, `${formatNumber(seconds)} s`), ` ${((100 * seconds) / total).toFixed(1)}%`));
  });
  document.getElementById("phases").hidden = false;
}

// Which line is whose, where runs are compared.
function showRuns(run) {
  if (!run.others.length) return;
  const key = (name, dash) => {
    const sample = svg("svg", { width: 34, height: 10, viewBox: "0 0 34 10" });
    sample.append(svg("line", { x1: 0, x2: 34, y1: 5, y2: 5, stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": dash }));
    return el("span", {}, sample, ` ${name}`);
  };
  document.getElementById("chart-sections").before(el("p", { class: "runs" }, key(run.name, "none"), ...run.others.map((other, n) => key(other.name, DASHES[n % DASHES.length]))));
}

function connectTheme() {
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = memory.read().theme ?? null;
  const isDark = () => (chosen ?? (dark.matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  if (chosen) document.documentElement.style.colorScheme = chosen;
  button.hidden = false;
  button.addEventListener("click", () => {
    chosen = isDark() ? "light" : "dark";
    document.documentElement.style.colorScheme = chosen;
    memory.write({ theme: chosen });
    label();
  });
  dark.addEventListener("change", label);
  label();
}

// Where a server follows the run: load the page again when there is news, unless the reader is at work.
function follow(version) {
  let busy = 0;
  for (const name of ["pointerdown", "keydown", "wheel"]) addEventListener(name, () => { busy = Date.now(); }, { passive: true });
  setInterval(async () => {
    if (document.hidden || Date.now() - busy < 4000) return;
    try {
      const now = await (await fetch("version", { cache: "no-store" })).text();
      if (now !== version) location.reload();
    } catch { /* the server has ended: the page stays as it is */ }
  }, 2000);
}

const run = JSON.parse(document.getElementById("run-data").textContent);
connectTheme();
addRewardBand(run.series);
if (run.steps.length) connect(buildCharts(run), run);
showRuns(run);
showPhaseTotals(run.phase_seconds);
showRewards(run.rewards);
showTimeline(run);
showRanks(run.timeline);
showSamples(run.samples);
showAnswers(run.answers, run.best);
if (run.version) follow(run.version);
