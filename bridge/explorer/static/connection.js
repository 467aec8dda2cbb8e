// The server's stream of changes. It goes on by itself after the connection or the server was away.

const EVENTS = ['block', 'info', 'alarm', 'reset'];
const RETRY = 2000; // milliseconds

const listeners = new Map();
let source = null;

/** Call a function with the data of each event of a kind: those of /api/changes, and `open` for each new connection. */
export function listen(kind, listener) {
  listeners.set(kind, [...(listeners.get(kind) ?? []), listener]);
  if (kind === 'open' && source?.readyState === EventSource.OPEN) listener();
}

function tell(kind, data) {
  for (const listener of listeners.get(kind) ?? []) listener(data);
}

function say(text) {
  const element = document.getElementById('connection');
  if (element.textContent !== text) element.textContent = text;
}

function connect() {
  source = new EventSource('/api/changes');
  source.onopen = () => {
    say('');
    tell('open');
  };
  source.onerror = () => {
    say('Connection lost, trying again.');
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, RETRY); // the browser itself tries only if it is cut off
  };
  for (const kind of EVENTS) source.addEventListener(kind, ({ data }) => tell(kind, JSON.parse(data)));
}

// A browser has few connections for one server: a window that nobody sees gives its own back.
document.addEventListener('visibilitychange', () => {
  if (document.hidden) source.close();
  else if (source.readyState === EventSource.CLOSED) connect();
});
connect();
