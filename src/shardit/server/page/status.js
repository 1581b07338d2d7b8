// The state of the server: its model, ranks and queue.

import { hasKey } from "./api.js";
import { size } from "./jobs.js";

const WORDS = {
  loading: "Loading the model", ready: "Ready", restarting: "Restarting", failed: "Failed", stopping: "Stopping",
};
const $ = (id) => document.getElementById(id);
const panel = $("server");

/** Show what /v1/server has answered. */
export function showServer(server) {
  $("model").textContent = server.model;
  document.title = `${server.model} · shardit`;
  const parts = [WORDS[server.state] ?? server.state];
  if (server.in_progress) parts.push(`${server.in_progress} running`);
  if (server.queued) parts.push(`${server.queued} waiting`);
  show(server.state, parts.join(" · "), server.reason);
  const restarts = server.restarts === 1 ? "1 restart" : `${server.restarts} restarts`;
  $("queue").textContent = `${server.in_progress} running, ${server.queued} of ${server.queue_size} places taken, ${restarts}`;
  $("ranks").replaceChildren(...server.ranks.map(rowOf));
  $("ranks").closest("table").hidden = server.ranks.length === 0;
  $("forget").hidden = !hasKey();
}

/** The server does not answer; the page goes on asking. */
export function showUnreachable(message) {
  show("away", "No connection", `${message} Trying again …`);
}

function show(state, text, reason) {
  $("dot").dataset.state = state;
  if ($("state").textContent !== text) $("state").textContent = text;
  $("reason").textContent = reason ?? "";
  $("reason").hidden = !reason;
}

panel.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  panel.open = false;
  panel.querySelector("summary").focus();
});
document.addEventListener("click", (event) => {
  if (!panel.contains(event.target)) panel.open = false;
});

function rowOf(rank) {
  const row = document.createElement("tr");
  const cells = [rank.rank, rank.state, rank.peak_bytes ? size(rank.peak_bytes) : "–"];
  row.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
  return row;
}
