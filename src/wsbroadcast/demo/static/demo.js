// The page: starts its parts, and on a small screen shows one of them at a time.

import { startChat } from "./chat.js";
import { startComparison } from "./comparison.js";
import { poll } from "./counters.js";
import { $ } from "./dom.js";
import { follow } from "./log.js";

const views = [...document.querySelectorAll("[data-shows]")];

function show(view) {
  $("main").dataset.view = view;
  for (const button of views) button.setAttribute("aria-pressed", String(button.dataset.shows === view));
  follow(); // a log that was hidden for less than a frame has lost its place, and its size hasn't changed
}

for (const button of views) button.addEventListener("click", () => show(button.dataset.shows));

startChat();
startComparison();
poll();
