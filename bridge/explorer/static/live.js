// The live page: the charts grow with the chain, and play it back from its start.

import { Chart } from './chart.js';
import { listen } from './connection.js';
import { showBefore } from './refresh.js';
import { request } from './request.js';

const DRAW = 200; // milliseconds between two drawings
const STEP = 100; // milliseconds between two steps of the playback
const STEPS = 200; // at most, from start to end

const byId = (id) => document.getElementById(id);
const [chartElement, readout, slider, play, now] = ['chart', 'readout', 'at', 'play', 'now'].map(byId);
const series = { height: [], time: [], loss: [], metric: [], winner: [], round: [], miners: [] };
let chart = null;
let loading = null; // the blocks that came while the series is fetched
let shown = null; // up to which index; null: all
let player = null;
let drawing = false;

// The series.

async function load() {
  if (loading) {
    loading.again = true;
    return;
  }
  loading = { blocks: [], again: false };
  try {
    Object.assign(series, await (await request('/api/series')).json());
  } catch {
    // the connection says so, and a new one loads again
  }
  const { blocks, again } = loading;
  loading = null;
  if (again) load();
  else for (const block of blocks) add(block);
  draw();
}

function add(block) {
  if (loading) {
    loading.blocks.push(block);
    return;
  }
  const { height, certificate } = block;
  const last = series.height.at(-1);
  if (!certificate || height <= last) return;
  if (height !== last + 1) {
    load();
    return;
  }
  let winner = series.miners.findIndex(({ key }) => key === certificate.winner_key);
  if (winner < 0) winner = series.miners.push({ key: certificate.winner_key, name: block.name }) - 1;
  const { time, loss, metric } = block;
  for (const [name, value] of Object.entries({ height, time, loss, metric, winner, round: certificate.round })) series[name].push(value);
  draw();
}

// What is drawn.

function draw() {
  if (drawing) return;
  drawing = true;
  setTimeout(() => {
    drawing = false;
    const count = series.height.length;
    byId('training').hidden = count === 0;
    if (count === 0) return;
    chart ??= new Chart(chartElement, series, { point: describe, choose: (index) => location.assign(`/block/${series.height[index]}`) });
    if (shown !== null && shown >= count) stop();
    chart.draw(shown === null ? count : shown + 1);
    chartElement.dataset.blocks = count;
    byId('untrained').hidden = series.loss.some((loss) => loss !== null);
    chartElement.setAttribute('aria-label', summary());
    showWinners();
    Object.assign(slider, { min: series.height[0], max: series.height.at(-1), value: series.height[shown ?? count - 1] });
    describe(chart.plot.cursor.idx ?? null);
  }, DRAW);
}

const nameOf = (index) => {
  const { key, name } = series.miners[index];
  return name ?? `${key.slice(0, 8)}…${key.slice(-8)}`;
};

function words(index) {
  const { height, winner, loss, metric, round } = series;
  const parts = [`Block ${height[index]}`, `won by ${nameOf(winner[index])}`];
  if (loss[index] !== null) parts.push(`loss ${loss[index].toFixed(4)} nats`);
  if (metric[index] !== null) parts.push(`metric ${metric[index].toFixed(4)}`);
  if (round[index]) parts.push(`drawn again ${round[index]} times`);
  return parts.join(', ');
}

/** Say what a block is, or else the last one that is shown. */
function describe(index) {
  const last = shown ?? series.height.length - 1;
  readout.textContent = words(index ?? last);
  slider.setAttribute('aria-valuetext', words(last));
}

function summary() {
  const ends = (name) => {
    const values = series[name].filter((value) => value !== null);
    return values.length ? `from ${values[0].toFixed(4)} to ${values.at(-1).toFixed(4)}` : 'not known';
  };
  return `Chart of ${series.height.length} blocks. Loss in nats: ${ends('loss')}. Metric: ${ends('metric')}.`;
}

function showWinners() {
  const list = byId('winners');
  for (let index = list.children.length; index < series.miners.length; index += 1) {
    const link = document.createElement('a');
    Object.assign(link, { className: `who c${index % 12}`, href: `/miner/${series.miners[index].key}`, title: series.miners[index].key });
    const dot = Object.assign(document.createElement('span'), { className: 'dot' });
    link.append(dot, nameOf(index));
    list.appendChild(document.createElement('li')).append(link);
  }
}

// The playback.

/** Show the chain up to an index, or as it is now: null. */
function show(index) {
  shown = index === null || index >= series.height.length - 1 ? null : index;
  now.disabled = shown === null;
  byId('blocks-title').textContent = shown === null ? 'Latest blocks' : `Blocks up to ${series.height[shown]}`;
  showBefore(shown === null ? null : series.height[shown] + 1);
  if (shown === null) pause();
  draw();
}

function pause() {
  clearInterval(player);
  player = null;
  play.textContent = 'Play';
}

function stop() {
  pause();
  show(null);
}

play.addEventListener('click', () => {
  if (player) {
    pause();
    return;
  }
  if (shown === null) show(0);
  play.textContent = 'Pause';
  player = setInterval(() => show(shown + Math.ceil(series.height.length / STEPS)), STEP);
});
slider.addEventListener('input', () => show(Number(slider.value) - series.height[0]));
now.addEventListener('click', stop);

listen('open', load);
listen('reset', load);
listen('block', add);
