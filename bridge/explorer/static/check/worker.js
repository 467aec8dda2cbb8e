// The worker that checks blocks, one after the other, the highest first: where blocks come faster than they can be checked, those
// that the visitor sees are not behind older ones. It takes {id, hash, height, trusted}, answers {id} when it begins, and then
// {id, report}: that of report.js, with the rule network first, `startHeight`, and `kept` if the browser knew it already.

import { request } from '../request.js';
import { hex } from './codec.js';
import { BrokenRule } from './errors.js';
import { OptionError, TrainingParams } from './params.js';
import { UnavailableError, checkBlock, checkNetwork } from './report.js';
import { keepReport, keptReport } from './store.js';

const MOST_BLOCKS = 4; // kept in memory: a block is wanted again as the parent of the next

const blocks = new Map();
let network = null;
const waiting = [];
let busy = false;

onmessage = async ({ data }) => {
  waiting.push(data);
  if (busy) return;
  busy = true;
  while (waiting.length) {
    const highest = waiting.reduce((best, { height }, index) => (height > waiting[best].height ? index : best), 0);
    const [question] = waiting.splice(highest, 1);
    postMessage({ id: question.id });
    postMessage({ id: question.id, report: await check(question) });
  }
  busy = false;
};

async function check({ hash, height, trusted }) {
  try {
    network ??= await readNetwork();
  } catch (error) {
    return { certified: false, rows: [{ rule: 'network', good: null, text: error.message }], fields: null, startHeight: null };
  }
  const { params } = network;
  const key = params && `${hex(params.chainId)}/${hash}/${height}`;
  const kept = key ? await keptReport(key) : undefined;
  const report = kept ?? (await checkBlock(hash, height, params, fetchBlock).catch(failed));
  if (!report.rows.every((row) => row.good)) blocks.clear(); // the server may have better bytes the next time
  else if (key && !kept) await keepReport(key, report);
  const rows = [networkRow(network, trusted), ...report.rows];
  return { ...report, rows, kept: kept !== undefined, startHeight: params?.startHeight ?? null };
}

/** The report where the check itself fails. */
const failed = (error) => ({ certified: false, rows: [{ rule: 'hash', good: null, text: `the check failed: ${error}` }], fields: null });

/** What the server says of the network; params are null if there is none, or if the options are wrong. */
async function readNetwork() {
  const response = await get('/api/params');
  if (response.status === 404) return { params: null, problem: null, absent: true };
  const stated = await response.json();
  try {
    return { params: TrainingParams.fromNodeOptions(stated.options ?? {}), stated: stated.chain_id };
  } catch (error) {
    if (!(error instanceof OptionError)) throw error;
    return { params: null, problem: error.message };
  }
}

function networkRow({ params, stated, problem }, trusted) {
  const row = { rule: 'network', good: true, text: '' };
  try {
    if (problem) throw new BrokenRule('network', problem);
    if (!params && trusted) throw new BrokenRule('network', `there is no training network, but you trust ${trusted}`);
    row.text = params ? checkNetwork(params, stated, trusted) : 'there is no training network';
  } catch (error) {
    if (!(error instanceof BrokenRule)) throw error;
    Object.assign(row, { good: false, text: error.message });
  }
  return row;
}

async function fetchBlock(hash) {
  if (!blocks.has(hash)) {
    const response = await get(`/api/rawblock/${hash}`);
    if (response.status === 404) throw new UnavailableError((await response.json()).error);
    blocks.set(hash, new Uint8Array(await response.arrayBuffer()));
    if (blocks.size > MOST_BLOCKS) blocks.delete(blocks.keys().next().value);
  }
  return blocks.get(hash);
}

/** The server's answer. Throws UnavailableError for another than 200 and 404; with 503 the server says why. */
async function get(path) {
  const response = await request(path).catch(() => null);
  if (response === null) throw new UnavailableError('the server does not answer');
  if (response.status === 503) throw new UnavailableError((await response.json()).error);
  if (!response.ok && response.status !== 404) throw new UnavailableError(`the server answers ${response.status} to ${path}`);
  return response;
}
