"use strict";
const survey = JSON.parse(document.getElementById("values").textContent);
const $ = (id) => document.getElementById(id);
const questions = survey.questions;  // [name, text], in order
const picks = [...document.querySelectorAll(".pick")];
const BEFORE = '✓ <span class="number" aria-hidden="true">1</span><span class="visually-hidden">your first answer</span>';
const say = (n, one, many) => `${n} ${n === 1 ? one : many}`;

// A rater's answers are one list of image keys: question after question, caption after caption, in the rater's order.
let rater = "", order = [], answers = [], keeps = true;

// ---- Chance: the order, and what lies left, are a function of survey (its digest has the seed) and rater. ----
function chance(text) {  // xmur3 hashes the text to a state for mulberry32
  let h = 1779033703 ^ text.length;
  for (let i = 0; i < text.length; i++) {
    h = Math.imul(h ^ text.charCodeAt(i), 3432918353);
    h = (h << 13) | (h >>> 19);
  }
  h = Math.imul(h ^ (h >>> 16), 2246822507);
  h = Math.imul(h ^ (h >>> 13), 3266489909);
  let state = (h ^ (h >>> 16)) >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}
function shuffled(name) {
  const random = chance(`${survey.survey}/${name}`);
  const items = survey.items.slice();
  for (let i = items.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [items[i], items[j]] = [items[j], items[i]];
  }
  return items.map((item) => ({ ...item, images: random() < 0.5 ? item.images : [item.images[1], item.images[0]] }));
}

// ---- What the browser keeps ----
const known = (name) => name.normalize("NFC").toLowerCase().split(/\s+/).filter(Boolean).join(" ");
const place = (name) => `dalle-survey/${survey.survey}/${known(name)}`;
const latest = `dalle-survey/${survey.survey}`;
function recall(name) {  // answers as far as they are to images of this rater's order
  const items = shuffled(known(name));
  let kept = [];
  try { kept = JSON.parse(localStorage.getItem(place(name))); } catch { /* nothing, or not ours */ }
  if (!Array.isArray(kept)) return [];
  const wrong = kept.findIndex((key, i) => {
    const item = items[Math.floor(i / questions.length)];
    return !item || item.images.every((image) => image[0] !== key);
  });
  return wrong < 0 ? kept : kept.slice(0, wrong);
}
function keep() {
  try {
    localStorage.setItem(place(rater), JSON.stringify(answers));
    localStorage.setItem(latest, rater);
  } catch { keeps = false; }
}
try {
  localStorage.setItem("dalle-survey", "");
  localStorage.removeItem("dalle-survey");
} catch { keeps = false; }

// ---- Screens ----
function show(name) {
  for (const id of ["start", "vote", "done"]) $(id).hidden = id !== name;
}
function start() {
  $("how-many").textContent = say(survey.items.length, "caption", "captions");
  $("questions").replaceChildren(...questions.map(([, text]) => Object.assign(document.createElement("li"), { textContent: text })));
  $("people").textContent = survey.wanted > 1 ? ` ${survey.wanted} people are asked to judge each pair, each by themselves.` : "";
  $("forgets").hidden = keeps;
  let last = "";
  try { last = localStorage.getItem(latest) || ""; } catch { /* then nobody was here */ }
  $("rater").value = last;
  greet();
  show("start");
  $("rater").focus();
}
function greet() {
  const name = $("rater").value, done = known(name) ? recall(name).length : 0, all = survey.items.length;
  const judged = Math.floor(done / questions.length);
  $("go").textContent = done ? "Go on" : "Start";
  $("about-name").textContent = done ? `You have judged ${judged} of ${all} pairs.` : "";
}
function next() {
  if (answers.length === order.length * questions.length) return finish();
  const at = Math.floor(answers.length / questions.length), number = answers.length % questions.length;
  const item = order[at];
  show("vote");
  $("count").textContent = `${at + 1} of ${order.length}`;
  $("progress").max = order.length * questions.length;
  $("progress").value = answers.length;
  $("progress").setAttribute("aria-valuetext", `pair ${at + 1} of ${order.length}`);
  $("caption").textContent = item.caption;
  $("ask").classList.toggle("long", item.caption.length > 140);
  $("ask").dataset.question = number;
  const mark = Object.assign(document.createElement("span"), { className: "number", textContent: number + 1 });
  mark.setAttribute("aria-hidden", "true");
  $("question").replaceChildren(mark, questions[number][1]);
  picks.forEach((pick, side) => {
    const [key, source] = item.images[side];
    const image = pick.querySelector("img");
    if (image.src !== source) image.src = source;
    const chosen = number > 0 && answers[at * questions.length] === key;
    pick.querySelector(".before").innerHTML = chosen ? BEFORE : "";
  });
  $("undo").disabled = answers.length === 0;
  $("question").focus({ preventScroll: true });  // read aloud, and a key pressed again answers nothing by itself
}
function finish() {
  $("all-judged").textContent = `You have judged ${order.length === 1 ? "the only pair" : `all ${order.length} pairs`}, ${rater}.`;
  $("saved").textContent = "";
  show("done");
  $("thanks").focus();
}

// ---- Answers ----
function answer(side) {
  const at = Math.floor(answers.length / questions.length);
  if ($("vote").hidden || at >= order.length) return;
  answers.push(order[at].images[side][0]);
  keep();
  next();
}
function undo() {
  if (!rater || !answers.length) return;
  answers.pop();
  keep();
  next();
}
function votes() {
  const whole = order.slice(0, Math.floor(answers.length / questions.length));
  const given = whole.map((item, i) => ({
    caption: item.caption,
    first: item.images[0][0],  // left, or on top
    ...Object.fromEntries(questions.map(([name], q) => [name, answers[i * questions.length + q]])),
  }));
  const { format, version, inputs, wanted } = survey;
  return { format, version, survey: survey.survey, inputs, captions: survey.items.length, wanted, rater, votes: given };
}
function save() {
  const file = new Blob([JSON.stringify(votes(), null, 1) + "\n"], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = `votes-${known(rater).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "") || "rater"}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  $("saved").textContent = `Saved as ${link.download} where your browser keeps downloads.`;
}

// ---- Events ----
$("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("rater").value.trim().replace(/\s+/g, " ");
  if (!known(name)) return;
  [rater, order, answers] = [name, shuffled(known(name)), recall(name)];
  keep();
  next();
});
$("rater").addEventListener("input", greet);
picks.forEach((pick, side) => pick.addEventListener("click", (event) => {
  if (event.detail < 2) answer(side);  // the second click of a double click was not for the next question
}));
$("undo").addEventListener("click", undo);
$("back").addEventListener("click", undo);
$("save").addEventListener("click", save);
$("save-now").addEventListener("click", save);
$("other").addEventListener("click", () => {
  try { localStorage.removeItem(latest); } catch { /* nothing was kept */ }
  [rater, order, answers] = ["", [], []];
  start();
});
const keys = { ArrowLeft: 0, ArrowUp: 0, 1: 0, ArrowRight: 1, ArrowDown: 1, 2: 1 };
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || !$("start").hidden) return;
  if (event.key in keys && !$("vote").hidden) answer(keys[event.key]);
  else if (["u", "U", "Backspace"].includes(event.key)) undo();
  else return;
  event.preventDefault();
});
addEventListener("beforeunload", (event) => {
  if (!keeps && answers.length) event.preventDefault();
});
start();
