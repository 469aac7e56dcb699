// The sample browser: choose a step, filter, sort, search, read; grouped by prompt or as a list.
const PAGE_SIZE = matchMedia("(max-width: 760px)").matches ? 16 : 100;

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

// The words that all prompts begin with say nothing in a list.
function commonStart(texts) {
  if (new Set(texts).size < 2) return 0;
  let length = Math.min(...texts.map((text) => text.length));
  for (const text of texts) while (!texts[0].startsWith(text.slice(0, length))) length -= 1;
  const cut = texts[0].lastIndexOf(" ", length) + 1;
  return cut > 12 ? cut : 0;
}

// Colour by what GRPO learns from: better or worse than the rest of its group.
function pill(sample, tag = "span", attributes = {}) {
  const advantage = sample.advantage;
  const tone = finite(advantage) && advantage !== 0 ? (advantage > 0 ? " up" : " down") : "";
  return el(tag, { class: `pill${tone}`, ...attributes }, formatValue(sample.reward));
}

function row(sample, skip, isGrouped, select) {
  const meta = [`step ${sample.step}`, `${sample.num_response_tokens ?? "?"} tokens`, sample.finish_reason];
  if (finite(sample.advantage)) meta.push(`advantage ${formatNumber(sample.advantage)}`);
  const prompt = oneLine(sample.prompt);
  const response = el("span", { class: isGrouped ? "" : "soft" }, oneLine(sample.response) || "(empty response)");
  return el("button", { class: "row", type: "button", onclick: select }, pill(sample),
    ...(isGrouped ? [response] : [el("span", { title: prompt }, (skip ? "… " : "") + (prompt.slice(skip) || "(empty prompt)")), el("span"), response]),
    el("span"), el("span", { class: "meta" }, meta.filter(Boolean).join(" · ")));
}

function groupHead(group, skip) {
  const prompt = oneLine(group[0].prompt);
  return el("div", { class: "group-head" },
    el("span", { title: prompt }, (skip ? "… " : "") + (prompt.slice(skip) || "(empty prompt)")),
    el("span", { class: "strip", title: `rewards: ${group.map((sample) => formatValue(sample.reward)).join(", ")}` }, ...group.map((sample) => pill(sample))));
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
  const info = Object.entries(sample.info ?? {}).filter(([, value]) => asText(value) !== "");
  if (info.length) {
    node.append(el("h4", {}, "Details"), el("dl", { class: "values" }, ...info.map(
      ([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, finite(value) ? formatNumber(value) : asText(value))))));
  }
  if (sample.logprobs_left_out) node.append(el("p", { class: "soft" }, "Token logprobs are in the samples file; this page left them out for size."));
  return node;
}

const groupOf = (sample) => `${sample.step}/${sample.prompt_index}`;

function byGroup(samples) {
  const groups = new Map();
  for (const sample of samples) {
    if (!groups.has(groupOf(sample))) groups.set(groupOf(sample), []);
    groups.get(groupOf(sample)).push(sample);
  }
  return groups;
}

// name -> predicate of a sample; spread looks at the rewards of the sample's whole group.
function filtersOf(controls, groups) {
  const number = (control) => (control.value === "" ? null : Number(control.value));
  const [low, high, shortest, longest] = [controls.low, controls.high, controls.shortest, controls.longest].map(number);
  const finish = controls.finish.value, spread = controls.spread.value;
  const words = controls.search.value.toLowerCase().split(/\s+/).filter(Boolean);
  return (sample) => {
    if (low !== null && !(sample.reward >= low)) return false;
    if (high !== null && !(sample.reward <= high)) return false;
    if (shortest !== null && !(sample.num_response_tokens >= shortest)) return false;
    if (longest !== null && !(sample.num_response_tokens <= longest)) return false;
    if (finish && sample.finish_reason !== finish) return false;
    if (spread) {
      const equal = groups.get(groupOf(sample)).every((other) => other.reward === sample.reward);
      if (equal !== (spread === "equal")) return false;
    }
    if (!words.length) return true;
    const text = `${asText(sample.prompt)}\n${asText(sample.response)}\n${asText(sample.answer)}`.toLowerCase();
    return words.every((word) => text.includes(word));
  };
}

function showSamples(samples) {
  const host = document.getElementById("sample-browser");
  if (!host || !samples.records.length) return;
  const records = samples.records, groups = byGroup(records);
  const steps = [...new Set(records.map((sample) => sample.step))].sort((a, b) => a - b);
  const skip = commonStart([...new Set(records.map((sample) => oneLine(sample.prompt)))]);
  const select = (label, ...options) => el("select", { "aria-label": label }, ...options.map(([value, text]) => el("option", { value }, text)));
  const field = (label, placeholder) => el("input", { type: "number", step: "any", "aria-label": label, placeholder, class: "number" });
  const controls = {
    step: select("Step", ["all", "All steps"], ...steps.map((step) => [step, `Step ${step}`])),
    layout: select("Layout", ["groups", "Grouped by prompt"], ["list", "One list"]),
    sort: select("Sort", ...Object.keys(SORTS).map((name) => [name, `Sort: ${name}`])),
    search: el("input", { type: "search", placeholder: "Search prompts, responses, answers", "aria-label": "Search" }),
    low: field("Lowest reward", "min"), high: field("Highest reward", "max"),
    shortest: field("Shortest response", "min"), longest: field("Longest response", "max"),
    finish: select("Finish reason", ["", "Any end"], ...[...new Set(records.map((s) => s.finish_reason).filter(Boolean))].map((reason) => [reason, `Ended by ${reason}`])),
    spread: select("Group spread", ["", "Any group"], ["different", "Groups with different rewards"], ["equal", "Groups with equal rewards"]),
  };
  const count = el("span", { class: "soft", "aria-live": "polite" });
  const everywhere = el("button", { class: "quiet", type: "button" });
  const clear = el("button", { class: "quiet", type: "button" }, "Clear filters");
  const charts = el("div", { class: "grid sample-charts" });
  const rowsNode = el("div", { class: "list" });
  const browser = el("div", { class: "browser" }, rowsNode);
  const narrow = matchMedia("(max-width: 760px)");
  let shown = [], rows = new Map(), limit = PAGE_SIZE, open = null;

  const choose = (sample) => {
    open = sample;
    browser.querySelector(".detail")?.remove();
    for (const [other, node] of rows) node.setAttribute("aria-current", String(other === sample));
    if (!sample) return;
    const node = detail(sample, groups.get(groupOf(sample)), (other) => choose(other));
    const at = rows.get(sample);
    if (narrow.matches && at) at.after(node); else browser.append(node);
  };
  const render = () => {
    const isGrouped = controls.layout.value === "groups";
    rows = new Map(shown.slice(0, limit).map((sample) => [sample, row(sample, skip, isGrouped, () => choose(open === sample && narrow.matches ? null : sample))]));
    let nodes = [...rows.values()];
    if (isGrouped) {
      nodes = [...byGroup([...rows.keys()]).values()].flatMap((group) => [groupHead(groups.get(groupOf(group[0])), skip), ...group.map((sample) => rows.get(sample))]);
    }
    rowsNode.replaceChildren(...nodes);
    if (shown.length > limit) {
      rowsNode.append(el("button", { class: "quiet more", type: "button", onclick: () => { limit += PAGE_SIZE; render(); } }, `Show ${Math.min(PAGE_SIZE, shown.length - limit)} more`));
    }
    if (!shown.length) rowsNode.append(el("p", { class: "none" }, "No sample matches."));
    choose(rows.has(open) ? open : narrow.matches ? null : shown[0] ?? null);
  };
  const update = () => {
    const passes = filtersOf(controls, groups);
    const found = records.filter(passes);
    shown = controls.step.value === "all" ? [...found] : found.filter((sample) => sample.step === Number(controls.step.value));
    if (SORTS[controls.sort.value]) shown.sort(SORTS[controls.sort.value]);
    if (controls.layout.value === "groups") shown = [...byGroup(shown).values()].flat();
    count.textContent = `${shown.length} of ${records.length}`;
    everywhere.hidden = shown.length === found.length || (controls.search.value === "" && found.length === records.length);
    everywhere.textContent = `${found.length} in all steps`;
    clear.hidden = found.length === records.length;
    previous.disabled = controls.step.selectedIndex <= 1;
    next.disabled = controls.step.selectedIndex === steps.length;
    charts.replaceChildren(...[rewardHistogram(shown), mismatchByPosition(shown)].filter(Boolean));
    limit = PAGE_SIZE;
    rowsNode.scrollTop = 0;
    memory.write({ sampleStep: controls.step.selectedIndex === steps.length ? null : controls.step.value });
    render();
  };
  const goTo = (step) => { controls.step.value = String(step); update(); };
  const turn = (by) => () => { controls.step.selectedIndex += by; update(); };
  const previous = el("button", { class: "quiet", type: "button", "aria-label": "Earlier step", onclick: turn(-1) }, "‹");
  const next = el("button", { class: "quiet", type: "button", "aria-label": "Later step", onclick: turn(1) }, "›");
  const kept = memory.read().sampleStep;
  controls.step.value = kept === "all" || steps.includes(Number(kept)) ? String(kept) : String(steps.at(-1));
  if (![...groups.values()].some((group) => group.length > 1)) controls.layout.value = "list";
  for (const control of Object.values(controls)) control.addEventListener(control.tagName === "SELECT" ? "change" : "input", update);
  everywhere.addEventListener("click", () => goTo("all"));
  clear.addEventListener("click", () => {
    for (const name of ["low", "high", "shortest", "longest", "finish", "spread", "search"]) controls[name].value = "";
    update();
  });
  narrow.addEventListener("change", render);
  // From a point of a chart: the recorded step nearest to it.
  document.addEventListener("show-step", ({ detail: step }) => {
    goTo(steps.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a)));
    document.getElementById("samples").scrollIntoView();
  });
  const labelled = (text, ...nodes) => el("span", { class: "labelled" }, el("span", { class: "soft" }, text), ...nodes);
  host.append(
    el("div", { class: "tools" }, el("span", { class: "pair" }, previous, controls.step, next), controls.layout, controls.sort, controls.search, count, everywhere),
    el("details", { class: "filters" }, el("summary", {}, "Filters"), el("div", { class: "tools" },
      labelled("Reward", controls.low, controls.high), labelled("Tokens", controls.shortest, controls.longest), controls.finish, controls.spread)),
    clear, browser, charts);
  update();
}

// The answers of the evaluations: right and wrong ones, at any evaluated step.
function showAnswers(answers, best) {
  const host = document.getElementById("answer-browser");
  if (!host || !answers.records.length) return;
  const steps = [...new Set(answers.records.map((answer) => answer.step))].sort((a, b) => a - b);
  const skip = commonStart([...new Set(answers.records.map((answer) => oneLine(answer.prompt)))]);
  const step = el("select", { "aria-label": "Evaluated step" }, ...steps.map((each) => el("option", { value: each }, `Step ${each}${best?.step === each ? " (best)" : ""}`)));
  const kind = el("select", { "aria-label": "Answers" }, el("option", { value: "" }, "All answers"), el("option", { value: "wrong" }, "Wrong ones"), el("option", { value: "right" }, "Right ones"));
  const search = el("input", { type: "search", placeholder: "Search problems and answers", "aria-label": "Search answers" });
  const count = el("span", { class: "soft", "aria-live": "polite" });
  const body = el("div", { class: "answers" });
  let limit = matchMedia("(max-width: 760px)").matches ? 6 : 20;
  step.value = String(steps.at(-1));
  const render = () => {
    const at = answers.records.filter((answer) => answer.step === Number(step.value));
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = at.filter((answer) => (kind.value === "" || (kind.value === "right") === Boolean(answer.correct))
      && words.every((word) => `${asText(answer.prompt)}\n${asText(answer.response)}\n${asText(answer.answer)}`.toLowerCase().includes(word)));
    count.textContent = `${shown.length} of ${at.length}, ${at.filter((answer) => answer.correct).length} right`;
    body.replaceChildren(...shown.slice(0, limit).map((answer) => el("details", { class: "answer" },
      el("summary", {}, el("span", { class: `pill ${answer.correct ? "up" : "down"}` }, answer.correct ? "right" : "wrong"),
        el("span", {}, (skip ? "… " : "") + oneLine(answer.prompt).slice(skip)), el("span", { class: "soft" }, oneLine(answer.response) || "(empty)")),
      el("h4", {}, "Problem"), el("div", { class: "text" }, asText(answer.prompt)),
      el("h4", {}, "Answer"), el("div", { class: "text" }, asText(answer.response)),
      el("h4", {}, "Reference answer"), el("div", { class: "text" }, asText(answer.answer) || "–"))));
    if (shown.length > limit) body.append(el("button", { class: "quiet more", type: "button", onclick: () => { limit += PAGE_SIZE; render(); } }, `Show ${Math.min(PAGE_SIZE, shown.length - limit)} more`));
    if (!shown.length) body.append(el("p", { class: "none" }, "No answer matches."));
  };
  for (const control of [step, kind]) control.addEventListener("change", render);
  search.addEventListener("input", render);
  host.append(el("div", { class: "tools" }, step, kind, search, count), body);
  render();
}
