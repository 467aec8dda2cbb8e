// Compares what the page shows with what the blocks say.

const NANO = 9; // losses are nano-nats: 10^-9

/**
 * Whether a text shows a value, which is a hash in hex, a word, a Number or a BigInt. A hash may be cut short with "…", a number may
 * have thousands separated or its unit behind it, a loss may be in rounded nats, a time may be a date of UTC.
 */
export function shows(text, value, name = '') {
  const plain = text.trim().replace(/\s*(nats|bytes|B)$/, '');
  if (plain === String(value)) return true;
  if (typeof value === 'string') return showsStart(plain, value);
  if (/^\d{1,3}([\s,’']\d{3})+$/.test(plain)) return plain.replace(/\D/g, '') === String(value);
  if (name === 'time') return showsTime(plain, value);
  return name.includes('loss') && showsNats(plain, value);
}

/** Whether it is a hash with its middle or end left out, of which eight digits are there. */
function showsStart(text, value) {
  const [start, end, more] = text.split('…');
  const enough = end !== undefined && more === undefined && start.length + end.length >= 8;
  return enough && value.startsWith(start) && value.endsWith(end);
}

function showsTime(text, value) {
  const date = /^(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d)(:\d\d)?( UTC|Z|\+00:00)?$/.exec(text);
  if (!date) return false;
  const seconds = Date.parse(`${date[1]}T${date[2]}${date[3] ?? ':00'}Z`) / 1000;
  return seconds === (date[3] ? value : value - (value % 60));
}

/** Whether it is the value in nats, rounded to the digits that are there. */
function showsNats(text, value) {
  const nats = /^(\d+)\.(\d{1,9})$/.exec(text);
  if (!nats) return false;
  const unit = 10n ** BigInt(NANO - nats[2].length);
  const difference = BigInt(nats[1] + nats[2]) * unit - BigInt(value);
  return 2n * (difference < 0n ? -difference : difference) <= unit;
}

/** The fields that the page shows of a block, all over the document: [element, name]. */
function fieldsShown(hash) {
  const elements = [...document.querySelectorAll('[data-hash] [data-field]')];
  return elements.filter((element) => element.closest('[data-hash]').dataset.hash === hash).map((each) => [each, each.dataset.field]);
}

/**
 * Rule shown, as a row of the report; `fields` are what the block says, or null if that is not known. A field of a part of the
 * certificate has a dot in its name: draw.weight.
 */
export function shownRow(hash, fields) {
  const shown = fieldsShown(hash);
  if (fields === null) return { rule: 'shown', good: null, text: '' };
  for (const [element, name] of shown) {
    const text = element.textContent;
    const value = name.split('.').reduce((object, part) => object?.[part], fields);
    if (value === undefined) return { rule: 'shown', good: false, text: `${name} is shown as ${text.trim()}, but the block has none` };
    if (!shows(text, value, name)) return { rule: 'shown', good: false, text: `${name} is shown as ${text.trim()}, but it is ${value}` };
  }
  return { rule: 'shown', good: true, text: `${shown.length} fields` };
}
