// The form: which fields the model takes, what is typed into them, and errors next to what they concern.

import { ServerError, json } from "./api.js";
import { settingsOf } from "./jobs.js";

const form = document.getElementById("form");
const fields = new Map([...form.querySelectorAll("[data-field]")].map((field) => [field.dataset.field, field]));
const image = form.elements.image;
// Two ways to say one thing: typing one empties the other.
const EITHER = [["seconds", "num_frames"]];
// Settings that all jobs have, even if the model takes no such thing.
const ALWAYS = new Set(["prompt", "seed", "n"]);
// Names of the server's errors that are other than those of the fields.
const CONCERNS = { size: "width", input_reference: "image", num_outputs_per_prompt: "n" };
// Settings that a reused job has and the form has no field for, as [name, value]; they are sent along.
let further = [];
const furtherLine = document.getElementById("further");
// Images sent from here by the job that they belong to: the server does not give them back.
const sent = new Map();

let model = null; // the last answer of /v1/server
let known = ""; // the part of it that matters here

const input = (name) => fields.get(name).querySelector("input, textarea");
const shown = (name) => !fields.get(name).hidden;

/** Show the fields that the model takes; `server` is the answer of /v1/server. */
export function fit(server) {
  const news = JSON.stringify([
    server.model, server.kind, server.parameters, server.defaults, server.needs_image, server.most_images,
  ]);
  if (known === news) return;
  if (model?.model !== server.model) form.elements.prompt.value ||= server.example_prompt;
  [model, known] = [server, news];
  const takes = new Set(["prompt", ...server.parameters]);
  if (takes.has("num_frames")) takes.add("seconds");
  if (takes.has("num_outputs_per_prompt")) takes.add("n");
  if (server.takes_image) takes.add("image");
  const presets = { ...presetsOf(server), ...server.defaults };
  for (const [name, field] of fields) {
    field.hidden = !takes.has(name);
    if (name in presets && input(name).type === "number") input(name).placeholder = String(presets[name]);
  }
  image.multiple = server.most_images > 1;
  document.getElementById("image-name").textContent = image.multiple ? "Images" : "Image";
  document.getElementById("image-note").textContent = server.needs_image ? "" : "(optional)";
  image.required = server.needs_image;
  document.getElementById("more").hidden = !inMore().some(shown);
}

const inMore = () => [...form.querySelectorAll("#more [data-field]")].map((field) => field.dataset.field);

function presetsOf(server) {
  const { default_fps: fps, defaults } = server;
  if (!fps) return {};
  const seconds = defaults.num_frames ? { seconds: Number(((defaults.num_frames - 1) / fps).toFixed(2)) } : {};
  return { fps, ...seconds };
}

/** Send what is typed; the accepted job. Errors are shown here, and null is returned. */
export async function send() {
  clearErrors();
  if (!check()) return null;
  const values = typed();
  const files = shown("image") ? [...image.files] : [];
  const { path, options } = (WAYS[model.kind] ?? imageRequest)(values, files);
  try {
    const job = await json(path, { method: "POST", signal: undefined, ...options });
    if (files.length > 0) sent.set(job.id, files);
    return job;
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    if (error.status !== 401) showError(error.message, error.field);
    return null;
  }
}

function video(values, files) {
  return { path: "v1/videos", options: { body: multipart(values, "input_reference", files) } };
}

function other(values, files) {
  return { path: "v1/generations", options: { body: multipart(values, "image", files) } };
}

const WAYS = { video, generation: other };

function imageRequest(values, files) {
  const headers = { Prefer: "respond-async" };
  if (files.length > 0) {
    return { path: "v1/images/edits", options: { headers, body: multipart(values, "image[]", files) } };
  }
  headers["Content-Type"] = "application/json";
  return { path: "v1/images/generations", options: { headers, body: written(values) } };
}

/** The visible fields that are not empty and the further settings, as [name, text, JSON]. */
function typed() {
  const values = [["model", model.model, JSON.stringify(model.model)]];
  for (const name of fields.keys()) {
    const { type, value } = input(name);
    const keep = name === "prompt" || value !== "";
    const inJson = type === "number" ? literal : JSON.stringify;
    if (shown(name) && keep && type !== "file") values.push([name, value, inJson(value)]);
  }
  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  return [...values, ...further.map(([name, value]) => [name, text(value), JSON.stringify(value)])];
}

function multipart(values, field, files) {
  const body = new FormData();
  for (const [name, text] of values) body.append(name, text);
  for (const file of files) body.append(field, file);
  return body;
}

// By hand, because a seed may have more digits than a number of JavaScript holds.
const literal = (text) => (/^(0|[1-9]\d*)$/.test(text) ? text : String(Number(text)));
const written = (values) => `{${values.map(([name, , value]) => `${JSON.stringify(name)}:${value}`).join(",")}}`;

// What the browser itself can tell, in its own words.
function check() {
  form.elements.prompt.required = image.files.length === 0; // an image alone may say enough
  for (const name of fields.keys()) {
    const element = input(name);
    if (shown(name) && !element.checkValidity()) {
      showError(element.validationMessage, name);
      return false;
    }
  }
  return true;
}

function showError(message, concerned) {
  const name = CONCERNS[concerned] ?? concerned;
  if (!fields.has(name) || !shown(name)) {
    document.getElementById("form-error").textContent = message;
    return;
  }
  const element = input(name);
  const line = fields.get(name).appendChild(document.createElement("p"));
  // It stands below its field, so that it need not begin with the name.
  const text = message.startsWith(`${concerned} `) ? message.slice(concerned.length + 1) : message;
  const whole = text[0].toUpperCase() + text.slice(1);
  Object.assign(line, { className: "error", id: `${name}-error`, textContent: whole });
  line.setAttribute("role", "alert");
  element.setAttribute("aria-invalid", "true");
  element.setAttribute("aria-describedby", line.id);
  element.closest("details")?.setAttribute("open", "");
  element.focus();
}

function clearErrors() {
  document.getElementById("form-error").textContent = "";
  for (const element of form.querySelectorAll("[aria-invalid]")) {
    element.removeAttribute("aria-invalid");
    element.removeAttribute("aria-describedby");
  }
  for (const line of form.querySelectorAll(".field .error")) line.remove();
}

/** Put the settings of a job into the form. */
export function reuse(job) {
  refill(settingsOf(job));
  choose(...(sent.get(job.id) ?? []));
  if (job.input_images > 0 && !sent.has(job.id)) showError("Choose it again: the page does not have it any more.", "image");
}

function refill(settings) {
  clearErrors();
  for (const name of fields.keys()) {
    if (name !== "image") input(name).value = settings[name] ?? "";
  }
  const holds = (name) => ALWAYS.has(name) || (fields.has(name) && shown(name));
  goAlong(Object.entries(settings).filter(([name, value]) => value != null && !holds(name)));
  form.dispatchEvent(new Event("input")); // as if it had been typed
  document.getElementById("more").open = inMore().some((name) => shown(name) && input(name).value !== "");
  form.elements.prompt.focus();
}

function goAlong(settings) {
  further = settings;
  furtherLine.hidden = further.length === 0;
  const words = further.map(([name, value]) => `${name} = ${JSON.stringify(value)}`);
  furtherLine.querySelector("span").textContent = words.join(", ");
}

// `files` as if they had been chosen; nothing without any.
function choose(...files) {
  const chosen = new DataTransfer();
  for (const file of image.multiple ? files : files.slice(0, 1)) chosen.items.add(file);
  image.files = chosen.files;
  form.dispatchEvent(new Event("input"));
  showPreview();
}

function showPreview() {
  const preview = document.getElementById("preview");
  for (const old of preview.children) URL.revokeObjectURL(old.src);
  preview.replaceChildren(...[...image.files].map((file) => {
    return Object.assign(document.createElement("img"), { src: URL.createObjectURL(file), alt: "" });
  }));
  preview.hidden = document.getElementById("no-image").hidden = image.files.length === 0;
}

for (const pair of EITHER) {
  pair.forEach((name, index) => input(name).addEventListener("input", () => (input(pair[1 - index]).value = "")));
}
image.addEventListener("change", showPreview);
document.getElementById("no-image").addEventListener("click", () => {
  choose();
  image.focus();
});
const drop = form.querySelector(".drop");
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name.startsWith("drage") || name === "dragover");
    if (name === "drop") choose(...event.dataTransfer.files);
  });
}
furtherLine.querySelector("button").addEventListener("click", () => {
  goAlong([]);
  form.dispatchEvent(new Event("input"));
  form.elements.prompt.focus();
});
document.getElementById("reset").addEventListener("click", () => {
  refill({ prompt: form.elements.prompt.value });
  choose();
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
