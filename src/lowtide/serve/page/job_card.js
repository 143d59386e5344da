// A job in the gallery: how far it is, what came of it, and what can be done with it.

import { MemoryPlot } from "./memory_plot.js";
import { openPicture } from "./picture_dialog.js";
import { send } from "./server_calls.js";
import { count, filename, gigabytes, settings, state } from "./wording.js";

const template = document.querySelector("#job").content.firstElementChild;
const near = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((entry) => entry.isIntersecting)) {
      near.unobserve(entry.target);
      entry.target.dispatchEvent(new Event("near"));
    }
  },
  { rootMargin: "400px" },
);

export const hasEnded = (job) => ["done", "failed", "cancelled"].includes(job.state);

export class JobCard {
  constructor(job, actions) {
    this.job = job;
    this.item = template.cloneNode(true);
    this.plot = new MemoryPlot(this.part(".memory"));
    this.part(".prompt").textContent = job.call.prompt;
    this.item.setAttribute("aria-label", job.call.prompt);
    this.item.addEventListener("near", () => this.fetchPictures());
    this.item.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      const action = button?.dataset.do;
      if (action === "delete" && !this.isSure(button)) return;
      if (action) actions[action](this.job, this);
    });
    this.part("[data-do=delete]").addEventListener("blur", (event) => this.ask(event.target, false));
    this.update({});
  }

  part(selector) {
    return this.item.querySelector(selector);
  }

  /** Whether a button was pressed a second time: what is deleted does not come back. */
  isSure(button) {
    const sure = button.dataset.asked === "true";
    this.ask(button, !sure);
    return sure;
  }

  ask(button, asked) {
    button.dataset.asked = asked;
    button.textContent = asked ? "Really delete?" : "Delete";
  }

  update(changes, before) {
    const job = Object.assign(this.job, changes);
    const ended = hasEnded(job);
    const kind = job.state === "done" && job.files.some((name) => name.endsWith(".mp4")) ? "clip" : "picture";
    this.item.dataset.state = job.state;
    this.part(".settings").textContent = settings(job);
    this.part(".state").textContent = state(job, before);
    for (const name of ["cancel", "delete", "again", "vary"]) {
      this.part(`[data-do=${name}]`).hidden = name === "cancel" ? ended : !ended;
    }
    this.part("progress").hidden = job.state !== "running";
    if (job.state === "running") this.showProgress(job);
    else this.part(".preview").hidden = this.part(".memory").hidden = true;
    if (job.state === "done" && !this.part(".pictures").children.length) this.makeRoom(job, kind);
  }

  showProgress(job) {
    const steps = job.steps ?? job.call.num_inference_steps;
    const bar = this.part("progress");
    if (steps) bar.value = ((job.picture ?? 0) + (job.step ?? 0) / steps) / (job.pictures ?? job.seeds.length);
    else bar.removeAttribute("value");
  }

  /** What an event tells: the state, and memory in use and a preview beside it. */
  hear({ memory, preview, ...changes }) {
    this.update(changes);
    if (changes.state !== "running") return;
    if (memory?.used) {
      this.plot.add(memory);
      const budget = memory.budget == null ? "in use" : `of ${gigabytes(memory.budget)} in use`;
      this.part(".memory figcaption").textContent = `${gigabytes(memory.used)} ${budget}`;
    }
    if (preview) {
      this.part(".preview").src = `data:image/png;base64,${preview}`;
      this.part(".preview").hidden = false;
    }
  }

  /** Frames for the pictures, which are fetched when they come near. */
  makeRoom(job, kind) {
    for (const place of job.content.keys()) {
      const figure = document.querySelector(`#${kind}`).content.firstElementChild.cloneNode(true);
      const media = figure.querySelector("img, video");
      if (job.call.width) Object.assign(media, { width: job.call.width, height: job.call.height });
      if (kind === "picture") media.alt = `${job.call.prompt}, seed ${job.seeds[place]}`;
      else media.setAttribute("aria-label", `${job.call.prompt}, seed ${job.seeds[place]}`);
      figure.querySelector(".seed").textContent = `Seed ${job.seeds[place]}`;
      figure.querySelector(".open")?.addEventListener("click", () => openPicture(media));
      this.part(".pictures").append(figure);
    }
    this.part(".pictures").setAttribute("aria-label", count(job.content.length, kind));
    near.observe(this.item);
  }

  async fetchPictures() {
    for (const [place, path] of this.job.content.entries()) {
      const figure = this.part(".pictures").children[place];
      try {
        const content = await (await send("GET", path.slice(1))).blob();
        this.fill(figure, content, place);
      } catch (error) {
        figure.querySelector(".seed").textContent = error.message;
      }
    }
  }

  fill(figure, content, place) {
    const media = figure.querySelector("img, video");
    const link = figure.querySelector("a");
    media.src = link.href = URL.createObjectURL(content);
    media.dataset.filename = link.download = filename(this.job, place, content.type.split("/")[1]);
    link.setAttribute("aria-label", `Download ${link.download}`);
    link.hidden = false;
  }

  remove() {
    near.unobserve(this.item);
    for (const media of this.item.querySelectorAll("img, video")) URL.revokeObjectURL(media.src);
    this.item.remove();
  }
}
