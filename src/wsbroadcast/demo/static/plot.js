// A plot of delays. The x axis is the time when a message was made, the y axis is its delay, on a logarithmic scale.

export const WINDOW_MS = 30_000;

const LEFT = 46;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 20;
const LOWEST_MS = 0.5;
const HIGHEST_MS = 40_000;
const LINES = [[1, "1 ms"], [10, "10 ms"], [100, "100 ms"], [1000, "1 s"], [10_000, "10 s"]];
const LATE_MS = 250;
const DOT = 1.7;
const RING = 2.2;
const FONT_PX = 11;

export class Plot {
  #canvas;
  #context;

  constructor(canvas) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
  }

  // `samples` have `made` and `delay`, `waiting` have `made` and `delay` so far, `band` a start and an end, `mark` a
  // moment and a word for it.
  draw({ now, samples, waiting, band, mark }) {
    const { width, height } = this.#fit();
    if (width === 0) return;
    const context = this.#context;
    const colours = coloursOf(this.#canvas);
    const x = (at) => LEFT + (width - LEFT - RIGHT) * (1 - (now - at) / WINDOW_MS);
    const scale = Math.log(HIGHEST_MS / LOWEST_MS);
    const y = (delay) => {
      const part = Math.log(Math.min(HIGHEST_MS, Math.max(LOWEST_MS, delay)) / LOWEST_MS) / scale;
      return height - BOTTOM - (height - TOP - BOTTOM) * part;
    };
    context.clearRect(0, 0, width, height);
    context.font = `${FONT_PX}px ${getComputedStyle(this.#canvas).fontFamily}`;
    if (band !== null) this.#band(band, x, width, height, colours);
    this.#axes(x, y, width, height, now, colours);
    context.save();
    context.beginPath();
    context.rect(LEFT, 0, width - LEFT, height);
    context.clip();
    this.#dots(samples.filter(({ delay }) => delay < LATE_MS), x, y, colours.good);
    this.#dots(samples.filter(({ delay }) => delay >= LATE_MS), x, y, colours.bad);
    this.#rings(waiting, x, y, colours.bad);
    if (mark !== null) this.#mark(mark, x, width, height, colours);
    context.restore();
  }

  #fit() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const ratio = devicePixelRatio;
    const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.#canvas.width !== wide || this.#canvas.height !== high) {
      this.#canvas.width = wide;
      this.#canvas.height = high;
    }
    this.#context.setTransform(ratio, 0, 0, ratio, 0, 0);
    return { width, height };
  }

  #band({ from, to }, x, width, height, colours) {
    const left = Math.max(LEFT, x(from));
    const right = Math.min(width - RIGHT, x(to));
    if (right <= left) return;
    this.#context.fillStyle = colours.band;
    this.#context.fillRect(left, TOP, right - left, height - TOP - BOTTOM);
  }

  #axes(x, y, width, height, now, colours) {
    const context = this.#context;
    context.lineWidth = 1;
    context.strokeStyle = colours.grid;
    context.fillStyle = colours.text;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const [delay, label] of LINES) {
      const at = Math.round(y(delay)) + 0.5;
      context.beginPath();
      context.moveTo(LEFT, at);
      context.lineTo(width - RIGHT, at);
      context.stroke();
      context.fillText(label, LEFT - 6, at);
    }
    context.textBaseline = "alphabetic";
    context.textAlign = "left";
    context.fillText("30 s ago", LEFT, height - 5);
    context.textAlign = "right";
    context.fillText("now", x(now), height - 5);
  }

  #dots(samples, x, y, colour) {
    const context = this.#context;
    context.fillStyle = colour;
    context.beginPath();
    for (const { made, delay } of samples) {
      const [left, top] = [x(made), y(delay)];
      context.moveTo(left + DOT, top);
      context.arc(left, top, DOT, 0, 2 * Math.PI);
    }
    context.fill();
  }

  #rings(waiting, x, y, colour) {
    const context = this.#context;
    context.strokeStyle = colour;
    context.lineWidth = 1.2;
    context.beginPath();
    for (const { made, delay } of waiting) {
      const [left, top] = [x(made), y(delay)];
      context.moveTo(left + RING, top);
      context.arc(left, top, RING, 0, 2 * Math.PI);
    }
    context.stroke();
  }

  #mark({ at, word }, x, width, height, colours) {
    const context = this.#context;
    const left = Math.round(x(at)) + 0.5;
    context.strokeStyle = colours.text;
    context.lineWidth = 1;
    context.setLineDash([3, 3]);
    context.beginPath();
    context.moveTo(left, TOP);
    context.lineTo(left, height - BOTTOM);
    context.stroke();
    context.setLineDash([]);
    context.fillStyle = colours.ink;
    const hasRoom = left + 10 + context.measureText(word).width < width;
    context.textAlign = hasRoom ? "left" : "right";
    context.fillText(word, hasRoom ? left + 5 : left - 5, TOP + FONT_PX);
  }
}

// The colours of the style sheet, which follow the light and the dark theme.
function coloursOf(canvas) {
  const style = getComputedStyle(canvas);
  const names = { good: "--accent", bad: "--bad", grid: "--line", text: "--soft", ink: "--ink", band: "--warn-wash" };
  return Object.fromEntries(Object.entries(names).map(([name, property]) => [name, style.getPropertyValue(property)]));
}
