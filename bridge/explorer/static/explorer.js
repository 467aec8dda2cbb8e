// What every page does: it stays up to date, and reads new blocks out, but rarely.

import { listen } from './connection.js';
import './refresh.js';

const QUIET = 15000; // milliseconds between two announcements

let last = null;
let quiet = false;

function announce() {
  if (quiet || !last) return;
  const winner = last.certificate ? `, won by ${last.name ?? last.certificate.winner_key.slice(0, 8)}` : '';
  document.getElementById('announcement').textContent = `Block ${last.height}${winner}.`;
  last = null;
  quiet = true;
  setTimeout(() => {
    quiet = false;
    announce();
  }, QUIET);
}

listen('block', (block) => {
  last = block;
  announce();
});
