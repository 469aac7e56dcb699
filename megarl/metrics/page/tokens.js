// One response token by token: the engine's and the trainer's logprob, their difference, entropy, advantage.
const TOKEN_VIEWS = {
  "engine's probability": {
    has: (sample) => list(sample.rollout_logprobs).length,
    value: (sample, i) => sample.rollout_logprobs[i],
    strength: (logprob) => 75 * (1 - Math.exp(logprob)),
    says: "the less likely, the stronger",
  },
  "trainer − engine": {
    has: (sample) => list(sample.trainer_logprobs).length && list(sample.rollout_logprobs).length,
    value: (sample, i) => difference(sample, i),
    strength: (value, sample) => (75 * Math.abs(value)) / largest(sample, difference),
    sign: true,
    says: "logprob difference; orange: the trainer gives the token more, red: less",
  },
  entropy: {
    has: (sample) => list(sample.entropy).length,
    value: (sample, i) => sample.entropy[i],
    strength: (value, sample) => (75 * value) / largest(sample, (each, i) => each.entropy[i]),
    says: "of the distribution that the token was drawn from, nats",
  },
  advantage: {
    has: (sample) => list(sample.token_advantages).length,
    value: (sample, i) => sample.token_advantages[i],
    strength: (value, sample) => (75 * Math.abs(value)) / largest(sample, (each, i) => each.token_advantages[i]),
    sign: true,
    says: "orange: reinforced, red: suppressed",
  },
};

const list = (value) => (Array.isArray(value) ? value : []);

function difference(sample, i) {
  const [trainer, engine] = [list(sample.trainer_logprobs)[i], list(sample.rollout_logprobs)[i]];
  return finite(trainer) && finite(engine) ? trainer - engine : null;
}

function largest(sample, of) {
  const values = list(sample.response_tokens ?? sample.rollout_logprobs).map((_, i) => Math.abs(of(sample, i) ?? 0)).filter(finite);
  return Math.max(...values, 1e-12);
}

function tokenFacts(sample, i) {
  const engine = list(sample.rollout_logprobs)[i], trainer = list(sample.trainer_logprobs)[i];
  const facts = [`token ${i + 1}: ${JSON.stringify(list(sample.response_tokens)[i] ?? "▁")}`];
  if (engine !== undefined) facts.push(`engine: logprob ${formatValue(engine)}, p = ${formatNumber(finite(engine) ? Math.exp(engine) : 0)}`);
  if (finite(trainer)) facts.push(`trainer: logprob ${formatValue(trainer)}, difference ${formatNumber(difference(sample, i) ?? NaN)}`);
  if (finite(list(sample.entropy)[i])) facts.push(`entropy ${formatNumber(sample.entropy[i])} nats`);
  const advantage = list(sample.token_advantages)[i] ?? sample.advantage;
  if (finite(advantage)) facts.push(`advantage ${formatNumber(advantage)}`);
  return facts;
}

// The tokens, coloured by one of the views; a token that is pointed at or tapped is read out below.
function tokenView(sample, name) {
  const view = TOKEN_VIEWS[name];
  const text = el("div", { class: "text tokens" });
  const readout = el("p", { class: "readout soft", "aria-live": "polite" }, view.says);
  const count = list(sample.response_tokens).length || list(sample.rollout_logprobs).length;
  for (let i = 0; i < count; i += 1) {
    const shown = list(sample.response_tokens)[i] ?? "▁";
    const facts = tokenFacts(sample, i);
    const read = () => { readout.textContent = facts.join(" · "); };
    const token = el("span", { class: "token", title: facts.join("\n"), onpointerenter: read, onclick: read },
      shown === "" ? "␣" : shown.replace(/\n/g, "↵\n"));
    const value = view.value(sample, i);
    if (finite(value)) {
      const hue = view.sign && value < 0 ? "--s4" : "--s1";
      token.style.background = `color-mix(in srgb, var(${hue}) ${Math.round(Math.min(Math.max(view.strength(value, sample), 0), 75))}%, transparent)`;
    } else if (value === "-Infinity") {
      token.style.background = "color-mix(in srgb, var(--s1) 75%, transparent)";
    } else {
      token.classList.add("without");
    }
    text.append(token);
  }
  return el("div", {}, text, readout);
}

function responseBlock(sample) {
  const plain = el("div", { class: "text" }, asText(sample.response));
  const views = Object.keys(TOKEN_VIEWS).filter((name) => TOKEN_VIEWS[name].has(sample));
  if (!views.length) return [el("h4", {}, "Response"), plain];
  const choice = el("select", { class: "small", "aria-label": "Show tokens by" }, el("option", { value: "" }, "as text"),
    ...views.map((name) => el("option", { value: name }, `tokens by ${name}`)));
  const body = el("div", {}, plain);
  const show = () => {
    body.replaceChildren(choice.value ? tokenView(sample, choice.value) : plain);
    memory.write({ tokens: choice.value });
  };
  choice.addEventListener("change", show);
  const kept = memory.read().tokens;
  if (views.includes(kept)) { choice.value = kept; show(); }
  return [el("h4", {}, "Response", choice), body];
}

// Bars of counts or means. bars: [{label, value, title}]
function barChart(title, note, bars, format) {
  const top = Math.max(...bars.map((bar) => bar.value), 0) || 1;
  const node = el("figure", { class: "chart bars" }, el("h4", {}, title, el("small", {}, note)));
  const plot = el("div", { class: "bar-plot", role: "img", "aria-label": `${title}: ${bars.map((bar) => `${bar.label} ${format(bar.value)}`).join(", ")}` });
  bars.forEach((bar, i) => {
    const column = el("div", { class: "column", title: bar.title ?? `${bar.label}: ${format(bar.value)}` }, el("i"));
    column.firstChild.style.height = `${(100 * bar.value) / top}%`;
    if (bars.length <= 8 || i % Math.ceil(bars.length / 8) === 0) column.append(el("span", {}, bar.label));
    plot.append(column);
  });
  node.append(plot);
  return node;
}

function rewardHistogram(samples) {
  const rewards = samples.map((sample) => sample.reward).filter(finite);
  if (!rewards.length) return null;
  const distinct = [...new Set(rewards)].sort((a, b) => a - b);
  const note = `of these ${rewards.length} recorded samples`;
  if (distinct.length <= 12) {
    return barChart("Rewards", note, distinct.map((reward) => ({ label: formatNumber(reward), value: rewards.filter((each) => each === reward).length })), formatNumber);
  }
  const low = distinct[0], width = (distinct.at(-1) - low) / 16;
  const bars = Array.from({ length: 16 }, (_, i) => ({ label: formatNumber(low + i * width), value: 0 }));
  for (const reward of rewards) bars[Math.min(Math.floor((reward - low) / width), 15)].value += 1;
  return barChart("Rewards", note, bars, formatNumber);
}

// Where in a response engine and trainer disagree.
function mismatchByPosition(samples) {
  const sums = [];
  for (const sample of samples) {
    list(sample.trainer_logprobs).forEach((_, i) => {
      const value = difference(sample, i);
      if (value === null) return;
      sums[i] ??= [0, 0];
      sums[i][0] += Math.abs(value);
      sums[i][1] += 1;
    });
  }
  if (!sums.some((each) => each && each[0] > 0)) return null;
  const size = Math.ceil(sums.length / 24), bars = [];
  for (let start = 0; start < sums.length; start += size) {
    const part = sums.slice(start, start + size).filter((each) => each);
    const count = part.reduce((sum, each) => sum + each[1], 0);
    const last = Math.min(start + size, sums.length), name = size > 1 ? `${start + 1}–${last}` : String(start + 1);
    const mean = count ? part.reduce((sum, each) => sum + each[0], 0) / count : 0;
    bars.push({ label: String(start + 1), value: mean, title: `tokens ${name}: ${formatNumber(mean)}, ${count} tokens` });
  }
  return barChart("Logprob difference by position", "mean |trainer − engine|, by token of the response", bars, formatNumber);
}
