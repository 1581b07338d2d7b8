// What a job looks like, in progress and finished. Cards are changed in place, so that the focus stays where it is.

import { address, release } from "./api.js";
import { filesOf, lineOf } from "./jobs.js";
import { enlarge } from "./viewer.js";

const fresh = (template) => document.getElementById(template).content.firstElementChild.cloneNode(true);
const make = (tag, properties) => Object.assign(document.createElement(tag), properties);

/** The card of an open job; `cancel` is called by its button and may reject. */
export function runningCard(job, cancel) {
  const element = cardOf("running-card", job);
  const bar = element.querySelector("progress");
  const button = element.querySelector(".cancel");
  bar.setAttribute("aria-label", `Progress of: ${job.prompt}`);
  button.setAttribute("aria-label", `Cancel: ${job.prompt}`);
  button.addEventListener("click", () => attempt(element, button, cancel));
  return {
    element,
    update(line, share) {
      element.querySelector(".line").textContent = line;
      if (share === null) bar.removeAttribute("value");
      else bar.value = share;
    },
    remove: () => element.remove(),
  };
}

/** The card of a job that has ended. `acts`: {again, remove}; `remove` may reject. */
export function finishedCard(job, acts) {
  const element = cardOf("finished-card", job);
  const urls = [];
  element.querySelector(".line").textContent = lineOf(job);
  showNotes(job, element.querySelector(".notes"));
  const media = element.querySelector(".media");
  if (job.status === "completed") showMedia(job, media, element.querySelector(".downloads"), urls);
  else if (job.status === "cancelled") media.append(make("p", { textContent: "Cancelled" }));
  else media.append(make("p", { className: "bad", textContent: `Failed: ${job.error?.message}` }));
  const again = element.querySelector(".again");
  again.setAttribute("aria-label", `Reuse the settings of: ${job.prompt}`);
  again.addEventListener("click", acts.again);
  whenSure(element.querySelector(".delete"), job, (button) => attempt(element, button, acts.remove));
  return {
    element,
    remove() {
      element.remove();
      urls.forEach(release);
    },
  };
}

function cardOf(template, job) {
  const element = fresh(template);
  element.dataset.job = job.id;
  element.dataset.status = job.status;
  element.querySelector(".prompt").textContent = job.prompt || "(no prompt)";
  return element;
}

// Runs what a button stands for, once at a time; an error is shown in the card.
async function attempt(element, button, act) {
  if (button.ariaBusy === "true") return;
  const line = element.querySelector(".error");
  line.textContent = "";
  button.ariaBusy = "true"; // a disabled button would lose the focus
  try {
    await act();
  } catch (error) {
    line.textContent = error.message;
  }
  button.ariaBusy = null;
}

// What is deleted is gone, so that the button has to be pressed twice.
function whenSure(button, job, act) {
  const ask = (sure) => {
    button.classList.toggle("sure", sure);
    button.querySelector("span").textContent = sure ? "Delete?" : "";
    button.setAttribute("aria-label", sure ? `Delete? Press again to delete: ${job.prompt}` : `Delete: ${job.prompt}`);
  };
  ask(false);
  button.addEventListener("click", () => (button.classList.contains("sure") ? act(button) : ask(true)));
  button.addEventListener("blur", () => ask(false));
}

// What differs from what was asked, which the libraries tell at length.
function showNotes(job, notes) {
  notes.hidden = job.notes.length === 0;
  notes.querySelector("summary").textContent = job.notes.length === 1 ? "1 note" : `${job.notes.length} notes`;
  notes.querySelector("ul").append(...job.notes.map((text) => make("li", { textContent: text })));
}

// Images and videos are fetched when they come into sight.
function showMedia(job, media, downloads, urls) {
  const files = filesOf(job);
  media.classList.toggle("several", files.length > 1);
  const views = files.map((file, index) => {
    const which = files.length > 1 ? ` ${index + 1}` : "";
    const button = make("button", { type: "button" });
    button.setAttribute("aria-label", `Enlarge${which}: ${job.prompt}`);
    media.append(button);
    const link = fresh("download-link");
    link.download = file.name;
    link.setAttribute("aria-label", `Download${which}: ${job.prompt}`);
    if (which) link.querySelector("span").textContent = which.trim();
    downloads.append(link);
    return { file, button, link };
  });
  const sight = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    sight.disconnect();
    for (const view of views) load(job, view, urls);
  }, { rootMargin: "400px" });
  sight.observe(media);
}

async function load(job, { file, button, link }, urls) {
  try {
    const url = await address(file.path);
    urls.push(url);
    link.href = url;
    link.removeAttribute("aria-disabled");
    if (file.other) {
      const player = make("audio", { src: url, controls: true });
      button.replaceWith(file.other === "audio" ? player : make("p", { textContent: file.name }));
      return;
    }
    button.append(...(file.video ? [moving(url), fresh("play-sign")] : [make("img", { src: url, alt: "" })]));
    button.addEventListener("click", () => enlarge(job, file, url));
  } catch (error) {
    button.replaceWith(make("p", { className: "bad", textContent: error.message }));
  }
}

// A thumbnail that plays while the pointer is on it.
function moving(url) {
  // Some browsers show no frame before they are told which.
  const video = make("video", { src: `${url}#t=0.001`, muted: true, loop: true, playsInline: true, preload: "metadata" });
  video.addEventListener("pointerenter", () => video.play().catch(() => {}));
  video.addEventListener("pointerleave", () => video.pause());
  return video;
}
