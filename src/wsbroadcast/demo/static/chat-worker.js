// The tab's connection. It lives in a worker, so that the page stays alive when this thread is blocked: then nothing
// reads the socket, the buffers of browser and kernel fill up, and the server feels it as with any stalled peer.
import { connect } from "./wsbroadcast.js";

const FLOOD_BURST = 12;
const FLOOD_PAUSE_MS = 20;
const FLOOD_PADDING = 4096;
const MAX_FLOODS = 100;
const CURRENT_FLOOD_MS = 20_000;
// How many messages of its flood a tab may send before they come back.
const MAX_AHEAD = 256;
const MAX_PENDING_LINES = 200;

// The library's client asks whether the page is visible. A worker has no `document` to ask.
self.document = { visibilityState: "visible" };

// The connection, which reconnects by itself. It is null after it was closed for good.
let ws = null;
// What the tab asked for last, and what it says when it reconnects: the name it asked for, and its channel.
let asked = null;
let profile = null;
let id = null;

// What the page hasn't been told yet. It is told at most once per animation frame: it says when it has drawn.
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

function start() {
  tell("connecting", {});
  // Each handshake says who the tab is, so that it has the same name and channel after a reconnect.
  ws = connect("ws", { plain: true, tokenProtocol: "profile", token: () => encoded({ type: "hello", ...(asked = profile) }) });
  ws.on("message", ({ data }) => receive(data));
  ws.on("status", (status, closed) => {
    if (status === "open") return; // the server's welcome says more
    cutFloods();
    if (status === "closed") ws = null;
    tell(status, closed ?? {});
  });
}

// In characters that a subprotocol may have.
function encoded(value) {
  const bytes = new TextEncoder().encode(JSON.stringify(value));
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
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

async function say(message) {
  try {
    await ws.publish(JSON.stringify(message));
    return true;
  } catch {
    return false; // there is no connection now
  }
}

function hello(wanted) {
  asked = wanted;
  return say({ type: "hello", ...wanted });
}

function receive(text) {
  const message = JSON.parse(text);
  if (message.type === "welcome") {
    if (id !== message.id) cutFloods();
    id = message.id;
    profile = { name: asked.name, channel: message.channel };
    tell("welcome", message);
    return;
  }
  if (message.type === "refused" || message.type === "error") {
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
  // Random, so that compression doesn't make it small.
  const noise = randomHex(32 * 1024);
  let number = 0;
  const burst = async () => {
    for (let i = 0; i < FLOOD_BURST && number < total; i += 1) {
      if (number - (floods.get(flood)?.received ?? 0) > MAX_AHEAD) break;
      const start = Math.floor(Math.random() * (noise.length - FLOOD_PADDING));
      const padding = noise.slice(start, start + FLOOD_PADDING);
      if (!(await say({ type: "flood", flood, number: number + 1, total, padding }))) {
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
  // A moment later, so that the message above has been sent.
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
    start();
  },
  async enter(command) {
    if (await hello(command.profile)) return;
    profile = command.profile;
    if (ws === null) start();
  },
  async chat(command) {
    if (!(await say({ type: "chat", text: command.text }))) tell("refused", { text: "Not connected: nothing was sent." });
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
