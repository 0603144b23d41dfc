// The page: what it draws, and when. What comes from others is set through textContent only.

const CHANNELS = ["lobby", "news", "random"];
const NAMES = ["Avocet", "Bittern", "Curlew", "Dipper", "Egret", "Fulmar", "Gannet", "Heron", "Jay", "Kestrel",
  "Linnet", "Merlin", "Nuthatch", "Osprey", "Plover", "Redstart", "Siskin", "Teal", "Wagtail", "Yellowhammer"];
const FLOOD_MESSAGES = 3000;
const STALL_SECONDS = 15;
const POLL_MS = 500;
const GRAPH_SAMPLES = 60;
const MAX_LOG_LINES = 200;
const MAX_ROSTER_LINES = 50;
const ANNOUNCE_MS = 1000;

const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");
const time = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

const tab = {
  name: sessionStorage.getItem("name") ?? NAMES[Math.floor(Math.random() * NAMES.length)],
  channel: sessionStorage.getItem("channel") ?? CHANNELS[0],
  id: null,
  state: "connecting",
  stalledUntil: 0,
  isFlooding: false,
  isEvicted: false,
  isWelcome: false,
  closedText: "",
};
const channels = new Set([...CHANNELS, tab.channel]);

// Everything is drawn by one function per part, at most once per animation frame, and only if it changed.

const dirty = new Set();
let pendingNews = null;

function redraw(...parts) {
  if (dirty.size === 0) requestAnimationFrame(draw);
  for (const part of parts) dirty.add(part);
}

function draw() {
  const parts = [...dirty];
  dirty.clear();
  for (const part of parts) part();
}

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className !== "") made.className = className;
  made.append(...children);
  return made;
}

function setText(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function bytes(count) {
  if (count < 1024) return `${count} B`;
  if (count < 1024 * 1024) return `${(count / 1024).toFixed(0)} KiB`;
  return `${(count / 1024 / 1024).toFixed(1).replace(".0", "")} MiB`;
}

function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(1)} s`;
}

// The log.

const floodLines = new Map();

function drawNews() {
  const news = pendingNews;
  pendingNews = null;
  if (news.skipped > 0) addLine(systemLine(`${number.format(news.skipped)} lines more than could be shown`));
  for (const line of news.lines) addLine(line.type === "chat" ? chatLine(line) : noticeLine(line));
  for (const flood of news.floods) drawFlood(flood);
  worker.postMessage({ type: "drawn" });
}

function addLine(line) {
  const log = $("log");
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  log.append(line);
  while (log.childElementCount > MAX_LOG_LINES) log.firstElementChild.remove();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function stamp(at) {
  const made = element("time", "", time.format(at));
  made.dateTime = new Date(at).toISOString();
  return made;
}

function chatLine({ sender, name, text, at }) {
  const isOwn = sender === tab.id;
  if (!isOwn) announce(`${name}: ${text}`);
  const who = element("span", `name hue-${hue(name)}`, name);
  const head = element("div", "line-head", who, stamp(at));
  return element("li", isOwn ? "line own" : "line", head, element("p", "text", text));
}

function noticeLine({ event, name, channel, code, reason, at }) {
  const isEnd = code !== null && code !== 1000 && code !== 1001;
  const how = isEnd ? `: closed with ${code}${reason === "" ? "" : `, ${reason}`}` : "";
  const text = `${name} ${event} #${channel}${how}`;
  announce(text);
  return systemLine(text, code === 1013 ? "line system bad" : "line system", at);
}

function systemLine(text, className = "line system", at = Date.now()) {
  return element("li", className, element("p", "text", text), stamp(at));
}

function drawFlood({ flood, name, total, received, last, isInOrder, isCut }) {
  let parts = floodLines.get(flood);
  if (parts === undefined || !parts.line.isConnected) {
    const bar = element("progress", "");
    bar.max = total;
    bar.setAttribute("aria-label", `Received of ${name}'s flood`);
    parts = { text: element("p", "text"), bar };
    parts.line = element("li", "line flood", parts.text, bar);
    floodLines.set(flood, parts);
    if (floodLines.size > MAX_LOG_LINES) floodLines.delete(floodLines.keys().next().value);
    addLine(parts.line);
  }
  const missed = last - received;
  let verdict = isInOrder ? ", none missed" : ", out of order";
  if (missed > 0) verdict = `, ${number.format(missed)} missed`;
  else if (isCut) verdict = ", then cut off";
  parts.text.textContent = `${name}'s flood: ${number.format(received)} of ${number.format(total)} received${verdict}`;
  parts.bar.value = received;
  parts.line.dataset.received = received;
  if (received === total) announce(parts.text.textContent);
}

function hue(name) {
  let sum = 0;
  for (const character of name) sum = (sum * 31 + character.codePointAt(0)) % 997;
  return sum % 6;
}

// A screen reader hears at most one summary a second; the log itself is silent.

let announcements = [];

function announce(text) {
  if (announcements.length === 0) setTimeout(announceAll, ANNOUNCE_MS);
  announcements.push(text);
}

function announceAll() {
  const texts = announcements;
  announcements = [];
  setText("announcer", texts.length > 3 ? `${texts.length} new lines in the log` : texts.join(". "));
}

// This tab's own state.

// Not `disabled`, which would take the focus away from a button that was just pressed.
function setAvailable(button, isAvailable) {
  button.setAttribute("aria-disabled", String(!isAvailable));
}

function isAvailable(button) {
  return button.getAttribute("aria-disabled") !== "true";
}

function drawStatus() {
  const { state, isEvicted } = tab;
  const texts = {
    connecting: "Connecting",
    open: "Connected",
    stalling: "Stalled: reading nothing",
    stalled: isEvicted ? "Evicted with 1013, still stalled" : "Stalled: reading nothing",
    waiting: tab.closedText,
    closed: tab.closedText,
  };
  setText("status", texts[state]);
  $("status").dataset.state = state === "stalled" && isEvicted ? "evicted" : state;
  const isOpen = state === "open";
  setText("flood-label", tab.isFlooding ? "Flooding" : "Flood everyone");
  setAvailable($("flood"), isOpen && !tab.isFlooding);
  for (const button of document.querySelectorAll("form button, .pill")) setAvailable(button, isOpen);
  drawStallButton();
}

let countdownTimer = null;

function drawStallButton() {
  const isStalled = tab.state === "stalled" || tab.state === "stalling";
  clearTimeout(countdownTimer);
  setAvailable($("stall"), tab.state === "open" || (tab.state === "stalled" && wakeUp !== null));
  setText("stall-label", isStalled ? (wakeUp === null ? "Stalled" : "Wake up") : "Stall this tab");
  const left = Math.max(0, Math.ceil((tab.stalledUntil - performance.now()) / 1000));
  setText("stall-countdown", isStalled ? `${left} s` : "");
  if (isStalled) countdownTimer = setTimeout(() => redraw(drawStallButton), 250);
}

// Changed in place, so that the button which was pressed keeps the focus.

function drawChannels() {
  const buttons = new Map([...$("channels").children].map((button) => [button.dataset.channel, button]));
  for (const channel of channels) {
    let button = buttons.get(channel);
    if (button === undefined) {
      button = element("button", "pill", `#${channel}`);
      button.type = "button";
      button.dataset.channel = channel;
      $("channels").append(button);
    }
    button.setAttribute("aria-pressed", String(channel === tab.channel));
  }
}

// The counters, the roster and who has ended: asked for over HTTP, which goes on while the worker is stalled.

const backlogSamples = [];
let server = null;
let rate = 0;

async function poll() {
  if (!document.hidden) {
    try {
      const response = await fetch("state", { cache: "no-store" });
      take(await response.json());
    } catch {
      document.body.classList.add("stale");
    }
  }
  setTimeout(poll, document.body.classList.contains("stale") ? 4 * POLL_MS : POLL_MS);
}

let takenAt = 0;

function take(state) {
  document.body.classList.remove("stale");
  const now = performance.now();
  if (server !== null) {
    const deliveries = state.stats.deliveries - server.stats.deliveries;
    rate = Math.max(0, Math.round((1000 * deliveries) / (now - takenAt)));
  }
  takenAt = now;
  backlogSamples.push(state.stats.backlog_bytes);
  if (backlogSamples.length > GRAPH_SAMPLES) backlogSamples.shift();
  const parts = [drawCounters];
  if (JSON.stringify(server?.roster) !== JSON.stringify(state.roster)) parts.push(drawRoster);
  if (JSON.stringify(server?.ended) !== JSON.stringify(state.ended)) parts.push(drawEnded);
  server = state;
  noticeOwnEviction();
  redraw(...parts);
}

function noticeOwnEviction() {
  const end = server.ended.find(({ id }) => id === tab.id);
  if (end === undefined || end.code !== 1013 || tab.isEvicted) return;
  tab.isEvicted = true;
  const text = `The server evicted this tab: closed with ${end.code}, ${end.reason}. All others go on.`;
  redraw(drawStatus, () => addLine(systemLine(text, "line system bad")));
}

function drawCounters() {
  const { stats, max_backlog_bytes: limit, send_timeout: timeout } = server;
  const sum = (counts) => Object.values(counts).reduce((total, count) => total + count, 0);
  setText("count-connections", number.format(stats.connections));
  setText("count-deliveries", number.format(stats.deliveries));
  setText("count-rate", number.format(rate));
  setText("count-dropped", number.format(sum(stats.dropped)));
  setText("count-evicted", number.format(sum(stats.evicted)));
  setText("count-behind", number.format(stats.behind));
  setText("count-backlog", bytes(stats.backlog_bytes));
  const sinks = Object.entries(stats.sinks).map(([kind, count]) => `${number.format(count)} ${kind}`);
  setText("count-sinks", sinks.length === 0 ? "nothing yet" : sinks.join(", "));
  setText("limit-bytes", bytes(limit));
  setText("limit-seconds", String(timeout));
  $("alone").hidden = stats.connections > 1;
  $("count-evicted").classList.toggle("bad", sum(stats.evicted) > 0);
  $("backlog-graph").classList.toggle("filling", stats.backlog_bytes > 0);
  drawGraph(limit);
}

function drawGraph(limit) {
  const top = Math.max(limit, ...backlogSamples);
  const left = GRAPH_SAMPLES - backlogSamples.length;
  const points = backlogSamples.map(
    (sample, i) => `${((left + i) * 120) / (GRAPH_SAMPLES - 1)},${(31 - (30 * sample) / top).toFixed(2)}`,
  );
  const line = `M${points.join("L")}`;
  $("backlog-line").setAttribute("d", line);
  $("backlog-area").setAttribute("d", `${line}L120,32L${(left * 120) / (GRAPH_SAMPLES - 1)},32Z`);
}

function drawRoster() {
  const { roster } = server;
  const lines = roster.slice(0, MAX_ROSTER_LINES).map(({ id, name, channel, is_stalled: isStalled }) => {
    const line = element("li", "", element("span", `name hue-${hue(name)}`, name));
    if (id === tab.id) line.append(element("span", "tag you", "this tab"));
    if (isStalled) line.append(element("span", "tag bad", "stalled"));
    line.append(element("span", "where", `#${channel}`));
    return line;
  });
  if (roster.length > MAX_ROSTER_LINES) {
    lines.push(element("li", "", `and ${number.format(roster.length - MAX_ROSTER_LINES)} more`));
  }
  $("roster").replaceChildren(...lines);
  setText("roster-count", number.format(roster.length));
}

function drawEnded() {
  $("ended-part").hidden = server.ended.length === 0;
  $("ended").replaceChildren(
    ...server.ended.map(({ name, code, reason, at }) => {
      const how = element("span", code === 1013 ? "tag bad" : "tag", `${code}${reason === "" ? "" : ` ${reason}`}`);
      return element("li", "", element("span", "name", name), how, element("span", "where", time.format(at * 1000)));
    }),
  );
}

// What the worker says.

const worker = new Worker("worker.js");
// Shared with the worker, so that it can be woken while its thread is blocked. A page that isn't on a trustworthy
// origin (plain HTTP from another machine) gets no shared memory; there the worker wakes by the clock alone.
const wakeUp = self.crossOriginIsolated ? new Int32Array(new SharedArrayBuffer(4)) : null;

const reports = {
  connecting() {
    tab.state = "connecting";
  },
  welcome({ id, name, channel }) {
    const isBack = tab.id !== null && tab.id !== id;
    Object.assign(tab, { id, name, channel, isEvicted: false, isWelcome: true });
    if (tab.state !== "stalling") tab.state = "open";
    sessionStorage.setItem("name", name);
    sessionStorage.setItem("channel", channel);
    channels.add(channel);
    setText("refusal", "");
    redraw(drawChannels);
    if (server !== null) redraw(drawRoster);
    const text = isBack ? `Connected again, in #${channel}` : `You are in #${channel} as ${name}`;
    redraw(() => addLine(systemLine(text)));
  },
  closed({ code, reason, wait }) {
    tab.state = wait === null ? "closed" : "waiting";
    tab.isFlooding = false;
    const how = `Closed with ${code}${reason === "" ? "" : `, ${reason}`}`;
    tab.closedText = wait === null ? how : `${how}; back in ${seconds(wait)}`;
    if (!tab.isWelcome) return; // an attempt to come back failed: the status says so, the log has said it once
    tab.isWelcome = false;
    const text =
      tab.isEvicted && code === 1006
        ? `${tab.closedText}. The server's 1013 could not get through to a tab that reads nothing, so it was cut off.`
        : tab.closedText;
    redraw(() => addLine(systemLine(text, "line system bad")));
  },
  refused({ text }) {
    setText("refusal", text);
  },
  stalled() {
    tab.state = "stalled";
  },
  woken() {
    tab.state = "open";
    redraw(() => addLine(systemLine("This tab reads again")));
  },
  flooded({ number: sent, total }) {
    tab.isFlooding = false;
    if (sent < total) redraw(() => addLine(systemLine(`The flood ended after ${number.format(sent)} messages`)));
  },
  news(news) {
    pendingNews = news;
    redraw(drawNews);
  },
};

worker.onmessage = (event) => {
  reports[event.data.type](event.data);
  redraw(drawStatus);
};

// What the person does.

// A tab takes on a name and a channel when the server has confirmed them.
function enter(changes) {
  setText("refusal", "");
  worker.postMessage({ type: "enter", profile: { name: tab.name, channel: tab.channel, ...changes } });
}

function onSubmit(id, action) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    if (isAvailable($(id).querySelector("button"))) action();
  });
}

// Half an emoji, cut by a field's length limit, can't be sent as UTF-8.
function wellFormed(text) {
  return text.toWellFormed?.() ?? text;
}

onSubmit("name-form", () => {
  const name = wellFormed($("name").value.trim());
  if (name !== "") enter({ name });
});

onSubmit("channel-form", () => {
  const channel = wellFormed($("channel").value.trim().replace(/^#/, ""));
  if (channel === "") return;
  $("channel").value = "";
  enter({ channel });
});

onSubmit("compose", () => {
  const text = wellFormed($("text").value);
  if (text.trim() === "") return;
  $("text").value = "";
  worker.postMessage({ type: "chat", text });
});

$("channels").addEventListener("click", ({ target }) => {
  const { channel } = target.dataset;
  if (channel !== undefined && channel !== tab.channel && isAvailable(target)) enter({ channel });
});

$("stall").addEventListener("click", () => {
  if (!isAvailable($("stall"))) return;
  if (tab.state === "stalled") {
    Atomics.store(wakeUp, 0, 1);
    Atomics.notify(wakeUp, 0);
    return;
  }
  if (wakeUp !== null) Atomics.store(wakeUp, 0, 0);
  tab.state = "stalling";
  tab.stalledUntil = performance.now() + 1000 * STALL_SECONDS;
  worker.postMessage({ type: "stall", milliseconds: 1000 * STALL_SECONDS, wakeUp });
  redraw(drawStatus, () => addLine(systemLine(`This tab reads nothing for ${STALL_SECONDS} s`, "line system bad")));
});

$("flood").addEventListener("click", () => {
  if (!isAvailable($("flood"))) return;
  tab.isFlooding = true;
  worker.postMessage({ type: "flood", total: FLOOD_MESSAGES });
  redraw(drawStatus);
});

$("name").value = tab.name;
setText("stall-seconds", String(STALL_SECONDS));
setText("flood-count", number.format(FLOOD_MESSAGES));
redraw(drawChannels, drawStatus);
worker.postMessage({ type: "start", profile: { name: tab.name, channel: tab.channel } });
poll();
