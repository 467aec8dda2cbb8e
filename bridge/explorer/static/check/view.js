// What the reader sees of reports on blocks. Texts from the server are only ever text, never HTML.

import { RULES, STATES } from './words.js';

/** A new element. */
export function make(tag, properties = {}, ...children) {
  const { data = {}, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

/** The state of a block, of its report's rows: good, bad, none or unknown. */
export function stateOf({ certified, rows }) {
  if (rows.some((row) => row.good === false)) return 'bad';
  if (rows.some((row) => row.good === null)) return 'unknown';
  return certified ? 'good' : 'none';
}

const isBroken = (row) => row.good === false;

/** One sentence on a report. */
export function summary(report) {
  const state = stateOf(report);
  const text = STATES[state][1];
  const broken = report.rows.filter(isBroken);
  if (broken.length) return `${text}: ${broken.map(({ rule, text: found }) => `${rule} (${found})`).join('; ')}.`;
  if (state === 'unknown') return `${text}: ${report.rows.find((row) => row.good === null && row.text)?.text ?? ''}.`;
  return text;
}

/** Show a state in a mark beside a block; `report` is there when it has been checked. */
export function showMark(element, state, report = null) {
  element.dataset.state = state;
  const broken = report?.rows.find(isBroken);
  element.textContent = broken ? `✗ ${broken.rule}` : STATES[state][0];
  element.title = report ? summary(report) : STATES[state][1];
}

/** Fill the list of all rules on a block's page. */
export function showRules(section, state, report = null) {
  const results = { true: ['good', '✓ holds'], false: ['bad', '✗ broken'], null: ['unknown', '– not checked'] };
  section.dataset.state = state;
  let shown = section.querySelector('.checks-shown');
  if (!shown) {
    const note = 'Your browser does not check amounts and signatures of transactions. Nodes do.';
    shown = make('div', { className: 'checks-shown' }, make('p', { role: 'status' }), make('table'), make('p', {}, note));
    section.append(shown);
  }
  const [status, table] = shown.children;
  const text = report ? summary(report) : STATES[state][1];
  if (status.textContent !== text) status.textContent = text; // or it would be read out again
  if (!report) return;
  const head = make('tr', {}, ...['Rule', 'What is checked', 'Result', 'What was found'].map((each) => make('th', { scope: 'col' }, each)));
  const rows = report.rows.map(({ rule, good, text: found }) => {
    const [result, words] = results[good];
    const cells = [RULES[rule], words, found].map((each) => make('td', {}, each));
    return make('tr', { data: { rule, state: result } }, make('th', { scope: 'row' }, rule), ...cells);
  });
  table.replaceChildren(make('thead', {}, head), make('tbody', {}, ...rows));
}
