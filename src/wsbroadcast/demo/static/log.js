// The log of the channel that the tab is in.

import { $, announce, element, isolated, number, time } from "./dom.js";

const MAX_LINES = 200;
const NEAR_END_PX = 40;

const log = $("log");

// Whether the newest line is kept in view. Only scrolling by the user ends this, not a change of the log's size.
let isFollowing = true;

function isNearEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PX;
}

// Where it was put last. A change of the size may leave it there, away from the end.
let followedTop = 0;

export function follow() {
  if (!isFollowing) return;
  log.scrollTop = log.scrollHeight;
  followedTop = log.scrollTop;
}

log.addEventListener("scroll", () => {
  if (isNearEnd()) isFollowing = true;
  else if (log.scrollTop < followedTop) isFollowing = false;
});
new ResizeObserver(follow).observe(log);

// A line may belong to a channel that the tab isn't in yet. It stays hidden until `showChannel`.
export function addLine(line, { channel, isHidden = false } = {}) {
  if (channel !== undefined) line.dataset.channel = channel;
  line.hidden = isHidden;
  log.append(line);
  while (log.childElementCount > MAX_LINES) log.firstElementChild.remove();
  follow();
}

// Removes the lines of other channels. Lines about the tab itself have no channel, and stay.
export function showChannel(channel) {
  for (const line of [...log.children]) {
    if (line.dataset.channel === undefined || line.dataset.channel === channel) line.hidden = false;
    else line.remove();
  }
  isFollowing = true;
  follow();
}

function stamp(at) {
  const made = element("time", "", time.format(at));
  made.dateTime = new Date(at).toISOString();
  return made;
}

export function chatLine({ name, hue, text, at }, isOwn) {
  const head = element("div", "line-head", isolated(name, `name hue-${hue}`), stamp(at));
  return element("li", isOwn ? "line own" : "line", head, element("p", "text", isolated(text)));
}

// `parts` of the sentence are texts of the page, or names in an `isolated` element.
export function systemLine(parts, { isBad = false, at = Date.now() } = {}) {
  return element("li", isBad ? "line system bad" : "line system", element("p", "text", ...parts), stamp(at));
}

const floodLines = new Map();

export function drawFlood({ flood, name, total, received, last, isInOrder, isCut }) {
  let parts = floodLines.get(flood);
  if (parts === undefined || !parts.line.isConnected) {
    const bar = element("progress", "");
    bar.max = total;
    bar.setAttribute("aria-label", `Received of ${name}'s flood`);
    parts = { text: element("p", "text"), bar };
    parts.line = element("li", "line flood", parts.text, bar);
    floodLines.set(flood, parts);
    if (floodLines.size > MAX_LINES) floodLines.delete(floodLines.keys().next().value);
    addLine(parts.line);
  }
  const missed = last - received;
  let verdict = isInOrder ? ", none missed" : ", out of order";
  if (missed > 0) verdict = `, ${number.format(missed)} missed`;
  else if (isCut) verdict = ", then cut off";
  const how = `'s flood: ${number.format(received)} of ${number.format(total)} received${verdict}`;
  parts.text.replaceChildren(isolated(name), how);
  parts.bar.value = received;
  if (received === total) announce(parts.text.textContent);
  follow();
}
