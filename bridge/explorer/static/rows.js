// Rows of the list of blocks, for blocks that come while the page is open.

const ROWS = 25;

/**
 * Put a block on top of the list, in which its parent must be on top. Returns false if only the server can make the list: it must
 * have a row of a block with a certificate to copy, and the winner must be somewhere on the page.
 */
export function addBlock(list, block) {
  const top = list.querySelector('tr[data-height]');
  const pattern = [...list.rows].find((row) => row.querySelector('.who'));
  const winner = block.certificate && document.querySelector(`.who[href="/miner/${CSS.escape(block.certificate.winner_key)}"]`);
  if (!winner || !pattern || Number(top.dataset.height) !== block.height - 1) return false;
  list.prepend(makeRow(pattern.cloneNode(true), winner, block));
  while (list.rows.length > ROWS) list.rows[ROWS].remove();
  const older = document.querySelector('.pages [rel="next"]');
  if (older) older.href = `/blocks?before=${list.rows[list.rows.length - 1].dataset.height}`;
  return true;
}

function makeRow(row, winner, { hash, height, time, loss, metric, certificate, refusals, tasks, nTx }) {
  const put = (selector, text, properties = {}) => Object.assign(row.querySelector(selector), { textContent: text, ...properties });
  const link = { href: `/block/${hash}`, title: hash };
  row.className = [...winner.classList].find((name) => /^c\d/.test(name)) ?? 'c-none';
  Object.assign(row.dataset, { hash, height });
  row.querySelector('.who').replaceWith(winner.cloneNode(true));
  put('[data-field="height"]', height, { href: link.href });
  const check = put('.check', '', { title: '' });
  delete check.dataset.state;
  Object.assign(check.dataset, { hash, height });
  const iso = new Date(time * 1000).toISOString();
  row.querySelector('time').dateTime = `${iso.slice(0, 19)}Z`;
  row.querySelector('time').replaceChildren(put('time .day', `${iso.slice(0, 10)} `), `${iso.slice(11, 19)} UTC`);
  put('[data-cell="loss"]', loss?.toFixed(4) ?? '–');
  put('[data-cell="metric"]', metric?.toFixed(4) ?? '–');
  put('[data-field="round"]', certificate.round);
  const refused = Object.entries(refusals ?? {});
  const sum = refused.reduce((all, [, times]) => all + times, 0);
  put('[data-cell="refused"]', tasks === null ? '–' : `${sum} of ${tasks}`, { title: refused.map((each) => each.join(': ')).join(' ') });
  put('[data-field="nTx"]', nTx);
  put('a.hash', `${hash.slice(0, 8)}…${hash.slice(-8)}`, link);
  return row;
}
