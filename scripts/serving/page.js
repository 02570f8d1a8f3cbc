"use strict";
// Talks to this server's own OpenAI endpoints. Every text that comes from outside goes through textContent.
const $ = (id) => document.getElementById(id);
const state = {
  model: null, // what /v1/models says of the run
  turns: [], // {role, content} of the conversation, as the server is asked
  stopping: null, // AbortController of the answer that is being written
  answers: [], // all that are on the page
  answer: null, // the answer whose experts are shown: {tokens: [{text, experts, span}], element}
  drawing: false, // a frame is asked for
  pinned: null, // index of the token that was clicked
};

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const hue = (expert) => {
  const n = state.model.experts;
  return n <= 16 ? Math.round((360 * expert) / n) : Math.round((137.508 * expert) % 360);
};

// The model

async function start() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    $("key-field").hidden = false;
    $("settings").open = true;
    $("facts").textContent = "This server asks for an API key: put it into the settings.";
    $("key").addEventListener("change", start, { once: true });
    $("key").focus();
    return;
  }
  if (!response.ok) throw new Error((await response.json()).error.message);
  const described = (await response.json()).data[0];
  state.model = { id: described.id, ...described.minimoe };
  show();
}

function show() {
  const model = state.model;
  document.title = `${model.id} · MiniMoE`;
  $("name").textContent = model.id;
  const size = model.parameters >= 1e6 ? `${(model.parameters / 1e6).toPrecision(3)}M` : `${Math.round(model.parameters / 1e3)}k`;
  const experts = model.experts ? `${model.layers.length} MoE layers, ${model.experts} experts, ${model.experts_per_token} a token` : "dense";
  $("facts").textContent = `${size} parameters · ${experts} · context ${model.context} · step ${model.step}`;
  $("system-field").hidden = !model.chat;
  $("max_tokens").max = model.context;
  $("max_tokens").value = Math.min(256, Math.floor(model.context / 2));
  $("prompt").placeholder = model.chat ? "Ask something" : "Begin a text";
  $("send").textContent = model.chat ? "Send" : "Continue";
  $("clear").textContent = model.chat ? "New conversation" : "Clear";
  hint();
  if (!model.experts) return;
  $("experts").hidden = false;
  const shown = $("layer");
  shown.replaceChildren(...model.layers.map((layer, place) => {
    const option = element("option", "", `${layer}`);
    option.value = place;
    return option;
  }));
  shown.value = Math.floor(model.layers.length / 2);
  buildStrip();
  drawStrip();
}

function hint() {
  const model = state.model;
  let words = model.chat ? "Ask something below." : "This model was only pretrained: it knows no turns and continues the text you give it.";
  if (model.experts) words += " Each new token is coloured by its first choice of expert; point at one, or tap it, to see all layers.";
  $("turns").replaceChildren(element("p", "empty-hint", words));
}

// Experts

function buildStrip() {
  const { layers, experts } = state.model;
  const strip = $("strip");
  strip.style.gridTemplateColumns = `max-content repeat(${experts}, minmax(0, 1fr))`;
  if (experts > 24) strip.style.gap = "1px";
  const children = [element("span", "head")];
  const every = experts <= 16 ? 1 : experts <= 48 ? 4 : 8; // columns that bear their number
  for (let expert = 0; expert < experts; expert++) children.push(element("span", "head", expert % every ? "" : `${expert}`));
  layers.forEach((layer) => {
    children.push(element("span", "layer", `layer ${layer}`));
    for (let expert = 0; expert < experts; expert++) {
      const cell = element("span", "cell");
      cell.style.setProperty("--hue", hue(expert));
      cell.title = `layer ${layer}, expert ${expert}`;
      children.push(cell);
    }
  });
  strip.replaceChildren(...children);
}

const noCounts = () => state.model.layers.map(() => new Array(state.model.experts).fill(0));

// How much of an answer's tokens each expert of each layer read: [layer][expert], 0 to 1.
const shares = (answer) => answer.counts.map((row) => row.map((count) => count / Math.max(answer.tokens.length, 1)));

function drawStrip(index) {
  if (!state.model || !state.model.experts) return;
  const answer = state.answer;
  const token = answer && index !== null && index !== undefined ? answer.tokens[index] : null;
  const tokens = answer ? answer.tokens : [];
  const read = answer ? shares(answer) : noCounts();
  const { experts_per_token: k } = state.model;
  let values;
  if (token) {
    // the first choice is the fullest
    values = noCounts();
    token.experts.forEach((chosen, place) => chosen.forEach((expert, rank) => { values[place][expert] = 1 - (0.55 * rank) / Math.max(k - 1, 1); }));
    $("strip-title").textContent = `“${visible(token.text)}”`;
    $("strip-words").textContent = `Token ${index + 1} of ${tokens.length}, and the ${k} experts that read it in each layer, the first choice strongest.`;
  } else {
    const most = Math.max(0.001, ...read.flat());
    values = read.map((row) => row.map((value) => (value / most) ** 0.8));
    $("strip-title").textContent = "Experts";
    $("strip-words").textContent = tokens.length
      ? `Which experts read the ${tokens.length} tokens of this answer: the stronger, the more of them.`
      : "One row a layer, one column an expert. Which of them read what will show here.";
  }
  const cells = $("strip").querySelectorAll(".cell");
  values.flat().forEach((value, i) => cells[i].style.setProperty("--share", value.toFixed(3)));
  const shown = Number($("layer").value);
  $("strip").querySelectorAll(".layer").forEach((label, place) => label.classList.toggle("shown", place === shown));
  const told = token ? token.experts.map((chosen, place) => `layer ${state.model.layers[place]}: ${chosen.join(", ")}`).join("; ") : "share of tokens per expert and layer";
  $("strip").setAttribute("aria-label", told);
  drawLegend(tokens.length, read[shown], shown);
}

function drawLegend(n, row, place) {
  const { layers, experts_per_token: k } = state.model;
  $("legend-words").textContent = n ? `Share of the answer's tokens that each expert of layer ${layers[place]} read (${k} read each).` : "";
  $("legend").replaceChildren(...row.map((share, expert) => {
    const item = element("li");
    const swatch = element("i");
    swatch.style.setProperty("--hue", hue(expert));
    item.append(swatch, element("span", "", n ? `${expert} · ${Math.round(100 * share)} %` : `${expert}`));
    return item;
  }));
}

const visible = (text) => text.replace(/\n/g, "↵").replace(/^ | $/g, "␣") || "∅";

function colour(token) {
  const place = Number($("layer").value);
  token.span.classList.add("coloured");
  token.span.style.setProperty("--hue", hue(token.experts[place][0]));
}

function select(answer, index, pin) {
  document.querySelectorAll(".token.chosen").forEach((span) => span.classList.remove("chosen"));
  if (answer !== null) state.answer = answer;
  if (pin) state.pinned = index;
  const at = index === null ? state.pinned : index;
  if (at !== null && state.answer && state.answer.tokens[at]) state.answer.tokens[at].span.classList.add("chosen");
  $("unpin").hidden = state.pinned === null;
  drawStrip(at);
}

function listen(answer) {
  const indexOf = (event) => {
    const span = event.target.closest(".token.coloured");
    return span ? Number(span.dataset.index) : null;
  };
  answer.text.tabIndex = 0;
  answer.text.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch" || indexOf(event) === null) return;
    if (state.pinned === null) select(answer, indexOf(event), false);
  });
  answer.text.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "touch" && state.pinned === null) select(null, null, false);
  });
  answer.text.addEventListener("click", (event) => {
    const index = indexOf(event);
    if (index === null) return;
    select(answer, state.answer === answer && state.pinned === index ? null : index, true);
  });
  answer.text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") select(null, null, true);
    if (!step || !answer.tokens.length) return;
    event.preventDefault();
    const from = state.answer === answer && state.pinned !== null ? state.pinned : step > 0 ? -1 : answer.tokens.length;
    select(answer, Math.min(Math.max(from + step, 0), answer.tokens.length - 1), true);
  });
}

// Asking

function headers() {
  const made = { "Content-Type": "application/json" };
  if ($("key").value) made.Authorization = `Bearer ${$("key").value}`;
  return made;
}

function question(text) {
  const model = state.model;
  const number = (id) => Number($(id).value);
  const asked = {
    model: model.id, stream: true, stream_options: { include_usage: true }, temperature: number("temperature"), top_p: number("top_p"),
    top_k: number("top_k"), repetition_penalty: number("repetition_penalty"),
  };
  if ($("seed").value !== "") asked.seed = number("seed");
  if (model.experts) asked.experts = true;
  if (!model.chat) return ["v1/completions", { ...asked, prompt: text, max_tokens: number("max_tokens") }];
  const system = $("system").value.trim() ? [{ role: "system", content: $("system").value }] : [];
  const messages = [...system, ...state.turns, { role: "user", content: text }];
  return ["v1/chat/completions", { ...asked, messages, max_completion_tokens: number("max_tokens") }];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    for (let end = buffer.indexOf("\n\n"); end >= 0; end = buffer.indexOf("\n\n")) {
      const data = buffer.slice(0, end).replace(/^data: /, "");
      buffer = buffer.slice(end + 2);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function post(text, notes) {
  for (;;) {
    const [path, body] = question(text);
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: state.stopping.signal });
    if (response.ok) return response;
    const { error } = await response.json();
    if (error.code !== "context_length_exceeded" || state.turns.length < 2) throw new Error(error.message);
    state.turns.splice(0, 2);
    notes.forgotten = true;
  }
}

function add(answer, chunk) {
  const choice = chunk.choices[0];
  if (!choice) return;
  const content = choice.delta ? choice.delta.content || "" : choice.text || "";
  answer.content += content;
  let told = "";
  for (const token of chunk.minimoe ? chunk.minimoe.choices[0].tokens : []) {
    told += token.text;
    const span = element("span", "token", token.text);
    span.dataset.index = answer.tokens.length;
    token.experts.forEach((chosen, place) => chosen.forEach((expert) => answer.counts[place][expert]++));
    answer.tokens.push({ text: token.text, experts: token.experts, span });
    colour(answer.tokens.at(-1));
    answer.text.append(span);
  }
  if (content.length > told.length) answer.text.append(element("span", "token", content.slice(told.length)));
  if (choice.finish_reason) answer.finish = choice.finish_reason;
}

// Once a frame, however many tokens came: the strip, and the end of the text, if that is where the reader is.
function drawSoon(answer) {
  if (state.drawing) return;
  state.drawing = true;
  requestAnimationFrame(() => {
    state.drawing = false;
    if (state.answer === answer && state.pinned === null) drawStrip();
    const main = document.querySelector("main");
    if (main.scrollHeight - main.scrollTop - main.clientHeight < 120) main.scrollTop = main.scrollHeight;
  });
}

async function ask(text) {
  const model = state.model;
  const main = document.querySelector("main");
  document.querySelector(".empty-hint")?.remove();
  if (model.chat) $("turns").append(element("div", "turn user", text));
  const turn = element("div", "turn answer waiting");
  const answer = { tokens: [], counts: noCounts(), content: "", finish: "", text: element("div", "text") };
  if (!model.chat) answer.text.append(element("span", "prompt-text", text));
  turn.append(answer.text);
  $("turns").append(turn);
  listen(answer);
  state.answers.push(answer);
  select(answer, null, true);
  main.scrollTop = main.scrollHeight;

  state.stopping = new AbortController();
  busy(true);
  const notes = {};
  try {
    for await (const chunk of events(await post(text, notes))) {
      if (chunk.error) throw new Error(chunk.error.message);
      add(answer, chunk);
      drawSoon(answer);
      if (chunk.usage) notes.full = chunk.usage.total_tokens >= model.context;
    }
    if (answer.finish === "length") notes.cut = notes.full ? `the context of ${model.context} tokens is full` : "as many tokens as the settings allow";
    if (!answer.finish) throw new Error("the server ended the answer early");
    if (!answer.content.trim()) notes.empty = true;
  } catch (error) {
    notes.error = error.name === "AbortError" ? "stopped" : error.message;
    notes.bad = error.name !== "AbortError";
  }
  if (model.chat && answer.content.trim()) state.turns.push({ role: "user", content: text }, { role: "assistant", content: answer.content });
  turn.classList.remove("waiting");
  const words = [];
  if (notes.forgotten) words.push("the oldest turns no longer fit the context: forgotten");
  if (notes.cut) words.push(`cut off: ${notes.cut}`);
  if (notes.empty) words.push("no answer: the first token was the end");
  if (notes.error) words.push(notes.error);
  if (words.length) turn.append(element("p", notes.bad ? "note bad" : "note", words.join("; ")));
  drawSoon(answer);
  busy(false);
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  $("clear").hidden = yes;
  if (!yes) $("prompt").focus({ preventScroll: true });
}

// Controls

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = state.model && !state.model.chat ? $("prompt").value : $("prompt").value.trim();
  if (!state.model || !text.trim() || !$("stop").hidden) return;
  $("prompt").value = "";
  grow();
  ask(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}
$("prompt").addEventListener("input", grow);
$("stop").addEventListener("click", () => state.stopping.abort());
$("unpin").addEventListener("click", () => select(null, null, true));
$("clear").addEventListener("click", () => {
  state.turns = [];
  state.answers = [];
  state.answer = null;
  select(null, null, true);
  hint();
  $("clear").hidden = true;
  $("prompt").focus();
});
$("layer").addEventListener("change", () => {
  for (const answer of state.answers) answer.tokens.forEach(colour);
  drawStrip(state.pinned);
});
start().catch((error) => { $("facts").textContent = error.message; });
