// Checks one block as far as it can be checked, and lists what it found of each rule. The node stops at the first broken rule; this
// goes on, so that a reader sees all of them.

import { checkCoinbaseHeight, checkHash, checkMerkleRoot } from './block.js';
import { certificateJson } from './certificate.js';
import { hex, reversedHex } from './codec.js';
import { BrokenRule } from './errors.js';
import { checkTrainingCertificate, contextualCheckTrainingCertificate, readTrainingPayload } from './rules.js';
import { RULES } from './words.js';

const PREFIX = 'bad-traincert-';
const OF_EVERY_BLOCK = ['hash', 'merkleroot'];
const PAYLOAD_REASONS = ['missing', 'multiple', 'parse', 'version'];

/** A block that cannot be had. The message says why. */
export class UnavailableError extends Error {}

/** What was found of each rule. `good` is null for a rule that was not checked. */
class Rows {
  constructor(rules) {
    this.rows = rules.map((rule) => ({ rule, good: null, text: '' }));
  }

  note(rule, good, text) {
    Object.assign(this.rows.find((row) => row.rule === rule), { good, text });
  }

  /** Run a rule's check, and note what came of it. Returns what the check does, or null if the rule is broken. */
  run(rule, check, words = (found) => found) {
    try {
      const found = check();
      this.note(rule, true, words(found));
      return found;
    } catch (error) {
      if (!(error instanceof BrokenRule)) throw error;
      this.note(rule, false, error.message);
      return null;
    }
  }

  /** Run a check of rules.js. That of the payload has four reasons. */
  runTraining(reason, check) {
    if (reason !== 'payload') return this.run(PREFIX + reason, check);
    try {
      const payload = check();
      for (const each of PAYLOAD_REASONS) this.note(PREFIX + each, true, `in output ${payload.output} of the first transaction`);
      return payload;
    } catch (error) {
      if (!(error instanceof BrokenRule)) throw error;
      // What has another version cannot be decoded, and of what cannot be decoded the version is not known.
      for (const each of PAYLOAD_REASONS.slice(0, 2)) {
        if (PREFIX + each === error.reason) break;
        this.note(PREFIX + each, true, '');
      }
      this.note(error.reason, false, error.message);
      return null;
    }
  }
}

/** Rule network: the parameters have the chain_id that the server states, and the one that the visitor trusts, if any. */
export function checkNetwork(params, stated, trusted) {
  const found = hex(params.chainId);
  if (stated !== found) throw new BrokenRule('network', `the options give chain_id ${found}, but the server says ${stated}`);
  if (trusted && trusted !== found) throw new BrokenRule('network', `the chain_id is ${found}, but you trust ${trusted}`);
  return `the chain_id is ${found}, ${trusted ? 'the one that you trust' : 'but you have not said which one you trust'}`;
}

/**
 * Check a block, which is given by its hash and height: {certified, rows, fields}.
 *
 * `params` are null if there is no training network. `fetchBlock(hash)` gives a block's bytes, or throws UnavailableError.
 * `certified` says whether a block of this height needs a certificate. `rows` are {rule, good, text} in the order of RULES. `fields`
 * are what the block and its certificate say, with RPC's names; null if the bytes are not those of the block.
 */
export async function checkBlock(hash, height, params, fetchBlock) {
  const certified = params !== null && height >= params.startHeight;
  const needed = (rule) => (certified ? rule === 'parent' || rule.startsWith(PREFIX) : rule === 'coinbase-height');
  const rows = new Rows(Object.keys(RULES).filter((rule) => OF_EVERY_BLOCK.includes(rule) || needed(rule)));
  const report = { certified, rows: rows.rows, fields: null };

  const bytes = await fetched(hash, fetchBlock, rows, 'hash');
  if (bytes === null || rows.run('hash', () => checkHash(bytes, hash)) === null) return report;
  const words = ({ merkleRoot }) => `the Merkle root is ${reversedHex(merkleRoot)}`;
  const block = rows.run('merkleroot', () => checkMerkleRoot(bytes), words);
  if (block === null) return report;
  report.fields = blockFields(block, height);
  if (!certified) {
    rows.run('coinbase-height', () => checkCoinbaseHeight(block, height));
    return report;
  }

  const rule = (reason, check) => rows.runTraining(reason, check);
  const payload = checkTrainingCertificate(block, height, params, rule);
  if (payload) {
    const winnerSignature = hex(payload.winnerSignature);
    Object.assign(report.fields, certificateJson(payload.certificate), { winner_signature: winnerSignature });
  }
  const parent = await checkParent(block, height > params.startHeight, fetchBlock, rows);
  if (payload && parent) {
    const { certificate } = payload;
    contextualCheckTrainingCertificate(certificate, parent.certificate, block.time, parent.time, params, rule);
    if (!certificate.draw && rows.rows.find((row) => row.rule === 'bad-traincert-award').good) {
      for (const each of ['weight', 'draw']) rows.note(PREFIX + each, true, 'nothing was drawn');
    }
  }
  return report;
}

/** Rule parent. Returns the parent's time and, if it must have one, its certificate. */
async function checkParent(block, certified, fetchBlock, rows) {
  const hash = reversedHex(block.prevBlock);
  const bytes = await fetched(hash, fetchBlock, rows, 'parent');
  if (bytes === null) return null;
  const check = () => {
    checkHash(bytes, hash);
    const { time, transactions } = checkMerkleRoot(bytes);
    return { time, certificate: certified ? readTrainingPayload(transactions[0]).certificate : null };
  };
  return rows.run('parent', check, () => `block ${hash}`);
}

/** The bytes of a block, or null if they cannot be had: then the rule is not checked. */
async function fetched(hash, fetchBlock, rows, rule) {
  try {
    return await fetchBlock(hash);
  } catch (error) {
    if (!(error instanceof UnavailableError)) throw error;
    rows.note(rule, null, error.message);
    return null;
  }
}

function blockFields(block, height) {
  return {
    height,
    hash: block.hash,
    blockhash: block.hash,
    previousblockhash: reversedHex(block.prevBlock),
    merkleroot: reversedHex(block.merkleRoot),
    time: block.time,
    nTx: block.transactions.length,
    size: block.size,
  };
}
