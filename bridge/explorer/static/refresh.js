// Keeps what the server has rendered up to date: an element with data-live="/page" is replaced by the one with its id on that page.

import { listen } from './connection.js';
import { request } from './request.js';
import { addBlock } from './rows.js';

const REST = 300; // milliseconds between two requests for one page
const LIST = '/blocks';
const SHARE = 4; // and at least so many times as long as the last one took

const shown = new WeakMap(); // element → its HTML as the server sent it
const busy = new Map(); // page → {fetching, again}: whether a request is under way, and whether one must follow
let before = null;

/** Show the elements with data-past as they were before a height; null: as they are now. */
export function showBefore(height) {
  before = height;
  refresh();
}

function refresh() {
  load(LIST);
  refreshOthers();
}

function refreshOthers() {
  const pages = new Set([...document.querySelectorAll('[data-live]')].map(({ dataset }) => dataset.live));
  for (const page of pages) if (page !== LIST) load(page);
  if (document.getElementById('problem')) retry();
}

async function load(page) {
  const elements = `[data-live="${page}"]`;
  if (!document.querySelector(elements)) return;
  if (busy.has(page)) {
    busy.get(page).again = true;
    return;
  }
  const state = { fetching: true, again: false };
  busy.set(page, state);
  const began = performance.now();
  const past = before !== null && document.querySelector(`${elements}[data-past]`);
  const fetched = await fetchPage(past ? `${page}?before=${before}` : page);
  for (const element of fetched ? document.querySelectorAll(elements) : []) {
    const fresh = fetched.getElementById(element.id);
    if (fresh) replace(element, fresh);
  }
  state.fetching = false;
  setTimeout(() => {
    busy.delete(page);
    if (state.again) load(page);
  }, Math.max(REST, SHARE * (performance.now() - began)));
}

async function fetchPage(address) {
  try {
    const response = await request(address);
    return response.ok ? new DOMParser().parseFromString(await response.text(), 'text/html') : null;
  } catch {
    return null; // the connection says so
  }
}

/** Replace an element, unless it is the same, or the reader is copying from it. What the reader has opened stays open. */
function replace(old, fresh) {
  const html = fresh.outerHTML;
  const selection = getSelection();
  if (html === shown.get(old) || (!selection.isCollapsed && old.contains(selection.anchorNode))) return;
  const focused = old.contains(document.activeElement) ? document.activeElement : null;
  for (const check of fresh.querySelectorAll('.check')) {
    const known = old.querySelector(`.check[data-hash="${CSS.escape(check.dataset.hash)}"]`);
    if (known) check.replaceWith(known);
  }
  for (const { id } of old.querySelectorAll('details[open][id]')) fresh.querySelector(`#${CSS.escape(id)}`)?.setAttribute('open', '');
  Object.assign(fresh.dataset, old.dataset);
  shown.set(fresh, html);
  old.replaceWith(fresh);
  if (focused) [...fresh.querySelectorAll(focused.localName)].find((each) => each.isEqualNode(focused))?.focus({ preventScroll: true });
}

/** A new block is put into the list without a request, if that is possible: there may be many in a second. */
function addToList(block) {
  const list = document.querySelector(`[data-live="${LIST}"]`);
  if (!list || before !== null) return;
  shown.delete(list);
  if (!addBlock(list, block) || busy.get(LIST)?.fetching) load(LIST);
}

/** Show a page that was not there, as soon as it is. */
async function retry() {
  const response = await request(location, { method: 'HEAD' }).catch(() => null);
  if (response?.ok) location.reload();
}

for (const kind of ['open', 'reset']) listen(kind, refresh);
for (const kind of ['info', 'alarm']) listen(kind, refreshOthers);
listen('block', addToList);
