// Requests to the server, with the key that was given in this tab.

const KEY = "lowtide-key"; // forgotten when the tab is closed

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const keepKey = (given) => sessionStorage.setItem(KEY, given);

/** The server refuses: `status` and `problem` are its answer. */
export class Refusal extends Error {
  constructor(status, problem) {
    super(inWords(status, problem));
    Object.assign(this, { status, problem });
  }
}

function inWords(status, problem) {
  if (status === 401) return key() ? "This key is not known here." : "A key is asked for here.";
  return (problem.detail ?? "The server refuses this.").replace(/^the body: Value error, /, "");
}

export async function send(method, path, body, more = {}) {
  const headers = { ...more };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  if (body && !(body instanceof FormData)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  const answer = await fetch(path, { method, body, headers }).catch(() => {
    throw new Error("The server does not answer.");
  });
  if (!answer.ok) throw new Refusal(answer.status, await answer.json().catch(() => ({})));
  return answer;
}

export async function ask(method, path, body, more) {
  const answer = await send(method, path, body, more);
  return answer.status === 204 ? null : answer.json();
}

/** A request as a body: a form where pictures come with it, lists of files by their names. */
export function withPictures(request, pictures) {
  if (!Object.keys(pictures).length) return request;
  const form = new FormData();
  for (const [name, value] of Object.entries(request)) form.append(name, value);
  for (const [name, files] of Object.entries(pictures)) for (const file of files) form.append(name, file);
  return form;
}

/** The pictures that came with a job, as files. */
export async function picturesOf({ given }) {
  const fetched = async (name, address) => {
    const content = await (await send("GET", address.slice(1))).blob();
    return new File([content], `${name}.png`, { type: "image/png" });
  };
  const all = Object.entries(given ?? {}).map(async ([name, addresses]) => [
    name,
    await Promise.all(addresses.map((address) => fetched(name, address))),
  ]);
  return Object.fromEntries(await Promise.all(all));
}

/** What the server tells of a job until it ends, or until the connection does. */
export async function* events(job) {
  const answer = await send("GET", `jobs/${job}/events`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield JSON.parse(line.slice(5));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
