// The rewards of all samples of a range of steps, not only of those that are kept as samples.
const MOST_BARS = 24;

// Bars of lines {values, counts, width?}: one per value, or equal bins if there are many.
function rewardBars(lines) {
  const counts = new Map();
  let low = Infinity, high = -Infinity;
  for (const { values, counts: found, width } of lines) {
    values.forEach((value, i) => {
      if (!found[i]) return;
      low = Math.min(low, value);
      high = Math.max(high, value + (width ?? 0));
      const place = value + (width ?? 0) / 2;
      counts.set(place, (counts.get(place) ?? 0) + found[i]);
    });
  }
  if (counts.size <= MOST_BARS) {
    return [...counts].sort(([a], [b]) => a - b).map(([value, count]) => ({ label: formatNumber(value), value: count }));
  }
  const width = (high - low) / MOST_BARS;
  const bars = Array.from({ length: MOST_BARS }, (_, i) => ({ label: formatNumber(low + i * width), value: 0,
    from: formatNumber(low + i * width), to: formatNumber(low + (i + 1) * width) }));
  for (const [place, count] of counts) bars[Math.min(Math.floor((place - low) / width), MOST_BARS - 1)].value += count;
  return bars.map(({ label, value, from, to }) => ({ label, value, title: `${from} to ${to}: ${formatNumber(value)}` }));
}

function showRewards(lines) {
  if (!lines.length) return;
  const last = String(lines.length - 1);
  const range = (label, value) => el("input", { type: "range", min: "0", max: last, value, "aria-label": label });
  const from = range("First step of the rewards", "0"), to = range("Last step of the rewards", last);
  const chart = el("div"), said = el("span", { class: "soft" });
  const draw = () => {
    const [first, end] = [Number(from.value), Number(to.value)].sort((a, b) => a - b);
    const shown = lines.slice(first, end + 1);
    const bars = rewardBars(shown);
    const count = bars.reduce((sum, bar) => sum + bar.value, 0);
    const odd = shown.reduce((sum, line) => sum + (line.not_finite ?? 0), 0);
    const steps = first === end ? `step ${shown[0].step}` : `steps ${shown[0].step} to ${shown.at(-1).step}`;
    said.textContent = `${steps}, all samples`;
    const note = `${formatNumber(count)} samples${odd ? `, and ${odd} that are not finite` : ""}`;
    chart.replaceChildren(barChart("Rewards", note, bars, formatNumber));
  };
  for (const input of [from, to]) input.addEventListener("input", draw);
  const tools = el("div", { class: "tools" }, el("span", { class: "labelled soft" }, "from", from), el("span", { class: "labelled soft" }, "to", to), said);
  if (lines.length === 1) for (const input of [from, to]) input.parentNode.hidden = true;
  document.getElementById("rewards").append(el("h3", {}, "Rewards"), tools, chart);
  draw();
}
