// The grid of experts: a row per layer, a square per expert. Where a record lies is the square's filling, what happens
// to it is a mark in it, so that the states differ by shape too and can be seen together.

export const STATES = [
  ["absent", "not in memory"],
  ["resident", "in memory"],
  ["fetching", "being fetched"],
  ["predicted", "predicted: expected to be needed soon"],
  ["chosen", "chosen by the last token, and in memory"],
  ["missed", "missed: chosen, but had to be fetched first"],
];

const GUTTER = 26; // pixels left of the squares, for the layers' numbers
const LARGEST = 34; // pixels, of a square
const SMALL = 7; // pixels; below, marks would be blots and the square takes their colour

export class Grid {
  constructor(canvas, describe) {
    this.canvas = canvas;
    this.describe = describe; // told about the cell a person asks for
    this.layers = [];
    this.cursor = null;
    canvas.addEventListener("pointermove", (event) => this.moveTo(this.cellAt(event)));
    canvas.addEventListener("pointerleave", () => this.moveTo(null));
    canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(layers) {
    this.layers = layers.map((layer) => ({
      count: layer.num_experts,
      sets: Object.fromEntries(STATES.slice(1).map(([state]) => [state, new Set(layer[state])])),
    }));
    this.draw();
    if (this.cursor) this.describe(this.text(this.cursor), false);
  }

  states(row, expert) {
    const sets = this.layers[row].sets;
    const states = STATES.map(([state]) => state).filter((state) => sets[state]?.has(expert));
    return states.includes("missed") ? states.filter((state) => state !== "chosen") : states;
  }

  text([row, expert]) {
    const states = this.states(row, expert);
    if (!states.some((state) => state === "resident" || state === "fetching")) states.unshift("absent");
    const words = Object.fromEntries(STATES);
    return `Layer ${row}, expert ${expert}: ${states.map((state) => words[state]).join("; ")}`;
  }

  draw() {
    const { canvas, layers } = this;
    if (!layers.length) return;
    const columns = Math.max(...layers.map((layer) => layer.count));
    const size = Math.min((canvas.parentElement.clientWidth - GUTTER) / columns, LARGEST);
    const [width, height] = [GUTTER + size * columns, size * layers.length];
    const scale = devicePixelRatio;
    this.size = size;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    const colors = palette();
    context.scale(scale, scale);
    const every = Math.ceil(12 / size); // rows from one number to the next
    layers.forEach((layer, row) => {
      if (row % every === 0) number(context, row, (row + 0.5) * size, colors.quiet);
      for (let expert = 0; expert < layer.count; expert++) {
        drawCell(context, GUTTER + expert * size, row * size, size, this.states(row, expert), colors);
      }
    });
    if (this.cursor) outline(context, GUTTER + this.cursor[1] * size, this.cursor[0] * size, size, colors.text);
  }

  cellAt(event) {
    const expert = Math.floor((event.offsetX - GUTTER) / this.size);
    const row = Math.floor(event.offsetY / this.size);
    return expert >= 0 && expert < (this.layers[row]?.count ?? 0) ? [row, expert] : null;
  }

  key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step || !this.layers.length) return;
    event.preventDefault();
    const [row, expert] = this.cursor ? [this.cursor[0] + step[0], this.cursor[1] + step[1]] : [0, 0];
    const inside = Math.max(0, Math.min(row, this.layers.length - 1));
    this.moveTo([inside, Math.max(0, Math.min(expert, this.layers[inside].count - 1))]);
  }

  moveTo(cell) {
    this.cursor = cell;
    if (cell) this.describe(this.text(cell), true);
    this.draw();
  }
}

export function palette() {
  const style = getComputedStyle(document.documentElement);
  const names = [...STATES.map(([state]) => state), "text", "quiet"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`)]));
}

export function drawCell(context, x, y, size, states, colors) {
  const gap = size > SMALL ? 1 : 0.25;
  const [left, top, side] = [x + gap, y + gap, size - 2 * gap];
  const small = size < SMALL && ["missed", "chosen", "fetching", "predicted"].find((state) => states.includes(state));
  context.fillStyle = colors[small || (states.includes("resident") ? "resident" : "absent")];
  context.fillRect(left, top, side, side);
  if (size < SMALL) return;
  const middle = [x + size / 2, y + size / 2];
  context.lineWidth = Math.max(1.2, size / 13);
  for (const state of states) MARKS[state]?.(context, middle, side, colors[state]);
}

const MARKS = {
  fetching(context, [x, y], side, color) {
    context.fillStyle = color; // the lower half: it is filling up
    context.fillRect(x - side / 2, y, side, side / 2);
  },
  predicted(context, [x, y], side, color) {
    context.strokeStyle = color;
    context.strokeRect(x - side / 2 + 1, y - side / 2 + 1, side - 2, side - 2);
  },
  chosen(context, [x, y], side, color) {
    context.fillStyle = color;
    context.beginPath();
    context.arc(x, y, side * 0.26, 0, 2 * Math.PI);
    context.fill();
  },
  missed(context, [x, y], side, color) {
    const arm = side * 0.27;
    context.strokeStyle = color;
    context.beginPath();
    context.moveTo(x - arm, y - arm);
    context.lineTo(x + arm, y + arm);
    context.moveTo(x + arm, y - arm);
    context.lineTo(x - arm, y + arm);
    context.stroke();
  },
};

function number(context, row, y, color) {
  context.fillStyle = color;
  context.font = "11px system-ui, sans-serif";
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.fillText(String(row), GUTTER - 6, y);
}

function outline(context, x, y, size, color) {
  context.strokeStyle = color;
  context.lineWidth = 2;
  context.strokeRect(x + 1, y + 1, size - 2, size - 2);
}
