// Reports on blocks that the browser keeps (IndexedDB), so that nothing is checked twice. Without it, as in some private windows, all
// works, and blocks are checked again.

const DATABASE = 'traincert-checks';
const VERSION = 1; // another one, after a change of the rules or of the reports, drops all that older code has found
const STORE = 'reports';

let opened = null;

function open() {
  opened ??= done(() => {
    const request = indexedDB.open(DATABASE, VERSION);
    request.onupgradeneeded = () => {
      for (const name of request.result.objectStoreNames) request.result.deleteObjectStore(name);
      request.result.createObjectStore(STORE);
    };
    return request;
  }).then((database) => {
    database.onversionchange = () => database.close(); // a newer page in another window waits for this
    return database;
  });
  return opened;
}

const done = (start) => new Promise((resolve, reject) => {
  const request = start();
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

async function use(mode, start) {
  try {
    const database = await open();
    return await done(() => start(database.transaction(STORE, mode).objectStore(STORE)));
  } catch {
    return undefined;
  }
}

/** The report kept under a key, or undefined. */
export const keptReport = (key) => use('readonly', (store) => store.get(key));

export const keepReport = (key, report) => use('readwrite', (store) => store.put(report, key));
