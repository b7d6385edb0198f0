// What the Vercel AI SDK, left to its ways, makes of a job that goes on; prints the error.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText } from 'ai';

const [baseURL, apiKey, prompt] = process.argv.slice(2);
const model = createOpenAICompatible({ name: 'sluicegate', baseURL, apiKey })('sluice/general');

try {
  await generateText({ model, prompt, headers: { 'x-stainless-timeout': '2' } });
} catch (error) {
  const { name: kind, statusCode, isRetryable, data, responseHeaders } = error;
  console.log(
    JSON.stringify({ kind, statusCode, isRetryable, error: data?.error, responseHeaders }),
  );
}
