// Asks the worker for reports on blocks.

const TRIES = 3; // to start the worker: a browser gives requests up when the network of its machine changes
const REST = 1000; // milliseconds between two of them

const asked = new Map(); // number of a question → {question, begun, answered}: the question, and what to call then
let worker = null;
let tries = 0;
let last = 0;
let failure = null;

function start() {
  tries += 1;
  worker = new Worker(new URL('worker.js', import.meta.url), { type: 'module' });
  worker.onmessage = onAnswer;
  worker.onerror = onError;
  for (const { question } of asked.values()) worker.postMessage(question);
}

function onAnswer({ data: { id, report } }) {
  const { begun, answered } = asked.get(id);
  if (!report) {
    begun();
    return;
  }
  asked.delete(id);
  answered(report);
}

/** The worker did not load: then the event has no message. Or its code is wrong in this browser. */
function onError({ message }) {
  if (message === undefined && tries < TRIES) {
    setTimeout(start, REST);
    return;
  }
  const text = `this browser cannot check blocks: ${message ?? 'the worker does not start'}`;
  failure = { certified: false, rows: [{ rule: 'hash', good: null, text }], fields: null, startHeight: null, kept: false };
  for (const { answered } of asked.values()) answered(failure);
  asked.clear();
}

/** The worker's report on a block. `begun` is called when it begins. */
export function ask(hash, height, trusted, begun = () => {}) {
  if (failure) return Promise.resolve(failure);
  return new Promise((answered) => {
    last += 1;
    const question = { id: last, hash, height, trusted };
    asked.set(last, { begun, answered, question });
    worker.postMessage(question);
  });
}

start();
