"use strict";
// Asks the server that gave this page, and shows what it says as text: nothing becomes markup.

const at = (id) => document.getElementById(id);
const waiting = new Map(); // the frames that have no picture yet, and of what they will be
let newest = new AbortController(); // of the last question, which ends all that is fetched
let limitBytes = Infinity;

async function ask(address, options) {
  const answer = await fetch(address, options);
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

function address(path, parameters) {
  return `${path}?${new URLSearchParams(parameters)}`;
}

// A key alone may stand several times in a shard.
function placeOf({ key, shard, sample_index: sample }) {
  return { key, shard, sample };
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

// What is still fetched would make the next question wait: a browser has few connections.
function endOthers() {
  newest.abort();
  newest = new AbortController();
  return newest.signal;
}

// One question at a time counts: what it says is told, its answer shown and kept for "back".
async function question(telling, asking) {
  const signal = endOthers();
  at("problem").hidden = true;
  at("status").textContent = telling;
  document.body.setAttribute("aria-busy", "true");
  try {
    const found = await asking(signal);
    if (signal.aborted) return;
    history.pushState(found, "");
    show(found);
    at("heading").focus();
  } catch (error) {
    if (signal.aborted) return;
    at("status").textContent = "";
    at("problem").textContent = error.message;
    at("problem").hidden = false;
    for (const [frame, neighbor] of waiting) fill(frame, neighbor); // what is shown stays
  } finally {
    if (!signal.aborted) document.body.removeAttribute("aria-busy");
  }
}

function askKey(parameters) {
  return question("Looking for what is nearest …",
    (signal) => ask(address("key", parameters), { signal }));
}

function askPicture(file) {
  if (!file) return;
  return question("Embedding the picture …", (signal) => {
    if (file.size > limitBytes) {
      throw new Error(`The picture has more than ${limitBytes >> 20} MiB; give a smaller one.`);
    }
    return ask("picture", { method: "POST", body: file, signal });
  });
}

function askSome() {
  const seed = Math.floor(Math.random() * 2 ** 31);
  return question("Looking …", (signal) => ask(address("some", { seed }), { signal }));
}

function show(found) {
  at("status").textContent = `${found.neighbors.length} pictures`;
  at("problem").hidden = true;
  at("heading").textContent = found.heading;
  at("heading").hidden = false;
  waiting.clear();
  showAsked(found.asked);
  at("neighbors").replaceChildren(...found.neighbors.map(item));
}

function showAsked(asked) {
  at("asked").hidden = !asked;
  if (!asked) return;
  const frame = element("div", "frame");
  const told = element("div");
  if (asked.picture) {
    frame.append(image(asked.picture, "The picture you gave"));
    told.append(element("b", "", "Your picture"));
  } else {
    fill(frame, asked);
    told.append(element("b", "", asked.shown.caption || asked.shown.key),
      element("span", "note", `${asked.shown.key} in ${asked.shown.shard}`));
  }
  at("asked").replaceChildren(frame, told);
}

function item(neighbor) {
  const { key, shard, caption } = neighbor.shown;
  const distance = neighbor.distance === null ? "" : `distance ${neighbor.distance.toFixed(4)}`;
  const card = element("button", "card");
  card.type = "button";
  card.setAttribute("aria-label",
    [caption || key, key, `shard ${shard}`, distance, "find what is nearest to it"].join(", "));
  card.title = caption; // of which two lines are shown
  const frame = element("span", "frame");
  const told = element("span", "told");
  const head = element("span", "caption", caption || key);
  head.dir = "auto";
  told.append(head);
  if (caption) told.append(element("span", "key", key));
  told.append(element("span", "shard", shard));
  if (distance) told.append(element("span", "distance", distance));
  card.append(frame, told);
  card.addEventListener("click", () => askKey(placeOf(neighbor)));
  fill(frame, neighbor);
  const made = element("li");
  made.append(card);
  return made;
}

function image(source, description) {
  const made = element("img");
  made.alt = description;
  made.src = source;
  return made;
}

// The picture, or why there is none.
async function fill(frame, neighbor) {
  const { signal } = newest;
  waiting.set(frame, neighbor);
  try {
    const answer = await fetch(address("thumbnail", placeOf(neighbor)), { signal });
    if (!answer.ok) throw new Error((await answer.json()).error);
    const source = URL.createObjectURL(await answer.blob());
    const picture = image(source, neighbor.shown.caption || neighbor.shown.key);
    picture.addEventListener("load", () => URL.revokeObjectURL(source));
    frame.replaceChildren(picture);
  } catch (error) {
    if (signal.aborted) return;
    frame.replaceChildren(element("span", "gone", `No picture: ${error.message}`));
  }
  waiting.delete(frame);
}

// Arrows go to the nearest card in that direction; Home and End to the first and the last.
function move(event) {
  const cards = [...at("neighbors").querySelectorAll(".card")];
  const from = cards.indexOf(document.activeElement);
  const above = document.activeElement === at("heading"); // where an answer puts the focus
  if ((from < 0 && !above) || event.altKey || event.ctrlKey || event.metaKey) return;
  const columns = above ? 1 : cards.filter((c) => c.offsetTop === cards[0].offsetTop).length;
  const to = { ArrowLeft: from - 1, ArrowRight: from + 1, ArrowUp: from - columns,
    ArrowDown: from + columns, Home: 0, End: cards.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  if (cards[to]) cards[to].focus();
}

function drop(event) {
  event.preventDefault();
  at("drop").classList.remove("over");
  const file = [...event.dataTransfer.files][0];
  if (file) askPicture(file);
}

async function start() {
  at("file").addEventListener("change", () => {
    askPicture(at("file").files[0]);
    at("file").value = ""; // the same file may be chosen again
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
  document.addEventListener("dragleave", () => at("drop").classList.remove("over"));
  document.addEventListener("drop", drop);
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files][0];
    if (file) askPicture(file);
  });
  document.addEventListener("keydown", move);
  at("by-key").addEventListener("submit", (event) => {
    event.preventDefault();
    const [key, shard] = [at("key").value, at("shard").value];
    askKey(shard ? { key, shard } : { key });
  });
  at("others").addEventListener("click", askSome);
  window.addEventListener("popstate", (event) => {
    endOthers(); // what was asked for meanwhile is not shown
    document.body.removeAttribute("aria-busy");
    if (event.state) show(event.state);
  });
  try {
    const about = await ask("about");
    limitBytes = about.max_upload_bytes;
    at("about").textContent = about.text;
    const first = history.state || await ask(address("some", { seed: 0 })); // as it was on reload
    history.replaceState(first, "");
    show(first);
  } catch (error) {
    at("problem").textContent = error.message;
    at("problem").hidden = false;
  }
}

start();
