// The page of `graftlm serve`: its models, its settings, what each control does, and the start. The other rooms: parts.js,
// kept.js, asking.js, showing.js, list.js; serving/page.py makes one file of them.
"use strict";

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
  if (running && running.talk !== talk && text.trim()) toast(words("busy_elsewhere", titleOf(running.talk)), "stop", stop);
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

function fillSettings() {
  $("p-system").value = talk.system;
  $("system").hidden = !modelsAsked().some(takesSystem);
  $("system").open = Boolean(talk.system.trim());
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
