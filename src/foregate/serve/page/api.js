// Requests to the server this page came from. Errors are Errors whose message a person can read.

const KEY = "foregate-api-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function rememberKey(key) {
  sessionStorage.setItem(KEY, key);
}

export async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw new ApiError(response.status, await readError(response));
  return response;
}

async function readError(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}`;
  }
}

// The text of a streamed chat reply, piece by piece; returns why it ended.
export async function* streamChat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  let reason = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return reason;
    const item = JSON.parse(data);
    if (item.error) throw new ApiError(500, item.error.message);
    for (const choice of item.choices) {
      if (choice.delta.content) yield choice.delta.content;
      reason = choice.finish_reason ?? reason;
    }
  }
  throw new ApiError(0, "The connection broke before the reply was complete.");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The connection broke before the reply was complete.");
  }
}
