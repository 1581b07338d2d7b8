// One result, large.

import { lineOf } from "./jobs.js";

const $ = (id) => document.getElementById(id);
const viewer = $("viewer");

/** Show `file` of a job; `url` is where its content is. */
export function enlarge(job, file, url) {
  const media = document.createElement(file.video ? "video" : "img");
  if (file.video) Object.assign(media, { controls: true, loop: true, autoplay: true, playsInline: true });
  else media.alt = job.prompt;
  media.src = url;
  $("viewer-media").replaceChildren(media);
  $("viewer-text").textContent = job.prompt;
  $("viewer-line").textContent = lineOf(job);
  $("viewer-notes").textContent = job.notes.join(" ");
  $("viewer-notes").hidden = job.notes.length === 0;
  Object.assign($("viewer-download"), { href: url, download: file.name });
  viewer.showModal();
}

viewer.addEventListener("close", () => $("viewer-media").replaceChildren());
viewer.addEventListener("click", (event) => {
  if (event.target === viewer) viewer.close(); // the ground around it
});
