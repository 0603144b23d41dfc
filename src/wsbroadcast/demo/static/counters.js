// The counters, who is there, and who has gone. They come over HTTP, which works while the chat's worker is stalled.

import { noticeOwnEnd, tab } from "./chat.js";
import { $, bytes, element, isolated, number, redraw, setText, time } from "./dom.js";
import { howOthersEnd, isWanted } from "./words.js";

const POLL_MS = 500;
const GRAPH_SAMPLES = 60;

const backlogSamples = [];
let server = null;
let takenAt = 0;
let rate = 0;

export async function poll() {
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
  server = state;
  noticeOwnEnd(state.ended);
  redraw(drawCounters, drawRoster, drawEnded);
}

function drawCounters() {
  const { stats, max_backlog_bytes: limit, send_timeout: timeout } = server;
  const sum = (counts) => Object.values(counts).reduce((total, count) => total + count, 0);
  setText("count-connections", number.format(stats.connections));
  setText("count-workers", server.workers === 1 ? "one worker" : `${server.workers} workers`);
  setText("count-deliveries", number.format(stats.deliveries));
  setText("count-rate", number.format(rate));
  setText("count-dropped", number.format(sum(stats.dropped)));
  setText("count-evicted", number.format(sum(stats.evicted)));
  setText("count-behind", number.format(stats.behind));
  setText("count-backlog", bytes(stats.backlog_bytes));
  setText("fast-path", fastPath(stats));
  setText("limit-bytes", bytes(limit));
  setText("limit-seconds", String(timeout));
  $("alone").hidden = stats.connections > 1;
  $("count-evicted").classList.toggle("bad", sum(stats.evicted) > 0);
  $("backlog-graph").classList.toggle("filling", stats.backlog_bytes > 0);
  drawGraph(limit);
}

function fastPath({ connections, sinks }) {
  const fast = sinks.uvicorn ?? 0;
  if (connections === 0) return "Nobody is connected.";
  if (fast === connections) return "A message is encoded once; all connections share its bytes.";
  return `${number.format(fast)} of ${number.format(connections)} connections share the bytes of a message.`;
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

// A list is drawn again only when it has changed, so that a selection in it stays.
const drawn = new Map();

function replace(id, shown, makeLines) {
  const key = JSON.stringify(shown);
  if (drawn.get(id) === key) return;
  drawn.set(id, key);
  $(id).replaceChildren(...makeLines());
}

function drawRoster() {
  const { roster, visitors } = server;
  replace("roster", [roster, visitors, tab.id], () => {
    const ownFirst = [...roster].sort((a, b) => (b.id === tab.id) - (a.id === tab.id));
    const lines = ownFirst.map(({ id, name, hue, channel, is_stalled: isStalled }) => {
      const line = element("li", "", isolated(name, `name hue-${hue}`));
      if (id === tab.id) line.append(element("span", "tag you", "this tab"));
      if (isStalled) line.append(element("span", "tag bad", "stalled"));
      line.append(element("span", "where", "#", isolated(channel)));
      return line;
    });
    if (visitors > roster.length) lines.push(element("li", "", `and ${number.format(visitors - roster.length)} more`));
    return lines;
  });
  setText("roster-count", number.format(visitors));
  setText("view-count", number.format(visitors));
}

function drawEnded() {
  const { ended } = server;
  $("ended-part").hidden = ended.length === 0;
  replace("ended", ended, () =>
    ended.map(({ name, code, at }) => {
      const how = element("span", code === 1013 ? "bad" : "", howOthersEnd(code));
      const line = element("li", "", isolated(name, "name"), how);
      if (!isWanted(code)) line.append(element("code", "tag", String(code)));
      line.append(element("span", "where", time.format(at * 1000)));
      return line;
    }),
  );
}
