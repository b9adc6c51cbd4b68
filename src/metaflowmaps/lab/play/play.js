// The playground's page: it asks its server in JSON, puts answers into the page as text and pictures, and keeps the runs.
"use strict";

const at = id => document.getElementById(id);
const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
const short = x => x === null ? "–" : Math.abs(x) >= 1000 ? Math.round(x).toLocaleString("en") : String(Number(x.toPrecision(3)));

async function ask(question, asked = {}) {
  const answer = await fetch("/" + question, { method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify(asked) }).catch(() => { throw new Error("the server does not answer: was it stopped?"); });
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

function say(where, text, wrong = false) { at(where).textContent = text; at(where).classList.toggle("error", wrong); }

function show(gallery, pictures, titles, readout) {
  gallery.replaceChildren(...pictures.map((src, i) => {
    const picture = make("img", { src, alt: titles[i], title: titles[i] });
    for (const type of ["pointerover", "click"]) picture.addEventListener(type, () => say(readout, titles[i]));
    return picture;
  }));
}

// -- the picture: one that the map made, by its seed, or what was drawn on it ----------------------------------------
let about, chosen = { picture: null, pixels: [] }, noise = 0, pictureSeed = 0;
const canvas = at("canvas"), brush = canvas.getContext("2d", { willReadFrequently: true });

function pixelsOfCanvas() {
  const { data } = brush.getImageData(0, 0, canvas.width, canvas.height), out = [];
  for (let i = 0; i < data.length; i += 4)
    if (about.shape[0] === 1) out.push(Math.round((data[i] + data[i + 1] + data[i + 2]) / 3));
    else out.push(data[i], data[i + 1], data[i + 2]);
  return out;
}

function drawn() {
  document.querySelector("#choices .chosen")?.classList.remove("chosen");
  chosen = { picture: null, pixels: pixelsOfCanvas() };
  redraw();
}

function background() { const [r, g, b] = brush.getImageData(0, 0, 1, 1).data; return (r + g + b) / 3; }

async function choose(picture, seed) {
  document.querySelector("#choices .chosen")?.classList.remove("chosen");
  picture.classList.add("chosen");
  chosen = { picture: seed, pixels: [] };
  await picture.decode();
  brush.drawImage(picture, 0, 0, canvas.width, canvas.height);
  at("colour").value = background() < 128 ? "#ffffff" : "#222222";
  redraw();
}

async function otherPictures() {
  const told = await ask("pictures", { seed: pictureSeed, label: at("label").value });
  show(at("choices"), told.pictures, told.seeds.map(seed => "seed " + seed), "posterior-said");
  [...at("choices").children].forEach((picture, i) => picture.addEventListener("click", () => choose(picture, told.seeds[i])));
  await choose(at("choices").firstChild, told.seeds[0]);
}

let last = null;
function stroke(event) {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  const here = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  Object.assign(brush, { strokeStyle: at("colour").value, lineWidth: Math.max(1, canvas.width / 9), lineCap: "round" });
  brush.beginPath();
  brush.moveTo(...(last ?? here));
  brush.lineTo(here[0] + 0.01, here[1]);
  brush.stroke();
  last = here;
  drawn();
}
canvas.addEventListener("pointerdown", event => { canvas.setPointerCapture(event.pointerId); last = null; stroke(event); });
canvas.addEventListener("pointermove", event => { if (event.buttons) stroke(event); });
canvas.addEventListener("pointerup", () => { last = null; });
at("clear").addEventListener("click", () => {
  brush.fillStyle = background() < 128 ? "black" : "white";
  brush.fillRect(0, 0, canvas.width, canvas.height);
  drawn();
});

// -- draws: one question at a time, and the latest wins --------------------------------------------------------------
let asking = false, again = false;
async function redraw() {
  at("t-said").value = "t = " + Number(at("t").value).toFixed(2);
  if (asking) { again = true; return; }
  asking = true;
  try {
    const told = await ask("posterior", { ...chosen, t: Number(at("t").value), noise, label: at("label").value });
    at("noisy").src = told.noisy;
    show(at("draws"), told.draws, told.seeds.map(seed => "draw of seed " + seed), "posterior-said");
    say("posterior-said", `${told.draws.length} draws, ${told.evaluations} network calls, ${short(told.seconds)} seconds`);
  } catch (error) { say("posterior-said", error.message, true); }
  asking = false;
  if (again) { again = false; redraw(); }
}
at("t").addEventListener("input", redraw);
at("noise").addEventListener("click", () => { noise++; redraw(); });
at("others").addEventListener("click", () => { pictureSeed++; otherPictures().catch(error => say("posterior-said", error.message, true)); });

// -- steering ----------------------------------------------------------------------------------------------------
const runs = [];
function methodChosen() {
  const method = about.methods[at("method").selectedIndex];
  say("method-said", method.words);
  at("options").replaceChildren(...Object.entries(method.options).map(([name, value]) => {
    const label = make("label", { textContent: name.replace("_", " ") + " " });
    label.append(make("input", { type: "number", min: 1, value, name }));
    return label;
  }));
}
function rewardChosen() {
  const spelling = about.rewards[at("reward").selectedIndex] ?? "", words = spelling.match(/^[\w-]+\[?:([A-Z]+)\]?$/);
  at("words-of").hidden = !words;
  at("words").placeholder = words?.[1] ?? "";
}

async function steer() {
  const number = id => Number(at(id).value);
  const options = Object.fromEntries([...at("options").querySelectorAll("input")].map(i => [i.name, Number(i.value)]));
  const asked = { reward: at("reward").selectedIndex, words: at("words-of").hidden ? "" : at("words").value,
    strength: number("strength"), method: at("method").value, options, steps: number("steps"), num: number("num"),
    seed: number("seed"), label: at("label").value };
  at("steer").disabled = true;
  say("steering-said", "…");
  try {
    await ask("steer", asked);
    at("stop").disabled = false;
    for (;;) {
      const told = await ask("progress");
      at("progress").value = told.done / told.steps;
      if (!told.running) { finished(told); break; }
      if (told.pictures.length) show(at("samples"), told.pictures, told.pictures.map(() => "on its way"), "steering-said");
      say("steering-said", `step ${told.done} of ${told.steps}`);
      await new Promise(later => setTimeout(later, 150));
    }
  } catch (error) { say("steering-said", error.message, true); }
  at("steer").disabled = false;
  at("stop").disabled = true;
}

function finished(told) {
  if (told.error || !told.pictures?.length) { say("steering-said", told.error || "stopped", Boolean(told.error)); return; }
  const options = [...at("options").querySelectorAll("input")].map(i => `${i.name.replace("_", " ")} ${i.value}`);
  runs.push({ ...told, name: [at("method").selectedOptions[0].textContent, "λ " + at("strength").value, ...options].join(", ") });
  const row = at("runs").tBodies[0].insertRow(), button = make("button", { textContent: runs.at(-1).name, type: "button" });
  row.insertCell().append(button);
  for (const value of [told.mean, told.evaluations, told.seconds])
    Object.assign(row.insertCell(), { className: "number", textContent: short(value) });
  const i = runs.length - 1;
  row.addEventListener("click", () => showRun(i));
  at("runs").hidden = at("kept").hidden = false;
  showRun(i);
}

function showRun(i) {
  const run = runs[i];
  [...at("runs").tBodies[0].rows].forEach((row, j) => row.classList.toggle("chosen", i === j));
  show(at("samples"), run.pictures, run.rewards.map((reward, k) => `reward ${short(reward)}, seed ${run.seeds[k]}`), "steering-said");
  say("steering-said", run.notes.length ? run.notes.join(" ") : "Point at a picture for its reward and seed.");
  at("command").textContent = run.command;
}
at("steer").addEventListener("click", steer);
at("form").addEventListener("submit", event => { event.preventDefault(); if (!at("steer").disabled) steer(); });
at("stop").addEventListener("click", () => ask("stop").catch(error => say("steering-said", error.message, true)));
at("method").addEventListener("change", methodChosen);
at("reward").addEventListener("change", rewardChosen);
at("label").addEventListener("change", () => otherPictures().catch(error => say("posterior-said", error.message, true)));

// -- saving: the pictures of a gallery, as they are, side by side ----------------------------------------------------
function save(gallery, name) {
  const pictures = [...at(gallery).children], columns = Math.min(8, pictures.length);
  if (!columns) return;
  const [width, height] = [pictures[0].naturalWidth, pictures[0].naturalHeight];
  const sheet = make("canvas", { width: columns * width, height: Math.ceil(pictures.length / columns) * height });
  const context = sheet.getContext("2d");
  pictures.forEach((picture, i) => context.drawImage(picture, (i % columns) * width, Math.floor(i / columns) * height));
  make("a", { href: sheet.toDataURL(), download: name }).click();
}
at("save-draws").addEventListener("click", () => save("draws", "draws.png"));
at("save-samples").addEventListener("click", () => save("samples", "samples.png"));

// -- the beginning ---------------------------------------------------------------------------------------------------
async function begin() {
  about = await ask("about");
  const [channels, height, width] = about.shape;
  Object.assign(canvas, { width, height });
  say("about", `${about.name}: ${width} × ${height} pixels, ${channels === 1 ? "grey" : "in colour"}. Everything stays on this machine.`);
  at("reward").append(...about.rewards.map(text => make("option", { textContent: text.replace(/\[?:[A-Z]+\]?$/, "") })));
  at("method").append(...about.methods.map(method => make("option", { value: method.name, textContent: method.title })));
  at("label").append(make("option", { value: "", textContent: "any" }), ...about.classes.map(name => make("option", { textContent: name })));
  at("told").hidden = !about.classes.length;
  at("method").value = about.usual.method;
  at("steps").value = about.usual.steps;
  at("steer").disabled = !about.rewards.length;
  if (!about.rewards.length) say("steering-said", "No reward comes with this map: mfm play --reward my.py:reward");
  methodChosen();
  rewardChosen();
  await otherPictures();
}
begin().catch(error => say("about", error.message, true));
