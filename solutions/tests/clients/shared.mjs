// What shared.py is, for the clients that run in Node.
import assert from "node:assert/strict";

export const URL = process.env.CLIENT_URL;
export const MODEL = process.env.CLIENT_MODEL;
export const QUESTION = "What is the capital of France?";
export const BEGINNING = "The capital of France is";
export const MESSAGES = [{ role: "user", content: QUESTION }];
export const LIMIT = 32;
export const ASKED = "What is the weather in Paris?";
export const CITY = {
  type: "object",
  properties: { city: { type: "string", description: "Name of the city", maxLength: 12 } },
  required: ["city"],
  additionalProperties: false,
};
export const TOO_LONG = "colour ".repeat(5000);

const tests = new Map();
const askedOfTheTool = [];

export function feature(name, test) {
  tests.set(name, test);
}

export async function run() {
  const names = process.argv.length > 2 ? process.argv.slice(2) : [...tests.keys()];
  for (const name of names) {
    let error = null;
    try {
      await tests.get(name)();
    } catch (failed) {
      console.error(failed);
      error = `${failed.name}: ${failed.message}`.replace(/\s+/g, " ").slice(0, 300);
    }
    console.log(JSON.stringify({ feature: name, error }));
  }
}

export async function post(path, fields) {
  const body = JSON.stringify({ model: MODEL, temperature: 0, max_tokens: LIMIT, ...fields });
  const answer = await fetch(`${URL}/${path}`, { method: "POST", body, headers: { "Content-Type": "application/json" } });
  assert.equal(answer.status, 200);
  return answer.json();
}

export async function same(text) {
  const right = await post("chat/completions", { messages: MESSAGES });
  assert.equal(text, right.choices[0].message.content);
}

export async function goesOn(text) {
  assert.equal(text, (await post("completions", { prompt: BEGINNING })).choices[0].text);
}

export async function counted(promptTokens, completionTokens) {
  const { usage } = await post("chat/completions", { messages: MESSAGES });
  assert.deepEqual([promptTokens, completionTokens], [usage.prompt_tokens, usage.completion_tokens]);
}

export function aCity(value) {
  const read = typeof value === "string" ? JSON.parse(value) : value;
  assert.deepEqual(Object.keys(read), ["city"]);
  assert.ok(typeof read.city === "string" && read.city.length <= 12, read.city);
}

export function aCall(name, args) {
  assert.equal(name, "get_weather");
  aCity(args);
}

export function getWeather(city) {
  askedOfTheTool.push(city);
  return "Sunny, 21 degrees.";
}

export function looped(answer) {
  const cities = askedOfTheTool.splice(0);
  assert.ok(cities.length > 0 && cities.every((city) => typeof city === "string"), `the tool was called with ${cities}`);
  assert.ok(answer.trim(), "no answer");
}

export function inPieces(pieces) {
  assert.ok(pieces.length > 1, `${pieces.length} pieces`);
  return pieces.join("");
}

export async function all(stream) {
  const found = [];
  for await (const each of stream) found.push(each);
  return found;
}
