// The phases of a stretch of steps, one row each, to one scale of seconds: which phase makes a step slow.
const TIMELINE_ROWS = matchMedia("(max-width: 760px)").matches ? 10 : 24;

function showTimeline(run) {
  const rows = run.steps.map((_, i) => i).filter((i) => PHASES.some((phase) => finite(run.series[`seconds_${phase}`]?.[i])));
  if (rows.length < 2) return;
  const seconds = (i, phase) => Math.max(run.series[`seconds_${phase}`]?.[i] ?? 0, 0);
  const length = (i) => PHASES.reduce((sum, phase) => sum + seconds(i, phase), 0);
  const host = el("div", { class: "timeline", role: "table", "aria-label": "Phases of each step" });
  const at = el("input", { type: "range", min: "0", max: String(Math.max(rows.length - TIMELINE_ROWS, 0)), value: String(Math.max(rows.length - TIMELINE_ROWS, 0)), "aria-label": "First step shown" });
  const slowest = el("button", { class: "quiet", type: "button" }, "Slowest step");
  const said = el("span", { class: "soft" });
  const draw = (marked = null) => {
    const shown = rows.slice(Number(at.value), Number(at.value) + TIMELINE_ROWS);
    const longest = Math.max(...shown.map(length)) || 1;
    said.textContent = `steps ${run.steps[shown[0]]} to ${run.steps[shown.at(-1)]}; the longest takes ${formatNumber(longest)} s`;
    host.replaceChildren(...shown.map((i) => {
      const bar = el("div", { class: "bar-row", role: "cell" });
      PHASES.forEach((phase, n) => {
        if (seconds(i, phase) <= 0) return;
        const part = el("i", { title: `step ${run.steps[i]}, ${phase}: ${formatNumber(seconds(i, phase))} s` });
        part.style.width = `${(100 * seconds(i, phase)) / longest}%`;
        part.style.background = `var(--s${n})`;
        bar.append(part);
      });
      const show = () => document.dispatchEvent(new CustomEvent("show-ranks", { detail: run.steps[i] }));
      return el("div", { class: i === marked ? "timeline-row marked-row" : "timeline-row", role: "row", onclick: show },
        el("span", { role: "rowheader" }, String(run.steps[i])), bar, el("span", { class: "soft", role: "cell" }, `${formatNumber(length(i))} s`));
    }));
  };
  at.addEventListener("input", () => draw());
  slowest.addEventListener("click", () => {
    const worst = rows.reduce((a, b) => (length(b) > length(a) ? b : a));
    at.value = String(Math.min(Math.max(rows.indexOf(worst) - TIMELINE_ROWS / 2, 0), Number(at.max)));
    draw(worst);
  });
  at.hidden = rows.length <= TIMELINE_ROWS;
  document.getElementById("timeline").append(el("h3", {}, "Timeline of phases"), el("div", { class: "chart" }, el("div", { class: "tools" }, at, slowest, said), host));
  draw();
}
