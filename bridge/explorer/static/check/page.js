// Checks the blocks that a page shows, in the visitor's browser: marks (.check), the list of rules (#checks), and the whole chain
// (#chain-check). It also marks blocks that come into the page later.

import { fillChainCheck } from './chain.js';
import { ask } from './client.js';
import { shownRow } from './shown.js';
import { isHash, trustLink, trustedChainId } from './trust.js';
import { showMark, showRules, stateOf } from './view.js';

const BLOCKS = '.check[data-hash], #checks[data-hash]';
const PARTS = `${BLOCKS}, [data-field]`;

let reports = new Map(); // hash/height → the worker's report, a promise
const begun = new Set(); // those of them that the worker has begun

const keyOf = ({ dataset: { hash, height } }) => `${hash}/${height}`;

const show = (element, ...what) => (element.id === 'checks' ? showRules : showMark)(element, ...what);

function reportOn(element) {
  const key = keyOf(element);
  const { hash, height } = element.dataset;
  if (!reports.has(key)) {
    const begin = () => {
      begun.add(key);
      const waits = (each) => keyOf(each) === key && each.dataset.state === 'waiting';
      for (const each of document.querySelectorAll(BLOCKS)) if (waits(each)) show(each, 'checking');
    };
    reports.set(key, ask(hash, Number(height), trustedChainId(), begin));
  }
  return reports.get(key);
}

async function update(element) {
  const { hash } = element.dataset;
  if (!isHash(hash)) return;
  const from = reports;
  const key = keyOf(element);
  if (!element.dataset.state) show(element, begun.has(key) ? 'checking' : 'waiting');
  const report = await reportOn(element);
  if (stateOf(report) === 'unknown') reports.delete(key); // it may be known when the page changes the next time
  if (from !== reports || keyOf(element) !== key) return; // it shows another block now
  const all = { ...report, rows: [...report.rows, shownRow(hash, report.fields)] };
  show(element, stateOf(all), all);
}

function updateAll() {
  for (const element of document.querySelectorAll(BLOCKS)) update(element);
}

/** Whether a change of the page adds a block, or changes what is shown of one. */
function concerns({ target, addedNodes }) {
  const parent = target.nodeType === Node.ELEMENT_NODE ? target : target.parentElement;
  const isPart = (node) => node.nodeType === Node.ELEMENT_NODE && (node.matches(PARTS) || node.querySelector(PARTS));
  return parent?.closest('[data-field]') || [...addedNodes].some(isPart);
}

trustLink();
const section = document.getElementById('chain-check');
if (section) {
  fillChainCheck(section, () => {
    reports = new Map();
    begun.clear();
    updateAll();
  });
}
new MutationObserver((changes) => changes.some(concerns) && updateAll()).observe(document.body, {
  childList: true,
  subtree: true,
  characterData: true,
});
updateAll();
