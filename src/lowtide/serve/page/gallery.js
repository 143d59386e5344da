// The jobs of the server as cards, the newest first; those of other tabs too.

import { JobCard, hasEnded } from "./job_card.js";
import { ask, events } from "./server_calls.js";
import { state } from "./wording.js";

const list = document.querySelector("#jobs");
const none = document.querySelector("#none");
const MOST = 100;
const FOLLOWED = 3; // browsers hold few connections to a server
const cards = new Map();
let listing = 0;
const followed = new Set();
let hooks;

/** `hooks`: `again` with a job's settings, `vary` with a job, `say` of what has happened. */
export function begin(given) {
  hooks = given;
}

export async function refresh() {
  const mine = ++listing;
  const { jobs } = await ask("GET", `jobs?most=${MOST}`);
  if (mine !== listing) return; // a later answer is newer than this one
  const ids = new Set(jobs.map(({ id }) => id));
  const oldest = jobs.length < MOST ? 0 : jobs.at(-1).created;
  for (const { job } of [...cards.values()]) if (!ids.has(job.id) && job.created > oldest) drop(job.id);
  for (const job of jobs) put(job);
  settle();
}

export function add(job) {
  listing += 1;
  const card = put(job);
  settle();
  return card.item;
}

function put(job) {
  const card = cards.get(job.id);
  if (!card) return place(new JobCard(job, actions));
  const before = card.job.state;
  if (before !== job.state && !hasEnded(card.job)) card.update(job);
  if (before !== card.job.state && hasEnded(card.job)) hooks.say(`${state(card.job)}: ${card.job.call.prompt}`);
  return card;
}

function place(card) {
  const newer = [...cards.values()].filter(({ job }) => job.created > card.job.created);
  cards.set(card.job.id, card);
  const after = newer.sort((one, other) => one.job.created - other.job.created)[0];
  if (after) after.item.after(card.item);
  else list.prepend(card.item);
  return card;
}

function drop(id) {
  cards.get(id).remove();
  cards.delete(id);
}

/** After a change: what waits says for what, and the job that runs is followed. */
function settle() {
  none.hidden = cards.size > 0;
  const jobs = [...cards.values()].map(({ job }) => job).sort((one, other) => one.created - other.created);
  const running = jobs.filter((job) => job.state === "running");
  const waiting = jobs.filter((job) => job.state === "queued");
  const before = { jobs: running.length, seconds: Math.max(0, ...running.map(secondsLeft)) };
  for (const job of waiting) {
    cards.get(job.id).update({}, before);
    before.jobs += 1;
    before.seconds += secondsLeft(job);
  }
  for (const { id } of [...running.slice(0, FOLLOWED), ...waiting.slice(0, 1)]) if (!followed.has(id)) follow(id);
}

const secondsLeft = (job) => job.seconds_left ?? job.plan.seconds * job.seeds.length;

/** Hear of a job until it ends. */
async function follow(id) {
  followed.add(id);
  try {
    for await (const event of events(id)) {
      if (hasEnded(event) || !cards.has(id)) break;
      cards.get(id).hear(event);
    }
    await refresh();
  } catch {
    return; // the page's beat finds the server again, and follows anew
  } finally {
    followed.delete(id);
  }
  settle();
}

async function act(card, change) {
  try {
    await change();
  } catch (error) {
    card.part(".state").textContent = error.message;
  }
}

const actions = {
  again: (job, card) => act(card, () => hooks.again(job)),
  vary: (job, card) => act(card, () => hooks.vary(job)),
  cancel: (job, card) =>
    act(card, async () => {
      listing += 1;
      put(await ask("POST", `jobs/${job.id}/cancel`));
      settle();
    }),
  delete: (job, card) =>
    act(card, async () => {
      await ask("DELETE", `jobs/${job.id}`);
      listing += 1;
      const next = card.item.nextElementSibling ?? card.item.previousElementSibling;
      drop(job.id);
      settle();
      hooks.say("Deleted");
      (next?.querySelector("button:not([hidden])") ?? document.querySelector("[name=prompt]")).focus();
    }),
};
