// The phases of one step, a lane per rank on one clock: which rank the others wait for.
const MOST_LANES = 8;  // of more ranks the slowest, the median and the fastest are shown, and chosen ones
const WAITS = ["wait", "gradient_reduction"];
const ROLLOUT = ["rollout", "reward", "evaluation"];  // rank 0's alone, while all others wait

// Seconds a rank was at work that all ranks share: its phases without its waits, and without rollouts.
function busySeconds(line) {
  let total = 0;
  const rollouts = line.spans.filter(([depth, name]) => depth === 0 && ROLLOUT.includes(name));
  for (const [depth, name, begin, end] of line.spans) {
    const inRollout = rollouts.some((span) => span[2] <= begin && end <= span[3]);
    if (inRollout) continue;
    if (depth === 0 && !WAITS.includes(name)) total += end - begin;
    else if (depth > 0 && WAITS.includes(name)) total -= end - begin;
  }
  return total;
}

const phaseColor = (name) => `var(--s${PHASES.includes(name) ? PHASES.indexOf(name) : 5})`;

function lane(line, label, first, length) {
  const bar = el("div", { class: "bar-row lane", role: "cell" });
  const offset = line.start - first;
  let phase = "";
  for (const [depth, name, begin, end] of line.spans) {
    if (depth === 0) phase = name;
    const waits = WAITS.includes(name);
    const part = el("i", { class: waits ? "waits" : depth ? "inner" : "", "data-name": name,
      title: `rank ${line.rank}, ${depth ? `${phase}, ` : ""}${name.replaceAll("_", " ")}: ${formatValue(end - begin, "seconds")}` });
    part.style.left = `${(100 * (offset + begin)) / length}%`;
    part.style.width = `${(100 * (end - begin)) / length}%`;
    if (!waits && !depth) part.style.background = phaseColor(name);
    bar.append(part);
  }
  return el("div", { class: "timeline-row rank-row", role: "row", "data-rank": line.rank },
    el("span", { role: "rowheader" }, label), bar, el("span", { class: "soft", role: "cell" }, formatValue(line.busy, "seconds")));
}

function showRanks(timeline) {
  if (!timeline.length) return;
  const seconds = (entry) => Math.max(...entry.ranks.map((line) => line.seconds));
  const slowest = timeline.reduce((a, b) => (seconds(b) > seconds(a) ? b : a));
  const choice = el("select", { "aria-label": "Step of the ranks' timeline" }, ...timeline.map((entry) => el("option", { value: entry.step },
    `Step ${entry.step}: ${formatValue(seconds(entry), "seconds")}${entry === slowest && timeline.length > 1 ? ", the slowest" : ""}`)));
  const other = el("select", { "aria-label": "Another rank" });
  const host = el("div", { class: "timeline", role: "table", "aria-label": "Phases of each rank" });
  const legend = el("div", { class: "legend" });
  const draw = () => {
    const entry = timeline.find((each) => String(each.step) === choice.value);
    const ranks = entry.ranks.map((line) => ({ ...line, busy: busySeconds(line) }));
    const order = [...ranks].sort((a, b) => b.busy - a.busy);
    const names = new Map();
    if (ranks.length > 1) names.set(order[0].rank, "slowest").set(order.at(-1).rank, "fastest");
    if (ranks.length > 2) names.set(order[Math.floor((order.length - 1) / 2)].rank, "median");
    const isChosen = (line) => ranks.length <= MOST_LANES || names.has(line.rank) || String(line.rank) === other.value;
    const kept = other.value;
    other.replaceChildren(el("option", { value: "" }, "Another rank"), ...ranks.map((line) => el("option", { value: line.rank }, `Rank ${line.rank}`)));
    other.value = ranks.some((line) => String(line.rank) === kept) ? kept : "";
    other.hidden = ranks.length <= MOST_LANES;
    const first = Math.min(...ranks.map((line) => line.start));
    const length = Math.max(...ranks.map((line) => line.start - first + line.seconds)) || 1;
    const shown = (ranks.length <= MOST_LANES ? ranks : order).filter(isChosen);
    host.replaceChildren(...shown.map((line) => lane(line, `rank ${line.rank}${names.has(line.rank) ? `, ${names.get(line.rank)}` : ""}`, first, length)));
    const used = [...new Set(shown.flatMap((line) => line.spans.filter(([depth, name]) => depth === 0 || WAITS.includes(name)).map(([, name]) => name)))];
    const place = (name) => (WAITS.includes(name) ? 99 : PHASES.includes(name) ? PHASES.indexOf(name) : 98);
    const swatch = (name) => {
      const node = el("i", { class: WAITS.includes(name) ? "waits" : "" });
      if (!WAITS.includes(name)) node.style.background = phaseColor(name);
      return el("span", {}, node, name.replaceAll("_", " "));
    };
    legend.replaceChildren(...used.sort((a, b) => place(a) - place(b)).map(swatch));
  };
  choice.value = String(timeline.at(-1).step);
  choice.addEventListener("change", draw);
  other.addEventListener("change", draw);
  // From a row of the steps' timeline, or a point of a chart: the step nearest to it.
  const show = ({ detail: step }) => {
    choice.value = String(timeline.reduce((a, b) => (Math.abs(b.step - step) < Math.abs(a.step - step) ? b : a)).step);
    draw();
  };
  for (const name of ["show-step", "show-ranks"]) document.addEventListener(name, show);
  document.getElementById("rank-timeline").append(el("h3", {}, "Timeline of ranks"), el("div", { class: "chart" },
    el("div", { class: "tools" }, choice, other, el("span", { class: "soft" }, "right: seconds at work, without rollouts and waits")), legend, host));
  draw();
}
