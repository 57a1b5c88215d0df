// Where frames come from: /live, or a file that --record-trace wrote.

/** An address of the server, which offers this page in a folder of its own. */
export const api = (path) => new URL(`../${path}`, document.baseURI);

/** The API key that the user gave, for this tab only. */
export const key = {
  get: () => sessionStorage.getItem("key"),
  set: (value) => sessionStorage.setItem("key", value),
  headers: () => (key.get() ? { Authorization: `Bearer ${key.get()}` } : {}),
};

/** The JSON objects of a response of server-sent events, as they come. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.startsWith("data: ") ? part.slice(6) : "";
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Follow the engine for ever; after a break the first frame is full again. `say` is told how it goes. */
export async function follow(model, say, signal) {
  while (!signal.aborted) {
    try {
      const response = await fetch(api("live"), { headers: key.headers(), signal });
      if (response.status === 401) return say("needs an API key", true);
      if (!response.ok) throw new Error(`the server answers ${response.status}`);
      say("connected");
      for await (const frame of events(response)) model.apply(frame);
    } catch (error) {
      if (signal.aborted) return;
      say(`not connected: ${error.message}`);
    }
    await new Promise((resume) => setTimeout(resume, 1000));
  }
}

/** Show the trace at an address, as a page without a server does: ``index.html?trace=trace.jsonl``. */
export async function replayFrom(address, model, say, signal) {
  const response = await fetch(address, { signal });
  if (!response.ok) return say(`there is no trace at ${address}`);
  await replay(new File([await response.blob()], address), model, say, signal);
}

/** Show a recorded trace, at most 20 frames a second. */
export async function replay(file, model, say, signal) {
  const lines = (await file.text()).split("\n").filter(Boolean);
  model.clear();
  for (const [number, line] of lines.entries()) {
    if (signal.aborted) return;
    try {
      model.apply(JSON.parse(line));
    } catch {
      return say(`line ${number + 1} of ${file.name} is no frame of a trace`);
    }
    say(`${file.name}: frame ${number + 1} of ${lines.length}`);
    await new Promise((resume) => setTimeout(resume, 50));
  }
}
