// Shows what the nodes say, and asks again while somebody looks. Everything that comes from clients is written as text.

const SECONDS = 1.5;
const PAGE = 25;
const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");

const view = { after: "", next: null, isPaused: false, isStopped: false };
const before = new Map(); // by node: when it was asked last, and how many deliveries it had counted
let names = new Map(); // of nodes, by their id
let timer = null;
let asking = null;

// Words.

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${unit && count < 10 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

function duration(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

const plural = (count, one) => `${number.format(count)} ${one}${count === 1 ? "" : "s"}`;

// The document changes only where something has changed, so that nothing jumps and the focus stays.

function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function list(parent, items, key, make, update) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const id = key(item);
    let child = old.get(id);
    if (child === undefined) {
      child = make(item);
      child.dataset.key = id;
    }
    old.delete(id);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
    update(child, item);
  }
  for (const child of old.values()) child.remove();
}

function row(labels, numbers) {
  const tr = document.createElement("tr");
  labels.forEach((label, index) => {
    const td = document.createElement("td");
    if (label) td.dataset.label = label;
    if (numbers.includes(index)) td.className = "number";
    td.append(document.createElement("span"));
    tr.append(td);
  });
  return tr;
}

function cell(tr, index, text, kind = "") {
  const span = tr.cells[index].firstElementChild;
  write(span, text);
  if (span.className !== kind) span.className = kind;
  const title = text.length > 16 ? text : "";
  if (span.title !== title) span.title = title;
}

function action(tr, index, text, name, isDangerous, run) {
  const td = tr.cells[index];
  let button = td.querySelector("button");
  if (text === null) {
    td.replaceChildren();
    return;
  }
  if (button === null) {
    button = document.createElement("button");
    button.type = "button";
    if (isDangerous) button.className = "danger";
    td.replaceChildren(button);
  }
  write(button, text);
  if (button.getAttribute("aria-label") !== name) button.setAttribute("aria-label", name);
  button.onclick = run;
}

const someOf = (id, count) => $(id).closest(".card").classList.toggle("some", count > 0);

function userOf(tr, index, user) {
  cell(tr, index, user ?? "nobody named", user === null ? "none" : "name");
}

// What is shown.

function rateOf(node, now) {
  const last = before.get(node.id);
  before.set(node.id, { now, deliveries: node.deliveries });
  return last === undefined || now <= last.now ? 0 : (node.deliveries - last.deliveries) / ((now - last.now) / 1000);
}

const labelOf = (node) => `${node.host}:${node.pid}`;

function showNodes(found) {
  const now = performance.now();
  names = new Map([...found.nodes, ...found.silent].map((node) => [node.id, labelOf(node)]));
  const rates = new Map(found.nodes.map((node) => [node.id, rateOf(node, now)]));
  for (const id of before.keys()) if (!rates.has(id)) before.delete(id);
  const sum = (field) => found.nodes.reduce((total, node) => total + node[field], 0);
  write($("total-connections"), number.format(sum("connections")));
  write($("total-users"), number.format(sum("users")));
  write($("total-rate"), number.format(Math.round([...rates.values()].reduce((a, b) => a + b, 0))));
  write($("total-slow"), number.format(sum("behind")));
  write($("total-backlog"), bytes(sum("backlog_bytes")));
  $("tile-slow").classList.toggle("some", sum("behind") > 0);

  const isWhole = found.answered === found.known;
  const broken = found.nodes.filter((node) => !node.engine.is_ok).length;
  const status = $("status");
  write(status, `${found.answered} of ${plural(found.known, "node")} answered`);
  status.className = broken ? "pill bad" : isWhole ? "pill" : "pill warn";
  write(
    $("scope"),
    found.scope === "process"
      ? "The engine is memory://, so this is one process alone."
      : broken
        ? `${plural(broken, "node")} can't reach the broker.`
        : "",
  );

  const all = [
    ...found.nodes,
    ...found.silent.map((node) => ({ ...node, isSilent: true })),
  ].sort((a, b) => a.host.localeCompare(b.host) || a.pid - b.pid || (a.id < b.id ? -1 : 1));
  const servers = new Map();
  for (const node of found.nodes) servers.set(node.server, [...(servers.get(node.server) ?? []), node]);
  const labels = ["Node", "Connections", "Channels", "Deliveries/s", "Slow", "Backlog", "Engine", "Up", ""];
  list(
    $("nodes").tBodies[0],
    all,
    (node) => node.id,
    () => row(labels, [1, 2, 3, 4, 5]),
    (tr, node) => showNode(tr, node, rates.get(node.id), servers.get(node.server)),
  );
}

function showNode(tr, node, rate, server) {
  tr.className = node.isSilent ? "silent" : "";
  cell(tr, 0, labelOf(node), "name");
  if (node.isSilent) {
    for (let index = 1; index < 8; index += 1) cell(tr, index, index === 6 ? "no answer" : "–", index === 6 ? "pill warn" : "");
    action(tr, 8, null);
    return;
  }
  cell(tr, 1, number.format(node.connections));
  cell(tr, 2, number.format(node.channels));
  cell(tr, 3, number.format(Math.round(rate)));
  cell(tr, 4, number.format(node.behind));
  cell(tr, 5, bytes(node.backlog_bytes));
  if (node.is_draining) cell(tr, 6, "draining", "pill warn");
  else if (node.engine.is_ok) cell(tr, 6, node.engine.name, "pill");
  else cell(tr, 6, `${node.engine.name}: ${node.engine.detail || "out of reach"}`, "pill bad");
  cell(tr, 7, duration(node.uptime));
  const others = server.length - 1;
  if (node.is_draining) action(tr, 8, null);
  else action(tr, 8, "Drain…", `Drain ${labelOf(node)}`, true, () => drain(node, others));
}

function showSlow(found) {
  someOf("slow", found.connections.length);
  write($("slow-count"), found.total ? plural(found.total, "connection") : "");
  list(
    $("slow").tBodies[0],
    found.connections,
    (each) => each.id,
    () => row(["User", "Node", "Messages", "Backlog"], [2, 3]),
    (tr, each) => {
      userOf(tr, 0, each.user);
      cell(tr, 1, names.get(each.node) ?? "", "name");
      cell(tr, 2, number.format(each.backlog_messages));
      cell(tr, 3, bytes(each.backlog_bytes));
    },
  );
}

function showChannels(found) {
  someOf("channels", found.channels.length);
  write($("channels-count"), found.is_complete ? `${found.channels.length}` : `the ${found.channels.length} largest`);
  const most = Math.max(1, ...found.channels.map((channel) => channel.connections));
  list(
    $("channels"),
    found.channels,
    (channel) => channel.name,
    () => {
      const li = document.createElement("li");
      const name = document.createElement("span");
      name.className = "name";
      const count = document.createElement("span");
      count.className = "number";
      li.append(name, document.createElement("meter"), count);
      return li;
    },
    (li, channel) => {
      const [name, meter, count] = li.children;
      write(name, channel.name);
      name.title = channel.name;
      meter.max = most;
      meter.value = channel.connections;
      meter.setAttribute("aria-hidden", "true");
      write(count, number.format(channel.connections));
    },
  );
}

function showConnections(found) {
  someOf("connections", found.connections.length);
  view.next = found.next;
  $("next").disabled = found.next === null;
  $("first").disabled = view.after === "";
  write($("connections-count"), `${number.format(found.total)}`);
  list(
    $("connections").tBodies[0],
    found.connections,
    (each) => each.id,
    () => row(["User", "Channels", "Address", "Node", "Age", "Backlog", ""], [4, 5]),
    (tr, each) => {
      const more = each.channel_count - each.channels.length;
      userOf(tr, 0, each.user);
      cell(tr, 1, (each.channels.join(", ") || "none") + (more ? ` and ${more} more` : ""), each.channels.length ? "name" : "none");
      cell(tr, 2, each.address ?? "–");
      cell(tr, 3, names.get(each.node) ?? "", "name");
      cell(tr, 4, duration(each.age));
      cell(tr, 5, bytes(each.backlog_bytes));
      if (each.user === null) action(tr, 6, null);
      else action(tr, 6, "Close user…", `Close the user ${each.user}`, true, () => closeUser(each.user));
    },
  );
}

// Asking.

class Failed extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

async function ask(path, fields = {}, options = {}) {
  const query = new URLSearchParams(Object.entries(fields).filter(([, value]) => value !== ""));
  const response = await fetch(query.size ? `${path}?${query}` : path, options);
  if (!response.ok || response.redirected) {
    let text = `${response.status} ${response.statusText}`;
    try {
      const { detail } = await response.json();
      if (typeof detail === "string") text = detail;
    } catch {
      // it isn't JSON
    }
    throw new Failed(response.redirected ? 401 : response.status, text);
  }
  return response.json();
}

function tell(text, isBad = false) {
  const notice = $("notice");
  notice.hidden = text === "";
  notice.className = isBad ? "bad" : "";
  write(notice, text);
}

let isFailing = false;

async function refresh() {
  asking?.abort();
  const mine = (asking = new AbortController());
  const options = { signal: mine.signal };
  const fields = { limit: PAGE, after: view.after, user: $("by-user").value, channel: $("by-channel").value };
  try {
    const [nodes, slow, channels, connections] = await Promise.all([
      ask("nodes", {}, options),
      ask("connections", { slow: "true", limit: 20 }, options),
      ask("channels", { sort: "size", limit: 50, prefix: $("prefix").value }, options),
      ask("connections", fields, options),
    ]);
    if (mine !== asking) return;
    showNodes(nodes);
    showSlow(slow);
    showChannels(channels);
    showConnections(connections);
    if (isFailing) tell("");
    isFailing = false;
  } catch (error) {
    if (error.name === "AbortError" || mine !== asking) return;
    isFailing = true;
    view.isStopped = error.status === 401 || error.status === 403;
    write($("status"), view.isStopped ? "Signed out" : "No answer");
    $("status").className = "pill bad";
    tell(
      view.isStopped
        ? "You may not see this any more. Sign in, and load the page again."
        : `The server doesn't answer (${error.message}). Trying again.`,
      true,
    );
  } finally {
    if (mine === asking) later();
  }
}

function later() {
  clearTimeout(timer);
  if (!document.hidden && !view.isPaused && !view.isStopped) timer = setTimeout(refresh, SECONDS * 1000);
}

function now() {
  clearTimeout(timer);
  if (!view.isStopped) refresh();
}

// Changing something.

async function confirmed(title, text, yes) {
  const dialog = $("confirm");
  write($("confirm-title"), title);
  write($("confirm-text"), text);
  write($("confirm-yes"), yes);
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "yes";
}

async function change(path, fields, told) {
  try {
    tell(told(await ask(path, fields, { method: "POST" })));
  } catch (error) {
    tell(error.message, true);
  }
  now();
}

const unheard = (answer) =>
  answer.answered < answer.known ? ` ${answer.answered} of ${answer.known} nodes answered.` : "";

async function closeUser(user) {
  const text = `All connections of ${user} on all nodes are closed with 4401. The client doesn't come back by itself.`;
  if (await confirmed("Close this user?", text, "Close user"))
    await change(
      `users/${encodeURIComponent(user)}/close`,
      {},
      (answer) => `Closed ${plural(answer.connections, "connection")} of ${answer.user}.${unheard(answer)}`,
    );
}

async function drain(node, others) {
  const more = others ? ` and the ${plural(others, "other process").replace("processs", "processes")} of its server` : "";
  const text =
    `${labelOf(node)}${more} close their connections within 5 s, and take no new ones until they are started again.`;
  if (await confirmed("Drain this server?", text, "Drain"))
    await change("drain", { node: node.id }, (answer) => `${plural(answer.nodes.length, "node")} drain.${unheard(answer)}`);
}

// Controls.

let typing = null;
for (const id of ["by-user", "by-channel", "prefix"])
  $(id).addEventListener("input", () => {
    if (id !== "prefix") view.after = "";
    clearTimeout(typing);
    typing = setTimeout(now, 200);
  });
$("first").addEventListener("click", () => {
  view.after = "";
  now();
});
$("next").addEventListener("click", () => {
  if (view.next !== null) view.after = view.next;
  now();
});
$("pause").addEventListener("click", () => {
  view.isPaused = !view.isPaused;
  $("pause").setAttribute("aria-pressed", String(view.isPaused));
  write($("pause"), view.isPaused ? "Go on" : "Pause");
  if (view.isPaused) clearTimeout(timer);
  else now();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else if (!view.isPaused) now();
});

refresh();
