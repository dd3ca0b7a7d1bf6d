// The conversation on the page: its questions and answers, painted as they come. Does not know the server.
"use strict";

let talk; // the one on the page
let editing = null; // the turn whose question is being edited
const parts = new WeakMap(); // answer → the element that shows it

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
  const isLeftOut = turn.answers.length && turn.answers.every((answer) => place < fromOf(talk, answer.model));
  const item = make("li", { className: isLeftOut ? "turn left-out" : "turn" });
  const cut = Object.keys(talk.from).filter((model) => place > 0 && place === talk.from[model]);
  if (cut.length) {
    const isAll = turn.answers.every((answer) => cut.includes(answer.model));
    const told = isAll ? words("left_out") : words("left_out_of", cut.join(", "));
    item.append(make("p", { className: "divider small", textContent: told }));
  }
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
    for (const model of Object.keys(talk.from)) talk.from[model] = Math.min(talk.from[model], place);
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
  const isLeftOut = talk.turns.indexOf(turn) < fromOf(talk, answer.model);
  const part = make("article", { className: isLeftOut ? "answer left-out" : "answer" }, name, body);
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
  const chosen = isOneOfTwo ? { only: answer.model } : {};
  if (isLast && !running) tools.append(button(answer.problem ? "try_again" : "again", () => ask(turn, chosen)));
  if (answer.problem) {
    found.unshift(make("p", { className: "problem", textContent: problemText(answer.problem) }));
    const isLong = answer.problem.kind === "context" && Number(answer.problem.details[2]) < Number(answer.problem.details[1]);
    const hasOlder = talk.turns.length - 1 > fromOf(talk, answer.model);
    if (isLast && !running && isLong && hasOlder) tools.append(button("drop", () => ask(turn, { ...chosen, drops: true })));
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
  const isLeast = problem.kind === "context" && problem.details[3]; // a long text is refused before it is counted
  const kind = isLeast ? "context_least" : problem.kind, text = words(`problem_${kind}`, ...problem.details);
  return problem.kind === "context" ? `${text} ${words(`problem_${kind}_fix`)}` : text;
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
