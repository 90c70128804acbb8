// Programs on npm's clients: `node clients.mjs URL KEY MODEL RANDOM`.
//
// URL ends with /v1. RANDOM is 1 for a model with random weights, which calls a tool only if it must.
// Prints a line of JSON for each program: client, action, works, why.
import { generateText, streamText, generateObject, tool, stepCountIs } from 'ai';
import { createOpenAI } from '@ai-sdk/openai';
import { createAnthropic } from '@ai-sdk/anthropic';
import { createOllama } from 'ollama-ai-provider-v2';
import { Ollama } from 'ollama';
import { z } from 'zod';

const [base, key, model, random] = process.argv.slice(2);
const host = base.replace(/\/v1$/, '');
const isRandom = random === '1';
const headers = { Authorization: `Bearer ${key}` };
const clock = z.object({ zone: z.enum(['UTC', 'CET']) });
const clockSchema = { type: 'object', properties: { zone: { enum: ['UTC', 'CET'], type: 'string' } }, required: ['zone'], additionalProperties: false };
const weather = tool({ description: 'Tells the weather.', inputSchema: z.object({ city: z.enum(['Paris', 'Rome']) }), execute: async () => 'Sun.' });
const check = (holds, what) => { if (!holds) throw new Error('unexpected: ' + JSON.stringify(what)?.slice(0, 200)); };
const run = async (client, action, program) => {
  try { await program(); console.log(JSON.stringify({ client, action, works: true })); }
  catch (error) { console.log(JSON.stringify({ client, action, works: false, why: String(error?.message ?? error).slice(0, 200) })); }
};

const ollama = new Ollama({ host, headers });
const short = { num_predict: 8, temperature: 0 };
const hello = [{ role: 'user', content: 'Say hello.' }];
await run('ollama (npm)', 'chat, plain and streamed', async () => {
  const plain = await ollama.chat({ model, messages: hello, options: short });
  let text = '', last;
  for await (const part of await ollama.chat({ model, messages: hello, options: short, stream: true })) { text += part.message.content; last = part; }
  check(text === plain.message.content && plain.done_reason === 'length' && plain.eval_count === 8 && last.done && last.eval_count === 8, [plain, last]);
});
await run('ollama (npm)', 'generate, plain and streamed', async () => {
  const plain = await ollama.generate({ model, prompt: 'Say hello.', options: short });
  let text = '';
  for await (const part of await ollama.generate({ model, prompt: 'Say hello.', options: short, stream: true })) text += part.response;
  check(text === plain.response && plain.eval_count === 8, plain);
});
await run('ollama (npm)', 'format with a schema', async () => {
  const answer = await ollama.chat({ model, messages: hello, format: clockSchema, options: { num_predict: 480, temperature: 1, seed: 3 } });
  clock.parse(JSON.parse(answer.message.content));
});
await run('ollama (npm)', 'list, show, ps and version', async () => {
  const listed = (await ollama.list()).models.map((one) => one.name.replace(/:latest$/, ''));
  const shown = await ollama.show({ model });
  await ollama.ps();
  check(listed.includes(model) && shown.capabilities.includes('completion'), [listed, shown.capabilities]);
});
await run('ollama (npm)', 'an unknown model is ResponseError 404', async () => {
  try { await ollama.chat({ model: 'no-such-model', messages: hello }); } catch (error) { check(error.status_code === 404 && /not found/.test(error.message), error.message); return; }
  throw new Error('no error');
});
await run('ollama (npm)', 'abort of a stream', async () => {
  const stream = await ollama.chat({ model, messages: hello, stream: true, options: { num_predict: 2000, temperature: 1, seed: 3 } });
  try { for await (const part of stream) stream.abort(); } catch (error) { check(error.name === 'AbortError', error.name); return; }
  throw new Error('not aborted');
});

const sdks = [
  ['AI SDK responses', createOpenAI({ baseURL: base, apiKey: key })(model), { openai: { store: false } }],
  ['AI SDK chat', createOpenAI({ baseURL: base, apiKey: key }).chat(model), {}],
  ['AI SDK messages', createAnthropic({ baseURL: base, apiKey: key })(model), {}],
  ['AI SDK ollama-ai-provider-v2', createOllama({ baseURL: host + '/api', headers })(model), {}],
];
for (const [client, chat, providerOptions] of sdks) {
  const common = { model: chat, maxRetries: 0, providerOptions };
  const isNative = client.includes('ollama');
  await run(client, 'generateText and streamText, cut', async () => {
    // The provider for Ollama sends both settings in fields that Ollama does not have.
    const cut = { ...common, prompt: 'Say hello.', maxOutputTokens: 8, temperature: 0 };
    if (isNative) cut.providerOptions = { ollama: { options: { num_predict: 8, temperature: 0 } } };
    const plain = await generateText(cut);
    const streamed = streamText({ ...cut, onError: () => {} });
    let text = '';
    for await (const piece of streamed.textStream) text += piece;
    check(text === plain.text && plain.finishReason === 'length' && (await streamed.finishReason) === 'length' && plain.usage.outputTokens === 8, [plain.text, text, plain.finishReason, await streamed.finishReason, plain.usage]);
  });
  await run(client, 'generateObject', async () => {
    const { object } = await generateObject({ ...common, prompt: 'Which zone?', schema: clock, maxOutputTokens: 480, temperature: 1 });
    clock.parse(object);
  });
  await run(client, 'a round with a tool', async () => {
    const settings = { ...common, prompt: 'How is the weather in Paris?', tools: { weather }, maxOutputTokens: 200, temperature: 1 };
    if (isRandom && isNative) { await generateText(settings); return; } // nothing can force a call there
    const answer = await generateText({ ...settings, stopWhen: stepCountIs(2), prepareStep: ({ stepNumber }) => ({ toolChoice: isRandom && stepNumber === 0 ? 'required' : 'auto' }) });
    check(answer.steps.length === 2 && ['Paris', 'Rome'].includes(answer.steps[0].toolCalls[0].input.city), answer.steps.map((one) => one.content));
  });
  await run(client, 'an unknown model is APICallError 404', async () => {
    const other = isNative ? createOllama({ baseURL: host + '/api', headers })('no-such-model') : client.includes('messages') ? createAnthropic({ baseURL: base, apiKey: key })('no-such-model') : createOpenAI({ baseURL: base, apiKey: key })('no-such-model');
    try { await generateText({ ...common, model: other, prompt: 'Hi' }); } catch (error) { check(error.statusCode === 404, String(error)); return; }
    throw new Error('no error');
  });
}
process.exit(0);
