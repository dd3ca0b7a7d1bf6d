// Asking the server: models, answers as they come, waiting, stopping, and what is told when something goes wrong.
// Does not know how an answer is shown: showing.js does.
"use strict";

const BOTH = "/both"; // no model is called so: names are folders' or hub ids
const MAX_TRIES = 5;
const KEPT_EVERY_MS = 1000;

let models = []; // as /v1/models tells them
let running = null; // {talk, controller} while an answer is under way

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
    const needed = /(asked for|at least) (\d+)/.exec(message), context = /context is (\d+)/.exec(message);
    const wanted = /(\d+) for the answer/.exec(message); // beyond the context, no shorter conversation helps
    if (needed && context) {
      return new Problem("context", needed[2], context[1], wanted?.[1] ?? "0", needed[1] === "at least" ? "least" : "");
    }
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

// Whether a model's template has a place for a system message; a server that does not tell is believed to have one.
const takesSystem = (id) => models.find((model) => model.id === id)?.takes_system !== false;

function modelsAsked() {
  if (models.length > 1 && settings.model === BOTH) return models.map((model) => model.id);
  return [settings.model];
}

function messagesFor(asked, turn, model) {
  const messages = asked.system.trim() && takesSystem(model) ? [{ role: "system", content: asked.system }] : [];
  for (const past of asked.turns.slice(fromOf(asked, model), asked.turns.indexOf(turn))) {
    const answer = answerFor(past, model);
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

// Ask for the answers to a turn of the shown conversation, or for that of the model `only` anew; `drops`: to a model whose
// context is too short for the talk, send less and less of its oldest turns until the rest fits.
async function ask(turn, { only = null, drops = false } = {}) {
  if (running || !models.length) return;
  const asked = talk, controller = new AbortController(), from = { ...asked.from };
  let names = only && [only]; // of one answer's model, the others stay as they are
  running = { talk: asked, controller };
  running.timer = setInterval(() => { if (talks.has(asked.id)) keep(asked); }, KEPT_EVERY_MS);
  editing = null;
  asked.updated = Date.now();
  do {
    const begin = (model) => ({ ...answerFrom({ model }), ending: "" });
    turn.answers = names
      ? turn.answers.map((one) => (names.includes(one.model) ? begin(one.model) : one)) : modelsAsked().map(begin);
    const begun = turn.answers.filter((answer) => !answer.ending);
    keep(asked);
    showTalk();
    $("announce").textContent = words("answering");
    await Promise.all(begun.map(async (answer) => {
      await answerOne(asked, turn, answer, controller.signal);
      replaceAnswer(answer);
    }));
    names = begun.filter((answer) => drops && answer.problem?.kind === "context").map((answer) => answer.model);
    names = names.filter((model) => {
      const canHelp = fromOf(asked, model) < asked.turns.indexOf(turn);
      asked.from[model] = canHelp ? fromOf(asked, model) + 1 : from[model] ?? 0; // nothing helped: nothing more is left out
      return canHelp;
    });
  } while (names.length);
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
