// openai for Node.
import assert from "node:assert/strict";
import OpenAI, { BadRequestError } from "openai";
import {
  ASKED, BEGINNING, CITY, LIMIT, MESSAGES, MODEL, QUESTION, TOO_LONG, URL,
  aCall, aCity, all, counted, feature, getWeather, goesOn, inPieces, looped, run, same,
} from "./shared.mjs";

const client = new OpenAI({ baseURL: URL, apiKey: "unused", maxRetries: 0 });
const completions = client.chat.completions;
const ask = { model: MODEL, messages: MESSAGES, temperature: 0, max_tokens: LIMIT };
const asked = [{ role: "user", content: ASKED }];
const tool = { name: "get_weather", description: "The weather of a city.", parameters: CITY };
const call = {
  model: MODEL, messages: asked, temperature: 0, max_tokens: 80,
  tools: [{ type: "function", function: tool }], tool_choice: "required", parallel_tool_calls: false,
};

feature("chat", async () => same((await completions.create(ask)).choices[0].message.content));

feature("stream", async () => {
  const chunks = await all(await completions.create({ ...ask, stream: true }));
  await same(inPieces(chunks.map((chunk) => chunk.choices[0].delta.content ?? "")));
});

feature("usage", async () => {
  const chunks = await all(await completions.create({ ...ask, stream: true, stream_options: { include_usage: true } }));
  const { usage } = chunks.at(-1);
  await counted(usage.prompt_tokens, usage.completion_tokens);
});

feature("completions", async () => {
  const fields = { model: MODEL, prompt: BEGINNING, temperature: 0, max_tokens: LIMIT };
  await goesOn((await client.completions.create(fields)).choices[0].text);
});

feature("tools", async () => {
  const [{ function: called }] = (await completions.create(call)).choices[0].message.tool_calls;
  aCall(called.name, called.arguments);
});

feature("streamed tools", async () => {
  const stream = completions.stream(call);
  const pieces = [];
  stream.on("tool_calls.function.arguments.delta", (event) => pieces.push(event.arguments_delta));
  const [{ function: called }] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
  aCall(called.name, called.arguments);
  assert.equal(inPieces(pieces), called.arguments);
});

feature("tool loop", async () => {
  const runner = completions.runTools({
    ...call, tools: [{ type: "function", function: { ...tool, parse: JSON.parse, function: ({ city }) => getWeather(city) } }],
    tool_choice: { type: "function", function: { name: "get_weather" } },
  });
  await runner.done();
  const turns = runner.messages;
  looped((await completions.create({ ...call, messages: turns, tool_choice: "none" })).choices[0].message.content);
});

feature("JSON schema", async () => {
  const form = { type: "json_schema", json_schema: { name: "city", schema: CITY, strict: true } };
  const answer = await completions.parse({ ...ask, max_tokens: 80, response_format: form });
  aCity(answer.choices[0].message.parsed);
});

feature("log-probabilities", async () => {
  const scores = (await completions.create({ ...ask, logprobs: true, top_logprobs: 2 })).choices[0].logprobs.content;
  await same(scores.map((score) => score.token).join(""));
});

feature("responses", async () => {
  const fields = { model: MODEL, input: QUESTION, temperature: 0, max_output_tokens: LIMIT };
  await same((await client.responses.create(fields)).output_text);
  await same((await client.responses.stream(fields).finalResponse()).output_text);
});

feature("overflow error", async () => {
  const refused = completions.create({ ...ask, messages: [{ role: "user", content: TOO_LONG }] });
  await assert.rejects(refused, (error) => error instanceof BadRequestError && error.code === "context_length_exceeded");
});

await run();
