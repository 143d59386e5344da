// The form: what is asked for, and what it will take, before the button is pressed.

import { ask, withPictures } from "./server_calls.js";
import { duration, gigabytes } from "./wording.js";

const form = document.querySelector("#ask");
const told = document.querySelector("#plan");
const bar = document.querySelector("#share");
const smaller = document.querySelector("#smaller");
const presets = document.querySelector("#presets");
const button = form.querySelector("[type=submit]");
const TEXTS = ["prompt", "negative_prompt", "model", "sampler"];
const NUMBERS = ["width", "height", "num_frames", "num_inference_steps", "guidance_scale", "strength", "seed", "n"];
const USUAL = ["negative_prompt", "num_inference_steps", "guidance_scale", "sampler"];
const SELDOM = ["image", "num_frames", "strength"]; // not shown before the model is known
let capabilities = { budget: {}, models: [] };
let planning = 0;
let soon;
let isSending = false;
let isImpossible = false;

const field = (name) => form.elements[name];
const model = () => capabilities.models.find(({ name }) => name === field("model").value) ?? {};
const budget = () => capabilities.budget.vram ?? capabilities.budget.ram ?? null;
const multiple = (side) => Math.max(8, Math.round(side / 8) * 8);

/** What is asked for; what is left empty is as the model has it. */
export function asked() {
  const content = {};
  const isThere = (name) => field(name).value !== "" && !field(name).closest("[hidden]");
  for (const name of TEXTS.filter(isThere)) content[name] = field(name).value;
  for (const name of NUMBERS.filter(isThere)) content[name] = Number(field(name).value);
  if (("width" in content) !== ("height" in content)) Object.assign(content, { ...model().size, ...content });
  return content;
}

/** The pictures to start from, by the names of their fields, where the model takes one and it was chosen. */
const pictures = () => (takesPicture() && field("image").files.length ? { image: [...field("image").files] } : {});
const takesPicture = () => model().arguments?.includes("image");

/** Take over what the server can do; what was chosen stays where it is still possible. */
export function know(given) {
  capabilities = given;
  const chosen = field("model").value;
  field("model").replaceChildren(...given.models.map(({ name }) => new Option(name, name)));
  if (given.models.some(({ name }) => name === chosen)) field("model").value = chosen;
  field("model").closest("label").hidden = given.models.length < 2;
  const { prompt, pictures, steps, frames } = given.limits ?? {};
  if (prompt) field("prompt").maxLength = field("negative_prompt").maxLength = prompt;
  for (const [name, most] of [["n", pictures], ["num_inference_steps", steps], ["num_frames", frames]]) {
    if (most) field(name).max = most;
  }
  suit();
  return plan();
}

/** Show what the chosen model takes, with what it has by itself. */
function suit() {
  const { arguments: names, defaults = {}, size, samplers = [], makes } = model();
  for (const name of [...USUAL, ...SELDOM]) {
    const isTaken = names ? names.includes(name) : !SELDOM.includes(name);
    field(name).closest(".optional").hidden = name === "sampler" ? !samplers.length : !isTaken;
  }
  for (const name of NUMBERS) if (name !== "n" && name !== "seed") field(name).placeholder = defaults[name] ?? "";
  if (size) for (const side of ["width", "height"]) field(side).placeholder = size[side];
  const own = field("sampler").value;
  field("sampler").replaceChildren(new Option("as the model has it", ""), ...samplers.map((name) => new Option(name)));
  field("sampler").value = samplers.includes(own) ? own : "";
  form.querySelector("#many").textContent = makes === "clips" ? "Clips" : "Pictures";
  offerSizes(size ?? { width: 512, height: 512 });
}

function offerSizes({ width, height }) {
  const isSquare = width === height;
  const sizes = [
    [width, height],
    [width / 2, height / 2],
    isSquare ? [width * 0.75, height] : [height, width],
    ...(isSquare ? [[width, height * 0.75]] : []),
    [width * 1.5, height * 1.5],
    [width * 2, height * 2],
  ];
  const made = sizes.map((sides) => {
    const [across, down] = sides.map(multiple);
    const preset = document.createElement("button");
    Object.assign(preset, { type: "button", textContent: `${across} × ${down}` });
    preset.addEventListener("click", () => takeSize(across, down));
    return preset;
  });
  presets.replaceChildren(...made);
  markPreset();
}

function takeSize(width, height) {
  Object.assign(field("width"), { value: width });
  Object.assign(field("height"), { value: height });
  markPreset();
  plan();
}

function markPreset() {
  const sides = ["width", "height"].map((side) => field(side).value || field(side).placeholder);
  for (const preset of presets.children) preset.setAttribute("aria-pressed", preset.textContent === sides.join(" × "));
}

// ---- what it would take

export async function plan() {
  const mine = ++planning;
  const given = pictures();
  if (takesPicture() && !given.image) return tell("What it takes depends on the picture to start from: choose one.");
  const request = { ...asked(), prompt: field("prompt").value || "a picture" };
  delete request.seed;
  try {
    const answer = await ask("POST", "plan", withPictures(request, given));
    if (mine !== planning) return;
    if (answer.fits) tellPlan(answer, request);
    else tellRefusal(answer);
  } catch (error) {
    if (mine === planning) refuse(error.message, error.status === 422);
  }
}

function tellPlan(answer, { n = 1 }) {
  const most = budget() === null ? "" : ` of ${gigabytes(budget())}`;
  const same = answer.exactness === "equal bits" ? "the picture of a plain run, bit for bit" : answer.exactness;
  tell(`Takes ${gigabytes(answer.peak)}${most} and about ${duration(answer.seconds * n)}; ${same}.`);
  showShare(answer.peak);
}

function tellRefusal({ minimum, possible }) {
  const least = minimum.vram ?? minimum.ram;
  const most = budget() === null ? "" : `, and the budget is ${gigabytes(budget())}`;
  refuse(`Does not fit: it needs at least ${gigabytes(least)}${most}. Choose a smaller size.`, true);
  showShare(least);
  if (!possible) return;
  smaller.textContent = `Take ${possible.width} × ${possible.height}, which fits`;
  smaller.onclick = () => takeSize(possible.width, possible.height);
  smaller.hidden = false;
}

function tell(words) {
  if (told.textContent !== words) told.textContent = words;
  told.classList.remove("wrong");
  smaller.hidden = bar.hidden = true;
  allow(true);
}

function refuse(words, isFinal) {
  tell(words);
  told.classList.add("wrong");
  allow(!isFinal);
}

function allow(isPossible) {
  isImpossible = !isPossible;
  button.disabled = isSending || isImpossible;
}

function showShare(bytes) {
  bar.hidden = budget() === null;
  bar.classList.toggle("over", bytes > budget());
  bar.firstElementChild.style.width = `${Math.min(100, (100 * bytes) / budget())}%`;
}

// ---- what people do

/** Put the settings of a job in the form, and the pictures that came with it. */
export function fill({ call, seeds, model: name }, { image = [] }) {
  const values = { ...call, model: name, seed: seeds[0], n: seeds.length };
  for (const each of [...TEXTS, ...NUMBERS]) field(each).value = values[each] ?? "";
  suit();
  field("sampler").value = call.sampler ?? "";
  const files = new DataTransfer();
  for (const picture of image) files.items.add(picture);
  field("image").files = files.files;
  field("negative_prompt").closest("details").open = Boolean(call.negative_prompt);
  plan();
  field("prompt").focus();
}

/** Have `submit` take what is asked for; what goes wrong is told where the plan is. */
export function begin(submit) {
  form.addEventListener("input", (event) => {
    if (event.target === field("model")) suit();
    markPreset();
    clearTimeout(soon);
    soon = setTimeout(plan, 300);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !button.disabled) form.requestSubmit();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    isSending = true;
    allow(!isImpossible);
    const error = await submit(asked(), pictures()).catch((error) => error);
    isSending = false;
    allow(!isImpossible);
    if (error) refuse(error.message, error.status === 422);
  });
}
