// The comparison: what the healthy clients of both managers measure while one client of each reads nothing.

import { $, announce, bytes, duration, isAvailable, number, redraw, setAvailable, setText } from "./dom.js";
import { Plot, WINDOW_MS } from "./plot.js";

const CLIENTS = 3;
// How often the plots are drawn: normally, while nothing happens, and for people who asked for less motion.
const DRAW_MS = 100;
const IDLE_DRAW_MS = 300;
const CALM_DRAW_MS = 1000;
// The figures are about the messages that arrived in this time, and about those that wait now.
const FIGURES_MS = 10_000;
// A client is late when another one has had a message for this time.
const OVERDUE_MS = 250;
const FROZEN_MS = 1000;
const MEMORY_MS = 60_000;

const isCalm = matchMedia("(prefers-reduced-motion: reduce)");
const worker = new Worker("feed-worker.js");

// When each message was made, by its number.
const made = new Map();
let newest = 0;
let stall = null;
let lost = null;

function now() {
  return performance.timeOrigin + performance.now();
}

// The clients of one manager, and what they have received.
class Column {
  // By client, the number of the last message; `null` while it isn't connected.
  #last = Array(CLIENTS).fill(null);
  #plot;
  #state = "";
  #stall = { started: null, delay: 0 };
  samples = [];
  lastAt = null;

  constructor(manager, judge) {
    this.manager = manager;
    this.judge = judge;
    this.#plot = new Plot($(`${manager}-plot`));
  }

  // This client gets the messages from now on.
  opened(client, at) {
    this.#last[client] = newest;
    this.lastAt ??= at;
  }

  take({ client, number: which, made: when, at }) {
    this.#last[client] = which;
    this.lastAt = at;
    this.samples.push({ made: when, delay: Math.max(0, at - when), at });
  }

  get isIdle() {
    return this.#state === idle.state;
  }

  leave() {
    this.#last.fill(null);
    this.lastAt = null;
  }

  // Messages that haven't arrived, once for each client that waits for them.
  waiting(at) {
    const found = [];
    for (const [which, when] of made) {
      if (at - when < OVERDUE_MS) continue;
      for (const last of this.#last) {
        if (last !== null && which > last) found.push({ made: when, delay: at - when });
      }
    }
    return found;
  }

  slowest() {
    return Math.max(0, ...this.samples.map(({ delay }) => delay));
  }

  // The delay of the slowest message that was made during the stall. It is kept when the message has left the plot.
  slowestOfStall() {
    if (this.#stall.started !== stall.started) this.#stall = { started: stall.started, delay: 0 };
    for (const { made: when, delay } of this.samples) {
      if (when >= stall.startedAt && when <= (stall.overAt ?? Infinity)) {
        this.#stall.delay = Math.max(this.#stall.delay, delay);
      }
    }
    return this.#stall.delay;
  }

  draw(at) {
    this.samples = this.samples.filter((sample) => at - sample.made < WINDOW_MS);
    const waiting = this.waiting(at);
    const delays = this.samples.filter((sample) => at - sample.at < FIGURES_MS).map(({ delay }) => delay);
    delays.push(...waiting.map(({ delay }) => delay));
    delays.sort((a, b) => a - b);
    this.#figure("p50", percentile(delays, 0.5));
    this.#figure("p99", percentile(delays, 0.99));
    const { state, mood, text } = lost === null ? this.judge(this, waiting, at) : unconnected();
    setText(`${this.manager}-verdict`, text);
    $(this.manager).dataset.mood = mood;
    if (state !== this.#state) {
      if (this.#state !== "" && mood !== "") announce(`${$(`${this.manager}-title`).textContent}: ${text}`);
      this.#state = state;
      this.#describe(text);
    }
    this.#plot.draw({ now: at, samples: this.samples, waiting, band: band(at), mark: this.mark() });
  }

  mark() {
    const isHere = this.manager === "wsbroadcast" && stall !== null && stall.endedAt !== null;
    return isHere ? { at: stall.endedAt, word: "evicted" } : null;
  }

  #figure(name, delay) {
    const text = delay === null ? "–" : duration(delay);
    setText(`${this.manager}-${name}`, text);
    $(`${this.manager}-${name}`).classList.toggle("bad", delay !== null && delay >= OVERDUE_MS);
  }

  #describe(text) {
    $(`${this.manager}-plot`).setAttribute("aria-label", `Delays of the messages of the last 30 seconds. ${text}`);
  }
}

function percentile(sorted, part) {
  return sorted.length === 0 ? null : sorted[Math.ceil(part * sorted.length) - 1];
}

function band(at) {
  if (stall === null || stall.startedAt === null) return null;
  return { from: stall.startedAt, to: stall.overAt ?? at };
}

// What the plots show, in words.

function unconnected() {
  const why = lost === "" ? "" : `: ${lost}`;
  return { state: "lost", mood: "", text: `Not connected${why}. Trying again.` };
}

const idle = { state: "idle", mood: "", text: "Every client gets every message at once." };

function unstalled(column) {
  if (column.lastAt === null) return { state: "connecting", mood: "", text: "Connecting." };
  if (stall?.problem) return { state: "problem", mood: "bad", text: `Sorry, ${stall.problem}.` };
  if (stall?.phase === "stalled") {
    const text = "One client has stopped reading. The buffers of its connection still have room.";
    return { state: "filling", mood: "", text };
  }
  const slowest = column.slowest();
  return slowest < FROZEN_MS ? idle : { state: "late", mood: "bad", text: `Messages came up to ${duration(slowest)} late.` };
}

function ofHandwritten(column, waiting, at) {
  if (column.lastAt !== null && waiting.length > 0 && at - column.lastAt > FROZEN_MS) {
    const which = stall?.phase === "stalled" ? "the stalled client" : "a client that reads nothing";
    const count = number.format(new Set(waiting.map((one) => one.made)).size);
    const silence = duration(at - column.lastAt);
    const text = `Nobody has received anything for ${silence}: the loop awaits ${which}. ${count} messages wait for the loop.`;
    return { state: "frozen", mood: "bad", text };
  }
  const judged = unstalled(column);
  const isSincePause = stall !== null && stall.overAt !== null && at - stall.overAt < WINDOW_MS;
  if (judged.state !== "late" || !isSincePause) return judged;
  return { ...judged, text: `The client reads again, and the loop goes on. ${judged.text}` };
}

function ofOurs(column, waiting, at) {
  if (stall !== null && stall.endedAt !== null && at - stall.endedAt < MEMORY_MS) {
    const after = duration(stall.endedAt - stall.startedAt);
    const slowest = duration(column.slowestOfStall());
    const how = `with close code ${stall.code}, “try again later”`;
    const text = `The stalled client was evicted after ${after}, ${how}. Slowest message to the others: ${slowest}.`;
    return { state: "evicted", mood: "good", text };
  }
  if (stall?.phase === "stalled" && stall.waiting_bytes > 0) {
    const text = `${bytes(stall.waiting_bytes)} wait for the stalled client, in a backlog of its own. The others go on.`;
    return { state: "backlog", mood: "good", text };
  }
  return unstalled(column);
}

const columns = {
  handwritten: new Column("handwritten", ofHandwritten),
  wsbroadcast: new Column("wsbroadcast", ofOurs),
};

// Drawing.

function drawAll() {
  const at = now();
  for (const [which, when] of made) {
    if (at - when < MEMORY_MS) break;
    made.delete(which);
  }
  for (const column of Object.values(columns)) column.draw(at);
  drawButton(at);
}

function drawButton(at) {
  const isStalled = stall?.phase === "stalled";
  setText("stall-client-label", isStalled ? "Let it read again" : "Stall one client");
  const left = isStalled && stall.startedAt !== null ? Math.max(0, stall.startedAt + 1000 * stall.seconds - at) : 0;
  setText("stall-client-countdown", isStalled ? `${Math.ceil(left / 1000)} s` : "");
  setAvailable($("stall-client"), lost === null && stall !== null && stall.phase !== "busy");
}

function keepDrawing() {
  if (!document.hidden) redraw(drawAll);
  const isIdle = Object.values(columns).every((column) => column.isIdle);
  setTimeout(keepDrawing, isCalm.matches ? CALM_DRAW_MS : isIdle ? IDLE_DRAW_MS : DRAW_MS);
}

// What the worker says.

const reports = {
  opened({ manager, client, at }) {
    lost = null;
    columns[manager].opened(client, at);
  },
  arrivals({ arrivals }) {
    for (const arrival of arrivals) {
      newest = Math.max(newest, arrival.number);
      if (!made.has(arrival.number)) made.set(arrival.number, arrival.made);
      columns[arrival.manager].take(arrival);
    }
  },
  stall(state) {
    stall = state;
  },
  lost({ reason }) {
    lost = reason;
    forget();
  },
};

function forget() {
  made.clear();
  newest = 0;
  stall = null;
  for (const column of Object.values(columns)) column.leave();
}

worker.onmessage = (event) => {
  reports[event.data.type](event.data);
};

// What the person does.

$("stall-client").addEventListener("click", () => {
  if (!isAvailable($("stall-client"))) return;
  worker.postMessage({ type: "send", message: { type: stall.phase === "stalled" ? "wake" : "stall" } });
});

// A hidden page doesn't have to be served.
function watch() {
  if (document.hidden) forget();
  worker.postMessage({ type: document.hidden ? "rest" : "watch" });
}

export function startComparison() {
  document.addEventListener("visibilitychange", watch);
  watch();
  keepDrawing();
}
