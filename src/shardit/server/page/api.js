// Everything that goes over the network. Addresses are relative, so that the page also works behind a proxy's prefix.

const STORED = "shardit-api-key";
const TIMEOUT_MS = 20_000; // for answers that need no upload and no work

let key = sessionStorage.getItem(STORED);
let tellLocked = () => {};

/** What went wrong, in one line. `field` is the parameter that it concerns, `status` 0 where no answer came. */
export class ServerError extends Error {
  constructor(message, status, field = null) {
    super(message);
    this.status = status;
    this.field = field;
  }
}

/** `listener(message)` is called whenever the server wants an API key, or another one. */
export function whenLocked(listener) {
  tellLocked = listener;
}

export const hasKey = () => key !== null;

/** Use this key from now on, in this tab; null forgets it. */
export function useKey(given) {
  key = given;
  if (key === null) sessionStorage.removeItem(STORED);
  else sessionStorage.setItem(STORED, key);
}

async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key !== null && !/^[\x21-\x7e]+$/.test(key)) throw locked("An API key has only letters, digits and signs of ASCII.");
  if (key !== null) headers.set("Authorization", `Bearer ${key}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.", 0);
  }
  if (answer.ok) return answer;
  const failure = await failureOf(answer);
  throw answer.status === 401 ? locked(failure.message) : failure;
}

function locked(message) {
  tellLocked(message);
  return new ServerError(message, 401);
}

async function failureOf(answer) {
  try {
    const { error } = await answer.json();
    return new ServerError(error.message, answer.status, error.param ?? null);
  } catch {
    return new ServerError(`The server answered ${answer.status} ${answer.statusText}.`, answer.status);
  }
}

/** The JSON that `path` answers with. */
export async function json(path, { method = "GET", signal = AbortSignal.timeout(TIMEOUT_MS), ...options } = {}) {
  const answer = await request(path, { method, signal, ...options });
  try {
    // Seeds may have more digits than a number of JavaScript holds; those stay text.
    return JSON.parse((await answer.text()).replace(/"seed":\s*(\d{16,})/g, '"seed":"$1"'));
  } catch (error) {
    throw new ServerError(`The server's answer cannot be read (${error.message}).`, answer.status);
  }
}

/** An address for `src` and `href`: the path itself, or a blob where only fetch can send the key. Release it. */
export async function address(path) {
  if (key === null) return path;
  const answer = await request(path);
  return URL.createObjectURL(await answer.blob());
}

export function release(url) {
  if (url.startsWith("blob:")) URL.revokeObjectURL(url);
}

/** Server-sent events of `path`: {name, data}. EventSource cannot send a key, fetch can. */
export async function* events(path, signal) {
  const answer = await request(path, { signal, headers: { Accept: "text/event-stream" } });
  for await (const { name, data } of eventsOf(answer)) yield { name, data: JSON.parse(data) };
}

/** Chunks of a text that is made for `body`, until its end. */
export async function* chunks(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const answer = await request(path, { method: "POST", body: JSON.stringify(body), signal, headers });
  for await (const { data } of eventsOf(answer)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, 500, chunk.error.param ?? null);
    yield chunk;
  }
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { name: "message", data: "" };
      for (const line of block.split(/\r?\n/)) {
        if (line.startsWith("event:")) event.name = line.slice(6).trim();
        if (line.startsWith("data:")) event.data += line.slice(5).trim();
      }
      if (event.data) yield event;
    }
  }
}
