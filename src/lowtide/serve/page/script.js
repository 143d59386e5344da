// The page of `lowtide serve`: it asks the server what a run would take, has it run, and shows what came of it.

import * as gallery from "./gallery.js";
import * as requestForm from "./request_form.js";
import { ask, keepKey, picturesOf, withPictures } from "./server_calls.js";
import { gigabytes } from "./wording.js";

const OFTEN = 500;
const SELDOM = 3000;
const status = document.querySelector("#server");
const keyForm = document.querySelector("#keyed");
let isKnown = false;
let next;

function say(words) {
  document.querySelector("#announced").textContent = words;
}

/** Ask how the server is, again and again: it may be starting, gone, or back; others may have asked it for something. */
async function beat() {
  clearTimeout(next);
  let pause = SELDOM;
  try {
    const starting = await whetherStarting();
    if (!document.hidden) await gallery.refresh();
    if (starting) pause = OFTEN;
    else if (!isKnown) await learn();
    tell(starting || isKnown);
    keyForm.hidden = true;
  } catch (error) {
    isKnown = false;
    pause = error.status === 401 ? 0 : OFTEN;
    keyForm.hidden = error.status !== 401;
    tell(error.status === 401 ? error.message : `${error.message} Trying again …`, true);
  }
  clearTimeout(next);
  if (pause) next = setTimeout(beat, pause);
}

async function whetherStarting() {
  try {
    await ask("GET", "readyz");
    return "";
  } catch (error) {
    if (error.status !== 503) throw error;
    return error.message;
  }
}

async function learn() {
  const capabilities = await ask("GET", "capabilities");
  const { budget, models } = capabilities;
  await requestForm.know(capabilities);
  const parts = [models.map(({ name }) => name).join(", ")];
  if (budget.vram != null) parts.push(`${gigabytes(budget.vram)} of the device's memory for jobs`);
  if (budget.ram != null) parts.push(`${gigabytes(budget.ram)} of memory for jobs`);
  isKnown = parts.join(" · ");
}

function tell(words, isWrong = false) {
  if (status.textContent !== words) status.textContent = words;
  status.classList.toggle("wrong", isWrong);
}

async function submit(request, pictures) {
  const item = gallery.add(await ask("POST", "jobs", withPictures(request, pictures)));
  item.scrollIntoView({ block: "nearest" });
  say("Taken");
}

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(keyForm.elements.key.value);
  beat();
});
document.addEventListener("visibilitychange", beat);
gallery.begin({
  say,
  again: async (job) => requestForm.fill(job, await picturesOf(job)),
  vary: async (job) => submit({ ...job.call, model: job.model, n: job.seeds.length }, await picturesOf(job)),
});
requestForm.begin(submit);
beat();
