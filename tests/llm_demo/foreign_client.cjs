// OpenAI's own client for Node.js against a running gateway; docs/RELIABILITY.md says how to run it.
const OpenAI = require("openai");

async function main([url, model]) {
  const client = new OpenAI({ baseURL: url, apiKey: "x", maxRetries: 0 });
  const messages = [{ role: "user", content: "What is the capital of France? Answer briefly." }];
  const asked = { model, messages, temperature: 0, max_completion_tokens: 64 };
  const said = (name, ...what) => console.log(`openai (npm), ${name}:`, ...what);

  const whole = await client.chat.completions.create(asked);
  said("whole", whole.choices[0].message.content, `${whole.usage.completion_tokens} tokens`);

  let [text, usage] = ["", null];
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create({ ...asked, ...options })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  said("streamed", text, `${usage.completion_tokens} tokens`);
  said("helper", await client.chat.completions.stream(asked).finalContent());

  const city = { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"], additionalProperties: false };
  const form = { type: "json_schema", json_schema: { name: "answer", strict: true, schema: city } };
  const parsed = await client.chat.completions.parse({ ...asked, response_format: form });
  said("structured", parsed.choices[0].message.parsed.city);

  const weather = { name: "weather", parameters: city, parse: JSON.parse, function: (given) => `sunny in ${given.city}` };
  const choice = { type: "function", function: { name: "weather" } };
  const run = client.chat.completions.runTools({
    ...asked, tools: [{ type: "function", function: weather }], tool_choice: choice, parallel_tool_calls: false,
  });
  said("tool", await run.finalFunctionToolCallResult());

  const prompts = { model, prompt: ["1, 2, 3,", "a, b,"], temperature: 0, max_tokens: 4, logprobs: 1 };
  const completions = await client.completions.create(prompts);
  said("completions", completions.choices.map((choice) => `${choice.text.trim()} (${choice.logprobs.tokens.length} scored)`));

  const left = await client.chat.completions.create({ ...asked, max_completion_tokens: 400, ignore_eos: true, stream: true });
  for await (const _ of left) break; // which aborts it
  const refusals = [{ ...asked, temperature: 3 }, { ...asked, model: "gpt-5" }, { ...asked, reasoning_effort: "high" }];
  for (const wrong of refusals) {
    const error = await client.chat.completions.create(wrong).then(() => null, (error) => error);
    said("refused", error.constructor.name, error.status, error.param);
  }
}

main(process.argv.slice(2));
