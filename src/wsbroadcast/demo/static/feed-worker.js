// The healthy clients of the comparison: three of each manager. They live in a worker, so that what they measure isn't
// delayed by what the page draws.
"use strict";

const MANAGERS = ["handwritten", "wsbroadcast"];
const CLIENTS = 3;
const TELL_MS = 100;
const CLOCK_MS = 5000;
const FIRST_CLOCK_MS = 200;
const CLOCK_SAMPLES = 12;
const RECONNECT_MS = 1000;
const LONGEST_WAIT_MS = 10_000;

let sockets = [];
let attempts = 0;
let timer = null;
let clockTimer = null;
let arrivals = [];

// How far the server's clock is ahead of ours in milliseconds, by the quickest of the last exchanges. Their answer was
// sent half a round trip before it came, give or take that half.
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

function openOne(manager, client) {
  const url = new URL(`feed/${manager}`, self.location.href);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(url);
  sockets.push(socket);
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
    leave();
    // Full jitter: a crowd that was cut off together doesn't come back together.
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

// The page thinks in its own time. By `started` it knows which stall it is.
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
