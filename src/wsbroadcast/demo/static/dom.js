// Functions with which all parts of the page draw. Texts of other users are set through textContent only, in a <bdi>.
// So a text in another direction doesn't reorder the texts beside it.

export const $ = (id) => document.getElementById(id);
export const number = new Intl.NumberFormat("en");
export const time = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

const ANNOUNCE_MS = 1000;

// Everything is drawn by one function per part, at most once per animation frame.

const dirty = new Set();

export function redraw(...parts) {
  if (dirty.size === 0) requestAnimationFrame(draw);
  for (const part of parts) dirty.add(part);
}

function draw() {
  const parts = [...dirty];
  dirty.clear();
  for (const part of parts) part();
}

export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className !== "") made.className = className;
  made.append(...children);
  return made;
}

export function isolated(text, className = "") {
  return element("bdi", className, text);
}

export function setText(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

// Not `disabled`: that would take the focus away from a button that was just pressed.
export function setAvailable(button, isAvailable) {
  button.setAttribute("aria-disabled", String(!isAvailable));
}

export function isAvailable(button) {
  return button.getAttribute("aria-disabled") !== "true";
}

export function bytes(count) {
  if (count < 1024) return `${count} B`;
  if (count < 1024 * 1024) return `${(count / 1024).toFixed(0)} KiB`;
  return `${(count / 1024 / 1024).toFixed(1).replace(".0", "")} MiB`;
}

export function duration(milliseconds) {
  if (milliseconds < 1) return "under 1 ms";
  if (milliseconds < 999.5) return `${milliseconds.toFixed(0)} ms`;
  return `${(milliseconds / 1000).toFixed(1)} s`;
}

// A screen reader hears at most one summary a second; the log itself is silent.

let announcements = [];

export function announce(text) {
  if (announcements.length === 0) setTimeout(announceAll, ANNOUNCE_MS);
  announcements.push(text);
}

function announceAll() {
  const texts = announcements;
  announcements = [];
  setText("announcer", texts.length > 3 ? `${texts.length} new lines in the log` : texts.join(". "));
}
