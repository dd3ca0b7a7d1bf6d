// What the page of `graftlm serve` does: asks models, shows their answers as they come, keeps conversations.
// Whatever a person or a model wrote is put on the page as text (textContent) and never as HTML; the server's policy
// (CSP, Trusted Types) forbids the rest. What the browser keeps, words and small parts: the script in index.html.
"use strict";

const MAX_TRIES = 5;
const KEPT_EVERY_MS = 1000;

let models = []; // as /v1/models tells them
let talk; // the one on the page
let running = null; // {talk, controller} while an answer is under way
let editing = null; // the turn whose question is being edited
const parts = new WeakMap(); // answer → the element that shows it

// -------------------------------------------------------------------------------------------------- asking the server

class Problem extends Error {
  constructor(kind, ...details) {
    super(kind);
    this.kind = kind;
    this.details = details;
  }
}

function headers() {
  const key = keptByTab?.getItem(KEY) || $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function problemOf(response) {
  const error = parsed(await response.text())?.error ?? {};
  const message = textOf(error.message) || `${response.status} ${response.statusText}`;
  if (response.status === 401) return new Problem("key");
  if (response.status === 429 || response.status === 503) {
    return new Problem("busy", Number(response.headers.get("Retry-After")) || 2);
  }
  if (error.code === "context_length_exceeded") {
    const needed = /(?:asked for|at least) (\d+)/.exec(message), context = /context is (\d+)/.exec(message);
    const wanted = /(\d+) for the answer/.exec(message); // beyond the context, no shorter conversation helps
    if (needed && context) return new Problem("context", needed[1], context[1], wanted?.[1] ?? "0");
  }
  return new Problem("other", message);
}

async function request(path, options = {}) {
  try {
    return await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem("connection");
  }
}

async function loadModels() {
  try {
    const response = await request("/v1/models");
    if (!response.ok) throw await problemOf(response);
    models = listOf((await response.json()).data);
    notice("");
  } catch (error) {
    const known = error instanceof Problem ? error : new Problem("models");
    notice(words(`problem_${known.kind}`, ...known.details));
    $("notice").append(button("try_again", loadModels));
  }
  showModels();
}

function modelsAsked() {
  if (models.length > 1 && settings.model === BOTH) return models.map((model) => model.id);
  return [settings.model];
}

function messagesFor(asked, turn, model) {
  const messages = asked.system.trim() ? [{ role: "system", content: asked.system }] : [];
  for (const past of asked.turns.slice(asked.from, asked.turns.indexOf(turn))) {
    const said = past.answers.filter((answer) => answer.content);
    const answer = said.find((one) => one.model === model) ?? said[0];
    if (!answer) continue; // a question that got no answer is no part of the talk
    messages.push({ role: "user", content: past.question }, { role: "assistant", content: answer.content });
  }
  return [...messages, { role: "user", content: turn.question }];
}

function bodyFor(asked, turn, model) {
  const drawn = Object.keys(DEFAULTS).filter((name) => settings[name] !== null).map((name) => [name, settings[name]]);
  return JSON.stringify({
    model, messages: messagesFor(asked, turn, model), stream: true, stream_options: { include_usage: true },
    ...Object.fromEntries(drawn),
  });
}

async function readAnswer(response, answer, begun) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "", first = null, last = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Problem("broken"); // a whole answer ends with [DONE]
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      const chunk = parsed(data) ?? {};
      if (chunk.error) throw new Problem("failed");
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) {
        last = performance.now();
        first ??= last;
        answer.content += choice.delta.content;
        answer.first = (first - begun) / 1000;
      }
      answer.ending = choice?.finish_reason ?? answer.ending;
      if (chunk.usage) {
        answer.prompt_tokens = chunk.usage.prompt_tokens;
        answer.answer_tokens = chunk.usage.completion_tokens;
        if (last > first) answer.speed = ((answer.answer_tokens - 1) * 1000) / (last - first);
      }
    }
    repaint(answer);
  }
}

async function answerOne(asked, turn, answer, signal) {
  try {
    for (let tries = 1; ; tries++) {
      const begun = performance.now(), body = bodyFor(asked, turn, answer.model);
      const response = await request("/v1/chat/completions", { method: "POST", body, signal });
      if (response.ok) return await readAnswer(response, answer, begun);
      const problem = await problemOf(response);
      if (problem.kind !== "busy" || tries === MAX_TRIES) throw problem;
      await waitFor(problem.details[0], answer, signal);
    }
  } catch (error) {
    if (signal.aborted) answer.ending = "stopped";
    else {
      const problem = error instanceof Problem ? error : new Problem("broken");
      answer.problem = { kind: problem.kind, details: problem.details.map(String) };
      answer.ending = "failed";
    }
  } finally {
    answer.note = "";
  }
}

async function waitFor(seconds, answer, signal) {
  for (let left = seconds; left > 0; left--) {
    answer.note = words("busy", left);
    repaint(answer);
    await new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, 1000);
      signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
    });
  }
  answer.note = "";
}

// Ask for the answers to a turn of the shown conversation, or for `only` one of two anew; `drops`: leave the oldest
// turns out until the rest fits.
async function ask(turn, { only = null, drops = false } = {}) {
  if (running || !models.length) return;
  const asked = talk, controller = new AbortController(), from = asked.from;
  running = { talk: asked, controller };
  running.timer = setInterval(() => { if (talks.has(asked.id)) keep(asked); }, KEPT_EVERY_MS);
  editing = null;
  asked.updated = Date.now();
  for (;;) {
    const begin = (model) => ({ ...answerFrom({ model }), ending: "" });
    turn.answers = only ? turn.answers.map((one) => (one === only ? begin(one.model) : one)) : modelsAsked().map(begin);
    keep(asked);
    showTalk();
    $("announce").textContent = words("answering");
    await Promise.all(turn.answers.filter((answer) => !answer.ending).map(async (answer) => {
      await answerOne(asked, turn, answer, controller.signal);
      replaceAnswer(answer);
    }));
    const isTooLong = turn.answers.some((answer) => answer.problem?.kind === "context");
    if (!isTooLong || !drops) break;
    if (asked.from >= asked.turns.indexOf(turn)) {
      asked.from = from; // nothing helped
      break;
    }
    asked.from += 1;
  }
  clearInterval(running.timer);
  running = null;
  asked.updated = Date.now();
  if (talks.has(asked.id)) keep(asked); // it may have been deleted meanwhile
  if (asked === talk) showTalk();
  showRunning();
  showTalks();
  $("announce").textContent = turn.answers.map((answer) => words("done", answer.model, spoken(answer))).join("\n");
}

const spoken = (answer) => [answer.content || words("empty_answer"), problemText(answer.problem)].join(" ");

function stop() {
  running?.controller.abort();
}

// ----------------------------------------------------------------------------------------------------- showing a talk

function showTalk() {
  const stays = isAtEnd();
  keptByTab?.setItem(CURRENT, talk.id);
  const hasTwo = talk.turns.some((turn) => turn.answers.length > 1);
  $("room").classList.toggle("compare", hasTwo || (models.length > 1 && settings.model === BOTH));
  $("hello").hidden = talk.turns.length > 0;
  $("turns").replaceChildren(...talk.turns.map(turnPart));
  document.title = talk.turns.length ? `${titleOf(talk)} · GraftLM` : "GraftLM";
  showRunning();
  showTalks();
  if (stays) toEnd();
}

function showRunning() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !models.length;
}

function turnPart(turn, place) {
  const item = make("li", { className: place < talk.from ? "turn left-out" : "turn" });
  if (place === talk.from && place > 0) item.append(make("p", { className: "divider small", textContent: words("left_out") }));
  item.append(turn === editing ? editPart(turn, place) : questionPart(turn));
  const answers = make("div", { className: turn.answers.length > 1 ? "answers two" : "answers" });
  answers.append(...turn.answers.map((answer) => answerPart(answer, turn)));
  item.append(answers);
  return item;
}

function questionPart(turn) {
  const said = make("div", { className: "said", dir: "auto", textContent: turn.question });
  const tools = make("div", { className: "tools" });
  if (running?.talk !== talk) tools.append(button("edit", () => { editing = turn; showTalk(); }));
  return make("div", { className: "question" }, make("h3", { className: "unseen", textContent: words("you") }), said, tools);
}

function editPart(turn, place) {
  const field = make("textarea", { value: turn.question, dir: "auto", oninput: () => grow(field) });
  label(field, words("edit"));
  const cancel = () => { editing = null; showTalk(); $("text").focus(); };
  const save = () => {
    if (running || !field.value.trim()) return;
    turn.question = field.value;
    talk.turns.length = place + 1;
    talk.from = Math.min(talk.from, place);
    ask(turn);
    $("text").focus();
  };
  field.onkeydown = (event) => {
    if (isSendKey(event)) event.preventDefault(), save();
    if (event.key === "Escape") event.stopPropagation(), cancel();
  };
  const filled = make("button", { type: "button", className: "filled", textContent: words("save_ask"), onclick: save });
  const note = make("p", { className: "small", textContent: words("edit_note") });
  const box = make("div", { className: "edit" }, field, note, make("div", { className: "tools" }, filled, button("cancel", cancel)));
  requestAnimationFrame(() => { grow(field); field.focus(); });
  return make("div", { className: "question" }, box);
}

function answerPart(answer, turn) {
  const isNamed = turn.answers.length > 1 || models.length > 1;
  const name = make("h3", { textContent: answer.model, className: isNamed ? "" : "unseen" });
  const body = make("div", { className: "body", dir: "auto" });
  const part = make("article", { className: "answer" }, name, body);
  parts.set(answer, part);
  paintAnswer(answer, body);
  if (answer.ending) part.append(...endParts(answer, turn));
  part.setAttribute("aria-busy", String(!answer.ending));
  return part;
}

function endParts(answer, turn) {
  const isOneOfTwo = turn.answers.length > 1 && models.some((model) => model.id === answer.model);
  const isLast = turn === talk.turns.at(-1), tools = make("div", { className: "tools" }), found = [tools];
  if (answer.content && navigator.clipboard) tools.append(copyButton(answer.content));
  if (isLast && !running) tools.append(button(answer.problem ? "try_again" : "again", () => ask(turn, isOneOfTwo ? { only: answer } : {})));
  if (answer.problem) {
    found.unshift(make("p", { className: "problem", textContent: problemText(answer.problem) }));
    const isLong = answer.problem.kind === "context" && Number(answer.problem.details[2]) < Number(answer.problem.details[1]);
    if (isLast && !running && isLong && talk.turns.length - 1 > talk.from) tools.append(button("drop", () => ask(turn, { drops: true })));
  }
  const figures = [
    answer.answer_tokens !== null && words("counts", answer.prompt_tokens, answer.answer_tokens),
    answer.speed !== null && words("speed", answer.speed.toFixed(answer.speed < 10 ? 1 : 0)),
    answer.answer_tokens !== null && answer.first !== null && words("first", answer.first.toFixed(1)),
    ["length", "stopped"].includes(answer.ending) && !answer.problem && words(answer.ending),
  ].filter(Boolean);
  tools.append(make("span", { className: "figures", textContent: figures.join(" · ") }));
  return found;
}

function problemText(problem) {
  if (!problem) return "";
  const text = words(`problem_${problem.kind}`, ...problem.details);
  return problem.kind === "context" ? `${text} ${words("problem_context_fix")}` : text;
}

function copyButton(text) {
  const made = button("copy", async () => {
    await navigator.clipboard.writeText(text);
    made.textContent = words("copied");
    setTimeout(() => { made.textContent = words("copy"); }, 1500);
  });
  return made;
}

function paintAnswer(answer, body) {
  const blocks = blocksOf(answer.content);
  if (answer.note) blocks.push({ isCode: false, text: answer.note });
  else if (!blocks.length) blocks.push({ isCode: false, text: answer.ending && !answer.problem ? words("empty_answer") : "" });
  const isSame = blocks.length === body.children.length
    && blocks.every((block, place) => block.isCode === body.children[place].matches("figure"));
  if (!isSame) body.replaceChildren(...blocks.map(blockPart));
  blocks.forEach((block, place) => {
    const place_text = body.children[place].querySelector("code") ?? body.children[place];
    if (place_text.textContent !== block.text) place_text.textContent = block.text;
    body.children[place].classList.toggle("waiting", !answer.ending && place === blocks.length - 1);
  });
}

const unpainted = new Set();
function repaint(answer) {
  if (!unpainted.size) requestAnimationFrame(() => {
    const stays = isAtEnd();
    for (const one of unpainted) if (parts.has(one)) paintAnswer(one, parts.get(one).querySelector(".body"));
    unpainted.clear();
    if (stays) toEnd();
  });
  unpainted.add(answer);
}

function replaceAnswer(answer) {
  const turn = talk.turns.find((one) => one.answers.includes(answer));
  const stays = isAtEnd();
  if (turn && parts.get(answer)?.isConnected) parts.get(answer).replaceWith(answerPart(answer, turn));
  if (stays) toEnd();
}

function isAtEnd() {
  const { scrollHeight, scrollTop, clientHeight } = $("scroll");
  return scrollHeight - scrollTop - clientHeight < 80;
}

function toEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

// ------------------------------------------------------------------------------------- the list, the models, the rooms

function showTalks() {
  if ($("talks").contains(document.activeElement) && document.activeElement.matches("input")) return; // being renamed
  const act = { open: openTalk, deleted: deleteTalk };
  const newest = [...talks.values()].sort((a, b) => b.updated - a.updated);
  $("talks").replaceChildren(...newest.map((one) => listPart(one, one === talk, act)));
  $("export-all").hidden = !newest.length;
}

function openTalk(one) {
  talk = one;
  editing = null;
  document.activeElement?.blur?.();
  showTalk();
  toEnd();
  showSide(false);
}

function deleteTalk(one) {
  if (running?.talk === one) stop();
  forget(one.id);
  openTalk(newTalk());
  toast(words("deleted", titleOf(one)), "undo", () => { keep(one); openTalk(one); });
}

function showModels() {
  const names = models.map((model) => model.id), choices = names.length > 1 ? [BOTH, ...names] : names;
  if (names.length && !choices.includes(settings.model)) settings.model = choices[0];
  $("model").replaceChildren(...choices.map((name) => make("option", {
    value: name, textContent: name === BOTH ? `${words("both")}: ${names.join(" | ")}` : name, selected: name === settings.model,
  })));
  $("model").hidden = names.length < 2;
  $("model-name").hidden = names.length !== 1;
  $("model-name").textContent = names[0] ?? "";
  $("hello-title").textContent = words(settings.model === BOTH ? "hello_both" : "hello");
  if (running?.talk !== talk) showTalk();
}

function showWords() {
  translate();
  paintTheme();
  $("examples").replaceChildren(...[1, 2, 3].map((number) => {
    const text = words(`example_${number}`);
    return make("li", {}, make("button", { type: "button", textContent: text, onclick: () => say(text) }));
  }));
  showModels();
}

function showSide(isOpen) {
  $("side").classList.toggle("open", isOpen);
  $("shade").hidden = !isOpen;
  $("room").inert = isOpen;
  $("menu").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) $("side-close").focus();
}

function say(text) {
  if (running || !text.trim() || !models.length) return false;
  const turn = { question: text.toWellFormed?.() ?? text, answers: [] };
  talk.turns.push(turn);
  toEnd();
  ask(turn);
  return true;
}

// Enter alone sends; while an input method composes (Chinese!) it only takes the word. On a touch screen it is a new line.
function isSendKey(event) {
  const isPlain = event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
  return isPlain && !matchMedia("(pointer: coarse)").matches;
}

function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

// ------------------------------------------------------------------------------------------------------------ settings

function fillSettings() {
  $("p-system").value = talk.system;
  $("key").value = keptByTab?.getItem(KEY) ?? $("key").value;
  for (const name of Object.keys(DEFAULTS)) $(`p-${name}`).value = settings[name] ?? "", takeSetting(name);
}

// A value that is none, or out of range, is told and not taken.
function takeSetting(name) {
  const field = $(`p-${name}`), hint = $(`h-${name}`), isGood = field.checkValidity();
  field.setAttribute("aria-invalid", String(!isGood));
  hint.classList.toggle("wrong", !isGood);
  hint.textContent = isGood ? words(`${name}_hint`) : words("wrong", words(`${name}_hint`));
  if (isGood) settings[name] = field.value === "" ? null : field.valueAsNumber;
  keepSettings();
}

function wire() {
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    if (say($("text").value)) $("text").value = "", grow($("text"));
  };
  $("text").oninput = () => grow($("text"));
  $("text").onkeydown = (event) => { if (isSendKey(event)) event.preventDefault(), $("composer").requestSubmit(); };
  $("stop").onclick = () => { stop(); $("text").focus(); };
  $("new").onclick = () => { openTalk(talk.turns.length ? newTalk() : talk); $("text").focus(); };
  $("export-all").onclick = () => save([...talks.values()]);
  $("model").onchange = () => { settings.model = $("model").value; keepSettings(); showModels(); };
  $("language").onclick = () => { settings.language = settings.language === "en" ? "zh" : "en"; keepSettings(); showWords(); };
  $("theme").onclick = () => {
    settings.theme = THEMES[(THEMES.indexOf(settings.theme) + 1) % THEMES.length];
    keepSettings();
    paintTheme();
  };
  $("menu").onclick = () => showSide(true);
  $("side-close").onclick = $("shade").onclick = () => { showSide(false); $("menu").focus(); };
  $("settings-open").onclick = () => { fillSettings(); $("settings").showModal(); };
  $("settings-close").onclick = () => $("settings").close();
  $("p-system").oninput = () => {
    settings.system = talk.system = $("p-system").value;
    keepSettings();
    if (talks.has(talk.id)) keep(talk);
  };
  for (const name of Object.keys(DEFAULTS)) $(`p-${name}`).oninput = () => takeSetting(name);
  $("key").onchange = () => { keptByTab?.setItem(KEY, $("key").value.trim()); loadModels(); };
  $("reset").onclick = () => { Object.assign(settings, DEFAULTS); fillSettings(); };
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || $("settings").open) return;
    if ($("side").classList.contains("open")) $("side-close").click();
    else stop();
  });
  addEventListener("pagehide", () => { if (running) stop(), keep(running.talk); });
  addEventListener("storage", () => { // another tab kept something
    if (running) return;
    loadTalks();
    talk = talks.get(talk.id) ?? talk;
    if (!editing) showTalk();
  });
}

loadSettings();
loadTalks();
talk = talks.get(keptByTab?.getItem(CURRENT)) ?? newTalk();
wire();
showWords();
toEnd();
if (!kept) notice(words("storage_none"));
loadModels();
