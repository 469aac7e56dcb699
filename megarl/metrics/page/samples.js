// The sample browser: choose a step, sort, search, read.
const PAGE_SIZE = 100;

const SORTS = {
  "as drawn": null,
  "reward, highest first": (a, b) => order(b.reward, a.reward),
  "reward, lowest first": (a, b) => order(a.reward, b.reward),
  "advantage, highest first": (a, b) => order(b.advantage, a.advantage),
  "advantage, lowest first": (a, b) => order(a.advantage, b.advantage),
  "length, longest first": (a, b) => order(b.num_response_tokens, a.num_response_tokens),
  "length, shortest first": (a, b) => order(a.num_response_tokens, b.num_response_tokens),
};

function order(a, b) {
  return (finite(a) ? a : -Infinity) - (finite(b) ? b : -Infinity) || 0;
}

const asText = (value) => (typeof value === "string" ? value : value === null || value === undefined ? "" : JSON.stringify(value));
const oneLine = (value) => asText(value).replace(/\s+/g, " ").trim();

// Colour by what GRPO learns from: better or worse than the rest of its group.
function pill(sample, tag = "span", attributes = {}) {
  const advantage = sample.advantage;
  const tone = finite(advantage) && advantage !== 0 ? (advantage > 0 ? " up" : " down") : "";
  return el(tag, { class: `pill${tone}`, ...attributes }, formatValue(sample.reward));
}

function row(sample, select) {
  const meta = [`step ${sample.step}`, `${sample.num_response_tokens ?? "?"} tokens`, sample.finish_reason];
  if (finite(sample.advantage)) meta.push(`advantage ${formatNumber(sample.advantage)}`);
  return el("button", { class: "row", type: "button", onclick: select }, pill(sample),
    el("span", {}, oneLine(sample.prompt) || "(empty prompt)"),
    el("span"), el("span", { class: "soft" }, oneLine(sample.response) || "(empty response)"),
    el("span"), el("span", { class: "meta" }, meta.filter(Boolean).join(" · ")));
}

// The response token by token; the less likely a token was, the stronger its colour.
function tokenView(sample) {
  const view = el("div", { class: "text" });
  const { rollout_logprobs: logprobs, response_tokens: tokens } = sample;
  logprobs.forEach((logprob, i) => {
    const text = tokens?.[i] ?? "▁";
    const probability = finite(logprob) ? Math.exp(logprob) : 0;
    const token = el("span", { class: "token", title: `token ${i + 1}: ${JSON.stringify(text)}\nlogprob ${formatValue(logprob)}, p = ${formatNumber(probability)}` },
      text === "" ? "␣" : text.replace(/\n/g, "↵\n"));
    token.style.background = `color-mix(in srgb, var(--s1) ${Math.round(75 * (1 - probability))}%, transparent)`;
    view.append(token);
  });
  return view;
}

function responseBlock(sample) {
  const plain = el("div", { class: "text" }, asText(sample.response));
  const title = el("h4", {}, "Response");
  if (!Array.isArray(sample.rollout_logprobs) || !sample.rollout_logprobs.length) return [title, plain];
  const tokens = tokenView(sample);
  tokens.hidden = true;
  const button = el("button", { class: "quiet", type: "button", onclick: () => {
    tokens.hidden = !tokens.hidden;
    plain.hidden = !plain.hidden;
    button.textContent = tokens.hidden ? "Show token logprobs" : "Show text";
  } }, "Show token logprobs");
  title.append(button);
  return [title, plain, tokens];
}

function detail(sample, group, choose) {
  const node = el("article", { class: "detail" });
  const block = (name, value) => (asText(value) === "" ? [] : [el("h4", {}, name), el("div", { class: "text" }, asText(value))]);
  const values = {
    Reward: formatValue(sample.reward), Advantage: formatValue(sample.advantage), Finished: sample.finish_reason ?? "–",
    Tokens: formatValue(sample.num_response_tokens), "Policy version": formatValue(sample.policy_version),
    Step: formatValue(sample.step), Problem: formatValue(sample.prompt_index),
  };
  node.append(el("dl", { class: "values" }, ...Object.entries(values).map(
    ([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))));
  if (group.length > 1) {
    node.append(el("h4", {}, `Rewards of this prompt's ${group.length} samples`), el("div", { class: "group" }, ...group.map((other) => pill(
      other, "button", { type: "button", "aria-current": String(other === sample), title: oneLine(other.response).slice(0, 120), onclick: () => choose(other) }))));
  }
  node.append(...block("Prompt", sample.prompt), ...responseBlock(sample), ...block("Reference answer", sample.answer));
  if (sample.info && Object.keys(sample.info).length) node.append(...block("Details", JSON.stringify(sample.info, null, 2)));
  if (sample.logprobs_left_out) node.append(el("p", { class: "soft" }, "Token logprobs are in the samples file; this page left them out for size."));
  return node;
}

function showSamples(samples) {
  if (!samples.records.length) return;
  document.getElementById("samples").hidden = false;
  const steps = [...new Set(samples.records.map((sample) => sample.step))].sort((a, b) => a - b);
  const list = el("div", { class: "list" });
  const browser = el("div", { class: "browser" }, list);
  const narrow = matchMedia("(max-width: 760px)");
  const stepChoice = el("select", { "aria-label": "Step" }, el("option", { value: "all" }, "All steps"),
    ...steps.map((step) => el("option", { value: step }, `Step ${step}`)));
  const sortChoice = el("select", { "aria-label": "Sort" }, ...Object.keys(SORTS).map((name) => el("option", { value: name }, `Sort: ${name}`)));
  const search = el("input", { type: "search", placeholder: "Search prompts, responses, answers", "aria-label": "Search" });
  const count = el("span", { class: "soft" });
  let shown = [], rows = new Map(), limit = PAGE_SIZE, open = null;

  const choose = (sample, scroll = false) => {
    open = sample;
    browser.querySelector(".detail")?.remove();
    for (const [other, node] of rows) node.setAttribute("aria-current", String(other === sample));
    if (!sample) return;
    const group = samples.records.filter((s) => s.step === sample.step && s.prompt_index === sample.prompt_index);
    const node = detail(sample, group, (other) => choose(other));
    const at = rows.get(sample);
    if (narrow.matches && at) at.after(node); else browser.append(node);
    if (scroll) at?.scrollIntoView({ block: "nearest" });
  };
  const render = () => {
    rows = new Map(shown.slice(0, limit).map((sample) => [sample, row(sample, () => choose(open === sample && narrow.matches ? null : sample))]));
    list.replaceChildren(...rows.values());
    if (shown.length > limit) {
      list.append(el("button", { class: "quiet more", type: "button", onclick: () => { limit += PAGE_SIZE; render(); } }, `Show ${Math.min(PAGE_SIZE, shown.length - limit)} more`));
    }
    if (!shown.length) list.append(el("p", { class: "none" }, "No sample matches."));
    choose(rows.has(open) ? open : narrow.matches ? null : shown[0] ?? null);
  };
  const update = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    shown = samples.records.filter((sample) => {
      if (stepChoice.value !== "all" && sample.step !== Number(stepChoice.value)) return false;
      const text = `${asText(sample.prompt)}\n${asText(sample.response)}\n${asText(sample.answer)}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
    if (SORTS[sortChoice.value]) shown.sort(SORTS[sortChoice.value]);
    count.textContent = `${shown.length} of ${samples.records.length}`;
    previous.disabled = stepChoice.selectedIndex <= 1;
    next.disabled = stepChoice.selectedIndex === steps.length;
    limit = PAGE_SIZE;
    list.scrollTop = 0;
    render();
  };
  const turn = (by) => () => { stepChoice.selectedIndex += by; update(); };
  const previous = el("button", { class: "quiet", type: "button", "aria-label": "Earlier step", onclick: turn(-1) }, "‹");
  const next = el("button", { class: "quiet", type: "button", "aria-label": "Later step", onclick: turn(1) }, "›");
  stepChoice.value = String(steps.at(-1));
  for (const control of [stepChoice, sortChoice]) control.addEventListener("change", update);
  search.addEventListener("input", update);
  narrow.addEventListener("change", render);
  document.getElementById("sample-browser").append(
    el("div", { class: "tools" }, el("span", { class: "pair" }, previous, stepChoice, next), sortChoice, search, count), browser);
  update();
}
