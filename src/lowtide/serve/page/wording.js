// Numbers and states in words, as people read them.

export const gigabytes = (bytes) => `${(bytes / 1e9).toFixed(2)} GB`;

export function duration(seconds) {
  if (seconds < 1) return "less than a second";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export const count = (number, name) => `${number} ${name}${number === 1 ? "" : "s"}`;

export function settings({ call, seeds, model }) {
  const parts = [
    call.width && `${call.width} × ${call.height}`,
    call.num_frames && count(call.num_frames, "frame"),
    call.num_inference_steps && count(call.num_inference_steps, "step"),
    call.guidance_scale !== undefined && `guidance ${call.guidance_scale}`,
    call.sampler,
    `${seeds.length > 1 ? "seeds" : "seed"} ${seeds.join(", ")}`,
    model,
  ];
  return parts.filter(Boolean).join(" · ");
}

function progress(job) {
  const pictures = job.pictures ?? job.seeds.length;
  const steps = job.steps ?? job.call.num_inference_steps;
  const step = job.step ?? 0;
  const parts = [];
  if (pictures > 1) parts.push(`Picture ${(job.picture ?? 0) + 1} of ${pictures}`);
  if (!step && !job.picture) parts.push("Getting ready");
  else if (step === steps) parts.push("Steps done, finishing");
  else parts.push(`${parts.length ? "step" : "Step"} ${step}${steps ? ` of ${steps}` : ""}`);
  if (step && job.seconds_left != null) parts.push(`${duration(job.seconds_left)} left`);
  return parts.join(" · ");
}

function taken(job) {
  const seconds = duration((job.ended ?? 0) - (job.started ?? 0));
  return `Took ${gigabytes(job.measured || job.plan.peak)} and ${seconds}`;
}

function wait({ jobs, seconds } = { jobs: 0, seconds: 0 }) {
  if (!jobs) return "Waits for its turn";
  return `Waits: ${count(jobs, "job")} before it, about ${duration(seconds)}`;
}

/** What is said of a job; `before` is what runs before it. */
export function state(job, before) {
  if (job.state === "queued") return wait(before);
  if (job.state === "running") return progress(job);
  if (job.state === "done") return taken(job);
  if (job.state === "failed") return job.error?.detail ?? "It failed";
  return "Cancelled";
}

export function filename({ call, seeds }, place, suffix) {
  const words = call.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-|-$/g, "");
  return `${words || "lowtide"}-${seeds[place] ?? place}.${suffix}`;
}
