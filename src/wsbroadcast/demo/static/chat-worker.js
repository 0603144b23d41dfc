// The tab's connection. It lives in a worker, so that the page stays alive when this thread is blocked: then nothing
// reads the socket, the buffers of browser and kernel fill up, and the server feels it as with any stalled peer.
"use strict";

const FLOOD_BURST = 12;
const FLOOD_PAUSE_MS = 20;
const FLOOD_PADDING = 4096;
const MAX_FLOODS = 100;
const CURRENT_FLOOD_MS = 20_000;
const MAX_UNSENT_BYTES = 1024 * 1024;
const MAX_PENDING_LINES = 200;
const LONGEST_WAIT_MS = 5000;
const FIRST_WAIT_MS = 250;

// The codes after which a client should come back, as in wsbroadcast.close_codes. A server that refuses one of them
// sends it moved up by 3,000.
const COME_BACK = new Set([1001, 1006, 1011, 1012, 1013]);

const socketUrl = new URL("ws", self.location.href);
socketUrl.protocol = socketUrl.protocol === "https:" ? "wss:" : "ws:";

let socket = null;
let reconnecting = null;
let attempts = 0;
// What the tab has asked for last, and what it comes back with: the name it would like, and the channel it is in.
let asked = null;
let profile = null;

// What the page hasn't been told yet. It is told once per animation frame at most: it asks for more when it has drawn.
const news = { lines: [], skipped: 0, floods: new Map() };
const floods = new Map();
let isPageBusy = false;

function tell(type, detail) {
  self.postMessage({ type, ...detail });
}

function tellNews() {
  if (isPageBusy || (news.lines.length === 0 && news.floods.size === 0)) return;
  isPageBusy = true;
  tell("news", { lines: news.lines, skipped: news.skipped, floods: [...news.floods.values()] });
  Object.assign(news, { lines: [], skipped: 0, floods: new Map() });
}

function connect() {
  reconnecting = null;
  tell("connecting", {});
  socket = new WebSocket(socketUrl);
  socket.onopen = () => hello(profile);
  socket.onmessage = (event) => receive(event.data);
  socket.onclose = (event) => {
    socket = null;
    const code = event.code > 4000 && event.code < 4016 ? event.code - 3000 : event.code;
    const comesBack = COME_BACK.has(code);
    const wait = comesBack ? nextWait() : null;
    cutFloods();
    tell("closed", { code: event.code, reason: event.reason, wait });
    if (comesBack) reconnecting = setTimeout(connect, wait);
  };
}

function cutFloods() {
  for (const count of floods.values()) {
    if (count.last < count.total && performance.now() - count.at < CURRENT_FLOOD_MS) {
      count.isCut = true;
      news.floods.set(count.flood, count);
    }
  }
  tellNews();
}

// Full jitter: anything between nothing and the doubled wait, so that a crowd which was cut off together doesn't come
// back together.
function nextWait() {
  attempts += 1;
  return Math.random() * Math.min(LONGEST_WAIT_MS, FIRST_WAIT_MS * 2 ** attempts);
}

function say(message) {
  if (socket === null || socket.readyState !== WebSocket.OPEN) return false;
  socket.send(JSON.stringify(message));
  return true;
}

function hello(wanted) {
  asked = wanted;
  return say({ type: "hello", ...wanted });
}

function receive(text) {
  const message = JSON.parse(text);
  if (message.type === "welcome") {
    attempts = 0;
    profile = { name: asked.name, channel: message.channel };
    tell("welcome", message);
    return;
  }
  if (message.type === "refused") {
    tell("refused", message);
    return;
  }
  if (message.type === "flood") {
    countFlood(message);
  } else {
    news.lines.push({ ...message, at: Date.now() });
    if (news.lines.length > MAX_PENDING_LINES) {
      news.lines.shift();
      news.skipped += 1;
    }
  }
  tellNews();
}

function countFlood({ flood, name, number, total }) {
  let count = floods.get(flood);
  if (count === undefined) {
    count = { flood, name, total, received: 0, last: 0, isInOrder: true, isCut: false };
    floods.set(flood, count);
    if (floods.size > MAX_FLOODS) floods.delete(floods.keys().next().value);
  }
  count.isInOrder &&= number > count.last;
  count.received += 1;
  count.last = number;
  count.at = performance.now();
  news.floods.set(flood, count);
}

function startFlood(total) {
  const flood = randomHex(8);
  // Random, so that compression doesn't make a trickle of it.
  const noise = randomHex(32 * 1024);
  let number = 0;
  const burst = () => {
    for (let i = 0; i < FLOOD_BURST && number < total; i += 1) {
      if (socket !== null && socket.bufferedAmount > MAX_UNSENT_BYTES) break;
      const start = Math.floor(Math.random() * (noise.length - FLOOD_PADDING));
      const padding = noise.slice(start, start + FLOOD_PADDING);
      if (!say({ type: "flood", flood, number: number + 1, total, padding })) {
        tell("flooded", { number, total });
        return;
      }
      number += 1;
    }
    if (number < total) setTimeout(burst, FLOOD_PAUSE_MS);
    else tell("flooded", { number, total });
  };
  burst();
}

function randomHex(bytes) {
  const values = crypto.getRandomValues(new Uint8Array(bytes));
  return Array.from(values, (value) => value.toString(16).padStart(2, "0")).join("");
}

function stall(milliseconds, wakeUp) {
  say({ type: "stall" });
  // One turn later, so that what was just said has left.
  setTimeout(() => {
    tell("stalled", {});
    if (wakeUp !== null) {
      Atomics.wait(wakeUp, 0, 0, milliseconds);
    } else {
      const end = performance.now() + milliseconds;
      while (performance.now() < end);
    }
    tell("woken", {});
    hello(profile);
  }, 100);
}

const commands = {
  start(command) {
    profile = command.profile;
    connect();
  },
  enter(command) {
    if (hello(command.profile)) return;
    profile = command.profile;
    if (socket === null && reconnecting === null) connect();
  },
  chat(command) {
    if (!say({ type: "chat", text: command.text })) tell("refused", { text: "Not connected: nothing was sent." });
  },
  flood(command) {
    startFlood(command.total);
  },
  stall(command) {
    stall(command.milliseconds, command.wakeUp);
  },
  drawn() {
    isPageBusy = false;
    tellNews();
  },
};

self.onmessage = (event) => commands[event.data.type](event.data);
