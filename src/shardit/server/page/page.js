// The page as a whole. The server's lists are the truth and are read again and again; the events of the jobs in
// progress say in between how far they are. A browser has six connections to a server, so only some are listened to.

import { events, hasKey, json, useKey, whenLocked } from "./api.js";
import { finishedCard, runningCard } from "./cards.js";
import { clearChat, fitChat, openChat } from "./chat.js";
import { fit, reuse, send } from "./form.js";
import { isOpen, progressOf } from "./jobs.js";
import { showServer, showUnreachable } from "./status.js";

const BUSY_MS = 1500; // between two looks while something is going on
const IDLE_MS = 5000;
const LISTENED = 3; // jobs whose events are followed at the same time
const PAGE = 50; // jobs of one answer
const WORDS = {
  queued: "Waiting again", in_progress: "Started", completed: "Finished", failed: "Failed", cancelled: "Cancelled",
};

const $ = (id) => document.getElementById(id);
const entries = new Map(); // by id: {job, card, place in the list, since, follower}
const deleted = new Set(); // ids: an answer that was on its way may still hold them
let folder = null; // "v1/images" or "v1/videos", once the server has told
let pages = 1; // how much of the past is shown
let timer = 0;
let looking = false;
let sending = 0; // requests of the form that have no answer yet
let edited = false; // since the last of them
let chats = null; // whether the server has a language model, once it has told

// Looking.

async function look() {
  clearTimeout(timer);
  if (looking || document.hidden || !$("lock").hidden) return;
  looking = true;
  try {
    const server = await json("v1/server");
    showServer(server);
    if (chats === null && server.kind !== null) choose(server.kind === "text");
    if (chats) fitChat(server);
    else fit(server);
    $("send").disabled = server.kind === null; // not known before the model is loaded
    if (server.kind !== null && !chats) {
      folder = `v1/${server.kind}s`; // images, videos or generations
      await readJobs();
    }
  } catch (error) {
    if (error.status !== 401) showUnreachable(error.message);
  }
  looking = false;
  const quiet = $("dot").dataset.state === "ready" && ![...entries.values()].some((entry) => isOpen(entry.job));
  timer = setTimeout(look, quiet ? IDLE_MS : BUSY_MS);
}

// A language model has a chat in place of jobs.
function choose(text) {
  chats = text;
  showMain();
  if (chats) openChat();
}

function showMain() {
  $("main").hidden = chats === true;
  $("chat").hidden = !chats;
}

async function readJobs() {
  const began = performance.now();
  const listed = [];
  let more = true;
  for (let page = 0; more && (page < pages || isOpen(listed.at(-1))); page++) {
    const answer = await json(`${folder}?limit=${PAGE}${page ? `&after=${listed.at(-1).id}` : ""}`);
    listed.push(...answer.data);
    more = answer.has_more;
  }
  $("older").hidden = !more;
  const ids = new Set(listed.map((job) => job.id));
  for (const [id, entry] of entries) {
    if (!ids.has(id) && entry.since < began) drop(id); // deleted by somebody else, or forgotten by the server
  }
  listed.reverse().forEach((job, place) => {
    const entry = entries.get(job.id);
    // Events are newer than an answer that was on its way.
    if (!entry?.follower || entry.job.status !== job.status) put(job, place);
    else entry.place = place;
  });
  listen();
}

// The jobs that are shown.

function put(job, place) {
  const entry = entries.get(job.id) ?? { since: performance.now(), place: Infinity };
  const before = entry.job;
  if (deleted.has(job.id) || (before && !isOpen(before) && isOpen(job))) return; // said before we knew better
  entry.job = job;
  entry.place = place ?? entry.place;
  entries.set(job.id, entry);
  if (before && before.status !== job.status) $("announce").textContent = `${WORDS[job.status]}: ${job.prompt}`;
  if (!before || isOpen(before) !== isOpen(job)) draw(entry);
  if (isOpen(job)) entry.card.update(...progressOf(job));
}

function draw(entry) {
  const { job } = entry;
  const focused = entry.card?.element.contains(document.activeElement);
  entry.card?.remove();
  entry.card = isOpen(job)
    ? runningCard(job, async () => put(await json(`${folder}/${job.id}/cancel`, { method: "POST" })))
    : finishedCard(job, { again: () => reuse(job), remove: () => remove(job.id) });
  arrange();
  if (focused) entry.card.element.focus();
}

async function remove(id) {
  await json(`${folder}/${id}`, { method: "DELETE" });
  deleted.add(id);
  const { element } = entries.get(id).card;
  const neighbour = element.nextElementSibling ?? element.previousElementSibling ?? $("gallery-title");
  drop(id);
  neighbour.focus();
  $("announce").textContent = "Deleted.";
}

function drop(id) {
  const entry = entries.get(id);
  entry.follower?.abort();
  entry.card.remove();
  entries.delete(id);
  arrange();
}

const inOrder = () => [...entries.values()].sort((a, b) => (a.place === b.place ? 0 : a.place - b.place));

// What came first is at the top in the one list, what is newest in the other. Moves only what is out of place.
function arrange() {
  sortInto($("running"), inOrder().filter((entry) => isOpen(entry.job)));
  sortInto($("gallery"), inOrder().filter((entry) => !isOpen(entry.job)).reverse());
  $("running-section").hidden = $("running").childElementCount === 0;
  $("empty").hidden = $("gallery").childElementCount > 0;
}

function sortInto(list, sorted) {
  let next = list.firstElementChild;
  for (const { card: { element } } of sorted) {
    if (next === element) next = next.nextElementSibling;
    else list.insertBefore(element, next);
  }
}

// Events.

function listen() {
  const open = inOrder().filter((entry) => isOpen(entry.job));
  open.sort((a, b) => (a.job.status === "queued") - (b.job.status === "queued"));
  open.forEach((entry, index) => {
    if (index >= LISTENED) entry.follower?.abort();
    else if (!entry.follower) follow(entry);
  });
}

async function follow(entry) {
  const path = `${folder}/${entry.job.id}`;
  entry.follower = new AbortController();
  try {
    for await (const { name, data } of events(`${path}/events`, entry.follower.signal)) {
      if (name === "finished") break;
      put({ ...entry.job, ...data, status: name === "queued" ? "queued" : "in_progress" });
    }
    put(await json(path));
  } catch {
    // The next look says what is wrong, or listens again.
  }
  entry.follower = null;
}

// What the user does.

$("form").addEventListener("input", () => (edited = true));
$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (sending > 0 && !edited) return; // a double click
  edited = false;
  sending++;
  $("send").ariaBusy = "true"; // a disabled button would lose the focus
  const job = await send().finally(() => {
    if (--sending === 0) $("send").ariaBusy = null;
  });
  if (!job) return;
  put(job);
  $("announce").textContent = `Accepted: ${job.prompt}`;
  entries.get(job.id).card.element.scrollIntoView({ block: "nearest" });
  listen();
  look();
});
$("older").addEventListener("click", () => {
  pages++;
  look();
});
document.addEventListener("visibilitychange", look);

// The API key.

whenLocked((message) => {
  $("lock").hidden = false;
  $("main").hidden = $("chat").hidden = true;
  $("key-error").textContent = hasKey() ? message : "";
  $("key").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  $("key").value = "";
  $("lock").hidden = true;
  showMain();
  look();
});
$("forget").addEventListener("click", () => {
  useKey(null);
  [...entries.keys()].forEach(drop);
  if (chats) clearChat();
  $("server").open = false;
  look();
});

look();
