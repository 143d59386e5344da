// The page of `lowtide serve`: it asks the server what a run would take, has it run, and shows what came of it.

const form = document.querySelector("#ask");
const list = document.querySelector("#jobs");
const SIDES = [128, 256, 512, 768];
const shown = new Map();

const field = (name) => form.elements[name];
const decimal = (bytes) => `${(bytes / 1e9).toFixed(2)} GB`;

function duration(seconds) {
  if (seconds < 1) return "less than a second";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function headers(more = {}) {
  const key = field("key").value;
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function ask(method, path, content) {
  const body = content === undefined ? undefined : JSON.stringify(content);
  const answer = await fetch(path, { method, body, headers: headers(body ? { "Content-Type": "application/json" } : {}) });
  const said = answer.status === 204 ? null : await answer.json();
  if (answer.status === 401) document.querySelector("#keyed").hidden = false;
  if (!answer.ok) throw Object.assign(new Error(said.detail), { problem: said });
  return said;
}

function asked() {
  const content = {};
  for (const name of ["prompt", "negative_prompt", "model"]) if (field(name).value) content[name] = field(name).value;
  for (const name of ["width", "height", "num_inference_steps", "guidance_scale", "seed", "n"]) {
    if (field(name).value !== "") content[name] = Number(field(name).value);
  }
  return content;
}

// ---- what it would take, before the button is pressed

let planning = 0;

async function plan() {
  const mine = ++planning;
  const told = document.querySelector("#plan");
  const request = { ...asked(), prompt: field("prompt").value || "a picture" };
  delete request.seed;
  try {
    const answer = await ask("POST", "plan", request);
    if (mine !== planning) return;
    told.classList.toggle("wrong", !answer.fits);
    told.textContent = answer.fits
      ? `Takes ${decimal(answer.peak)} and about ${duration(answer.seconds * (request.n ?? 1))}; ${answer.exactness}.`
      : `Does not fit: at least ${decimal(answer.minimum.ram ?? answer.minimum.vram)} would be needed. Choose a smaller size.`;
    form.querySelector("[type=submit]").disabled = !answer.fits;
  } catch (error) {
    if (mine !== planning) return;
    told.classList.add("wrong");
    told.textContent = error.message;
    form.querySelector("[type=submit]").disabled = error.problem?.status === 422;
  }
}

let soon;
form.addEventListener("input", () => {
  markPreset();
  clearTimeout(soon);
  soon = setTimeout(plan, 300);
});

function markPreset() {
  for (const button of document.querySelectorAll("#presets button")) {
    const same = [field("width").value, field("height").value].every((side) => side === button.dataset.side);
    button.setAttribute("aria-pressed", String(same));
  }
}

for (const side of SIDES) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.side = side;
  button.textContent = `${side} × ${side}`;
  button.addEventListener("click", () => {
    field("width").value = field("height").value = side;
    markPreset();
    plan();
  });
  document.querySelector("#presets").append(button);
}

// ---- jobs

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  await submit(asked());
});

async function submit(request) {
  const told = document.querySelector("#plan");
  try {
    show(await ask("POST", "jobs", request), true);
    told.classList.remove("wrong");
  } catch (error) {
    told.classList.add("wrong");
    told.textContent = error.message;
  }
}

function show(job, first) {
  const item = document.querySelector("#job").content.firstElementChild.cloneNode(true);
  shown.set(job.id, item);
  item.querySelector(".said").textContent = job.call.prompt;
  item.addEventListener("click", (event) => {
    const action = event.target.dataset.do;
    if (action && actions[action]) actions[action](job, item);
  });
  if (first) list.prepend(item);
  else list.append(item);
  document.querySelector("#none").hidden = true;
  update(job, item);
  if (!ended(job.state)) follow(job, item);
}

const ended = (state) => ["done", "failed", "cancelled"].includes(state);

function settings(job) {
  const size = job.call.width ? `${job.call.width}×${job.call.height}, ` : "";
  const steps = job.call.num_inference_steps ? `${job.call.num_inference_steps} steps, ` : "";
  return `${size}${steps}seed ${job.seeds.join(", ")}`;
}

function update(job, item) {
  const bar = item.querySelector("progress");
  const steps = job.call.num_inference_steps;
  bar.hidden = ended(job.state);
  if (job.state === "running" && steps) {
    bar.value = ((job.picture ?? 0) + (job.step ?? 0) / steps) / job.seeds.length;
  } else if (job.state === "running") bar.removeAttribute("value");
  const words = {
    queued: "Waits for its turn.",
    running: `Step ${job.step ?? 0}${steps ? ` of ${steps}` : ""}; planned for ${decimal(job.plan.peak)}.`,
    done: `${settings(job)}. Took ${decimal(job.measured ?? job.plan.peak)} in ${duration((job.ended ?? 0) - (job.started ?? 0))}.`,
    failed: job.error?.detail ?? "It failed.",
    cancelled: "Cancelled.",
  };
  const told = item.querySelector(".told");
  told.textContent = words[job.state];
  told.classList.toggle("wrong", job.state === "failed");
  item.querySelector("[data-do=cancel]").hidden = ended(job.state);
  item.querySelector("[data-do=delete]").hidden = !ended(job.state);
  item.querySelector("[data-do=download]").hidden = job.state !== "done";
  if (job.state === "done" && !item.querySelector(".pictures").children.length) pictures(job, item);
}

async function pictures(job, item) {
  for (const [place, path] of job.content.entries()) {
    const answer = await fetch(path.slice(1), { headers: headers() });
    const content = await answer.blob();
    const isClip = content.type.startsWith("video/");
    const picture = document.createElement(isClip ? "video" : "img");
    picture.src = URL.createObjectURL(content);
    if (isClip) picture.controls = true;
    else picture.alt = `${job.call.prompt}, seed ${job.seeds[place]}`;
    item.querySelector(".pictures").append(picture);
    if (place === 0) {
      const link = item.querySelector("[data-do=download]");
      link.href = picture.src;
      link.download = `${job.seeds[0]}.${isClip ? "mp4" : "png"}`;
    }
  }
}

async function follow(job, item) {
  const answer = await fetch(`jobs/${job.id}/events`, { headers: headers() });
  const lines = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { value, done } = await lines.read();
    if (done) break;
    const parts = (left + value).split(/\r?\n/);
    left = parts.pop();
    for (const line of parts.filter((line) => line.startsWith("data:"))) {
      Object.assign(job, JSON.parse(line.slice(5)));
      update({ ...job, state: ended(job.state) ? "running" : job.state }, item);
    }
  }
  Object.assign(job, await ask("GET", `jobs/${job.id}`));
  update(job, item);
}

const actions = {
  cancel: (job) => ask("POST", `jobs/${job.id}/cancel`),
  again: (job) => fill({ ...job.call, seed: job.seeds[0], n: job.seeds.length, model: job.model }),
  vary: (job) => submit({ ...job.call, model: job.model, n: job.seeds.length }),
  delete: async (job, item) => {
    await ask("DELETE", `jobs/${job.id}`);
    item.remove();
    document.querySelector("#none").hidden = list.children.length > 0;
  },
};

function fill(call) {
  for (const element of form.elements) if (element.name && element.name in call) element.value = call[element.name];
  markPreset();
  plan();
  field("prompt").focus();
}

// ---- the beginning

async function begin() {
  const server = document.querySelector("#server");
  try {
    await ask("GET", "readyz");
  } catch (error) {
    server.textContent = error.message;
    setTimeout(begin, 500);
    return;
  }
  try {
    const models = (await ask("GET", "v1/models")).data;
    for (const { id } of models) field("model").add(new Option(id, id));
    server.textContent = `${models.map(({ id }) => id).join(", ")}; ready.`;
    for (const job of (await ask("GET", "jobs")).jobs) if (!shown.has(job.id)) show(job, false);
    await plan();
  } catch (error) {
    server.textContent = error.message;
  }
}

field("key").addEventListener("change", begin);
begin();
