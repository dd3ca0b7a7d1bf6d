// The list of conversations: opened, renamed, deleted and brought back; what was answered is exported.
"use strict";

const titleOf = (one) => one.title || one.turns[0]?.question.trim().replace(/\s+/g, " ").slice(0, 80) || words("untitled");

const hasText = (answer) => Boolean(answer.content.trim());
const hasAnswers = (one) => one.turns.some((turn) => turn.answers.some(hasText));

// What `model` is told was answered: its own words, or where it has none those of another; nothing where nobody answered.
function answerFor(turn, model) {
  const said = turn.answers.filter(hasText);
  return said.find((answer) => answer.model === model) ?? said[0];
}

// `act`: what a press does, {open, deleted}; the one shown can be renamed, exported and deleted.
function listPart(one, isShown, act) {
  const open = make("button", { type: "button", className: "open", dir: "auto", textContent: titleOf(one), title: titleOf(one) });
  open.onclick = () => act.open(one);
  const item = make("li", { className: isShown ? "current" : "" }, open);
  if (!isShown) return item;
  open.setAttribute("aria-current", "true");
  item.append(button("rename", () => item.replaceChildren(renamePart(one, act)), "rename"));
  if (hasAnswers(one)) item.append(button("export", () => save([one]), "export"));
  item.append(button("delete", () => act.deleted(one), "delete"));
  return item;
}

function renamePart(one, act) {
  const field = make("input", { value: titleOf(one), maxLength: 200, dir: "auto" });
  label(field, words("new_name"));
  const end = (isKept) => {
    field.onblur = null; // leaves the page now, which blurs it too
    if (isKept) one.title = field.value.trim(), keep(one);
    act.open(one);
  };
  field.onblur = () => end(true);
  field.onkeydown = (event) => {
    if (event.key === "Enter" && !event.isComposing) end(true);
    if (event.key === "Escape") event.stopPropagation(), end(false);
  };
  requestAnimationFrame(() => field.select());
  return field;
}

// A row for each model that spoke, in the form `graftlm` itself reads (/load, data): one is JSON, more JSONL. It is
// the talk as that model was sent it, up to its last answer; a question that nobody answered is no part of it.
function rowsOf(one) {
  const names = [...new Set(one.turns.flatMap((turn) => turn.answers.filter(hasText).map((answer) => answer.model)))];
  return names.map((model) => {
    const messages = one.system.trim() ? [{ role: "system", content: one.system }] : [];
    const last = one.turns.findLastIndex((turn) => turn.answers.some((answer) => answer.model === model && hasText(answer)));
    for (const turn of one.turns.slice(0, last + 1)) {
      const said = answerFor(turn, model);
      if (said) messages.push({ role: "user", content: turn.question }, { role: "assistant", content: said.content });
    }
    return JSON.stringify({ title: titleOf(one), created: new Date(one.created).toISOString(), model, messages });
  });
}

function save(chosen) {
  const rows = chosen.flatMap(rowsOf), isOne = rows.length === 1;
  const url = URL.createObjectURL(new Blob([rows.join("\n"), "\n"], { type: isOne ? "application/json" : "application/jsonl" }));
  const name = chosen.length === 1 ? titleOf(chosen[0]).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) : "conversations";
  make("a", { href: url, download: `${name}.${isOne ? "json" : "jsonl"}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function showTalks() {
  if ($("talks").contains(document.activeElement) && document.activeElement.matches("input")) return; // being renamed
  const act = { open: openTalk, deleted: deleteTalk };
  const newest = [...talks.values()].sort((a, b) => b.updated - a.updated);
  $("talks").replaceChildren(...newest.map((one) => listPart(one, one === talk, act)));
  $("export-all").hidden = !newest.some(hasAnswers);
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
