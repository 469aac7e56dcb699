// Which charts a run has, and the controls above them.
const SERIES_COLORS = ["--s0", "--s1", "--s2", "--s3", "--s4", "--s5"];
const PHASES = ["rollout", "reward", "logprobs", "train", "weights", "other"];

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
      ["Time per step", "seconds, by phase", "seconds", Object.fromEntries(PHASES.map((p) => [`seconds_${p}`, p])), { stack: true, wide: true }],
      ["Throughput", "tokens per second", "", { tokens_per_second_rollout: "rollout", tokens_per_second_train: "training" }, { zero: true }],
      ["Tokens per step", "", "", { num_tokens: "tokens" }, { zero: true }],
      ["Peak memory", "", "gib", { peak_memory_gib: "memory" }, { zero: true }],
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

function buildCharts(run) {
  const charts = [];
  const used = new Set(["reward_std", "reward_min", "reward_max", "seconds", "policy_version", "num_microbatches"]);
  const make = ([title, note, unit, keys, options]) => {
    for (const key of Object.keys(keys)) used.add(key);
    const present = Object.keys(keys).filter((key) => run.series[key]?.some((value) => (options.stack ? value : value !== null)));
    if (!present.length) return null;
    const band = options.band && run.series[options.band.low] ? options.band : null;
    const dotted = (key) => options.dots === true || Boolean(options.dots?.includes(key));
    const series = present.map((key, i) => ({
      key, label: keys[key], color: options.stack ? `--s${PHASES.indexOf(keys[key])}` : SERIES_COLORS[i],
      dots: dotted(key), exact: dotted(key) || Boolean(options.exact),
    }));
    const chart = new Chart({ ...options, title, note: options.band && !band ? "mean" : note, unit, series, band }, run);
    charts.push(chart);
    return chart;
  };
  const host = document.getElementById("chart-sections");
  const section = (name, plans) => {
    const made = plans.map(make).filter((chart) => chart !== null);
    if (made.length === 1) made[0].widen();
    if (made.length) host.append(el("h3", {}, name), el("div", { class: "grid" }, ...made.map((chart) => chart.node)));
  };
  for (const [name, plans] of chartPlan(run.difference_limit)) section(name, plans);
  const unknown = Object.keys(run.series).filter((key) => !used.has(key) && !["reward_low", "reward_high"].includes(key));
  section("More", unknown.map((key) => [key, "", "", { [key]: key }, {}]));
  return charts;
}

function connect(charts, run) {
  const slider = document.getElementById("smoothing");
  const output = document.getElementById("smoothing-value");
  slider.value = run.steps.length >= 500 ? 0.9 : run.steps.length >= 40 ? 0.7 : 0;
  const draw = () => {
    output.textContent = slider.value === "0" ? "off" : Number(slider.value).toFixed(2);
    for (const chart of charts) chart.draw(Number(slider.value));
  };
  const point = (index) => { for (const chart of charts) chart.point(index); };
  let cursor = null;
  for (const chart of charts) {
    const move = (event) => { cursor = chart.indexAt(event.clientX); point(cursor); };
    chart.plot.addEventListener("pointermove", move);
    chart.plot.addEventListener("pointerdown", move);
    chart.plot.addEventListener("pointerleave", () => { cursor = null; point(null); });
    chart.plot.addEventListener("blur", () => point(null));
    chart.plot.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      cursor = Math.min(Math.max((cursor ?? run.steps.length - 1) + by, 0), run.steps.length - 1);
      point(cursor);
    });
  }
  slider.addEventListener("input", draw);
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

function connectTheme() {
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const isDark = () => (chosen ?? (dark.matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => {
    chosen = isDark() ? "light" : "dark";
    document.documentElement.style.colorScheme = chosen;
    label();
  });
  dark.addEventListener("change", label);
  label();
}

const run = JSON.parse(document.getElementById("run-data").textContent);
connectTheme();
addRewardBand(run.series);
if (run.steps.length) connect(buildCharts(run), run);
showPhaseTotals(run.phase_seconds);
showSamples(run.samples);
