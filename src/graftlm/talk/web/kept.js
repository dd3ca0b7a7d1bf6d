// What the browser keeps: conversations, settings, the key of this tab. Anything may stand there, so what is read is
// checked. Does not show or ask anything.
// A conversation ("talk") is {id, title, created, updated, system, from, turns}; a turn is a question and an answer of
// each model asked; turns before `from[model]` no longer fit that model and are not sent to it.
"use strict";

const DEFAULTS = { temperature: 0.7, top_p: 0.9, top_k: 0, repetition_penalty: 1, max_tokens: null, seed: null };
const TALK = "graftlm.talk.", SETTINGS = "graftlm.settings", CURRENT = "graftlm.current", KEY = "graftlm.key";

const kept = storage("localStorage"), keptByTab = storage("sessionStorage");
const talks = new Map();
let settings;

function storage(name) {
  try {
    window[name].setItem("graftlm.probe", "1");
    window[name].removeItem("graftlm.probe");
    return window[name];
  } catch {
    return null; // switched off, or full
  }
}

function parsed(text) {
  try { return JSON.parse(text); } catch { return null; }
}

const textOf = (value) => (typeof value === "string" ? value : "");
const numberOf = (value, otherwise) => (typeof value === "number" && Number.isFinite(value) ? value : otherwise);
const listOf = (value) => (Array.isArray(value) ? value : []);

// Anything may stand in the storage: only what has the right form is taken, field by field.
function talkFrom(raw) {
  if (!raw || typeof raw !== "object" || !/^[0-9a-f]{16}$/.test(textOf(raw.id))) return null;
  const turns = listOf(raw.turns).filter((turn) => turn && typeof turn.question === "string").map((turn) => ({
    question: turn.question,
    answers: listOf(turn.answers).filter((answer) => answer && typeof answer === "object").map(answerFrom),
  }));
  const from = Object.fromEntries(Object.entries(Object(raw.from)).map(([model, place]) => (
    [model, Math.min(Math.max(Math.trunc(numberOf(place, 0)), 0), Math.max(turns.length - 1, 0))]
  )));
  return {
    id: raw.id, title: textOf(raw.title), created: numberOf(raw.created, 0), updated: numberOf(raw.updated, 0),
    system: textOf(raw.system), from, turns,
  };
}

const fromOf = (one, model) => (Object.hasOwn(one.from, model) ? one.from[model] : 0);

function answerFrom(raw) {
  const problem = raw.problem && typeof raw.problem === "object" ? raw.problem : null;
  return {
    model: textOf(raw.model), content: textOf(raw.content), ending: textOf(raw.ending) || "stopped",
    prompt_tokens: numberOf(raw.prompt_tokens, null), answer_tokens: numberOf(raw.answer_tokens, null),
    first: numberOf(raw.first, null), speed: numberOf(raw.speed, null),
    problem: problem && {
      kind: Object.hasOwn(WORDS.en, `problem_${problem.kind}`) ? problem.kind : "other",
      details: listOf(problem.details).map(String),
    },
  };
}

function newTalk() {
  const id = [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", created: Date.now(), updated: Date.now(), system: settings.system, from: {}, turns: [] };
}

function keep(changed) {
  talks.set(changed.id, changed);
  try {
    kept?.setItem(TALK + changed.id, JSON.stringify(changed));
  } catch {
    notice(words("storage_full"));
  }
}

function forget(id) {
  talks.delete(id);
  kept?.removeItem(TALK + id);
}

function loadTalks() {
  talks.clear();
  for (let i = 0; i < (kept?.length ?? 0); i++) {
    const key = kept.key(i);
    const found = key.startsWith(TALK) ? talkFrom(parsed(kept.getItem(key))) : null;
    if (found && key === TALK + found.id) talks.set(found.id, found);
  }
}

function loadSettings() {
  const raw = parsed(kept?.getItem(SETTINGS)) ?? {};
  settings = {
    language: Object.hasOwn(WORDS, textOf(raw.language)) ? raw.language : navigator.language.startsWith("zh") ? "zh" : "en",
    theme: THEMES.includes(raw.theme) ? raw.theme : "system", model: textOf(raw.model), system: textOf(raw.system),
  };
  for (const [name, value] of Object.entries(DEFAULTS)) settings[name] = numberOf(raw[name], value);
}

function keepSettings() {
  try { kept?.setItem(SETTINGS, JSON.stringify(settings)); } catch { /* told where conversations are kept */ }
}
