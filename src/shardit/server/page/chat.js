// The chat with a language model: the conversation, its settings, and answers as they come.

import { chunks } from "./api.js";

const KEPT = "shardit-chat"; // in this tab, so that a reload keeps the conversation
const NUMBERS = { temperature: "temperature", max_tokens: "max_tokens", seed: "chat-seed" }; // ids of their fields
const ENDS = { length: "the limit of tokens is reached", stopped: "stopped" };
const $ = (id) => document.getElementById(id);

let messages = read();
let running = null; // an AbortController while an answer comes

/** Show what goes with the model of /v1/server. */
export function fitChat(server) {
  const { temperature } = server.defaults;
  $("temperature").placeholder = temperature ?? "1";
  $("say").disabled = false;
}

/** Show the conversation of this tab. */
export function openChat() {
  $("messages").replaceChildren();
  for (const one of messages) bubble(one.role, one.content);
  fitButtons();
  $("say").focus();
}

/** Forget the conversation: a key was forgotten. */
export function clearChat() {
  running?.abort();
  messages = [];
  keep();
  $("messages").replaceChildren();
  fitButtons();
}

function read() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT)) ?? [];
  } catch {
    return [];
  }
}

function keep() {
  sessionStorage.setItem(KEPT, JSON.stringify(messages));
}

function bubble(role, text) {
  const element = $("message").content.firstElementChild.cloneNode(true);
  element.dataset.role = role;
  element.querySelector(".who").textContent = role === "user" ? "You" : "Model";
  element.querySelector(".text").textContent = text;
  $("messages").append(element);
  $("chat-empty").hidden = true;
  return element;
}

function fitButtons() {
  $("chat-empty").hidden = $("messages").childElementCount > 0;
  $("say-send").hidden = running !== null;
  $("say-stop").hidden = running === null;
  $("new-chat").disabled = messages.length === 0 && running === null;
}

function body() {
  const system = $("system").value.trim();
  const asked = { messages: system ? [{ role: "system", content: system }, ...messages] : messages, stream: true };
  for (const [name, id] of Object.entries(NUMBERS)) {
    if ($(id).value !== "") asked[name] = Number($(id).value);
  }
  return asked;
}

// Follows what comes, unless the reader has gone up to read.
function follow(change) {
  const list = $("messages");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  change();
  if (atEnd) list.scrollTop = list.scrollHeight;
}

async function answer() {
  const element = bubble("assistant", "");
  const [text, line] = [element.querySelector(".text"), element.querySelector(".line")];
  let [whole, end] = ["", ""];
  running = new AbortController();
  element.ariaBusy = "true";
  fitButtons();
  $("messages").scrollTop = $("messages").scrollHeight;
  try {
    for await (const chunk of chunks("v1/chat/completions", body(), running.signal)) {
      const [choice] = chunk.choices;
      whole += choice.delta.content ?? "";
      end = choice.finish_reason ?? end;
      follow(() => (text.textContent = whole));
    }
    if (!end) throw new Error("The connection was lost; what came so far is kept.");
  } catch (error) {
    if (error.name === "AbortError") end = "stopped";
    else $("chat-error").textContent = error.message;
  }
  running = null;
  element.ariaBusy = null;
  follow(() => (line.textContent = ENDS[end] ?? ""));
  if (whole) {
    messages.push({ role: "assistant", content: whole });
    keep();
    $("announce").textContent = whole;
  } else if (!end || end === "stopped") {
    takeBack(element);
  }
  fitButtons();
}

// An answer that has not begun: the question goes back into its field.
function takeBack(element) {
  element.remove();
  $("messages").lastElementChild.remove();
  const { content } = messages.pop();
  keep();
  if ($("say").value === "") $("say").value = content;
}

$("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = $("say").value.trim();
  if (!content || running !== null) return;
  $("chat-error").textContent = "";
  $("say").value = "";
  messages.push({ role: "user", content });
  keep();
  bubble("user", content);
  answer();
});
$("say").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("chat-form").requestSubmit();
});
$("say-stop").addEventListener("click", () => {
  running?.abort();
  $("say").focus();
});
$("new-chat").addEventListener("click", () => {
  clearChat();
  $("chat-error").textContent = "";
  $("say").focus();
});
