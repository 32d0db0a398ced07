// The server's endpoints: errors as sentences, answers as they are written.

const KEY = "groundup.key";

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status; // 0: the server does not answer
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

async function call(path, body, signal) {
  const headers = body === undefined ? {} : { "content-type": "application/json" };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.");
  }
  if (response.ok) return response;
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not JSON: the status has to do
  }
  throw new ServerError(message, response.status);
}

export const get = async (path) => (await call(path)).json();
export const post = async (path, body) => (await call(path, body)).json();

/** The events of a stream, one parsed object each. A stream that ends before its end is an error. */
export async function* events(path, body, signal) {
  const response = await call(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    while (true) {
      const part = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        return { done: true };
      });
      if (part.done) throw new ServerError("The connection broke while the answer was written.");
      held += part.value;
      const lines = held.split(/\r?\n/);
      held = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const value = JSON.parse(data);
        if (value.error) throw new ServerError(value.error.message, 500);
        yield value;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A token as the page keeps it: with its alternatives, and what a draft had guessed, rightly or wrongly. */
const plain = ({ id, bytes = [], token, logprob }) => ({ id, bytes, text: token, logprob });
const token = (one) => ({
  ...plain(one),
  accepted: one.accepted ?? false,
  rejected: (one.rejected ?? []).map(plain),
  top: (one.top_logprobs ?? []).map(plain),
});

/** An answer: {text, tokens, finish, usage} for each event. */
export async function* chat(body, signal) {
  for await (const event of events("v1/chat/completions", { ...body, logprobs: true, top_logprobs: 10 }, signal)) {
    const choice = event.choices?.[0];
    yield {
      text: choice?.delta?.content ?? "",
      tokens: (choice?.logprobs?.content ?? []).map(token),
      finish: choice?.finish_reason,
      usage: event.usage,
    };
  }
}

/** The text of tokens; what is no whole character yet is left out at the end. */
export function textOf(tokens) {
  const bytes = new Uint8Array(tokens.flatMap((one) => one.bytes));
  return new TextDecoder().decode(bytes, { stream: true });
}

export function fromBase64(text, Type = Uint8Array) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Type(bytes.buffer);
}
