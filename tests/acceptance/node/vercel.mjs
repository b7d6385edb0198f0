// What the Vercel AI SDK makes of our door: prints one JSON object, a case each.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, isStepCount, jsonSchema, Output, streamText, tool } from 'ai';

const [baseURL, apiKey, png] = process.argv.slice(2);
const sluice = createOpenAICompatible({
  name: 'sluicegate',
  baseURL,
  apiKey,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = sluice('sluice/general');
const note = jsonSchema({
  type: 'object',
  properties: { summary: { type: 'string' }, urgent: { type: 'boolean' } },
  required: ['summary', 'urgent'],
  additionalProperties: false,
});

async function chat() {
  const { text, finishReason, usage } = await generateText({ model, prompt: 'ECHO: Hello Ada' });
  return { text, finishReason, usage };
}

async function stream() {
  const said = streamText({ model, prompt: 'TOKENS: 60\nWrite to Ada.' });
  let text = '';
  for await (const piece of said.textStream) text += piece;
  return { text, usage: await said.usage };
}

async function toolRound() {
  const found = [];
  const { steps, text } = await generateText({
    model,
    // The second step is asked for in the system text, as the user's says to call the tool.
    prompt: 'TOOL: find_contact\nFind Ada.',
    tools: {
      find_contact: tool({
        description: 'Find one.',
        inputSchema: jsonSchema({ type: 'object', properties: { name: { type: 'string' } } }),
        execute: async (input) => {
          found.push(input);
          return { email: 'ada@example.com' };
        },
      }),
    },
    prepareStep: ({ stepNumber }) =>
      stepNumber === 0 ? {} : { toolChoice: 'none', system: 'ECHO: Found her.' },
    stopWhen: isStepCount(2),
  });
  return { found, steps: steps.length, text };
}

async function schema() {
  const { output } = await generateText({
    model,
    prompt: 'Note the call.',
    output: Output.object({ schema: note }),
  });
  return output;
}

async function image() {
  const { text } = await generateText({
    model: sluice('sluice/auto'),
    messages: [
      {
        role: 'user',
        content: [
          { type: 'text', text: 'ECHO: seen' },
          { type: 'file', data: Buffer.from(png, 'base64'), mediaType: 'image/png' },
        ],
      },
    ],
  });
  return { text };
}

async function failing(name) {
  try {
    await generateText({ model: sluice(name), prompt: 'Hello.' });
  } catch (error) {
    const { statusCode, isRetryable, data, message } = error;
    return { kind: error.name, statusCode, isRetryable, code: data?.error?.code, message };
  }
  throw new Error('nothing failed');
}

const cases = { chat, stream, toolRound, schema, image, unknownModel: () => failing('gpt-99') };

const told = {};
for (const [name, run] of Object.entries(cases)) told[name] = await run();
console.log(JSON.stringify(told));
