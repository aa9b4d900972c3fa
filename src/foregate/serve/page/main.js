// Ties the chat and the grid together: asks the server how the experts are, often while it works and seldom otherwise.

import { request } from "./api.js";
import { Chat } from "./chat.js";
import { Grid, STATES, drawCell, palette } from "./grid.js";

const BUSY_MS = 250;
const IDLE_MS = 1500;
const RECENT_MS = 5000; // the hit rate is over so much of the past

const find = (id) => document.getElementById(id);
const history = []; // [when, totals]
let working = false;
let wake = () => {};

const grid = new Grid(find("grid"), (text, asked) => {
  const cell = find("cell");
  if (asked || document.activeElement !== find("grid")) cell.textContent = text; // no chatter while a cell is read
});
new Chat((busy) => {
  working = busy;
  wake();
});
legend();
watch();

async function watch() {
  for (;;) {
    let busy = working;
    try {
      const experts = await (await request("/v1/experts")).json();
      busy ||= experts.running > 0;
      show(experts);
      find("grid-error").hidden = true;
    } catch (error) {
      find("grid-error").textContent = error.message;
      find("grid-error").hidden = false;
      find("model").textContent = "not connected";
    }
    await new Promise((resolve) => {
      wake = resolve;
      setTimeout(resolve, document.hidden || !busy ? IDLE_MS : BUSY_MS);
    });
  }
}

function show(experts) {
  grid.show(experts.layers);
  const all = experts.layers.reduce((sum, layer) => sum + layer.num_experts, 0);
  const resident = experts.layers.reduce((sum, layer) => sum + layer.resident.length, 0);
  const each = [...new Set(experts.layers.map((layer) => layer.top_k))].sort((a, b) => a - b).join("–");
  find("model").textContent = experts.model;
  find("explain").textContent =
    `A row is a layer of the model, a square one of its experts. Each token uses ${each} of them in every layer; ` +
    `memory has room for ${experts.slots} of all ${all}.`;
  find("resident").replaceChildren(String(resident), small(` of ${all}`));
  find("speed").textContent = experts.tokens_per_second.toFixed(1);
  find("replies").replaceChildren(String(experts.running), small(experts.waiting ? ` + ${experts.waiting} waiting` : ""));
  find("hit-rate").textContent = hitRate(experts.totals);
}

function hitRate(totals) {
  const now = performance.now();
  history.push([now, totals]);
  while (history.length > 2 && history[1][0] < now - RECENT_MS) history.shift();
  const [hits, misses] = ["hits", "misses"].map((name) => totals[name] - history[0][1][name]);
  if (hits + misses > 0) return `${Math.round((100 * hits) / (hits + misses))} %`;
  const ever = totals.hits + totals.misses;
  return ever ? `${Math.round((100 * totals.hits) / ever)} %` : "–";
}

function small(text) {
  const element = document.createElement("small");
  element.textContent = text;
  return element;
}

function legend() {
  const paint = () =>
    STATES.forEach(([state], index) => {
      const canvas = find("legend").children[index].firstChild;
      canvas.width = canvas.height = 20 * devicePixelRatio;
      const context = canvas.getContext("2d");
      context.scale(devicePixelRatio, devicePixelRatio);
      drawCell(context, 0, 0, 20, state === "chosen" ? ["resident", state] : [state], palette());
    });
  for (const [, words] of STATES) {
    const item = document.createElement("li");
    const canvas = item.appendChild(document.createElement("canvas"));
    canvas.setAttribute("aria-hidden", "true");
    item.append(words);
    find("legend").append(item);
  }
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}
