// The chat: this tab's own connection, and what it says and hears.

import { $, announce, element, isAvailable, isolated, number, redraw, setAvailable, setText } from "./dom.js";
import { addLine, chatLine, drawFlood, showChannel, systemLine } from "./log.js";
import { howOthersEnd, howThisTabEnds, isWanted } from "./words.js";

const CHANNELS = ["lobby", "news", "random"];
const NAMES = ["Avocet", "Bittern", "Curlew", "Dipper", "Egret", "Fulmar", "Gannet", "Heron", "Jay", "Kestrel",
  "Linnet", "Merlin", "Nuthatch", "Osprey", "Plover", "Redstart", "Siskin", "Teal", "Wagtail", "Yellowhammer"];
const FLOOD_MESSAGES = 3000;
const STALL_SECONDS = 15;

// Where a browser stores nothing for this page, reading raises, too.
const storage = {
  get(key) {
    try {
      return sessionStorage.getItem(key);
    } catch {
      return null;
    }
  },
  set(key, value) {
    try {
      sessionStorage.setItem(key, value);
    } catch {
      // The next visit begins without it.
    }
  },
};

export const tab = {
  id: null,
  // The name that this tab asks for. The server gives it another one if the name is taken.
  wanted: storage.get("name") ?? NAMES[Math.floor(Math.random() * NAMES.length)],
  name: "",
  channel: storage.get("channel") ?? CHANNELS[0],
  // The channel that it has asked for, until it is in there.
  nextChannel: null,
  state: "connecting",
  stalledUntil: 0,
  isFlooding: false,
  isEvicted: false,
  closedText: "",
};
const channels = new Set([...CHANNELS, tab.channel]);
let pendingNews = null;

// The worker that holds the connection. The memory is shared with it, so that it can be woken while its thread is
// blocked. A page that isn't on a trustworthy origin (plain HTTP from another machine) gets no shared memory; there the
// worker wakes by the clock alone.
const worker = new Worker("chat-worker.js", { type: "module" });
const wakeUp = self.crossOriginIsolated ? new Int32Array(new SharedArrayBuffer(4)) : null;

// What comes in.

function drawNews() {
  const news = pendingNews;
  pendingNews = null;
  if (news.skipped > 0) addLine(systemLine([`${number.format(news.skipped)} more lines were not shown`]));
  for (const line of news.lines) {
    const isHidden = line.channel !== tab.channel;
    if (isHidden && line.channel !== tab.nextChannel) continue; // of the channel that this tab has just left
    addLine(line.type === "chat" ? heardLine(line, isHidden) : noticeLine(line, isHidden), { ...line, isHidden });
  }
  for (const flood of news.floods) drawFlood(flood);
  worker.postMessage({ type: "drawn" });
}

function heardLine(line, isHidden) {
  const isOwn = line.sender === tab.id;
  if (!isOwn && !isHidden) announce(`${line.name}: ${line.text}`);
  return chatLine(line, isOwn);
}

function noticeLine({ event, name, code, at }, isHidden) {
  let how = event === "joined" ? "is here" : "went to another channel";
  if (code !== null) how = howOthersEnd(code);
  if (!isHidden) announce(`${name} ${how}`);
  return systemLine([isolated(name), ` ${how}`], { isBad: code === 1013, at });
}

export function noticeOwnEnd(ended) {
  const end = ended.find(({ id }) => id === tab.id);
  if (end === undefined || end.code !== 1013 || tab.isEvicted) return;
  tab.isEvicted = true;
  const text = `The server has evicted this tab (close code ${end.code}, ${end.reason}). The others go on.`;
  redraw(drawStatus, () => addLine(systemLine([text], { isBad: true })));
}

// This tab's own state.

function drawStatus() {
  const { state, isEvicted } = tab;
  const texts = {
    connecting: "Connecting",
    open: "Connected",
    stalling: "Stalled: reading nothing",
    stalled: isEvicted ? "Evicted, still reading nothing" : "Stalled: reading nothing",
    waiting: tab.closedText,
    closed: tab.closedText,
  };
  setText("status", texts[state]);
  $("status").dataset.state = state === "stalled" && isEvicted ? "evicted" : state;
  const isOpen = state === "open";
  setText("flood-label", tab.isFlooding ? "Flooding" : "Flood everyone");
  setAvailable($("flood"), isOpen && !tab.isFlooding);
  for (const button of document.querySelectorAll(".chat form button, .pill")) setAvailable(button, isOpen);
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
      button = element("button", "pill", "#", isolated(channel));
      button.type = "button";
      button.dataset.channel = channel;
      $("channels").append(button);
    }
    button.setAttribute("aria-pressed", String(channel === tab.channel));
  }
}

// What the worker says.

const reports = {
  connecting() {
    tab.state = "connecting";
  },
  welcome({ id, name, channel }) {
    const isBack = tab.id !== null && tab.id !== id;
    if ($("name").value === tab.wanted || $("name").value === tab.name) $("name").value = name;
    if (channel === tab.nextChannel) tab.nextChannel = null;
    Object.assign(tab, { id, name, channel, isEvicted: false });
    if (tab.state !== "stalling") tab.state = "open";
    storage.set("channel", channel);
    channels.add(channel);
    setText("refusal", "");
    const parts = isBack ? ["Connected again, in #", isolated(channel)] : ["You are in #", isolated(channel)];
    parts.push(" as ", isolated(name));
    redraw(drawChannels, () => {
      showChannel(channel);
      addLine(systemLine(parts), { channel });
    });
  },
  lost() {
    end("waiting", `${tab.isEvicted ? "Evicted and cut off" : "Connection lost"}; reconnecting`);
  },
  closed({ code, reason }) {
    const why = reason === "" || isWanted(code) ? "" : ` (${reason})`;
    end("closed", `${howThisTabEnds(code)}${why}. Reload the page to reconnect`);
  },
  refused({ text }) {
    setText("refusal", text);
  },
  stalled() {
    tab.state = "stalled";
  },
  woken() {
    tab.state = "open";
    redraw(() => addLine(systemLine(["This tab reads again"])));
  },
  flooded({ number: sent, total }) {
    tab.isFlooding = false;
    if (sent < total) redraw(() => addLine(systemLine([`The flood ended after ${number.format(sent)} messages`])));
  },
  news(news) {
    pendingNews = news;
    redraw(drawNews);
  },
};

function end(state, text) {
  Object.assign(tab, { state, closedText: text, isFlooding: false });
  redraw(() => addLine(systemLine([text], { isBad: true })));
}

worker.onmessage = (event) => {
  reports[event.data.type](event.data);
  redraw(drawStatus);
};

// What the person does.

// A tab takes on a name and a channel when the server has confirmed them.
function enter({ name = tab.wanted, channel = tab.channel }) {
  setText("refusal", "");
  tab.wanted = name;
  tab.nextChannel = channel;
  storage.set("name", name);
  worker.postMessage({ type: "enter", profile: { name, channel } });
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
  setText("refusal", "");
  worker.postMessage({ type: "chat", text });
});

$("channels").addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (button === null || !isAvailable(button)) return;
  if (button.dataset.channel !== tab.channel) enter({ channel: button.dataset.channel });
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
  const text = `This tab reads nothing for ${STALL_SECONDS} s`;
  redraw(drawStatus, () => addLine(systemLine([text], { isBad: true })));
});

$("flood").addEventListener("click", () => {
  if (!isAvailable($("flood"))) return;
  tab.isFlooding = true;
  worker.postMessage({ type: "flood", total: FLOOD_MESSAGES });
  redraw(drawStatus);
});

export function startChat() {
  $("name").value = tab.wanted;
  setText("stall-seconds", String(STALL_SECONDS));
  setText("flood-count", number.format(FLOOD_MESSAGES));
  redraw(drawChannels, drawStatus);
  worker.postMessage({ type: "start", profile: { name: tab.wanted, channel: tab.channel } });
}
