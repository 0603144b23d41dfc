// The healthy clients of the comparison: three of each manager. They live in a worker, so that drawing the page doesn't
// delay what they measure.
"use strict";

const MANAGERS = ["handwritten", "wsbroadcast"];
const CLIENTS = 3;
const TELL_MS = 100;
const CLOCK_MS = 5000;
const FIRST_CLOCK_MS = 200;
const CLOCK_SAMPLES = 12;
const RECONNECT_MS = 1000;
const LONGEST_WAIT_MS = 10_000;
// The close code of a server's worker that doesn't compare. The next attempt may reach the one that does.
const OTHER_WORKER = 4421;

let sockets = [];
let attempts = 0;
let timer = null;
let clockTimer = null;
let arrivals = [];

// How many milliseconds the server's clock is ahead of ours. The fastest of the last exchanges says it: the server
// answered about half a round trip before the answer arrived.
let clocks = [];

function now() {
  return performance.timeOrigin + performance.now();
}

function offset() {
  return clocks.reduce((best, clock) => (clock.roundTrip < best.roundTrip ? clock : best)).offset;
}

function open() {
  timer = null;
  clocks = [];
  for (const manager of MANAGERS) {
    for (let client = 0; client < CLIENTS; client += 1) openOne(manager, client);
  }
}

function openOne(manager, client, place = sockets.length) {
  const url = new URL(`feed/${manager}`, self.location.href);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(url);
  sockets[place] = socket;
  const isFirstOfOurs = manager === "wsbroadcast" && client === 0;
  socket.onopen = () => {
    self.postMessage({ type: "opened", manager, client, at: now() });
    if (isFirstOfOurs) askClock(socket, 0);
  };
  socket.onmessage = (event) => {
    const at = now();
    const message = JSON.parse(event.data);
    if (message.type === "tick") {
      arrivals.push({ manager, client, number: message.number, made: 1000 * message.at, at });
      attempts = 0;
    } else if (isFirstOfOurs && message.type === "clock") {
      keepClock(message, at);
    } else if (isFirstOfOurs) {
      tell(message);
    }
  };
  socket.onclose = (event) => {
    if (!sockets.includes(socket)) return;
    if (event.code === OTHER_WORKER) {
      openOne(manager, client, place);
      return;
    }
    leave();
    // Full jitter: clients that were cut off together don't reconnect together.
    attempts += 1;
    timer = setTimeout(open, Math.random() * Math.min(LONGEST_WAIT_MS, RECONNECT_MS * 2 ** attempts));
    self.postMessage({ type: "lost", reason: event.reason });
  };
}

function leave() {
  clearTimeout(timer);
  clearTimeout(clockTimer);
  timer = null;
  const left = sockets;
  sockets = [];
  arrivals = [];
  for (const socket of left) socket.close();
}

function askClock(socket, asked) {
  if (socket.readyState !== WebSocket.OPEN) return;
  socket.send(JSON.stringify({ type: "clock", sent: now() }));
  clockTimer = setTimeout(askClock, asked < CLOCK_SAMPLES ? FIRST_CLOCK_MS : CLOCK_MS, socket, asked + 1);
}

function keepClock({ sent, at }, received) {
  clocks.push({ roundTrip: received - sent, offset: 1000 * at - (sent + received) / 2 });
  if (clocks.length > CLOCK_SAMPLES) clocks.shift();
}

// Converts the times to the page's clock. `started` tells the page which stall this is.
function tell({ started_at: started, over_at: over, ended_at: ended, ...state }) {
  const here = (at) => (at === null || clocks.length === 0 ? null : 1000 * at - offset());
  self.postMessage({ ...state, started, startedAt: here(started), overAt: here(over), endedAt: here(ended) });
}

function tellArrivals() {
  if (arrivals.length === 0 || clocks.length === 0) return;
  const ahead = offset();
  self.postMessage({ type: "arrivals", arrivals: arrivals.map((one) => ({ ...one, made: one.made - ahead })) });
  arrivals = [];
}

const commands = {
  watch() {
    if (sockets.length === 0 && timer === null) open();
  },
  rest: leave,
  send({ message }) {
    const socket = sockets[MANAGERS.indexOf("wsbroadcast") * CLIENTS];
    if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
  },
};

self.onmessage = (event) => commands[event.data.type](event.data);
setInterval(tellArrivals, TELL_MS);
