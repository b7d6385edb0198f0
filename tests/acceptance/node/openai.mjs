// What the npm package `openai` makes of our door: prints one JSON object, a case each.
import OpenAI from 'openai';

const [baseURL, apiKey, png] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const model = 'sluice/general';
const user = (content) => [{ role: 'user', content }];
const tools = [
  {
    type: 'function',
    function: {
      name: 'find_contact',
      description: 'Find one.',
      parameters: { type: 'object', properties: { name: { type: 'string' } } },
    },
  },
];

async function chat() {
  const answer = await client.chat.completions.create({ model, messages: user('ECHO: Hello Ada') });
  const [choice] = answer.choices;
  return { text: choice.message.content, finish: choice.finish_reason, ours: answer.sluicegate };
}

async function stream() {
  const chunks = await client.chat.completions.create({
    model,
    messages: user('TOKENS: 60\nWrite to Ada.'),
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = '';
  let usage = null;
  for await (const chunk of chunks) {
    text += chunk.choices[0]?.delta?.content ?? '';
    usage = chunk.usage ?? usage;
  }
  return { text, usage };
}

async function toolRound() {
  const messages = user('TOOL: find_contact\nFind Ada.');
  const said = client.chat.completions.stream({ model, messages, tools });
  const { message } = (await said.finalChatCompletion()).choices[0];
  const [call] = message.tool_calls;
  messages.push(message, { role: 'tool', tool_call_id: call.id, content: 'ada@example.com' });
  messages.push({ role: 'user', content: 'ECHO: Found her.' });
  const second = await client.chat.completions.create({ model, messages, tools });
  const args = JSON.parse(call.function.arguments);
  return { name: call.function.name, args, text: second.choices[0].message.content };
}

async function schema() {
  const answer = await client.chat.completions.create({
    model,
    messages: user('Note the call.'),
    response_format: {
      type: 'json_schema',
      json_schema: {
        name: 'note',
        strict: true,
        schema: {
          type: 'object',
          properties: { summary: { type: 'string' }, urgent: { type: 'boolean' } },
          required: ['summary', 'urgent'],
          additionalProperties: false,
        },
      },
    },
  });
  return JSON.parse(answer.choices[0].message.content);
}

async function image() {
  const url = `data:image/png;base64,${png}`;
  const answer = await client.chat.completions.create({
    model: 'sluice/auto',
    messages: user([
      { type: 'text', text: 'ECHO: seen' },
      { type: 'image_url', image_url: { url } },
    ]),
  });
  return { text: answer.choices[0].message.content, warnings: answer.sluicegate.warnings };
}

async function failing(ask) {
  try {
    await ask();
  } catch (error) {
    const { status, code, param } = error;
    return { kind: error.constructor.name, status, code, param };
  }
  throw new Error('nothing failed');
}

const cases = {
  chat,
  stream,
  toolRound,
  schema,
  image,
  models: async () => (await client.models.list()).data.map((one) => one.id),
  unknownModel: () =>
    failing(() => client.chat.completions.create({ model: 'gpt-99', messages: user('Hello.') })),
  wrongField: () =>
    failing(() =>
      client.chat.completions.create({ model, messages: user('Hello.'), temperature: 9 }),
    ),
};

const told = {};
for (const [name, run] of Object.entries(cases)) told[name] = await run();
console.log(JSON.stringify(told));
