// The parameters that define a training network: the node's -training... options (SPEC.md, "Network parameters").
// The twins are bridge/consensus/params.py and bitcoind-patch/src/training/options.cpp.

import { compactSize, concat, encodeUint, fromHex, hex, isXOnlyKey, taggedHash } from './codec.js';

/** Of regtest, as RPC shows it. */
export const GENESIS_HASH = '0f9188f13cb7b2c71f2a335e3a4fc328bf5beb436012afca590b1a11466e2206';

const MAX_HEIGHT = 2 ** 31 - 1;
const MAX_COORDINATOR_KEYS = 16;
const MAX_ROUND_SECONDS = 24 * 60 * 60;
const DEFAULT_ROUND_SECONDS = '60';

/** Options that define no training network. The message names option and value, as the node's does. */
export class OptionError extends Error {}

/**
 * The parameters of a training network.
 *
 * `keys` has the coordinator's keys by the height from which they are in force: {threshold, keys}, each key 32 bytes. `beacon`
 * and `model` are 32 bytes. `chainId` are the 32 bytes that identify the network; every signature covers them.
 */
export class TrainingParams {
  constructor(keys, beacon, model, roundSeconds) {
    Object.assign(this, { keys, beacon, model, roundSeconds });
    this.heights = [...keys.keys()].sort((left, right) => left - right);
    this.chainId = trainingChainId(this);
  }

  /** The first height at which a block needs a certificate. */
  get startHeight() {
    return this.heights[0];
  }

  /** The keys in force at a height, which must be the start height or above it. */
  keysAt(height) {
    return this.keys.get(this.heights.findLast((start) => start <= height));
  }

  /** The parameters that options of bitcoin.conf define: name → value, or a list of values. Throws OptionError. */
  static fromNodeOptions(options) {
    const keys = new Map();
    for (const value of valuesOf(options, 'trainingkeys')) {
      const [height, each] = parseKeys(value);
      if (keys.has(height)) throw new OptionError(`-trainingkeys=${value}: height ${height} is there twice.`);
      keys.set(height, each);
    }
    if (keys.size === 0) throw missing('trainingkeys');
    const beacon = readBytes32(options, 'trainingbeacon');
    const model = readBytes32(options, 'trainingmodel');
    const seconds = readOnce(options, 'traininground') ?? DEFAULT_ROUND_SECONDS;
    const roundSeconds = wholeNumber(seconds, 1, MAX_ROUND_SECONDS);
    if (roundSeconds === null) {
      const range = `from 1 to ${MAX_ROUND_SECONDS}`;
      throw new OptionError(`-traininground must be a whole number of seconds ${range}, not '${seconds}'.`);
    }
    return new TrainingParams(keys, beacon, model, roundSeconds);
  }
}

function trainingChainId({ heights, keys, beacon, model, roundSeconds }) {
  const entries = heights.map((height) => {
    const each = keys.get(height);
    return concat(encodeUint(height, 4), encodeUint(each.threshold, 1), compactSize(each.keys.length), ...each.keys);
  });
  const parts = [compactSize(heights.length), ...entries, beacon, encodeUint(roundSeconds, 4), model];
  return taggedHash('traincert/chain', fromHex(GENESIS_HASH).reverse(), ...parts);
}

const valuesOf = (options, name) => [options[name] ?? []].flat().map(String);

function missing(name) {
  const needs = 'a training network needs -trainingkeys, -trainingbeacon and -trainingmodel.';
  return new OptionError(`-${name} is missing: ${needs}`);
}

/** The one value of an option, or null if it is not given. */
function readOnce(options, name) {
  const values = valuesOf(options, name);
  if (values.length > 1) {
    throw new OptionError(`-${name} may be given once only, not as both '${values[0]}' and '${values[1]}'.`);
  }
  return values[0] ?? null;
}

function readBytes32(options, name) {
  const value = readOnce(options, name);
  if (value === null) throw missing(name);
  const bytes = fromHex(value);
  if (bytes?.length !== 32) throw new OptionError(`-${name} must be 64 hex digits, not '${value}'.`);
  return bytes;
}

function parseKeys(value) {
  const fail = (problem) => new OptionError(`-trainingkeys=${value}: ${problem}`);
  const parts = value.split(':');
  if (parts.length !== 3) throw fail('expected <height>:<m>:<key>[,<key>...].');
  const height = wholeNumber(parts[0], 1, MAX_HEIGHT);
  if (height === null) throw fail(`the height must be a whole number from 1 to ${MAX_HEIGHT}, not '${parts[0]}'.`);
  const keys = new Map();
  for (const digits of parts[2].split(',')) {
    const key = fromHex(digits);
    if (key?.length !== 32 || !isXOnlyKey(key)) throw fail(`'${digits}' is not an x-only public key of 64 hex digits.`);
    if (keys.has(hex(key))) throw fail(`key '${digits}' is there twice.`);
    keys.set(hex(key), key);
  }
  if (keys.size > MAX_COORDINATOR_KEYS) throw fail(`${keys.size} keys are more than ${MAX_COORDINATOR_KEYS}.`);
  const threshold = wholeNumber(parts[1], 1, keys.size);
  if (threshold === null) {
    throw fail(`m must be a whole number from 1 to the number of keys (${keys.size}), not '${parts[1]}'.`);
  }
  return [height, { threshold, keys: [...keys.values()] }];
}

/** The number that decimal digits stand for, or null if there are others or it is out of range. */
function wholeNumber(text, least, most) {
  const value = Number(text);
  return /^\d+$/.test(text) && value >= least && value <= most ? value : null;
}
