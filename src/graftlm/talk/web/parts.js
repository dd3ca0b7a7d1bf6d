// The page's words in both languages, its colours, and the small parts everything else is made of. Whatever a person or a
// model wrote becomes text here (textContent), never HTML. Does not know conversations.
"use strict";

const WORDS = JSON.parse(document.getElementById("words").textContent);
const THEMES = ["system", "light", "dark"];

const $ = (id) => document.getElementById(id);

function words(key, ...values) {
  return WORDS[settings.language][key].replace(/\{(\d)\}/g, (_, place) => values[place]);
}

function translate(root = document) {
  document.documentElement.lang = settings.language === "zh" ? "zh-CN" : "en";
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = words(element.dataset.t);
  for (const element of root.querySelectorAll("[data-t-label]")) label(element, words(element.dataset.tLabel));
  for (const element of root.querySelectorAll("[data-t-placeholder]")) element.placeholder = words(element.dataset.tPlaceholder);
}

function label(element, text) {
  element.setAttribute("aria-label", text);
  if (element.matches("button")) element.title = text;
}

function paintTheme() {
  document.documentElement.dataset.theme = settings.theme;
  $("theme").replaceChildren(icon(settings.theme));
  label($("theme"), words(`theme_${settings.theme}`));
}

function make(tag, options = {}, ...children) {
  const element = Object.assign(document.createElement(tag), options);
  element.append(...children);
  return element;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

function button(key, act, iconName = null) {
  const made = make("button", { type: "button", className: iconName ? "icon small" : "quiet", onclick: act });
  if (iconName) made.append(icon(iconName)), label(made, words(key));
  else made.textContent = words(key);
  return made;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

let toastTimer;
function toast(text, key, act) {
  clearTimeout(toastTimer);
  $("toast").replaceChildren(make("span", { textContent: text }), button(key, () => { $("toast").hidden = true; act(); }));
  $("toast").hidden = false;
  toastTimer = setTimeout(() => { $("toast").hidden = true; }, 10000);
}

// A fence of three or more ` or ~ begins and ends code; everything else is text, its whitespace kept.
function blocksOf(text) {
  const blocks = [{ isCode: false, lines: [] }];
  let fence = "";
  for (const line of text.split("\n")) {
    const begins = !fence && /^ {0,3}(`{3,}|~{3,}) *([^\s`]*)[^`]*$/.exec(line);
    const ends = fence && line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
    if (begins) fence = begins[1], blocks.push({ isCode: true, name: begins[2], lines: [] });
    else if (ends) fence = "", blocks.push({ isCode: false, lines: [] });
    else blocks.at(-1).lines.push(line);
  }
  return blocks.map((block, place) => {
    let text = block.lines.join("\n"); // the empty lines between text and code are the box's margin
    if (!block.isCode && place > 0) text = text.replace(/^\n+/, "");
    if (!block.isCode && place < blocks.length - 1) text = text.replace(/\n+$/, "");
    return { ...block, text };
  }).filter((block) => block.isCode || block.text);
}

function blockPart(block) {
  if (!block.isCode) return make("div", { className: "said", dir: "auto" });
  const caption = make("figcaption", { textContent: block.name || words("code") });
  const code = make("code");
  if (navigator.clipboard) caption.append(button("copy", () => navigator.clipboard.writeText(code.textContent)));
  return make("figure", { dir: "ltr" }, caption, make("pre", { tabIndex: 0 }, code));
}
