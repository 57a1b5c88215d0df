// Vercel's AI SDK, with its providers for OpenAI and for servers that are compatible.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import {
  ASKED, BEGINNING, CITY, LIMIT, MODEL, QUESTION, TOO_LONG, URL,
  aCall, aCity, all, counted, feature, getWeather, inPieces, looped, post, run, same,
} from "./shared.mjs";

const compatible = createOpenAICompatible({
  name: "server", baseURL: URL, apiKey: "unused", includeUsage: true, supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL: URL, apiKey: "unused" });
const settings = { temperature: 0, maxRetries: 0, maxOutputTokens: LIMIT };
const ask = { ...settings, model: compatible(MODEL), prompt: QUESTION };
const described = { description: "The weather of a city.", inputSchema: jsonSchema(CITY) };
const weather = tool({ ...described, execute: ({ city }) => getWeather(city) });
const call = {
  ...settings, model: compatible(MODEL), prompt: ASKED, maxOutputTokens: 80, toolChoice: "required",
  tools: { get_weather: tool(described) },
};

feature("chat", async () => same((await generateText(ask)).text));

feature("stream", async () => same(inPieces(await all(streamText(ask).textStream))));

feature("usage", async () => {
  const used = await streamText(ask).usage;
  await counted(used.inputTokens, used.outputTokens);
});

feature("completions", async () => {
  const model = compatible.completionModel(MODEL);
  const prompt = `user:\n${BEGINNING}\n\nassistant:\n`; // what the SDK makes of it
  const right = (await post("completions", { prompt, stop: ["\nuser:"] })).choices[0].text;
  assert.equal((await generateText({ ...settings, model, prompt: BEGINNING })).text, right);
});

feature("tools", async () => {
  const [called] = (await generateText(call)).toolCalls;
  aCall(called.toolName, called.input);
});

feature("streamed tools", async () => {
  const parts = await all(streamText(call).fullStream);
  const called = parts.find((part) => part.type === "tool-call");
  aCall(called.toolName, called.input);
  const pieces = parts.filter((part) => part.type === "tool-input-delta" && part.id === called.toolCallId);
  assert.deepEqual(JSON.parse(inPieces(pieces.map((part) => part.delta))), called.input);
});

feature("tool loop", async () => {
  for (const model of [compatible(MODEL), openai.chat(MODEL), openai.responses(MODEL)]) {
    const prepareStep = ({ stepNumber }) => (stepNumber === 0 ? {} : { toolChoice: "none" });
    const answer = await generateText({ ...call, model, tools: { get_weather: weather }, stopWhen: stepCountIs(3), prepareStep });
    looped(answer.text);
  }
});

feature("JSON schema", async () => {
  for (const model of [compatible(MODEL), openai.chat(MODEL), openai.responses(MODEL)]) {
    const output = Output.object({ schema: jsonSchema(CITY) });
    aCity((await generateText({ ...ask, model, maxOutputTokens: 80, output })).output);
  }
});

feature("log-probabilities", async () => {
  const answer = await generateText({ ...ask, model: openai.chat(MODEL), providerOptions: { openai: { logprobs: 2 } } });
  await same(answer.providerMetadata.openai.logprobs.map((score) => score.token).join(""));
});

feature("responses", async () => {
  const model = openai.responses(MODEL);
  await same((await generateText({ ...ask, model })).text);
  await same(inPieces(await all(streamText({ ...ask, model }).textStream)));
});

feature("overflow error", async () => {
  const refused = generateText({ ...ask, prompt: TOO_LONG });
  await assert.rejects(refused, (error) => APICallError.isInstance(error) && error.data.error.code === "context_length_exceeded");
});

await run();
