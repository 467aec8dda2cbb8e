// Asks the worker for reports on blocks.

const worker = new Worker(new URL('worker.js', import.meta.url), { type: 'module' });
const asked = new Map(); // number of a question → what to do when it is begun, and when it is answered
let last = 0;
let failure = null;

worker.onmessage = ({ data: { id, report } }) => {
  const question = asked.get(id);
  if (!report) {
    question.begun();
    return;
  }
  asked.delete(id);
  question.answered(report);
};

worker.onerror = (event) => {
  const text = `this browser cannot check blocks: ${event.message ?? 'the worker does not start'}`;
  failure = { certified: false, rows: [{ rule: 'hash', good: null, text }], fields: null, startHeight: null, kept: false };
  for (const { answered } of asked.values()) answered(failure);
  asked.clear();
};

/** The worker's report on a block. `begun` is called when it begins. */
export function ask(hash, height, trusted, begun = () => {}) {
  if (failure) return Promise.resolve(failure);
  return new Promise((answered) => {
    last += 1;
    asked.set(last, { begun, answered });
    worker.postMessage({ id: last, hash, height, trusted });
  });
}
