// The chart of loss and metric by height, with a strip of the blocks in the colours of their winners above it.

import uPlot from './vendor/uplot-1.6.32/dist/uPlot.esm.js';

const HEIGHT = 300;
const STRIP = 14; // pixels
const COLOURS = 12; // as in explorer.css

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The range of numbers, with some space around; null is left out, and is the range of nothing. */
function around(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value === null) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  const space = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return low > high ? null : [low - space, high + space];
}

/**
 * A chart in an element, of the columns of /api/series, which may grow. `point` is called with the index of the block that the pointer
 * is on, or null; `choose` with that on which the reader clicked.
 */
export class Chart {
  constructor(element, series, { point, choose }) {
    this.element = element;
    this.series = series;
    this.count = 0;
    this.point = point;
    this.choose = choose;
    this.make();
    new ResizeObserver(() => this.plot.setSize(this.size())).observe(element);
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
      this.plot.destroy();
      this.make();
    });
  }

  /** Show the first blocks of the series. The axes have room for all. */
  draw(count) {
    this.count = count;
    const { height, loss, metric } = this.series;
    this.measure();
    if (this.plot.height !== this.size().height) this.plot.setSize(this.size());
    this.plot.setData([height, loss, metric].map((column) => column.slice(0, count)));
  }

  measure() {
    this.ranges = { loss: around(this.series.loss), metric: around(this.series.metric) };
  }

  size() {
    const { loss, metric } = this.ranges;
    return { width: Math.max(200, this.element.clientWidth), height: loss || metric ? HEIGHT : STRIP + 60 };
  }

  make() {
    this.measure();
    this.colours = Array.from({ length: COLOURS }, (_, number) => style(`--c${number}`));
    const grid = { stroke: style('--line'), width: 1 };
    const axis = { stroke: style('--soft'), grid, ticks: grid, font: '12px system-ui, sans-serif' };
    const labels = (name) => (_, values) => values.map((value) => (this.ranges[name] ? String(value) : ''));
    const heights = () => [this.series.height[0] - 0.5, this.series.height.at(-1) + 0.5];
    const options = {
      ...this.size(),
      padding: [STRIP + 10, null, null, null],
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { size: 7 } },
      scales: {
        x: { time: false, range: heights },
        loss: { range: () => this.ranges.loss ?? [0, 1] },
        metric: { range: () => this.ranges.metric ?? [0, 1] },
      },
      axes: [
        { ...axis, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000, 100000] },
        { ...axis, scale: 'loss', size: 54, values: labels('loss') },
        { ...axis, scale: 'metric', side: 1, size: 54, grid: { show: false }, values: labels('metric') },
      ],
      series: [
        {},
        { scale: 'loss', stroke: style('--loss'), width: 2 },
        { scale: 'metric', stroke: style('--metric'), width: 2, dash: [6, 4] },
      ],
      hooks: { draw: [(plot) => this.drawWinners(plot)], setCursor: [({ cursor }) => this.point(cursor.idx ?? null)] },
    };
    this.plot = new uPlot(options, [[], [], []], this.element);
    this.plot.over.addEventListener('click', () => this.plot.cursor.idx != null && this.choose(this.plot.cursor.idx));
    if (this.series.height.length) this.draw(this.count);
  }

  /** Blocks that were drawn again have a mark. */
  drawWinners(plot) {
    const { ctx, bbox } = plot;
    const { height, winner, round } = this.series;
    const pixel = devicePixelRatio;
    const top = bbox.top - (STRIP + 4) * pixel;
    let drawn = -1;
    for (let index = 0; index < this.count; index += 1) {
      const left = Math.round(plot.valToPos(height[index] - 0.5, 'x', true));
      const right = Math.round(plot.valToPos(height[index] + 0.5, 'x', true));
      if (right <= drawn && !round[index]) continue; // less than a pixel
      const gap = right - left > 4 * pixel ? pixel : 0;
      ctx.fillStyle = this.colours[winner[index] % COLOURS];
      ctx.fillRect(left, top, Math.max(right - left - gap, pixel), STRIP * pixel);
      if (round[index]) {
        ctx.fillStyle = style('--ink');
        ctx.fillRect(left, top + (STRIP - 4) * pixel, Math.max(right - left - gap, 2 * pixel), 4 * pixel);
      }
      drawn = right;
    }
  }
}
