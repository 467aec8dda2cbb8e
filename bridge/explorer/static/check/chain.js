// The check of the whole chain, from the tip to the start height, and the chain_id that the visitor trusts.

import { request } from '../request.js';
import { ask } from './client.js';
import { isHash, linkedChainId, trust, trustedChainId } from './trust.js';
import { make, stateOf, summary } from './view.js';

/** Fill the section: a field for the chain_id to trust, and a button. `retrusted` is called when the visitor trusts another one. */
export function fillChainCheck(section, retrusted) {
  section.append(trustForm(retrusted), checkForm());
}

function trustForm(retrusted) {
  const input = make('input', { name: 'chain_id', size: 64, spellcheck: false, autocomplete: 'off' });
  const label = make('label', {}, 'chain_id that you trust ', input);
  const forget = make('button', { type: 'button', name: 'forget' }, 'Trust none');
  const status = make('p', { role: 'status' });
  const linked = linkedChainId();
  const trusted = trustedChainId();
  input.value = linked ?? trusted ?? '';
  if (linked && trusted && linked !== trusted) status.textContent = `This link names another chain_id. You trust ${trusted}.`;

  function use(chainId, words) {
    try {
      trust(chainId);
      status.textContent = words;
    } catch {
      status.textContent = 'This browser does not keep it.';
    }
    retrusted();
  }

  const form = make('form', {}, label, make('button', { name: 'trust' }, 'Trust this network'), forget, status);
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    const chainId = input.value.trim().toLowerCase();
    if (isHash(chainId)) use(chainId, 'You trust this network. A block of another one is broken.');
    else status.textContent = 'A chain_id has 64 hex digits.';
  });
  forget.addEventListener('click', () => {
    input.value = '';
    use(null, 'You trust no network by its chain_id.');
  });
  return form;
}

function checkForm() {
  const button = make('button', { type: 'button', name: 'check' }, 'Check the whole chain');
  const progress = make('progress', { value: 0, hidden: true });
  progress.setAttribute('aria-label', 'Blocks checked');
  const count = make('span');
  const status = make('p', { role: 'status' });
  const broken = make('ul');
  let runs = false;
  let stopped = false;

  button.addEventListener('click', async () => {
    stopped = runs;
    if (runs) return;
    runs = true;
    button.textContent = 'Stop';
    progress.hidden = false;
    status.textContent = 'Your browser is checking the chain.';
    broken.replaceChildren();
    status.textContent = await checkChain({ progress, count, broken, isStopped: () => stopped });
    button.textContent = 'Check the whole chain';
    progress.hidden = true;
    count.textContent = '';
    runs = false;
  });
  return make('div', {}, button, ' ', progress, ' ', count, status, broken);
}

/** Check from the tip downwards. Returns what came of it, as a sentence. */
async function checkChain({ progress, count, broken, isStopped }) {
  const tip = await readTip();
  if (!tip) return 'The server does not say which block is the tip.';
  const counts = { good: 0, bad: 0, unknown: 0, kept: 0 };
  let { hash, height } = tip;
  for (;;) {
    const report = await ask(hash, height, trustedChainId());
    const { startHeight, fields } = report;
    const state = stateOf(report);
    if (report.rows.some(({ rule, good }) => rule === 'network' && good === false)) return `✗ ${summary(report)}`;
    if (state === 'none') return startHeight === null ? 'There is no training network.' : 'No block has a certificate yet.';
    counts[state] += 1;
    if (report.kept) counts.kept += 1;
    if (state !== 'good') {
      const link = make('a', { href: `/block/${hash}` }, `Block ${height}`);
      broken.append(make('li', { data: { state } }, link, `: ${summary(report)}`));
    }
    if (startHeight !== null && height <= startHeight) break;
    if (!fields) return `${found(counts)} It ends at block ${height}: what is below it is not known.`;
    if (isStopped()) return `${found(counts)} You stopped it at block ${height}.`;
    if (startHeight !== null) {
      Object.assign(progress, { max: tip.height - startHeight + 1, value: tip.height - height + 1 });
      count.textContent = `${progress.value} of ${progress.max} blocks`;
    }
    hash = fields.previousblockhash;
    height -= 1;
  }
  const all = counts.good === tip.height - height + 1;
  return `${all ? `✓ Every block from ${tip.height} to ${height} is good.` : '✗ Not every block is good.'} ${found(counts)}`;
}

function found({ good, bad, unknown, kept }) {
  const others = `${bad ? `, ${bad} broken` : ''}${unknown ? `, ${unknown} not known` : ''}`;
  return `${good} good${others}; ${good + bad - kept} checked now, ${kept} before.`;
}

async function readTip() {
  try {
    const { tip } = await (await request('/api/info')).json();
    return tip && isHash(tip.hash) && Number.isInteger(tip.height) ? tip : null;
  } catch {
    return null;
  }
}
